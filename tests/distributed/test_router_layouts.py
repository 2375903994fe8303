"""Every router under every layout: expert parallel 1, 2 and 4 on four ranks, ZeRO 1 to 3, recompute and bf16.

One micro-step; with two: test_layouts.py. The ranks keep their tokens whatever the layout, so losses, routes,
gradients, weights and controllers must agree, also for a router that looks at one rank's tokens. Every registered
router is here; a new one comes with its defaults.
"""

from __future__ import annotations

import functools

import pytest
import torch
from ranks import run_ranks
from steps import joined, largest_difference, tiny_config, train_each

from dsmoe.routers import available

STEPS = 2  # so that the second one shows what a controller made of the first
OPTIONS = {  # so that two steps of a tiny model meet what the defaults meet in thousands
    "aoe": {"k": 2, "rank": 8, "balance_coefficient": 1e-2},
    "dtop_p": {"k": 2.0, "kp": 0.2, "ki": 0.1},
    "expert_threshold": {"k": 1.5, "warmup_steps": 1, "decay": 0.5},
    "quantile": {"k": 1.5, "decay": 0.5},
    "relu": {"k": 1.0, "lambda_initial": 1e-2},
    "routing_free": {"rank": 8, "rescale": True, "lambda_initial": 1e-2, "lambda_rate": 0.5},
    "top_p": {"p": 0.6},
    "topk": {"k": 2, "balance_scope": "global_batch", "z_coefficient": 1e-3},
    "topk_bias": {"k": 2, "num_groups": 2, "bias_update_rate": 0.05, "sequence_coefficient": 1e-2},
}
ROUTERS = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]
BASE = {"parallel": {"expert_parallel": 1, "zero_stage": 1}}
LAYOUTS = {
    "EP 2, ZeRO 2": {"parallel": {"expert_parallel": 2, "zero_stage": 2}},
    "EP 4, ZeRO 3": {"parallel": {"expert_parallel": 4, "zero_stage": 3}},
    "EP 4, ZeRO 1, recompute, 3 chunks": {
        "parallel": {"expert_parallel": 4, "zero_stage": 1},
        "model": {"recompute": "full", "moe_chunks": 3},
    },
}
BF16 = {"parallel": {"expert_parallel": 2, "zero_stage": 2}, "training": {"precision": "bf16"}}
# These decide from the tokens of one rank, so the number of ranks is part of the method.
PER_RANK = ("expert_threshold",)


def configs_of(sections: dict) -> list:
    sections = {**sections, "training": {"gradient_accumulation": 1, **sections.get("training", {})}}
    return [tiny_config(router={"name": name, **OPTIONS.get(name, {})}, **sections) for name in ROUTERS]


@functools.cache
def results() -> dict[tuple[str, str], tuple]:
    """(layout, router) -> its history, its whole tensors and the histories of all ranks: one start of four ranks."""
    cases = {"base": BASE, **LAYOUTS, "bf16": BF16}
    configs = [config for sections in cases.values() for config in configs_of(sections)]
    ranks = run_ranks(4, train_each, configs, STEPS, deadline=180)
    histories = [[history for history, _ in case] for case in zip(*ranks, strict=True)]
    names = [(case, router) for case in cases for router in ROUTERS]
    return {name: (*case, every) for name, case, every in zip(names, joined(ranks), histories, strict=True)}


@functools.cache
def one_rank() -> dict[str, tuple]:
    names = [name for name in ROUTERS if name not in PER_RANK]
    configs = [config for config in configs_of(BASE) if config.router.name in names]
    return dict(zip(names, joined(run_ranks(1, train_each, configs, STEPS, deadline=60)), strict=True))


def assert_same(actual: tuple, expected: tuple) -> None:
    for after, before in zip(actual[0], expected[0], strict=True):
        assert torch.equal(*(torch.as_tensor(step["counts"]) for step in (after, before)))
        for quantity in ("loss", "router_loss", "grad_norm"):
            assert after[quantity] == pytest.approx(before[quantity], abs=1e-5), quantity
        assert after["state"].keys() == before["state"].keys()
        for name, value in before["state"].items():
            found_state, expected_state = torch.as_tensor(after["state"][name]), torch.as_tensor(value)
            torch.testing.assert_close(found_state, expected_state, rtol=1e-5, atol=1e-5)
    assert largest_difference(actual[1], expected[1]) <= 2e-5


def same_state(one: dict, other: dict) -> bool:
    """To the bit."""
    pairs = ((torch.as_tensor(value), torch.as_tensor(other["state"][name])) for name, value in one["state"].items())
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(layout, router):
    """The first of these waits for all 45 trainings on four ranks: about 25 s on two idle cores."""
    assert_same(results()[layout, router], results()["base", router])


@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in PER_RANK])
def test_the_number_of_ranks_changes_nothing(router):
    assert_same(results()["base", router], one_rank()[router])


@pytest.mark.parametrize("router", ROUTERS)
def test_controllers_are_the_same_on_every_rank_to_the_bit(router):
    moved = False
    for layout in ("base", *LAYOUTS, "bf16"):
        first, *others = results()[layout, router][2]
        for other in others:
            for here, there in zip(first, other, strict=True):
                assert same_state(here, there), layout
        moved |= not same_state(first[0], first[-1])
    assert moved == bool(first[0]["state"]), "the controller never moved"


@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_trains_about_the_same(router):
    for after, before in zip(results()["bf16", router][0], results()["base", router][0], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=5e-3)
        assert after["router_loss"] == pytest.approx(before["router_loss"], rel=0.2, abs=1e-4)
        assert after["density"] == pytest.approx(before["density"], abs=0.05)
