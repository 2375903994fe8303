"""Products of experts with few rows each: forward, gradient of rows, and gradients of weights added up in place.

torch's grouped_mm has tiles of 64 or 128 rows, mostly empty at 64 experts with a few dozen rows; here tiles are as high
as an expert needs. A layer that works part by part adds each part's gradient to the first part's where it lies: torch
would write one of all weights for each part.

Shapes: R rows ordered by expert, e experts, N and K a weight's sizes.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Triton's interpreter multiplies bf16 as if it were integers.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _expert_of(ends, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr):
    """The expert of a tile, its first row and the end of its expert's; EXPERTS where there is no such tile."""
    e = tl.arange(0, PADDED)
    end = tl.load(ends + e, mask=e < EXPERTS, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles = tl.where(e < EXPERTS, (end - begin + BLOCK_R - 1) // BLOCK_R, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32) * (e < EXPERTS).to(tl.int32), 0)
    here = e == expert
    row = tl.sum(tl.where(here, begin + (tile - (last - tiles)) * BLOCK_R, 0), 0)
    return expert, row, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def grouped_kernel(
    rows, weight, ends, out, row_stride, weight_e, weight_n, weight_k, N, K: tl.constexpr, EXPERTS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum over k of rows[r, k] weight[e(r), n, k]."""
    expert, first, end = _expert_of(ends, tl.program_id(0), EXPERTS, PADDED, BLOCK_R)
    if expert < EXPERTS:
        r = first + tl.arange(0, BLOCK_R)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        base = weight + expert.to(tl.int64) * weight_e
        total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x = tl.load(
                rows + r[:, None].to(tl.int64) * row_stride + k[None, :], 
                mask=(r < end)[:, None] & (k < K)[None, :], other=0,
            )  # fmt: skip
            w = tl.load(
                base + n[None, :].to(tl.int64) * weight_n + k[:, None].to(tl.int64) * weight_k,
                mask=(n < N)[None, :] & (k < K)[:, None], other=0,
            )  # fmt: skip
            if WIDEN:
                x, w = x.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x, w, total, input_precision="ieee")
        place = out + r[:, None].to(tl.int64) * N + n[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(r < end)[:, None] & (n < N)[None, :])


@triton.jit
def weight_gradient_kernel(
    grad, rows, ends, out, grad_stride, row_stride, N, K, ADD: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[e, n, k] (+)= sum over the rows of e of grad[r, n] rows[r, k]; 0 for an expert without rows."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    end = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in range(first, end, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        d = tl.load(
            grad + r[None, :].to(tl.int64) * grad_stride + n[:, None], 
            mask=(r < end)[None, :] & (n < N)[:, None], other=0,
        )  # fmt: skip
        x = tl.load(
            rows + r[:, None].to(tl.int64) * row_stride + k[None, :], 
                mask=(r < end)[:, None] & (k < K)[None, :], other=0,
        )  # fmt: skip
        if WIDEN:
            d, x = d.to(tl.float32), x.to(tl.float32)
        total = tl.dot(d, x, total, input_precision="ieee")
    place = out + (expert.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def grouped_reference(rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
    """[R, N]: each expert's rows times its transposed weight."""
    counts = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).tolist()
    blocks = zip(rows_RK.split(counts), weight_eNK.unbind(0), strict=True)
    return torch.cat([block.float() @ weight.float().t() for block, weight in blocks]).to(rows_RK.dtype)


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile: a power of two near what an expert has on average, 16 at least (tensor cores)."""
    return min(128, max(16, triton.next_power_of_2(max(1, rows // max(1, experts)))))


def launch_grouped(rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor) -> Tensor:
    """As `grouped_reference`; the weight may have any strides."""
    (rows, k), (experts, n, _) = rows_RK.shape, weight_eNK.shape
    out_RN = rows_RK.new_empty(rows, n)
    height = tile_rows(rows, experts)
    grid = (triton.cdiv(rows, height) + experts, triton.cdiv(n, 128))  # as many tiles as there can be
    if rows:
        grouped_kernel[grid](
            rows_RK, weight_eNK, ends_e, out_RN, rows_RK.stride(0), *weight_eNK.stride(), n, K=k, EXPERTS=experts,
            PADDED=triton.next_power_of_2(experts), BLOCK_R=height, BLOCK_N=128, BLOCK_K=64, WIDEN=INTERPRETED,
            num_warps=8,
        )  # fmt: skip
    return out_RN


def add_weight_gradient(grad_RN: Tensor, rows_RK: Tensor, ends_e: Tensor, out_eNK: Tensor, adds: bool) -> None:
    """Write the gradient of the weights, or add it to what lies there."""
    experts, n, k = out_eNK.shape
    grid = (experts, triton.cdiv(n, 64), triton.cdiv(k, 64))
    weight_gradient_kernel[grid](
        grad_RN, rows_RK, ends_e, out_eNK, grad_RN.stride(0), rows_RK.stride(0), n, k, ADD=adds,
        BLOCK_R=min(64, tile_rows(len(rows_RK), experts)), BLOCK_N=64, BLOCK_K=64, WIDEN=INTERPRETED, num_warps=4,
    )  # fmt: skip


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor, sums: dict[int, Tensor] | None) -> Tensor:
        rows_RK = rows_RK if rows_RK.stride(1) == 1 else rows_RK.contiguous()
        ctx.save_for_backward(rows_RK, weight_eNK, ends_e)
        ctx.sums = sums
        return launch_grouped(rows_RK, weight_eNK, ends_e)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):
        rows_RK, weight_eNK, ends_e = ctx.saved_tensors
        grad_RN = grad_RN if grad_RN.stride(1) == 1 else grad_RN.contiguous()
        grad_RK = launch_grouped(grad_RN, weight_eNK.transpose(1, 2), ends_e)
        earlier = None if ctx.sums is None else ctx.sums.get(weight_eNK.data_ptr())
        total = torch.empty_like(weight_eNK, memory_format=torch.contiguous_format) if earlier is None else earlier
        add_weight_gradient(grad_RN, rows_RK, ends_e, total, adds=earlier is not None)
        if ctx.sums is not None:
            ctx.sums[weight_eNK.data_ptr()] = total
        return grad_RK, total if earlier is None else None, None, None


def grouped_linear(
    rows_RK: Tensor, weight_eNK: Tensor, ends_e: Tensor, sums: dict[int, Tensor] | None = None
) -> Tensor:
    """As `grouped_reference`, with gradients.

    Args:
        ends_e: int32, where each expert's rows end.
        sums: of weights' gradients, shared by the parts of a pass (`dsmoe.moe.gradient_accumulator`): the part whose
            gradient comes first makes the sum and returns it, the others add to it.
    """
    return _Grouped.apply(rows_RK, weight_eNK, ends_e, sums)
