"""Rows of tokens, by token: sums in fp32 in a fixed order, and copies whose gradient is such a sum.

torch's index_add adds with atomics, in whatever order they come and rounding to the rows' dtype at each. Here every
token sums its own rows, 0..E of them, in the order of its experts: the result is the same in every run, and exactly 0
for a token without rows.

Shapes: R rows, T tokens, H hidden. A `TokenOrder` lists each token's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TokenOrder:
    """Which rows belong to which token."""

    token_R: Tensor  # int64, the token of each row
    place_R: Tensor  # int32, rows ordered by token, each token's in their own order
    start_T: Tensor  # int32 [T + 1], where each token's rows begin in `place_R`

    @classmethod
    def of(cls, token_R: Tensor, tokens: int) -> TokenOrder:
        """For rows that `dsmoe.triton.plan` has not ordered."""
        token_sorted, place_R = token_R.sort(stable=True)
        edges = torch.arange(tokens + 1, device=token_R.device)
        return cls(token_R, place_R.to(torch.int32), torch.searchsorted(token_sorted, edges).to(torch.int32))

    def sum_rows(self, rows_RH: Tensor) -> Tensor:
        """What experts made of each token's rows, summed: [T, H]."""
        return _SumRows.apply(rows_RH, self)

    def take_rows(self, tokens_TH: Tensor) -> Tensor:
        """A copy of its token for each row: [R, H]. The gradient is `sum_rows` of the rows'."""
        return _TakeRows.apply(tokens_TH, self)


@triton.jit
def sum_rows_kernel(rows, place, start, out, row_stride, H: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(tl.load(start + token), tl.load(start + token + 1)):
        row = tl.load(place + n).to(tl.int64)
        total += tl.load(rows + row * row_stride + column, mask=column < H, other=0).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


def sum_rows_reference(rows_RH: Tensor, token_R: Tensor, tokens: int) -> Tensor:
    """[T, H] in the rows' dtype: fp32 sums of each token's rows."""
    total_TH = torch.zeros(tokens, rows_RH.size(1), dtype=torch.float32, device=rows_RH.device)
    return total_TH.index_add(0, token_R, rows_RH.float()).to(rows_RH.dtype)


def launch_sum_rows(rows_RH: Tensor, order: TokenOrder) -> Tensor:
    """As `sum_rows_reference`."""
    rows_RH = rows_RH if rows_RH.stride(-1) == 1 else rows_RH.contiguous()
    tokens, hidden = len(order.start_T) - 1, rows_RH.size(1)
    out_TH = rows_RH.new_empty(tokens, hidden)
    block = min(1024, triton.next_power_of_2(hidden))
    if tokens:
        grid = (tokens, triton.cdiv(hidden, block))
        sum_rows_kernel[grid](
            rows_RH, order.place_R, order.start_T, out_TH, rows_RH.stride(0), H=hidden, BLOCK=block,
            num_warps=min(8, max(1, block // 128)),
        )  # fmt: skip
    return out_TH


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH: Tensor, order: TokenOrder) -> Tensor:
        ctx.order = order
        return launch_sum_rows(rows_RH, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH: Tensor):
        return grad_TH.index_select(0, ctx.order.token_R), None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens_TH: Tensor, order: TokenOrder) -> Tensor:
        ctx.order = order
        return tokens_TH.index_select(0, order.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH: Tensor):
        return launch_sum_rows(grad_RH, ctx.order), None
