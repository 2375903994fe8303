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
        for rows in _blocks(softmax_TE):
            P = softmax_TE[rows]
            grad = torch.zeros_like(P) if grad_TE is None else grad_TE[rows]
            if grad_E is not None:
                grad = grad + grad_E
            if grad_entropy is not None:
                # d entropy / dP is -(log P + 1), and the softmax's own derivative takes a constant out again.
                grad = grad - grad_entropy * P.clamp(min=torch.finfo(P.dtype).tiny).log()
            result_TE[rows] = torch._softmax_backward_data(grad, P, -1, P.dtype)
        return result_TE, None


def shares_of(softmax_TE: Tensor, map_TE: Tensor, renormalize: bool) -> Tensor:
    """Weights [T, E]: P where an expert was chosen, else 0; with `renormalize` over the sum of the token's chosen P.

    Keeps P and the map alone, and works out its gradient in one buffer [T, E].
    """
    return _Shares.apply(softmax_TE, map_TE, renormalize)


class _Shares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, softmax_TE: Tensor, map_TE: Tensor, renormalize: bool) -> Tensor:
        share_TE = softmax_TE * map_TE
        total_T1 = share_TE.sum(dim=-1, keepdim=True) if renormalize else None
        ctx.save_for_backward(softmax_TE, map_TE, total_T1)
        return share_TE if total_T1 is None else share_TE.div_(total_T1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor):
        softmax_TE, map_TE, total_T1 = ctx.saved_tensors
        result_TE = torch.empty_like(softmax_TE)
        for rows in _blocks(softmax_TE):
            grad = torch.mul(grad_TE[rows], map_TE[rows], out=result_TE[rows])
            if total_T1 is not None:
                total_t1 = total_T1[rows]
                along_t1 = torch.linalg.vecdot(grad, softmax_TE[rows]).unsqueeze(1) / total_t1
                grad.sub_(along_t1 * map_TE[rows]).div_(total_t1)
        return result_TE, None, None


def _blocks(tensor_TE: Tensor) -> list[slice]:
    """Tokens that a CPU works on while they are in its cache; all of them on a device."""
    tokens, experts = tensor_TE.shape
    return slices(tokens, BLOCK // experts if tensor_TE.device.type == "cpu" else tokens)


def slices(length: int, step: int) -> list[slice]:
    """Parts of a dimension, of `step` each."""
    step = max(1, step)
    return [slice(low, low + step) for low in range(0, length, step)]
