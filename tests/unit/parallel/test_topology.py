"""Expert-parallel groups lie inside nodes where they fit, whatever order a launcher numbers ranks in."""

from __future__ import annotations

import pytest

from dsmoe.errors import ParallelError
from dsmoe.parallel.topology import Topology, expert_parallel_ranks


def placed(nodes: str, expert_parallel: int, placement: str = "auto") -> tuple[list[list[int]], int]:
    """The groups for ranks on nodes named by a letter each, and how many of them span nodes."""
    topology = Topology.from_names(list(nodes))
    groups = expert_parallel_ranks(topology, expert_parallel, placement)
    assert sorted(rank for group in groups for rank in group) == list(range(len(nodes)))
    assert all(len(group) == expert_parallel and group == sorted(group) for group in groups)
    return groups, sum(topology.spans_nodes(group) for group in groups)


@pytest.mark.parametrize(
    ("nodes", "expert_parallel", "expected", "spanning"),
    [
        ("aabb", 2, [[0, 1], [2, 3]], 0),
        ("abab", 2, [[0, 2], [1, 3]], 0),
        ("abba", 2, [[0, 3], [1, 2]], 0),
        ("abab", 4, [[0, 1, 2, 3]], 1),
        ("abab", 1, [[0], [1], [2], [3]], 0),
        ("abcdabcd", 4, [[0, 1, 4, 5], [2, 3, 6, 7]], 2),  # of two whole nodes each
        ("aaabbb", 2, [[0, 1], [2, 5], [3, 4]], 1),  # rank 2 and 5 remain
        ("aaaaabbbbbcccccddddd", 4, None, 1),  # consecutive ranks would span nodes in three groups
        ("a", 1, [[0]], 0),
    ],
)
def test_as_many_groups_as_possible_are_inside_a_node(nodes, expert_parallel, expected, spanning):
    groups, actual = placed(nodes, expert_parallel)
    assert actual == spanning and (expected is None or groups == expected)


def test_rank_order_takes_consecutive_ranks_wherever_they_are():
    assert placed("abab", 2, "rank_order") == ([[0, 1], [2, 3]], 2)


@pytest.mark.parametrize(("nodes", "expert_parallel"), [("aabb", 4), ("aaabbb", 2)])
def test_within_node_is_refused_where_it_cannot_be(nodes, expert_parallel):
    with pytest.raises(
        ParallelError, match=rf"placement is within_node.*expert_parallel={expert_parallel}.*on a, . on b"
    ):
        placed(nodes, expert_parallel, "within_node")
    assert placed("abab", 2, "within_node") == placed("abab", 2)


def test_ranks_are_split_by_node():
    topology = Topology.from_names(["host2", "host1", "host2", "host2"])
    assert topology.names == ("host2", "host1") and topology.node_of_rank == (0, 1, 0, 0)
    assert topology.split_by_node([1, 2, 3]) == [[2, 3], [1]]
    assert topology.spans_nodes([1, 2]) and not topology.spans_nodes([0, 3])
    assert topology.is_even([1, 2]) and not topology.is_even([1, 2, 3])
