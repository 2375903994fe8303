"""Initial weights: a function of configuration, seed and name, with exceptions for tensors by a pattern."""

from __future__ import annotations

import math

import pytest
import torch

from dsmoe.config import load_config, validate_config
from dsmoe.errors import ConfigError
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import logical_tensors
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

RECIPE = "configs/recipes/routing_free_paper.yaml"
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_experts": 4, "vocab_size": 64,
         "moe_ffn_hidden_size": 16, "sequence_length": 16}  # fmt: skip
LINEAR = {"tensors": "*.experts.*.down_proj", "distribution": "linear"}


def tensors_of(config, groups, seed: int = 1) -> dict[str, torch.Tensor]:
    router = get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    return dict(logical_tensors(LanguageModel(config.model, (router, options), groups, seed)))


def small(*rules: dict, **model):
    return validate_config({"model": SMALL | model | {"initialization": list(rules)}}, option_classes())


def test_routing_free_starts_from_the_weights_of_its_released_code(groups):
    """torch.nn.Linear's initialization: uniform within 1 / sqrt(fan_in); the first scores are sqrt(r / 3) at any H."""
    config = load_config(RECIPE, ["model.num_layers=1", "model.vocab_size=64"], option_classes())
    tensors = tensors_of(config, groups)
    layer = "gpt.decoder.layers.0.mlp"
    for kind, fan_in, std in (
        ("router.{}.reduce_proj", 512, 0.0255), ("experts.{}.gate_proj", 32, 0.102),
        ("experts.{}.up_proj", 512, 0.0255), ("experts.{}.down_proj", 128, 0.0510),
    ):  # fmt: skip
        drawn = torch.stack([tensors[f"{layer}.{kind.format(expert)}"] for expert in range(12)])
        assert drawn.std().item() == pytest.approx(std, rel=0.01), kind
        assert 0.99 < drawn.abs().max().item() * math.sqrt(fan_in) <= 1, kind
    tokens = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    reduce = torch.stack([tensors[f"{layer}.router.{expert}.reduce_proj"] for expert in range(12)])
    scores = torch.einsum("th,erh->ter", tokens, reduce).norm(dim=-1)
    assert scores.mean().item() == pytest.approx(3.24, abs=0.03)
    assert tensors["gpt.decoder.layers.0.self_attention.linear_qkv.weight"].std().item() == pytest.approx(
        0.02, rel=0.01
    )


def test_an_exception_changes_the_tensors_it_matches_and_the_first_of_several_applies(groups):
    default = tensors_of(small(), groups)
    actual = tensors_of(
        small({"tensors": "*.1.mlp.experts.*", "std": 0.5}, {"tensors": "*.experts.*", "std": 0.1}), groups
    )
    for name, tensor in actual.items():
        if ".experts." not in name:
            assert torch.equal(tensor, default[name])
        else:
            assert tensor.std().item() == pytest.approx(0.5 if ".layers.1." in name else 0.1, rel=0.2)


@pytest.mark.parametrize("rule", [LINEAR, {"tensors": "*.experts.*", "distribution": "uniform", "std": 0.1}])
def test_an_expert_starts_alike_whatever_others_there_are(groups, rule):
    four, eight = (tensors_of(small(rule, num_experts=count), groups) for count in (4, 8))
    experts = [name for name in four if ".experts." in name]
    assert len(experts) == 2 * 4 * 2 and all(torch.equal(four[name], eight[name]) for name in experts)
    first, second = (four[f"gpt.decoder.layers.0.mlp.experts.{expert}.down_proj"] for expert in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"tensors": "*.experts.*"}, "model.initialization.0: found .*, expected std with normal and uniform"),
        (LINEAR | {"std": 0.1}, "model.initialization.0: found .*, expected .*no std with linear"),
        ({"tensors": "*", "std": -1.0}, "model.initialization.0.std: found -1.0, expected greater than 0"),
        ({"tensors": "*", "std": 1.0, "distribution": "xavier"}, "model.initialization.0.distribution: found .xavier."),
        ({"tensor": "*", "std": 1.0}, "model.initialization"),
    ],
)
def test_a_mistaken_exception_is_refused(rule, message):
    with pytest.raises(ConfigError, match=message):
        small(rule)


@pytest.mark.parametrize("pattern", ["*.expert.*.down_proj", "*.experts.4.down_proj", "*norm.weight"])
def test_a_pattern_without_a_matrix_is_refused_when_the_model_is_built(groups, pattern):
    with pytest.raises(ConfigError, match=r"model.initialization: '\*.*' matches no matrix of the model"):
        tensors_of(small(LINEAR | {"tensors": pattern}), groups)


def test_scores_that_start_below_the_threshold_are_refused_by_the_exception_too():
    tree = {"model": SMALL, "router": {"name": "routing_free", "rank": 32}}
    rule = {"tensors": "*.reduce_proj", "distribution": "linear"}
    with pytest.raises(ConfigError, match="= 0.64 with std = 0.02"):
        validate_config(tree, option_classes())
    linear = {**tree, "model": SMALL | {"initialization": [rule]}}
    assert validate_config(linear, option_classes()).model.initialization[0].distribution == "linear"
    with pytest.raises(ConfigError, match="router.rescale: found True, but model.initialization"):
        validate_config({**linear, "router": {"name": "routing_free", "rescale": True}}, option_classes())
    with pytest.raises(ConfigError, match="router.threshold: found 4.0.*= 3.27"):
        validate_config({**linear, "router": {"name": "routing_free", "threshold": 4.0}}, option_classes())
