"""A dsmoe language model in transformers: a LLaMA-like decoder whose MoE layers give every token 0..E experts.

Stand-alone: this file travels with the weights and imports torch, transformers and the files beside it. How tokens are
routed is in routing_dsmoe.py. Written for and tested with transformers 5.23.

Shapes: B sequences, S tokens of each in this call, T = B * S, H hidden, E experts, F width of an expert, r latent
width, N routes. A route is a (token, expert) pair that is active, with a weight; routes are ordered by expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .activations_dsmoe import ACTIVATIONS
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
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=config.qkv_bias)
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
        out = out.reshape(*hidden_BSH.shape[:2], -1)  # vLLM's attention gives rows without a batch
        return self.o_proj(out), weights


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


def weighted_outputs(
    hidden_TH: Tensor,
    probs_TE: Tensor,
    map_TE: Tensor,
    latents_TEr: Tensor | None,
    weights: list[Tensor],
    activation: str,
    grouped: bool,
) -> Tensor:
    """The experts' weighted outputs summed for each token [T, H]; exactly 0 for a token without an expert.

    Args:
        weights: gate_up_proj [E, 2F, H] (up_proj [E, F, H] without a gate) and down_proj [E, H, F]; with latents
            gate_proj [E, F, r], up_proj [E, F, H] and down_proj; then the bias [E, N] of each, if they have any.
        activation: key of `ACTIVATIONS`.
        grouped: one grouped GEMM rather than one expert after another.
    """
    linear = grouped_linear if grouped else loop_linear
    expert_N, token_N = map_TE.t().nonzero(as_tuple=True)
    if token_N.numel() == 0:
        return torch.zeros_like(hidden_TH)
    ends_E = map_TE.sum(0).cumsum(0).to(torch.int32)
    sources = [hidden_TH.index_select(0, token_N)]
    if latents_TEr is not None:
        sources.insert(0, latents_TEr[token_N, expert_N])
    *projections, down = weights[: len(sources) + 1]
    biases = [bias_EN[expert_N] for bias_EN in weights[len(sources) + 1 :]]
    h = [linear(rows, weight, ends_E) for rows, weight in zip(sources, projections, strict=True)]
    if biases:
        h = [x + bias for x, bias in zip(h, biases, strict=False)]
    function = ACTIVATIONS[activation]
    inputs = h[0].chunk(2, dim=-1) if function.gated and len(h) == 1 else h
    weight_N1 = probs_TE[token_N, expert_N].unsqueeze(1)
    out_NH = linear(function.forward(*inputs) * weight_N1.to(h[0].dtype), down, ends_E)
    if biases:
        out_NH = out_NH + (weight_N1 * biases[-1]).to(out_NH.dtype)
    return torch.zeros_like(hidden_TH).index_add(0, token_N, out_NH)


def weighted_outputs_backward(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    probs_TE: Tensor,
    map_TE: Tensor,
    latents_TEr: Tensor | None,
    weights: list[Tensor],
    activation: str,
) -> list[Tensor]:
    """Gradients of `weighted_outputs`, one expert after another: of hidden_TH, probs_TE, latents_TEr where there are
    any, and the weights. Written out, since autograd does not look inside an operator."""
    inputs = [hidden_TH, probs_TE, *([] if latents_TEr is None else [latents_TEr]), *weights]
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    grad_hidden, grad_probs, *grad_latents = grads[: -len(weights)]
    count, function = 2 if latents_TEr is None else 3, ACTIVATIONS[activation]
    *projections, down = weights[:count]
    *grad_projections, grad_down = grads[-len(weights) :][:count]
    biases, grad_biases = weights[count:], grads[-len(weights) :][count:]
    for expert in map_TE.any(0).nonzero().flatten().tolist():
        token = map_TE[:, expert].nonzero().flatten()
        sources = [hidden_TH[token]] if latents_TEr is None else [latents_TEr[token, expert], hidden_TH[token]]
        *own, own_down = [bias[expert] for bias in biases] or [None] * count
        h = [F.linear(x, w[expert], b) for x, w, b in zip(sources, projections, own, strict=True)]
        parts = list(h[0].chunk(2, dim=1)) if function.gated and len(h) == 1 else h
        weight, grad_out = probs_TE[token, expert].to(h[0].dtype).unsqueeze(1), grad_TH[token]
        inner = function.forward(*parts)
        grad_scaled = grad_out @ down[expert]
        grad_down[expert] = grad_out.t() @ (inner * weight)
        grad_weight = (grad_scaled.float() * inner.float()).sum(1)
        if biases:
            grad_weight = grad_weight + grad_out.float() @ own_down.float()
        grad_probs[token, expert] = grad_weight.to(grad_probs.dtype)
        grad_h = function.backward(grad_scaled * weight, *parts)
        if len(h) == 1:
            grad_h = [torch.cat(grad_h, dim=1)]
        if latents_TEr is not None:
            grad_latents[0][token, expert] = grad_h[0] @ projections[0][expert]
        grad_hidden[token] += grad_h[-1] @ projections[-1][expert]
        for grad, source, to in zip(grad_h, sources, grad_projections, strict=True):
            to[expert] = grad.t() @ source
        for grad, to in zip([*grad_h, grad_out * weight], grad_biases, strict=False):
            to[expert] = grad.sum(0)
    return grads


# How many routes there are depends on the data, which torch.compile and torch.export cannot follow without breaking
# the graph. To them the experts are one operator, [T, H] to [T, H], that makes its forward pass again in its backward.
if not hasattr(torch.ops.dsmoe, "expert_outputs"):  # another export in this process may have brought it

    @torch.library.custom_op("dsmoe::expert_outputs", mutates_args=())
    def _expert_outputs(
        hidden_TH: Tensor, probs_TE: Tensor, map_TE: Tensor, latents_TEr: Tensor | None, weights: list[Tensor],
        activation: str, grouped: bool,
    ) -> Tensor:  # fmt: skip
        return weighted_outputs(hidden_TH, probs_TE, map_TE, latents_TEr, weights, activation, grouped)

    @_expert_outputs.register_fake
    def _(hidden_TH, probs_TE, map_TE, latents_TEr, weights, activation, grouped):
        return torch.empty_like(hidden_TH)

    @torch.library.custom_op("dsmoe::expert_outputs_backward", mutates_args=())
    def _expert_outputs_backward(
        grad_TH: Tensor, hidden_TH: Tensor, probs_TE: Tensor, map_TE: Tensor, latents_TEr: Tensor | None,
        weights: list[Tensor], activation: str,
    ) -> list[Tensor]:  # fmt: skip
        return weighted_outputs_backward(grad_TH, hidden_TH, probs_TE, map_TE, latents_TEr, weights, activation)

    @_expert_outputs_backward.register_fake
    def _(grad_TH, hidden_TH, probs_TE, map_TE, latents_TEr, weights, activation):
        inputs = [hidden_TH, probs_TE, *([] if latents_TEr is None else [latents_TEr]), *weights]
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]

    def _keep_for_backward(ctx, inputs, output):
        *tensors, weights, ctx.activation, _ = inputs
        ctx.has_latents = tensors[3] is not None
        ctx.save_for_backward(*(x for x in tensors if x is not None), *weights)

    def _backward(ctx, grad_TH):
        hidden_TH, probs_TE, map_TE, *others = ctx.saved_tensors
        latents_TEr = others.pop(0) if ctx.has_latents else None
        grads = torch.ops.dsmoe.expert_outputs_backward(
            grad_TH, hidden_TH, probs_TE, map_TE, latents_TEr, others, ctx.activation
        )
        latents_grad = grads.pop(2) if ctx.has_latents else None
        return grads[0], grads[1], None, latents_grad, grads[2:], None, None

    _expert_outputs.register_autograd(_backward, setup_context=_keep_for_backward)


class DsmoeRoutedExperts(nn.Module):
    """Experts over a flat list of routes: any number of experts for each token, no padding, none dropped.

    `gate_up_proj` [E, 2F, H] (gate first), or `up_proj` [E, F, H] where the activation has no gate, and `down_proj`
    [E, H, F]. Experts that score themselves have `gate_proj` [E, F, r], which continues from the latent that scored
    them, and `up_proj` [E, F, H]. With biases each has one, `gate_up_proj_bias` [E, 2F] and so on.
    """

    def __init__(self, config: DsmoeConfig):
        super().__init__()
        experts, hidden, ffn, rank = (
            config.num_experts, config.hidden_size, config.moe_intermediate_size, config.expert_rank,
        )  # fmt: skip
        self.backend, self.low_rank, self.activation = config.experts_backend, bool(rank), config.expert_activation
        shapes = {"up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
        if rank:
            shapes = {"gate_proj": (ffn, rank), **shapes}
        elif ACTIVATIONS[self.activation].gated:
            shapes = {"gate_up_proj": (2 * ffn, hidden), "down_proj": (hidden, ffn)}
        if config.expert_bias:
            shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items()}
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(experts, *shape)))

    def forward(self, hidden_TH: Tensor, probs_TE: Tensor, map_TE: Tensor, latents_TEr: Tensor | None) -> Tensor:
        """As `weighted_outputs`."""
        weights = [getattr(self, name) for name in self.names]
        matrices = [weight for weight in weights if weight.dim() == 3]
        grouped = all(map(can_group, matrices)) if self.backend == "auto" else self.backend == "grouped_mm"
        run = torch.ops.dsmoe.expert_outputs if torch.compiler.is_compiling() else weighted_outputs
        latents_TEr = latents_TEr if self.low_rank else None
        return run(hidden_TH, probs_TE, map_TE, latents_TEr, weights, self.activation, grouped)


@use_experts_implementation
class DsmoeExperts(nn.Module):
    """The experts of a router with a fixed k, by the contract of transformers' and vLLM's own MoE models: packed
    `gate_up_proj` [E, 2F, H] (gate first) and `down_proj` [E, H, F], and for every token k experts with weights.

    `experts_implementation` chooses how transformers computes it, and vLLM puts its fused kernel in its place.
    """

    def __init__(self, config: DsmoeConfig):
        super().__init__()
        self.num_experts, self.hidden_dim = config.num_experts, config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k], top_k_weights fp32 [T, k] -> [T, H]; the implementation
        "eager"."""
        shape = (len(hidden_states), self.num_experts)
        probs_TE = top_k_weights.new_zeros(shape).scatter(1, top_k_index, top_k_weights)
        map_TE = torch.zeros(shape, dtype=torch.bool, device=probs_TE.device).scatter(1, top_k_index, True)
        weights = [self.gate_up_proj, self.down_proj]
        run = torch.ops.dsmoe.expert_outputs if torch.compiler.is_compiling() else weighted_outputs
        return run(hidden_states, probs_TE, map_TE, None, weights, "swiglu", False)


class DsmoeSparseMLP(nn.Module):
    """Routing, routed experts, and the shared expert where there is one."""

    def __init__(self, config: DsmoeConfig):
        super().__init__()
        self.routing = build_routing(config)
        for name, module in self.routing.named_modules():
            module.path_in_routing = name  # by which `_init_weights` knows it
        self.top_k = config.num_experts_per_tok
        if self.top_k:
            self.experts = DsmoeExperts(config)
        else:  # not "experts": vLLM replaces modules of that name by a kernel for a fixed number of experts per token
            self.routed_experts = DsmoeRoutedExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = DsmoeMLP(config.hidden_size, shared) if shared else None
        gated = shared and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    def forward(self, hidden_BSH: Tensor, real_BS: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The output [B, S, H], the router's scores fp32 [T, E], and their balance as `router_balance` gives it.

        real_BS: bool, False where a token is padding: it gets no expert.
        """
        hidden_TH = hidden_BSH.flatten(0, 1)
        probs_TE, map_TE, latents_TEr, *scores = self.routing(hidden_TH)
        scores_TE = scores[0] if scores else probs_TE  # a file of another package may give none
        if real_BS is not None:
            real_T1 = real_BS.reshape(-1, 1)
            map_TE, probs_TE = map_TE & real_T1, probs_TE * real_T1
        if self.top_k:
            weight_Tk, expert_Tk = probs_TE.topk(self.top_k, dim=-1)
            out = self.experts(hidden_TH, expert_Tk, weight_Tk)
        else:
            out = self.routed_experts(hidden_TH, probs_TE, map_TE, latents_TEr)
        out = out.view_as(hidden_BSH)
        if self.shared_experts is not None:
            shared_BSH = self.shared_experts(hidden_BSH)
            if self.shared_expert_gate is not None:
                shared_BSH = shared_BSH * self.shared_expert_gate(hidden_BSH).sigmoid()
            out = out + shared_BSH
        return out, scores_TE, router_balance(scores_TE, map_TE, real_BS)


def router_balance(scores_TE: Tensor, map_TE: Tensor, real_BS: Tensor | None) -> Tensor:
    """fp32 [3, E]: routes to each expert, the softmax of the scores summed over tokens, and the number of tokens."""
    mass_TE = scores_TE.float().softmax(dim=-1)
    if real_BS is None:
        tokens = mass_TE.new_full((), len(mass_TE))
    else:
        mass_TE, tokens = mass_TE * real_BS.reshape(-1, 1), real_BS.sum().to(mass_TE.dtype)
    return torch.stack((map_TE.sum(0).to(mass_TE.dtype), mass_TE.sum(0), tokens.expand(mass_TE.size(1))))


def load_balancing_loss(balance: tuple[Tensor, ...]) -> Tensor:
    """E * sum_e f_e P_e over all layers together (Switch, 2101.03961 Eq. 4-6), as transformers takes it of its own MoE
    models: f_e, the share of tokens that expert e takes, from the routes as they are, so for any number of experts.

    balance: of each MoE layer, from `router_balance`.
    """
    routes_E, mass_E, tokens_E = torch.stack([layer.to(balance[0].device) for layer in balance]).sum(0)
    tokens = tokens_E.clamp(min=1)
    return len(routes_E) * (routes_E / tokens * (mass_E / tokens)).sum()


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
        out = self.mlp(self.post_attention_layernorm(hidden_BSH), real_BS)
        return hidden_BSH + (out[0] if isinstance(out, tuple) else out)


class DsmoePreTrainedModel(PreTrainedModel):
    config_class = DsmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DsmoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["routing"]  # of a model loaded in bf16 too
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DsmoeDecoderLayer,
        "attentions": DsmoeAttention,
        "router_logits": OutputRecorder(DsmoeSparseMLP, index=1),
        "router_balance": OutputRecorder(DsmoeSparseMLP, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (DsmoeRoutedExperts, DsmoeExperts)):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    initialization.zeros_(parameter)
                else:
                    initialization.normal_(parameter, mean=0.0, std=std)
        elif hasattr(module, "path_in_routing"):
            # Vectors and buffers begin as their module makes them; this one may have been made without memory.
            with torch.device("cpu"):
                fresh = build_routing(self.config).get_submodule(module.path_in_routing)
            for name, tensor in (*fresh.named_parameters(recurse=False), *fresh.named_buffers(recurse=False)):
                if tensor.dim() > 1 and isinstance(tensor, nn.Parameter):
                    initialization.normal_(getattr(module, name), mean=0.0, std=std)
                else:
                    initialization.copy_(getattr(module, name), tensor)


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
    ) -> MoeModelOutputWithPast:
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
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_BSH), past_key_values=past_key_values)


class DsmoeForCausalLM(DsmoePreTrainedModel, GenerationMixin):
    """The language model.

    With `output_router_logits` (an argument, or of the configuration) the output has the scores of every MoE layer's
    router and `aux_loss`, the balance loss, which `loss` then contains times `config.router_aux_loss_coef`. The other
    losses of dsmoe's routers belong to its trainer.
    """

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
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, S, V], of the last `logits_to_keep` tokens where that is given, and the loss of `labels` [B, S]
        (the tokens themselves; -100 where one does not count)."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_router_logits=output_router_logits, output_router_balance=output_router_logits, **kwargs,
        )  # fmt: skip
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits and output.get("router_balance"):
            aux_loss = load_balancing_loss(output["router_balance"])
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=output.past_key_values,
            hidden_states=output.hidden_states, attentions=output.attentions, router_logits=output.router_logits,
        )  # fmt: skip


class DsmoeForSequenceClassification(GenericForSequenceClassification, DsmoePreTrainedModel):
    """A classifier of sequences: one linear layer, `score`, over the last token that is no padding."""

    def __init__(self, config: DsmoeConfig):
        DsmoePreTrainedModel.__init__(self, config)  # the generic one would ask the Hub for the decoder
        self.num_labels = config.num_labels
        self.model = DsmoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["DsmoeForCausalLM", "DsmoeForSequenceClassification", "DsmoeModel", "DsmoePreTrainedModel"]
