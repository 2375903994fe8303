"""Loads and the tokens made for them: every route where it was asked for, whatever the router."""

from __future__ import annotations

import pytest
import torch

from dsmoe.errors import ConfigError
from dsmoe.lab.benchmark.problem import SHIFT, Gate, Problem, check_load, quotas_of, routing_map, trace_routes


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("load", ["balanced", "real", "30:4"])
@pytest.mark.parametrize("experts", [8, 96])
def test_map_has_the_load_it_promises(load, experts, variable):
    problem = Problem(experts=experts, tokens=512, load=load)
    actual = routing_map(problem, variable)
    assert actual.sum() == problem.routes
    assert set(actual.sum(1).tolist()) == ({1, 2, 3} if variable else {2})
    assert actual.sum(0).tolist() == quotas_of(problem).tolist()


def test_shares_of_loads():
    assert quotas_of(Problem(experts=8, tokens=512)).tolist() == [128] * 8
    skewed = sorted(quotas_of(Problem(experts=64, tokens=5000, load="30:4")), reverse=True)
    assert skewed[:4] == [750] * 4
    assert max(skewed[4:]) - min(skewed[4:]) <= 1
    for experts in (8, 32, 1000):
        real = quotas_of(Problem(experts=experts, load="real"))
        assert real.sum() == 8192 and real.max() > real.mean()


def test_real_load_has_the_recorded_routes_where_experts_match():
    routes, share = trace_routes()
    actual = routing_map(Problem(experts=len(share), tokens=len(routes), k=routes.shape[1], load="real"), False)
    assert actual.sum() == routes.size
    assert all(actual[token, chosen].all() for token, chosen in enumerate(routes))


@pytest.mark.parametrize("experts", [8, 1024])
def test_gate_sends_tokens_where_the_map_says(experts):
    problem = Problem(experts=experts, tokens=512)
    map_TE, gate = routing_map(problem, variable=True), Gate.draw(problem)
    hidden_TH = gate.hidden_TH(map_TE)
    logits_TE = hidden_TH @ gate.weight_EH().t()
    assert torch.equal(logits_TE > 0, map_TE)
    chosen = logits_TE[map_TE]
    torch.testing.assert_close(chosen, torch.full_like(chosen, 20 * (1 - SHIFT)), atol=1e-3, rtol=0)
    assert 0.5 < hidden_TH.std() < 2


@pytest.mark.parametrize("load", ["99:1", "30:8", "hot", "0:3", "30:x"])
def test_impossible_loads_are_named(load):
    with pytest.raises(ConfigError, match="load"):
        check_load(Problem(experts=8, tokens=64, load=load))


def test_impossible_sizes_are_named():
    for wrong in (dict(experts=3, ranks=2), dict(k=9), dict(dtype="fp8"), dict(tokens=0)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Problem(**wrong).check()


def test_bytes_and_flops_of_a_problem():
    problem = Problem(experts=8, tokens=4096, hidden=256, ffn=512, k=2)
    assert problem.expert_flops() == 3 * 2 * 8192 * 3 * 256 * 512  # forward and twice backward, two flops a product
    weights = 8 * 3 * 256 * 512 * 4
    assert problem.streamed_bytes() == 5 * 8192 * 256 * 4 + 3 * weights
    assert Problem(experts=8, ranks=2, dtype="bf16").weight_bytes() == weights // 4
