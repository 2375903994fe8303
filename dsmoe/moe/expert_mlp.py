"""What one routed expert computes, and with which tensors. Initialisation, weight decay, size, planner, export and the
ways to compute it ask here.

Shapes: e experts, R rows ordered by expert, H hidden, F expert width, K width of a source's rows, N of a projection's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.config import ModelConfig
from dsmoe.errors import ConfigError
from dsmoe.moe.activations import ACTIVATIONS, Activation

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [R, K], weight [e, N, K], int32 ends [e] -> [R, N]
Projections = Sequence[tuple[Tensor, Tensor]]  # rows [R, K] and weight [e, N, K] of each of `ExpertMLP.projections`


@dataclass(frozen=True)
class ExpertMLP:
    """down(activation(gate(x), up(x))), or down(activation(up(x))); its tensors have the names of transformers'.

    Attributes:
        hidden, ffn: H and F.
        activation: key of `dsmoe.moe.activations.ACTIVATIONS`.
        bias: whether every projection adds one.
        rank: of the latent, made by the router, that the gate takes in place of x; 0: the gate takes x.

    Raises:
        ConfigError: latents for an activation without a gate.
    """

    hidden: int
    ffn: int
    activation: str = "swiglu"
    bias: bool = False
    rank: int = 0

    def __post_init__(self):
        if self.rank and not self.function.gated:
            gated = ", ".join(name for name, function in ACTIVATIONS.items() if function.gated)
            raise ConfigError(
                [
                    f"model.expert_activation: found {self.activation}, expected one with a gate, which the latent of "
                    f"the router enters: {gated}"
                ]
            )

    @classmethod
    def of(cls, model: ModelConfig, rank: int = 0) -> ExpertMLP:
        return cls(model.hidden_size, model.moe_ffn_hidden_size, model.expert_activation, model.expert_bias, rank)

    @property
    def function(self) -> Activation:
        return ACTIVATIONS[self.activation]

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the projections before the activation, in the order of its arguments."""
        if self.rank:
            return {"gate_proj": (self.ffn, self.rank), "up_proj": (self.ffn, self.hidden)}
        if self.function.gated:
            return {"gate_up_proj": (2 * self.ffn, self.hidden)}
        return {"up_proj": (self.ffn, self.hidden)}

    @property
    def biases(self) -> tuple[str, ...]:
        """Of `projections`, then of the down projection; none without biases."""
        return tuple(f"{name}_bias" for name in (*self.projections, "down_proj")) if self.bias else ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of one expert."""
        matrices = {**self.projections, "down_proj": (self.hidden, self.ffn)}
        return {**matrices, **{bias: matrices[bias.removesuffix("_bias")][:1] for bias in self.biases}}

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def multiplications(self) -> int:
        """Of one row, by its matrices."""
        return sum(math.prod(shape) for shape in self.shapes.values() if len(shape) == 2)

    @property
    def activation_width(self) -> int:
        """Numbers of one row that enter the activation: 2F, or F without a gate."""
        return sum(rows for rows, _ in self.projections.values())

    @property
    def is_plain_swiglu(self) -> bool:
        """What kernels that fuse the projections compute, and what other libraries' experts are."""
        return self.activation == "swiglu" and not self.bias


def weighted_outputs(
    mlp: ExpertMLP, linear: Linear, projections: Projections, down_eHF: Tensor, probs_R: Tensor, ends_e: Tensor,
    biases: Sequence[Tensor] = (), activate: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Weighted expert outputs [R, H], all rows through one projection after another. The weight enters before the down
    projection, where rows are F wide.

    Args:
        ends_e: int32, where each expert's rows end.
        biases: [e, N] of `mlp.biases`.
        activate: the activation times each row's weight, (gate, up or None, probs) -> [R, F]; None: torch's operators.
    """
    h = [linear(rows, weight, ends_e) for rows, weight in projections]
    if biases:
        h = [rows + per_row(bias, ends_e, len(rows)) for rows, bias in zip(h, biases, strict=False)]
    gate, up = h if len(h) == 2 else h[0].chunk(2, dim=1) if mlp.function.gated else (h[0], None)
    if activate is None:
        inner_RF = mlp.function.forward(gate, up) * probs_R.unsqueeze(1).to(gate.dtype)
    else:
        inner_RF = activate(gate, up, probs_R)
    out_RH = linear(inner_RF, down_eHF, ends_e)
    if out_RH.requires_grad:
        out_RH.register_hook(Tensor.contiguous)  # grouped_mm refuses an expanded gradient, as that of a sum is
    if biases:
        weighted = probs_R.unsqueeze(1) * per_row(biases[-1], ends_e, len(out_RH))
        out_RH = out_RH + weighted.to(out_RH.dtype)
    return out_RH


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bias_eN: Tensor, ends_e: Tensor, rows: int) -> Tensor:
        counts_e = torch.diff(ends_e, prepend=ends_e.new_zeros(1)).long()
        expert_R = torch.repeat_interleave(counts_e, output_size=rows)
        ctx.save_for_backward(counts_e, expert_R)
        ctx.dtype = bias_eN.dtype
        return bias_eN.index_select(0, expert_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):
        counts_e, expert_R = ctx.saved_tensors
        grad_RN = grad_RN.float()
        if grad_RN.device.type == "cpu":  # where segment_reduce takes up to 15 times as long
            total_eN = grad_RN.new_zeros(len(counts_e), grad_RN.size(1)).index_add_(0, expert_R, grad_RN)
        else:  # where index_add adds in any order
            total_eN = torch.segment_reduce(grad_RN, "sum", lengths=counts_e, axis=0, unsafe=True, initial=0)
        return total_eN.to(ctx.dtype), None, None


def per_row(bias_eN: Tensor, ends_e: Tensor, rows: int) -> Tensor:
    """[R, N]: each row's expert's bias. Its gradient is summed in fp32 and in the order of rows on any device."""
    return _PerRow.apply(bias_eN, ends_e, rows)
