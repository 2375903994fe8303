"""Which ranks share a node, and how expert-parallel groups are laid over nodes."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch.distributed as dist

from dsmoe.errors import ParallelError

NODE_NAME = "DSMOE_NODE_NAME"  # overrides the host name, where several hosts share one or one host is to act as several


@dataclass(frozen=True)
class Topology:
    """Nodes in the order of their first rank.

    Attributes:
        node_of_rank: the node of each rank of the job.
        names: the host name of each node.
    """

    node_of_rank: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def from_names(cls, name_of_rank: list[str]) -> Topology:
        names = tuple(dict.fromkeys(name_of_rank))
        return cls(tuple(names.index(name) for name in name_of_rank), names)

    def split_by_node(self, ranks: Sequence[int]) -> list[list[int]]:
        """These ranks by node, for each node that has any of them."""
        nodes = sorted({self.node_of_rank[rank] for rank in ranks})
        return [[rank for rank in ranks if self.node_of_rank[rank] == node] for node in nodes]

    def spans_nodes(self, ranks: Sequence[int]) -> bool:
        return len(self.split_by_node(ranks)) > 1

    def is_even(self, ranks: Sequence[int]) -> bool:
        """Whether every node that has any of these ranks has the same number of them."""
        return len({len(local) for local in self.split_by_node(ranks)}) == 1


ONE_NODE = Topology((0,), ("",))  # of a job of one process


@cache
def find_topology() -> Topology:
    """The topology of this job, from the host names of all ranks. Collective, once."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, os.environ.get(NODE_NAME) or socket.gethostname())
    return Topology.from_names(names)


def expert_parallel_ranks(topology: Topology, expert_parallel: int, placement: str) -> list[list[int]]:
    """The ranks of every expert-parallel group, each in ascending order.

    Args:
        placement: "rank_order": consecutive ranks. "auto": as many groups as possible inside a node, and the rest over
            neighbouring nodes. "within_node": the same, and a group that spans nodes is an error.

    Raises:
        ParallelError: "within_node", but some group would span nodes.
    """
    ranks = list(range(len(topology.node_of_rank)))
    if placement == "rank_order":
        return _consecutive(ranks, expert_parallel)
    groups, remaining = [], []
    for node in range(len(topology.names)):
        local = [rank for rank in ranks if topology.node_of_rank[rank] == node]
        whole = len(local) // expert_parallel * expert_parallel
        groups += _consecutive(local[:whole], expert_parallel)
        remaining += local[whole:]
    if remaining and placement == "within_node":
        sizes = ", ".join(f"{topology.node_of_rank.count(node)} on {name}" for node, name in enumerate(topology.names))
        raise ParallelError(
            f"parallel.placement is within_node, but groups of parallel.expert_parallel={expert_parallel} ranks do not "
            f"fit into the nodes ({sizes}). Launch a multiple of {expert_parallel} ranks on every node, or set "
            "parallel.placement=auto"
        )
    return sorted(sorted(group) for group in groups + _consecutive(remaining, expert_parallel))


def _consecutive(ranks: list[int], size: int) -> list[list[int]]:
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]
