"""Plans of a layer's routes: every index and count that a dispatcher needs, decided once.

Shapes: T tokens here, E experts, e = E / EP experts on this rank. A *route* is an active (token, expert) pair: N of
this rank's tokens, R to this rank's experts. A *row* is a token sent to one rank, however many of that rank's experts
it goes to: M rows leave, P arrive.

A plan is reused when activations are recomputed. On an accelerator its one host synchronisation fetches all split lists
together; other work can be queued before the host waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dsmoe.parallel.collectives import start_all_to_all, start_counts
from dsmoe.routers.routing_map import any_in_row, count_columns
from dsmoe.runtime.device import HostValues


@dataclass(frozen=True)
class DispatchPlan:
    """What an MoE layer reads of a plan; dispatchers add what they need."""

    tokens: int  # T
    flat_N: Tensor  # int64, token * E + expert of each route sent, in the order in which weights are sent
    routes_per_expert_e: Tensor  # int64, R split over this rank's experts


@dataclass(frozen=True)
class LocalPlan(DispatchPlan):
    """All experts are on this rank. Routes are ordered by expert, then token."""

    token_N: Tensor  # int64


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

    token_M: Tensor  # int64, the token of each row sent
    rows: Splits
    routes: Splits
    expert_order_R: Tensor  # int64, gathers received routes, ordered by (source, expert), by expert
    source_order_R: Tensor  # int64, the inverse
    wait_row_index: Callable[[], Tensor]

    @property
    def received(self) -> int:
        """P"""
        return sum(self.rows.receive)

    @cached_property
    def row_R(self) -> Tensor:
        """int64, the received row of each route, ordered by expert. Other ranks send it: the first to ask waits."""
        return self.wait_row_index()


def start_local_plan(map_TE: Tensor) -> Callable[[], LocalPlan]:
    """Begin to plan for one rank. What it returns waits until the host knows the number of routes."""
    counts_E = count_columns(map_TE)
    counts = HostCounts(counts_E.unsqueeze(0), experts=len(counts_E))

    def finish() -> LocalPlan:
        ((routes,),) = counts.sent_to_ranks()
        token_N, expert_N = true_positions(map_TE, routes)
        return LocalPlan(len(map_TE), token_N * map_TE.size(1) + expert_N, counts_E, token_N)

    return finish


class PendingPlan:
    """An `ExchangePlan` whose sizes are on their way: to other ranks, and to the host. `finish` waits for them.
    Collective over the EP group. What is said of rows here is for rows that go to their ranks directly; a subclass may
    send them another way.

    Args:
        map_TE: bool, which token uses which expert.
        group: EP group; its rank p owns the experts p * e ... (p + 1) * e - 1.
    """

    plan_class: type[ExchangePlan] = ExchangePlan

    def __init__(self, map_TE: Tensor, group):
        tokens, experts = map_TE.shape
        self.map_TE, self.group, self.ep = map_TE, group, group.size()
        self.own_experts = experts // self.ep
        self.token_to_rank_TP = any_in_row(map_TE.reshape(-1, self.own_experts)).view(tokens, self.ep)
        # For each rank, routes to each of its experts and, last, rows.
        sent = torch.cat((count_columns(map_TE).view(self.ep, -1), self.count_rows()), dim=1)
        self.counts = HostCounts(sent, self.own_experts, start_counts(sent, group))

    def count_rows(self) -> Tensor:
        """int64 [ranks, n]: how many of this rank's tokens each rank needs, and what else ranks must know of rows."""
        return self.token_to_rank_TP.sum(0).unsqueeze(1)

    def finish(self) -> Any:  # a `plan_class`
        """The plan. Its sizes are known to the host from here on, so nothing in it asks the device again."""
        tokens, experts = self.map_TE.shape
        sent = self.counts.sent_to_ranks()
        token_N, expert_N = true_positions(self.map_TE, sum(counts[0] for counts in sent))
        # A route names its row by the row's place among those that the same rank gets from here.
        row_TP = self.token_to_rank_TP.cumsum(0) - 1
        own_N = row_TP.flatten().index_select(0, token_N * self.ep + expert_N // self.own_experts)
        token_M = self.find_rows(sent)

        received = self.counts.received_from_ranks()
        routes = Splits([counts[0] for counts in sent], [counts[0] for counts in received])
        wait_own_row = start_all_to_all(own_N.to(torch.int32), routes.send, routes.receive, self.group)
        routes_Pe, rows_P = self.counts.received[:, : self.own_experts], self.counts.received[:, self.own_experts]
        total = sum(routes.receive)
        expert_order = order_by_expert(routes_Pe, total)
        first_row_P = self.first_row_of_rank(rows_P)

        def wait_row_index() -> Tensor:
            first_R = torch.repeat_interleave(first_row_P, routes_Pe.sum(1), output_size=total)
            return (wait_own_row() + first_R).index_select(0, expert_order)

        return self.plan_class(
            tokens=tokens,
            flat_N=token_N * experts + expert_N,
            routes_per_expert_e=routes_Pe.sum(0),
            token_M=token_M,
            routes=routes,
            expert_order_R=expert_order,
            source_order_R=inverse_permutation(expert_order),
            wait_row_index=wait_row_index,
            **self.plan_rows(sent, received, token_M),
        )

    def find_rows(self, sent: list[list[int]]) -> Tensor:
        """int64 [M], the token of each row sent."""
        return true_positions(self.token_to_rank_TP, sum(counts[1] for counts in sent))[0]

    def first_row_of_rank(self, rows_P: Tensor) -> Tensor:
        """int64 [ranks]: where the rows that each rank sent begin among those that arrive."""
        return rows_P.cumsum(0) - rows_P

    def plan_rows(self, sent: list[list[int]], received: list[list[int]], token_M: Tensor) -> dict[str, Any]:
        """What else `plan_class` holds of rows, from routes and `count_rows` that go to and come from each rank."""
        return {"rows": Splits([counts[1] for counts in sent], [counts[1] for counts in received])}


class HostCounts:
    """How much goes to each rank and comes from it, for the host.

    On a CPU it knows at once what is sent, and waits for what is received when it is asked for it. On an accelerator
    both are copied to it together, so that it waits once.

    Args:
        sent: int64 [ranks, experts + n], routes to each expert and n other counts.
        start: waits for the same of what comes; None: only `sent` is asked for.
    """

    def __init__(self, sent: Tensor, experts: int, start: Callable[[], Tensor] | None = None):
        self.sent, self._experts, self._wait, self._copy = sent, experts, start, None
        if sent.device.type != "cpu":
            counts = [self._per_rank(sent)] + ([] if start is None else [self._per_rank(self.received)])
            self._copy = HostValues(torch.stack(counts))

    @cached_property
    def received(self) -> Tensor:
        """int64 [ranks, experts + n]"""
        return self._wait()

    def sent_to_ranks(self) -> list[list[int]]:
        """For each rank: routes, and the other counts."""
        return self._per_rank(self.sent).tolist() if self._copy is None else self._copy.tolist()[0]

    def received_from_ranks(self) -> list[list[int]]:
        return self._per_rank(self.received).tolist() if self._copy is None else self._copy.tolist()[1]

    def _per_rank(self, counts: Tensor) -> Tensor:
        return torch.cat((counts[:, : self._experts].sum(1, keepdim=True), counts[:, self._experts :]), dim=1)


def true_positions(map_TX: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """int64 [count] each: t and x of every true (t, x), ordered by x, then t."""
    flat = torch.nonzero_static(map_TX.t().reshape(-1), size=count).squeeze(1)
    tokens = max(len(map_TX), 1)
    return flat % tokens, flat // tokens


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
