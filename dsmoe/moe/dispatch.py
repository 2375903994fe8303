"""Dispatch and combine without capacity, padding or drops.

Shapes as in `dsmoe.moe.plan`: T tokens, N routes and M rows of this rank, R routes and P rows that come here, H hidden.

    hidden_TH --gather--> rows_MH --all-to-all--> rows_PH --one copy a route, by expert--> rows_RH

and back the same way: what the experts of a rank made of a row is summed before it travels home, and what comes home is
summed per token, so a token without experts gets exactly 0. On one rank nothing travels: P is T.

Exchanges are begun early and waited for late: a `DispatchHandle` is on its way from when it is made until `arrive`, a
`Return` likewise, and their gradients on the way back from the gradient of `arrive` until that of where they were made.
Autograd goes back through a forward pass last operation first, so work that hides an exchange in the forward pass has
its own gradient hide the exchange of gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe.moe.plan import DispatchPlan, Splits
from dsmoe.parallel.collectives import start_all_to_all
from dsmoe.routers.scores import weights_at
from dsmoe.runtime.step_timer import step_timer


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


class _AsyncAllToAll:
    """Rows of a tensor on their way to other ranks, or their gradients on the way back.

    Args:
        index: which rows, in the order of `splits.send`; None: all.
        part: whose time it is, for the clock.
        dtype: of rows and gradients on the way; None: as they are. Sums are taken in the tensor's own.
    """

    def __init__(self, index: Tensor | None, splits: Splits, group, part: str, dtype: torch.dtype | None = None):
        self.index, self.splits, self.group, self.part, self.dtype = index, splits, group, part, dtype
        self.under_way: Callable[[], Tensor] | None = None

    def depart(self, source: Tensor) -> Tensor:
        """A ticket: the shape of what will arrive, without its memory."""
        return _Depart.apply(source, self)

    def arrive(self, ticket: Tensor, returning: Callable[[], None] | None = None) -> Tensor:
        """The rows; `returning` is called when their gradients have set out."""
        return _Arrive.apply(ticket, self, returning)

    def start(self, source: Tensor) -> None:
        """Send, unless they are on their way."""
        if self.under_way is None:
            self._send(source if self.index is None else source.index_select(0, self.index), self.splits)

    def start_back(self, grad: Tensor) -> None:
        self._send(grad, Splits(self.splits.receive, self.splits.send))

    def finish(self, dtype: torch.dtype) -> Tensor:
        arrived, self.under_way = self.under_way, None
        return arrived().to(dtype)

    def _send(self, rows: Tensor, splits: Splits) -> None:
        rows = rows if self.dtype is None else rows.to(self.dtype)
        self.under_way = start_all_to_all(rows, splits.send, splits.receive, self.group)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, leg: _AsyncAllToAll) -> Tensor:
        step_timer.switch(leg.part)
        ctx.leg, ctx.shape = leg, source.shape
        leg.start(source)
        return source.new_zeros(()).expand(sum(leg.splits.receive), *source.shape[1:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        step_timer.switch(ctx.leg.part)
        rows = ctx.leg.finish(grad.dtype)
        return rows if ctx.leg.index is None else _sum_rows(rows, ctx.leg.index, ctx.shape[0]), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, leg: _AsyncAllToAll, returning: Callable[[], None] | None) -> Tensor:
        step_timer.switch(leg.part)
        ctx.leg, ctx.returning = leg, returning
        return leg.finish(ticket.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        step_timer.switch(ctx.leg.part)
        ctx.leg.start_back(grad)
        if ctx.returning is not None:
            ctx.returning()
        return grad.new_zeros(()).expand_as(grad), None, None


class DispatchHandle:
    """Rows, weights and latents of tokens on their way to the experts' owners. Collective over the EP group.

    Args:
        hidden_TH, latents_TEr: of this rank's tokens.
        probs_N: weights of their routes, in the plan's order.
        exchange_dtype: of rows and their gradients on the way to other ranks; None: as they are. Weights and latents
            stay as they are.
    """

    def __init__(
        self, hidden_TH: Tensor, probs_N: Tensor, plan: DispatchPlan, exchange_dtype: torch.dtype | None = None,
        latents_TEr: Tensor | None = None,
    ):  # fmt: skip
        self.plan = plan
        self.sources = [hidden_TH, probs_N]
        if latents_TEr is not None:
            self.sources.append(latents_TEr.flatten(0, 1))
        self.legs = []
        if (travel := plan.travel) is not None:
            self.legs = [
                _AsyncAllToAll(travel.token_M, travel.rows, plan.group, "dispatch", exchange_dtype),
                _AsyncAllToAll(None, travel.routes, plan.group, "dispatch"),
                _AsyncAllToAll(plan.flat_N, travel.routes, plan.group, "dispatch"),
            ][: len(self.sources)]
        self.tickets = [leg.depart(source) for leg, source in zip(self.legs, self.sources, strict=False)]

    def start(self) -> None:
        """Send once more what has arrived before: a recompute keeps nothing of it."""
        with torch.no_grad():
            for leg, source in zip(self.legs, self.sources, strict=False):
                leg.start(source)

    def arrive(self, again: bool = False) -> list[Tensor]:
        """rows_RH, probs_R and, where there are latents, latents_Rr, ordered by expert.

        again: it will be called once more; otherwise the shipment lets go of what it was made of.
        """
        found = self._arrived()
        if not again:
            self.sources, self.tickets = [], []
        return found

    def _arrived(self) -> list[Tensor]:
        plan = self.plan
        if plan.travel is None:
            hidden_TH, probs_N, *latents = self.sources
            latents_Rr = [rows.index_select(0, plan.flat_N) for rows in latents]
            return [hidden_TH.index_select(0, plan.row_R), probs_N, *latents_Rr]
        self.start()
        rows_PH, *of_routes = (leg.arrive(ticket) for leg, ticket in zip(self.legs, self.tickets, strict=True))
        order, inverse = plan.travel.expert_order_R, plan.travel.source_order_R
        return [rows_PH.index_select(0, plan.row_R), *(_Reorder.apply(values, order, inverse) for values in of_routes)]


class Return:
    """What this rank's experts made of a shipment, on its way home. Collective over the EP group.

    Args:
        rows_PH: from `sum_of_routes`.
        again: a shipment that will be needed once more in the backward pass; sent when the gradients of these rows are.
    """

    def __init__(
        self,
        rows_PH: Tensor,
        plan: DispatchPlan,
        exchange_dtype: torch.dtype | None = None,
        again: DispatchHandle | None = None,
    ):
        self.rows_PH, self.plan, self.again = rows_PH, plan, again
        if (travel := plan.travel) is not None:
            self.leg = _AsyncAllToAll(
                None, Splits(travel.rows.receive, travel.rows.send), plan.group, "combine", exchange_dtype
            )
            self.rows_PH = self.leg.depart(rows_PH)

    def arrive(self) -> Tensor:
        """The sum for each token, [T, H], exactly 0 where a token has no route."""
        if self.plan.travel is None:
            return self.rows_PH
        rows_MH = self.leg.arrive(self.rows_PH, None if self.again is None else self.again.start)
        return _sum_rows(rows_MH, self.plan.travel.token_M, self.plan.tokens)


def dispatch(
    hidden_TH: Tensor, probs_TE: Tensor, plan: DispatchPlan, exchange_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Bring every route's token and weight to the expert's owner: rows_RH and probs_R, ordered by expert."""
    rows_RH, probs_R = DispatchHandle(hidden_TH, weights_at(probs_TE, plan.flat_N), plan, exchange_dtype).arrive()
    return rows_RH, probs_R


def combine(rows_RH: Tensor, plan: DispatchPlan, exchange_dtype: torch.dtype | None = None) -> Tensor:
    """Bring weighted expert outputs home and sum them per token: [T, H], exactly 0 where a token has no route."""
    return Return(sum_of_routes(rows_RH, plan), plan, exchange_dtype).arrive()


def sum_of_routes(rows_RH: Tensor, plan: DispatchPlan) -> Tensor:
    """What this rank's experts made of each row that came here: [P, H], or, on one rank, of each token, [T, H]."""
    return _sum_rows(rows_RH, plan.row_R, plan.tokens if plan.travel is None else plan.travel.received)


def _sum_rows(rows: Tensor, to: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_add(0, to, rows)
