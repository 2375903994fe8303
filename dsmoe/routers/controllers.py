"""Controllers: fp32 state that steers density, updated once per optimizer step from exact global counts.

A controller is no module: DeepSpeed casts a module's buffers with the model, and a coefficient in bf16 would move in
steps of its own. Its state is saved in the checkpoint by name. Every rank updates it from the same integers, so it is
bit-identical everywhere without a broadcast, and nothing here waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dsmoe.errors import CheckpointError
from dsmoe.routers.recorder import RoutingTotals


class Controller(ABC):
    """State that lives beside the model. Subclasses keep their tensors in `self.state`."""

    def __init__(self, **state: Tensor):
        self.state = state

    @abstractmethod
    def update(self, totals: RoutingTotals) -> None:
        """Move once, after an optimizer step. Evaluation never calls it."""

    def metrics(self) -> dict[str, Tensor]:
        """Scalars for metrics.jsonl, by name."""
        return {}

    def to(self, device) -> Controller:
        self.state = {name: value.to(device) for name, value in self.state.items()}
        return self

    def load(self, state: dict[str, Tensor]) -> None:
        """Take saved state. Raises `CheckpointError` if it is of another controller."""
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in self.state.items()}:
            found, expected = (sorted(f"{n} {tuple(v.shape)}" for n, v in s.items()) for s in (state, self.state))
            raise CheckpointError(f"the checkpoint's router controller holds {found}, this router's {expected}")
        self.state = {name: value.to(self.state[name].device) for name, value in state.items()}


class LambdaController(Controller):
    """A loss coefficient that grows by a factor while density is too high and shrinks by it while it is too low.

    ReMoE (arXiv 2412.14711) Eq. 7-8, Routing-Free MoE (2604.00801) Eq. 17. One value for all layers.

    Args:
        initial: lambda at step 0.
        factor: alpha, or 1 + eta; more than 1.
        target_density: wanted share of active (token, expert) pairs.
        shrink_at_target: what happens at exact equality: shrink (ReMoE's code) or nothing (both papers).
        maximum: lambda never exceeds it.
    """

    def __init__(
        self, initial: float, factor: float, target_density: float, shrink_at_target: bool = True,
        maximum: float = float("inf"),
    ):  # fmt: skip
        super().__init__(**{"lambda": torch.tensor(initial, dtype=torch.float32)})
        self.factor = factor
        self.target_density = target_density
        self.shrink_at_target = shrink_at_target
        self.maximum = maximum

    @property
    def value(self) -> Tensor:
        """fp32 scalar on the model's device."""
        return self.state["lambda"]

    def update(self, totals: RoutingTotals) -> None:
        density = totals.density()
        at_target = self.value / self.factor if self.shrink_at_target else self.value
        moved = torch.where(density < self.target_density, self.value / self.factor, at_target)
        moved = torch.where(density > self.target_density, self.value * self.factor, moved)
        self.state["lambda"] = moved.clamp(max=self.maximum)

    def metrics(self) -> dict[str, Tensor]:
        return {"lambda": self.value}
