"""The layout must not change the mathematics: one rank, expert parallel, expert and data parallel, every ZeRO stage.

Gradients are accumulated over two micro-steps; every router, with one: test_router_layouts.py.
"""

from __future__ import annotations

import functools

import pytest
from ranks import run_ranks
from steps import as_numbers, joined, tiny_config, train, train_each

ROUTERS = {
    "relu": {"name": "relu", "k": 1.0, "lambda_initial": 1e-2},
    "topk": {"name": "topk", "k": 2},
    "topk_bias": {"name": "topk_bias", "k": 2, "bias_update_rate": 0.05},  # moves by what all micro-steps counted
}
STAGES = (1, 2, 3)


@functools.cache
def trained(world: int, expert_parallel: int, stages: tuple[int, ...] = STAGES) -> dict[tuple[str, int], tuple]:
    """(router, ZeRO stage) -> history and whole tensors, and the histories of all ranks."""
    cases = {
        (router, stage): tiny_config(
            router=options, parallel={"expert_parallel": expert_parallel, "zero_stage": stage},
            training={"gradient_accumulation": 2},
        )
        for router, options in ROUTERS.items()
        for stage in stages
    }  # fmt: skip
    ranks = run_ranks(world, train_each, list(cases.values()), 3)
    histories = [[history for history, _ in case] for case in zip(*ranks, strict=True)]
    return dict(zip(cases, zip(joined(ranks), histories, strict=True), strict=True))


def test_rows_in_bf16_between_ranks_halve_the_traffic_and_nearly_keep_the_step():
    results = run_ranks(2, train_and_count, [tiny_config(
        router=ROUTERS["topk"], parallel={"expert_parallel": 2}, model={"moe_exchange_dtype": dtype}
    ) for dtype in ("model", "bf16")])  # fmt: skip
    (exact, row_bytes), (rounded, half) = results[0]
    assert half == row_bytes / 2 > 0
    for before, after in zip(exact, rounded, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-3)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=2e-3)
        assert after["grad_norm"] != before["grad_norm"]


def test_recomputed_experts_fetch_their_rows_again_but_send_nothing_home_again():
    results = run_ranks(2, train_and_count, [tiny_config(
        router=ROUTERS["topk"], parallel={"expert_parallel": 2}, model={"recompute": what}
    ) for what in ("none", "moe")])  # fmt: skip
    (kept, row_bytes), (recomputed, more) = results[0]
    # Out, home, and both gradients; out again. Sums in another order flip a route or two in five steps.
    assert more == pytest.approx(row_bytes * 5 / 4, rel=5e-3)
    for before, after in zip(kept, recomputed, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-5)


def train_and_count(configs) -> list[tuple[list[dict], int]]:
    """For each configuration its history, and the bytes of matrices given to all-to-all."""
    from dsmoe.moe import exchange

    actual, start = [], exchange.start_all_to_all
    for config in configs:
        matrices = []

        def counted(rows, send, receive, group, matrices=matrices):
            if rows.dim() == 2:
                matrices.append(rows.nbytes)
            return start(rows, send, receive, group)

        exchange.start_all_to_all = counted
        actual.append((train(config, 2)[0], sum(matrices)))
    exchange.start_all_to_all = start
    return actual


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("world", "expert_parallel"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("stage", STAGES)
def test_layout_and_zero_stage_change_nothing(router, world, expert_parallel, stage):
    (expected_history, expected), _ = trained(1, 1, (1,))[router, 1]
    (history, actual), (_, *others) = trained(world, expert_parallel)[router, stage]
    for before, after in zip(expected_history, history, strict=True):
        for quantity in ("loss", "router_loss", "grad_norm", "density"):
            assert after[quantity] == pytest.approx(before[quantity], abs=1e-5), quantity
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() <= 1e-5, name
    for other in others:
        for here, there in zip(as_numbers(history), as_numbers(other), strict=True):
            assert here["state"] == there["state"]  # bit-identical lambda and biases
