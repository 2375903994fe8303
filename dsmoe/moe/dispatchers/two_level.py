"""Dispatch and combine in two levels: a token crosses to another node once, however many of its ranks need it.

An EP group that spans nodes is a grid, [nodes, places]: the ranks of a column, with the same place on their nodes, are
a *lane*. Rows first go along the lane to every node that needs their token, then, inside that node, to its ranks:

    hidden_TH --gather--> rows_MH --lane--> rows_QH --gather--> rows_VH --node--> rows_PH --by expert--> rows_RH

M rows leave this rank, one for each (token, node); Q arrive over the lane; V are fanned out to ranks of this node and P
arrive from them. What comes back is summed inside the node before it crosses. Experts get the same rows in the same
order as from one all-to-all; sums per token are taken per node first, so they may differ in their last bit.

Weights, latents and row numbers, which belong to one (token, expert) each, go to their rank directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from dsmoe.errors import ConfigError
from dsmoe.moe.dispatch import CombineHandle, DispatchHandle, register
from dsmoe.moe.dispatchers.all_to_all import AllToAllDispatcher
from dsmoe.moe.exchange import AsyncAllToAll, sum_rows
from dsmoe.moe.plan import ExchangePlan, PendingPlan, RowIndex, Splits, numbers_of, start_positions
from dsmoe.parallel.collectives import start_all_to_all
from dsmoe.parallel.groups import ParallelGroups


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the EP ranks of a group are, by their number in the group."""

    lanes: list[list[int]]  # of each place, in ascending order
    ranks_NL: Tensor  # int64 [nodes, places], nodes in the order of this rank's lane
    by_lane_P: Tensor  # int64, all ranks, lane after lane

    @classmethod
    def of(cls, groups: ParallelGroups) -> Grid:
        by_node = groups.topology.split_by_node(groups.ep_ranks)
        by_node = [[groups.ep_ranks.index(rank) for rank in ranks] for ranks in by_node]
        lanes = [sorted(lane) for lane in zip(*by_node, strict=True)]
        own_lane = lanes[groups.node.rank()]
        nodes = [next(ranks for ranks in by_node if rank in ranks) for rank in own_lane]
        return cls(lanes, torch.tensor(nodes), torch.tensor(lanes).flatten())

    @cache  # noqa: B019  (a grid lives as long as its job)
    def to(self, device: torch.device) -> Grid:
        return Grid(self.lanes, self.ranks_NL.to(device), self.by_lane_P.to(device))


@dataclass(frozen=True)
class TwoLevelPlan(ExchangePlan):
    """Rows leave ordered by node, as in this rank's lane, then token; `rows` are those of the lane."""

    fan_out: Splits  # of rows inside the node
    wait_fan_out: Callable[[], RowIndex]

    @property
    def received(self) -> int:
        return sum(self.fan_out.receive)

    @property
    def relayed(self) -> int:
        """Q"""
        return sum(self.rows.receive)

    @cached_property
    def row_V(self) -> RowIndex:
        """The row of the lane that is fanned out, ordered by place, then row. The first to ask waits."""
        return self.wait_fan_out()


class PendingTwoLevelPlan(PendingPlan):
    """A `TwoLevelPlan` whose sizes are on their way."""

    plan_class = TwoLevelPlan

    def __init__(self, map_TE: Tensor, grid: Grid, groups: ParallelGroups, fused: bool):
        self.grid, self.lane, self.place = grid.to(map_TE.device), groups.lane, groups.node.rank()
        super().__init__(map_TE, groups.ep, fused)

    def count_rows(self) -> Tensor:
        """Rows that each rank needs; and, of a rank that relays from here to its node, rows for the node and for each
        place of it."""
        self.token_to_rank_TNL = self.token_to_rank_TP[:, self.grid.ranks_NL]
        self.row_positions = start_positions(self.token_to_rank_TNL.any(2), self.fused)
        counts_NL, nodes_N = self.token_to_rank_TNL.sum(0), self.row_positions.counts_X
        counts = counts_NL.new_zeros(self.ep, 2 + counts_NL.size(1))
        counts[:, 0] = self.token_to_rank_TP.sum(0)
        counts[self.grid.ranks_NL[:, self.place], 1:] = torch.cat((nodes_N.unsqueeze(1), counts_NL), dim=1)
        return counts

    def find_rows(self, sent: list[list[int]]) -> RowIndex:
        order = self.row_positions.finish(sum(counts[2] for counts in sent))
        self.node_M = order.flat_N % len(self.grid.ranks_NL)
        return order.by_token

    def first_row_of_rank(self, rows_P: Tensor) -> Tensor:
        """Rows arrive ordered by lane, then by rank of the lane."""
        ordered = rows_P.index_select(0, self.grid.by_lane_P)
        return torch.empty_like(rows_P).index_copy(0, self.grid.by_lane_P, ordered.cumsum(0) - ordered)

    def plan_rows(self, sent: list[list[int]], received: list[list[int]], token_M: RowIndex) -> dict[str, Any]:
        lanes = self.grid.lanes
        own_lane = lanes[self.place]
        rows = Splits([sent[rank][2] for rank in own_lane], [received[rank][2] for rank in own_lane])
        fan_out = Splits(
            [sum(received[rank][3 + place] for rank in own_lane) for place in range(len(lanes))],
            [sum(received[rank][1] for rank in lane) for lane in lanes],
        )
        # Which places of its node need each row.
        needs_ML = self.token_to_rank_TNL[numbers_of(token_M), self.node_M].to(torch.uint8)
        wait_needs = start_all_to_all(needs_ML, rows.send, rows.receive, self.lane)

        def wait_fan_out() -> RowIndex:
            return start_positions(wait_needs().bool(), self.fused).finish(sum(fan_out.send)).by_token

        return {"rows": rows, "fan_out": fan_out, "wait_fan_out": wait_fan_out}


@register("two_level")
class TwoLevelDispatcher(AllToAllDispatcher):
    """A row for each (token, node) between nodes, and for each (token, rank) inside them."""

    def __init__(self, groups: ParallelGroups, *args, **kwargs):
        super().__init__(groups, *args, **kwargs)
        if groups.lane is None:
            by_node = groups.topology.split_by_node(groups.ep_ranks)
            problem = (
                "model.token_dispatcher: found 'two_level', which needs every expert-parallel group to span nodes with "
                f"equally many ranks on each; this rank's group lies on nodes as {by_node}. Expected 'auto' or "
                "'all_to_all', or another parallel.expert_parallel or parallel.placement"
            )
            raise ConfigError([problem])
        self.row_group = groups.lane
        self.grid = Grid.of(groups)

    def pending_plan(self, map_TE: Tensor) -> PendingPlan:
        return PendingTwoLevelPlan(map_TE, self.grid, self.groups, self.fused)

    def receive_rows(self, rows: Tensor, plan: TwoLevelPlan) -> Tensor:
        inside = AsyncAllToAll(plan.fan_out, self.groups.node, "dispatch", plan.row_V, self.exchange_dtype)
        return super().receive_rows(inside.exchange(rows), plan)

    def combine(self, rows: Tensor, plan: TwoLevelPlan, recomputed: DispatchHandle | None = None) -> CombineHandle:
        inside = AsyncAllToAll(plan.fan_out.reversed(), self.groups.node, "combine", dtype=self.exchange_dtype)
        rows_QH = sum_rows(inside.exchange(rows), plan.row_V, plan.relayed)
        return super().combine(rows_QH, plan, recomputed)
