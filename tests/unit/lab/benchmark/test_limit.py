"""The limit is the larger of all operations at the best measured rate and of all bytes at the copy's bandwidth."""

from __future__ import annotations

import pytest

from dsmoe.lab.benchmark.limit import COPY_BYTES, limit_of
from dsmoe.lab.benchmark.measure import Case
from dsmoe.lab.benchmark.problem import Problem


def case(name: str, flops: float = 0) -> Case:
    return Case(name, "limit", lambda: [], [], [], flops=flops)


CASES = [case("torch.mm fp32", 1e9), case("micro-kernel fp32", 4e9), case("copy"), case("dense SwiGLU")]


def limit(problem: Problem, copy_seconds: float) -> dict:
    seconds = {
        "torch.mm fp32": [0.01, 0.02, 0.01], "micro-kernel fp32": [0.02, 0.02, 0.9], "copy": [copy_seconds] * 3,
        "dense SwiGLU": [0.3] * 3,
    }  # fmt: skip
    return limit_of(CASES, seconds, problem)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_best_rate_counts_and_the_gate_is_work_too(ranks):
    problem = Problem(experts=8, tokens=100, hidden=16, ffn=32, k=2, ranks=ranks)
    actual = limit(problem, copy_seconds=1e-9)
    assert actual["best_product"] == "micro-kernel fp32" and actual["flops_per_second"] == 2e11
    flops = 18 * 200 * 16 * 32 + 6 * 100 * 8 * 16
    assert actual["seconds"] == actual["compute_seconds"] == pytest.approx(flops / ranks / 2e11)


def test_bytes_count_where_they_take_longer():
    problem = Problem(experts=8, tokens=100, hidden=16, ffn=32, k=2)
    actual = limit(problem, copy_seconds=2.0)
    assert actual["seconds"] == actual["stream_seconds"] == pytest.approx(problem.streamed_bytes() / COPY_BYTES)
