"""What stands between the projections of an expert's MLP, by the name that `model.expert_activation` has for it.

Stand-alone: an export carries this file as activations_dsmoe.py. Derivatives are written out for operators that
autograd does not look into; a test holds them to autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Derivative = Callable[[Tensor, Tensor], Tensor]  # of the gradient of the output, and the input


@dataclass(frozen=True)
class Activation:
    """`function(gate) * scale(up)`, or `function(x)` of one projection.

    Attributes:
        function, derivative: of the gate, or of the only projection.
        gated: whether there is a second projection ("up") that it multiplies.
        scale, scale_derivative: of the second projection; None: as it is.
    """

    function: Function
    derivative: Derivative
    gated: bool = True
    scale: Function | None = None
    scale_derivative: Derivative | None = None

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """[R, F] of one or two tensors [R, F], in their dtype."""
        if up is None:
            return self.function(gate)
        return self.function(gate) * (up if self.scale is None else self.scale(up))

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor | None = None) -> list[Tensor]:
        """Gradients of the inputs of `forward`."""
        if up is None:
            return [self.derivative(grad, gate)]
        grad_up = grad * self.function(gate)
        if self.scale is None or self.scale_derivative is None:
            return [self.derivative(grad * up, gate), grad_up]
        return [self.derivative(grad * self.scale(up), gate), self.scale_derivative(grad_up, up)]


def _gelu(approximate: str) -> tuple[Function, Derivative]:
    return (
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate=approximate),
    )


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.where(x > 0, grad, 0)


SILU = (F.silu, torch.ops.aten.silu_backward)
RELU = (F.relu, _relu_backward)
ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss


def _clamped_silu(x: Tensor) -> Tensor:
    x = x.clamp(max=LIMIT)
    return x * torch.sigmoid(ALPHA * x)


def _clamped_silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    clamped = x.clamp(max=LIMIT)
    s = torch.sigmoid(ALPHA * clamped)
    return torch.where(x <= LIMIT, grad * s * (1 + ALPHA * clamped * (1 - s)), 0)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(*SILU),
    "geglu": Activation(*_gelu("none")),
    "geglu_tanh": Activation(*_gelu("tanh")),
    "reglu": Activation(*RELU),
    # silu of slope 1.702 and both inputs clamped to 7, the second one plus 1: gpt-oss (vLLM and SGLang call it so)
    "swigluoai": Activation(
        _clamped_silu,
        _clamped_silu_backward,
        scale=lambda up: up.clamp(-LIMIT, LIMIT) + 1,
        scale_derivative=lambda grad, up: torch.where(up.abs() <= LIMIT, grad, 0),
    ),
    "silu": Activation(*SILU, gated=False),
    "gelu": Activation(*_gelu("none"), gated=False),
    "relu": Activation(*RELU, gated=False),
    # squared ReLU: Primer (arXiv 2109.08668)
    "relu2": Activation(lambda x: F.relu(x).square(), lambda grad, x: 2 * grad * F.relu(x), gated=False),
}
