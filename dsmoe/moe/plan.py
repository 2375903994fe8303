"""The plan of a layer's routes: every index and count that dispatch and combine need, decided once.

Shapes: T tokens here, E experts, e = E / EP experts on this rank. A *route* is an active (token, expert) pair: N of
this rank's tokens, R to this rank's experts. A *row* is a token on its way to one rank, however many of that rank's
experts it goes to: M rows leave, P arrive.

A plan is reused when activations are recomputed. On a GPU its one host synchronisation fetches all split lists
together; other work can be queued before the host waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsmoe.parallel.collectives import start_all_to_all, start_counts
from dsmoe.routers.routing_map import any_in_row, count_columns
from dsmoe.runtime.device import HostValues


@dataclass(frozen=True)
class Splits:
    """How many go to and come from each rank of the group."""

    send: list[int]
    receive: list[int]


@dataclass(frozen=True)
class ExchangePlan:
    """What more than one rank adds to a plan."""

    token_M: Tensor  # int64, the token of each row sent; rows are ordered by destination, then token
    rows: Splits
    routes: Splits
    expert_order_R: Tensor  # int64, gathers received routes, ordered by (source, expert), by expert
    source_order_R: Tensor  # int64, the inverse
    received: int  # P


@dataclass(frozen=True)
class DispatchPlan:
    """Where every route goes. Routes are ordered by expert, then token."""

    tokens: int  # T
    flat_N: Tensor  # int64, token * E + expert of each route sent
    wait_row_index: Callable[[], Tensor]
    routes_per_expert_e: Tensor  # int64, R split over this rank's experts
    travel: ExchangePlan | None  # None on one rank
    group: object  # the EP group

    @cached_property
    def row_R(self) -> Tensor:
        """int64, the received row of each route, ordered by expert. Other ranks say it: the first to ask waits."""
        return self.wait_row_index()


class PendingPlan:
    """A plan whose sizes are on their way: to other ranks, and to the host. `finish` waits for them. Collective over
    the EP group.

    Args:
        map_TE: bool, which token uses which expert.
        group: EP group; its rank r owns the experts r * e ... (r + 1) * e - 1.
    """

    def __init__(self, map_TE: Tensor, group):
        tokens, experts = map_TE.shape
        self.map_TE, self.group, self.ep = map_TE, group, group.size()
        to_rank = any_in_row(map_TE.reshape(-1, experts // self.ep))
        self.token_to_rank_TP = to_rank.view(tokens, self.ep)  # which token goes where
        # For each rank, routes to each of its experts and, last, rows.
        sent = torch.cat((count_columns(map_TE).view(self.ep, -1), self.token_to_rank_TP.sum(0).unsqueeze(1)), dim=1)
        self.sizes = _Sizes(sent, start_counts(sent, group))

    def finish(self) -> DispatchPlan:
        """The plan. Its sizes are known to the host from here on, so nothing in it asks the device again."""
        tokens, experts = self.map_TE.shape
        routes_to, rows_to = self.sizes.to_ranks()
        place_N = _places(self.map_TE, sum(routes_to))
        token_N = place_N % max(tokens, 1)
        expert_N = place_N // max(tokens, 1)
        flat_N = token_N * experts + expert_N
        if self.ep == 1:
            counts_e = self.sizes.received[0, :-1]
            return DispatchPlan(tokens, flat_N, lambda: token_N, counts_e, None, self.group)

        # A route names its row by the row's place among those that go to the same rank.
        row_TP = self.token_to_rank_TP.cumsum(0) - 1
        own_N = row_TP.flatten().index_select(0, token_N * self.ep + expert_N // (experts // self.ep))
        token_M = _places(self.token_to_rank_TP, sum(rows_to)) % max(tokens, 1)

        routes_from, rows_from = self.sizes.from_ranks()
        places = start_all_to_all(own_N.to(torch.int32), routes_to, routes_from, self.group)
        received = self.sizes.received
        counts, rows_P = received[:, :-1], received[:, -1]
        expert_order = _by_expert(counts, sum(routes_from))
        source_order = torch.empty_like(expert_order)
        source_order[expert_order] = torch.arange(sum(routes_from), device=expert_order.device)
        travel = ExchangePlan(
            token_M=token_M,
            rows=Splits(rows_to, rows_from),
            routes=Splits(routes_to, routes_from),
            expert_order_R=expert_order,
            source_order_R=source_order,
            received=sum(rows_from),
        )

        def row_R() -> Tensor:
            first = torch.repeat_interleave(rows_P.cumsum(0) - rows_P, counts.sum(1), output_size=sum(routes_from))
            return (places() + first).index_select(0, expert_order)

        return DispatchPlan(tokens, flat_N, row_R, counts.sum(0), travel, self.group)


def plan_routes(map_TE: Tensor, group) -> DispatchPlan:
    """Turn a routing map into indices and split sizes, at once."""
    return PendingPlan(map_TE, group).finish()


class _Sizes:
    """How many routes and rows go to each rank and come from it, for the host.

    On a CPU it knows at once what goes, and waits for what comes when it is asked for it. On a GPU both travel to it
    together, through pinned memory on a stream of its own, so that it waits for them and for nothing that was queued
    after them.

    Args:
        sent: int64 [ranks, e + 1], routes to each expert and, last, rows.
        arrived: waits for the same of what comes.
    """

    def __init__(self, sent: Tensor, arrived: Callable[[], Tensor]):
        self.sent, self._arrived, self._copy = sent, arrived, None
        if sent.device.type != "cpu":
            both = torch.stack((_routes_and_rows(sent), _routes_and_rows(self.received)))
            self._copy = HostValues(both)

    @cached_property
    def received(self) -> Tensor:
        return self._arrived()

    def to_ranks(self) -> list[list[int]]:
        """Routes to each rank, and rows."""
        return _routes_and_rows(self.sent).tolist() if self._copy is None else self._copy.tolist()[0]

    def from_ranks(self) -> list[list[int]]:
        return _routes_and_rows(self.received).tolist() if self._copy is None else self._copy.tolist()[1]


def _routes_and_rows(counts: Tensor) -> Tensor:
    """[ranks, e + 1] -> [2, ranks]."""
    return torch.stack((counts[:, :-1].sum(1), counts[:, -1]))


def _places(map_TX: Tensor, count: int) -> Tensor:
    """int64 [count]: x * T + t of every true (t, x), ordered by x, then t."""
    return torch.nonzero_static(map_TX.t().reshape(-1), size=count).squeeze(1)


def _by_expert(counts: Tensor, total: int) -> Tensor:
    """Index that turns rows ordered by (source, expert) into rows ordered by (expert, source).

    counts: int64 [sources, experts], the size of each block. Both orders consist of the same blocks, so a block's
    rows move by the difference of its two starting points.
    """
    start = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()
    size = counts.t().flatten()
    shift = start - (size.cumsum(0) - size)
    return torch.repeat_interleave(shift, size, output_size=total) + torch.arange(total, device=counts.device)
