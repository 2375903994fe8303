"""Which parameters decay: by what they are for; and the groups that DeepSpeed wants."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.utils import is_moe_param
from torch import nn

from dsmoe.config import TrainingConfig, validate_config
from dsmoe.model.gpt import LanguageModel
from dsmoe.optim.groups import Role, decays, parameter_groups, role_of, with_role
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

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
    model = model_of(groups, tie_embeddings=tie, expert_bias=True)
    actual = parameter_groups(model, training_config(weight_decay=0.2, decay_embeddings=decay_embeddings))
    decay_of = {}
    for group in actual:
        for parameter in group["params"]:
            assert id(parameter) not in decay_of, "a parameter is in two groups"
            decay_of[id(parameter)] = group["weight_decay"]
    assert len(decay_of) == len(list(model.parameters()))
    decayed = {name for name, parameter in model.named_parameters() if decay_of[id(parameter)] == 0.2}
    assert {decay_of[id(parameter)] for parameter in model.parameters()} == {0.2, 0.0}
    for name, parameter in model.named_parameters():
        embedding = "word_embeddings" in name or "output_layer" in name
        expected = not (
            "norm" in name or name.endswith("_bias") or parameter.dim() < 2 or (embedding and not decay_embeddings)
        )
        assert (name in decayed) == expected, name


def test_experts_have_groups_of_their_own_with_the_names_deepspeed_looks_for(groups):
    actual = parameter_groups(model_of(groups), training_config())
    for group in actual:
        expert = group.get("moe", False)
        assert {is_moe_param(parameter) for parameter in group["params"]} == {expert}
        assert (group["name"] == "ep_size_1") == expert
    assert sum(group.get("moe", False) for group in actual) >= 1
    torch.optim.AdamW(actual)  # takes them as they are


def packed(*shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(*shape))
    parameter.first_expert = 0
    return parameter


@pytest.mark.parametrize(
    ("name", "parameter", "role"),
    [
        ("mlp.experts.gate_up_proj", packed(4, 6, 3), Role.MATRIX),
        ("mlp.experts.bias", packed(4, 6), Role.VECTOR),  # of 4 experts, each a vector
        ("mlp.router.weight", nn.Parameter(torch.zeros(4, 3)), Role.MATRIX),
        ("norm.weight", nn.Parameter(torch.zeros(3)), Role.VECTOR),
        ("embedding.word_embeddings.weight", nn.Parameter(torch.zeros(8, 3)), Role.EMBEDDING),
        ("mlp.router.thresholds", with_role(nn.Parameter(torch.zeros(4, 3)), Role.VECTOR), Role.VECTOR),
        ("mlp.experts.scale", with_role(packed(4, 6, 1), "vector"), Role.VECTOR),
    ],
)
def test_a_role_is_the_parameters_own_or_follows_from_each_tensor_that_it_holds(name, parameter, role):
    assert role_of(name, parameter) is role


def test_only_matrices_decay_and_embeddings_if_asked():
    assert [decays(role, training_config()) for role in Role] == [True, False, False]
    assert [decays(role, training_config(decay_embeddings=True)) for role in Role] == [True, True, False]


def test_a_role_that_is_none_is_refused():
    with pytest.raises(ValueError, match="scale"):
        with_role(nn.Parameter(torch.zeros(1)), "scale")
