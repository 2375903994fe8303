"""Clocks and counters against work whose cost is known."""

from __future__ import annotations

import torch
from torch import nn

from dsmoe.lab.benchmark.measure import Case, count, interleave, map_blocks_one_by_one, peak_growth


def sleeping(name: str, clock: list[float], cost) -> Case:
    """A case that moves a clock of our own."""

    def forward() -> list:
        clock[0] += cost() if callable(cost) else cost
        return []

    return Case(name, "ours", forward, [], [])


def test_rounds_are_interleaved_and_start_with_another_case_each_time():
    clock = [0.0]
    cases = [sleeping("a", clock, 1.0), sleeping("b", clock, 2.0), sleeping("c", clock, 3.0)]
    actual = interleave(cases, budget=0, least=3, warm_up=1, clock=lambda: clock[0])
    assert actual.order == ["b", "c", "a", "c", "a", "b", "a", "b", "c"]  # the warm-up began with "a"
    assert actual.seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}


def test_a_machine_that_slows_down_hurts_all_cases_alike():
    clock = [0.0]
    cases = [sleeping(name, clock, lambda: 1 + clock[0] / 100) for name in "ab"]
    actual = interleave(cases, budget=0, least=8, warm_up=0, clock=lambda: clock[0])
    first, second = (sum(actual.seconds[name]) for name in "ab")
    assert abs(first / second - 1) < 0.01 < actual.seconds["a"][-1] / actual.seconds["a"][0] - 1


def test_the_budget_ends_the_rounds():
    clock = [0.0]
    actual = interleave([sleeping("a", clock, 1.0)], budget=20, least=3, most=50, warm_up=1, clock=lambda: clock[0])
    assert 19 <= len(actual.seconds["a"]) <= 21


def test_a_very_slow_case_stops_after_three_rounds():
    clock = [0.0]
    cases = [sleeping("quick", clock, 1.0), sleeping("slow", clock, 15.0)]
    actual = interleave(cases, budget=0, least=7, warm_up=1, clock=lambda: clock[0])
    assert (len(actual.seconds["quick"]), len(actual.seconds["slow"])) == (7, 3)


def test_peak_counts_what_is_alive_at_once_and_not_what_was_there():
    size = 32 << 20
    before = torch.ones(size, dtype=torch.uint8)  # noqa: F841  (must not count)

    def forward() -> list:
        one = torch.ones(size, dtype=torch.uint8)
        two = torch.ones(size, dtype=torch.uint8)
        del one
        three = torch.ones(size, dtype=torch.uint8)
        return [two, three]

    map_blocks_one_by_one()
    assert abs(peak_growth(Case("x", "ours", forward, [], [])) / size - 2) < 0.15


def test_waits_of_the_host_are_counted_forward_and_backward():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x.sum().item()

        @staticmethod
        def backward(ctx, grad):
            grad.sum().item()
            return grad

    def forward(x) -> list:
        mask = x > 0
        y = Waits.apply(x[mask])  # a mask as an index, then .item()
        torch.tensor([1, 2]).tolist()
        x.detach().nonzero()
        return [y.sum()]

    leaf = torch.ones(4, requires_grad=True)
    counts = count(Case("x", "ours", forward, [leaf], [None]))
    assert counts.host_syncs == 6  # the gradient of x[mask] needs the mask's places again
    assert counts.sent_bytes == 0


def test_a_case_without_waits_counts_none():
    layer = nn.Linear(4, 4)
    leaf = torch.ones(2, 4, requires_grad=True)
    case = Case("x", "ours", lambda x: [layer(x)], [leaf], [torch.ones(2, 4)], list(layer.parameters()))
    assert count(case).host_syncs == 0
    assert leaf.grad is None and layer.weight.grad is None  # cleared again
