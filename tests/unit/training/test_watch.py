"""Loss spikes, collapsing routers and slow links are seen in time, and nothing else is."""

from __future__ import annotations

import random

import pytest
import torch

from dsmoe.routers.recorder import RoutingTotals
from dsmoe.training.watch import ExchangeWatch, LossSpikes, RoutingWatch

TOKENS = 1000


def totals_of(counts: list[list[float]], without: list[int] | None = None) -> RoutingTotals:
    counts_LE = torch.tensor(counts).round().long()
    actual = RoutingTotals.__new__(RoutingTotals)
    object.__setattr__(actual, "counts_LE", counts_LE)
    object.__setattr__(actual, "tokens", torch.tensor(TOKENS))
    object.__setattr__(actual, "without_expert_L", torch.tensor(without or [0] * len(counts)))
    return actual


def first_warning(at_step, steps: int = 60) -> tuple[int, list[str]] | None:
    watch = RoutingWatch()
    for step in range(1, steps + 1):
        if warnings := watch.see(at_step(step), step):
            return step, warnings
    return None


EVEN = [TOKENS / 8] * 8
COLLAPSES = {
    "one expert takes all": lambda step: totals_of([EVEN, [980] + [20 / 7] * 7 if step >= 20 else EVEN]),
    "one pair of experts takes all": lambda step: totals_of([EVEN, [1000, 1000] + [0] * 6 if step >= 20 else EVEN]),
    "a dead layer": lambda step: totals_of([EVEN, [0] * 8 if step >= 20 else EVEN], [0, TOKENS * (step >= 20)]),
    "density runs away": lambda step: totals_of([EVEN, [TOKENS / 8 * 1.12 ** max(0, step - 20)] * 8]),
}


@pytest.mark.parametrize("case", COLLAPSES)
def test_a_collapse_is_seen_within_20_steps_and_its_layer_named(case):
    step, warnings = first_warning(COLLAPSES[case])
    assert 20 < step <= 40
    assert len(warnings) == 1 and warnings[0].startswith("MoE layer 1: ")


def noisy(k: int, experts: int = 8):
    rng = random.Random(0)

    def at_step(step):
        weights = [rng.uniform(0.2, 2.0) for _ in range(experts)]
        return totals_of([[TOKENS * k * w / sum(weights) for w in weights]])

    return at_step


HEALTHY = {
    "an uneven load": noisy(1),
    "top-2": noisy(2),
    "all experts": lambda step: totals_of([[TOKENS] * 8]),
    "one expert": lambda step: totals_of([[TOKENS]]),
    "two experts": lambda step: totals_of([[700, 300]]),
    "sparser and sparser": lambda step: totals_of([[TOKENS * max(0.125, 0.95**step)] * 8]),
    "a short peak": lambda step: totals_of([[900] + [100 / 7] * 7 if step in (30, 31) else EVEN]),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_healthy_routing_gives_no_warning(case):
    assert first_warning(HEALTHY[case], 200) is None


def test_a_warning_comes_again_after_a_hundred_steps():
    watch, counts = RoutingWatch(), totals_of([[TOKENS] + [0] * 7])
    warned = [step for step in range(1, 251) if watch.see(counts, step)]
    assert warned == [10, 110, 210]


def losses(steps: int) -> list[float]:
    rng = random.Random(1)
    return [4 - 2 * step / steps + rng.gauss(0, 0.05) for step in range(steps)]


def test_a_loss_spike_is_seen_and_does_not_become_the_rule():
    spikes = LossSpikes()
    assert [spikes.see(loss) for loss in losses(300)] == [None] * 300
    for _ in range(5):
        assert spikes.see(4.5) < 4.5
    assert spikes.see(2.0) is None


def test_the_first_losses_are_no_spikes():
    spikes = LossSpikes()
    assert [spikes.see(loss) for loss in (1.0, 9.0, 2.0)] == [None] * 3


def test_a_link_that_becomes_slow_is_seen_once():
    watch = ExchangeWatch()
    assert not any(watch.see(0.05 + 0.02 * (step % 3), step) for step in range(1, 50))
    warnings = [watch.see(0.6, step) for step in range(50, 60)]
    assert sum(text is not None for text in warnings) == 1 and warnings.index(next(filter(None, warnings))) < 5
    assert "60% of a step" in next(filter(None, warnings))


def test_a_short_wait_or_a_small_share_is_no_slow_link():
    watch = ExchangeWatch()
    shares = [0.05] * 40 + [0.9] + [0.05] * 20
    assert not any(watch.see(share, step) for step, share in enumerate(shares))
    watch = ExchangeWatch()
    assert not any(watch.see(share, step) for step, share in enumerate([0.001] * 40 + [0.05] * 40))
