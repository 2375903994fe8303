"""Every router beside its reference: gates, routes, losses, gradients and ten controller updates on random shapes."""

from __future__ import annotations

import pytest
import reference
import torch
from harness import HIDDEN, Routers

CASES = {
    "relu": ("relu", {"k": 2, "lambda_initial": 0.1}, 6),
    "relu paper": ("relu", {"k": 1.5, "lambda_initial": 0.1, "form": "paper", "balance_scope": "global_batch"}, 5),
    "relu scaled": ("relu", {"k": 1, "lambda_initial": 0.1, "route_scale": 0.125}, 5),
    "relu plain": ("relu", {"k": 1, "lambda_initial": 0.1, "load_balanced": False}, 5),
    "topk": ("topk", {"k": 1, "z_coefficient": 1e-3}, 5),
    "topk renormalized": ("topk", {"k": 3, "renormalize": True, "balance_scope": "rank"}, 7),
    "topk after": ("topk", {"k": 2, "softmax": "after", "balance_scope": "global_batch"}, 4),
    "topk one expert": ("topk", {"k": 1}, 1),
    "topk_bias": ("topk_bias", {"k": 2, "sequence_coefficient": 0.1, "bias_update_rate": 0.02}, 6),
    "topk_bias groups": (
        "topk_bias",
        {"k": 3, "num_groups": 4, "groups_per_token": 2, "bias_update_rate": 0.05, "sequence_counts": "routes"},
        8,
    ),
    "topk_bias softmax": (
        "topk_bias",
        {"k": 1, "score": "softmax", "renormalize": False, "route_scale": 1, "num_groups": 3, "group_score_experts": 1},
        6,
    ),
    "top_p": ("top_p", {}, 7),
    "top_p reach": (
        "top_p",
        {"p": 0.8, "rule": "reach", "entropy_coefficient": 0.1, "balance_scope": "global_batch"},
        5,
    ),
    "top_p renormalized": ("top_p", {"p": 0.6, "renormalize": True}, 6),
    "top_p everything": ("top_p", {"p": 1.0}, 4),
    "top_p one expert": ("top_p", {}, 1),
    "dtop_p": ("dtop_p", {"k": 2, "kp": 0.3, "ki": 0.1, "entropy_coefficient": 0.05}, 6),
    "dtop_p wound up": ("dtop_p", {"k": 4.5, "kp": 0.5, "ki": 2.0, "p_initial": 0.3, "p_max": 0.9, "rule": "reach"}, 5),
    "expert_threshold": ("expert_threshold", {"k": 1.5, "warmup_steps": 3, "decay": 0.8}, 5),
    "expert_threshold free": ("expert_threshold", {"k": 1, "warmup_steps": 0, "decay": 0.9, "capacity_slack": None}, 4),
    "expert_threshold tight": ("expert_threshold", {"k": 2, "warmup_steps": 1, "decay": 0.9, "capacity_slack": 0.1}, 6),
    "aoe": ("aoe", {"k": 2, "rank": 3, "balance_coefficient": 0.1}, 6),
    "aoe selected": ("aoe", {"k": 3, "rank": 2, "gates": "selected", "latent": "recompute"}, 5),
    "routing_free": ("routing_free", {"rank": 4, "threshold": 2.5, "lambda_initial": 0.1, "target_density": 0.5}, 5),
    "routing_free capped": (
        "routing_free",
        {"rank": 3, "threshold": 0.5, "lambda_initial": 0.9, "lambda_rate": 0.3},
        4,
    ),
    "routing_free paper": (
        "routing_free",
        {
            "rank": 3,
            "threshold": 2.0,
            "lambda_initial": 0.5,
            "lambda_rate": 0.5,
            "form": "paper",
            "mu": 0.2,
            "balance_scope": "global_batch",
        },
        6,
    ),
    "expert_threshold one expert": ("expert_threshold", {"k": 1, "warmup_steps": 1, "decay": 0.5}, 1),
}
STEPS, MICRO_STEPS, LAYERS = 10, 2, 2


def random_batch(generator: torch.Generator, padded: bool):
    """Tokens of each layer [S, B, H], and which of them are padding: [S, B], in one case a whole sequence."""
    length, batch = (int(torch.randint(2, 5, (), generator=generator)) for _ in range(2))
    hidden = [torch.randn(length, batch, HIDDEN, generator=generator) for _ in range(LAYERS)]
    if not padded:
        return hidden, None
    mask = torch.rand(length, batch, generator=generator) < 0.4
    mask[:, 0] = batch > 2
    mask[0, 1] = False
    return hidden, mask


@pytest.mark.parametrize("case", CASES)
def test_router_is_its_reference(case):
    name, options, experts = CASES[case]
    routers = Routers(name, options, experts, LAYERS)
    options = routers.options
    state = reference.initial(name, options, LAYERS, experts)
    generator = torch.Generator().manual_seed(len(case) * 1000 + sum(map(ord, case)))
    for step in range(STEPS):
        routers.draw_weights(step + 100)
        routes, tokens, statistics = [[0] * experts for _ in range(LAYERS)], 0, []
        for micro in range(MICRO_STEPS):
            hidden, mask = random_batch(generator, padded=micro == 1)
            actual = [x.clone().requires_grad_() for x in hidden]
            decided, losses = routers.pass_through(actual, mask)
            layers, inputs, weights = expect(name, options, routers, state, hidden, mask, routes, tokens, step)
            compare(routers, decided, losses, actual, layers, inputs, weights, mask, generator)
            for layer in range(LAYERS):
                own = reference.counts_of(layers[layer].active, experts)
                routes[layer] = [a + b for a, b in zip(routes[layer], own, strict=True)]
            tokens += len(layers[0].active)
            statistics.append([layer.statistic for layer in layers])
        totals = routers.recorder.take()
        assert totals.counts_LE.tolist() == routes
        assert totals.tokens == tokens
        if routers.controller is not None:
            routers.controller.update(totals)
            state = reference.update(name, options, state, routes, tokens, statistics, step)
            assert state.keys() == routers.controller.state.keys()
            for key, value in state.items():
                expected = torch.tensor(value, dtype=torch.float64)
                torch.testing.assert_close(routers.controller.state[key].double(), expected, rtol=1e-5, atol=1e-6)
                # Routes of the next step are compared exactly, so both start it from the same state.
            state = {key: value.tolist() for key, value in routers.controller.state.items()}
    check_evaluation(name, routers, state, generator)


def expect(name, options, routers, state, hidden, mask, routes, tokens, updates, training=True):
    """The reference's layers, their inputs and their parameters, which carry the gradients."""
    layers, inputs, weights = [], [], []
    for index, router in enumerate(routers.layers):
        length, batch, _ = hidden[index].shape
        real = [(s, b) for s in range(length) for b in range(batch) if mask is None or not mask[s, b]]
        x = hidden[index].double().requires_grad_()
        own = {n: p.detach().double().requires_grad_() for n, p in router.named_parameters()}
        seen = reference.Batch([b for _, b in real], index, LAYERS, training, routes[index], tokens, updates)
        layers.append(reference.ROUTERS[name]([x[s, b] for s, b in real], own, options, state, seen))
        inputs.append(x)
        weights.append(own)
    reference.across_layers(name, options, state, layers)
    return layers, inputs, weights


def compare(routers, decided, losses, actual, layers, inputs, weights, mask, generator):
    expected_total, total = 0.0, 0.0
    for index, ((probs_TE, map_TE), layer) in enumerate(zip(decided, layers, strict=True)):
        assert probs_TE.dtype == torch.float32
        real_T = torch.ones(len(map_TE), dtype=torch.bool) if mask is None else ~mask.flatten()
        assert map_TE[real_T].tolist() == layer.active, f"layer {index}"
        assert not map_TE[~real_T].any()
        gates = [[torch.as_tensor(gate, dtype=torch.float64) for gate in row] for row in layer.gate]
        expected_TE = torch.stack([torch.stack(row) for row in gates])
        torch.testing.assert_close(probs_TE[real_T].double(), expected_TE, rtol=1e-5, atol=1e-6)
        assert not probs_TE[~real_T].any()
        coefficient_TE = torch.randn(probs_TE.shape, generator=generator)
        total = total + (coefficient_TE * probs_TE).sum()
        expected_total = expected_total + (coefficient_TE[real_T].double() * expected_TE).sum()
    names = {loss for layer in layers for loss in layer.losses}
    assert losses.keys() == names
    for loss in names:
        expected = sum(layer.losses[loss] for layer in layers if loss in layer.losses)
        assert float(losses[loss]) == pytest.approx(float(expected), rel=1e-5, abs=1e-9), loss
        total, expected_total = total + 10 * losses[loss], expected_total + 10 * expected
    parameters = [p for router in routers.layers for p in router.parameters()]
    expected_parameters = [p for own in weights for p in own.values()]
    unused = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(total, [*actual, *parameters], **unused)
    expected_grads = torch.autograd.grad(expected_total, [*inputs, *expected_parameters], **unused)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=2e-5)


def check_evaluation(name, routers, state, generator):
    """Evaluation routes by the same equations and leaves controller, weights and totals as they were."""
    before = routers.state()
    weights = [p.clone() for router in routers.layers for p in router.parameters()]
    hidden, mask = random_batch(generator, padded=True)
    for router in routers.layers:
        router.eval()
    with torch.no_grad():
        decided, losses = routers.pass_through(hidden, mask)
    empty = [[0] * routers.layers[0].num_experts for _ in range(LAYERS)]
    layers, *_ = expect(name, routers.options, routers, state, hidden, mask, empty, 0, STEPS, training=False)
    for (_, map_TE), layer in zip(decided, layers, strict=True):
        assert map_TE[~mask.flatten()].tolist() == layer.active
    assert losses == {}
    assert routers.recorder.take() is not None
    assert routers.recorder.take() is None
    for key, value in before.items():
        assert torch.equal(routers.controller.state[key], value), key
    for old, new in zip(weights, (p for router in routers.layers for p in router.parameters()), strict=True):
        assert torch.equal(old, new)
