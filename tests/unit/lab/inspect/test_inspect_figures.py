"""Every figure of an inspection against one that was computed by hand, or in the plainest way there is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from dsmoe.lab.inspect.comparison import compare, mean_with_interval
from dsmoe.lab.inspect.hardness import BLOCK, bootstrap, correlation, deciles, hardness, spearman
from dsmoe.lab.inspect.load import by_kind, by_position, load
from dsmoe.lab.inspect.models import ExpertWeights, Setting
from dsmoe.lab.inspect.reading import Reading
from dsmoe.lab.inspect.redundancy import compare_experts, to_merge
from dsmoe.lab.inspect.report import per_token, rounded
from dsmoe.lab.inspect.specialization import (
    binary_entropy,
    closest,
    co_activation,
    known_from,
    specialization,
    typical,
)
from dsmoe.lab.inspect.training import shared
from dsmoe.moe.experts import GroupedExperts

NAN = float("nan")


def reading_of(map_LTE, losses=None, tokens=None, texts=None, probs=None) -> Reading:
    map_LTE = np.array(map_LTE, bool)
    count = map_LTE.shape[1]
    next_loss = np.array(losses if losses is not None else [*range(count - 1), NAN], float)
    words = tokens or [f"t{number}" for number in range(count)]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    text_T = np.array(texts if texts is not None else [0] * count)
    return Reading(
        texts=[f"text {number}" for number in range(int(text_T.max()) + 1)],
        ids_T=np.array([ids[word] for word in words]), token_T=list(words), text_T=text_T,
        position_T=np.arange(count), next_loss_T=next_loss, loss_T=np.concatenate(([NAN], next_loss[:-1])),
        probs_LTE=np.array(probs, np.float32) if probs is not None else map_LTE.astype(np.float32),
        map_LTE=map_LTE, hidden_LNH=[],
    )  # fmt: skip


def test_load_of_a_layer():
    # experts take 4, 2, 0 and 2 of 4 tokens: mean 2
    map_TE = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1]]
    (actual,) = load(np.array([map_TE], bool))
    assert actual["counts"] == [4, 2, 0, 2] and actual["dead"] == [2]
    assert actual["experts_per_token"] == 2 and actual["no_expert"] == 0
    assert actual["max_over_mean"] == 2 and actual["max_violation"] == 1
    assert actual["cv"] == pytest.approx(math.sqrt(2) / 2)  # deviations 2, 0, -2, 0
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert actual["entropy"] == pytest.approx(math.exp(entropy) / 4)


def test_load_of_a_layer_that_nobody_uses():
    (actual,) = load(np.zeros((1, 3, 2), bool))
    assert actual["no_expert"] == 1 and actual["dead"] == [0, 1] and actual["counts"] == [0, 0]
    assert actual["max_over_mean"] is actual["max_violation"] is actual["cv"] is actual["entropy"] is None


def test_experts_by_kind_and_position():
    map_LTE = [[[1, 1], [0, 1], [0, 0], [1, 1]], [[1, 0], [0, 1], [1, 1], [1, 1]]]
    reading = reading_of(map_LTE, tokens=[" word", "3", ".", "other"])
    kinds = {entry["kind"]: entry for entry in by_kind(reading)}
    assert set(kinds) == {"prose", "digits", "punctuation"} and by_kind(reading)[0]["kind"] == "prose"
    assert kinds["prose"]["tokens"] == 2
    assert kinds["prose"]["experts"] == pytest.approx((2 + 2 + 1 + 2) / 4)  # two tokens, two layers
    assert kinds["prose"]["experts_by_layer"] == [2.0, 1.5]
    assert kinds["digits"]["experts"] == 1 and kinds["punctuation"]["experts_by_layer"] == [0, 2]
    places = by_position(reading)
    assert [(entry["first"], entry["last"]) for entry in places] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [entry["experts"] for entry in places] == [1.5, 1.0, 1.0, 2.0]
    assert places[0]["loss"] == 0 and places[3]["loss"] is None


def test_positions_are_cut_into_eight_parts():
    reading = reading_of(np.ones((1, 20, 2), bool))
    parts = by_position(reading)
    assert len(parts) == 8 and sum(part["tokens"] for part in parts) == 20
    assert parts[0]["first"] == 0 and parts[-1]["last"] == 19


def test_effective_experts_of_weights():
    probs = [[[0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 0]]]
    reading = reading_of(np.array(probs) > 0, probs=probs)
    unequal = math.exp(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert reading.effective_LT[0] == pytest.approx([2, unequal, 1, 0], abs=1e-6)


def test_spearman_is_scipys():
    random = np.random.default_rng(0)
    loss, experts = random.exponential(size=500), random.integers(0, 4, 500)
    assert spearman(loss, experts) == pytest.approx(spearmanr(loss, experts).statistic, abs=1e-12)
    assert spearman(loss, np.full(500, 2)) is None and spearman(loss[:5], experts[:5]) is None


def test_every_bootstrap_sample_is_blocks_in_a_row():
    """Each sample's rho is that of the tokens that a plain loop draws with the same numbers."""
    random = np.random.default_rng(3)
    loss, experts = random.exponential(size=50), random.integers(0, 4, 50)
    actual = bootstrap(loss, experts, 20)
    starts = np.random.default_rng(0).integers(0, 50, (20, 4, 1))
    for sample, blocks in zip(actual, starts[..., 0], strict=True):
        drawn = [(start + step) % 50 for start in blocks for step in range(BLOCK)][:50]
        assert sample == pytest.approx(spearmanr(loss[drawn], experts[drawn]).statistic, abs=1e-12)


def test_the_interval_holds_the_truth_and_neighbours_widen_it():
    """A known correlation is inside; a series whose tokens come in runs has a wider interval than shuffled ones."""
    random = np.random.default_rng(1)
    hidden = random.normal(size=2000)
    actual = correlation(hidden + random.normal(size=2000), hidden + random.normal(size=2000))
    assert actual["low"] < 6 / math.pi * math.asin(0.25) < actual["high"]  # of normal variables with correlation 1/2
    assert actual["low"] < actual["rho"] < actual["high"] and actual["high"] - actual["low"] < 0.15
    runs = np.repeat(random.normal(size=(100, 2)), 20, axis=0)
    order = random.permutation(2000)
    wide, narrow = correlation(*runs.T), correlation(*runs[order].T)
    assert wide["rho"] == pytest.approx(narrow["rho"])
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def test_kinds_are_taken_out_of_a_correlation():
    """Kinds that are hard and take many experts make a correlation that is not there inside a kind."""
    random = np.random.default_rng(5)
    kinds = random.integers(0, 3, 3000)
    loss, experts = kinds + random.normal(size=3000), 2 * kinds + random.integers(0, 3, 3000)
    assert correlation(loss, experts)["low"] > 0.4
    inside = correlation(loss, experts, group_T=kinds)
    assert inside["low"] < 0 < inside["high"] and abs(inside["rho"]) < 0.05
    # by hand: ranks minus the mean rank of their kind
    parts = []
    for ranks in (rankdata(loss), rankdata(experts)):
        parts.append(ranks - np.array([ranks[kinds == kind].mean() for kind in range(3)])[kinds])
    assert inside["rho"] == pytest.approx(np.corrcoef(*parts)[0, 1], abs=1e-12)
    one = correlation(loss, experts, group_T=np.zeros(3000, int))
    assert one == pytest.approx(correlation(loss, experts))
    assert correlation(loss, kinds, group_T=kinds)["rho"] is None  # nothing varies inside a kind


def test_deciles_are_of_equal_size_and_easy_first():
    random = np.random.default_rng(2)
    losses = random.exponential(size=105)
    experts_LT = np.stack([np.floor(2 * losses), np.ones(105)])
    actual = deciles(losses, experts_LT, np.ones((2, 105)))
    assert len(actual) == 10 and {group["tokens"] for group in actual} == {10, 11}
    ordered = np.sort(losses)
    assert actual[0]["loss"] == pytest.approx(ordered[:11].mean()) and actual[0]["loss_to"] == ordered[10]
    hardest = losses >= ordered[95]
    assert actual[9]["experts"] == pytest.approx(experts_LT[:, hardest].mean())
    assert actual[9]["experts_by_layer"] == pytest.approx(experts_LT[:, hardest].mean(1).tolist())
    of_token = experts_LT[:, hardest].mean(0)
    assert actual[9]["error"] == pytest.approx(of_token.std(ddof=1) / math.sqrt(10))


def test_both_readings_of_hardness():
    """Experts that follow a token's own surprise do not follow the next token's loss."""
    random = np.random.default_rng(0)
    next_loss = random.permutation(400).astype(float)
    next_loss[-1] = NAN
    own = np.concatenate(([200.0], next_loss[:-1]))
    map_LTE = np.zeros((1, 400, 4), bool)
    for place, value in enumerate(own):
        map_LTE[0, place, : int(value // 100) + 1] = True
    actual = hardness(reading_of(map_LTE, losses=next_loss))
    assert actual["own"]["experts"]["rho"] > 0.95 and actual["own"]["experts"]["low"] > 0.9
    assert actual["next"]["experts"]["low"] < 0 < actual["next"]["experts"]["high"]
    assert actual["own"]["experts"]["tokens"] == actual["next"]["experts"]["tokens"] == 399
    assert [group["experts"] for group in actual["own"]["deciles"]] == pytest.approx(
        [1, 1, 1.5, 2, 2, 3, 3, 3.5, 4, 4], abs=0.05
    )
    assert actual["own"]["by_kind"]["digits"]["rho"] > 0.95  # the made-up tokens t0, t1, ... have digits


def test_a_fixed_number_of_experts_has_no_correlation():
    actual = hardness(reading_of(np.ones((2, 40, 2), bool)))["next"]
    assert actual["experts"] == {"rho": None, "low": None, "high": None, "tokens": 39}
    assert [layer["rho"] for layer in actual["by_layer"]] == [None, None]


def test_what_a_token_tells_of_an_expert():
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    map_TE = np.stack([groups == 0, groups % 2 == 0, np.arange(8) % 2 == 0, np.ones(8, bool)], axis=1)
    known_E = known_from(map_TE, groups)
    assert known_E[:3] == pytest.approx([1, 1, 0], abs=1e-12) and np.isnan(known_E[3])
    # by hand: an expert that takes both of group 0 and one of group 1, of 8
    part = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)[:, None]
    whole = binary_entropy(np.array(3 / 8))
    assert known_from(part, groups)[0] == pytest.approx((whole - 2 / 8 * math.log(2)) / whole)


def test_typical_tokens_and_their_shares():
    words = ["the", "cat", "the", "dog", "the", "cat", "ran", "ran"]
    takes = {"the": (1, 0), "cat": (1, 1), "dog": (0, 1), "ran": (0, 0)}
    map_TE = np.array([takes[word] for word in words], bool)
    map_TE[4, 0] = False  # one of three "the" goes elsewhere
    (layer,) = specialization(reading_of([map_TE], tokens=words, texts=[0, 0, 0, 0, 1, 1, 1, 1]))
    first, second = layer["experts"]
    # rate 4/8; z of cat sqrt(2), of "the" (2/3 - 1/2) / (1/2 / sqrt(3)) = 0.58; dog and ran are below the rate
    assert [(one["token"], one["count"]) for one in first["typical"]] == [("cat", 2), ("the", 3)]
    assert [one["share"] for one in first["typical"]] == pytest.approx([1, 2 / 3])
    # rate 3/8; z of cat 1.83, of dog 1.29
    assert [one["token"] for one in second["typical"]] == ["cat", "dog"]
    assert layer["domains"] == [[3 / 4, 2 / 4], [1 / 4, 1 / 4]]
    assert layer["together"] == [[4, 2], [2, 3]]
    assert layer["pairs"] == [
        {"experts": [0, 1], "tokens": 2, "overlap": 2 / 5, "of_first": 2 / 4, "of_second": pytest.approx(2 / 3)}
    ]
    assert second["vocabulary"] == pytest.approx(1) and 0 <= second["vocabulary_chance"] < 1


def test_an_expert_that_takes_all_is_typical_by_weight():
    assert typical(np.array([2.0, 1.0]), np.array([0.2, 0.9]), np.array([2, 1])) == [1, 0]
    assert typical(np.zeros(2), np.zeros(2), np.array([2, 1])) == []


def test_co_activation_counts_pairs():
    map_TE = np.random.default_rng(0).random((200, 5)) < 0.4
    actual = co_activation(map_TE)
    for one in range(5):
        for other in range(5):
            assert actual[one, other] == sum(bool(row[one] and row[other]) for row in map_TE)
    overlaps = [pair["overlap"] for pair in closest(actual)]
    assert overlaps == sorted(overlaps, reverse=True) and len(overlaps) == 8


def test_saturation_of_two_maps():
    early, late = np.array([[1, 1, 0], [0, 1, 0]], bool), np.array([[1, 0, 0], [0, 1, 1]], bool)
    assert shared(early, late) == {"saturation": 2 / 3, "jaccard": 2 / 4}
    assert shared(np.ones((2, 3), bool), late)["saturation"] == 1  # why jaccard is there
    assert shared(early, np.zeros((2, 3), bool)) == {"saturation": None, "jaccard": 0.0}


def expert_weights(experts=4, hidden=8, width=6) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(experts, width, hidden, generator=generator) for _ in range(3)]
    return ExpertWeights(drawn[0], drawn[1], drawn[2].mT.contiguous())


def test_a_copy_is_found_and_is_a_pair_to_merge():
    weights = expert_weights()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for tensor in (weights.gate_EFH, weights.up_EFH):
        tensor[3] = tensor[1][order]
    weights.down_EHF[3] = weights.down_EHF[1][:, order]  # the same function, its units in another order
    together = np.array([[9, 0, 0, 1], [0, 7, 0, 2], [0, 0, 5, 0], [1, 2, 0, 3]])
    actual = compare_experts(weights, torch.randn(50, 8, generator=torch.Generator().manual_seed(2)), together)
    best, *others = actual["pairs"]
    assert best["experts"] == [1, 3] and best["tokens"] == [7, 3] and best["tokens_of_both"] == 2
    assert [best[name] for name in ("output_cosine", "output_cka", "weights")] == pytest.approx([1, 1, 1], abs=1e-5)
    assert actual["merge"] == [[1, 3]] and actual["max"] == pytest.approx(1, abs=1e-5)
    assert all(pair["output_cosine"] < 0.8 for pair in others) and len(others) == 5
    assert actual["mean"] == pytest.approx(np.mean([pair["output_cosine"] for pair in actual["pairs"]]), abs=1e-6)
    assert 0 < actual["weights_chance"] < 1


@pytest.mark.parametrize("activation", ["reglu", "relu2"])
def test_outputs_are_those_of_experts_of_another_mlp(activation):
    shapes = SimpleNamespace(num_moe_experts=4, hidden_size=8, moe_ffn_hidden_size=16)
    alone = SimpleNamespace(ep=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    experts = GroupedExperts(4, shapes, pg_collection=alone, activation=activation, bias=True)
    for parameter in experts.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(4))
    weights, rows = ExpertWeights.of(experts, None), torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    expected, _ = experts(rows.repeat(4, 1), torch.full((4,), 5), torch.ones(20))
    torch.testing.assert_close(weights.outputs(rows).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    actual = compare_experts(weights, rows, np.zeros((4, 4), int))
    assert weights.units(0).shape == (16, 8 * (3 if activation == "reglu" else 2)) and 0 < actual["weights_chance"] < 1


def test_outputs_are_swiglu_of_each_expert():
    weights, rows = expert_weights(), torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    actual = weights.outputs(rows)
    for expert in range(4):
        gate, up = rows @ weights.gate_EFH[expert].T, rows @ weights.up_EFH[expert].T
        torch.testing.assert_close(actual[expert], (gate * torch.sigmoid(gate) * up) @ weights.down_EHF[expert].T)


def test_each_expert_is_merged_once():
    cosines = {(0, 1): 0.99, (1, 2): 0.98, (2, 3): 0.95, (4, 5): 0.5}
    pairs = [{"experts": list(pair), "output_cosine": cosine} for pair, cosine in cosines.items()]
    assert to_merge(pairs) == [[0, 1], [2, 3]]


def test_routes_that_a_setting_drops():
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.4]])
    active = probs > 0
    rows = lambda setting: setting.cut(probs, active).int().tolist()  # noqa: E731
    assert rows(Setting("theta", 0.25, False)) == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert rows(Setting("k", 1, False)) == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert rows(Setting("k", 9, False)) == active.int().tolist()
    # shares 0.5 0.3 0.2 and 0.2 0.8: the fewest whose mass is more than p
    assert rows(Setting("p", 0.6, False)) == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert rows(Setting("p", 0.85, False)) == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert rows(Setting("p", 1.0, False)) == active.int().tolist()


def test_two_models_token_by_token():
    random = np.random.default_rng(0)
    losses = random.exponential(size=100)
    losses[-1] = NAN
    map_LTE = random.random((2, 100, 4)) < 0.5
    first = reading_of(map_LTE, losses=losses)
    more = map_LTE.copy()
    more[0, :, 0] = True
    second = reading_of(more, losses=losses + 0.25)
    actual = compare(first, second)
    assert actual["same_tokens"] and actual["loss_difference"]["tokens"] == 99
    assert [actual["loss_difference"][name] for name in ("mean", "low", "high")] == pytest.approx([0.25] * 3)
    added = more.sum() - map_LTE.sum()
    assert actual["experts_difference"]["mean"] == pytest.approx(added / 200)
    assert actual["experts_difference"]["low"] < added / 200 < actual["experts_difference"]["high"]
    plain = spearmanr(map_LTE.sum(2).mean(0), more.sum(2).mean(0)).statistic
    assert actual["experts_alike"]["rho"] == pytest.approx(plain)
    assert sum(group["tokens"] for group in actual["by_difficulty"]) == 99
    assert compare(first, reading_of(map_LTE[:, :50], losses=losses[:50])) == {"same_tokens": False}


def test_an_interval_of_a_mean():
    actual = mean_with_interval(np.random.default_rng(0).normal(1.0, 1.0, 1000))
    assert actual["low"] < 1.0 < actual["high"] and actual["high"] - actual["low"] == pytest.approx(
        4 / math.sqrt(1000), rel=0.25
    )


def test_what_is_written_of_a_token():
    probs = [[[0.2, 0.7, 0.0], [0.0, 0.0, 0.0]]]
    columns = rounded(per_token(reading_of(np.array(probs) > 0, probs=probs, tokens=[" a", "1"])))
    assert columns["routes"] == [[[[1, 0.7], [0, 0.2]], []]] and columns["experts"] == [[2, 0]]
    assert columns["loss"] == [None, 0.0] and columns["next_loss"] == [0.0, None]
    assert columns["kind"] == ["prose", "digits"]
