"""Dispatch and combine without capacity, padding or drops.

Shapes: T tokens here, E experts, e = E / EP experts on this rank, H hidden. A *route* is an active (token, expert)
pair: N of this rank's tokens, R to this rank's experts. A *row* is a token on its way to one rank, however many of that
rank's experts it goes to: M rows leave, P arrive.

    hidden_TH --gather--> rows_MH --all-to-all--> rows_PH --one copy a route, by expert--> rows_RH

and back the same way: what the experts of a rank made of a row is summed before it travels home, and what comes home is
summed per token, so a token without experts gets exactly 0. On one rank nothing travels: P is T.
A plan decides everything about indices and counts once, and is reused when activations are recomputed. Its one host
synchronisation fetches all split lists together; other work can be queued before the host waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dsmoe.maps import any_in_row, count_columns
from dsmoe.parallel.collectives import all_to_all_counts, all_to_all_rows


@dataclass(frozen=True)
class Splits:
    """How many go to and come from each rank of the group."""

    send: list[int]
    receive: list[int]


@dataclass(frozen=True)
class Travel:
    """What more than one rank adds to a plan."""

    token_M: Tensor  # int64, the token of each row sent; rows are ordered by destination, then token
    rows: Splits
    routes: Splits
    expert_order_R: Tensor  # int64, gathers received routes, ordered by (source, expert), by expert
    source_order_R: Tensor  # int64, the inverse
    received: int  # P


@dataclass(frozen=True)
class RoutePlan:
    """Where every route goes. Routes are ordered by expert, then token."""

    tokens: int  # T
    flat_N: Tensor  # int64, token * E + expert of each route sent
    row_R: Tensor  # int64, the received row of each route, ordered by expert
    routes_per_expert_e: Tensor  # int64, R split over this rank's experts
    travel: Travel | None  # None on one rank
    group: object  # the EP group


class PlanInProgress:
    """A plan whose sizes are on their way to the host: `finish` waits for them. Collective over the EP group.

    Args:
        map_TE: bool, which token uses which expert.
        group: EP group; its rank r owns the experts r * e ... (r + 1) * e - 1.
    """

    def __init__(self, map_TE: Tensor, group):
        tokens, experts = map_TE.shape
        self.map_TE, self.group, self.ep = map_TE, group, group.size()
        self.reach_TP = any_in_row(map_TE.reshape(-1, experts // self.ep)).view(
            tokens, self.ep
        )  # which token goes where
        # For each rank, routes to each of its experts and, last, rows.
        sent = torch.cat((count_columns(map_TE).view(self.ep, -1), self.reach_TP.sum(0).unsqueeze(1)), dim=1)
        self.received = all_to_all_counts(sent, group)
        both = torch.stack((sent, self.received))
        self.sizes = _HostCopy(torch.stack((both[..., :-1].sum(2), both[..., -1])))

    def finish(self) -> RoutePlan:
        """The plan. Its sizes are known to the host from here on, so nothing in it asks the device again."""
        (routes_to, routes_from), (rows_to, rows_from) = self.sizes.tolist()
        tokens, experts = self.map_TE.shape
        place_N = _places(self.map_TE, sum(routes_to))
        token_N = place_N % max(tokens, 1)
        expert_N = place_N // max(tokens, 1)
        flat_N = token_N * experts + expert_N
        if self.ep == 1:
            return RoutePlan(tokens, flat_N, token_N, self.received[0, :-1], None, self.group)

        # A route names its row by the row's place among those that go to the same rank.
        row_TP = self.reach_TP.cumsum(0) - 1
        own_N = row_TP.flatten().index_select(0, token_N * self.ep + expert_N // (experts // self.ep))
        row_R = all_to_all_rows(own_N.to(torch.int32), routes_to, routes_from, self.group)
        counts, rows_P = self.received[:, :-1], self.received[:, -1]
        row_R = row_R + torch.repeat_interleave(rows_P.cumsum(0) - rows_P, counts.sum(1), output_size=sum(routes_from))
        expert_order = _by_expert(counts, sum(routes_from))
        source_order = torch.empty_like(expert_order)
        source_order[expert_order] = torch.arange(sum(routes_from), device=expert_order.device)
        travel = Travel(
            token_M=_places(self.reach_TP, sum(rows_to)) % max(tokens, 1),
            rows=Splits(rows_to, rows_from),
            routes=Splits(routes_to, routes_from),
            expert_order_R=expert_order,
            source_order_R=source_order,
            received=sum(rows_from),
        )
        return RoutePlan(tokens, flat_N, row_R.index_select(0, expert_order), counts.sum(0), travel, self.group)


def plan_routes(map_TE: Tensor, group) -> RoutePlan:
    """Turn a routing map into indices and split sizes, at once."""
    return PlanInProgress(map_TE, group).finish()


class _HostCopy:
    """A small tensor on its way to the host: from a GPU through pinned memory on a stream of its own, so that the host
    waits for these numbers and for nothing that was queued after them."""

    def __init__(self, values: Tensor):
        self.values, self.arrived = values, None
        if values.device.type == "cuda":
            stream = _side_stream(values.device)
            stream.wait_stream(torch.cuda.current_stream(values.device))
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            with torch.cuda.stream(stream):
                self.values.copy_(values, non_blocking=True)
            values.record_stream(stream)
            self.arrived = stream.record_event()

    def tolist(self) -> list:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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


class _Reorder(torch.autograd.Function):
    """Permutation of rows whose gradient is a gather too (autograd's own would scatter-add)."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def dispatch(
    hidden_TH: Tensor, probs_TE: Tensor, plan: RoutePlan, exchange_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Bring every route's token and weight to the expert's owner: rows_RH and probs_R, ordered by expert.

    exchange_dtype: of rows and their gradients on the way to other ranks; None: as they are. Weights stay as they are.
    """
    rows_PH = hidden_TH
    if plan.travel is not None:
        rows_MH = hidden_TH.index_select(0, plan.travel.token_M)
        rows_PH = _exchange(rows_MH, plan.travel.rows.send, plan.travel.rows.receive, plan, exchange_dtype)
    return rows_PH.index_select(0, plan.row_R), _send_routes(probs_TE.flatten(), plan)


def dispatch_latents(latents_TEr: Tensor, plan: RoutePlan) -> Tensor:
    """Bring the latent of every route to the expert's owner: [R, r], ordered by expert."""
    return _send_routes(latents_TEr.flatten(0, 1), plan)


def _send_routes(values: Tensor, plan: RoutePlan) -> Tensor:
    """values [T * E, ...] of the active routes, at the experts' owners: [R, ...], ordered by expert."""
    values_N = values.index_select(0, plan.flat_N)
    if plan.travel is None:
        return values_N
    routes = plan.travel.routes
    values_R = all_to_all_rows(values_N, routes.send, routes.receive, plan.group)
    return _Reorder.apply(values_R, plan.travel.expert_order_R, plan.travel.source_order_R)


def combine(rows_RH: Tensor, plan: RoutePlan, exchange_dtype: torch.dtype | None = None) -> Tensor:
    """Bring weighted expert outputs home and sum them per token: [T, H], exactly 0 where a token has no route."""
    return bring_home(sum_of_routes(rows_RH, plan), plan, exchange_dtype)


def sum_of_routes(rows_RH: Tensor, plan: RoutePlan) -> Tensor:
    """What this rank's experts made of each row that came here: [P, H], or, on one rank, of each token, [T, H]."""
    return _sum_rows(rows_RH, plan.row_R, plan.tokens if plan.travel is None else plan.travel.received)


def bring_home(rows_PH: Tensor, plan: RoutePlan, exchange_dtype: torch.dtype | None = None) -> Tensor:
    """From the ranks that it went to, the sum for each token: [T, H]."""
    if plan.travel is None:
        return rows_PH
    rows_MH = _exchange(rows_PH, plan.travel.rows.receive, plan.travel.rows.send, plan, exchange_dtype)
    return _sum_rows(rows_MH, plan.travel.token_M, plan.tokens)


def _exchange(rows: Tensor, send: list[int], receive: list[int], plan: RoutePlan, dtype: torch.dtype | None) -> Tensor:
    """All-to-all in `dtype`, in the backward pass too: sums are taken in the rows' own dtype, before and after."""
    sent = rows if dtype is None else rows.to(dtype)
    return all_to_all_rows(sent, send, receive, plan.group).to(rows.dtype)


def _sum_rows(rows: Tensor, to: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, rows.size(1)).index_add(0, to, rows)
