"""Between scores and what a router returns. Shapes: T tokens, E experts, k chosen ones of each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 18  # elements that a CPU works on while they are in its cache


def fp32_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """fp32 [T, E], with fp32 sums forward and backward. Of a bf16 model the backward pass keeps what is there, no fp32
    copies."""
    if hidden_TH.dtype == weight_EH.dtype == torch.float32:
        return F.linear(hidden_TH, weight_EH)
    return _FP32Logits.apply(hidden_TH, weight_EH)


class _FP32Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TH, weight_EH)
        return F.linear(hidden_TH.float(), weight_EH.float())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor):
        hidden_TH, weight_EH = ctx.saved_tensors
        grad_hidden = (grad_TE @ weight_EH.float()).to(hidden_TH.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad_TE.t() @ hidden_TH.float()).to(weight_EH.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight


def relu_with_sums(logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU [T, E], where it is above 0, bool [T, E], and its sum over tokens [E].

    Keeps the map alone, and all gradients meet in one buffer [T, E].
    """
    return _ReLUWithSums.apply(logits_TE)


class _ReLUWithSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE: Tensor):
        probs_TE = F.relu(logits_TE)
        map_TE = probs_TE > 0
        ctx.save_for_backward(map_TE)
        ctx.mark_non_differentiable(map_TE)
        ctx.set_materialize_grads(False)
        return probs_TE, map_TE, probs_TE.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor | None, _, grad_E: Tensor | None):
        (map_TE,) = ctx.saved_tensors
        if grad_TE is None or grad_E is None:
            grad = grad_TE if grad_E is None else grad_E
            return None if grad is None else grad * map_TE
        return torch.add(grad_TE, grad_E).masked_fill_(map_TE.logical_not(), 0.0)  # times a bool would make it fp32


def spread(gate_Tk: Tensor, expert_Tk: Tensor, like_TE: Tensor) -> Tensor:
    """Weights [T, E], 0 where an expert was not chosen."""
    return torch.zeros_like(like_TE).scatter_(1, expert_Tk, gate_Tk)


def map_of(expert_Tk: Tensor, like_TE: Tensor) -> Tensor:
    """bool like `like_TE`, True at the chosen."""
    return torch.zeros_like(like_TE, dtype=torch.bool).scatter_(1, expert_Tk, True)


class Largest(NamedTuple):
    """What `largest_shares` makes of scores."""

    gate_Tk: Tensor  # weights of a token's k largest experts, largest first
    expert_Tk: Tensor  # int64, which they are
    sum_E: Tensor  # of P over tokens


def largest_shares(scores_TE: Tensor, k: int, *, of_all: bool) -> Largest:
    """P = softmax(scores), and weights for each token's k largest: P of all experts, or the softmax over these k alone.

    All gradients meet in one buffer [T, E]. With plain operators each brings its own and a copy of it, which with many
    experts is a good part of what routing costs (docs/performance.md).
    """
    return Largest(*_LargestShares.apply(scores_TE, k, of_all))


class _LargestShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores_TE: Tensor, k: int, of_all: bool):
        softmax_TE = scores_TE.softmax(dim=-1)
        score_Tk, expert_Tk = scores_TE.topk(k, dim=-1)
        gate_Tk = softmax_TE.gather(1, expert_Tk) if of_all else score_Tk.softmax(dim=-1)
        ctx.save_for_backward(softmax_TE, gate_Tk, expert_Tk)
        ctx.of_all = of_all
        ctx.mark_non_differentiable(expert_Tk)
        ctx.set_materialize_grads(False)
        return gate_Tk, expert_Tk, softmax_TE.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_Tk: Tensor | None, _, grad_E: Tensor | None):
        softmax_TE, gate_Tk, expert_Tk = ctx.saved_tensors
        result_TE = torch.empty_like(softmax_TE)
        for rows in blocks(softmax_TE):
            P, result = softmax_TE[rows], result_TE[rows]
            if grad_E is None:
                result.zero_()
            else:
                torch.ops.aten._softmax_backward_data.out(grad_E.expand_as(P), P, -1, P.dtype, grad_input=result)
            if grad_Tk is None:
                continue
            grad, gate = grad_Tk[rows], gate_Tk[rows]
            if ctx.of_all:
                weighted = grad * gate
                result.addcmul_(P, weighted.sum(dim=-1, keepdim=True), value=-1)
            else:
                weighted = torch._softmax_backward_data(grad, gate, -1, gate.dtype)
            result.scatter_add_(1, expert_Tk[rows], weighted)
        return result_TE, None, None


def _softmax_backward(P: Tensor, grad: Tensor | None, grad_E: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """The gradient of some tokens' logits, from those of P, whose memory it uses, of the sum and of the entropy."""
    grad = torch.zeros_like(P) if grad is None else grad
    if grad_E is not None:
        grad += grad_E
    if grad_entropy is not None:
        # d entropy / dP is -(log P + 1), and the softmax's own derivative takes a constant out again.
        grad -= grad_entropy * P.clamp(min=torch.finfo(P.dtype).tiny).log()
    return torch._softmax_backward_data(grad, P, -1, P.dtype)


class Shares(NamedTuple):
    """What `chosen_shares` makes of logits."""

    share_TE: Tensor  # P where an expert was chosen, else 0
    map_TE: Tensor  # bool, the chosen
    sum_E: Tensor  # of P over tokens
    entropy: Tensor | None  # -sum_te P log P in nats, a scalar


def chosen_shares(
    logits_TE: Tensor,
    choose: Callable[[Tensor], Tensor],
    *,
    renormalize: bool,
    entropy: bool,
    scale: Tensor | None = None,
    epsilon: float = 0.0,
) -> Shares:
    """P = softmax(logits), and weights for the experts that are chosen by it.

    Keeps logits and map alone: P is made again in the backward pass, some tokens at a time.

    Args:
        choose: bool [T, E] from P.
        renormalize: divide by the sum of the token's chosen P.
        entropy: whether it is asked for.
        scale: fp32 [1]; with it P is the softmax of scale * (logits - their mean over experts) / their deviation.
        epsilon: added to the variance then.
    """
    return Shares(*_ChosenShares.apply(logits_TE, scale, epsilon, choose, renormalize, entropy))


class _ChosenShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE: Tensor, scale: Tensor | None, epsilon: float, choose, renormalize: bool, entropy: bool):
        scores_TE = logits_TE if scale is None else scale * _standardised(logits_TE, epsilon)[0]
        softmax_TE = scores_TE.softmax(dim=-1)
        sum_E = softmax_TE.sum(0)
        total_entropy = torch.special.entr(softmax_TE).sum() if entropy else None
        map_TE = choose(softmax_TE)
        share_TE = softmax_TE.masked_fill_(map_TE.logical_not(), 0.0)  # times a bool would make that fp32
        if renormalize:
            share_TE /= share_TE.sum(dim=-1, keepdim=True)
        ctx.save_for_backward(logits_TE, scale, map_TE)
        ctx.epsilon, ctx.renormalize = epsilon, renormalize
        ctx.mark_non_differentiable(map_TE)
        ctx.set_materialize_grads(False)
        return share_TE, map_TE, sum_E, total_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor | None, _, grad_E: Tensor | None, grad_entropy: Tensor | None):
        logits_TE, scale, map_TE = ctx.saved_tensors
        result_TE = torch.empty_like(logits_TE)
        grad_scale = None if scale is None else torch.zeros_like(scale)
        for rows in blocks(logits_TE):
            scores = logits_TE[rows]
            if scale is not None:
                standard, mean, inverse = _standardised(scores, ctx.epsilon)
                scores = scale * standard
            P, chosen = scores.softmax(dim=-1), map_TE[rows]
            grad = None if grad_TE is None else grad_TE[rows] * chosen
            if grad is not None and ctx.renormalize:
                selected = P * chosen
                total = selected.sum(dim=-1, keepdim=True)
                along = torch.linalg.vecdot(grad, selected).unsqueeze(1) / total
                grad = (grad - along * chosen) / total
            grad = _softmax_backward(P, grad, grad_E, grad_entropy)
            if scale is not None:
                grad_scale += torch.sum(grad * standard)
                norm = torch.ops.aten.native_layer_norm_backward
                shape, wanted = [logits_TE.size(1)], [True, False, False]
                grad = norm(grad * scale, logits_TE[rows], shape, mean, inverse, None, None, wanted)[0]
            result_TE[rows] = grad
        return result_TE, grad_scale, None, None, None, None


def _standardised(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with mean 0 and variance 1 over a token's experts; their mean and 1 / deviation."""
    return torch.native_layer_norm(logits, [logits.size(-1)], None, None, epsilon)


def blocks(tensor_TE: Tensor) -> list[slice]:
    """Tokens that a CPU works on while they are in its cache; all of them on a device."""
    tokens, experts = tensor_TE.shape
    return slices(tokens, BLOCK // experts if tensor_TE.device.type == "cpu" else tokens)


def slices(length: int, step: int) -> list[slice]:
    """Parts of a dimension, of `step` each."""
    step = max(1, step)
    return [slice(low, low + step) for low in range(0, length, step)]
