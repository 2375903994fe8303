"""Dispatch and combine without capacity, padding or drops.

Shapes: T tokens here, E experts, e = E / EP experts on this rank, N routes sent (active pairs of this rank's map),
R routes received, H hidden.

    hidden_TH --gather by expert--> rows_NH --all-to-all--> rows_RH (by source) --regroup--> rows_RH (by expert)

and back the same way; the routes of a token are summed into its row, so a token without experts gets exactly 0.
`plan_routes` decides everything about indices and counts once; what it returns is reused when activations are
recomputed. Its one host synchronisation fetches both split lists together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.parallel.collectives import all_to_all_counts, all_to_all_rows


@dataclass(frozen=True)
class RoutePlan:
    """Where every route goes. A route is an active (token, expert) pair; routes are ordered by expert, then token."""

    token_N: Tensor  # int64, the token of each route sent
    flat_N: Tensor  # int64, its place in the transposed [E, T] map
    send: list[int]  # routes to each EP rank
    receive: list[int]  # routes from each EP rank
    expert_order_R: Tensor | None  # int64, gathers received rows by local expert; None where they are already
    source_order_R: Tensor | None  # int64, the inverse
    routes_per_expert_e: Tensor  # int64, R split over this rank's experts
    group: object  # the EP group


def plan_routes(map_TE: Tensor, group) -> RoutePlan:
    """Turn a routing map into indices and split sizes; collective over the EP group.

    Args:
        map_TE: bool, which token uses which expert.
        group: EP group; its rank r owns the experts r * e ... (r + 1) * e - 1.
    """
    ep = group.size()
    tokens = map_TE.size(0)
    send_counts = map_TE.sum(0).view(ep, -1)
    received_counts = all_to_all_counts(send_counts, group)
    send, receive = torch.stack((send_counts.sum(1), received_counts.sum(1))).tolist()  # the one host sync
    # nonzero_static: the number of routes is known by now, so this does not ask the device again.
    flat_N = torch.nonzero_static(map_TE.t().reshape(-1), size=sum(send)).squeeze(1)
    expert_order = source_order = None
    if ep > 1:
        expert_order = _by_expert(received_counts, sum(receive))
        source_order = torch.empty_like(expert_order)
        source_order[expert_order] = torch.arange(sum(receive), device=expert_order.device)
    return RoutePlan(
        token_N=flat_N % max(tokens, 1), flat_N=flat_N, send=send, receive=receive, expert_order_R=expert_order,
        source_order_R=source_order, routes_per_expert_e=received_counts.sum(0), group=group,
    )  # fmt: skip


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
    """Bring every route's token and weight to the expert's owner: rows_RH and probs_R, ordered by local expert."""
    probs_N = probs_TE.t().reshape(-1).index_select(0, plan.flat_N)
    return _send(hidden_TH.index_select(0, plan.token_N), plan), _send(probs_N, plan)


def dispatch_latents(latents_TEr: Tensor, plan: RoutePlan) -> Tensor:
    """Bring the latent of every route to the expert's owner: [R, r], ordered by local expert."""
    tokens, experts, _ = latents_TEr.shape
    place_N = plan.token_N * experts + plan.flat_N // max(tokens, 1)
    return _send(latents_TEr.flatten(0, 1).index_select(0, place_N), plan)


def _send(rows_N: Tensor, plan: RoutePlan) -> Tensor:
    rows_R = all_to_all_rows(rows_N, plan.send, plan.receive, plan.group)
    if plan.expert_order_R is None:
        return rows_R
    return _Reorder.apply(rows_R, plan.expert_order_R, plan.source_order_R)


def combine(rows_RH: Tensor, plan: RoutePlan, tokens: int) -> Tensor:
    """Bring weighted expert outputs home and sum them per token: [tokens, H], exactly 0 where a token has no route."""
    if plan.expert_order_R is not None:
        rows_RH = _Reorder.apply(rows_RH, plan.source_order_R, plan.expert_order_R)
    rows_NH = all_to_all_rows(rows_RH, plan.receive, plan.send, plan.group)
    return rows_NH.new_zeros(tokens, rows_NH.size(1)).index_add(0, plan.token_N, rows_NH)
