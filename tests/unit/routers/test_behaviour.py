"""What a reference cannot show: nothing waits for the device, edge cases, causality, losses that know their ranks."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from harness import ALONE, HIDDEN, Routers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe import native
from dsmoe.errors import RouterError
from dsmoe.routers import available, get, logits, low_rank, scores
from dsmoe.routers.base import Routing
from dsmoe.routers.controllers import CutoffController, PIController
from dsmoe.routers.logits import fp32_logits
from dsmoe.routers.losses import balance_product, mean_over_tokens, sequence_balance_sum, sum_by_sequence
from dsmoe.routers.recorder import Load, RoutingRecorder, RoutingTotals
from dsmoe.routers.top_p import TopPOptions, map_by_sorting, top_p_map, top_p_softmax
from dsmoe.routers.topk import top_k_softmax

OWN = ("relu", "topk", "topk_bias", "top_p", "dtop_p", "expert_threshold")
ALL = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_nothing_waits_for_the_device(monkeypatch, name, training):
    """A fake tensor has no values: whoever asks for one (.item(), nonzero, indexing by a mask) gets an exception."""
    for module in (low_rank, scores):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)  # as where values are on a device
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
    actual, losses = half.pass_through(hidden)
    expected, expected_losses = full.pass_through([x.float() for x in hidden])
    for (probs, routes), (other_probs, other_routes) in zip(actual, expected, strict=True):
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

    recorder.routers.append(Probe())
    passes = [[[1, 0], [1, 1]], [[0, 1]], [[1, 1]]]
    for index, routes in enumerate(passes):
        recorder.begin()
        map_TE = torch.tensor(routes, dtype=torch.bool)
        recorder.record(0, Routing(map_TE.float(), map_TE), torch.tensor(len(routes)))
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
    assert seen[0].loss_inputs["sum"] == 1.5
    with pytest.raises(RouterError, match=r"Routing.probs_TE is not retained .* Routing.loss_inputs"):
        _ = seen[0].probs_TE


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_products_of_any_dtypes(hidden_dtype, weight_dtype):
    hidden, weight = torch.randn(9, 12).to(hidden_dtype), torch.randn(4, 12).to(weight_dtype)
    actual, plain = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    made, expected = fp32_logits(*actual), F.linear(plain[0].float(), plain[1].float())
    assert torch.equal(made, expected) and made.dtype == torch.float32
    for results in (made, expected):
        (results * torch.linspace(-1, 1, 4)).sum().backward()
    for mine, theirs in zip(actual, plain, strict=True):
        assert torch.equal(mine.grad, theirs.grad) and mine.grad.dtype == mine.dtype


def test_sequence_balance_over_ranks_is_the_mean_over_sequences():
    score = torch.rand(4, 6, 5)  # sequences, tokens, experts
    routes = torch.rand(score.shape) < 0.5
    share = score / score.sum(-1, keepdim=True)
    by_hand = torch.stack([5 * (routes[s].float().mean(0) * share[s].mean(0)).sum() for s in range(4)]).mean()
    load = Load(routes.sum((0, 1)), torch.tensor(24), ranks=2)
    place, parts = torch.arange(2).repeat_interleave(6), []
    for own in (slice(0, 2), slice(2, 4)):
        shares = sum_by_sequence(place, 2, score[own].flatten(0, 1), 1 / score[own].flatten(0, 1).sum(-1))
        counts = sum_by_sequence(place, 2, routes[own].flatten(0, 1).float())
        parts.append(mean_over_tokens(sequence_balance_sum(shares, counts, torch.tensor([6.0, 6.0])), load))
    assert sum(parts) / 2 == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 31, 100])
@pytest.mark.parametrize(("experts", "hidden"), [(8, 16), (40, 48), (264, 32)])
def test_the_kernel_of_a_bf16_gate_is_a_product_in_fp64(tokens, experts, hidden, threads):
    if native.unavailable():
        pytest.skip("no C++ kernels here")
    rows, weight = torch.randn(tokens, hidden).bfloat16(), torch.randn(experts, hidden).bfloat16()
    actual = logits._products(rows, weight)
    torch.testing.assert_close(actual, fp32_logits(rows, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.double(), rows.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)


RULES = {
    "topk": ("topk", {"k": 2, "z_coefficient": 1e-3}),
    "topk after": ("topk", {"k": 3, "softmax": "after"}),
    "topk_bias": ("topk_bias", {"k": 2}),
    "topk_bias routes": ("topk_bias", {"k": 2, "sequence_counts": "routes", "score": "softmax"}),
    "relu": ("relu", {}),
    "top_p": ("top_p", {"p": 0.5}),
    "top_p renormalized": ("top_p", {"p": 0.5, "renormalize": True}),
    "dtop_p": ("dtop_p", {}),
    "aoe": ("aoe", {"rank": 4}),
    "routing_free": ("routing_free", {"rank": 4, "threshold": 0.9}),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_do_what_the_rule_does_with_all_at_once(monkeypatch, rule, dtype, whole):
    """11 tokens in blocks of 2, a gate with more experts than H: of a bf16 model its logits are made again."""
    name, options = RULES[rule]
    made = {}
    for block in (20, 1 << 20):
        monkeypatch.setattr(scores, "BLOCK", block)
        routers = Routers(name, options, 10, layers=1, dtype=dtype)
        routers.draw_weights(1)
        torch.manual_seed(4)
        hidden = torch.randn(11, 1, HIDDEN).to(dtype).requires_grad_()
        routers.recorder.begin()
        probs, routes = routers.layers[0](hidden)[:2]
        losses = routers.recorder.finish()
        flat = (routes.t().nonzero() @ torch.tensor([1, 10])).view(-1)
        used = probs.flatten()[flat] if whole else scores.weights_at(probs, flat)
        loss = used @ torch.linspace(-1, 1, len(flat)) + 10 * sum(losses.values())
        parameters = [hidden, *routers.layers[0].parameters()]
        made[block] = probs, routes, loss, *torch.autograd.grad(loss, parameters)
    tight = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    for actual, expected in zip(*made.values(), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, **tight)


def summed(scores_tE, place, saved_selection, factor):
    """A routing function with every output: weights, sums with and without a gradient, values per token, a selection
    and a parameter."""
    expert_t = scores_tE.argmax(1) if saved_selection is None else saved_selection
    map_tE = scores.map_of(expert_t.unsqueeze(1), scores_tE)
    weights = factor * scores_tE.square().masked_fill(~map_tE, 0)
    sums = {"cubes": scores_tE.pow(3).sum(0), "places": torch.arange(99)[place].sum() if len(scores_tE) else 0 * factor}
    return scores.Decision(weights, map_tE, sums, {"sines": scores_tE.sin().sum(1)}, expert_t)


@pytest.mark.parametrize("used", [("weights",), ("cubes",), ("sines",), ("weights", "sines"), ("weights", "cubes")])
@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("gate", [False, True])
def test_any_part_of_a_decision_alone_has_the_gradient_of_plain_operators(monkeypatch, used, tokens, gate):
    monkeypatch.setattr(scores, "BLOCK", 12)
    source, weight = torch.randn(tokens, 4 if gate else 6), torch.randn(6, 4) if gate else None
    factor, of_weights = torch.tensor(1.5), torch.randn(tokens, 6)
    results = []
    for way in ("blocks", "plain"):
        leaves = [x.clone().requires_grad_() for x in (source, weight, factor) if x is not None]
        inputs = scores.Scores(leaves[0], leaves[1] if gate else None)
        if way == "blocks":
            routing = scores.in_blocks(summed, inputs, leaves[-1])
            actual = {"weights": routing.probs_TE, **routing.loss_inputs}
        else:
            logits_TE = F.linear(*leaves[:2]) if gate else leaves[0]
            plain = summed(logits_TE, slice(0, tokens), None, leaves[-1])
            actual = {"weights": plain.probs_tE, **plain.sums, **plain.per_token}
        parts = {"weights": of_weights, "cubes": torch.linspace(0, 1, 6), "sines": torch.linspace(1, 2, tokens)}
        loss = sum((actual[name] * parts[name]).sum() for name in used)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([actual["weights"], actual["cubes"], actual["places"], loss, *grads])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_of_a_bf16_gate_with_many_experts_nothing_of_all_pairs_is_kept():
    """Neither forward nor as a gradient: with a thousand experts such a tensor is as large as the rest of a layer."""
    routers, sizes = Routers("topk", {"k": 2}, 32, layers=1, dtype=torch.bfloat16), []
    hidden = torch.randn(6, 1, HIDDEN).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        routers.recorder.begin()
        probs, routes = routers.layers[0](hidden)
        losses = routers.recorder.finish()
        used = scores.weights_at(probs, routes.flatten().nonzero().squeeze(1))
    assert sorted(sizes)[-2:] == [6 * HIDDEN, 32 * HIDDEN]  # tokens and gate, and nothing of 6 * 32
    layouts = []
    probs.register_hook(lambda grad: layouts.append((grad.layout, grad._nnz())))
    (used.sum() + losses["balance"]).backward()
    assert layouts == [(torch.sparse_coo, 12)]


def test_weights_of_routes_of_any_other_tensor_have_a_dense_gradient():
    probs = torch.rand(4, 3, requires_grad=True)
    actual = scores.weights_at(probs, torch.tensor([4, 0]), first=2)
    assert actual.tolist() == [probs[3, 1], probs[2, 0]]
    actual.backward(torch.tensor([5.0, 7.0]))
    assert probs.grad.tolist() == [[0, 0, 0], [0, 0, 0], [7, 0, 0], [0, 5, 0]]


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("shares", [(0.0, 0.1, 0.2), (0.1, 0.5, 0.1), (0.9, 0.0, 0.9)])
def test_a_gradient_of_few_pairs_is_kept_as_these(monkeypatch, shares, seen):
    monkeypatch.setattr(scores, "is_on_host", lambda tensor: seen)
    expected = torch.cat([torch.randn(10, 20) * (torch.rand(10, 20) < share) for share in shares])
    actual = scores._SparseGradBuilder(expected)
    for rows in scores.slices(30, 10):
        actual[rows] = expected[rows]
    assert actual.finish().is_sparse == (seen and max(shares) < 0.25)
    assert torch.equal(actual.finish().to_dense(), expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_latent_norms_take_a_gradient_of_some_pairs(share):
    hidden, reduce = torch.randn(40, HIDDEN), torch.randn(6, 3, HIDDEN)
    grad = torch.randn(40, 6) * (torch.rand(40, 6) < share)
    results = []
    for given in (grad, grad.to_sparse()):
        leaves = [hidden.clone().requires_grad_(), reduce.clone().requires_grad_()]
        norms, own = low_rank.latent_norms(*leaves, (2, 3))
        assert scores.accepts_sparse_grad(norms)
        results.append(torch.autograd.grad((norms, own), leaves, (given, torch.ones_like(own))))
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_a_router_with_logits_of_its_own_decides_by_them():
    class Warmer(get("topk")):
        def gating(self, hidden_TH):
            return 3 * super().gating(hidden_TH)

    routers, hidden = Routers("topk", {"k": 1}, 4, layers=1), torch.randn(5, 1, HIDDEN)
    router = routers.layers[0]
    expected = (3 * F.linear(hidden.flatten(0, 1), router.weight)).softmax(-1).amax(-1)
    router.__class__ = Warmer
    [(probs, _)], _ = routers.pass_through([hidden])
    torch.testing.assert_close(probs.sum(-1), expected)


@pytest.mark.parametrize("over_all_experts", [False, True])
def test_the_top_k_softmax_are_a_softmax_of_all_or_of_the_chosen(over_all_experts):
    logits_TE = 3 * torch.randn(9, 5, dtype=torch.float64)
    softmax, largest = logits_TE.softmax(-1), logits_TE.topk(2, dim=-1)
    actual = top_k_softmax(logits_TE, None, 2, over_all_experts=over_all_experts)
    gates = softmax.gather(1, largest.indices) if over_all_experts else largest.values.softmax(-1)
    assert torch.equal(actual.probs_tE, torch.zeros_like(logits_TE).scatter(1, largest.indices, gates))
    assert torch.equal(actual.map_tE, actual.probs_tE > 0) and torch.equal(actual.saved_selection, largest.indices)
    assert torch.equal(actual.sums["softmax_sum_E"], softmax.sum(0))


@pytest.mark.parametrize("renormalize", [False, True])
def test_shares_of_top_p_and_their_entropy_have_the_gradients_of_plain_operators(renormalize):
    logits = 3 * torch.randn(9, 5, dtype=torch.float64)
    options = TopPOptions(p=0.7, entropy_coefficient=1.0)
    weights, sums, actual = torch.randn(9, 5), torch.randn(5), []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        if ours:
            made = top_p_softmax(leaf, None, options.p, options, renormalize=renormalize)
            share, total, entropy = made.probs_tE, made.sums["softmax_sum_E"], made.sums["entropy_sum"]
        else:
            P = leaf.softmax(-1)
            share, total, entropy = P * map_by_sorting(P, options.p, "above"), P.sum(0), -(P * P.log()).sum()
            share = share / share.sum(-1, keepdim=True) if renormalize else share
        loss = (share * weights).sum() + total @ sums.double() + 0.3 * entropy
        actual.append([share, total, entropy, *torch.autograd.grad(loss, leaf)])
    for mine, theirs in zip(*actual, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_entropy_of_shares_that_underflow_has_a_gradient():
    logits = torch.tensor([[2000.0, 0.0, -5.0], [1.0, 2.0, 3.0]], requires_grad=True)
    actual = top_p_softmax(logits, None, 0.4, TopPOptions(entropy_coefficient=1.0), renormalize=False)
    actual.sums["entropy_sum"].backward()
    assert logits.grad.isfinite().all() and not logits.grad[0].any() and logits.grad[1].any()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])  # of pairs with a gradient
@pytest.mark.parametrize("tokens", [0, 3, 700])
def test_latent_norms_have_the_gradients_of_kept_latents(monkeypatch, tokens, share, on_device):
    if on_device:
        monkeypatch.setattr(low_rank, "is_on_host", lambda tensor: False)
    hidden, reduce = (torch.randn(size, dtype=torch.float64) for size in ((tokens, HIDDEN), (6, 3, HIDDEN)))
    reduce[2] = 0  # norms of 0
    grad = torch.randn(tokens, 6) * (torch.rand(tokens, 6) < share)
    grad[:, 4] = 0  # an expert without any
    actual, plain = ([x.clone().requires_grad_() for x in (hidden, reduce)] for _ in range(2))
    norms, own = low_rank.latent_norms(*actual, (2, 3))
    expected = torch.linalg.vector_norm(torch.einsum("th,erh->ter", *plain), dim=-1)
    own_weights = torch.randn(3, 3, HIDDEN)
    torch.autograd.backward((norms, own), (grad, own_weights))
    torch.autograd.backward((expected, plain[1][2:5]), (grad, own_weights.double()))
    torch.testing.assert_close(norms, expected)
    assert torch.equal(own, reduce[2:5]) and own.data_ptr() == actual[1][2].data_ptr()
    for mine, theirs in zip(actual, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_latents_on_a_device_exist_for_some_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(low_rank, "LATENTS_ON_DEVICE", 100)
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
    actual = top_p_map(torch.tensor([probs]), torch.tensor(p) if as_tensor else p, rule)
    assert actual.int().tolist() == [expected]


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
        for actual in (top_p_map(probs, p, rule), top_p_map(probs, torch.tensor(p), rule)):
            assert torch.equal(actual, map_by_sorting(probs, p, rule))


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
