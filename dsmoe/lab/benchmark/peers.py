"""Other people's MoE layers on the same weights, tokens and routes, as installed; each built the way its users do.

All of them: softmax over all experts in fp32, the k largest renormalised, SwiGLU without biases. A peer that cannot be
built or run becomes a row with its error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe.lab.benchmark.cases import World, router_options
from dsmoe.lab.benchmark.measure import Case


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
        value = dict.get(self, key)
        return value or ({} if default is None else default)

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
    from dsmoe.routers.topk import TopKRouter

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
    options = router_options(TopKRouter, problem)
    layer = MoELayer(
        config=config,
        submodules=MoESubmodules(router=partial(TopKRouter, options=options), experts=experts, shared_experts=None),
        pg_collection=groups.for_megatron(),
    )
    layer.to(world.device, problem.torch_dtype)
    layer.router.weight = world.gate_weight
    if grouped:
        fill_grouped(layer.experts, world.gate_up_proj.detach(), world.down_proj.detach())
    else:
        for index, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight = nn.Parameter(world.gate_up_proj.detach()[index])
            expert.linear_fc2.weight = nn.Parameter(world.down_proj.detach()[index])
    layer.train()

    def forward(hidden: Tensor) -> list[Tensor]:
        return [layer(hidden.transpose(0, 1))[0].transpose(0, 1)]

    hidden, grad = inputs
    return Case(name, "peer", forward, [hidden], [grad], list(layer.parameters()))


@torch.no_grad()
def fill_grouped(experts: Any, gate_up: Tensor, down: Tensor) -> None:
    """Put weights into Megatron's grouped experts: Transformer Engine's, one matrix an expert, or those of the
    grouped_gemm package, packed with inputs first."""
    if hasattr(experts, "weight1"):
        experts.weight1.view(len(gate_up), gate_up.size(2), -1).copy_(gate_up.mT)
        experts.weight2.view(len(down), down.size(2), -1).copy_(down.mT)
        return
    for index in range(len(gate_up)):
        getattr(experts.linear_fc1, f"weight{index}").copy_(gate_up[index])
        getattr(experts.linear_fc2, f"weight{index}").copy_(down[index])


def megablocks_case(world: World, name: str, inputs: tuple[Tensor, Tensor], implementation: str) -> Case:
    """MegaBlocks' dropless MoE with GLU experts, `implementation` sparse (its block-sparse kernels) or grouped. Without
    its balance loss, which it leaves in a global list."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    problem = world.problem
    bf16 = problem.torch_dtype == torch.bfloat16
    layer = dMoE(
        Arguments(
            hidden_size=problem.hidden, ffn_hidden_size=problem.ffn, moe_num_experts=problem.experts,
            moe_top_k=problem.k, moe_normalize_expert_weights=1, moe_loss_weight=0.0, mlp_type="glu",
            mlp_impl=implementation, activation_fn=F.silu, bias=False, return_bias=False, fp16=False, bf16=bf16,
            device=torch.device(world.device),
        )
    )  # fmt: skip
    mlp = layer.experts.mlp
    with torch.no_grad():
        layer.router.layer.weight.copy_(world.gate_weight)
        packed = megablocks_weights(world.gate_up_proj.detach(), world.down_proj.detach())
        for parameter, values in zip((mlp.w1, mlp.v1, mlp.w2), packed, strict=True):
            parameter.copy_(values.view_as(parameter))
    return _case(name, layer.train(), inputs)


def megablocks_weights(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w1, v1, w2, each [E * F, H]: an expert computes (silu(x w1^T) * x v1^T) w2."""
    gate, up = gate_up.chunk(2, dim=1)
    return gate.flatten(0, 1), up.flatten(0, 1), down.mT.flatten(0, 1)


class ScatterMoE(nn.Module):
    """A softmax top-k router before ScatterMoE's experts, which take gates and choices."""

    def __init__(self, experts: nn.Module, gate_weight: nn.Parameter, k: int):
        super().__init__()
        self.experts, self.gate_weight, self.k = experts, gate_weight, k

    def forward(self, hidden: Tensor) -> Tensor:
        logit_Tk, expert_Tk = F.linear(hidden.float(), self.gate_weight.float()).flatten(0, 1).topk(self.k, dim=-1)
        return self.experts(hidden, logit_Tk.softmax(dim=-1).to(hidden.dtype), expert_Tk)


def scattermoe_case(world: World, name: str, inputs: tuple[Tensor, Tensor]) -> Case:
    """ScatterMoE's GLU experts behind a softmax top-k router."""
    from scattermoe.mlp import GLUMLP

    problem = world.problem
    experts = GLUMLP(problem.hidden, problem.ffn, problem.experts, problem.k, activation=nn.SiLU())
    experts.to(world.device, problem.torch_dtype)
    with torch.no_grad():
        experts.experts.weight.copy_(scattermoe_weights(world.gate_up_proj.detach()))
        experts.output_experts.weight.copy_(world.down_proj)
    return _case(name, ScatterMoE(experts, world.gate_weight, problem.k).train(), inputs)


def scattermoe_weights(gate_up: Tensor) -> Tensor:
    """[E, 2F, H] with the gate, which its GLU takes from the second half, behind the up projection."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.cat((up, gate), dim=1)


def _case(name: str, layer: nn.Module, inputs: tuple[Tensor, Tensor]) -> Case:
    hidden, grad = inputs

    def forward(hidden: Tensor) -> list[Tensor]:
        output = layer(hidden)
        return [output[0] if isinstance(output, tuple) else output]

    return Case(name, "peer", forward, [hidden], [grad], list(layer.parameters()))


Build = Callable[[World, str, tuple[Tensor, Tensor]], Case]


def peers(ranks: int, device: str) -> dict[str, Build]:
    """Those that can run on so many expert-parallel ranks, by name."""
    builds: dict[str, Build] = {"DeepSpeed AutoEP": autoep_case, "DeepSpeed MoE": deepspeed_case}
    if ranks == 1:
        builds |= {
            "transformers eager": partial(transformers_case, implementation="eager"),
            "transformers grouped_mm": partial(transformers_case, implementation="grouped_mm"),
            "Megatron SequentialMLP": megatron_case,
        }
    if device != "cpu":
        builds["Megatron grouped"] = partial(megatron_case, grouped=True)
        if ranks == 1:
            builds |= {
                "MegaBlocks sparse": partial(megablocks_case, implementation="sparse"),
                "MegaBlocks grouped": partial(megablocks_case, implementation="grouped"),
                "ScatterMoE": scattermoe_case,
            }
    return builds
