"""A dsmoe language model in transformers: a LLaMA-like decoder whose MoE layers give every token 0..E experts.

Stand-alone: this file travels with the weights and imports torch, transformers and the two files beside it. How tokens
are routed is in routing_dsmoe.py. Written for and tested with transformers 5.23.

Shapes: B sequences, S tokens of each in this call, T = B * S, H hidden, E experts, F width of an expert, r latent
width, N routes. A route is a (token, expert) pair that is active, with a weight; routes are ordered by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dsmoe import DsmoeConfig
from .routing_dsmoe import build_routing


def rotary_angles(positions_BS: Tensor, config: DsmoeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, head_dim] of the rotary embedding, both halves of a head alike."""
    steps = torch.arange(0, config.head_dim, 2, device=positions_BS.device).float() / config.head_dim
    angles = positions_BS[:, None, :, None].float() / config.rope_parameters["rope_theta"] ** steps
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x [B, heads, S, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs
) -> tuple[Tensor, Tensor]:
    """The implementation "eager": output [B, S, heads, head_dim] and the attention weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class DsmoeAttention(nn.Module):
    """Causal self-attention with grouped queries, and RMSNorm of queries and keys where the model has it."""

    def __init__(self, config: DsmoeConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        heads, groups = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        full = config.qk_norm == "full"
        self.q_width, self.k_width = (heads, groups) if full else (self.head_dim, self.head_dim)
        self.q_norm = nn.RMSNorm(self.q_width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.k_width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_BSH: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_BSH.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_BSH).unflatten(-1, (-1, self.q_width))).view(shape).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_BSH).unflatten(-1, (-1, self.k_width))).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_BSH).view(shape).transpose(1, 2)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        scaling = self.head_dim**-0.5
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class DsmoeMLP(nn.Module):
    """SwiGLU: of a dense layer, or of the expert that all tokens share."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BSH: Tensor, real_BS: Tensor | None = None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BSH)) * self.up_proj(hidden_BSH))


def loop_linear(rows_NK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its transposed weight, one expert after another: the reference."""
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    blocks = zip(rows_NK.split(counts), weight_EMK.unbind(0), strict=True)
    return torch.cat([F.linear(rows, weight) for rows, weight in blocks])


def grouped_linear(rows_NK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """The same in one grouped GEMM."""
    return F.grouped_mm(rows_NK, weight_EMK.transpose(-2, -1), offs=ends_E)


def can_group(weight_EMK: Tensor) -> bool:
    """Whether `grouped_mm` exists and takes these: it wants rows of a multiple of 16 bytes."""
    aligned = all(size * weight_EMK.element_size() % 16 == 0 for size in weight_EMK.shape[1:])
    return hasattr(F, "grouped_mm") and aligned


class DsmoeRoutedExperts(nn.Module):
    """SwiGLU experts over a flat list of routes: any number of experts for each token, no padding, none dropped.

    `gate_up_proj` [E, 2F, H] (gate first) and `down_proj` [E, H, F]. Experts that score themselves have `gate_proj`
    [E, F, r], which continues from the latent that scored them, and `up_proj` [E, F, H].
    """

    def __init__(self, config: DsmoeConfig):
        super().__init__()
        experts, hidden, ffn, rank = (
            config.num_experts, config.hidden_size, config.moe_intermediate_size, config.expert_rank,
        )  # fmt: skip
        self.backend, self.low_rank = config.experts_backend, bool(rank)
        if rank:
            self.gate_proj = nn.Parameter(torch.empty(experts, ffn, rank))
            self.up_proj = nn.Parameter(torch.empty(experts, ffn, hidden))
        else:
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(self, hidden_TH: Tensor, probs_TE: Tensor, map_TE: Tensor, latents_TEr: Tensor | None) -> Tensor:
        """The experts' weighted outputs summed for each token [T, H]; exactly 0 for a token without an expert."""
        expert_N, token_N = map_TE.t().nonzero(as_tuple=True)
        if token_N.numel() == 0:
            return torch.zeros_like(hidden_TH)
        ends_E = map_TE.sum(0).cumsum(0).to(torch.int32)
        rows_NH = hidden_TH.index_select(0, token_N)
        if self.low_rank:
            gate = self._linear(latents_TEr[token_N, expert_N], self.gate_proj, ends_E)
            up = self._linear(rows_NH, self.up_proj, ends_E)
        else:
            gate, up = self._linear(rows_NH, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        weight_N = probs_TE[token_N, expert_N].to(gate.dtype)
        out_NH = self._linear(F.silu(gate) * up * weight_N.unsqueeze(1), self.down_proj, ends_E)
        return torch.zeros_like(hidden_TH).index_add(0, token_N, out_NH)

    def _linear(self, rows_NK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
        grouped = can_group(weight_EMK) if self.backend == "auto" else self.backend == "grouped_mm"
        return (grouped_linear if grouped else loop_linear)(rows_NK, weight_EMK, ends_E)


class DsmoeSparseMLP(nn.Module):
    """Routing, routed experts, and the shared expert where there is one."""

    def __init__(self, config: DsmoeConfig):
        super().__init__()
        self.routing = build_routing(config)
        # Not "experts": vLLM replaces modules of that name by a kernel for a fixed number of experts per token.
        self.routed_experts = DsmoeRoutedExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = DsmoeMLP(config.hidden_size, shared) if shared else None

    def forward(self, hidden_BSH: Tensor, real_BS: Tensor | None = None) -> Tensor:
        """real_BS: bool, False where a token is padding: it gets no expert."""
        hidden_TH = hidden_BSH.flatten(0, 1)
        probs_TE, map_TE, latents_TEr = self.routing(hidden_TH)
        if real_BS is not None:
            map_TE = map_TE & real_BS.reshape(-1, 1)
        out = self.routed_experts(hidden_TH, probs_TE, map_TE, latents_TEr).view_as(hidden_BSH)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_BSH)


class DsmoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DsmoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DsmoeAttention(config, layer_idx)
        sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = DsmoeSparseMLP(config) if sparse else DsmoeMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_BSH: Tensor, real_BS: Tensor | None = None, **kwargs) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_BSH), **kwargs)
        hidden_BSH = hidden_BSH + attended
        return hidden_BSH + self.mlp(self.post_attention_layernorm(hidden_BSH), real_BS)


class DsmoePreTrainedModel(PreTrainedModel):
    config_class = DsmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DsmoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["routing"]  # of a model loaded in bf16 too
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DsmoeDecoderLayer, "attentions": DsmoeAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DsmoeSparseMLP):
            for parameter in (*module.routing.parameters(), *module.routed_experts.parameters()):
                if parameter.dim() > 1:  # vectors keep what their module gave them
                    initialization.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DsmoeModel(DsmoePreTrainedModel):
    """The decoder without the output layer."""

    def __init__(self, config: DsmoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DsmoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, H] of `input_ids` or `inputs_embeds`; transformers' usual arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = inputs_embeds.size(1)
        # A mask of one row per sequence says which tokens are padding, those of the cache included.
        rows = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        real_BS = None if rows is None else rows[:, -length:].bool()
        if position_ids is None and rows is not None:
            position_ids = (rows.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        angles = rotary_angles(position_ids, self.config, inputs_embeds.dtype)
        hidden_BSH = inputs_embeds
        for layer in self.layers:
            hidden_BSH = layer(
                hidden_BSH, real_BS, position_embeddings=angles, attention_mask=mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BSH), past_key_values=past_key_values)


class DsmoeForCausalLM(DsmoePreTrainedModel, GenerationMixin):
    """The language model. With `labels` it gives the next-token loss alone: router losses belong to dsmoe's trainer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DsmoeConfig):
        super().__init__(config)
        self.model = DsmoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], of the last `logits_to_keep` tokens where that is given, and the loss of `labels` [B, S]
        (the tokens themselves; -100 where one does not count)."""
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states,
            attentions=output.attentions,
        )  # fmt: skip


__all__ = ["DsmoeForCausalLM", "DsmoeModel", "DsmoePreTrainedModel"]
