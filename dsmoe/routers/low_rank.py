"""Experts that score themselves: shared by Autonomy-of-Experts and Routing-Free MoE.

    C_i(x) = x A_i,   A_i in R^{H x r};   s_i(x) = ||C_i(x)||_2        the latent of expert i, and its score

All experts score every token, so a rank needs either all of A or all tokens:

`placement: replicated`  all of A, [E, r, H], is an ordinary dense parameter of every rank. The gate of a selected
    expert starts from the same latent, which its owner gets in one of two ways: `latent: recompute` multiplies a
    route's token by A_i again on the expert's rank, so that no rank stores the latents of all pairs, [T, E, r];
    `latent: send` stores them and sends the r values of a route with its token. In both cases the data-parallel
    reduction of A sums both of its gradient paths, the score's and the gate's.
`placement: sharded`     each rank holds A of its own experts, for an E at which all of A is too large. The ranks of an
    expert-parallel group gather their tokens, score them for their own experts, and send the scores back.

Results are the same in every case, and so are the names in a checkpoint.

Shapes: T tokens, E experts, e on this rank, r latent width, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

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

LATENTS_PER_TILE = 1 << 18  # elements that stay in a CPU's cache
TOKENS_PER_TILE = 512  # on a CPU
LATENTS_ON_DEVICE = 1 << 26  # elements at a time
BENCHMARK_RANK = 32


class LowRankOptions(RouterOptions):
    FUTURE_ONLY = RouterOptions.FUTURE_ONLY | {"placement", "latent"}

    rank: int = Field(32, ge=1)  # r
    placement: Literal["replicated", "sharded"] = "replicated"  # of A
    latent: Literal["send", "recompute"] = "recompute"  # how an expert's owner gets x A_i; sharded: always recomputed

    @property
    def sends_latents(self) -> bool:
        return self.latent == "send" and not self.shards_latents

    @property
    def shards_latents(self) -> bool:
        return self.placement == "sharded"


class LowRankRouter(Router):
    """Owns `reduce_proj`, A transposed: [E, r, H] or, sharded, [e, r, H]."""

    Options = LowRankOptions
    options: LowRankOptions
    has_gate = False
    routes_in_blocks = True

    def __init__(self, config, pg_collection=None, options: LowRankOptions | None = None, **kwargs):
        super().__init__(config, pg_collection, options, **kwargs)
        self.ep = pg_collection.ep
        own = self.num_experts // self.ep.size()
        self.sharded = self.options.shards_latents
        self.own_experts = (
            0 if self.sharded else self.ep.rank() * own,
            own,
        )  # (first, count) of this rank's experts in reduce_proj
        stored = own if self.sharded else self.num_experts
        self.reduce_proj = nn.Parameter(torch.empty(stored, self.options.rank, config.hidden_size))
        self.reduce_proj.first_expert = 0  # type: ignore[attr-defined]
        if self.sharded:
            mark_expert_parameter(self.reduce_proj, self.ep, self.ep.rank() * own)

    @classmethod
    def latent_rank(cls, options: LowRankOptions) -> int:
        return options.rank

    @classmethod
    def parameter_count(cls, model, options: LowRankOptions) -> int:
        return model.num_experts * options.rank * model.hidden_size

    @classmethod
    def retained_bytes_per_pair(cls, model, options: LowRankOptions, element: int) -> float:
        return 1.0 + 4.0 + options.rank * (4.0 + element) * options.sends_latents

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float):
        return {"rank": BENCHMARK_RANK, **super().benchmark_options(k, num_experts, latent_norm)}

    @classmethod
    def benchmark_variants(cls, ranks: int):
        return {"latents sent": {"latent": "send"}} if ranks > 1 else {}

    @property
    def own_reduce_erH(self) -> Tensor:
        """A of this rank's experts."""
        return self.reduce_proj.narrow(0, *self.own_experts)

    def score(self, hidden_TH: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Norms of all latents, fp32 [T, E], and the field of a `Routing` from which experts get their latents: all
        latents in the tokens' dtype if they are sent, else A of this rank's experts."""
        if self.options.sends_latents:
            latents_TEr = _latents(hidden_TH, self.reduce_proj)
            return torch.linalg.vector_norm(latents_TEr, dim=-1), {"latents_TEr": latents_TEr.to(hidden_TH.dtype)}
        if self.sharded:
            norms_TE, own_erH = self._score_at_owners(hidden_TH)
        else:
            norms_TE, own_erH = latent_norms(hidden_TH, self.reduce_proj, self.own_experts, self.fused)
        return norms_TE, {"reduce_erH": own_erH.to(hidden_TH.dtype)}

    def _score_at_owners(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        ranks, tokens = self.ep.size(), hidden_TH.size(0)
        sizes = [tokens] * ranks
        if self.has_padding:  # ranks may have different numbers of tokens that are not padding
            sizes = self.cached_per_forward("sizes", lambda: self._tokens_by_rank(hidden_TH))
        gathered_H = all_gather_rows(hidden_TH, sizes, self.ep)
        norms_e, own_erH = latent_norms(gathered_H, self.reduce_proj, self.own_experts, self.fused)
        returned = all_to_all_rows(norms_e, sizes, [tokens] * ranks, self.ep)  # by owner, then token
        norms_TE = returned.view(ranks, tokens, self.own_experts[1]).transpose(0, 1).reshape(tokens, self.num_experts)
        return norms_TE, own_erH

    def _tokens_by_rank(self, hidden_TH: Tensor) -> list[int]:
        counts = torch.empty(self.ep.size(), dtype=torch.int64, device=hidden_TH.device)
        dist.all_gather_into_tensor(counts, counts.new_full((1,), hidden_TH.size(0)), group=self.ep)
        return counts.tolist()


def latent_norms(
    hidden_TH: Tensor, reduce_ErH: Tensor, own: tuple[int, int], fused: bool = False
) -> tuple[Tensor, Tensor]:
    """||x A_i||_2 of every token and expert, fp32 or wider [T, E], and A of `own` experts (first, count), [e, r, H],
    over the same memory. The gradients of both are summed into one gradient of A.

    Latents exist for some tokens and experts at a time. The backward pass computes them again, on a CPU only for pairs
    with a gradient: that is less work than storing all of them. At a norm of 0 the gradient is 0. `fused`: by Triton's
    kernels, which multiply in the tokens' dtype and add in fp32.
    """
    return _LatentNorms.apply(hidden_TH, reduce_ErH, *own, fused)


class _LatentNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TH: Tensor, reduce_ErH: Tensor, first: int, count: int, fused: bool
    ) -> tuple[Tensor, Tensor]:
        norms_TE = _norms_by_kernel(hidden_TH, reduce_ErH) if fused else _norms(hidden_TH, reduce_ErH)
        ctx.fused = fused
        ctx.save_for_backward(hidden_TH, reduce_ErH, norms_TE)
        ctx.own, ctx.accepts_sparse_grad = (first, first + count), True
        ctx.set_materialize_grads(False)
        # Not a view of the parameter: ZeRO-3 frees the parameter when the router returns, but not this alias.
        return norms_TE, part(reduce_ErH, first * reduce_ErH[0].numel(), [count, *reduce_ErH.shape[1:]])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor | None, grad_erH: Tensor | None):
        hidden_TH, reduce_ErH, norms_TE = ctx.saved_tensors
        grad_TH, grad_ErH = torch.zeros_like(hidden_TH, dtype=norms_TE.dtype), torch.empty_like(reduce_ErH)
        weight_grads = _weight_grads_by_kernel if ctx.fused else _weight_grads
        for experts, sum_erH in weight_grads(grad_TH, hidden_TH, reduce_ErH, grad_TE, norms_TE):
            if grad_erH is not None:
                first, end = ctx.own
                low, high = max(first, experts.start), min(end, experts.stop)
                if low < high:
                    sum_erH[low - experts.start : high - experts.start] += grad_erH[low - first : high - first]
            grad_ErH[experts] = sum_erH
        return grad_TH.to(hidden_TH.dtype), grad_ErH, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    """dtype of norms and sums."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _tiles(hidden_TH: Tensor, reduce_ErH: Tensor) -> tuple[list[slice], list[slice]]:
    """Tiles of tokens and experts whose latents fit a CPU's cache; on a device, all experts and many tokens."""
    (tokens, _), (experts, rank, _) = hidden_TH.shape, reduce_ErH.shape
    if hidden_TH.device.type != "cpu":
        return slices(tokens, LATENTS_ON_DEVICE // (experts * rank)), [slice(0, experts)]
    return slices(tokens, TOKENS_PER_TILE), slices(experts, LATENTS_PER_TILE // (TOKENS_PER_TILE * rank))


def _latents(hidden_tH: Tensor, reduce_erH: Tensor) -> Tensor:
    wide_tH, wide_erH = (x.to(_wide(x)) for x in (hidden_tH, reduce_erH))
    return F.linear(wide_tH, wide_erH.flatten(0, 1)).unflatten(1, reduce_erH.shape[:2])


def _norms(hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
    norms_TE = hidden_TH.new_empty(len(hidden_TH), len(reduce_ErH), dtype=_wide(hidden_TH))
    for tokens, experts in product(*_tiles(hidden_TH, reduce_ErH)):
        latents_ter = _latents(hidden_TH[tokens], reduce_ErH[experts])
        norms_TE[tokens, experts] = torch.linalg.vector_norm(latents_ter, dim=-1)
    return norms_TE


def _norms_by_kernel(hidden_TH: Tensor, reduce_ErH: Tensor) -> Tensor:
    from dsmoe.triton.scores import latent_norms

    return latent_norms(hidden_TH, reduce_ErH)


def _factor(grad: Tensor, norm: Tensor) -> Tensor:
    """Gradient of a latent, divided by the latent."""
    return (grad / norm).masked_fill_(norm == 0, 0)


def _weight_grads(
    grad_TH: Tensor, hidden_TH: Tensor, reduce_ErH: Tensor, grad_TE: Tensor | None, norms_TE: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Gradient of A, some experts at a time, in the dtype of the norms; that of tokens is added to `grad_TH`."""
    if grad_TE is not None and grad_TE.is_sparse:
        (token_N, expert_N), value_N = grad_TE._indices(), grad_TE._values()
        expert_N, order = expert_N.sort()
        return _weight_grads_of_pairs(
            grad_TH, hidden_TH, reduce_ErH, token_N[order], expert_N, value_N[order], norms_TE
        )
    if grad_TE is not None and is_on_host(grad_TE) and 2 * int(grad_TE.count_nonzero()) < grad_TE.numel():
        expert_N, token_N = grad_TE.t().nonzero().unbind(1)
        value_N = grad_TE[token_N, expert_N]
        return _weight_grads_of_pairs(grad_TH, hidden_TH, reduce_ErH, token_N, expert_N, value_N, norms_TE)
    return _weight_grads_of_tiles(grad_TH, hidden_TH, reduce_ErH, grad_TE, norms_TE)


def _weight_grads_of_tiles(
    grad_TH: Tensor, hidden_TH: Tensor, reduce_ErH: Tensor, grad_TE: Tensor | None, norms_TE: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The same from all pairs."""
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


def _weight_grads_by_kernel(
    grad_TH: Tensor, hidden_TH: Tensor, reduce_ErH: Tensor, grad_TE: Tensor | None, norms_TE: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The same from all pairs, with products of the tokens' dtype that are added up in fp32."""
    from dsmoe.triton.scores import scaled_latents

    reduce_ErH = reduce_ErH.to(hidden_TH.dtype)
    sum_ErH = torch.zeros_like(reduce_ErH, dtype=grad_TH.dtype)
    if grad_TE is not None:
        factor_TE = _factor(grad_TE.to_dense() if grad_TE.is_sparse else grad_TE, norms_TE)
        for tokens in slices(len(hidden_TH), LATENTS_ON_DEVICE // reduce_ErH[:, :, 0].numel()):
            latents_tN = scaled_latents(hidden_TH[tokens], reduce_ErH, factor_TE[tokens]).flatten(1)
            grad_TH[tokens] += latents_tN @ reduce_ErH.flatten(0, 1)
            sum_ErH.flatten(0, 1).add_(latents_tN.t() @ hidden_TH[tokens])
    yield slice(0, len(reduce_ErH)), sum_ErH


def _weight_grads_of_pairs(
    grad_TH: Tensor, hidden_TH: Tensor, reduce_ErH: Tensor, token_N: Tensor, expert_N: Tensor, value_N: Tensor,
    norms_TE: Tensor,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """The same from pairs with a gradient, ordered by expert: one expert with its tokens at a time."""
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
