"""Ranks without work take part in everything: forward, backward and optimizer step, under ZeRO 2 and 3.

A rank that sends nothing or receives nothing must neither hang the others nor change the result: losses, gradients
(read from Adam's first moments) and weights are those of one rank. A token without experts gets exactly 0 from them.
"""

from __future__ import annotations

import functools

import pytest
import torch
from fixed_routes import ROUTES
from ranks import once, run_ranks
from steps import fresh_engine, joined, largest_difference, owned_tensors, run_steps, tiny_config

from dsmoe.moe.layer import VariableMoELayer

LAYOUTS = [(2, 2, 2), (2, 2, 3), (4, 2, 2), (4, 2, 3)]  # ranks, expert parallel, ZeRO stage


def train_all_routes(expert_parallel: int, stage: int) -> list[tuple]:
    return [_train(route, expert_parallel, stage) for route in ROUTES]


def _train(route: str, expert_parallel: int, stage: int):
    config = tiny_config(
        router={"name": "fixed", "routes": route},
        parallel={"expert_parallel": expert_parallel, "zero_stage": stage},
        training={"gradient_accumulation": 1, "global_batch_size": 8},
    )
    engine = fresh_engine(config)
    for module in engine.module.modules():
        if isinstance(module, VariableMoELayer):
            module.router.register_forward_hook(functools.partial(_keep_map, module))
            module.register_forward_hook(_check_tokens_without_experts)
    return run_steps(engine, config, 0, 3), owned_tensors(engine)


def _keep_map(layer, router, inputs, output) -> None:
    layer.seen_map_TE = output.map_TE


def _check_tokens_without_experts(layer, inputs, output) -> None:
    out_TH = output[0].flatten(0, 1)
    used_T = layer.seen_map_TE.any(1)
    assert torch.equal(out_TH[~used_T], torch.zeros_like(out_TH[~used_T])), "a token without experts got something"
    assert (out_TH[used_T] != 0).any(1).all(), "a token with experts got nothing"


@once
def results(world: int, expert_parallel: int, stage: int) -> dict[str, tuple]:
    actual = run_ranks(world, train_all_routes, expert_parallel, stage, deadline=60)
    return dict(zip(ROUTES, joined(actual), strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("world", "expert_parallel", "stage"), LAYOUTS)
def test_ranks_without_work_change_nothing(world, expert_parallel, stage, route):
    expected_history, expected = results(1, 1, 1)[route]
    history, actual = results(world, expert_parallel, stage)[route]
    for before, after in zip(expected_history, history, strict=True):
        assert torch.equal(after["counts"], before["counts"])
        # fp32 sums over 8 x 16 tokens in another order
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    assert largest_difference(actual, expected) <= 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_an_expert_without_tokens_gets_no_gradient(stage):
    _, actual = results(2, 2, stage)["last_experts_receive_nothing"]
    experts = {name: tensor for name, tensor in actual.items() if name.startswith("exp_avg|") and ".experts." in name}
    unused = [name for name in experts if ".experts.2." in name or ".experts.3." in name]
    assert len(unused) == len(experts) / 2
    for name, tensor in experts.items():
        assert tensor.any() == (name not in unused), name


@pytest.mark.parametrize("stage", [2, 3])
def test_where_no_token_is_routed_the_rest_of_the_model_still_learns(stage):
    history, actual = results(2, 2, stage)["none"]
    assert all(step["density"] == 0 for step in history)
    for name, tensor in actual.items():
        if name.startswith("exp_avg|"):
            routed = ".experts." in name or ".router." in name or "mlp_layernorm" in name
            assert tensor.any() != routed, name
