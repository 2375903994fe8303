"""Which options are refused, what they say, and what is counted from them. Defaults are the published numbers."""

from __future__ import annotations

import pytest
import reference
from harness import Routers, model_config, problems_of

from dsmoe.routers import available, get

REFUSED = [  # router, options, experts, field, words of the message
    ("topk", {"k": 5}, 4, "router.k", "at most model.num_experts (4)"),
    ("topk", {"k": 0}, 4, "router.k", "greater than or equal to 1"),
    ("topk", {"k": 1, "renormalize": True}, 4, "router.renormalize", "every gate is 1"),
    ("topk", {"k": 1, "softmax": "after"}, 4, "router.softmax", "expected before, or a larger k"),
    ("topk", {"k": 2, "softmax": "after", "renormalize": True}, 4, "router.renormalize", "sum to 1 already"),
    ("topk", {"balance_scope": "everywhere"}, 4, "router.balance_scope", "'global_batch'"),
    ("topk", {"topk": 2}, 4, "router.topk", "unknown key"),
    ("topk_bias", {"k": 5}, 4, "router.k", "at most model.num_experts (4)"),
    ("topk_bias", {"k": 1}, 4, "router.renormalize", "every gate is route_scale"),
    ("topk_bias", {"num_groups": 3}, 8, "router.num_groups", "a divisor of model.num_experts (8)"),
    ("topk_bias", {"num_groups": 2, "groups_per_token": 3}, 8, "router.groups_per_token", "at most router.num_groups"),
    ("topk_bias", {"k": 5, "num_groups": 4, "groups_per_token": 2}, 8, "router.k", "at most the 4 experts"),
    ("topk_bias", {"num_groups": 4, "groups_per_token": 2}, 4, "router.group_score_experts", "at most the 1 experts"),
    ("topk_bias", {"bias_update_rate": -1.0}, 4, "router.bias_update_rate", "greater than or equal to 0"),
    ("relu", {"k": 5.0}, 4, "router.k", "at most model.num_experts (4)"),
    ("relu", {"lambda_factor": 1.0}, 4, "router.lambda_factor", "greater than 1"),
    ("top_p", {"p": 0.0}, 4, "router.p", "greater than 0"),
    ("top_p", {"p": 1.5}, 4, "router.p", "less than or equal to 1"),
    ("top_p", {"expected_experts": 9.0}, 4, "router.expected_experts", "at most model.num_experts (4)"),
    ("dtop_p", {"k": 1.0}, 4, "router.k", "cannot learn"),
    ("dtop_p", {"k": 5.0}, 4, "router.k", "at most model.num_experts (4)"),
    ("dtop_p", {"p_min": 0.5, "p_max": 0.5}, 4, "router.p_min", "less than router.p_max (0.5)"),
    ("dtop_p", {"p_initial": 0.9, "p_max": 0.5}, 4, "router.p_initial", "to router.p_max (0.5)"),
    ("dtop_p", {"kp": 0.0, "ki": 0.0}, 4, "router.kp", "p would never move"),
    ("expert_threshold", {"k": 5.0}, 4, "router.k", "at most model.num_experts (4)"),
    ("quantile", {"k": 4.0}, 4, "router.k", "less than model.num_experts (4)"),
    ("topk_bias", {"k": 4, "bias_update": "quantile"}, 4, "router.k", "less than model.num_experts (4)"),
    ("topk_bias", {"score": "softmax", "bias_update": "quantile"}, 4, "router.score", "sigmoid"),
    (
        "topk_bias",
        {"num_groups": 2, "bias_update": "quantile"},
        4,
        "router.groups_per_token",
        "router.num_groups (2)",
    ),
    ("expert_threshold", {"decay": 1.0}, 4, "router.decay", "less than 1"),
    ("expert_threshold", {"warmup_steps": -1}, 4, "router.warmup_steps", "greater than or equal to 0"),
]
ACCEPTED = [
    ("topk", {"k": 1}, 1),
    ("topk", {"k": 2, "softmax": "after"}, 4),
    ("topk_bias", {"k": 8, "num_groups": 8, "groups_per_token": 4}, 256),  # DeepSeek-V3
    ("topk_bias", {"k": 2, "num_groups": 4, "groups_per_token": 4}, 4),  # all groups: nothing to rank
    ("topk_bias", {"k": 1, "renormalize": False}, 4),
    ("top_p", {"p": 1.0}, 4),
    ("dtop_p", {"k": 8.0}, 64),
    ("dtop_p", {"k": 4.0}, 4),
    ("expert_threshold", {"capacity_slack": None, "warmup_steps": 0}, 4),
]


@pytest.mark.parametrize(("name", "options", "experts", "field", "words"), REFUSED)
def test_refused(name, options, experts, field, words):
    problems = problems_of(name, options, experts)
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{field}: ")
    assert words in problems[0]


@pytest.mark.parametrize(("name", "options", "experts"), ACCEPTED)
def test_accepted(name, options, experts):
    assert problems_of(name, options, experts) == []


@pytest.mark.parametrize("name", ["relu", "topk", "topk_bias", "top_p", "dtop_p", "expert_threshold", "quantile"])
def test_defaults_fit_the_default_model(name):
    assert name in available()
    assert problems_of(name, {}, 8) == []


PUBLISHED = {
    "topk": {"balance_coefficient": 1e-2},
    "topk_bias": {"bias_update_rate": 1e-3, "sequence_coefficient": 1e-4, "route_scale": 2.5, "score": "sigmoid"},
    "relu": {"lambda_initial": 1e-8, "lambda_factor": 1.2, "form": "code"},
    "top_p": {"p": 0.4, "balance_coefficient": 1e-2, "entropy_coefficient": 1e-4, "rule": "above"},
    "dtop_p": {"balance_coefficient": 1e-4, "entropy_coefficient": 1e-3, "kp": 0.05, "ki": 0.005},
    "expert_threshold": {"warmup_steps": 4000, "decay": 0.999, "capacity_slack": 0.5},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_numbers(name):
    options = get(name).Options().model_dump()
    assert {key: options[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_that_of_the_built_router(name):
    routers = Routers(name, {}, 4)
    counted = get(name).parameter_count(model_config(4), routers.options)
    assert counted == sum(parameter.numel() for parameter in routers.layers[0].parameters())


@pytest.mark.parametrize(
    ("name", "options", "experts", "expected"),
    [
        ("topk", {"k": 2}, 8, 2),
        ("topk_bias", {"k": 3}, 8, 3),
        ("relu", {"k": 1.5}, 8, 1.5),
        ("dtop_p", {"k": 2.5}, 8, 2.5),
        ("expert_threshold", {"k": 1.5}, 8, 1.5),
        ("top_p", {"expected_experts": 1.76}, 16, 1.76),
        ("top_p", {}, 16, 7),  # 6 of 16 equal shares are 0.375, 7 exceed 0.4
        ("top_p", {"p": 0.5}, 4, 3),  # 2 of 4 reach 0.5 and do not exceed it
        ("top_p", {"p": 0.5, "rule": "reach"}, 4, 2),
        ("top_p", {"p": 1.0}, 4, 4),
    ],
)
def test_target_experts_per_token(name, options, experts, expected):
    assert get(name).Options.model_validate(options).target_experts_per_token(model_config(experts)) == expected


@pytest.mark.parametrize(("k", "experts", "scale"), [(2, 8, 1.0), (8, 64, 1.0), (3, 4, 1.0), (2, 8, 2.0)])
def test_dtop_p_starts_at_the_mass_of_k_experts(k, experts, scale):
    options = get("dtop_p").Options(k=float(k), scale_initial=scale)
    assert options.initial_p(experts) == pytest.approx(reference.normal_mass(k, experts, scale), abs=2e-3)
