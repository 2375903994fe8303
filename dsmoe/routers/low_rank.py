"""Experts that score themselves: what Autonomy-of-Experts and Routing-Free MoE share.

    C_i(x) = x A_i,   A_i in R^{H x r};   s_i(x) = ||C_i(x)||_2        the latent of expert i, and its score

Every token is scored by all experts, so A is needed where tokens are, or tokens where A is:

`placement: replicated`  all of A, [E, r, H], is an ordinary dense parameter of every rank. The chosen expert's gate
    starts from the same latent, which its owner gets in one of two ways: `latent: send` lets the r numbers of a route
    travel with its token, `latent: recompute` multiplies by A_i again where the expert lives. Either way the data-
    parallel reduction of A adds up both of its gradient paths, the score's and the gate's.
`placement: sharded`     each rank holds A of its own experts, for E where all of A is too large. The ranks of an
    expert-parallel group gather their tokens, score them for the experts at home, and send the scores back.

The numbers are the same in every case, and so are the names in a checkpoint.

Shapes: T tokens, E experts, e on this rank, r latent width, H hidden.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dsmoe.parallel.collectives import all_gather_rows, all_to_all_rows
from dsmoe.parallel.groups import mark_expert_parameter
from dsmoe.routers.base import Router, RouterOptions


class LowRankOptions(RouterOptions):
    rank: int = Field(32, ge=1)  # r
    placement: Literal["replicated", "sharded"] = "replicated"  # of A
    latent: Literal["send", "recompute"] = "send"  # how an expert's owner gets x A_i; sharded: always recomputed


class LowRankRouter(Router):
    """Owns `reduce_proj` [E, r, H] or, sharded, [e, r, H]; it is A transposed."""

    Options = LowRankOptions
    has_gate = False

    def __init__(self, config, pg_collection=None, options: LowRankOptions | None = None, **kwargs):
        super().__init__(config, pg_collection, options, **kwargs)
        self.ep = pg_collection.ep
        own = self.num_experts // self.ep.size()
        self.sharded = self.options.placement == "sharded"
        self.sends_latents = self.options.latent == "send" and not self.sharded
        self.own_experts = (0 if self.sharded else self.ep.rank() * own, own)  # their place in reduce_proj
        held = own if self.sharded else self.num_experts
        self.reduce_proj = nn.Parameter(torch.empty(held, self.options.rank, config.hidden_size))
        self.reduce_proj.first_expert = 0
        if self.sharded:
            mark_expert_parameter(self.reduce_proj, self.ep, self.ep.rank() * own)

    @classmethod
    def latent_rank(cls, options: LowRankOptions) -> int:
        return options.rank

    @classmethod
    def parameter_count(cls, model, options: LowRankOptions) -> int:
        return model.num_experts * options.rank * model.hidden_size

    def score(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Norms of all latents, fp32 [T, E], and the latents [T, E, r] in the tokens' dtype if they are to be sent."""
        if self.sharded:
            return self._score_at_owners(hidden_TH), None
        latents_TEr = self._latents(hidden_TH)
        kept = latents_TEr.to(hidden_TH.dtype) if self.sends_latents else None
        return torch.linalg.vector_norm(latents_TEr, dim=-1), kept

    def _latents(self, hidden_TH: Tensor) -> Tensor:
        flat = F.linear(hidden_TH.float(), self.reduce_proj.flatten(0, 1).float())
        return flat.unflatten(1, self.reduce_proj.shape[:2])

    def _score_at_owners(self, hidden_TH: Tensor) -> Tensor:
        ranks, tokens = self.ep.size(), hidden_TH.size(0)
        sizes = [tokens] * ranks
        if self.has_padding:  # ranks may have dropped different numbers of tokens, and all must know how many
            sizes = self.once_a_pass("sizes", lambda: self._tokens_by_rank(hidden_TH))
        everyone_H = all_gather_rows(hidden_TH, sizes, self.ep)
        score_e = torch.linalg.vector_norm(self._latents(everyone_H), dim=-1)
        back = all_to_all_rows(score_e, sizes, [tokens] * ranks, self.ep)  # by owner, then token
        return back.view(ranks, tokens, self.own_experts[1]).transpose(0, 1).reshape(tokens, self.num_experts)

    def _tokens_by_rank(self, hidden_TH: Tensor) -> list[int]:
        counts = torch.empty(self.ep.size(), dtype=torch.int64, device=hidden_TH.device)
        dist.all_gather_into_tensor(counts, counts.new_full((1,), hidden_TH.size(0)), group=self.ep)
        return counts.tolist()

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Megatron's contract and, for `VariableMoELayer`, what gives the experts their latents: those of all pairs
        [S * B, E, r] to be sent, or this rank's part of A, [e, r, H]."""
        routing = self.decide(hidden, padding_mask)
        if self.sends_latents:
            return routing.probs_TE, routing.map_TE, routing.latents_TEr
        # A copy, since ZeRO-3 takes the parameter apart again when this module is done.
        own = self.reduce_proj.narrow(0, *self.own_experts).clone()
        return routing.probs_TE, routing.map_TE, own.to(hidden.dtype)
