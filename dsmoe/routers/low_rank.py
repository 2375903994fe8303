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

from dsmoe.optim.deepspeed import mark_expert_parameter
from dsmoe.parallel.collectives import all_gather_rows, all_to_all_rows
from dsmoe.routers.base import Router, RouterOptions
from dsmoe.routers.scores import is_on_host, slices
from dsmoe.runtime.buffers import part

BLOCK = 1 << 18  # latents that a CPU works on while they are in its cache
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

    def score(self, hidden_TH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Norms of all latents, fp32 [T, E], and what gives a chosen expert its own, as a part of a `Routing`: all
        latents in the tokens' dtype if they are to be sent, else this rank's part of A."""
        if self.sends_latents:
            latents_TEr = _latents(hidden_TH, self.reduce_proj)
            return torch.linalg.vector_norm(latents_TEr, dim=-1), {"latents_TEr": latents_TEr.to(hidden_TH.dtype)}
        if self.sharded:
            norms_TE, own_erH = self._score_at_owners(hidden_TH)
        else:
            norms_TE, own_erH = latent_norms(hidden_TH, self.reduce_proj, self.own_experts)
        return norms_TE, {"reduce_erH": own_erH.to(hidden_TH.dtype)}

    def _score_at_owners(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        ranks, tokens = self.ep.size(), hidden_TH.size(0)
        sizes = [tokens] * ranks
        if self.has_padding:  # ranks may have dropped different numbers of tokens, and all must know how many
            sizes = self.cached_per_forward("sizes", lambda: self._tokens_by_rank(hidden_TH))
        everyone_H = all_gather_rows(hidden_TH, sizes, self.ep)
        norms_e, own_erH = latent_norms(everyone_H, self.reduce_proj, self.own_experts)
        back = all_to_all_rows(norms_e, sizes, [tokens] * ranks, self.ep)  # by owner, then token
        norms_TE = back.view(ranks, tokens, self.own_experts[1]).transpose(0, 1).reshape(tokens, self.num_experts)
        return norms_TE, own_erH

    def _tokens_by_rank(self, hidden_TH: Tensor) -> list[int]:
        counts = torch.empty(self.ep.size(), dtype=torch.int64, device=hidden_TH.device)
        dist.all_gather_into_tensor(counts, counts.new_full((1,), hidden_TH.size(0)), group=self.ep)
        return counts.tolist()


def latent_norms(hidden_TH: Tensor, reduce_ErH: Tensor, own: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """||x A_i||_2 of every token and expert, fp32 or wider: [T, E]; and A of `own` experts (first, count), over
    the same memory: [e, r, H]. What comes back of both meets in one gradient of A.

    Latents exist for some tokens and experts at a time. The backward pass makes them again, on a CPU those of pairs
    with a gradient only: where an inactive pair has none that is less work than to keep all of them. At a norm of 0
    the gradient is 0.
    """
    return _LatentNorms.apply(hidden_TH, reduce_ErH, *own)


class _LatentNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, reduce_ErH: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        norms_TE = hidden_TH.new_empty(len(hidden_TH), len(reduce_ErH), dtype=_wide(hidden_TH))
        for tokens, experts in product(*_tiles(hidden_TH, reduce_ErH)):
            latents_ter = _latents(hidden_TH[tokens], reduce_ErH[experts])
            norms_TE[tokens, experts] = torch.linalg.vector_norm(latents_ter, dim=-1)
        ctx.save_for_backward(hidden_TH, reduce_ErH, norms_TE)
        ctx.own, ctx.takes_routes = (first, first + count), True
        ctx.set_materialize_grads(False)
        # Not the parameter, nor a view of it: ZeRO-3 empties that when the router is done. Its memory stays.
        return norms_TE, part(reduce_ErH, first * reduce_ErH[0].numel(), [count, *reduce_ErH.shape[1:]])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor | None, grad_erH: Tensor | None):
        hidden_TH, reduce_ErH, norms_TE = ctx.saved_tensors
        grad_TH, grad_ErH = torch.zeros_like(hidden_TH, dtype=norms_TE.dtype), torch.empty_like(reduce_ErH)
        for experts, sum_erH in _sums(grad_TH, hidden_TH, reduce_ErH, grad_TE, norms_TE):
            if grad_erH is not None:
                first, end = ctx.own
                low, high = max(first, experts.start), min(end, experts.stop)
                if low < high:
                    sum_erH[low - experts.start : high - experts.start] += grad_erH[low - first : high - first]
            grad_ErH[experts] = sum_erH
        return grad_TH.to(hidden_TH.dtype), grad_ErH, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    """What norms and sums are taken in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _tiles(hidden_TH: Tensor, reduce_ErH: Tensor) -> tuple[list[slice], list[slice]]:
    """Tokens and experts whose latents a CPU's cache holds; on a device, all experts and many tokens."""
    (tokens, _), (experts, rank, _) = hidden_TH.shape, reduce_ErH.shape
    if hidden_TH.device.type != "cpu":
        return slices(tokens, ON_DEVICE // (experts * rank)), [slice(0, experts)]
    return slices(tokens, TOKENS), slices(experts, BLOCK // (TOKENS * rank))


def _latents(hidden_tH: Tensor, reduce_erH: Tensor) -> Tensor:
    wide_tH, wide_erH = (x.to(_wide(x)) for x in (hidden_tH, reduce_erH))
    return F.linear(wide_tH, wide_erH.flatten(0, 1)).unflatten(1, reduce_erH.shape[:2])


def _factor(grad: Tensor, norm: Tensor) -> Tensor:
    """The gradient of a latent over the latent."""
    return (grad / norm).masked_fill_(norm == 0, 0)


def _sums(
    grad_TH: Tensor, hidden_TH: Tensor, reduce_ErH: Tensor, grad_TE: Tensor | None, norms_TE: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The gradient of A, some experts at a time, in the norms' dtype; those of tokens are added to `grad_TH`."""
    if grad_TE is not None and grad_TE.is_sparse:
        (token_N, expert_N), value_N = grad_TE._indices(), grad_TE._values()
        expert_N, order = expert_N.sort()
        return _sums_of_pairs(grad_TH, hidden_TH, reduce_ErH, token_N[order], expert_N, value_N[order], norms_TE)
    if grad_TE is not None and is_on_host(grad_TE) and 2 * int(grad_TE.count_nonzero()) < grad_TE.numel():
        expert_N, token_N = grad_TE.t().nonzero().unbind(1)
        value_N = grad_TE[token_N, expert_N]
        return _sums_of_pairs(grad_TH, hidden_TH, reduce_ErH, token_N, expert_N, value_N, norms_TE)
    return _sums_of_tiles(grad_TH, hidden_TH, reduce_ErH, grad_TE, norms_TE)


def _sums_of_tiles(
    grad_TH: Tensor, hidden_TH: Tensor, reduce_ErH: Tensor, grad_TE: Tensor | None, norms_TE: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """From all pairs."""
    all_tokens, all_experts = _tiles(hidden_TH, reduce_ErH)
    for experts in all_experts:
        reduce_erH = reduce_ErH[experts].to(grad_TH.dtype)
        sum_erH = torch.zeros_like(reduce_erH)
        for tokens in all_tokens if grad_TE is not None else []:
            hidden_tH = hidden_TH[tokens].to(grad_TH.dtype)
            factor_te = _factor(grad_TE[tokens, experts], norms_TE[tokens, experts])
            latents_tN = _latents(hidden_tH, reduce_erH).mul_(factor_te.unsqueeze(2)).flatten(1)
            grad_TH[tokens].addmm_(latents_tN, reduce_erH.flatten(0, 1))
            sum_erH.flatten(0, 1).addmm_(latents_tN.t(), hidden_tH)
        yield experts, sum_erH


def _sums_of_pairs(
    grad_TH: Tensor, hidden_TH: Tensor, reduce_ErH: Tensor, token_N: Tensor, expert_N: Tensor, value_N: Tensor,
    norms_TE: Tensor,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """From pairs with a gradient, ordered by expert: an expert at a time with its tokens."""
    factor_N = _factor(value_N, norms_TE[token_N, expert_N]).unsqueeze(1)
    counts = torch.bincount(expert_N, minlength=len(reduce_ErH)).tolist()
    for expert, (tokens, factors) in enumerate(zip(token_N.split(counts), factor_N.split(counts), strict=True)):
        reduce_rH = reduce_ErH[expert].to(grad_TH.dtype)
        sum_rH = torch.zeros_like(reduce_rH)
        if len(tokens):
            rows_nH = hidden_TH[tokens].to(grad_TH.dtype)
            latents_nr = F.linear(rows_nH, reduce_rH).mul_(factors)
            sum_rH.addmm_(latents_nr.t(), rows_nH)
            grad_TH.index_add_(0, tokens, latents_nr @ reduce_rH)
        yield slice(expert, expert + 1), sum_rH.unsqueeze(0)
