"""Experts that score themselves: what Autonomy-of-Experts and Routing-Free MoE share.

    C_i(x) = x A_i,   A_i in R^{H x r};   s_i(x) = ||C_i(x)||_2        the latent of expert i, and its score

Every rank must score its tokens for all experts, so all of A, [E, r, H], lives here as an ordinary dense parameter.
The chosen expert's gate starts from the same latent. Its owner gets it in one of two ways with the same numbers:
`latent: send` lets the r numbers of a route travel with its token, `latent: recompute` multiplies by A_i again where
the expert lives. Either way the data-parallel reduction of A adds up both of its gradient paths, the score's and the
gate's.

Shapes: T tokens, E experts, e on this rank, r latent width, H hidden.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dsmoe.routers.base import Router, RouterOptions


class LowRankOptions(RouterOptions):
    rank: int = Field(32, ge=1)  # r
    latent: Literal["send", "recompute"] = "send"  # how an expert's owner gets x A_i


class LowRankRouter(Router):
    """Owns `reduce_proj` [E, r, H], which is A transposed."""

    Options = LowRankOptions
    has_gate = False

    def __init__(self, config, pg_collection=None, options: LowRankOptions | None = None, **kwargs):
        super().__init__(config, pg_collection, options, **kwargs)
        self.reduce_proj = nn.Parameter(torch.empty(self.num_experts, self.options.rank, config.hidden_size))
        ep_size, ep_rank = pg_collection.ep.size(), pg_collection.ep.rank()
        self.own_experts = (ep_rank * self.num_experts // ep_size, self.num_experts // ep_size)

    @classmethod
    def latent_rank(cls, options: LowRankOptions) -> int:
        return options.rank

    @classmethod
    def parameter_count(cls, model, options: LowRankOptions) -> int:
        return model.num_experts * options.rank * model.hidden_size

    @property
    def sends_latents(self) -> bool:
        return self.options.latent == "send"

    def latents(self, hidden_TH: Tensor) -> Tensor:
        """fp32 [T, E, r]."""
        flat = F.linear(hidden_TH.float(), self.reduce_proj.flatten(0, 1).float())
        return flat.unflatten(1, (self.num_experts, self.options.rank))

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Megatron's contract and, for `VariableMoELayer`, what gives the experts their latents: those of all pairs
        [S * B, E, r] to be sent, or this rank's part of A, [e, r, H]."""
        routing = self.decide(hidden, padding_mask)
        if self.sends_latents:
            return routing.probs_TE, routing.map_TE, routing.latents_TEr
        # A copy, since ZeRO-3 takes the parameter apart again when this module is done.
        own = self.reduce_proj.narrow(0, *self.own_experts).clone()
        return routing.probs_TE, routing.map_TE, own.to(hidden.dtype)
