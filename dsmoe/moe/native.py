"""SwiGLU experts in C++ on a CPU (`dsmoe/native/swiglu.cpp`): each weight is read once, in the order it lies in,
however few rows its expert has. `dsmoe.moe.blocked` does the same with torch's products.

Shapes: R rows ordered by expert, e experts, H hidden, F expert width, K width of a source's rows.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.moe.gradient_accumulator import gradient_sum
from dsmoe.native import LANES, run

DTYPES = (torch.float32, torch.bfloat16)
LEAST = 512  # rows of a part of an expert that several threads work on
ITEM = np.dtype([("expert", "i8"), ("low", "i8"), ("high", "i8"), ("adds", "i8"), ("grad_weight", "u8", 2),
                 ("grad_down", "u8")])  # fmt: skip


class _Source(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("weight", ctypes.c_void_p), ("grad_rows", ctypes.c_void_p),
                ("width", ctypes.c_int64)]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [("bf16", ctypes.c_int64), ("hidden", ctypes.c_int64), ("ffn", ctypes.c_int64),
                ("sources", ctypes.c_int64), ("source", _Source * 2), ("down", ctypes.c_void_p),
                ("probs", ctypes.c_void_p), ("h", ctypes.c_void_p), ("out", ctypes.c_void_p),
                ("grad_probs", ctypes.c_void_p)]  # fmt: skip


def swiglu_experts(
    projections: list[tuple[Tensor, Tensor]], down_eHF: Tensor, probs_R: Tensor, counts: list[int],
    sums: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Weighted expert outputs [R, H]: as `dsmoe.moe.blocked.swiglu_experts`, for what `dsmoe.native.takes` in one of
    `DTYPES`; weights of rows in any dtype. Raises `NoKernel`."""
    flat = [tensor.contiguous() for pair in projections for tensor in pair]
    return _SwiGLU.apply(counts, sums, probs_R.float().contiguous(), down_eHF.contiguous(), *flat)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts: list[int], sums, probs_R: Tensor, down_eHF: Tensor, *flat: Tensor) -> Tensor:
        _, hidden, ffn = down_eHF.shape
        ctx.items = items(counts, torch.get_num_threads())
        out_RH = flat[0].new_empty(len(probs_R), hidden)
        h = flat[0].new_empty(len(probs_R) * 2 * ffn + 2 * LANES)  # a vector may be read that begins in its last line
        run("dsmoe_swiglu_forward", _layer(flat, down_eHF, probs_R, h, out_RH), len(ctx.items), ctx.items.ctypes.data)
        ctx.counts, ctx.sums = counts, sums
        ctx.save_for_backward(h, probs_R, down_eHF, *flat)
        return out_RH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH: Tensor):
        h, probs_R, down_eHF, *flat = ctx.saved_tensors
        grad_RH = grad_RH.contiguous()
        layer = _layer(flat, down_eHF, probs_R, h, grad_RH)
        grad_probs_R = torch.empty_like(probs_R)
        layer.grad_probs = grad_probs_R.data_ptr()
        grad_rows = [torch.empty_like(rows) for rows in flat[0::2]]
        for source, grad in zip(layer.source, grad_rows, strict=False):
            source.grad_rows = grad.data_ptr()
        work = ctx.items.copy()
        totals = [_WeightGradient(weight, ctx.counts, work, ctx.sums) for weight in (*flat[1::2], down_eHF)]
        for place, total in enumerate(totals[:-1]):
            work["grad_weight"][:, place] = total.pointers
        work["grad_down"] = totals[-1].pointers
        run("dsmoe_swiglu_backward", layer, len(work), work.ctypes.data)
        *grad_weights, grad_down = (total.finish() for total in totals)
        found = [x for pair in zip(grad_rows, grad_weights, strict=True) for x in pair]
        return None, None, grad_probs_R, grad_down, *found


def items(counts: list[int], threads: int) -> np.ndarray:
    """Work for threads, [n] of `ITEM`, largest first; none for an expert without rows.

    All rows of an expert are one item, so that one thread sums its weights' gradients; only an expert with more than
    its share of the rows is split.
    """
    rows = np.asarray(counts, np.int64)
    ends = rows.cumsum()
    share = int(rows.sum()) if threads == 1 else max(LEAST, -(-int(rows.sum()) // (2 * threads)))
    parts = -(-rows // max(1, share))
    found = np.zeros(int(parts.sum()), ITEM)
    found["expert"] = np.repeat(np.arange(len(rows)), parts)
    part = np.arange(len(found)) - np.repeat(parts.cumsum() - parts, parts)
    found["low"] = (ends - rows)[found["expert"]] + part * share
    found["high"] = np.minimum(found["low"] + share, ends[found["expert"]])
    return found[np.argsort(found["low"] - found["high"], kind="stable")]


class _WeightGradient:
    """The gradient [e, ...] of a packed weight, and where each item writes its part of it: the first item of an expert
    into the gradient itself, or onto what other parts of the pass have put there; others into memory of their own that
    is added at the end."""

    def __init__(self, weight: Tensor, counts: list[int], work: np.ndarray, sums: dict[int, Tensor] | None):
        self.result, self.adds = gradient_sum(weight, sums)
        empty = [expert for expert, count in enumerate(counts) if not count]
        if empty and not self.adds:
            self.result[torch.tensor(empty)] = 0
        experts = work["expert"]
        self.pointers = (self.result.data_ptr() + experts * self.result[0].nbytes).astype("u8")
        first = np.unique(experts, return_index=True)[1]
        others = np.setdiff1d(np.arange(len(work)), first)
        self.others = [(int(experts[place]), torch.empty_like(weight[0])) for place in others]
        self.pointers[others] = [part.data_ptr() for _, part in self.others]
        work["adds"][first] = self.adds

    def finish(self) -> Tensor | None:
        for expert, part in self.others:
            self.result[expert] += part
        return None if self.adds else self.result


def _layer(flat, down_eHF: Tensor, probs_R: Tensor, h: Tensor, out_RH: Tensor) -> _Layer:
    layer = _Layer(
        bf16=down_eHF.dtype == torch.bfloat16, hidden=down_eHF.size(1), ffn=down_eHF.size(2), sources=len(flat) // 2,
        down=down_eHF.data_ptr(), probs=probs_R.data_ptr(), h=h.data_ptr(), out=out_RH.data_ptr(),
    )  # fmt: skip
    for place, (rows, weight) in enumerate(zip(flat[0::2], flat[1::2], strict=True)):
        layer.source[place] = _Source(rows=rows.data_ptr(), weight=weight.data_ptr(), width=rows.size(1))
    return layer
