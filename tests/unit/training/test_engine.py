"""What the optimizer is told: the learning rate of each step, which parameters decay, DeepSpeed's groups and JSON."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.utils import is_moe_param

from dsmoe.config import TrainingConfig, validate_config
from dsmoe.model.gpt import LanguageModel
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes
from dsmoe.training.engine import deepspeed_json, parameter_groups

MODEL = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, sequence_length=16, vocab_size=64, num_experts=4,
    moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=8, moe_layer_freq=[1, 0], qk_layernorm=True,
)  # fmt: skip


def training_config(**values) -> TrainingConfig:
    return TrainingConfig(**{"steps": 100, "warmup_steps": 10, "lr": 1e-3, **values})


def model_of(groups, **model) -> LanguageModel:
    tree = {"model": MODEL | model, "router": {"name": "routing_free", "rank": 4, "threshold": 0.01}}
    config = validate_config(tree, option_classes())
    router_class = get(config.router.name)
    options = router_class.Options.model_validate(config.router.options)
    return LanguageModel(config.model, (router_class, options), groups, seed=0)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(groups, tie, decay_embeddings):
    model = model_of(groups, tie_embeddings=tie)
    found = parameter_groups(model, training_config(weight_decay=0.2, decay_embeddings=decay_embeddings))
    decay_of = {}
    for group in found:
        for parameter in group["params"]:
            assert id(parameter) not in decay_of, "a parameter is in two groups"
            decay_of[id(parameter)] = group["weight_decay"]
    assert len(decay_of) == len(list(model.parameters()))
    decayed = {name for name, parameter in model.named_parameters() if decay_of[id(parameter)] == 0.2}
    assert {decay_of[id(parameter)] for parameter in model.parameters()} == {0.2, 0.0}
    for name, parameter in model.named_parameters():
        embedding = "word_embeddings" in name or "output_layer" in name
        expected = not ("norm" in name or parameter.dim() < 2 or (embedding and not decay_embeddings))
        assert (name in decayed) == expected, name


def test_experts_have_groups_of_their_own_with_the_names_deepspeed_looks_for(groups):
    found = parameter_groups(model_of(groups), training_config())
    for group in found:
        expert = group.get("moe", False)
        assert {is_moe_param(parameter) for parameter in group["params"]} == {expert}
        assert (group["name"] == "ep_size_1") == expert
    assert sum(group.get("moe", False) for group in found) >= 1
    torch.optim.AdamW(found)  # takes them as they are


def test_deepspeed_gets_the_users_keys_and_dsmoes_own_over_them():
    tree = {
        "training": {"global_batch_size": 24, "gradient_accumulation": 3, "clip_grad": 0.5, "precision": "bf16"},
        "parallel": {"zero_stage": 2},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True}, "steps_per_print": 5},
    }
    settings = deepspeed_json(validate_config(tree, option_classes()), world_size=4)
    assert settings["train_batch_size"] == 24
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True} and settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["steps_per_print"] == 5
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 7, True)
    assert zero["reduce_scatter"] is True and zero["contiguous_gradients"] is True
