"""Expected rows are those of a simulation, and `auto` picks the dispatcher that sends fewer of them between nodes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dsmoe.moe.expected_rows import expected_rows, resolve_dispatcher

ROOT = Path(__file__).parents[3]


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


def test_auto_goes_in_two_levels_where_that_saves_enough_between_nodes():
    def auto(expert_parallel, ranks_per_node, k=4.0, experts=16):
        return resolve_dispatcher("auto", experts, k, expert_parallel, ranks_per_node)

    assert auto(1, None) == "local"
    assert auto(4, None) == "all_to_all"  # inside a node, or unevenly over nodes
    assert auto(4, 1) == "all_to_all"  # one rank on each node: a row a rank is a row a node
    assert auto(4, 2) == "two_level"
    assert auto(4, 4) == "all_to_all"
    assert resolve_dispatcher("all_to_all", 16, 4, 4, 2) == "all_to_all"
    assert resolve_dispatcher("mine", 16, 4, 1, None) == "mine"


def test_auto_is_what_was_faster_on_two_hosts():
    """In every pair of rows of docs/results/two_level.md, `auto` is the dispatcher whose step took less time."""
    page = (ROOT / "docs/results/two_level.md").read_text()
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", page, re.M)
    assert len(rows) == 10
    for direct, relayed in zip(rows[::2], rows[1::2], strict=True):
        faster = min(direct, relayed, key=lambda row: float(row[3]))
        assert resolve_dispatcher("auto", 16, float(direct[2]), 4, 2) == faster[1], direct
