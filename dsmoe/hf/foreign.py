"""What a Hugging Face folder's config.json says, in dsmoe's words; or everything in it that dsmoe has no place for.

Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE become a model with router topk, dots1, whose routing is DeepSeek-V3's, one
with topk_bias, LLaMA and Qwen3 a dense model to be upcycled, and an export of our own what it was. A feature that
changes numbers and is not here is refused by name: it would be gone. DeepSeek-V2, V3 and GPT-OSS are read to say which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from dsmoe.errors import ConversionError
from dsmoe.hf.remote.configuration_dsmoe import DsmoeConfig
from dsmoe.hf.table import PACKED, TABLES, Row
from dsmoe.moe.activations import ALPHA, LIMIT
from dsmoe.routers.topk import TopKRouter
from dsmoe.routers.topk_bias import TopKBiasRouter

MOE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "dots1")
DENSE = ("llama", "qwen3")
REFUSED = ("deepseek_v2", "deepseek_v3", "gpt_oss")  # for features that all their models have
LONGEST = 4096  # tokens of model.sequence_length where the model allows more: it is what training has to hold


@dataclass(frozen=True)
class ForeignModel:
    """An architecture and its configuration.

    Attributes:
        architecture: key of `dsmoe.hf.table.TABLES`.
        model: values of the section `model`; of a dense model without those about experts.
        router: values of the section `router`; None for a dense model.
    """

    architecture: str
    model: dict[str, Any]
    router: dict[str, Any] | None

    @property
    def is_dense(self) -> bool:
        return self.router is None

    def rows(self, names: Mapping[str, Any]) -> tuple[Row, ...]:
        """The table for a folder that holds tensors of these names: the Hub's, or packed ones."""
        packed = self.architecture in PACKED and any(name.endswith("mlp.experts.gate_up_proj") for name in names)
        return PACKED[self.architecture] if packed else TABLES[self.architecture]


def read_foreign(folder: Path) -> ForeignModel:
    """Read config.json. Raises `ConversionError` that lists all features that have no place here."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        architecture = raw.get("model_type")
    except OSError as error:
        if (folder / "adapter_config.json").is_file():
            raise ConversionError(
                f"{folder} holds an adapter without its model; merge it first: "
                "PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
            ) from error
        raise ConversionError(f"{path} cannot be read: {error.strerror}; a Hugging Face model has one") from error
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{path} is damaged: {error}") from error
    if architecture not in (*MOE, *DENSE, *REFUSED, "dsmoe"):
        raise ConversionError(
            f"{path}: model_type {architecture!r} cannot be imported; {', '.join(MOE)} and exports of dsmoe can, and "
            f"{' and '.join(DENSE)} can be upcycled"
        )
    try:
        config = (DsmoeConfig if architecture == "dsmoe" else CONFIG_MAPPING[architecture]).from_dict(raw)
        refused = _refused(architecture, config, raw)
        if not refused:
            return ForeignModel(architecture, *_translate(architecture, config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ConversionError(f"{path} is damaged: {error}") from error
    raise ConversionError(f"{path}: dsmoe's model cannot express {'; '.join(refused)}")


def _refused(architecture: str, config: PreTrainedConfig, raw: dict[str, Any]) -> list[str]:
    """One phrase for each feature that dsmoe's model lacks."""
    rope = config.rope_parameters or {}
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    layers = getattr(config, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    features = {
        f"rope_type {rope.get('rope_type')!r} (scaled rotary embedding)": rope.get("rope_type") != "default",
        f"partial_rotary_factor {rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"hidden_act {config.hidden_act!r} (experts are SwiGLU)": config.hidden_act != "silu",
        f"sliding_window {window}": slides and window and window < longest,
        "quantization_config (quantized weights)": raw.get("quantization_config"),
        "auto_map (code of its own)": raw.get("auto_map") and architecture != "dsmoe",
    }
    features |= _of_architecture(architecture, config)
    flags = ("attention_bias", "mlp_bias", "clip_qkv", "attention_dropout", "router_jitter_noise")
    features |= {f"{flag} {getattr(config, flag)}": True for flag in flags if getattr(config, flag, None)}
    return [phrase for phrase, present in features.items() if present]


def _of_architecture(architecture: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Features that all models of an architecture may have, as in `_refused`."""
    if architecture in ("deepseek_v2", "deepseek_v3"):
        rank = f"kv_lora_rank {config.kv_lora_rank}"
        latent = "multi-head latent attention; attention here has whole keys and values of every head"
        predicted = getattr(config, "num_nextn_predict_layers", 0)
        return {
            f"{rank} ({latent})": True,
            f"num_nextn_predict_layers {predicted} (layers that predict further tokens)": predicted,
        }
    if architecture == "gpt_oss":
        # Its experts have a place: model.expert_activation swigluoai, model.expert_bias.
        swiglu = f"swiglu_alpha {config.swiglu_alpha} and swiglu_limit {config.swiglu_limit}"
        return {
            "sinks (attention with a learned logit that takes no value)": True,
            "a bias of the router": True,
            f"{swiglu} (swigluoai has {ALPHA} and {LIMIT})": (config.swiglu_alpha, config.swiglu_limit)
            != (ALPHA, LIMIT),
        }
    return {}


def _translate(architecture: str, config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    model = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": config.num_key_value_heads or heads,
        "kv_channels": head if head * heads != hidden else None,
        "sequence_length": min(config.max_position_embeddings, LONGEST),
        "vocab_size": config.vocab_size,
        "tie_embeddings": bool(config.tie_word_embeddings),
        "rotary_base": float(config.rope_parameters["rope_theta"]),
        "norm_epsilon": float(config.rms_norm_eps),
        "init_std": float(config.initializer_range),
    }
    if architecture == "dsmoe":
        return model | _of_dsmoe(config), dict(config.router)
    model["qk_layernorm"] = {"olmoe": "full", "qwen3_moe": True, "qwen3": True, "dots1": True}.get(architecture, False)
    if architecture in DENSE:
        return model | {"ffn_hidden_size": config.intermediate_size}, None
    if architecture == "dots1":
        return model | _experts_of_dots1(config), _router_of_dots1(config)
    experts = config.num_local_experts if architecture == "mixtral" else config.num_experts
    model |= {"num_experts": experts, "moe_ffn_hidden_size": config.intermediate_size}
    if architecture in ("qwen2_moe", "qwen3_moe"):
        step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
        layers = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(config.num_hidden_layers)]
        model |= {
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "ffn_hidden_size": config.intermediate_size,
            "moe_layer_freq": 1 if all(layers) else layers,
        }
    if architecture == "qwen2_moe":
        model |= {
            "add_qkv_bias": config.qkv_bias,
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
        }
    renormalised = architecture == "mixtral" or config.norm_topk_prob
    moe_layers = model["moe_layer_freq"] if isinstance(model.get("moe_layer_freq"), list) else [1] * model["num_layers"]
    # One loss over the routes of all layers together there, a sum over layers and a mean over k here.
    balance = float(config.router_aux_loss_coef) * config.num_experts_per_tok / max(1, sum(moe_layers))
    router = {
        "name": TopKRouter.name,
        "k": config.num_experts_per_tok,
        "softmax": "after" if renormalised else "before",
        "balance_coefficient": balance,
    }
    return model, router


def _experts_of_dots1(config: PreTrainedConfig) -> dict[str, Any]:
    dense, width = config.first_k_dense_replace or 0, config.moe_intermediate_size
    layers = [int(layer >= dense) for layer in range(config.num_hidden_layers)]
    return {
        "num_experts": config.n_routed_experts,
        "moe_ffn_hidden_size": width,
        "ffn_hidden_size": config.intermediate_size,
        "moe_layer_freq": 1 if all(layers) else layers,
        "moe_shared_expert_intermediate_size": width * config.n_shared_experts if config.n_shared_experts else None,
    }


def _router_of_dots1(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "name": TopKBiasRouter.name,
        "k": config.num_experts_per_tok,
        "score": "sigmoid",
        "renormalize": bool(config.norm_topk_prob),
        "route_scale": float(config.routed_scaling_factor),
        "num_groups": config.n_group or 1,
        "groups_per_token": config.topk_group or 1,
        "group_score_experts": 2,
    }


def _of_dsmoe(config: DsmoeConfig) -> dict[str, Any]:
    return {
        "sequence_length": config.max_position_embeddings,
        "ffn_hidden_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "expert_activation": config.expert_activation,
        "expert_bias": config.expert_bias,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": config.shared_expert_gate,
        "add_qkv_bias": config.qkv_bias,
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "qk_layernorm": config.qk_norm,
    }
