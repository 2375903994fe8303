"""Gradients that DeepSpeed need not copy are the gradients that it copies."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from ranks import run_ranks
from steps import joined, tiny_config, train_each

from dsmoe.optim.deepspeed import _blocks

BUCKETS = [1, 1 << 19]  # each gradient reduced where it lies; several copied together
CASES = [*product([1, 2], BUCKETS, [1, 2]), (3, 1 << 19, 2)]  # ZeRO stage, bucket, micro-steps


@functools.cache
def both_ways(expert_parallel: int):
    configs = [
        tiny_config(
            router={"name": "topk", "k": 2},
            parallel={"expert_parallel": expert_parallel, "zero_stage": stage},
            training={"gradient_accumulation": accumulation},
            deepspeed={"zero_optimization": {"reduce_bucket_size": bucket}},
        )
        for stage, bucket, accumulation in CASES
    ]
    ours, plain = zip(*run_ranks(2, train_both_ways, configs), strict=True)
    return joined(ours), joined(plain)


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_a_run_that_spares_copies_is_deepspeeds(expert_parallel, case):
    (history, actual), (expected_history, expected) = (way[case] for way in both_ways(expert_parallel))
    for step, wanted in zip(history, expected_history, strict=True):
        assert step["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def train_both_ways(configs):
    from dsmoe.training import engine

    ours, spare = train_each(configs, 3), engine.spare_copies
    engine.spare_copies = lambda *args: None
    plain = train_each(configs, 3)
    engine.spare_copies = spare
    return ours, plain


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 10_000])
def test_the_norm_of_blocks_is_the_norm(size):
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e3
    assert _blocks(gradient).norm().item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)
    gradient._zero_padding = True
    assert _blocks(gradient)._zero_padding
