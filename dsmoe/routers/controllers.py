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
    """State that lives beside the model. Subclasses keep their tensors in `self.state`.

    Attributes:
        target_density: share of active (token, expert) pairs that it holds; None if it holds none.
    """

    target_density: float | None = None

    def __init__(self, **state: Tensor):
        self.state = state

    @abstractmethod
    def update(self, totals: RoutingTotals) -> None:
        """Move once, after an optimizer step. Evaluation never calls it."""

    def metrics(self) -> dict[str, Tensor]:
        """Scalars for metrics.jsonl, by name."""
        return {}

    def copy_expert(self, layer: int, source: int, target: int) -> None:
        """Give an expert the state of another one, when it restarts as a copy of it. By default that is done with every
        tensor [L, E, ...], L being all MoE layers."""
        for value in self.state.values():
            if value.dim() >= 2:
                value[layer, target] = value[layer, source]

    def skip_warmup(self) -> None:  # noqa: B027
        """Continue as after a warm-up, for benchmarks."""

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


class BiasController(Controller):
    """A bias for each layer and expert that rises while the expert gets less than the mean load and falls otherwise.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; method of 2408.15664): b += rate * sign(mean(c) - c) on the routes c
    of all ranks and micro-steps. Integers are compared, so the sign is exact; at the mean the bias stays.
    """

    def __init__(self, num_layers: int, num_experts: int, rate: float):
        super().__init__(bias=torch.zeros(num_layers, num_experts, dtype=torch.float32))
        self.rate = rate

    def update(self, totals: RoutingTotals) -> None:
        counts_LE = totals.counts_LE
        missing_LE = counts_LE.sum(dim=1, keepdim=True) - counts_LE.size(1) * counts_LE  # E * (mean - count)
        self.state["bias"] = self.state["bias"] + self.rate * missing_LE.sign()

    def metrics(self) -> dict[str, Tensor]:
        bias_LE = self.state["bias"]
        return {"bias_spread": (bias_LE.amax(dim=1) - bias_LE.amin(dim=1)).mean()}


class PIController(Controller):
    """A proportional-integral controller that holds the mean number of active experts at a target, through one p.

    e_t = (target - mean active) / E;  p = p0 + kp e_t + ki sum(e), within [p_min, p_max]. Anti-windup: the integral
    term stops where p0 plus it alone would leave that range, so p comes back as soon as the error turns.
    """

    def __init__(self, initial: float, kp: float, ki: float, target_density: float, p_min: float, p_max: float):
        super().__init__(
            p=torch.tensor(initial, dtype=torch.float32),
            integral=torch.tensor(0.0, dtype=torch.float32),  # ki * sum(e)
        )
        self.initial, self.kp, self.ki = initial, kp, ki
        self.target_density, self.p_min, self.p_max = target_density, p_min, p_max

    @property
    def value(self) -> Tensor:
        """p, fp32 scalar on the model's device."""
        return self.state["p"]

    def update(self, totals: RoutingTotals) -> None:
        error = (self.target_density - totals.density()).to(torch.float32)
        integral = self.state["integral"] + self.ki * error
        self.state["integral"] = integral.clamp(self.p_min - self.initial, self.p_max - self.initial)
        p = self.initial + self.kp * error + self.state["integral"]
        self.state["p"] = p.clamp(self.p_min, self.p_max)

    def metrics(self) -> dict[str, Tensor]:
        return {"p": self.value}


class CutoffController(Controller):
    """An exponential moving average of a statistic for each layer and expert, with Adam's bias correction.

    c <- a c + (1 - a) s, where s is `Routing.statistic_E` averaged over ranks and micro-steps; used as c / (1 - a^n)
    after n updates. n is also kept as a number of the host, so that routers can ask for it without waiting.
    """

    def __init__(self, num_layers: int, num_experts: int, decay: float):
        super().__init__(
            average=torch.zeros(num_layers, num_experts, dtype=torch.float32),
            updates=torch.tensor(0, dtype=torch.int64),
        )
        self.decay = decay
        self.updates = 0

    def skip_warmup(self) -> None:
        self.updates = max(self.updates, 1)

    def value_E(self, layer: int) -> Tensor:
        """fp32 [E], the corrected average of a layer; 0 before the first update."""
        return self.state["average"][layer] / (1 - self.decay**self.updates if self.updates else 1.0)

    def update(self, totals: RoutingTotals) -> None:
        statistic_LE = totals.statistic_LE / totals.passes
        self.state["average"] = self.decay * self.state["average"] + (1 - self.decay) * statistic_LE
        self.state["updates"] = self.state["updates"] + 1
        self.updates += 1

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.updates = int(self.state["updates"])

    def metrics(self) -> dict[str, Tensor]:
        corrected = torch.stack([self.value_E(layer) for layer in range(len(self.state["average"]))])
        return {"cutoff_mean": corrected.mean()}
