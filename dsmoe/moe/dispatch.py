"""The contract between an MoE layer and whatever brings its tokens to the experts and back.

Shapes: T tokens and N routes of this rank, R routes to this rank's experts, E experts, e = E / EP on this rank, H
hidden, r latent width. A *route* is an active (token, expert) pair.

    plan = dispatcher.start_plan(map_TE)()                                  where every route goes
    handle = dispatcher.dispatch(plan, hidden_TH, probs_N, latents_TEr)     launch
    inputs = handle.wait()                                                  rows_RH, probs_R, latents_Rr, by expert
    out_RH = experts(inputs.rows_RH, plan.routes_per_expert_e, inputs.probs_R)
    rows = dispatcher.reduce(out_RH, plan)                                  sums on this rank, before they are sent
    output_TH = dispatcher.combine(rows, plan).wait()                       per token, exactly 0 without a route

A dispatcher is registered with `@register(name)` in `dsmoe/moe/dispatchers` and through the entry point group
`dsmoe.token_dispatchers` outside, and selected by `model.token_dispatcher`. `LocalDispatcher` is the smallest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dsmoe.moe.exchange import sum_rows, take_rows
from dsmoe.moe.expected_rows import resolve_dispatcher
from dsmoe.moe.plan import DispatchPlan, LocalPlan, start_local_plans
from dsmoe.runtime.plugins import token_dispatchers
from dsmoe.runtime.step_timer import step_timer

if TYPE_CHECKING:
    from dsmoe.parallel.groups import ParallelGroups

register = token_dispatchers.register


class ExpertInputs(NamedTuple):
    """What this rank's experts work on, ordered by expert."""

    rows_RH: Tensor  # the tokens' dtype
    probs_R: Tensor  # fp32, the weight of each route
    latents_Rr: Tensor | None = None


class DispatchHandle(ABC):
    """Tokens under way to the experts."""

    plan: DispatchPlan

    @abstractmethod
    def wait(self, retain_for_backward: bool = False) -> ExpertInputs:
        """What arrived here.

        Args:
            retain_for_backward: it will be asked for once more, by a recompute in the backward pass; otherwise the
                handle lets go of what it was made of.
        """

    def relaunch(self) -> None:  # noqa: B027  (need not do anything)
        """Send once more what arrived before, since a recompute keeps nothing of it. Called ahead of the second `wait`,
        when the gradients of this handle's combined rows have been launched."""


@dataclass
class DeferredDispatch(DispatchHandle):
    """Nothing was launched; `gather` does all of the work when it is waited for."""

    plan: DispatchPlan
    gather: Callable[[], ExpertInputs] | None

    def wait(self, retain_for_backward: bool = False) -> ExpertInputs:
        inputs = self.gather()
        if not retain_for_backward:
            self.gather = None
        return inputs


@dataclass
class CombineHandle:
    """Expert outputs under way to their tokens; `gather` waits for them and sums them."""

    gather: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """[T, H], the sum for each token, exactly 0 where a token has no route."""
        with step_timer.within("combine"):
            return self.gather()


class TokenDispatcher(ABC):
    """Brings tokens to the ranks that own their experts, and sums what comes back. One serves all layers of a model.

    Collective: every rank of `groups.ep` calls `start_plans`, what it returned, `dispatch`, `combine` and both `wait`
    equally often and in the same order, also with 0 tokens and 0 routes. So each of them may exchange, as may their
    gradients, but an exchange must happen on every rank if it does on one: do not leave one out because nothing is
    sent, and keep tensors without rows in the autograd graph. `reduce` is local.

    Gradients: of hidden_TH, probs_N and latents_TEr through `dispatch`, of out_RH through `reduce` and of rows through
    `combine`. Rows are copied to the experts and summed on the way back, in the tokens' dtype; `exchange_dtype` only
    narrows what is under way.

    On an accelerator the host may wait for the device once for all chunks of a layer, in what `start_plans` returned,
    and nowhere else.

    Args:
        groups: this rank's process groups; experts are spread over `groups.ep`, whose rank p owns the experts
            p * e ... (p + 1) * e - 1.
        num_experts: E.
        exchange_dtype: of rows and their gradients while they are exchanged; None: as they are. Weights and latents
            stay as they are.
        fused: whether Triton's kernels order routes and sum rows: in fp32, in a fixed order.
    """

    name = "unnamed"

    def __init__(
        self, groups: ParallelGroups, num_experts: int, exchange_dtype: torch.dtype | None = None, fused: bool = False
    ):
        self.groups, self.num_experts, self.exchange_dtype, self.fused = groups, num_experts, exchange_dtype, fused

    @abstractmethod
    def start_plan(self, map_TE: Tensor) -> Callable[[], DispatchPlan]:
        """Begin to plan a routing map, bool [T, E], in any memory layout. What it returns waits for the plan.

        The layer does other work in between. A plan is made once and used again by a recompute.
        """

    def start_plans(self, maps: Sequence[Tensor]) -> list[Callable[[], Any]]:
        """`start_plan` for each chunk of a layer's tokens; a dispatcher that overrides it makes the host wait once for
        all of them."""
        return [self.start_plan(map_TE) for map_TE in maps]

    @abstractmethod
    def dispatch(
        self, plan: DispatchPlan, hidden_TH: Tensor, probs_N: Tensor, latents_TEr: Tensor | None = None
    ) -> DispatchHandle:
        """Launch this rank's tokens towards their experts.

        Args:
            hidden_TH: the tokens, in the model's dtype.
            probs_N: fp32, the weights of their routes in the order of `plan.flat_N`.
            latents_TEr: what self-scoring experts were scored by, if the router sends it.
        """

    @abstractmethod
    def reduce(self, out_RH: Tensor, plan: DispatchPlan) -> Tensor:
        """What can be summed on this rank of weighted expert outputs, ordered as they were dispatched.

        Local, and within what a recompute repeats. What is kept between it and `combine` is memory of every layer.
        """

    @abstractmethod
    def combine(self, rows: Tensor, plan: DispatchPlan, recomputed: DispatchHandle | None = None) -> CombineHandle:
        """Launch what `reduce` returned towards its tokens.

        Args:
            recomputed: the handle that these rows came from, if a recompute will wait for it again: `relaunch` it when
                the gradients of these rows have been launched.
        """


@register("local")
class LocalDispatcher(TokenDispatcher):
    """All experts are here: nothing is exchanged."""

    def start_plan(self, map_TE: Tensor) -> Callable[[], LocalPlan]:
        return self.start_plans([map_TE])[0]

    def start_plans(self, maps: Sequence[Tensor]) -> list[Callable[[], LocalPlan]]:
        return start_local_plans(maps, self.fused)

    def dispatch(
        self, plan: LocalPlan, hidden_TH: Tensor, probs_N: Tensor, latents_TEr: Tensor | None = None
    ) -> DispatchHandle:
        def gather() -> ExpertInputs:
            latents_Rr = None if latents_TEr is None else latents_TEr.flatten(0, 1).index_select(0, plan.flat_N)
            return ExpertInputs(take_rows(hidden_TH, plan.token_N), probs_N, latents_Rr)

        return DeferredDispatch(plan, gather)

    @step_timer.timed("combine")
    def reduce(self, out_RH: Tensor, plan: LocalPlan) -> Tensor:
        return sum_rows(out_RH, plan.token_N, plan.tokens)

    def combine(self, rows: Tensor, plan: LocalPlan, recomputed: DispatchHandle | None = None) -> CombineHandle:
        return CombineHandle(lambda: rows)


def build_dispatcher(
    name: str,
    groups: ParallelGroups,
    num_experts: int,
    experts_per_token: float,
    exchange_dtype: torch.dtype | None = None,
    fused: bool = False,
) -> TokenDispatcher:
    """The dispatcher of a model.

    Args:
        name: a registered one, or "auto" (`dsmoe.moe.expected_rows.resolve_dispatcher`).
        experts_per_token: what the router aims at, by which "auto" chooses.

    Raises:
        ConfigError: no dispatcher has that name; says which there are.
    """
    ranks_per_node = None if groups.node is None else groups.node.size()
    name = resolve_dispatcher(name, num_experts, experts_per_token, groups.ep_size, ranks_per_node)
    return token_dispatchers.get(name)(groups, num_experts, exchange_dtype, fused)
