"""Plans of a layer's routes: every index and count that a dispatcher needs, decided once.

Shapes: T tokens here, E experts, e = E / EP experts on this rank. A *route* is an active (token, expert) pair: N of
this rank's tokens, R to this rank's experts. A *row* is a token sent to one rank, however many of that rank's experts
it goes to: M rows leave, P arrive.

A plan is reused when activations are recomputed. The plans of all chunks of a layer exchange their counts together and,
on an accelerator, share one host synchronisation that fetches all split lists; other work can be queued before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dsmoe.parallel.collectives import start_all_to_all, start_counts
from dsmoe.routers.routing_map import any_in_row, count_columns
from dsmoe.runtime.device import HostValues

if TYPE_CHECKING:
    from dsmoe.triton.plan import PendingOrder
    from dsmoe.triton.rows import TokenOrder

# int64 [R], the token of each row; where Triton's kernels are used, with the order in which they sum.
RowIndex: TypeAlias = "Tensor | TokenOrder"


def numbers_of(index: RowIndex) -> Tensor:
    return index if isinstance(index, Tensor) else index.token_R


@dataclass(frozen=True)
class DispatchPlan:
    """What an MoE layer reads of a plan; dispatchers add what they need."""

    tokens: int  # T
    flat_N: Tensor  # int64, token * E + expert of each route sent, in the order in which weights are sent
    routes_per_expert_e: Tensor  # int64, R split over this rank's experts


@dataclass(frozen=True)
class LocalPlan(DispatchPlan):
    """All experts are on this rank. Routes are ordered by expert, then token."""

    token_N: RowIndex


@dataclass(frozen=True)
class Splits:
    """How many go to and come from each rank of a group."""

    send: list[int]
    receive: list[int]

    def reversed(self) -> Splits:
        return Splits(self.receive, self.send)


@dataclass(frozen=True)
class ExchangePlan(DispatchPlan):
    """Routes leave ordered by expert, then token; rows by destination, then token."""

    token_M: RowIndex  # the token of each row sent
    rows: Splits
    routes: Splits
    expert_order_R: Tensor  # int64, gathers received routes, ordered by (source, expert), by expert
    source_order_R: Tensor  # int64, the inverse
    wait_row_index: Callable[[], Tensor]
    fused: bool

    @property
    def received(self) -> int:
        """P"""
        return sum(self.rows.receive)

    @cached_property
    def row_R(self) -> RowIndex:
        """The received row of each route, ordered by expert. Other ranks send it: the first to ask waits."""
        row_R = self.wait_row_index()
        if not self.fused:
            return row_R
        from dsmoe.triton.rows import TokenOrder

        return TokenOrder.of(row_R, self.received)


def start_local_plans(maps: Sequence[Tensor], fused: bool = False) -> list[Callable[[], LocalPlan]]:
    """Begin to plan for one rank. The first that is called waits until the host knows the numbers of routes."""
    pending = [start_positions(map_TE, fused) for map_TE in maps]
    counts_CE = _stacked([positions.counts_X for positions in pending])
    counts = HostCounts(counts_CE.unsqueeze(1), experts=counts_CE.size(1))

    def finish(chunk: int) -> LocalPlan:
        ((routes,),) = counts.sent_to_ranks(chunk)
        order = pending[chunk].finish(routes)
        return LocalPlan(len(maps[chunk]), order.flat_N, counts_CE[chunk], order.by_token)

    return [partial(finish, chunk) for chunk in range(len(maps))]


def start_plans(pending: Sequence[PendingPlan]) -> list[Callable[[], Any]]:
    """Exchange what the plans of all chunks count, together. Each that is called waits for it, and returns its plan.
    Collective over the EP group."""
    first = pending[0]
    counts = HostCounts(_stacked([plan.sent for plan in pending]), first.own_experts, first.group)
    return [partial(plan.finish, counts, chunk) for chunk, plan in enumerate(pending)]


def _stacked(counts: list[Tensor]) -> Tensor:
    return counts[0].unsqueeze(0) if len(counts) == 1 else torch.stack(counts)


class PendingPlan:
    """An `ExchangePlan` whose sizes are yet to be exchanged, by `start_plans`. What is said of rows here is for rows
    that go to their ranks directly; a subclass may send them another way.

    Args:
        map_TE: bool, which token uses which expert.
        group: EP group; its rank p owns the experts p * e ... (p + 1) * e - 1.
        fused: whether Triton's kernels order routes, and sum rows.

    Attributes:
        sent: int64 [ranks, e + n]; for each rank, routes to each of its experts, then what `count_rows` gives.
    """

    plan_class: type[ExchangePlan] = ExchangePlan

    def __init__(self, map_TE: Tensor, group, fused: bool = False):
        tokens, experts = map_TE.shape
        self.map_TE, self.group, self.ep, self.fused = map_TE, group, group.size(), fused
        self.own_experts = experts // self.ep
        self.token_to_rank_TP = any_in_row(map_TE.reshape(-1, self.own_experts)).view(tokens, self.ep)
        self.route_positions = start_positions(map_TE, fused)
        self.sent = torch.cat((self.route_positions.counts_X.view(self.ep, -1), self.count_rows()), dim=1)

    def count_rows(self) -> Tensor:
        """int64 [ranks, n]: how many of this rank's tokens each rank needs, and what else ranks must know of rows."""
        self.row_positions = start_positions(self.token_to_rank_TP, self.fused)
        return self.row_positions.counts_X.unsqueeze(1)

    def finish(self, counts: HostCounts, chunk: int) -> Any:  # a `plan_class`
        """The plan. Its sizes are known to the host from here on, so nothing in it asks the device again."""
        sent = counts.sent_to_ranks(chunk)
        routes_sent = self.route_positions.finish(sum(to_rank[0] for to_rank in sent))
        # A route names its row by the row's place among those that the same rank gets from here.
        row_TP = self.token_to_rank_TP.cumsum(0) - 1
        own_N = row_TP.flatten().index_select(0, routes_sent.flat_N // self.own_experts)
        token_M = self.find_rows(sent)

        received = counts.received_from_ranks(chunk)
        routes = Splits([to_rank[0] for to_rank in sent], [from_rank[0] for from_rank in received])
        wait_own_row = start_all_to_all(own_N.to(torch.int32), routes.send, routes.receive, self.group)
        routes_Pe, rows_P = counts.received[chunk, :, : self.own_experts], counts.received[chunk, :, self.own_experts]
        total = sum(routes.receive)
        expert_order = order_by_expert(routes_Pe, total)
        first_row_P = self.first_row_of_rank(rows_P)

        def wait_row_index() -> Tensor:
            first_R = torch.repeat_interleave(first_row_P, routes_Pe.sum(1), output_size=total)
            return (wait_own_row() + first_R).index_select(0, expert_order)

        return self.plan_class(
            tokens=len(self.map_TE),
            flat_N=routes_sent.flat_N,
            routes_per_expert_e=routes_Pe.sum(0),
            token_M=token_M,
            routes=routes,
            expert_order_R=expert_order,
            source_order_R=inverse_permutation(expert_order),
            wait_row_index=wait_row_index,
            fused=self.fused,
            **self.plan_rows(sent, received, token_M),
        )

    def find_rows(self, sent: list[list[int]]) -> RowIndex:
        """The token of each row sent."""
        return self.row_positions.finish(sum(counts[1] for counts in sent)).by_token

    def first_row_of_rank(self, rows_P: Tensor) -> Tensor:
        """int64 [ranks]: where the rows that each rank sent begin among those that arrive."""
        return rows_P.cumsum(0) - rows_P

    def plan_rows(self, sent: list[list[int]], received: list[list[int]], token_M: RowIndex) -> dict[str, Any]:
        """What else `plan_class` holds of rows, from routes and `count_rows` that go to and come from each rank."""
        return {"rows": Splits([counts[1] for counts in sent], [counts[1] for counts in received])}


class HostCounts:
    """How much goes to each rank and comes from it in each chunk, for the host.

    On a CPU it knows at once what is sent, and waits for what is received when it is asked for it. On an accelerator
    both are copied to it together, so that it waits once.

    Args:
        sent: int64 [chunks, ranks, experts + n], routes to each expert and n other counts.
        group: the ranks; None: only `sent` is asked for.
    """

    def __init__(self, sent: Tensor, experts: int, group=None):
        self.sent, self._experts, self._copy = sent, experts, None
        self._wait = None if group is None else start_counts(sent.transpose(0, 1).flatten(1), group)
        if sent.device.type != "cpu":
            counts = [self._per_rank(sent)] + ([] if group is None else [self._per_rank(self.received)])
            self._copy = HostValues(torch.stack(counts))

    @cached_property
    def received(self) -> Tensor:
        """int64 [chunks, ranks, experts + n]"""
        return self._wait().unflatten(1, (len(self.sent), -1)).transpose(0, 1)

    @cached_property
    def _values(self) -> list:
        return self._copy.tolist()

    def sent_to_ranks(self, chunk: int) -> list[list[int]]:
        """For each rank: routes, and the other counts."""
        return self._per_rank(self.sent[chunk]).tolist() if self._copy is None else self._values[0][chunk]

    def received_from_ranks(self, chunk: int) -> list[list[int]]:
        return self._per_rank(self.received[chunk]).tolist() if self._copy is None else self._values[1][chunk]

    def _per_rank(self, counts: Tensor) -> Tensor:
        routes, others = counts[..., : self._experts], counts[..., self._experts :]
        return torch.cat((routes.sum(-1, keepdim=True), others), dim=-1)


class Listed(NamedTuple):
    """Every true (t, x) of a map [T, X], ordered by x, then t."""

    flat_N: Tensor  # int64, t * X + x
    by_token: RowIndex  # t


class Positions:
    """What is true in a map, bool [T, X]: counted at once, listed when the host knows how many there are.

    Attributes:
        counts_X: int64.
    """

    def __init__(self, map_TX: Tensor):
        self.map_TX, self.counts_X = map_TX, count_columns(map_TX)

    def finish(self, count: int) -> Listed:
        tokens, columns = self.map_TX.shape
        by_column_N = torch.nonzero_static(self.map_TX.t().reshape(-1), size=count).squeeze(1)
        token_N = by_column_N % max(tokens, 1)
        return Listed(token_N * columns + by_column_N // max(tokens, 1), token_N)


def start_positions(map_TX: Tensor, fused: bool) -> Positions | PendingOrder:
    """By Triton's kernels if `fused`."""
    if not fused:
        return Positions(map_TX)
    from dsmoe.triton.plan import PendingOrder

    return PendingOrder(map_TX)


def order_by_expert(counts: Tensor, total: int) -> Tensor:
    """Index that turns rows ordered by (source, expert) into rows ordered by (expert, source).

    counts: int64 [sources, experts], the size of each block. Both orders consist of the same blocks, so a block's
    rows move by the difference of its two starting points.
    """
    start = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()
    size = counts.t().flatten()
    shift = start - (size.cumsum(0) - size)
    return torch.repeat_interleave(shift, size, output_size=total) + torch.arange(total, device=counts.device)


def inverse_permutation(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
