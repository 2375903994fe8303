"""Between scores and what a router returns. Shapes: T tokens, E experts, k chosen ones of each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 18  # elements that a CPU works on while they are in its cache


def spread(gate_Tk: Tensor, expert_Tk: Tensor, like_TE: Tensor) -> Tensor:
    """Weights [T, E], 0 where an expert was not chosen."""
    return torch.zeros_like(like_TE).scatter_(1, expert_Tk, gate_Tk)


def map_of(expert_Tk: Tensor, like_TE: Tensor) -> Tensor:
    """bool like `like_TE`, True at the chosen."""
    return torch.zeros_like(like_TE, dtype=torch.bool).scatter_(1, expert_Tk, True)


def softmax_with_sums(logits_TE: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """P = softmax(logits) [T, E]; its sum over tokens [E]; and, if asked for, -sum_te P log P in nats, a scalar.

    Their gradients meet in one buffer [T, E]. By itself each would bring its own and a copy of it, which with many
    experts is a good part of what routing costs (docs/performance.md).
    """
    return _SoftmaxWithSums.apply(logits_TE, entropy)


class _SoftmaxWithSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE: Tensor, entropy: bool):
        softmax_TE = logits_TE.softmax(dim=-1)
        ctx.save_for_backward(softmax_TE)
        ctx.set_materialize_grads(False)
        return softmax_TE, softmax_TE.sum(0), torch.special.entr(softmax_TE).sum() if entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor | None, grad_E: Tensor | None, grad_entropy: Tensor | None):
        (softmax_TE,) = ctx.saved_tensors
        result_TE = torch.empty_like(softmax_TE)
        tokens, experts = softmax_TE.shape
        for rows in slices(tokens, BLOCK // experts if softmax_TE.device.type == "cpu" else tokens):
            P = softmax_TE[rows]
            grad = torch.zeros_like(P) if grad_TE is None else grad_TE[rows]
            if grad_E is not None:
                grad = grad + grad_E
            if grad_entropy is not None:
                # d entropy / dP is -(log P + 1), and the softmax's own derivative takes a constant out again.
                grad = grad - grad_entropy * P.clamp(min=torch.finfo(P.dtype).tiny).log()
            result_TE[rows] = torch._softmax_backward_data(grad, P, -1, P.dtype)
        return result_TE, None


def slices(length: int, step: int) -> list[slice]:
    """Parts of a dimension, of `step` each."""
    step = max(1, step)
    return [slice(low, low + step) for low in range(0, length, step)]
