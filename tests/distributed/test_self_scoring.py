"""Where A lies and how a latent reaches its expert must not change the numbers of self-scoring experts."""

from __future__ import annotations

import functools

import pytest
from ranks import run_ranks
from steps import tiny_config, train, whole_tensors

ROUTERS = {
    "routing_free": {"name": "routing_free", "rank": 8, "rescale": True, "lambda_initial": 1e-2},
    "aoe": {"name": "aoe", "rank": 8, "k": 2, "balance_coefficient": 1e-2},
}
OTHERS = [{"latent": "send"}, {"latent": "recompute"}, {"placement": "sharded"}]


def run(router: str, world: int, stage: int, **options):
    plan = {"expert_parallel": world, "zero_stage": stage}
    results = run_ranks(world, train, tiny_config(router={**ROUTERS[router], **options}, parallel=plan), 3)
    return results[0][0], whole_tensors([owned for _, owned in results])


@functools.cache
def one_rank(router: str):
    return run(router, world=1, stage=1)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("options", OTHERS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("stage", [2, 3])
def test_placement_and_latent_change_nothing(router, options, stage):
    expected_history, expected = one_rank(router)
    history, actual = run(router, world=2, stage=stage, **options)
    for before, after in zip(expected_history, history, strict=True):
        for quantity in ("loss", "router_loss", "grad_norm", "density"):
            assert after[quantity] == pytest.approx(before[quantity], abs=1e-5), quantity
    assert actual.keys() == expected.keys()  # canonical names: a checkpoint does not know the placement
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() <= 1e-5, name
