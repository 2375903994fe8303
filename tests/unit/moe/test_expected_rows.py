"""Expected rows are those of a simulation, and `auto` picks the dispatcher that sends fewer of them between nodes."""

from __future__ import annotations

import numpy as np
import pytest

from dsmoe.moe.expected_rows import expected_rows, resolve_dispatcher


@pytest.mark.parametrize("dispatcher", ["all_to_all", "two_level"])
@pytest.mark.parametrize(
    ("experts", "ep", "per_node", "k"), [(8, 2, 1, 2), (32, 8, 4, 4), (16, 16, 4, 3), (12, 4, 2, 2.5), (16, 4, 2, 8)]
)
def test_rows_are_those_of_a_simulation(dispatcher, experts, ep, per_node, k):
    random = np.random.default_rng(0)
    within = between = 0
    for _ in range(4000):
        count = int(k) + (random.random() < k % 1)
        needed = set((random.permutation(experts)[:count] // (experts // ep)).tolist())
        home = int(random.integers(ep))
        here = home // per_node
        if dispatcher == "all_to_all":
            between += sum(rank // per_node != here for rank in needed)
            within += sum(rank // per_node == here and rank != home for rank in needed)
            continue
        for node in {rank // per_node for rank in needed}:
            relay = node * per_node + home % per_node
            between += node != here
            within += sum(rank // per_node == node and rank != relay for rank in needed)
    rows = expected_rows(dispatcher, experts, k, ep, per_node)
    assert rows.within_node == pytest.approx(within / 4000, rel=0.06)
    assert rows.between_nodes == pytest.approx(between / 4000, rel=0.06)


def test_auto_goes_in_two_levels_where_it_can_save_bytes_between_nodes():
    assert resolve_dispatcher("auto", 1, None) == "local"
    assert resolve_dispatcher("auto", 4, None) == "all_to_all"  # inside a node, or unevenly over nodes
    assert resolve_dispatcher("auto", 4, 1) == "all_to_all"  # one rank on each node: a row a rank is a row a node
    assert resolve_dispatcher("auto", 4, 2) == "two_level"
    assert resolve_dispatcher("auto", 4, 4) == "all_to_all"
    assert resolve_dispatcher("all_to_all", 4, 2) == "all_to_all" and resolve_dispatcher("mine", 1, None) == "mine"
