"""A GPT built from Megatron-Core's specs, with dsmoe's MoE layer, experts and routers in their slots.

`LanguageModel` is what DeepSpeed's engine wraps: tokens and labels in, language-model loss and router losses out, or
logits where no labels are given. Everything CUDA-only in Megatron's default specs is replaced through the spec.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsmoe.config import ModelConfig
from dsmoe.model.attention import CausalAttention, RecomputedAttentionLayer
from dsmoe.model.initialize import check_initialization, initialize
from dsmoe.model.loss import OutputLayer
from dsmoe.model.native_norm import RMSNorm
from dsmoe.moe.dispatch import build_dispatcher
from dsmoe.moe.experts import GroupedExperts, LowRankExperts
from dsmoe.moe.layer import VariableMoELayer
from dsmoe.parallel.collectives import sum_over
from dsmoe.parallel.groups import ParallelGroups
from dsmoe.routers.base import Router, RouterOptions
from dsmoe.routers.recorder import RoutingRecorder
from dsmoe.runtime.accelerations import rms_norm_class
from dsmoe.triton import use_fused

EXCHANGE_DTYPES = {"model": None, "bf16": torch.bfloat16}


class LanguageModel(nn.Module):
    """The GPT, the recorder of its routing and the controller of its routers.

    Args:
        model: shapes; `vocab_size` must be set.
        router: class and options of the router of every MoE layer.
        groups: this rank's process groups.
        seed: of the initialisation, which depends on nothing else: not on ranks, EP or construction order.
    """

    def __init__(
        self, model: ModelConfig, router: tuple[type[Router], RouterOptions], groups: ParallelGroups, seed: int
    ):
        super().__init__()
        router_class, options = router
        self.config = model
        self.groups = groups
        self.gpt = build_gpt(model, router, groups)
        self.recorder = RoutingRecorder(model.num_experts, groups.dp)
        self.controller = router_class.make_controller(options, sum(model.moe_layers()), model.num_experts)
        self.revival: Any = None  # of idle experts, in a training that wants it
        for module in self.modules():
            if isinstance(module, Router):
                module.attach(self.recorder, self.controller)
        # Megatron's linears put `None` under `_extra_state`, which neither DeepSpeed nor safetensors can save.
        self._register_state_dict_hook(_drop_extra_state)
        check_initialization(self, model)
        initialize(self, seed, model)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ):
        """Losses with labels, logits without.

        Args:
            tokens, labels: int64 [B, S].
            loss_mask: [B, S], weight of each label in the loss; None counts all.
            padding_mask: bool [B, S], True where a token is padding: it gets no expert and counts nowhere.

        Returns:
            (loss to differentiate: fp32 scalar, this rank's part of the mean over all ranks; its parts by name
            without gradient: "lm" for the language model's loss, and the router's), or logits [B, S, V].
        """
        self.recorder.begin()
        weights = None if labels is None else self._label_weights(labels, loss_mask)
        output = self.gpt(tokens, None, None, labels=labels, loss_mask=weights, padding_mask=padding_mask)
        router_losses = self.recorder.finish()
        if labels is None:
            return output
        if self.controller is not None and self.training and torch.is_grad_enabled():
            self.controller.after_micro_batch(self.recorder.last_pass)
        parts = {"lm": output, **router_losses}
        return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

    def _label_weights(self, labels_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """fp32 [B, S]: a mean over the labels that count, of all ranks; one per rank would weight labels by padding."""
        if mask_BS is None:
            return torch.full(labels_BS.shape, 1 / labels_BS.numel(), device=labels_BS.device)
        mask_BS = mask_BS.float()
        everywhere = sum_over(self.groups.dp, mask_BS.sum())
        return mask_BS * (self.groups.dp_size / everywhere.clamp(min=1))


class _GPT(GPTModel):
    """GPTModel that hands labels to its output layer, which needs no tensor of all logits."""

    def _postprocess(self, hidden_states: Tensor, *args, labels: Tensor | None = None, loss_mask=None, **kwargs):
        """With labels the sum of `loss_mask` times each label's loss, fp32; else logits [B, S, V]."""
        if labels is None:
            return super()._postprocess(hidden_states, *args, labels=None, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, weight=weight, labels=labels, weights=loss_mask)


def build_gpt(model: ModelConfig, router, groups: ParallelGroups) -> GPTModel:
    config = transformer_config(model, groups.ep_size)
    gpt = _GPT(
        config,
        _block_spec(model, config, router, groups),
        vocab_size=model.vocab_size,
        max_sequence_length=model.sequence_length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="none",  # attention turns its queries and keys itself
        pg_collection=groups.for_megatron(),
    )
    gpt.output_layer.__class__ = OutputLayer  # GPTModel builds it itself; it differs in one method
    return gpt


def transformer_config(model: ModelConfig, expert_parallel: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.dense_ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.key_value_heads,
        kv_channels=model.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=bool(model.qk_layernorm),
        gated_linear_unit=True,  # of dense layers and shared experts
        activation_func=F.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_shared_expert_gate=model.moe_shared_expert_gate,
        moe_layer_freq=[int(is_moe) for is_moe in model.moe_layers()],
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",  # the one whose constructor runs without CUDA; it is replaced
        expert_model_parallel_size=expert_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,  # `initialize` draws every weight
    )


def _block_spec(
    model: ModelConfig, config: TransformerConfig, router, groups: ParallelGroups
) -> TransformerBlockSubmodules:
    moe, dense = (_layer_spec(model, config, router, groups, is_moe) for is_moe in (True, False))
    norm = moe.submodules.input_layernorm
    return TransformerBlockSubmodules(
        layer_specs=[moe if is_moe else dense for is_moe in model.moe_layers()], layer_norm=norm
    )


def _layer_spec(
    model: ModelConfig, config: TransformerConfig, router, groups: ParallelGroups, is_moe: bool
) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=bool(model.qk_layernorm), normalization="RMSNorm")
    layer = spec.submodules
    layer.self_attention.submodules.core_attention = ModuleSpec(CausalAttention, {"rotary_base": model.rotary_base})
    layer.input_layernorm = layer.pre_mlp_layernorm = _Norm
    if model.qk_layernorm:
        attention = layer.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = _Norm
        if model.qk_layernorm == "full":
            attention.q_layernorm = ModuleSpec(AllHeadsNorm, {"heads": model.num_attention_heads})
            attention.k_layernorm = ModuleSpec(AllHeadsNorm, {"heads": model.key_value_heads})
    if model.recompute == "full":
        spec.module = RecomputedAttentionLayer
    if is_moe:
        layer.mlp = _moe_spec(model, router, groups)
    return spec


def _moe_spec(model: ModelConfig, router, groups: ParallelGroups) -> ModuleSpec:
    router_class, options = router
    shared = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    fused = use_fused(model.fused_kernels)
    experts = ModuleSpec(
        module=GroupedExperts,
        params={
            "implementation": model.experts_implementation,
            "fused": fused,
            "activation": model.expert_activation,
            "bias": model.expert_bias,
        },
    )
    if rank := router_class.latent_rank(options):
        experts = ModuleSpec(module=LowRankExperts, params={**experts.params, "rank": rank})
    return ModuleSpec(
        module=VariableMoELayer,
        # Megatron passes its groups to a MoELayer only where the class is exactly its own, so they come along here.
        params={
            "pg_collection": groups.for_megatron(),
            "recompute": model.recompute != "none",
            "chunks": model.moe_chunks,
            "token_dispatcher": build_dispatcher(
                model.token_dispatcher,
                groups,
                model.num_experts,
                options.target_experts_per_token(model),
                EXCHANGE_DTYPES[model.moe_exchange_dtype],
                fused,
            ),
        },
        submodules=MoESubmodules(
            router=partial(_build_router, router_class, options, fused),
            experts=experts,
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
        ),
    )


def _build_router(router_class, options, fused: bool, *args, **kwargs):
    router = router_class(*args, options=options, **kwargs)
    router.fused = fused
    return router


class AllHeadsNorm(nn.Module):
    """Megatron's query or key norm slot: one RMSNorm over all heads of a token together, as OLMoE has it."""

    def __init__(self, config, hidden_size: int, heads: int, eps: float = 1e-5, **kwargs):
        super().__init__()
        self.norm = rms_norm_class(RMSNorm)(heads * hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, heads, d] -> the same shape."""
        return self.norm(x.flatten(2)).view_as(x)


class _Norm:
    """Megatron's norm slot: the fastest RMSNorm this machine has."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **kwargs):
        return rms_norm_class(RMSNorm)(hidden_size, eps=eps)


def _drop_extra_state(module, state: dict, prefix: str, metadata) -> None:
    for name in [name for name in state if name.endswith("_extra_state")]:
        del state[name]
