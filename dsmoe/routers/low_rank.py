"""Experts that score themselves: what Autonomy-of-Experts and Routing-Free MoE share.

    C_i(x) = x A_i,   A_i in R^{H x r};   s_i(x) = ||C_i(x)||_2        the latent of expert i, and its score

Every token is scored by all experts, so A is needed where tokens are, or tokens where A is:

`placement: replicated`  all of A, [E, r, H], is an ordinary dense parameter of every rank. The chosen expert's gate
    starts from the same latent, which its owner gets in one of two ways: `latent: recompute` multiplies a route's token
    by A_i again where the expert lives, so that nobody keeps the latents of all pairs, [T, E, r]; `latent: send` keeps
    them and lets the r numbers of a route travel with its token. Either way the data-parallel reduction of A adds up
    both of its gradient paths, the score's and the gate's.
`placement: sharded`     each rank holds A of its own experts, for E where all of A is too large. The ranks of an
    expert-parallel group gather their tokens, score them for the experts at home, and send the scores back.

The numbers are the same in every case, and so are the names in a checkpoint.

Shapes: T tokens, E experts, e on this rank, r latent width, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsmoe.parallel.collectives import all_gather_rows, all_to_all_rows
from dsmoe.parallel.groups import mark_expert_parameter
from dsmoe.routers.base import Router, RouterOptions
from dsmoe.routers.scores import BLOCK, slices

TOKENS = 512  # of a product with A on a CPU
ON_DEVICE = 1 << 26  # elements of latents at a time


class LowRankOptions(RouterOptions):
    rank: int = Field(32, ge=1)  # r
    placement: Literal["replicated", "sharded"] = "replicated"  # of A
    latent: Literal["send", "recompute"] = "recompute"  # how an expert's owner gets x A_i; sharded: always recomputed


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
        if not self.sends_latents:
            return latent_norms(hidden_TH.float(), self.reduce_proj.float()), None
        latents_TEr = _latents(hidden_TH.float(), self.reduce_proj.float())
        return torch.linalg.vector_norm(latents_TEr, dim=-1), latents_TEr.to(hidden_TH.dtype)

    def _score_at_owners(self, hidden_TH: Tensor) -> Tensor:
        ranks, tokens = self.ep.size(), hidden_TH.size(0)
        sizes = [tokens] * ranks
        if self.has_padding:  # ranks may have dropped different numbers of tokens, and all must know how many
            sizes = self.once_a_pass("sizes", lambda: self._tokens_by_rank(hidden_TH))
        everyone_H = all_gather_rows(hidden_TH, sizes, self.ep)
        score_e = latent_norms(everyone_H.float(), self.reduce_proj.float())
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
        first, count = self.own_experts
        own = self.reduce_proj if count == len(self.reduce_proj) else self.reduce_proj[first : first + count]
        # A copy, since ZeRO-3 takes the parameter apart again when this module is done.
        return routing.probs_TE, routing.map_TE, own.clone().to(hidden.dtype)


def latent_norms(hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
    """||x A_i||_2 of every token and expert: [T, E], all in one floating dtype.

    Latents exist for some tokens and experts at a time. The backward pass makes them again, on a CPU those of pairs
    with a gradient only: where an inactive pair has none that is less work than to keep all of them. At a norm of 0
    the gradient is 0.
    """
    return _LatentNorms.apply(hidden_TH, reduce_ErH)


class _LatentNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
        norms_TE = hidden_TH.new_empty(len(hidden_TH), len(reduce_ErH))
        for tokens, experts in _tiles(hidden_TH, reduce_ErH):
            latents_ter = _latents(hidden_TH[tokens], reduce_ErH[experts])
            norms_TE[tokens, experts] = torch.linalg.vector_norm(latents_ter, dim=-1)
        ctx.save_for_backward(hidden_TH, reduce_ErH, norms_TE)
        return norms_TE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor):
        hidden_TH, reduce_ErH, norms_TE = ctx.saved_tensors
        # The gradient of a latent is this times the latent.
        factor_TE = (grad_TE / norms_TE).masked_fill_(norms_TE == 0, 0)
        few = may_look(factor_TE) and 2 * int(factor_TE.count_nonzero()) < factor_TE.numel()
        return (_from_pairs if few else _from_tiles)(hidden_TH, reduce_ErH, factor_TE)


def may_look(tensor: Tensor) -> bool:
    """Whether the host has a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def _tiles(hidden_TH: Tensor, reduce_ErH: Tensor) -> Iterator[tuple[slice, slice]]:
    """Tokens and experts whose latents a CPU's cache holds; on a device, all experts and many tokens."""
    (tokens, _), (experts, rank, _) = hidden_TH.shape, reduce_ErH.shape
    if hidden_TH.device.type != "cpu":
        return product(slices(tokens, ON_DEVICE // (experts * rank)), [slice(experts)])
    return product(slices(tokens, TOKENS), slices(experts, BLOCK // (TOKENS * rank)))


def _latents(hidden_tH: Tensor, reduce_erH: Tensor) -> Tensor:
    return F.linear(hidden_tH, reduce_erH.flatten(0, 1)).unflatten(1, reduce_erH.shape[:2])


def _from_tiles(hidden_TH: Tensor, reduce_ErH: Tensor, factor_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and A, some tokens and experts at a time."""
    grad_TH, grad_ErH = torch.zeros_like(hidden_TH), torch.zeros_like(reduce_ErH)
    for tokens, experts in _tiles(hidden_TH, reduce_ErH):
        latents_ter = _latents(hidden_TH[tokens], reduce_ErH[experts])
        latents_tN = latents_ter.mul_(factor_TE[tokens, experts].unsqueeze(2)).flatten(1)
        grad_TH[tokens].addmm_(latents_tN, reduce_ErH[experts].flatten(0, 1))
        grad_ErH[experts].flatten(0, 1).addmm_(latents_tN.t(), hidden_TH[tokens])
    return grad_TH, grad_ErH


def _from_pairs(hidden_TH: Tensor, reduce_ErH: Tensor, factor_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The same, an expert at a time with the tokens that have a gradient there."""
    grad_TH, grad_ErH = torch.zeros_like(hidden_TH), torch.zeros_like(reduce_ErH)
    expert_N, token_N = factor_TE.t().nonzero().unbind(1)
    factor_N = factor_TE[token_N, expert_N].unsqueeze(1)
    counts = torch.bincount(expert_N, minlength=len(reduce_ErH)).tolist()
    for expert, (tokens, factors) in enumerate(zip(token_N.split(counts), factor_N.split(counts), strict=True)):
        if len(tokens):
            rows_nH = hidden_TH[tokens]
            latents_nr = F.linear(rows_nH, reduce_ErH[expert]).mul_(factors)
            torch.mm(latents_nr.t(), rows_nH, out=grad_ErH[expert])
            grad_TH.index_add_(0, tokens, latents_nr @ reduce_ErH[expert])
    return grad_TH, grad_ErH
