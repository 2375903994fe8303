"""SwiGLU experts over any number of rows per expert.

Shapes: e experts on this rank, R rows ordered by expert, H hidden, F expert width, r latent width.

Implementations (`model.experts_implementation`): "grouped_mm", one `torch.nn.functional.grouped_mm` for gate and up and
one for down; "loop", one expert after another, the plain reference; on a CPU also "native" and "blocked"
(`dsmoe.moe.cpu`). "auto" is grouped_mm on an accelerator, and on a CPU whichever is fastest there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe.errors import ConfigError
from dsmoe.moe import cpu
from dsmoe.moe.gradient_accumulator import ChunkedGradAccumulator
from dsmoe.moe.linear import grouped_linear, loop_linear
from dsmoe.native import unavailable
from dsmoe.optim.deepspeed import ExpertModule, is_partitioned, mark_expert_parameter
from dsmoe.runtime.device import on_gpu

ON_CPU = ("auto", "native", "blocked")


def _implementation(asked: str, config, rank: int) -> str:
    """What "auto" means here. Raises `ConfigError` for what was asked for and cannot be."""
    chosen = "grouped_mm" if asked == "auto" and on_gpu() else asked
    if asked == "native" and (reason := unavailable()):
        raise ConfigError(
            [f"model.experts_implementation: found native, but {reason}; expected auto, grouped_mm or loop"],
            "the configuration",
        )
    widths = {
        "model.hidden_size": config.hidden_size, "model.moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "router.rank": rank,
    }  # fmt: skip
    wrong = [
        f"{name}: found {width}, expected a multiple of 8 (grouped_mm wants rows of a multiple of 16 bytes, "
        f"in bf16 too), or model.experts_implementation=loop"
        for name, width in widths.items()
        if width % 8
    ]
    if chosen == "grouped_mm" and wrong:
        raise ConfigError(wrong, "the configuration")
    return chosen


class GroupedExperts(ExpertModule):
    """This rank's experts: `gate_up_proj` [e, 2F, H] (gate first) and `down_proj` [e, H, F], no biases.

    Constructor and forward follow Megatron-Core's contract for `MoESubmodules.experts`.

    Args:
        num_local_experts: e; expert-parallel rank r holds the experts r * e ... (r + 1) * e - 1.
        config: Megatron's TransformerConfig, for E, H and F.
        pg_collection: its `ep` is the expert-parallel group.
        implementation: "grouped_mm", "loop"; on a CPU also "native", which needs a compiler and widths in steps of 32
            bytes, and "blocked"; or "auto".
        fused: whether an accelerator computes SwiGLU, and products whose weights' gradients several parts of a pass
            add to, by Triton's kernels.

    Raises:
        ConfigError: widths that `grouped_mm` cannot take, or native where it cannot be built.
    """

    rank = 0  # of latents, in a subclass that has them

    def __init__(
        self, num_local_experts: int, config, submodules=None, pg_collection=None, implementation="auto", fused=False,
        **kwargs,
    ):  # fmt: skip
        super().__init__()
        self.num_experts = config.num_moe_experts
        self.num_local_experts = num_local_experts
        self.implementation = _implementation(implementation, config, self.rank)
        self.fused = fused
        self.linear = loop_linear if self.implementation == "loop" else grouped_linear
        self._create_weights(num_local_experts, config.hidden_size, config.moe_ffn_hidden_size)
        for parameter in self.parameters():
            mark_expert_parameter(parameter, pg_collection.ep, pg_collection.ep.rank() * num_local_experts)

    def _create_weights(self, experts: int, hidden: int, ffn: int) -> None:
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(
        self, rows_RH: Tensor, routes_per_expert_e: Tensor, probs_R: Tensor, sums: ChunkedGradAccumulator | None = None
    ) -> tuple[Tensor, None]:
        """Weighted expert outputs [R, H]. The weight enters before the down projection, where rows are F wide.

        `sums`: shared by the parts of a pass through these experts.
        """
        if self.implementation in ON_CPU:
            return self._on_cpu([(rows_RH, self.gate_up_proj)], routes_per_expert_e, probs_R, sums), None
        ends = routes_per_expert_e.cumsum(0).to(torch.int32)
        linear, (gate_up, down) = self._shared(sums, self.gate_up_proj, self.down_proj)
        gate, up = linear(rows_RH, gate_up, ends).chunk(2, dim=-1)
        return linear(self._inner(gate, up, probs_R), down, ends), None

    def _on_cpu(
        self,
        projections: Sequence[tuple[Tensor, Tensor]],
        counts_e: Tensor,
        probs_R: Tensor,
        sums: ChunkedGradAccumulator | None,
    ) -> Tensor:
        if is_partitioned(self.down_proj):  # ZeRO 3 gathers a parameter, and would keep its views
            sums = None
        counts = counts_e.tolist()  # on a CPU nothing waits
        return cpu.swiglu_experts(self.implementation, projections, self.down_proj, probs_R, counts, sums)

    def _shared(self, sums: ChunkedGradAccumulator | None, *weights: Tensor):
        """The product of a part of a pass, and its weights; gradients of all parts add up in place if `fused`."""
        if not self.fused or sums is None or is_partitioned(self.down_proj):
            return self.linear, weights
        from dsmoe.triton.grouped import grouped_linear as accumulating

        return partial(accumulating, sums=sums.sums), sums.shared(*weights)

    def _inner(self, gate_RF: Tensor, up_RF: Tensor, probs_R: Tensor) -> Tensor:
        """Weighted activations [R, F]."""
        if self.fused:
            from dsmoe.triton.swiglu import swiglu

            return swiglu(gate_RF, up_RF, probs_R)
        return F.silu(gate_RF) * up_RF * probs_R.unsqueeze(1).to(gate_RF.dtype)


class LowRankExperts(GroupedExperts):
    """Experts whose gate goes through the latent x A_i that their router scored them by.

        E_i(x) = [silu((x A_i) B_i) * (x W_up_i)] W_down_i        Autonomy-of-Experts (arXiv 2501.13074), Routing-Free
                                                                  MoE (2604.00801 Eq. 6)

    `gate_proj` [e, F, r] is B, `up_proj` [e, F, H], `down_proj` [e, H, F]; A belongs to the router.
    """

    def __init__(self, *args, rank: int, **kwargs):
        self.rank = rank
        super().__init__(*args, **kwargs)

    def _create_weights(self, experts: int, hidden: int, ffn: int) -> None:
        self.gate_proj = nn.Parameter(torch.empty(experts, ffn, self.rank))
        self.up_proj = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(
        self, rows_RH: Tensor, routes_per_expert_e: Tensor, probs_R: Tensor,
        sums: ChunkedGradAccumulator | None = None, latents_Rr: Tensor | None = None, reduce_erH: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Weighted expert outputs [R, H], from the latents of these rows or from the matrices A that give them."""
        ends = routes_per_expert_e.cumsum(0).to(torch.int32)
        if latents_Rr is None:
            latents_Rr = self.linear(rows_RH, reduce_erH, ends)
        if self.implementation in ON_CPU:
            projections = [(latents_Rr, self.gate_proj), (rows_RH, self.up_proj)]
            return self._on_cpu(projections, routes_per_expert_e, probs_R, sums), None
        linear, (gate_proj, up_proj, down) = self._shared(sums, self.gate_proj, self.up_proj, self.down_proj)
        inner = self._inner(linear(latents_Rr, gate_proj, ends), linear(rows_RH, up_proj, ends), probs_R)
        return linear(inner, down, ends), None
