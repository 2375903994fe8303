"""Causal attention in C++ on a CPU (`dsmoe/native/attention.cpp`), on Megatron's layout, where it
is faster than torch's (docs/performance.md).

Shapes: S positions, B sequences, n query heads, g heads of keys and values, d head size.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe import native
from dsmoe.model.rotary import Angles


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("position", "sequence", "head"))]

    @classmethod
    def of(cls, tensor_SBhd: Tensor) -> _View:
        return cls(tensor_SBhd.data_ptr(), *tensor_SBhd.stride()[:3])


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("length", "heads", "groups", "size")), ("scale", ctypes.c_double),
        ("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p),
        *((name, _View) for name in ("query", "key", "value", "out")), ("logsum", ctypes.c_void_p),
        *((name, _View) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
    ]  # fmt: skip


def supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel can do it: fp32 on a CPU, d in eights, as many positions of each, and a compiler was there."""
    return (
        native.supports(query, key, value) and len(query) == len(key) and query.numel() > 0 and not native.unavailable()
    )


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, angles: Angles | None = None
) -> Tensor:
    """softmax(scale q k^T) v over the keys up to each query.

    Args:
        query: fp32 [S, B, n, d]. key, value: [S, B, g, d], n a multiple of g.
        scale: None is 1 / sqrt(d).
        angles: by which queries and keys are turned first, as by `dsmoe.model.rotary.turn`; None leaves them.

    Returns:
        [S, B, n, d].

    Raises:
        ValueError: tensors that do not fit together or that the kernel does not support.
    """
    (length, batch, heads, size), groups = query.shape, key.size(2)
    native.require(
        supports(query, key, value)
        and key.shape == value.shape == (length, batch, groups, size)
        and groups > 0
        and heads % groups == 0,
        f"attention: found query {query.dtype} {list(query.shape)}, key {key.dtype} {list(key.shape)}, value "
        f"{value.dtype} {list(value.shape)}; expected fp32 [S, B, n, d], [S, B, g, d] and the same, n a multiple of "
        "g, d of 8",
    )
    native.require(
        angles is None or all(t.shape == (length, size // 2) and t.dtype == torch.float32 for t in angles),
        f"angles: found {[(t.dtype, list(t.shape)) for t in angles or ()]}, expected fp32 [{length}, {size // 2}]",
    )
    angles = angles and Angles(*(table.contiguous() for table in angles))
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    tensors = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return _CausalAttention.apply(*tensors, scale, angles)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float, angles: Angles | None) -> Tensor:
        length, batch, heads, _ = query.shape
        out = query.new_empty(query.shape)
        logsum = query.new_empty(batch, heads, length)
        arguments = _arguments(query, key, value, out, logsum, scale, angles)
        native.run("dsmoe_attention_forward", arguments, batch * heads)
        ctx.save_for_backward(query, key, value, out, logsum)
        ctx.scale, ctx.angles = scale, angles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        query, key, value, out, logsum = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = [x.new_empty(x.shape) for x in (query, key, value)]
        arguments = _arguments(query, key, value, out, logsum, ctx.scale, ctx.angles)
        arguments.grad_out = _View.of(grad)
        arguments.grad_query, arguments.grad_key, arguments.grad_value = map(_View.of, grads)
        native.run("dsmoe_attention_backward", arguments, query.size(1) * key.size(2))
        return *grads, None, None


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor, scale: float, angles: Angles | None
) -> _Attention:
    length, _, heads, size = query.shape
    tables = (None, None) if angles is None else (table.data_ptr() for table in angles)
    return _Attention(
        length, heads, key.size(2), size, scale, *tables, *map(_View.of, (query, key, value, out)), logsum.data_ptr()
    )
