"""What a reference cannot show: nothing waits for the device, edge cases, causality, losses that know their ranks."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from harness import ALONE, HIDDEN, Routers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe.errors import RouterError
from dsmoe.routers import available, low_rank, scores
from dsmoe.routers.base import Routing
from dsmoe.routers.controllers import CutoffController, PIController
from dsmoe.routers.losses import balance_product, mean_over_tokens, sequence_balance_sum
from dsmoe.routers.recorder import Load, RoutingRecorder, RoutingTotals
from dsmoe.routers.top_p import map_by_sorting, top_p_map

OWN = ("relu", "topk", "topk_bias", "top_p", "dtop_p", "expert_threshold")
ALL = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_nothing_waits_for_the_device(monkeypatch, name, training):
    """A fake tensor has no values: whoever asks for one (.item(), nonzero, indexing by a mask) gets an exception."""
    monkeypatch.setattr(low_rank, "may_look", lambda tensor: False)  # as where values are on a device
    with FakeTensorMode():
        routers = Routers(name, {}, 4)
        for router in routers.layers:
            router.train(training)
        hidden = [torch.randn(5, 2, HIDDEN, requires_grad=True) for _ in routers.layers]
        for _ in range(3):
            decided, losses = routers.pass_through(hidden)
            sum((*losses.values(), *(probs.sum() for probs, _ in decided))).backward()
            totals = routers.recorder.take()
            if training and routers.controller is not None:
                routers.controller.update(totals)


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host must wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ALL)
def test_padding_waits_for_the_device_once_a_pass_and_counts_anew_in_each(name):
    routers, paddings = Routers(name, {}, 4), (torch.arange(6) >= 4, torch.arange(6) >= 1)
    hidden = [torch.randn(3, 2, HIDDEN) for _ in routers.layers]
    for padding in paddings:
        with Waits() as waits:
            decided, _ = routers.pass_through(hidden, padding.view(3, 2))
        assert waits.count == 1
        assert not any(routes[padding].any() for _, routes in decided)
        assert routers.recorder.take().tokens == (~padding).sum()


@pytest.mark.parametrize("name", OWN)
def test_a_bf16_model_routes_in_fp32(name):
    """The same bf16 tokens and weights: as if the model were fp32, to the bit."""
    half, full = Routers(name, {}, 6, dtype=torch.bfloat16), Routers(name, {}, 6)
    half.draw_weights(3)
    for router, other in zip(half.layers, full.layers, strict=True):
        other.load_state_dict({key: value.float() for key, value in router.state_dict().items()})
    hidden = [torch.randn(7, 2, HIDDEN).bfloat16() for _ in range(2)]
    found, losses = half.pass_through(hidden)
    expected, expected_losses = full.pass_through([x.float() for x in hidden])
    for (probs, routes), (other_probs, other_routes) in zip(found, expected, strict=True):
        assert probs.dtype == torch.float32
        assert torch.equal(probs, other_probs)
        assert torch.equal(routes, other_routes)
    assert losses == expected_losses


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_balance_loss_is_the_same_on_any_number_of_ranks_and_micro_steps(scope):
    """The mean over ranks and micro-steps of the parts; for the last micro-step f has seen the whole global batch."""
    generator = torch.Generator().manual_seed(1)
    ranks, micro_steps, tokens, experts = 3, 2, 5, 4
    score = torch.rand(micro_steps, ranks, tokens, experts, generator=generator, dtype=torch.float32)
    routes = torch.rand(score.shape, generator=generator) < 0.4
    for micro in range(micro_steps):
        seen = routes[: micro + 1] if scope == "global_batch" else routes[micro : micro + 1]
        here, counted = torch.tensor(ranks * tokens), torch.tensor(seen.numel() // experts)
        load = Load(seen.sum((0, 1, 2)), here, ranks, counted=counted)
        parts = torch.stack([balance_product(score[micro, rank].sum(0), load) for rank in range(ranks)])
        one_rank = Load(seen.sum((0, 1, 2)), here, 1, counted=counted)
        together = balance_product(score[micro].sum((0, 1)), one_rank)
        by_hand = experts * (seen.float().mean((0, 1, 2)) * score[micro].mean((0, 1))).sum()
        assert parts.mean() == pytest.approx(float(together), rel=1e-6)
        assert together == pytest.approx(float(by_hand), rel=1e-6)


def test_the_recorder_adds_up_the_global_batch_and_starts_anew_with_each_step():
    recorder, seen = RoutingRecorder(2, ALONE), []

    class Probe:
        def model_losses(self, routers, routings, loads):
            seen.append(loads[0])
            return {}

    class Decided:
        def __init__(self, routes):
            self.map_TE, self.statistic_E, self.kept = torch.tensor(routes, dtype=torch.bool), None, {}

    recorder.routers.append(Probe())
    passes = [[[1, 0], [1, 1]], [[0, 1]], [[1, 1]]]
    for index, routes in enumerate(passes):
        recorder.begin()
        recorder.record(0, Decided(routes), torch.tensor(len(routes)))
        recorder.finish()
        if index == 1:
            recorder.take()
    assert [load["global_batch"].counts_E.tolist() for load in seen] == [[2, 1], [2, 2], [1, 1]]
    assert [load["global_batch"].fraction_E().tolist() for load in seen] == [
        pytest.approx([1.0, 0.5]),
        pytest.approx([2 / 3, 2 / 3]),
        pytest.approx([1.0, 1.0]),
    ]
    assert [load["global_batch"].tokens.item() for load in seen] == [2, 1, 1]  # P is a mean over the micro-step
    assert [load["micro_batch"].counts_E.tolist() for load in seen] == [[2, 1], [0, 1], [1, 1]]


def test_weights_and_map_are_not_held_until_the_losses():
    """With many experts they would be what a forward pass keeps most of."""
    recorder, seen = RoutingRecorder(2, ALONE), []

    class Probe:
        def model_losses(self, routers, routings, loads):
            seen.extend(routings)
            return {}

    recorder.routers.append(Probe())
    recorder.begin()
    routing = Routing(torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), {"sum": torch.tensor(1.5)})
    held = weakref.ref(routing.probs_TE), weakref.ref(routing.map_TE)
    recorder.record(0, routing, torch.tensor(3))
    del routing
    assert [tensor() for tensor in held] == [None, None]
    recorder.finish()
    assert seen[0].kept["sum"] == 1.5
    with pytest.raises(RouterError, match=r"Routing.probs_TE is not held .* Routing.kept"):
        _ = seen[0].probs_TE


@pytest.mark.parametrize("used", [("probs",), ("sum",), ("probs", "sum")])
@pytest.mark.parametrize("tokens", [0, 7])
def test_relu_with_sums_has_the_gradients_of_plain_operators(tokens, used):
    logits, weights = torch.randn(2, tokens, 5, dtype=torch.float64)
    logits[:1, :2] = torch.tensor([0.0, -0.0])
    found, plain = (logits.clone().requires_grad_() for _ in range(2))
    probs, chosen, total = scores.relu_with_sums(found)
    assert torch.equal(chosen, logits > 0) and torch.equal(probs, logits.relu())
    expected = plain.relu()
    of_sum = torch.arange(5.0)
    mine = {"probs": (probs * weights).sum(), "sum": (total * of_sum).sum()}
    theirs = {"probs": (expected * weights).sum(), "sum": (expected.sum(0) * of_sum).sum()}
    for parts in (mine, theirs):
        sum(parts[name] for name in used).backward()
    torch.testing.assert_close(found.grad, plain.grad)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_products_of_any_dtypes(hidden_dtype, weight_dtype):
    hidden, weight = torch.randn(9, 16).to(hidden_dtype), torch.randn(4, 16).to(weight_dtype)
    found, plain = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    logits, expected = scores.fp32_logits(*found), F.linear(plain[0].float(), plain[1].float())
    assert torch.equal(logits, expected) and logits.dtype == torch.float32
    for results in (logits, expected):
        (results * torch.linspace(-1, 1, 4)).sum().backward()
    for mine, theirs in zip(found, plain, strict=True):
        assert torch.equal(mine.grad, theirs.grad) and mine.grad.dtype == mine.dtype


def test_sequence_balance_over_ranks_is_the_mean_over_sequences():
    score = torch.rand(4, 6, 5)  # sequences, tokens, experts
    routes = torch.rand(score.shape) < 0.5
    share = score / score.sum(-1, keepdim=True)
    by_hand = torch.stack([5 * (routes[s].float().mean(0) * share[s].mean(0)).sum() for s in range(4)]).mean()
    load = Load(routes.sum((0, 1)), torch.tensor(24), ranks=2)
    place = torch.arange(2).repeat_interleave(6)
    parts = [
        mean_over_tokens(sequence_balance_sum(score[own].flatten(0, 1), routes[own].flatten(0, 1), place, 2), load)
        for own in (slice(0, 2), slice(2, 4))
    ]
    assert sum(parts) / 2 == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("block", [7, 1 << 18])  # elements: a token at a time, and all at once
@pytest.mark.parametrize("used", [("softmax",), ("sum",), ("entropy",), ("softmax", "sum", "entropy")])
def test_shares_of_all_have_the_gradients_of_their_parts(monkeypatch, used, block):
    monkeypatch.setattr(scores, "BLOCK", block)
    logits = 3 * torch.randn(9, 5, dtype=torch.float64)
    logits[0, 0] = 2000.0  # the others underflow to a probability of 0
    weights = {"softmax": torch.randn(9, 5), "sum": torch.randn(5), "entropy": torch.tensor(0.7)}
    found, plain = (logits.clone().requires_grad_() for _ in range(2))
    shares = scores.chosen_shares(
        found, lambda P: torch.ones_like(P, dtype=torch.bool), renormalize=False, entropy=True
    )
    mine = {"softmax": shares.share_TE, "sum": shares.sum_E, "entropy": shares.entropy}
    softmax = plain.softmax(-1)
    theirs = {"softmax": softmax, "sum": softmax.sum(0), "entropy": -(softmax * plain.log_softmax(-1)).sum()}
    for parts in (mine, theirs):
        sum((parts[name] * weights[name]).sum() for name in used).backward()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name])
    torch.testing.assert_close(found.grad, plain.grad)


@pytest.mark.parametrize("block", [7, 1 << 18])
@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("used", [("gates",), ("sum",), ("gates", "sum")])
@pytest.mark.parametrize("tokens", [0, 9])
def test_the_largest_shares_have_the_gradients_of_plain_operators(monkeypatch, tokens, used, of_all, block):
    monkeypatch.setattr(scores, "BLOCK", block)
    logits = 3 * torch.randn(tokens, 5, dtype=torch.float64)
    logits[:1, 0] = 2000.0
    weights = {"gates": torch.randn(tokens, 2), "sum": torch.randn(5)}
    found, plain = (logits.clone().requires_grad_() for _ in range(2))
    gates, experts, total = scores.largest_shares(found, 2, of_all=of_all)
    softmax, largest = plain.softmax(-1), plain.topk(2, dim=-1)
    assert torch.equal(experts, largest.indices)
    mine = {"gates": gates, "sum": total}
    theirs = {"gates": softmax.gather(1, experts) if of_all else largest.values.softmax(-1), "sum": softmax.sum(0)}
    for parts in (mine, theirs):
        sum((parts[name] * weights[name]).sum() for name in used).backward()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name])
    torch.testing.assert_close(found.grad, plain.grad)


@pytest.mark.parametrize("block", [1, 1 << 18])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tokens", [0, 37])
def test_shares_have_the_gradients_of_plain_operators(monkeypatch, tokens, renormalize, scaled, block):
    monkeypatch.setattr(scores, "BLOCK", block)
    logits, weights = torch.randn(2, tokens, 6, dtype=torch.float64)
    scale = torch.tensor([1.7], dtype=torch.float64)
    sums = torch.randn(6, dtype=torch.float64)

    def choose(P):
        largest = P.amax(dim=-1, keepdim=True)
        return (P > 0.2) | (largest <= P)

    def plain(logits, scale):
        if scaled:
            centred = logits - logits.mean(dim=-1, keepdim=True)
            logits = scale * centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        P = logits.softmax(dim=-1)
        share = P * choose(P)
        if renormalize:
            share = share / share.sum(dim=-1, keepdim=True)
        return share, choose(P), P.sum(0), -(P * P.log()).sum()

    def ours(logits, scale):
        options = {"scale": scale, "epsilon": 1e-6} if scaled else {}
        return scores.chosen_shares(logits, choose, renormalize=renormalize, entropy=True, **options)

    found, expected = [], []
    for way, results in ((ours, found), (plain, expected)):
        inputs = [logits.clone().requires_grad_(), scale.clone().requires_grad_()]
        share, map_TE, sum_E, entropy = way(*inputs)
        loss = (share * weights).sum() + sum_E @ sums + 0.3 * entropy
        results += [share, map_TE, sum_E, entropy]
        results += torch.autograd.grad(loss, inputs[: 1 + scaled])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_shares_without_entropy_or_a_gradient_of_the_shares():
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    shares = scores.chosen_shares(logits, lambda P: P > 0.2, renormalize=False, entropy=False)
    assert shares.entropy is None
    (found,) = torch.autograd.grad(shares.sum_E[0], logits)
    (expected,) = torch.autograd.grad(logits.softmax(dim=-1).sum(0)[0], logits)
    torch.testing.assert_close(found, expected)


def test_shares_of_no_token():
    logits = torch.zeros(0, 5, requires_grad=True)
    shares = scores.chosen_shares(logits, lambda P: P > 0.5, renormalize=True, entropy=True)
    (shares.share_TE.sum() + shares.sum_E.sum() + shares.entropy).backward()
    assert logits.grad.shape == (0, 5) and shares.entropy == 0


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])  # of pairs with a gradient
@pytest.mark.parametrize("tokens", [0, 3, 700])
def test_latent_norms_have_the_gradients_of_kept_latents(monkeypatch, tokens, share, on_device):
    if on_device:
        monkeypatch.setattr(low_rank, "may_look", lambda tensor: False)
    hidden, reduce = (torch.randn(size, dtype=torch.float64) for size in ((tokens, HIDDEN), (6, 3, HIDDEN)))
    reduce[2] = 0  # norms of 0
    grad = torch.randn(tokens, 6) * (torch.rand(tokens, 6) < share)
    grad[:, 4] = 0  # an expert without any
    found, plain = ([x.clone().requires_grad_() for x in (hidden, reduce)] for _ in range(2))
    norms, own = low_rank.latent_norms(*found, (2, 3))
    expected = torch.linalg.vector_norm(torch.einsum("th,erh->ter", *plain), dim=-1)
    own_weights = torch.randn(3, 3, HIDDEN)
    torch.autograd.backward((norms, own), (grad, own_weights))
    torch.autograd.backward((expected, plain[1][2:5]), (grad, own_weights.double()))
    torch.testing.assert_close(norms, expected)
    assert torch.equal(own, reduce[2:5]) and own.data_ptr() == found[1][2].data_ptr()
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_latents_on_a_device_exist_for_some_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(low_rank, "ON_DEVICE", 100)
    shapes = []
    plain = low_rank._latents
    monkeypatch.setattr(low_rank, "_latents", lambda *args: shapes.append(plain(*args).shape) or plain(*args))
    sizes = (40, HIDDEN), (6, 3, HIDDEN)
    hidden, reduce = (torch.empty(size, device="meta", requires_grad=True) for size in sizes)
    low_rank.latent_norms(hidden, reduce, (0, 6))[0].sum().backward()
    assert shapes == 2 * [(5, 6, 3)] * 8  # forward, and again backward
    assert hidden.grad.shape == hidden.shape and reduce.grad.shape == reduce.shape


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("probs", "p", "rule", "expected"),
    [
        ([0.5, 0.25, 0.25, 0.0], 0.5, "above", [1, 1, 0, 0]),  # 0.5 is not more than 0.5; of a tie, the first
        ([0.5, 0.25, 0.25, 0.0], 0.5, "reach", [1, 0, 0, 0]),
        ([0.25, 0.5, 0.25, 0.0], 0.49, "above", [0, 1, 0, 0]),  # the expert that crosses is kept
        ([0.7, 0.1, 0.1, 0.1], 1e-9, "reach", [1, 0, 0, 0]),
        ([0.7, 0.1, 0.1, 0.1], 0.0, "reach", [1, 0, 0, 0]),  # never none
        ([1.0, 0.0, 0.0, 0.0], 1.0, "above", [1, 1, 1, 1]),
        ([1.0, 0.0, 0.0, 0.0], 1.0, "reach", [1, 1, 1, 1]),
        ([1.0, 0.0, 0.0, 0.0], 0.999, "above", [1, 0, 0, 0]),
    ],
)
def test_top_p_edges(probs, p, rule, expected, as_tensor):
    found = top_p_map(torch.tensor([probs]), torch.tensor(p) if as_tensor else p, rule)
    assert found.int().tolist() == [expected]


def test_top_p_with_a_mass_that_rounding_keeps_below_p():
    """64 equal shares summed in fp32 may end below 1; the token must not fall back to all experts for that."""
    probs = torch.full((1, 63), 1 / 63)
    largest_below_one = 1 - 2**-24
    assert top_p_map(probs, 0.4, "above").sum() == 26
    assert 62 <= top_p_map(probs, largest_below_one, "above").sum() <= 63
    assert top_p_map(probs, 1.0, "above").sum() == 63


def test_top_p_on_no_token():
    assert top_p_map(torch.empty(0, 4), 0.4, "above").shape == (0, 4)


@pytest.mark.parametrize("rule", ["above", "reach"])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_looking_at_the_largest_first_finds_what_sorting_finds(p, rule):
    """Sharp and flat tokens, ties where the mass crosses p, and what is not a number."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 96, generator=generator) * torch.logspace(-1, 1.5, 200).unsqueeze(1)
    tied = logits.mul(2).round().div(2)
    odd = torch.full((3, 96), 1 / 96)
    odd[0, 5], odd[1, :] = float("nan"), 0.0
    for probs in (logits.softmax(-1), tied.softmax(-1), odd, logits[:0].softmax(-1)):
        for found in (top_p_map(probs, p, rule), top_p_map(probs, torch.tensor(p), rule)):
            assert torch.equal(found, map_by_sorting(probs, p, rule))


def test_the_bias_selects_but_never_weighs():
    routers = Routers("topk_bias", {"k": 2, "route_scale": 1.0, "sequence_coefficient": 0.0}, 4, layers=1)
    routers.draw_weights(0)
    routers.controller.state["bias"][0, 3] = 100.0
    hidden = torch.randn(6, 1, HIDDEN, requires_grad=True)
    [(probs, routes)], losses = routers.pass_through([hidden])
    assert losses == {}
    assert routes[:, 3].all()
    score = routers.layers[0].gating(hidden.flatten(0, 1)).sigmoid() * routes
    assert torch.allclose(probs, score / score.sum(1, keepdim=True))


def test_bias_stays_where_loads_are_equal():
    controller = Routers("topk_bias", {"k": 2}, 3, layers=1).controller
    totals = RoutingTotals(torch.tensor([[2**40, 2**40 + 1, 2**40 - 1]]), torch.tensor(1), torch.tensor([0]))
    controller.update(totals)  # one route in 2^40 decides: more than fp32 can tell apart
    assert controller.state["bias"].tolist() == [[0.0, pytest.approx(-1e-3), pytest.approx(1e-3)]]


def test_p_comes_back_at_once_after_saturation():
    controller = PIController(0.5, kp=0.0, ki=0.1, target_density=0.5, p_min=0.0, p_max=1.0)

    def step(density):
        controller.update(RoutingTotals(torch.tensor([[int(density * 100)]]), torch.tensor(100), torch.tensor([0])))
        return controller.value.item()

    assert [step(0.0) for _ in range(50)][-1] == 1.0
    assert step(1.0) < 1.0


def test_expert_threshold_warms_up_with_equal_loads_and_then_decides_alone():
    options = {"k": 2, "warmup_steps": 2, "decay": 0.5, "capacity_slack": None}
    routers = Routers("expert_threshold", options, 4, layers=1)
    routers.draw_weights(0)
    router = routers.layers[0]
    for _ in range(2):
        [(_, routes)], _ = routers.pass_through([torch.randn(6, 2, HIDDEN)])
        assert routes.sum(0).tolist() == [6, 6, 6, 6]
        routers.controller.update(routers.recorder.take())
    router.eval()
    hidden = torch.randn(6, 2, HIDDEN)
    [(probs, routes)], _ = routers.pass_through([hidden])
    for token in range(12):  # a token's route depends on no other token
        [(alone, _)], _ = routers.pass_through([hidden.flatten(0, 1)[token].view(1, 1, HIDDEN)])
        assert torch.allclose(alone[0], probs[token])
    assert not routes.sum(0).eq(6).all()
    routers.recorder.take()
    router.train()
    [(_, trained)], _ = routers.pass_through([hidden])
    assert torch.equal(trained, routes)


@pytest.mark.parametrize("slack", [0.0, 0.25, 0.5])
def test_expert_threshold_keeps_loads_within_the_slack_in_training(slack):
    options = {"k": 2, "warmup_steps": 0, "decay": 0.0, "capacity_slack": slack}
    routers = Routers("expert_threshold", options, 4, layers=1)
    routers.draw_weights(0)
    for scale in (1.0, 5.0, 0.1, -3.0):
        [(_, routes)], _ = routers.pass_through([scale * torch.randn(8, 2, HIDDEN) + 1])
        loads = routes.sum(0)
        assert (loads >= 8 * (1 - slack)).all()
        assert (loads <= 8 * (1 + slack)).all()
        routers.controller.update(routers.recorder.take())


def test_expert_threshold_with_nothing_but_padding_keeps_its_cutoffs():
    routers = Routers("expert_threshold", {"k": 2, "warmup_steps": 0, "decay": 0.5}, 4, layers=1)
    routers.draw_weights(0)
    routers.pass_through([torch.randn(6, 2, HIDDEN)])
    routers.controller.update(routers.recorder.take())
    cutoff = routers.controller.value_E(0).clone()
    [(probs, _)], _ = routers.pass_through([torch.randn(6, 2, HIDDEN)], torch.ones(6, 2, dtype=torch.bool))
    assert not probs.any()
    routers.controller.update(routers.recorder.take())
    assert torch.allclose(routers.controller.value_E(0), cutoff)


def test_a_restored_cutoff_controller_knows_its_updates_on_the_host():
    first, second = CutoffController(1, 2, decay=0.9), CutoffController(1, 2, decay=0.9)
    for value in (1.0, 2.0, 4.0):
        statistic = torch.full((1, 2), 2 * value)  # summed over two passes
        first.update(RoutingTotals(torch.ones(1, 2), torch.tensor(1), torch.zeros(1), statistic, passes=2))
    second.load({name: value.clone() for name, value in first.state.items()})
    assert second.updates == 3
    assert torch.equal(second.value_E(0), first.value_E(0))
    average = (0.9**2 * 1 + 0.9 * 2 + 4) * 0.1
    assert second.value_E(0).tolist() == pytest.approx([average / (1 - 0.9**3)] * 2)
