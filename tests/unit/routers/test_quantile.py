"""Quantiles from integer counts, and the three ways routers use them: whatever the layout, to the bit."""

from __future__ import annotations

import pytest
import torch
from harness import HIDDEN, Routers

from dsmoe.routers.histogram import Histogram

EXPERTS = 6
METHODS = {
    "topk_bias": {"k": 2, "bias_update": "quantile", "sequence_coefficient": 0.0},
    "expert_threshold": {"k": 2, "cutoffs": "global", "warmup_steps": 0, "capacity_slack": None, "decay": 0.5},
    "quantile": {"k": 2, "decay": 0.5},
}


def skewed(tokens: int, seed: int = 1) -> list[torch.Tensor]:
    """Tokens with a common direction, so that some experts are in demand."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(HIDDEN, generator=generator)
    return [torch.randn(tokens, 1, HIDDEN, generator=generator) + common for _ in range(2)]


def drawn_routers(name: str, options: dict | None = None) -> Routers:
    routers = Routers(name, METHODS[name] if options is None else options, EXPERTS)
    routers.draw_weights(0)
    return routers


def step(routers: Routers, hidden: list[torch.Tensor], parts: int = 1) -> torch.Tensor:
    """One optimizer step in as many micro-steps; routes per expert [L, E]."""
    for part in zip(*(x.chunk(parts) for x in hidden), strict=True):
        routers.pass_through(list(part))
    totals = routers.recorder.take()
    routers.controller.after_step(totals)
    return totals.counts_LE


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.875, 1.0])
def test_a_quantile_is_right_within_a_bin_and_interpolated(share):
    values = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)).square()
    histogram = Histogram(0.0, 1.0, bins=100)
    actual = histogram.quantile(histogram.count(values).unsqueeze(0), share)[0]
    torch.testing.assert_close(actual, values.quantile(share, dim=0), atol=0.011, rtol=0)
    if 0 < share < 1:
        below = (values < actual).float().mean(0)
        torch.testing.assert_close(below, torch.full((3,), share), atol=0.01, rtol=0)


def test_what_lies_outside_counts_at_the_ends_and_every_token_counts():
    counts = Histogram(-1.0, 1.0, bins=4).count(torch.tensor([[-5.0, 0.1], [5.0, 0.1], [0.9, -0.2]]))
    assert counts.tolist() == [[1, 0, 0, 2], [0, 1, 2, 0]] and counts.dtype == torch.int64


@pytest.mark.parametrize("name", METHODS)
def test_how_a_batch_is_cut_does_not_change_the_controller(name):
    states = []
    for parts in (1, 2, 3):
        routers = drawn_routers(name)
        for seed in range(3):
            step(routers, skewed(60, seed), parts)
        states.append(routers.state())
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in state)


@pytest.mark.parametrize("name", METHODS)
def test_loads_become_equal_within_a_few_steps(name):
    routers, hidden = drawn_routers(name), skewed(4000)
    first = step(routers, hidden).float()
    for _ in range(8):
        last = step(routers, hidden).float()
    imbalance = [(counts.amax(1) / counts.mean(1)).max().item() for counts in (first, last)]
    assert imbalance[0] > 1.5 or name == "expert_threshold"  # whose first step is Expert Choice
    assert imbalance[1] < 1.03, imbalance
    assert last.sum(1).tolist() == pytest.approx([2 * 4000] * 2, rel=0.01)  # k experts per token


def test_a_bias_by_sign_is_not_there_yet():
    routers, hidden = drawn_routers("topk_bias", {"k": 2, "sequence_coefficient": 0.0}), skewed(4000)
    for _ in range(9):
        counts = step(routers, hidden).float()
    assert (counts.amax(1) / counts.mean(1)).max() > 1.5


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_counts_nothing_and_padding_moves_nothing(name):
    routers = drawn_routers(name)
    step(routers, skewed(60))
    before = routers.state()
    for router in routers.layers:
        router.eval()
    with torch.no_grad():
        routers.pass_through(skewed(60, 5))
    assert routers.recorder.take().histogram_LEB is None
    for router in routers.layers:
        router.train()
    hidden = [torch.cat((x, 100 * torch.ones(30, 1, HIDDEN))) for x in skewed(60, 2)]
    padding = torch.arange(90).unsqueeze(1) >= 60
    padded, plain = drawn_routers(name), drawn_routers(name)
    padded.pass_through(hidden, padding)
    padded.controller.after_step(padded.recorder.take())
    step(plain, skewed(60, 2))
    assert all(torch.equal(value, plain.state()[key]) for key, value in padded.state().items())
    assert all(torch.equal(value, before[key]) for key, value in routers.state().items())


def test_gates_of_a_quantile_router_are_sigmoids_with_the_gradient_of_plain_operators():
    routers = drawn_routers("quantile")
    step(routers, skewed(60))
    (hidden, _), router = skewed(20), routers.layers[0]
    hidden.requires_grad_()
    routers.recorder.begin()
    probs_TE, map_TE = router(hidden)
    logits_TE = torch.nn.functional.linear(hidden.flatten(0, 1), router.weight)
    assert torch.equal(map_TE, logits_TE >= routers.controller.value_E(0)) and 0 < map_TE.sum() < map_TE.numel()
    torch.testing.assert_close(probs_TE, logits_TE.sigmoid() * map_TE)
    actual, expected = (torch.autograd.grad(x.square().sum(), (hidden, router.weight)) for x in
                       (probs_TE, logits_TE.sigmoid() * map_TE))  # fmt: skip
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
