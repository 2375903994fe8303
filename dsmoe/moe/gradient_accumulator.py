"""Weights' gradients when a layer works part by part: every part adds to one sum, in place.

Autograd would have each part write gradients of all weights and add them afterwards: for a few tokens and many experts
that takes longer than the experts, and the memory of the weights twice over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe.runtime.buffers import buffer_pool


class ChunkedGradAccumulator:
    """Of one forward pass of one layer. The part whose gradients come first makes the sums and is the one that returns
    them to autograd; autograd hands them on when the last part has added its own.
    """

    def __init__(self):
        self.sums: dict[int, Tensor] = {}  # by where the weight lies
        self._views: dict[int, Tensor] = {}

    def shared(self, *weights: Tensor) -> list[Tensor]:
        """The weights as the parts must use them. Nothing but parts adds to the gradients of these, so that no sum can
        be copied before it is complete."""
        fresh = [weight for weight in weights if weight.data_ptr() not in self._views]
        if fresh:
            views = _Shared.apply(self.sums, *fresh)
            self._views |= {weight.data_ptr(): view for weight, view in zip(fresh, views, strict=True)}
        return [self._views[weight.data_ptr()] for weight in weights]


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums: dict[int, Tensor], *weights: Tensor):
        ctx.sums = sums  # not what holds them, which holds these views: it would never be freed
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ctx.sums.clear()
        return None, *grads


def gradient_sum(weight: Tensor, sums: dict[int, Tensor] | None) -> tuple[Tensor, bool]:
    """Where a part's gradient of a weight goes, and whether it must be added to what lies there: another part's, which
    returns it for both."""
    if sums is not None and weight.data_ptr() in sums:
        return sums[weight.data_ptr()], True
    result = buffer_pool.gradient(weight)
    if sums is not None:
        sums[weight.data_ptr()] = result
    return result, False
