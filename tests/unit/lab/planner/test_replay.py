"""Load and traffic of a replayed step, beside a count one can do token by token."""

from __future__ import annotations

import numpy as np
import pytest

from dsmoe.errors import ConfigError
from dsmoe.lab.planner.replay import PLACEMENTS, cost_of, destinations, replay
from dsmoe.training.trace import trace_of

T, E = 64, 16


def skewed(seed: int) -> np.ndarray:
    """bool [T, E]: 0 to 4 experts a token, the first ones far more often."""
    random = np.random.default_rng(seed)
    popularity = 1.0 / (1 + np.arange(E))
    actual = np.zeros((T, E), dtype=bool)
    for token in actual:
        token[random.choice(E, size=random.integers(0, 5), replace=False, p=popularity / popularity.sum())] = True
    return actual


@pytest.fixture(scope="module")
def trace():
    return trace_of([skewed(1), skewed(2)], np.arange(T), 8, step=3)


def test_where_dsmoe_puts_experts_is_counted_as_by_hand(trace):
    ranks = 4
    actual = next(row for row in replay(trace, [ranks]) if row.placement == "contiguous")
    loads, rows, routes, received = [], [], [], []
    for layer in range(2):
        map_TE = trace.map_TE(layer)
        load, reach, crossing = np.zeros(ranks), np.zeros((T, ranks), dtype=bool), 0
        for token, expert in zip(*map_TE.nonzero(), strict=True):
            rank = expert // (E // ranks)
            load[rank] += 1
            reach[token, rank] = True
            crossing += token // (T // ranks) != rank
        loads.append(load.max() / load.mean())
        rows.append(sum(reach[t, p] for t in range(T) for p in range(ranks) if t // (T // ranks) != p) / ranks)
        routes.append(crossing / ranks)
        received.append(reach.sum(0).max())
    assert actual.load == pytest.approx(np.mean(loads)) and actual.worst_load == pytest.approx(max(loads))
    assert actual.sent_rows == np.mean(rows) < actual.sent_routes == np.mean(routes)
    assert actual.received_rows == max(received)
    assert cost_of(actual, 8, 4, "bf16").sent_bytes == actual.sent_rows * 4 * 8 * 2


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_two_level_rows_are_counted_as_by_hand(trace, ranks):
    """Nodes of 4: inside one nothing changes; beyond it a token crosses once to a node, to the rank with its place."""
    node = 4
    direct, actual = (
        next(row for row in replay(trace, [ranks], node, name) if row.placement == "contiguous")
        for name in ("all_to_all", "auto" if ranks == node else "two_level")
    )
    if ranks == node:
        assert (actual.dispatcher, actual.sent_rows, actual.between_rows) == ("all_to_all", direct.sent_rows, 0)
        return
    rows, between = [], []
    for layer in range(2):
        inside = crossing = 0
        for token, used in enumerate(trace.map_TE(layer)):
            home = token // (T // ranks)
            needed = {expert // (E // ranks) for expert in used.nonzero()[0]}
            for to in {rank // node for rank in needed}:
                relay = to * node + home % node
                crossing += to != home // node
                inside += len({rank for rank in needed if rank // node == to} - {relay})
        rows.append((inside + crossing) / ranks)
        between.append(crossing / ranks)
    assert actual.dispatcher == "two_level" and actual.load == direct.load
    assert actual.sent_rows == pytest.approx(np.mean(rows)) and actual.between_rows == pytest.approx(np.mean(between))
    assert actual.between_rows < direct.between_rows


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 8, 16])
def test_every_route_goes_to_a_rank_that_holds_its_expert(trace, place, ranks):
    counts_E = trace.counts_LE()[0]
    placement = place(counts_E, ranks)
    holds_EP = placement.holds_EP
    assert holds_EP.any(1).all()
    room = E // ranks + (placement.name == "replicated")
    assert (holds_EP.sum(0) <= room).all() and (holds_EP.sum(0) >= E // ranks).all()
    expert_N = trace.layers[0][1].astype(np.int64)
    rank_N = destinations(expert_N, placement)
    assert holds_EP[expert_N, rank_N].all()
    for expert in range(E):  # copies share evenly
        taken = np.bincount(rank_N[expert_N == expert], minlength=ranks)[holds_EP[expert]]
        assert taken.max() - taken.min() <= 1


def test_knowing_the_load_helps_and_copies_help_more(trace):
    load = {row.placement: row.load for row in replay(trace, [8])}
    assert 1.0 <= load["forced balance"] < 1.1 < load["replicated"] < load["load-aware"] < load["contiguous"]


def test_one_rank_sends_nothing(trace):
    for row in replay(trace, [1]):
        assert row.load == 1.0 and row.sent_rows == row.sent_routes == 0


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_all_others(trace):
    with pytest.raises(ConfigError, match="found 3.*\n.*found 32"):
        replay(trace, [2, 3, 32])
