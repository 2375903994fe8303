"""Dispatch and combine by one all-to-all each, without capacity, padding or drops.

Shapes as in `dsmoe.moe.plan`: T tokens, N routes and M rows of this rank, R routes and P rows that come here, H hidden.

    hidden_TH --gather--> rows_MH --all-to-all--> rows_PH --one copy a route, by expert--> rows_RH

and back the same way: what the experts of a rank made of a row is summed before it is sent back, and what comes back is
summed per token, so a token without experts gets exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsmoe.moe.dispatch import CombineHandle, DispatchHandle, ExpertInputs, TokenDispatcher, register
from dsmoe.moe.exchange import AsyncAllToAll, Reorder, sum_rows, take_rows
from dsmoe.moe.plan import ExchangePlan, PendingPlan, start_plans
from dsmoe.runtime.step_timer import step_timer


@register("all_to_all")
class AllToAllDispatcher(TokenDispatcher):
    """A row for each (token, rank), from its source to its destination directly."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.row_group = self.groups.ep

    def start_plan(self, map_TE: Tensor) -> Callable[[], ExchangePlan]:
        return self.start_plans([map_TE])[0]

    def start_plans(self, maps: Sequence[Tensor]) -> list[Callable[[], ExchangePlan]]:
        return start_plans([self.pending_plan(map_TE) for map_TE in maps])

    def pending_plan(self, map_TE: Tensor) -> PendingPlan:
        return PendingPlan(map_TE, self.groups.ep, self.fused)

    def dispatch(
        self, plan: ExchangePlan, hidden_TH: Tensor, probs_N: Tensor, latents_TEr: Tensor | None = None
    ) -> DispatchHandle:
        exchanges = [
            AsyncAllToAll(plan.rows, self.row_group, "dispatch", plan.token_M, self.exchange_dtype),
            AsyncAllToAll(plan.routes, self.groups.ep, "dispatch"),
        ]
        sources = [hidden_TH, probs_N]
        if latents_TEr is not None:
            exchanges.append(AsyncAllToAll(plan.routes, self.groups.ep, "dispatch", plan.flat_N))
            sources.append(latents_TEr.flatten(0, 1))
        return AllToAllDispatchHandle(plan, exchanges, sources, self.receive_rows)

    def receive_rows(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """[R, H] ordered by expert, from the rows that were exchanged."""
        return take_rows(rows, plan.row_R)

    @step_timer.timed("combine")
    def reduce(self, out_RH: Tensor, plan: ExchangePlan) -> Tensor:
        return sum_rows(out_RH, plan.row_R, plan.received)

    def combine(self, rows: Tensor, plan: ExchangePlan, recomputed: DispatchHandle | None = None) -> CombineHandle:
        exchange = AsyncAllToAll(plan.rows.reversed(), self.row_group, "combine", dtype=self.exchange_dtype)
        placeholder = exchange.launch(rows)

        def gather() -> Tensor:
            rows_MH = exchange.wait(placeholder, None if recomputed is None else recomputed.relaunch)
            return sum_rows(rows_MH, plan.token_M, plan.tokens)

        return CombineHandle(gather)


class AllToAllDispatchHandle(DispatchHandle):
    """Rows, weights and latents under way from when it is made.

    Args:
        exchanges: of rows, of weights and, if there are any, of latents.
        sources: what each of them sends.
        receive_rows: of the dispatcher.
    """

    plan: ExchangePlan

    def __init__(
        self,
        plan: ExchangePlan,
        exchanges: list[AsyncAllToAll],
        sources: list[Tensor],
        receive_rows: Callable[[Tensor, ExchangePlan], Tensor],
    ):
        self.plan, self.exchanges, self.sources, self.receive_rows = plan, exchanges, sources, receive_rows
        self.placeholders = [exchange.launch(source) for exchange, source in zip(exchanges, sources, strict=True)]

    def relaunch(self) -> None:
        with torch.no_grad():
            for exchange, source in zip(self.exchanges, self.sources, strict=True):
                exchange.send(source)

    def wait(self, retain_for_backward: bool = False) -> ExpertInputs:
        self.relaunch()
        waits = zip(self.exchanges, self.placeholders, strict=True)
        rows, *per_route = (exchange.wait(placeholder) for exchange, placeholder in waits)
        if not retain_for_backward:
            self.sources, self.placeholders = [], []
        plan = self.plan
        ordered = (Reorder.apply(values, plan.expert_order_R, plan.source_order_R) for values in per_route)
        return ExpertInputs(self.receive_rows(rows, plan), *ordered)
