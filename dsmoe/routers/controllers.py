"""Controllers: fp32 state that steers routing, updated once per optimizer step from exact global counts.

A controller is not a module: DeepSpeed casts a module's buffers with the model, and bf16 would round the steps of a
coefficient. Its state is saved in the checkpoint by name. Every rank updates it from the same integers, so it is
bit-identical on all of them without a broadcast, and nothing here waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dsmoe.errors import CheckpointError
from dsmoe.routers.histogram import Histogram
from dsmoe.routers.recorder import RoutingTotals

BIAS_HISTOGRAM = Histogram(-1.5, 1.5)  # of a sigmoid subtracted from a biased one
SIGMOID_HISTOGRAM = Histogram(0.0, 1.0)


class Controller(ABC):
    """State that lives beside the model. Subclasses keep their tensors in `self.state`.

    Attributes:
        target_density: share of active (token, expert) pairs that it steers towards; None if it has no such target.
        per_micro_batch: whether it moves after every micro-batch, not once per optimizer step.
    """

    target_density: float | None = None
    per_micro_batch = False

    def __init__(self, **state: Tensor):
        self.state = state

    @abstractmethod
    def update(self, totals: RoutingTotals) -> None:
        """Move once, from the counts since the last move. Evaluation never calls it."""

    def after_micro_batch(self, totals: RoutingTotals) -> None:
        """Called after each forward pass of training, with its counts."""
        if self.per_micro_batch:
            self.update(totals)

    def after_step(self, totals: RoutingTotals) -> None:
        """Called after each optimizer step, with the counts of all its micro-batches."""
        if not self.per_micro_batch:
            self.update(totals)

    def metrics(self) -> dict[str, Tensor]:
        """Scalars for metrics.jsonl, by name."""
        return {}

    def copy_expert(self, layer: int, source: int, target: int, shape_LE: tuple[int, int]) -> None:
        """Give an expert the state of another one, of which it restarts as a copy: by default in every tensor
        [L, E, ...], with L MoE layers."""
        for value in self.state.values():
            if tuple(value.shape[:2]) == shape_LE:
                value[layer, target] = value[layer, source]

    def combine_experts(self, shares_LNE: Tensor) -> dict[str, Tensor]:
        """The state of a model with N experts that are made of these E, each the mean of some with these shares: by
        default so in every tensor [L, E, ...], with L MoE layers."""
        layers, _, experts = shares_LNE.shape
        return {
            name: torch.einsum("lne,le...->ln...", shares_LNE.to(value), value)
            if tuple(value.shape[:2]) == (layers, experts)
            else value
            for name, value in self.state.items()
        }

    def skip_warmup(self) -> None:  # noqa: B027
        """Continue as after a warm-up, for benchmarks."""

    def to(self, device) -> Controller:
        self.state = {name: value.to(device) for name, value in self.state.items()}
        return self

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore saved state. Raises `CheckpointError` if its names or shapes do not match."""
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in self.state.items()}:
            saved, expected = (sorted(f"{n} {tuple(v.shape)}" for n, v in s.items()) for s in (state, self.state))
            raise CheckpointError(f"the checkpoint's router controller holds {saved}, this router's {expected}")
        self.state = {name: value.to(self.state[name].device) for name, value in state.items()}


class LambdaController(Controller):
    """A loss coefficient that grows by a factor while density is above its target and shrinks by it while below.

    ReMoE (arXiv 2412.14711) Eq. 7-8, Routing-Free MoE (2604.00801) Eq. 17. One value for all layers.

    Args:
        initial: lambda at step 0.
        factor: alpha, or 1 + eta; more than 1.
        target_density: target share of active (token, expert) pairs.
        shrink_at_target: whether it shrinks at exact equality, as in ReMoE's code, or stays, since sign(0) = 0 in both
            papers.
        maximum: upper bound of lambda.
        per_micro_batch: move after every micro-batch.
    """

    def __init__(
        self, initial: float, factor: float, target_density: float, shrink_at_target: bool = True,
        maximum: float = float("inf"), per_micro_batch: bool = False,
    ):  # fmt: skip
        super().__init__(**{"lambda": torch.tensor(initial, dtype=torch.float32)})
        self.factor = factor
        self.target_density = target_density
        self.shrink_at_target = shrink_at_target
        self.maximum = maximum
        self.per_micro_batch = per_micro_batch

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
    """A bias for each layer and expert that rises while the expert's load is below the mean, and falls while above.

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
        return {"bias_spread": bias_spread(self.state["bias"])}


class QuantileBiasController(Controller):
    """A bias for each layer and expert from a quantile: quantile balancing, without a rate and without a loss.

    A token uses e if its score s_e plus b_e exceeds the (k+1)-th largest of its biased scores, tau. So b_e becomes the
    value below which tau - s_e lies for k/E of the tokens of all ranks, from the integer histogram
    `Routing.histogram_EB` of tau - s; then the biases of a layer are centered at 0.
    """

    def __init__(self, num_layers: int, num_experts: int, k: int):
        super().__init__(bias=torch.zeros(num_layers, num_experts, dtype=torch.float32))
        self.share = k / num_experts

    def update(self, totals: RoutingTotals) -> None:
        bias_LE = BIAS_HISTOGRAM.quantile(totals.histogram_LEB, self.share)
        bias_LE = bias_LE - bias_LE.mean(dim=1, keepdim=True)
        self.state["bias"] = torch.where(totals.tokens > 0, bias_LE, self.state["bias"])

    def metrics(self) -> dict[str, Tensor]:
        return {"bias_spread": bias_spread(self.state["bias"])}


def bias_spread(bias_LE: Tensor) -> Tensor:
    """Largest minus smallest bias of a layer, mean over layers."""
    return (bias_LE.amax(dim=1) - bias_LE.amin(dim=1)).mean()


class PIController(Controller):
    """A proportional-integral controller of p that holds the mean number of active experts at a target.

    e_t = (target - mean active) / E;  p = p0 + kp e_t + ki sum(e), within [p_min, p_max]. Anti-windup: the integral
    term is clamped so that p0 plus it stays within that range, and p reacts as soon as the error changes sign.
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
    """An exponential moving average of a cutoff for each layer and expert, with Adam's bias correction.

    c <- a c + (1 - a) s, used as c / (1 - a^n) after n updates. s is `Routing.statistic_E` averaged over ranks and
    micro-steps or, with a `share`, the logit that this share of the tokens of all ranks exceeds, from the integer
    histogram `Routing.histogram_EB` of their sigmoids. n is also stored as a Python integer, so that routers can read
    it without waiting for the device.
    """

    def __init__(self, num_layers: int, num_experts: int, decay: float, share: float | None = None):
        super().__init__(
            average=torch.zeros(num_layers, num_experts, dtype=torch.float32),
            updates=torch.tensor(0, dtype=torch.int64),
        )
        self.decay, self.share = decay, share
        self.updates = 0

    def skip_warmup(self) -> None:
        self.updates = max(self.updates, 1)

    def set_layer(self, layer: int, cutoff: float) -> None:
        """Use this cutoff for all experts of a layer."""
        self.skip_warmup()
        self.state["average"][layer] = cutoff * (1 - self.decay**self.updates)

    def start_layer(self, layer: int, cutoff_E: Tensor, warmup_steps: int = 0) -> None:
        """Continue from cutoffs found elsewhere, as after the warm-up and as many updates as fill the average."""
        trusted = math.ceil(math.log(1e-3) / math.log(self.decay)) if self.decay else 1
        self.updates = max(warmup_steps, trusted)
        self.state["updates"] = torch.tensor(self.updates, dtype=torch.int64)
        self.state["average"][layer] = cutoff_E * (1 - self.decay**self.updates)

    def value_E(self, layer: int) -> Tensor:
        """fp32 [E], the corrected average of a layer; 0 before the first update."""
        return self.state["average"][layer] / (1 - self.decay**self.updates if self.updates else 1.0)

    def update(self, totals: RoutingTotals) -> None:
        if self.share is None:
            statistic_LE = totals.statistic_LE / totals.passes
        else:
            statistic_LE = SIGMOID_HISTOGRAM.quantile(totals.histogram_LEB, 1 - self.share).logit(eps=1e-6)
        self.state["average"] = self.decay * self.state["average"] + (1 - self.decay) * statistic_LE
        self.state["updates"] = self.state["updates"] + 1
        self.updates += 1

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.updates = int(self.state["updates"])

    def metrics(self) -> dict[str, Tensor]:
        corrected = torch.stack([self.value_E(layer) for layer in range(len(self.state["average"]))])
        return {"cutoff_mean": corrected.mean()}
