"""Collects the routing of all MoE layers of a model in a forward pass: the one place for cross-layer quantities.

Each router hands its routing to the model's `RoutingRecorder`. At the end of the forward pass the recorder sums the
exact integer counts of all MoE layers over all ranks in one collective, has the routers compute their losses from
them, and adds them to the totals of the optimizer step, which controllers and metrics read.

Shapes: L MoE layers, E experts, T tokens that are not padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmoe.parallel.collectives import sum_over
from dsmoe.routers.routing import RetainedRouting, Routing
from dsmoe.routers.routing_map import any_in_row, count_columns


@dataclass(frozen=True)
class Load:
    """Exact routing counts of one layer over the tokens that a loss covers."""

    counts_E: Tensor  # int64, routes per expert
    tokens: Tensor  # int64 scalar, the tokens of this forward pass on those ranks: a loss is a mean over them
    ranks: int  # data ranks that `tokens` was summed over
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
    without_expert_L: Tensor  # int64, tokens without any expert
    statistic_LE: Tensor | None = None  # fp32, mean over ranks of `Routing.statistic_E`, summed over passes
    passes: int = 1  # forward passes
    histogram_LEB: Tensor | None = None  # int64, `Routing.histogram_EB` of all ranks; in the totals of a step only

    def density(self) -> Tensor:
        """Share of active (token, expert) pairs over all layers: fp64 scalar; 0 where there was no token."""
        pairs = self.tokens * self.counts_LE.numel()
        return self.counts_LE.sum().double() / pairs.clamp(min=1)


class RoutingRecorder:
    """One per model; `begin` and `finish` enclose a forward pass, `take` ends an optimizer step.

    Args:
        group: all ranks with distinct tokens.
    """

    def __init__(self, num_experts: int, group):
        self.num_experts = num_experts
        self.group = group
        self.routers: list = []  # in layer order; routers add themselves
        self.shared: dict = {}  # values that the first router of a forward pass computes for all of them
        self._recorded: list = []
        self._histograms: dict[int, Tensor] = {}  # of this rank since the last `take`, by layer
        self.last_pass: RoutingTotals | None = None  # of the last finished forward pass
        self._totals: RoutingTotals | None = None

    def begin(self) -> None:
        """Start a forward pass and drop what an interrupted one left behind."""
        self._recorded = [None] * len(self.routers)
        self.shared = {}

    def record(self, index: int, routing: Routing, tokens: Tensor) -> None:
        """Record how router `index` routed `tokens` (int64 scalar) tokens: counts and the inputs of its losses.

        Weights and map are not retained: with many experts they are as large as a layer's activations.
        """
        if routing.histogram_EB is not None:
            earlier = self._histograms.get(index)
            self._histograms[index] = routing.histogram_EB if earlier is None else earlier + routing.histogram_EB
        counts_E, without = count_columns(routing.map_TE), tokens - any_in_row(routing.map_TE).sum()
        self._recorded[index] = (RetainedRouting(routing.loss_inputs, routing.statistic_E), counts_E, without, tokens)

    def finish(self) -> dict[str, Tensor]:
        """Sum the counts over all ranks and return the router losses of this pass by name, ready to be added to the
        language-model loss. Collective over `group`."""
        routings, counts, without, (tokens, *_) = zip(*self._recorded, strict=True)
        own_LE, without_L = torch.stack(counts), torch.stack(without)
        global_counts = sum_over(self.group, torch.cat((own_LE.flatten(), without_L, tokens.view(1))))
        counts_LE, without_L = global_counts[: own_LE.numel()].view_as(own_LE), global_counts[own_LE.numel() : -1]
        totals = RoutingTotals(counts_LE, global_counts[-1], without_L, self._mean_statistic(routings))
        self.last_pass = totals
        self._totals = totals if self._totals is None else _add(self._totals, totals)
        self._recorded = [None] * len(self.routers)
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

    def _mean_statistic(self, routings: tuple[RetainedRouting, ...]) -> Tensor | None:
        if routings[0].statistic_E is None:
            return None
        return sum_over(self.group, torch.stack([routing.statistic_E for routing in routings])) / self.group.size()

    def take(self) -> RoutingTotals:
        """The totals since the last call, identical on every rank; counting restarts from zero. Collective over `group`
        if the routers left histograms."""
        totals, self._totals = self._totals, None
        if self._histograms:
            own_LEB = torch.stack([self._histograms[index] for index in range(len(self.routers))])
            totals, self._histograms = replace(totals, histogram_LEB=sum_over(self.group, own_LEB)), {}
        return totals


def _add(old: RoutingTotals, new: RoutingTotals) -> RoutingTotals:
    return RoutingTotals(
        counts_LE=old.counts_LE + new.counts_LE,
        tokens=old.tokens + new.tokens,
        without_expert_L=old.without_expert_L + new.without_expert_L,
        statistic_LE=None if new.statistic_LE is None else old.statistic_LE + new.statistic_LE,
        passes=old.passes + new.passes,
    )
