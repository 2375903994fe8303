"""A router whose map is given: the extreme routes that a trained router reaches only by accident.

Weights of routes are sigmoid(x W), so gradients reach the router and everything before it. The map depends on a
sequence's place in the global micro-batch, not on the rank that holds it, so one rank can repeat what many did.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsmoe.routers.base import Router, RouterOptions, Routing
from dsmoe.routers.registry import register

ROUTES = (
    "mixed",
    "second_half_sends_nothing",
    "odd_sequences_send_nothing",
    "last_experts_receive_nothing",
    "one_expert",
    "none",
)


class FixedOptions(RouterOptions):
    routes: Literal[ROUTES] = "mixed"

    def target_experts_per_token(self, model):
        return 1.0


@register("fixed")
class FixedRouter(Router):
    Options = FixedOptions

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        own = int(sequence_T.max()) + 1 if sequence_T.numel() else 0
        place_T = sequence_T + self.recorder.group.rank() * own
        map_TE = self._map(place_T, own * self.recorder.group.size())
        return Routing(torch.sigmoid(self.gating(hidden_TH)) * map_TE, map_TE)

    def _map(self, place_T: Tensor, sequences: int) -> Tensor:
        """Which experts the tokens of the sequences at these places of the global micro-batch use."""
        routes, expert_E = self.options.routes, torch.arange(self.num_experts)
        # The same number of experts, from 0 to all, for sequences at the same place; which ones, differs.
        mixed_TE = (place_T.unsqueeze(1) * 5 + expert_E * 3) % (self.num_experts + 1) < (place_T.unsqueeze(1) + 2) % 5
        if routes == "second_half_sends_nothing":
            return mixed_TE & (place_T < sequences // 2).unsqueeze(1)
        if routes == "odd_sequences_send_nothing":
            return mixed_TE & (place_T % 2 == 0).unsqueeze(1)
        if routes == "last_experts_receive_nothing":
            return mixed_TE & (expert_E < self.num_experts // 2)
        if routes == "one_expert":
            return (expert_E == self.num_experts - 1).expand(len(place_T), -1)
        if routes == "none":
            return torch.zeros(len(place_T), self.num_experts, dtype=torch.bool)
        return mixed_TE
