"""How many parameters a configuration has, in all and active per token. A test holds built models to it."""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe.config import RunConfig
from dsmoe.moe.expert_mlp import ExpertMLP
from dsmoe.routers import get


@dataclass(frozen=True)
class ModelSize:
    """Parameters; `active` counts what one token uses at the router's aim of experts per token."""

    total: int
    active: int
    expert: int  # one routed expert of one layer


def model_size(config: RunConfig) -> ModelSize:
    """Count from the configuration alone; `model.vocab_size` must be set."""
    model = config.model
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    hidden, head = model.hidden_size, model.head_size
    attention = hidden * head * (2 * model.num_attention_heads + 2 * model.key_value_heads)
    attention += head * (model.num_attention_heads + 2 * model.key_value_heads) if model.add_qkv_bias else 0
    heads = model.num_attention_heads + model.key_value_heads if model.qk_layernorm == "full" else 2
    norms = 2 * hidden + (heads * head if model.qk_layernorm else 0)
    expert = ExpertMLP.of(model, router_class.latent_rank(options)).parameters
    shared = 3 * hidden * (model.moe_shared_expert_intermediate_size or 0)
    shared += hidden if model.moe_shared_expert_gate else 0
    router = router_class.parameter_count(model, options)
    moe_layers = sum(model.moe_layers())
    dense = (model.num_layers - moe_layers) * 3 * hidden * model.dense_ffn_hidden_size
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    always = embeddings + hidden + model.num_layers * (attention + norms) + dense + moe_layers * (router + shared)
    active = round(options.target_experts_per_token(model) * expert)
    return ModelSize(always + moe_layers * model.num_experts * expert, always + moe_layers * active, expert)
