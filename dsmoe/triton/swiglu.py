"""SwiGLU times each row's weight, one pass over memory each way.

    out = p silu(g) u;   dg = do p u silu'(g),  du = do p silu(g),  dp = sum over F of do silu(g) u

in fp32 between loads and stores. torch's operators read and write [R, F] eleven times for it.

Shapes: R rows, F expert width; gate and up may be the halves of one tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def swiglu_forward_kernel(
    gate, up, probs, out, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(tl.float32)
    p = tl.load(probs + row).to(tl.float32)
    tl.store(out + row * WIDTH + column, (g * tl.sigmoid(g) * u * p).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad, gate, up, probs, grad_gate, grad_up, grad_probs, grad_stride, gate_stride, up_stride, out_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(probs + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WIDTH
        d = tl.load(grad + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
        g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(tl.float32)
        s = tl.sigmoid(g)
        silu = g * s
        total += d * silu * u
        d *= p
        slope = s * (1 + g * (1 - s))
        tl.store(grad_gate + row * out_stride + column, (d * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + row * out_stride + column, (d * silu).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_probs + row, tl.sum(total, 0).to(grad_probs.dtype.element_ty))


def swiglu_reference(gate_RF: Tensor, up_RF: Tensor, probs_R: Tensor) -> Tensor:
    """[R, F] in the dtype of `gate_RF`, computed in fp32."""
    return (F.silu(gate_RF.float()) * up_RF.float() * probs_R.float().unsqueeze(1)).to(gate_RF.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_RF: Tensor, up_RF: Tensor, probs_R: Tensor) -> Tensor:
        gate_RF, up_RF = (x if x.stride(1) == 1 else x.contiguous() for x in (gate_RF, up_RF))
        probs_R = probs_R.contiguous()
        rows, width = gate_RF.shape
        out_RF = gate_RF.new_empty(rows, width)
        block = min(2048, triton.next_power_of_2(width))
        if rows:
            swiglu_forward_kernel[rows, triton.cdiv(width, block)](
                gate_RF, up_RF, probs_R, out_RF, gate_RF.stride(0), up_RF.stride(0), WIDTH=width, BLOCK=block,
                num_warps=8 if block >= 1024 else 4,
            )  # fmt: skip
        ctx.save_for_backward(gate_RF, up_RF, probs_R)
        return out_RF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RF: Tensor):
        gate_RF, up_RF, probs_R = ctx.saved_tensors
        grad_RF = grad_RF if grad_RF.stride(1) == 1 else grad_RF.contiguous()
        rows, width = gate_RF.shape
        both = gate_RF.new_empty(rows, 2 * width)  # side by side, as one product made gate and up
        grad_gate, grad_up = both.chunk(2, dim=1)
        grad_probs = torch.empty_like(probs_R)
        block = min(2048, triton.next_power_of_2(width))
        if rows:
            swiglu_backward_kernel[(rows,)](
                grad_RF, gate_RF, up_RF, probs_R, grad_gate, grad_up, grad_probs, grad_RF.stride(0), gate_RF.stride(0),
                up_RF.stride(0), both.stride(0), WIDTH=width, BLOCK=block, num_warps=8 if block >= 1024 else 4,
            )  # fmt: skip
        return grad_gate, grad_up, grad_probs


def swiglu(gate_RF: Tensor, up_RF: Tensor, probs_R: Tensor) -> Tensor:
    """As `swiglu_reference`, with gradients of all three."""
    return _SwiGLU.apply(gate_RF, up_RF, probs_R)
