"""RMSNorm in C++ on a CPU (`dsmoe/native/norm.cpp`): one pass over memory, not a chain of operators. R rows, K wide."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsmoe import native
from dsmoe.native import ways

PROBE_NUMBERS = 1 << 19  # on which ways are compared
STRIP, STRIPS_PER_THREAD = 256, 4  # rows that a thread takes at a time; strips that are worth a thread


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "size", "strip")), ("epsilon", ctypes.c_double),
        ("x", ctypes.c_void_p), ("x_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("w", "y", "inverse", "grad_y", "grad_x", "grad_w")),
    ]  # fmt: skip


class RMSNorm(nn.RMSNorm):
    """torch's, over the last dimension, or through the kernel where that can do it (fp32, widths in eights) and is
    faster."""

    def forward(self, x: Tensor) -> Tensor:
        if self.eps is None or x.numel() == 0 or not native.supports(x, self.weight) or native.unavailable():
            return super().forward(x)
        width = x.size(-1)
        if ways.fastest("RMSNorm", f"rows of {width}", norm_candidates(width)) == "torch":
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


def norm_candidates(width: int, numbers: int = PROBE_NUMBERS) -> dict[str, Callable[[], None]]:
    """Forward and backward of random rows by dsmoe's kernel ("native") and by torch's operators ("torch")."""

    @lru_cache(maxsize=1)  # made by the first one that runs
    def problem() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(max(1, numbers // width), width, generator=torch.Generator().manual_seed(0))
        return x.requires_grad_(), torch.ones(width, requires_grad=True), torch.ones_like(x)

    def work(norm: Callable[[Tensor, Tensor], Tensor]) -> None:
        x, weight, grad = problem()
        ways.forward_and_backward(lambda: norm(x, weight), (x, weight), grad)

    return {
        "native": partial(work, lambda x, weight: _RMSNorm.apply(x, weight, 1e-6)),
        "torch": partial(work, lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)),
    }


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_K: Tensor, epsilon: float) -> Tensor:
        rows_RK = _rows(x)
        y, inverse_R = x.new_empty(x.shape), x.new_empty(len(rows_RK))
        arguments = _arguments(rows_RK, weight_K, inverse_R, epsilon)
        arguments.y = y.data_ptr()
        native.run("dsmoe_norm_forward", arguments, -(-len(rows_RK) // STRIP), items_per_thread=STRIPS_PER_THREAD)
        ctx.save_for_backward(x, weight_K, inverse_R)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight_K, inverse_R = ctx.saved_tensors
        rows_RK, grad = _rows(x), grad.contiguous()
        strips = -(-len(rows_RK) // STRIP)
        grad_x, parts = x.new_empty(x.shape), weight_K.new_empty(strips, len(weight_K))
        arguments = _arguments(rows_RK, weight_K, inverse_R, ctx.epsilon)
        arguments.grad_y, arguments.grad_x, arguments.grad_w = grad.data_ptr(), grad_x.data_ptr(), parts.data_ptr()
        native.run("dsmoe_norm_backward", arguments, strips, items_per_thread=STRIPS_PER_THREAD)
        return grad_x, parts.sum(0), None


def _rows(x: Tensor) -> Tensor:
    """[R, K], each row in one piece; a view where rows lie equally far apart, as heads in a fused projection do."""
    rows_RK = x.reshape(-1, x.size(-1))
    return rows_RK if rows_RK.stride(1) == 1 else rows_RK.contiguous()


def _arguments(rows_RK: Tensor, weight_K: Tensor, inverse_R: Tensor, epsilon: float) -> _Norm:
    return _Norm(
        *rows_RK.shape, STRIP, epsilon, rows_RK.data_ptr(), rows_RK.stride(0), weight_K.data_ptr(),
        inverse=inverse_R.data_ptr(),
    )  # fmt: skip
