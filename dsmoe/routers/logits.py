"""Logits of a gate: fp32 [T, E], accumulated in fp32, whatever the model's dtype. T tokens, E experts, H hidden."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.native import LANES, require, run, supports, unavailable
from dsmoe.native.ways import multiplies_bf16

GROUP = 64  # tokens that a thread takes at a time (logits.cpp)


def fp32_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """x W^T. Autograd saves the bf16 tensors of a bf16 model, no fp32 copies."""
    if hidden_TH.dtype == weight_EH.dtype == torch.float32:
        return F.linear(hidden_TH, weight_EH)
    return _FP32Logits.apply(hidden_TH, weight_EH)


def recomputes_logits(low_precision: bool, num_experts: int, hidden_size: int) -> bool:
    """Whether storing fp32 logits for the backward pass takes over twice the memory of a gate's bf16 inputs."""
    return low_precision and num_experts > hidden_size


class _FP32Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TH, weight_EH)
        if (
            supports(hidden_TH, weight_EH, dtypes=(torch.bfloat16,))
            and len(weight_EH) % LANES == 0
            and not unavailable()
        ):
            return _products(hidden_TH.contiguous(), weight_EH.contiguous())
        return F.linear(hidden_TH.float(), weight_EH.float())

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
    require(
        supports(hidden_TH, weight_EH, dtypes=(torch.bfloat16,))
        and hidden_TH.dim() == weight_EH.dim() == 2
        and hidden_TH.size(1) == weight_EH.size(1)
        and len(weight_EH) % LANES == 0
        and hidden_TH.is_contiguous()
        and weight_EH.is_contiguous(),
        f"logits: found {hidden_TH.dtype} {list(hidden_TH.shape)} and {weight_EH.dtype} {list(weight_EH.shape)}; "
        f"expected contiguous bfloat16 [T, H] and [E, H], E a multiple of {LANES}, H of {2 * LANES}",
    )
    logits_TE = hidden_TH.new_empty(len(hidden_TH), len(weight_EH), dtype=torch.float32)
    sizes = (multiplies_bf16(), len(hidden_TH), len(weight_EH), hidden_TH.size(1))
    places = (hidden_TH.data_ptr(), weight_EH.data_ptr(), logits_TE.data_ptr())
    run("dsmoe_logits", _Logits(*sizes, *places), -(-len(hidden_TH) // GROUP))
    return logits_TE
