"""What a Hugging Face folder's config.json says, in dsmoe's words; or everything in it that dsmoe has no place for.

Mixtral, OLMoE and Qwen3-MoE become a model with router topk, LLaMA and Qwen3 a dense model to be upcycled, and an
export of our own what it was. A feature that changes numbers and is not here is refused by name: it would be gone.
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
from dsmoe.routers.topk import TopKRouter

MOE = ("mixtral", "olmoe", "qwen3_moe")
DENSE = ("llama", "qwen3")
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
        raise ConversionError(f"{path} cannot be read: {error.strerror}; a Hugging Face model has one") from error
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{path} is damaged: {error}") from error
    if architecture not in (*MOE, *DENSE, "dsmoe"):
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
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    found = {
        f"rope_type {rope.get('rope_type')!r} (scaled rotary embedding)": rope.get("rope_type") != "default",
        f"partial_rotary_factor {rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"hidden_act {config.hidden_act!r} (experts are SwiGLU)": config.hidden_act != "silu",
        f"sliding_window {window}": sliding or (window is not None and window < longest),
        "quantization_config (quantized weights)": raw.get("quantization_config"),
        "auto_map (code of its own)": raw.get("auto_map") and architecture != "dsmoe",
    }
    flags = ("attention_bias", "mlp_bias", "clip_qkv", "attention_dropout", "router_jitter_noise")
    found |= {f"{flag} {getattr(config, flag)}": True for flag in flags if getattr(config, flag, None)}
    return [phrase for phrase, present in found.items() if present]


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
    model["qk_layernorm"] = {"olmoe": "full", "qwen3_moe": True, "qwen3": True}.get(architecture, False)
    if architecture in DENSE:
        return model | {"ffn_hidden_size": config.intermediate_size}, None
    experts = config.num_local_experts if architecture == "mixtral" else config.num_experts
    model |= {"num_experts": experts, "moe_ffn_hidden_size": config.intermediate_size}
    if architecture == "qwen3_moe":
        step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
        layers = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(config.num_hidden_layers)]
        model |= {
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "ffn_hidden_size": config.intermediate_size,
            "moe_layer_freq": 1 if all(layers) else layers,
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


def _of_dsmoe(config: DsmoeConfig) -> dict[str, Any]:
    return {
        "sequence_length": config.max_position_embeddings,
        "ffn_hidden_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "expert_activation": config.expert_activation,
        "expert_bias": config.expert_bias,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "qk_layernorm": config.qk_norm,
    }
