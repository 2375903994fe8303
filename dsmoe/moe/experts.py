"""Experts over any number of rows per expert: the MLP that `dsmoe.moe.expert_mlp` describes.

Shapes: e experts on this rank, R rows ordered by expert, H hidden, F expert width, r latent width.

Implementations (`model.experts_implementation`): "grouped_mm", one `torch.nn.functional.grouped_mm` for gate and up and
one for down; "loop", one expert after another, the plain reference; on a GPU also "transformer_engine", its grouped
GEMM; on a CPU also "native" and "blocked" (`dsmoe.moe.cpu`), which compute SwiGLU without biases only. "auto" is
grouped_mm on an accelerator, and on a CPU whichever is fastest there of those that compute the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dsmoe.errors import ConfigError
from dsmoe.moe import cpu
from dsmoe.moe.expert_mlp import ExpertMLP, weighted_outputs
from dsmoe.moe.gradient_accumulator import ChunkedGradAccumulator
from dsmoe.moe.linear import grouped_linear, loop_linear, transformer_engine_linear
from dsmoe.native import unavailable
from dsmoe.optim.deepspeed import ExpertModule, is_partitioned, mark_expert_parameter
from dsmoe.optim.groups import Role, with_role
from dsmoe.runtime.accelerations import find_acceleration
from dsmoe.runtime.device import gpu_capability, on_gpu

ON_CPU = ("auto", "native", "blocked")
SWIGLU_ONLY = ("native", "blocked")
LINEAR = {"loop": loop_linear, "transformer_engine": transformer_engine_linear}  # others: grouped_linear
FAST_GROUPED_MM = (9, 0)  # compute capability from which torch's grouped_mm is one kernel in bf16, not a call an expert


def _implementation(asked: str, mlp: ExpertMLP) -> str:
    """What "auto" means here. Raises `ConfigError` for what was asked for and cannot be."""
    chosen = "grouped_mm" if asked == "auto" and on_gpu() else asked
    wrong = []
    if asked in SWIGLU_ONLY and not mlp.is_plain_swiglu:
        other = f"model.expert_activation={mlp.activation}, model.expert_bias={str(mlp.bias).lower()}"
        wrong.append(
            f"model.experts_implementation: found {asked}, which computes swiglu without biases only; expected auto, "
            f"grouped_mm or loop for {other}"
        )
    elif asked == "native" and (reason := unavailable()):
        wrong.append(f"model.experts_implementation: found native, but {reason}; expected auto, grouped_mm or loop")
    elif asked == "transformer_engine" and not (found := find_acceleration("Transformer Engine")).active:
        wrong.append(
            f"model.experts_implementation: found transformer_engine, but Transformer Engine is "
            f"{found.reason.split(';')[0]}; expected auto, grouped_mm or loop"
        )
    widths = {"model.hidden_size": mlp.hidden, "model.moe_ffn_hidden_size": mlp.ffn, "router.rank": mlp.rank}
    if chosen == "grouped_mm":
        wrong += [
            f"{name}: found {width}, expected a multiple of 8 (grouped_mm wants rows of a multiple of 16 bytes, "
            f"in bf16 too), or model.experts_implementation=loop"
            for name, width in widths.items()
            if width % 8
        ]
    if wrong:
        raise ConfigError(wrong, "the configuration")
    return chosen


class GroupedExperts(ExpertModule):
    """This rank's experts; tensors [e, ...] as `ExpertMLP.shapes` names them: `gate_up_proj` [e, 2F, H] (gate first)
    and `down_proj` [e, H, F] for SwiGLU without biases.

    Constructor and forward follow Megatron-Core's contract for `MoESubmodules.experts`.

    Args:
        num_local_experts: e; expert-parallel rank r holds the experts r * e ... (r + 1) * e - 1.
        config: Megatron's TransformerConfig, for E, H and F.
        pg_collection: its `ep` is the expert-parallel group.
        implementation: "grouped_mm", "loop"; on a GPU also "transformer_engine"; on a CPU also "native", which needs
            a compiler and widths in steps of 32 bytes, and "blocked"; or "auto".
        fused: whether an accelerator computes SwiGLU by Triton's kernels, and of grouped_mm's products those whose
            weights' gradients several parts of a pass add to; before sm_90, for which torch's grouped_mm has no
            kernel, all. Other activations are torch's.
        activation, bias: of `ExpertMLP`.

    Raises:
        ConfigError: an MLP or widths that the implementation cannot compute, native where it cannot be built, or
            transformer_engine where that is not installed or there is no GPU.
    """

    rank = 0  # of latents, in a subclass that has them

    def __init__(
        self, num_local_experts: int, config, submodules=None, pg_collection=None, implementation="auto", fused=False,
        activation="swiglu", bias=False, **kwargs,
    ):  # fmt: skip
        super().__init__()
        self.num_experts = config.num_moe_experts
        self.num_local_experts = num_local_experts
        self.mlp = ExpertMLP(config.hidden_size, config.moe_ffn_hidden_size, activation, bias, self.rank)
        self.implementation = _implementation(implementation, self.mlp)
        self.fused = fused
        self.linear = LINEAR.get(self.implementation, grouped_linear)
        self.fused_products = fused and self.implementation not in LINEAR
        if self.fused_products and gpu_capability() < FAST_GROUPED_MM:
            from dsmoe.triton.grouped import grouped_linear as tiled_linear

            self.linear = tiled_linear
        for name, shape in self.mlp.shapes.items():
            is_bias = name in self.mlp.biases
            data = (torch.zeros if is_bias else torch.empty)(num_local_experts, *shape)
            parameter = with_role(nn.Parameter(data), Role.VECTOR if is_bias else Role.MATRIX)
            mark_expert_parameter(parameter, pg_collection.ep, pg_collection.ep.rank() * num_local_experts)
            self.register_parameter(name, parameter)

    def forward(
        self, rows_RH: Tensor, routes_per_expert_e: Tensor, probs_R: Tensor, sums: ChunkedGradAccumulator | None = None
    ) -> tuple[Tensor, None]:
        """Weighted expert outputs [R, H].

        `sums`: shared by the parts of a pass through these experts.
        """
        return self._outputs([rows_RH], routes_per_expert_e, probs_R, sums), None

    def _outputs(
        self, sources: list[Tensor], counts_e: Tensor, probs_R: Tensor, sums: ChunkedGradAccumulator | None,
        ends_e: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Of the rows that each of `mlp.projections` takes."""
        weights = [getattr(self, name) for name in self.mlp.projections]
        biases = [getattr(self, name) for name in self.mlp.biases]
        if is_partitioned(self.down_proj):  # ZeRO 3 gathers a parameter, and would keep its views
            sums = None
        if self.implementation in ON_CPU:
            projections = list(zip(sources, weights, strict=True))
            return cpu.weighted_outputs(
                self.implementation, self.mlp, projections, self.down_proj, probs_R, counts_e, biases, sums
            )
        linear, (*weights, down) = self._shared(sums, *weights, self.down_proj)
        projections = list(zip(sources, weights, strict=True))
        ends_e = _ends(counts_e) if ends_e is None else ends_e
        return weighted_outputs(self.mlp, linear, projections, down, probs_R, ends_e, biases, self._fused_activation())

    def _shared(self, sums: ChunkedGradAccumulator | None, *weights: Tensor):
        """The product of a part of a pass, and its weights; their gradients add up in place if products are fused."""
        if not self.fused_products or sums is None:
            return self.linear, weights
        from dsmoe.triton.grouped import grouped_linear as accumulating

        return partial(accumulating, sums=sums.sums), sums.shared(*weights)

    def _fused_activation(self) -> Callable[..., Tensor] | None:
        if not self.fused or self.mlp.activation != "swiglu":
            return None
        from dsmoe.triton.swiglu import swiglu

        return swiglu


class LowRankExperts(GroupedExperts):
    """Experts whose gate goes through the latent x A_i that their router scored them by.

        E_i(x) = [silu((x A_i) B_i) * (x W_up_i)] W_down_i        Autonomy-of-Experts (arXiv 2501.13074), Routing-Free
                                                                  MoE (2604.00801 Eq. 6)

    `gate_proj` [e, F, r] is B, `up_proj` [e, F, H], `down_proj` [e, H, F]; A belongs to the router.
    """

    def __init__(self, *args, rank: int, **kwargs):
        self.rank = rank
        super().__init__(*args, **kwargs)

    def forward(
        self, rows_RH: Tensor, routes_per_expert_e: Tensor, probs_R: Tensor,
        sums: ChunkedGradAccumulator | None = None, latents_Rr: Tensor | None = None, reduce_erH: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Weighted expert outputs [R, H], from the latents of these rows or from the matrices A that give them."""
        ends_e = None
        if latents_Rr is None:
            ends_e = _ends(routes_per_expert_e)
            latents_Rr = self.linear(rows_RH, reduce_erH, ends_e)
        return self._outputs([latents_Rr, rows_RH], routes_per_expert_e, probs_R, sums, ends_e), None


def _ends(counts_e: Tensor) -> Tensor:
    return counts_e.cumsum(0).to(torch.int32)
