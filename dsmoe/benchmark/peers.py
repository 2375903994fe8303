"""Other people's MoE layers on the same weights, tokens and routes, as installed; each built the way its users do.

All of them: softmax over all experts in fp32, the k largest renormalised, SwiGLU without biases. A peer that cannot be
built or run becomes a row with its error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe.benchmark.cases import World, router_options
from dsmoe.benchmark.measure import Case


def transformers_case(world: World, name: str, inputs: tuple[Tensor, Tensor], implementation: str) -> Case:
    """transformers' OLMoE block; `implementation` as users set `experts_implementation`."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    problem = world.problem
    config = OlmoeConfig(
        hidden_size=problem.hidden, intermediate_size=problem.ffn, num_experts=problem.experts,
        num_experts_per_tok=problem.k, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = OlmoeSparseMoeBlock(config)
    block.gate.weight = world.gate_weight
    block.experts.gate_up_proj, block.experts.down_proj = world.gate_up_proj, world.down_proj
    return _case(name, block.train(), inputs)


class SwiGLU(nn.Module):
    """An expert for DeepSpeed's MoE layer."""

    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = self.gate_up(rows).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def deepspeed_case(world: World, name: str, inputs: tuple[Tensor, Tensor]) -> Case:
    """`deepspeed.moe.layer.MoE` without dropping, which pads every expert to the fullest one. With its balance loss."""
    from deepspeed.moe.layer import MoE

    problem, ep = world.problem, world.groups.ep_size
    with torch.device("meta"):
        layer = MoE(
            problem.hidden, SwiGLU(problem.hidden, problem.ffn), problem.experts, ep, problem.k, min_capacity=0,
            drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
    layer.deepspeed_moe.gate.wg.weight = world.gate_weight
    parameters = [world.gate_weight]
    for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        # Leaves of its own that lie where the shared weights are.
        expert.gate_up.weight = nn.Parameter(world.gate_up_proj.detach()[index])
        expert.down.weight = nn.Parameter(world.down_proj.detach()[index])
        parameters += [expert.gate_up.weight, expert.down.weight]
    layer.set_deepspeed_parallelism()
    layer.train()

    def forward(hidden: Tensor) -> list[Tensor]:
        output, balance, _ = layer(hidden)
        return [output, 0.01 * balance]

    hidden, grad = inputs
    return Case(name, "peer", forward, [hidden], [grad], parameters)


def autoep_case(world: World, name: str, inputs: tuple[Tensor, Tensor]) -> Case:
    """DeepSpeed AutoEP's layer, put by AutoEP itself into a Qwen3-MoE of one layer."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    problem, groups = world.problem, world.groups
    accept_registry_default()
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=problem.hidden, intermediate_size=problem.ffn, moe_intermediate_size=problem.ffn,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, num_experts=problem.experts,
        num_experts_per_tok=problem.k, norm_topk_prob=True,
    )  # fmt: skip
    with skipped_initialization():
        model = Qwen3MoeForCausalLM(config).to(problem.torch_dtype)
    auto = AutoEP(model, AutoEPConfig(enabled=True, autoep_size=groups.ep_size, preset_model="qwen3_moe"))
    auto.replace_moe_layers(auto.ep_parser(), ep_size=groups.ep_size, ep_rank=groups.ep_rank)
    layer = model.model.layers[0].mlp.to(world.device)
    layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.router.gate.weight.copy_(world.gate_weight)
        gate, up = world.gate_up_proj.split(problem.ffn, dim=1)
        for to, weight in ((layer.experts.w1, gate), (layer.experts.w3, up), (layer.experts.w2, world.down_proj)):
            to.copy_(weight)
    return _case(name, layer.train(), inputs)


def accept_registry_default() -> None:
    """transformers 5.23's registry of recorded outputs has a `get` of one argument; AutoEP calls it as a dict's."""
    from transformers.utils import output_capturing

    def get(self, model, default=None):
        key = model if isinstance(model, str) else str(model.__class__)
        found = dict.get(self, key)
        return found or ({} if default is None else default)

    output_capturing._CanRecordRegistry.get = get


def skipped_initialization():
    """Within it transformers allocates weights without drawing them."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


def megatron_case(world: World, name: str, inputs: tuple[Tensor, Tensor], grouped: bool = False) -> Case:
    """Megatron-Core's own MoELayer, unfused permute: SequentialMLP or, on a GPU, its grouped experts.

    Its router needs CUDA and Transformer Engine, so dsmoe's top-k stands in its slot, as plugins may.
    """
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from dsmoe.config import ModelConfig
    from dsmoe.model.gpt import transformer_config
    from dsmoe.routers.topk import TopKOptions, TopKRouter

    problem, groups = world.problem, world.groups
    model = ModelConfig(
        num_layers=1, hidden_size=problem.hidden, num_experts=problem.experts, moe_ffn_hidden_size=problem.ffn,
        num_attention_heads=1,
    )  # fmt: skip
    config = transformer_config(model, groups.ep_size)
    config.params_dtype = problem.torch_dtype
    if grouped:
        config.moe_token_dispatcher_type = "alltoall"
        experts = get_moe_module_spec(True, problem.experts, moe_grouped_gemm=True).submodules.experts
    else:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    options = TopKOptions(**router_options("topk", problem))
    layer = MoELayer(
        config=config,
        submodules=MoESubmodules(router=partial(TopKRouter, options=options), experts=experts, shared_experts=None),
        pg_collection=groups.for_megatron(),
    )
    layer.to(world.device, problem.torch_dtype)
    layer.router.weight = world.gate_weight
    if not grouped:
        for index, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight = nn.Parameter(world.gate_up_proj.detach()[index])
            expert.linear_fc2.weight = nn.Parameter(world.down_proj.detach()[index])
    layer.train()

    def forward(hidden: Tensor) -> list[Tensor]:
        return [layer(hidden.transpose(0, 1))[0].transpose(0, 1)]

    hidden, grad = inputs
    return Case(name, "peer", forward, [hidden], [grad], list(layer.parameters()))


def _case(name: str, layer: nn.Module, inputs: tuple[Tensor, Tensor]) -> Case:
    hidden, grad = inputs

    def forward(hidden: Tensor) -> list[Tensor]:
        output = layer(hidden)
        return [output[0] if isinstance(output, tuple) else output]

    return Case(name, "peer", forward, [hidden], [grad], list(layer.parameters()))


Build = Callable[[World, str, tuple[Tensor, Tensor]], Case]


def peers(ranks: int, device: str) -> dict[str, Build]:
    """Those that can run on so many expert-parallel ranks, by name."""
    found: dict[str, Build] = {"DeepSpeed AutoEP": autoep_case, "DeepSpeed MoE": deepspeed_case}
    if ranks == 1:
        found |= {
            "transformers eager": partial(transformers_case, implementation="eager"),
            "transformers grouped_mm": partial(transformers_case, implementation="grouped_mm"),
            "Megatron SequentialMLP": megatron_case,
        }
    if device != "cpu":
        found["Megatron grouped"] = partial(megatron_case, grouped=True)
    return found
