"""Dispatch and combine without capacity, padding or drops.

Shapes: T tokens here, E experts, e = E / EP experts on this rank, H hidden. A *route* is an active (token, expert)
pair: N of this rank's tokens, R to this rank's experts. A *row* is a token on its way to one rank, however many of that
rank's experts it goes to: M rows leave, P arrive.

    hidden_TH --gather--> rows_MH --all-to-all--> rows_PH --one copy a route, by expert--> rows_RH

and back the same way: what the experts of a rank made of a row is summed before it travels home, and what comes home is
summed per token, so a token without experts gets exactly 0. On one rank nothing travels: P is T.
`plan_routes` decides everything about indices and counts once; what it returns is reused when activations are
recomputed. Its one host synchronisation fetches all split lists together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def plan_routes(map_TE: Tensor, group) -> RoutePlan:
    """Turn a routing map into indices and split sizes; collective over the EP group.

    Args:
        map_TE: bool, which token uses which expert.
        group: EP group; its rank r owns the experts r * e ... (r + 1) * e - 1.
    """
    tokens, experts = map_TE.shape
    ep = group.size()
    counts_E = map_TE.sum(0)
    if ep == 1:
        (routes,) = counts_E.sum().view(1).tolist()  # the one host sync
        place_N = _places(map_TE.t(), routes)
        token_N = place_N % max(tokens, 1)
        return RoutePlan(tokens, _flat(place_N, token_N, map_TE), token_N, counts_E, None, group)

    reach_TP = map_TE.view(tokens, ep, experts // ep).any(2)  # which token goes to which rank
    sent = torch.cat((counts_E.view(ep, -1), reach_TP.sum(0).unsqueeze(1)), dim=1)
    received = all_to_all_counts(sent, group)
    sizes = torch.stack((sent[:, :-1].sum(1), received[:, :-1].sum(1), sent[:, -1], received[:, -1]))
    routes_to, routes_from, rows_to, rows_from = sizes.tolist()  # the one host sync
    # The sizes are known by now, so nothing below asks the device again.
    place_N = _places(map_TE.t(), sum(routes_to))
    token_N = place_N % max(tokens, 1)
    # A route names its row by the row's place among those that go to the same rank.
    row_TP = reach_TP.cumsum(0) - 1
    owner_N = place_N // max(tokens, 1) // (experts // ep)
    row_N = row_TP.flatten().index_select(0, token_N * ep + owner_N).to(torch.int32)
    row_R = all_to_all_rows(row_N, routes_to, routes_from, group)
    first_P = received[:, -1].cumsum(0) - received[:, -1]
    row_R = row_R + torch.repeat_interleave(first_P, received[:, :-1].sum(1), output_size=sum(routes_from))
    expert_order = _by_expert(received[:, :-1], sum(routes_from))
    source_order = torch.empty_like(expert_order)
    source_order[expert_order] = torch.arange(sum(routes_from), device=expert_order.device)
    travel = Travel(
        token_M=_places(reach_TP.t(), sum(rows_to)) % max(tokens, 1),
        rows=Splits(rows_to, rows_from),
        routes=Splits(routes_to, routes_from),
        expert_order_R=expert_order,
        source_order_R=source_order,
        received=sum(rows_from),
    )
    row_R = row_R.index_select(0, expert_order)
    return RoutePlan(tokens, _flat(place_N, token_N, map_TE), row_R, received[:, :-1].sum(0), travel, group)


def _places(map_XT: Tensor, count: int) -> Tensor:
    """int64 [count], where a bool map is true, in the order of its flattened elements."""
    return torch.nonzero_static(map_XT.reshape(-1), size=count).squeeze(1)


def _flat(place_N: Tensor, token_N: Tensor, map_TE: Tensor) -> Tensor:
    """Places in the [E, T] map as places in [T, E]."""
    tokens, experts = map_TE.shape
    return token_N * experts + place_N // max(tokens, 1)


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


def dispatch(hidden_TH: Tensor, probs_TE: Tensor, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    """Bring every route's token and weight to the expert's owner: rows_RH and probs_R, ordered by expert."""
    rows_PH = hidden_TH
    if plan.travel is not None:
        rows_MH = hidden_TH.index_select(0, plan.travel.token_M)
        rows_PH = all_to_all_rows(rows_MH, plan.travel.rows.send, plan.travel.rows.receive, plan.group)
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


def combine(rows_RH: Tensor, plan: RoutePlan) -> Tensor:
    """Bring weighted expert outputs home and sum them per token: [T, H], exactly 0 where a token has no route."""
    if plan.travel is None:
        return _sum_rows(rows_RH, plan.row_R, plan.tokens)
    rows_PH = _sum_rows(rows_RH, plan.row_R, plan.travel.received)
    rows_MH = all_to_all_rows(rows_PH, plan.travel.rows.receive, plan.travel.rows.send, plan.group)
    return _sum_rows(rows_MH, plan.travel.token_M, plan.tokens)


def _sum_rows(rows: Tensor, to: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, rows.size(1)).index_add(0, to, rows)
