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

from dsmoe.parallel.collectives import sum_over


@dataclass(frozen=True)
class Load:
    """Exact routing counts of one layer over the tokens a loss looks at."""

    counts_E: Tensor  # int64, routes per expert
    tokens: Tensor  # int64 scalar, T
    ranks: int  # data ranks these were summed over


@dataclass(frozen=True)
class RoutingTotals:
    """Counts of all MoE layers over the tokens of all ranks, summed over forward passes."""

    counts_LE: Tensor  # int64, routes per expert
    tokens: Tensor  # int64 scalar
    without_expert_L: Tensor  # int64, tokens that no expert took

    def density(self) -> Tensor:
        """Share of active (token, expert) pairs over all layers: fp64 scalar; 0 where there was no token."""
        pairs = self.tokens * self.counts_LE.numel()
        return self.counts_LE.sum().double() / pairs.clamp(min=1)


class RoutingRecorder:
    """One for each model; `begin` and `finish` enclose a forward pass, `take` closes an optimizer step.

    Args:
        group: all ranks with distinct tokens.
    """

    def __init__(self, num_experts: int, group):
        self.num_experts = num_experts
        self.group = group
        self.routers: list = []  # in layer order; routers add themselves
        self._passes: list = []
        self._totals: RoutingTotals | None = None

    def begin(self) -> None:
        """Start a forward pass; what an interrupted one left is dropped."""
        self._passes = [None] * len(self.routers)

    def record(self, index: int, routing, tokens: Tensor) -> None:
        """Take what router `index` decided for `tokens` (int64 scalar) tokens."""
        self._passes[index] = (routing, tokens)

    def finish(self) -> dict[str, Tensor]:
        """Reduce the counts and return the router losses of this pass by name, summed over layers, ready to be added
        to the language-model loss. Collective over `group`."""
        own_LE = torch.stack([routing.map_TE.sum(0) for routing, _ in self._passes])
        without_L = torch.stack([tokens - routing.map_TE.any(1).sum() for routing, tokens in self._passes])
        own_tokens = self._passes[0][1]
        counts = torch.cat((own_LE.flatten(), without_L, own_tokens.view(1)))
        everywhere = sum_over(self.group, counts.clone())
        counts_LE = everywhere[: own_LE.numel()].view_as(own_LE)
        totals = RoutingTotals(counts_LE, everywhere[-1], everywhere[own_LE.numel() : -1])
        self._add(totals)
        losses: dict[str, Tensor] = {}
        if torch.is_grad_enabled():
            for index, (router, (routing, tokens)) in enumerate(zip(self.routers, self._passes, strict=True)):
                loads = {
                    "rank": Load(own_LE[index], tokens, 1),
                    "micro_batch": Load(counts_LE[index], totals.tokens, self.group.size()),
                }
                for name, loss in router.losses(routing, loads).items():
                    losses[name] = losses[name] + loss if name in losses else loss
        self._passes = [None] * len(self.routers)
        return losses

    def _add(self, new: RoutingTotals) -> None:
        old = self._totals
        self._totals = new if old is None else RoutingTotals(
            old.counts_LE + new.counts_LE, old.tokens + new.tokens, old.without_expert_L + new.without_expert_L
        )  # fmt: skip

    def take(self) -> RoutingTotals:
        """The totals since the last call, identical on every rank; the next ones start from zero."""
        totals, self._totals = self._totals, None
        return totals
