"""Architectures of transformers that hold a plain top-k model exactly, with no code of ours.

    host        QK-norm                  gates                          layers
    qwen3_moe   of each head             renormalised or not            MoE and dense
    qwen2_moe   none                     renormalised or not            MoE and dense
    olmoe       over all heads at once   renormalised or not            MoE only
    mixtral     none                     renormalised                   MoE only

All are softmax top-k over SwiGLU experts. Qwen2-MoE has a shared expert with a gate, and may have biases of queries,
keys and values; the others have neither. What does not fit is refused with every reason, since a flag that a reader
ignores would give another model in silence.
"""

from __future__ import annotations

from typing import Any

from dsmoe.config import ModelConfig, RouterConfig, RunConfig
from dsmoe.errors import ConversionError
from dsmoe.moe.expert_mlp import ExpertMLP
from dsmoe.routers import get
from dsmoe.routers.base import SoftmaxTopK

ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
HOSTS = tuple(ARCHITECTURES)
_QK_NORM = {"qwen3_moe": True, "qwen2_moe": False, "olmoe": "full", "mixtral": False}
_QK_NORM_IN_WORDS = {True: "QK-norm of each head", "full": "QK-norm over all heads at once", False: "no QK-norm"}


def native_host(config: RunConfig, wanted: str) -> str:
    """The host that holds this model: `wanted`, or for "auto" whichever does.

    Raises:
        ConversionError: with every reason why it, or each of them, does not.
    """
    hosts = HOSTS if wanted == "auto" else (wanted,)
    reasons = {host: reasons_against(host, config.model, config.router) for host in hosts}
    fitting = [host for host, against in reasons.items() if not against]
    if fitting:
        return fitting[0]
    lines = [f"  {host}: {'; '.join(against)}" for host, against in reasons.items()]
    raise ConversionError(
        "no architecture of transformers holds this model exactly (--format dsmoe holds every model):\n"
        + "\n".join(lines)
    )


def reasons_against(host: str, model: ModelConfig, router: RouterConfig) -> list[str]:
    """Why `host` cannot hold this model; empty if it can."""
    reasons = []
    top_k = _softmax_top_k(router)
    if top_k is None:
        reasons.append(f"router.name is {router.name}, it has softmax top-k")
    elif host == "mixtral" and not top_k.renormalize:
        reasons.append("gates are not renormalised (router.renormalize, router.softmax), it always renormalises")
    if model.qk_layernorm != _QK_NORM[host]:
        reasons.append(f"model.qk_layernorm is {model.qk_layernorm}, it has {_QK_NORM_IN_WORDS[_QK_NORM[host]]}")
    if not ExpertMLP.of(model).is_plain_swiglu:
        bias = str(model.expert_bias).lower()
        reasons.append(
            f"model.expert_activation is {model.expert_activation}, model.expert_bias {bias}, its experts are swiglu "
            "without biases"
        )
    shared = bool(model.moe_shared_expert_intermediate_size)
    if host == "qwen2_moe" and not (shared and model.moe_shared_expert_gate):
        reasons.append("model.moe_shared_expert_gate is false, it has a shared expert with a gate")
    elif host != "qwen2_moe" and shared:
        reasons.append("model.moe_shared_expert_intermediate_size is set, it has no shared expert")
    if host != "qwen2_moe" and model.add_qkv_bias:
        reasons.append("model.add_qkv_bias is true, it has no such biases")
    if host not in ("qwen2_moe", "qwen3_moe") and not all(model.moe_layers()):
        dense = [str(layer) for layer, is_moe in enumerate(model.moe_layers()) if not is_moe]
        reasons.append(f"layers {', '.join(dense)} are dense (model.moe_layer_freq), it has MoE layers only")
    if host == "olmoe" and model.head_size * model.num_attention_heads != model.hidden_size:
        reasons.append(f"heads are {model.head_size} wide (model.kv_channels), its heads share out hidden_size")
    return reasons


def _softmax_top_k(router: RouterConfig) -> SoftmaxTopK | None:
    router_class = get(router.name)
    return router_class.softmax_top_k(router_class.Options.model_validate(router.options))


def native_config(host: str, config: RunConfig) -> dict[str, Any]:
    """The content of config.json for a host, every flag that changes a number written out; without the weights' dtype,
    the version of transformers and the ids of special tokens, which the caller knows."""
    model, top_k = config.model, _softmax_top_k(config.router)
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURES[host]],
        "model_type": host,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "rope_theta": model.rotary_base,  # for readers before transformers 5
        "attention_dropout": 0.0,
        "num_experts_per_tok": top_k.k,
        "output_router_logits": False,
        # One loss over the routes of all layers together there, a sum over layers and a mean over k here.
        "router_aux_loss_coef": top_k.balance_coefficient * sum(model.moe_layers()) / top_k.k,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if host == "mixtral":
        content |= {
            "intermediate_size": model.moe_ffn_hidden_size,
            "num_local_experts": model.num_experts,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
        }
    else:
        content |= {"num_experts": model.num_experts, "norm_topk_prob": top_k.renormalize}
    if host == "qwen2_moe":
        content |= {"qkv_bias": model.add_qkv_bias}
        content |= {"shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size}
    elif host != "mixtral":
        content |= {"attention_bias": False}
    if host == "olmoe":
        content |= {"intermediate_size": model.moe_ffn_hidden_size, "clip_qkv": None}
    if host in ("qwen2_moe", "qwen3_moe"):
        content |= {
            "num_local_experts": model.num_experts,
            "intermediate_size": model.dense_ffn_hidden_size,
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, is_moe in enumerate(model.moe_layers()) if not is_moe],
            "use_sliding_window": False,
            "sliding_window": None,
        }
    return content
