"""Logits of a gate: fp32 [T, E], accumulated in fp32, whatever the model's dtype. T tokens, E experts, H hidden."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.native import LANES, require, run, supports, unavailable
from dsmoe.native.ways import fastest, multiplies_bf16

GROUP = 64  # tokens that a thread takes at a time (logits.cpp)
PROBE_TOKENS = 2048
DTYPES = (torch.bfloat16,)


def fp32_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """x W^T. Autograd saves the bf16 tensors of a bf16 model, no fp32 copies."""
    if hidden_TH.dtype == weight_EH.dtype == torch.float32:
        return F.linear(hidden_TH, weight_EH)
    return _FP32Logits.apply(hidden_TH, weight_EH)


def recomputes_logits(low_precision: bool, num_experts: int, hidden_size: int) -> bool:
    """Whether storing fp32 logits for the backward pass takes over twice the memory of a gate's bf16 inputs."""
    return low_precision and num_experts > hidden_size


def _fastest(hidden_TH: Tensor, weight_EH: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The kernel or torch, whichever takes less time for such a gate here: one way for any number of tokens, so that
    logits that are made again in blocks are the same to the last bit."""
    experts, hidden = weight_EH.shape
    if not _supports(hidden_TH, weight_EH):
        return _with_torch
    candidates = logits_candidates(PROBE_TOKENS, experts, hidden)
    return _products if fastest("bf16 gate logits", f"E={experts}, H={hidden}", candidates) == "native" else _with_torch


def _supports(hidden_TH: Tensor, weight_EH: Tensor) -> bool:
    return supports(hidden_TH, weight_EH, dtypes=DTYPES) and len(weight_EH) % LANES == 0 and not unavailable()


def logits_candidates(tokens: int, experts: int, hidden: int) -> dict[str, Callable[[], Tensor]]:
    """Logits of bf16 ones by the kernel ("native") and by torch ("torch")."""

    @lru_cache(maxsize=1)  # made by the first one that runs
    def problem() -> list[Tensor]:
        return [torch.ones(rows, hidden, dtype=torch.bfloat16) for rows in (tokens, experts)]

    return {"native": lambda: _products(*problem()), "torch": lambda: _with_torch(*problem())}


def _with_torch(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    return F.linear(hidden_TH.float(), weight_EH.float())


class _FP32Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TH, weight_EH)
        return _fastest(hidden_TH, weight_EH)(hidden_TH, weight_EH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor):
        hidden_TH, weight_EH = ctx.saved_tensors
        grad_hidden = (grad_TE @ weight_EH.float()).to(hidden_TH.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_TE.t() @ hidden_TH.float()).to(weight_EH.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight


class _Logits(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("computes_bf16", "tokens", "experts", "hidden")),
        *((name, ctypes.c_void_p) for name in ("hidden_TH", "weight_EH", "logits_TE")),
    ]


def _products(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """Logits of bf16 tensors, from the kernel in `dsmoe/native/logits.cpp`."""
    hidden_TH, weight_EH = hidden_TH.contiguous(), weight_EH.contiguous()
    require(
        supports(hidden_TH, weight_EH, dtypes=DTYPES)
        and hidden_TH.dim() == weight_EH.dim() == 2
        and hidden_TH.size(1) == weight_EH.size(1)
        and len(weight_EH) % LANES == 0,
        f"logits: found {hidden_TH.dtype} {list(hidden_TH.shape)} and {weight_EH.dtype} {list(weight_EH.shape)}; "
        f"expected bfloat16 [T, H] and [E, H], E a multiple of {LANES}, H of {2 * LANES}",
    )
    logits_TE = hidden_TH.new_empty(len(hidden_TH), len(weight_EH), dtype=torch.float32)
    sizes = (multiplies_bf16(), len(hidden_TH), len(weight_EH), hidden_TH.size(1))
    places = (hidden_TH.data_ptr(), weight_EH.data_ptr(), logits_TE.data_ptr())
    run("dsmoe_logits", _Logits(*sizes, *places), -(-len(hidden_TH) // GROUP))
    return logits_TE
