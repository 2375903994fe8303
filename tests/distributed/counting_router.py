"""A router plugin with a controller whose state is of several shapes and dtypes, changed in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe.routers.base import Router, RouterOptions, Routing
from dsmoe.routers.controllers import Controller
from dsmoe.routers.registry import register

NAME = "counting"


class CountingController(Controller):
    """How many routes each expert has had, in how many steps, and a number that shrinks."""

    def __init__(self, num_layers: int, num_experts: int):
        super().__init__(
            routes=torch.zeros(num_layers, num_experts, dtype=torch.int64),
            steps=torch.zeros((), dtype=torch.int64),
            scale=torch.ones(2, dtype=torch.float64),
        )

    def update(self, totals) -> None:
        self.state["routes"] += totals.counts_LE
        self.state["steps"] += 1
        self.state["scale"] *= 0.5


class CountingOptions(RouterOptions):
    def target_experts_per_token(self, model):
        return 1


@register(NAME)
class CountingRouter(Router):
    """Top-1 with softmax weights."""

    Options = CountingOptions

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        probs_TE = self.gating(hidden_TH).softmax(dim=-1)
        map_TE = F.one_hot(probs_TE.argmax(dim=-1), probs_TE.size(-1)).bool()
        return Routing(probs_TE * map_TE, map_TE)

    @classmethod
    def make_controller(cls, options, num_layers: int, num_experts: int) -> Controller:
        return CountingController(num_layers, num_experts)
