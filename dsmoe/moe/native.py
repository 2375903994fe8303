"""SwiGLU experts in C++ on a CPU (`dsmoe/native/swiglu.cpp`), around torch's matrix micro-kernels.

`dsmoe.moe.experts.loop_linear` is the reference it is tested against.

Shapes: R rows ordered by expert, e experts, H hidden, F expert width, K width of a source's rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.moe.gradient_accumulator import gradient_sum
from dsmoe.native import require, run, supports

DTYPES = (torch.float32, torch.bfloat16)
MIN_ROWS = 512  # of a part of an expert that several threads work on
SLICE = 512  # of F at a time (swiglu.cpp)
FEW = 16  # rows of an expert, up to which products of its own can be faster than micro-kernels
ITEM = np.dtype(
    [
        *((name, "i8") for name in ("expert", "low", "high", "adds", "fp32")),
        ("grad_weight", "u8", 2),
        ("grad_down", "u8"),
    ]
)


class _Source(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("rows", "weight", "grad_rows")), ("width", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "stored_bf16", "computed_bf16", "fp32_grad_rows", "few", "hidden", "ffn", "sources",
        )),
        ("source", _Source * 2), *((name, ctypes.c_void_p) for name in ("down", "probs", "h", "out", "grad_probs")),
    ]  # fmt: skip


def swiglu_experts(
    projections: Sequence[tuple[Tensor, Tensor]], down_eHF: Tensor, probs_R: Tensor, counts: list[int],
    sums: dict[int, Tensor] | None = None, computes_bf16: bool = False, few: int = 0,
) -> Tensor:  # fmt: skip
    """Weighted expert outputs [R, H].

    Args:
        projections: what makes h [R, 2F], gate first: one pair (rows [R, K], weight [e, 2F, K]), or one for the gate
            and one for up, with weights [e, F, K]. fp32 or bf16, on a CPU, K in steps of 32 bytes.
        down_eHF: down projections, of the same dtype.
        probs_R: weight of each row, in any dtype.
        counts: rows of each expert.
        sums: of the weights' gradients, shared with other parts of the pass (`dsmoe.moe.gradient_accumulator`).
        computes_bf16: multiply bf16 numbers as such, not widened to fp32; the CPU must have instructions for it.
        few: experts with at most so many rows have products of their own in the forward pass, in fp32.

    Raises:
        ValueError: tensors that do not fit together or that the kernel does not support.
        KernelsUnavailable: there is no kernel here.
    """
    _check(projections, down_eHF, probs_R, counts)
    flat = [tensor.contiguous() for pair in projections for tensor in pair]
    return _SwiGLU.apply(counts, sums, (computes_bf16, few), probs_R.float().contiguous(), down_eHF.contiguous(), *flat)


def _check(projections, down_eHF: Tensor, probs_R: Tensor, counts: list[int]) -> None:
    tensors = [down_eHF, *(tensor for pair in projections for tensor in pair)]
    require(len(projections) in (1, 2), f"projections: found {len(projections)} pairs, expected 1 or 2")
    require(
        supports(*tensors, dtypes=DTYPES) and probs_R.device.type == "cpu",
        f"experts: found {', '.join(f'{t.dtype} {list(t.shape)} on {t.device}' for t in (*tensors, probs_R))}; "
        "expected one of float32 and bfloat16, on a CPU, with last sizes in steps of 32 bytes",
    )
    rows, experts = sum(counts), len(counts)
    _, hidden, ffn = down_eHF.shape
    require(
        down_eHF.shape == (experts, hidden, ffn) and hidden % (32 // down_eHF.element_size()) == 0,
        f"down: found {list(down_eHF.shape)}, expected [{experts}, H, F] for {experts} counts, H in steps of 32 bytes",
    )
    require(min(counts, default=0) >= 0, f"counts: found {min(counts, default=0)}, expected none below 0")
    require(probs_R.shape == (rows,), f"probs: found {list(probs_R.shape)}, expected [{rows}]: the counts' sum")
    for source, weight in projections:
        expected = (experts, 2 * ffn // len(projections), source.size(-1))
        require(
            source.shape == (rows, source.size(-1)),
            f"rows: found {list(source.shape)}, expected [{rows}, K]: the counts' sum",
        )
        require(weight.shape == expected, f"weight: found {list(weight.shape)}, expected {list(expected)}")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, counts: list[int], sums, products: tuple[bool, int], probs_R: Tensor, down_eHF: Tensor, *flat: Tensor
    ):
        _, hidden, ffn = down_eHF.shape
        ctx.items = items(counts, torch.get_num_threads())
        ctx.counts, ctx.sums, ctx.products = counts, sums, products
        out_RH = flat[0].new_empty(len(probs_R), hidden)
        h_RF = flat[0].new_empty(len(probs_R), 2 * ffn)
        layer = _layer(flat, down_eHF, probs_R, h_RF, out_RH, *products)
        run("dsmoe_swiglu_forward", layer, len(ctx.items), ctx.items.ctypes.data)
        ctx.save_for_backward(h_RF, probs_R, down_eHF, *flat)
        return out_RH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH: Tensor):
        h_RF, probs_R, down_eHF, *flat = ctx.saved_tensors
        grad_RH = grad_RH.contiguous()
        layer = _layer(flat, down_eHF, probs_R, h_RF, grad_RH, *ctx.products)
        grad_probs_R = torch.empty_like(probs_R)
        layer.grad_probs = grad_probs_R.data_ptr()
        # Several slices of F add to the gradient of a row: in fp32, also where rows are bf16.
        layer.fp32_grad_rows = down_eHF.size(2) > SLICE
        dtype = torch.float32 if layer.fp32_grad_rows else flat[0].dtype
        grad_rows = [torch.empty_like(rows, dtype=dtype) for rows in flat[0::2]]
        for source, grad in zip(layer.source, grad_rows, strict=False):
            source.grad_rows = grad.data_ptr()
        work = ctx.items.copy()
        gradients = [_WeightGradient(weight, ctx.counts, work, ctx.sums) for weight in (*flat[1::2], down_eHF)]
        for index, gradient in enumerate(gradients[:-1]):
            work["grad_weight"][:, index] = gradient.pointers
        work["grad_down"] = gradients[-1].pointers
        run("dsmoe_swiglu_backward", layer, len(work), work.ctypes.data)
        *grad_weights, grad_down = (gradient.finish() for gradient in gradients)
        grad_rows = [grad.to(flat[0].dtype) for grad in grad_rows]
        pairs = [grad for pair in zip(grad_rows, grad_weights, strict=True) for grad in pair]
        return None, None, None, grad_probs_R, grad_down, *pairs


def items(counts: list[int], threads: int) -> np.ndarray:
    """Work for threads, [n] of `ITEM`, largest first; none for an expert without rows.

    All rows of an expert are one item, so that one thread sums its weights' gradients; only an expert with more than
    its share of the rows is split.
    """
    rows = np.asarray(counts, np.int64)
    ends = rows.cumsum()
    share = int(rows.sum()) if threads == 1 else max(MIN_ROWS, -(-int(rows.sum()) // (2 * threads)))
    parts = -(-rows // max(1, share))
    work = np.zeros(int(parts.sum()), ITEM)
    work["expert"] = np.repeat(np.arange(len(rows)), parts)
    part = np.arange(len(work)) - np.repeat(parts.cumsum() - parts, parts)
    work["low"] = (ends - rows)[work["expert"]] + part * share
    work["high"] = np.minimum(work["low"] + share, ends[work["expert"]])
    return work[np.argsort(work["low"] - work["high"], kind="stable")]


class _WeightGradient:
    """The gradient [e, ...] of a packed weight, and where each item writes its part of it: into the gradient itself, or
    onto what other parts of the pass have put there; the items of an expert that has several into fp32 memory of their
    own, whose sum is rounded once."""

    def __init__(self, weight: Tensor, counts: list[int], work: np.ndarray, sums: dict[int, Tensor] | None):
        self.result, self.adds = gradient_sum(weight, sums)
        empty = [expert for expert, count in enumerate(counts) if not count]
        if empty and not self.adds:
            self.result[torch.tensor(empty)] = 0
        experts = work["expert"]
        self.pointers = (self.result.data_ptr() + experts * self.result[0].nbytes).astype("u8")
        shared = np.flatnonzero(np.bincount(experts, minlength=1)[experts] > 1)
        self.parts: dict[int, list[Tensor]] = {}
        for index in shared:
            part = torch.empty_like(weight[0], dtype=torch.float32)
            self.parts.setdefault(int(experts[index]), []).append(part)
            self.pointers[index] = part.data_ptr()
        work["adds"] = self.adds
        work["adds"][shared], work["fp32"][shared] = False, True

    def finish(self) -> Tensor | None:
        for expert, parts in self.parts.items():
            for part in parts[1:]:
                parts[0] += part
            if self.adds:
                self.result[expert] += parts[0]
            else:
                self.result[expert] = parts[0]
        return None if self.adds else self.result


def _layer(
    flat: Sequence[Tensor], down_eHF: Tensor, probs_R: Tensor, h_RF: Tensor, out_RH: Tensor, computes_bf16: bool,
    few: int,
) -> _Layer:  # fmt: skip
    bf16 = down_eHF.dtype == torch.bfloat16
    layer = _Layer(
        stored_bf16=bf16, computed_bf16=bf16 and computes_bf16, few=few, hidden=down_eHF.size(1), ffn=down_eHF.size(2),
        sources=len(flat) // 2, down=down_eHF.data_ptr(), probs=probs_R.data_ptr(), h=h_RF.data_ptr(),
        out=out_RH.data_ptr(),
    )  # fmt: skip
    for index, (rows, weight) in enumerate(zip(flat[0::2], flat[1::2], strict=True)):
        layer.source[index] = _Source(rows=rows.data_ptr(), weight=weight.data_ptr(), width=rows.size(1))
    return layer
