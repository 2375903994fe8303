"""What the routers of one model leave behind in a forward pass: the one place for cross-layer quantities.

Each router hands its routing to the model's `RoutingRecorder`. At the end of the forward pass the recorder reduces
the exact integer counts of all MoE layers over all ranks in one collective, lets every router turn them into its
losses, and adds them to the totals of the optimizer step, from which controllers and metrics read.

Shapes: L MoE layers, E experts, T tokens that are not padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.errors import RouterError
from dsmoe.parallel.collectives import sum_over
from dsmoe.routers.routing_map import any_in_row, count_columns


@dataclass(frozen=True)
class Load:
    """Exact routing counts of one layer over the tokens a loss looks at."""

    counts_E: Tensor  # int64, routes per expert
    tokens: Tensor  # int64 scalar, the tokens of this forward pass on those ranks: a loss is a mean over them
    ranks: int  # data ranks these were summed over
    counted: Tensor | None = None  # int64 scalar, the tokens behind `counts_E` where those are more than `tokens`

    def fraction_E(self) -> Tensor:
        """fp32, routes per counted token."""
        counted = self.tokens if self.counted is None else self.counted
        return self.counts_E.to(torch.float32) / counted.clamp(min=1).to(torch.float32)


@dataclass(frozen=True)
class RoutingTotals:
    """Counts of all MoE layers over the tokens of all ranks, summed over forward passes."""

    counts_LE: Tensor  # int64, routes per expert
    tokens: Tensor  # int64 scalar
    without_expert_L: Tensor  # int64, tokens that no expert took
    statistic_LE: Tensor | None = None  # fp32, mean over ranks of what the routers left, summed over passes
    passes: int = 1  # forward passes

    def density(self) -> Tensor:
        """Share of active (token, expert) pairs over all layers: fp64 scalar; 0 where there was no token."""
        pairs = self.tokens * self.counts_LE.numel()
        return self.counts_LE.sum().double() / pairs.clamp(min=1)


@dataclass(frozen=True)
class Remembered:
    """What is left of a `Routing` when its losses are asked for."""

    kept: dict[str, Tensor]
    statistic_E: Tensor | None

    def __getattr__(self, name: str):
        if name in ("probs_TE", "map_TE", "latents_TEr", "reduce_erH"):
            raise RouterError(
                f"Routing.{name} is not held until losses are asked for; put what they need into Routing.kept"
            )
        raise AttributeError(name)


class RoutingRecorder:
    """One for each model; `begin` and `finish` enclose a forward pass, `take` closes an optimizer step.

    Args:
        group: all ranks with distinct tokens.
    """

    def __init__(self, num_experts: int, group):
        self.num_experts = num_experts
        self.group = group
        self.routers: list = []  # in layer order; routers add themselves
        self.shared: dict = {}  # what one router of a pass found out for all
        self._passes: list = []
        self._totals: RoutingTotals | None = None

    def begin(self) -> None:
        """Start a forward pass; what an interrupted one left is dropped."""
        self._passes = [None] * len(self.routers)
        self.shared = {}

    def record(self, index: int, routing, tokens: Tensor) -> None:
        """Take what router `index` decided for `tokens` (int64 scalar) tokens: counts, and what its losses need.
        Weights and map are not held until the pass ends; of many experts they are as large as a layer's activations."""
        counts_E, without = count_columns(routing.map_TE), tokens - any_in_row(routing.map_TE).sum()
        self._passes[index] = (Remembered(routing.kept, routing.statistic_E), counts_E, without, tokens)

    def finish(self) -> dict[str, Tensor]:
        """Reduce the counts and return the router losses of this pass by name, ready to be added to the language-model
        loss. Collective over `group`."""
        routings, own_LE, without_L, (tokens, *_) = zip(*self._passes, strict=True)
        own_LE, without_L = torch.stack(own_LE), torch.stack(without_L)
        everywhere = sum_over(self.group, torch.cat((own_LE.flatten(), without_L, tokens.view(1))))
        counts_LE, without_L = everywhere[: own_LE.numel()].view_as(own_LE), everywhere[own_LE.numel() : -1]
        totals = RoutingTotals(counts_LE, everywhere[-1], without_L, self._mean_statistic(routings))
        self._totals = totals if self._totals is None else _add(self._totals, totals)
        self._passes = [None] * len(self.routers)
        if not torch.is_grad_enabled():
            return {}
        ranks, step = self.group.size(), self._totals
        loads = [
            {
                "rank": Load(own_E, tokens, 1),
                "micro_batch": Load(micro_E, totals.tokens, ranks),
                "global_batch": Load(step_E, totals.tokens, ranks, counted=step.tokens),
            }
            for own_E, micro_E, step_E in zip(own_LE, counts_LE, step.counts_LE, strict=True)
        ]
        return self.routers[0].model_losses(self.routers, list(routings), loads)

    def _mean_statistic(self, routings: tuple[Remembered, ...]) -> Tensor | None:
        if routings[0].statistic_E is None:
            return None
        return sum_over(self.group, torch.stack([routing.statistic_E for routing in routings])) / self.group.size()

    def take(self) -> RoutingTotals:
        """The totals since the last call, identical on every rank; the next ones start from zero."""
        totals, self._totals = self._totals, None
        return totals


def _add(old: RoutingTotals, new: RoutingTotals) -> RoutingTotals:
    return RoutingTotals(
        counts_LE=old.counts_LE + new.counts_LE,
        tokens=old.tokens + new.tokens,
        without_expert_L=old.without_expert_L + new.without_expert_L,
        statistic_LE=None if new.statistic_LE is None else old.statistic_LE + new.statistic_LE,
        passes=old.passes + new.passes,
    )
