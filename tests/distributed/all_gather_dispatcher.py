"""A token dispatcher from outside dsmoe: every rank gets all tokens of its group, and keeps those its experts want.

It exchanges more than an all-to-all, overlaps nothing and lets the host wait twice, but it is short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.moe.dispatch import CombineHandle, DeferredDispatch, ExpertInputs, TokenDispatcher, register
from dsmoe.moe.plan import DispatchPlan
from dsmoe.parallel.collectives import all_gather_rows, all_to_all_rows, start_counts


@dataclass(frozen=True)
class AllGatherPlan(DispatchPlan):
    tokens_of_rank: list[int]
    row_R: Tensor  # the gathered token of each route of this rank's experts, by expert
    flat_R: Tensor  # the same routes in [all tokens, E]


@register("all_gather")
class AllGatherDispatcher(TokenDispatcher):
    def start_plan(self, map_TE: Tensor) -> Callable[[], AllGatherPlan]:
        group, experts = self.groups.ep, self.num_experts // self.groups.ep_size
        own = slice(self.groups.ep_rank * experts, (self.groups.ep_rank + 1) * experts)
        wait_tokens = start_counts(torch.full((group.size(), 1), len(map_TE), device=map_TE.device), group)

        def finish() -> AllGatherPlan:
            tokens_of_rank = wait_tokens().flatten().tolist()
            map_GE = all_gather_rows(map_TE.to(torch.uint8), tokens_of_rank, group).bool()
            expert_R, row_R = map_GE[:, own].t().nonzero().unbind(1)
            flat_N = map_TE.flatten().nonzero().squeeze(1)
            counts_e, flat_R = map_GE[:, own].sum(0), row_R * self.num_experts + own.start + expert_R
            return AllGatherPlan(len(map_TE), flat_N, counts_e, tokens_of_rank, row_R, flat_R)

        return finish

    def dispatch(
        self, plan: AllGatherPlan, hidden_TH: Tensor, probs_N: Tensor, latents_TEr: Tensor | None = None
    ) -> DeferredDispatch:
        def gathered(rows: Tensor) -> Tensor:
            return all_gather_rows(rows, plan.tokens_of_rank, self.groups.ep)

        def gather() -> ExpertInputs:
            narrow_TH = hidden_TH if self.exchange_dtype is None else hidden_TH.to(self.exchange_dtype)
            rows_RH = gathered(narrow_TH).to(hidden_TH.dtype).index_select(0, plan.row_R)
            probs_TE = probs_N.new_zeros(plan.tokens * self.num_experts).index_put((plan.flat_N,), probs_N)
            probs_R = gathered(probs_TE.view(plan.tokens, self.num_experts)).flatten()[plan.flat_R]
            latents_Rr = None if latents_TEr is None else gathered(latents_TEr).flatten(0, 1)[plan.flat_R]
            return ExpertInputs(rows_RH, probs_R, latents_Rr)

        return DeferredDispatch(plan, gather)

    def reduce(self, out_RH: Tensor, plan: AllGatherPlan) -> Tensor:
        out_GH = out_RH.new_zeros(sum(plan.tokens_of_rank), out_RH.size(1))
        return out_GH.index_add(0, plan.row_R, out_RH)

    def combine(self, rows: Tensor, plan: AllGatherPlan, recomputed=None) -> CombineHandle:
        def gather() -> Tensor:
            ranks = self.groups.ep_size
            narrow = rows if self.exchange_dtype is None else rows.to(self.exchange_dtype)
            back = all_to_all_rows(narrow, plan.tokens_of_rank, [plan.tokens] * ranks, self.groups.ep)
            return back.to(rows.dtype).view(ranks, plan.tokens, rows.size(1)).sum(0)

        return CombineHandle(gather)
