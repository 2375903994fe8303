"""Megatron-Core's MoE layer with any router, variable-count dispatch and grouped experts.

route -> plan -> [dispatch -> experts] -> combine -> + shared experts

The part in brackets can be recomputed in the backward pass, and from there to combine the tokens can be processed in
chunks. Routing and plans stay outside, so a recompute reuses the route that was taken: it cannot flip one, and counts
and controllers never see a token twice.

While the experts work on one chunk, the next one is being dispatched and the previous one combined; in the backward
pass likewise, in reverse. Shared experts work while the first chunk is being dispatched; on an accelerator, also while
the host waits for its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmoe.moe.dispatch import CombineHandle, DispatchHandle, TokenDispatcher
from dsmoe.moe.gradient_accumulator import ChunkedGradAccumulator
from dsmoe.moe.plan import DispatchPlan
from dsmoe.routers.routing import RoutingResult
from dsmoe.routers.scores import is_on_host, weights_at
from dsmoe.runtime.step_timer import step_timer


class VariableMoELayer(MoELayer):
    """`MoELayer` for 0..E experts per token.

    Args:
        token_dispatcher: brings tokens to the experts and back, over the same EP group as `pg_collection.ep`.
        recompute: redo dispatch and experts in the backward pass instead of keeping their activations.
        chunks: process the tokens in that many chunks, of which two are under way while one is computed. With
            `recompute`, that is all that exists of buffers and activations, however many routes a rank receives.
        Others: Megatron-Core's. `submodules.experts` builds `dsmoe.moe.experts.GroupedExperts`.
    """

    def __init__(self, *args, token_dispatcher: TokenDispatcher, recompute: bool = False, chunks: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.token_dispatcher = token_dispatcher  # Megatron's sizes its buffers by top-k
        self.recompute, self.chunks = recompute, chunks

    @step_timer.timed("dispatch")
    def forward(self, hidden_states: Tensor, intermediate_tensors=None, padding_mask: Tensor | None = None):
        """hidden_states [S, B, H]; padding_mask [B, S], True = padding. Returns (output [S, B, H], None)."""
        routing = self._route(hidden_states, padding_mask)
        expert_kwargs = self._expert_kwargs(routing)
        plans = self.token_dispatcher.start_plans(self._chunk(routing.map_TE))
        dispatched = prefetch_one(self._dispatch(plans, hidden_states.flatten(0, 1), routing))
        first, shared = self._beside_shared_experts(dispatched, hidden_states)
        del plans, routing  # with many experts as large as what the handles hold
        combined = prefetch_one(self._run_experts(handle, expert_kwargs) for handle in chain([first], dispatched))
        outputs = [handle.wait() for handle in combined]
        output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view_as(hidden_states)
        return output if shared is None else output + shared, None

    @step_timer.timed("routing")
    def _route(self, hidden_states: Tensor, padding_mask: Tensor | None) -> RoutingResult:
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        return self.router(hidden_states, padding_mask)

    def _expert_kwargs(self, routing: RoutingResult) -> dict[str, object]:
        """What all chunks give the experts besides their rows."""
        expert_kwargs: dict[str, object] = {}
        if routing.reduce_erH is not None:
            expert_kwargs["reduce_erH"] = routing.reduce_erH
        if self.chunks > 1:
            expert_kwargs["sums"] = ChunkedGradAccumulator()
        return expert_kwargs

    def _chunk(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The same number of chunks on every rank, with tokens in them or not: each chunk is collective. A single chunk
        is the tensor itself: the gradient of a slice would be a copy."""
        if self.chunks == 1:
            return (rows,)
        return rows.tensor_split(self.chunks)

    def _dispatch(
        self, plans: list[Callable[[], DispatchPlan]], hidden_TH: Tensor, routing: RoutingResult
    ) -> Iterator[DispatchHandle]:
        """Each chunk of t tokens, launched towards its experts."""
        first_token = 0
        latents = [None] * self.chunks if routing.latents_TEr is None else self._chunk(routing.latents_TEr)
        for finish_plan, hidden_tH, latents_tEr in zip(plans, self._chunk(hidden_TH), latents, strict=True):
            plan = finish_plan()
            probs_N = weights_at(routing.probs_TE, plan.flat_N, first_token)
            yield self.token_dispatcher.dispatch(plan, hidden_tH, probs_N, latents_tEr)
            first_token += len(hidden_tH)

    def _run_experts(self, handle: DispatchHandle, expert_kwargs: dict) -> CombineHandle:
        """The experts of this rank on what arrives, launched back to its tokens. Combine keeps nothing for the backward
        pass, so a recompute ends before it."""
        if self.recompute and self.training:
            rows = checkpoint(
                self._run_and_reduce, handle, expert_kwargs, True, use_reentrant=False, preserve_rng_state=False
            )
            return self.token_dispatcher.combine(rows, handle.plan, recomputed=handle)
        rows = self._run_and_reduce(handle, expert_kwargs, False)
        return self.token_dispatcher.combine(rows, handle.plan)

    def _run_and_reduce(self, handle: DispatchHandle, expert_kwargs: dict, retain_for_backward: bool) -> Tensor:
        rows_RH, probs_R, latents_Rr = handle.wait(retain_for_backward)
        if latents_Rr is not None:
            expert_kwargs = {**expert_kwargs, "latents_Rr": latents_Rr}
        out_RH = self._run_local_experts(rows_RH, probs_R, handle.plan.routes_per_expert_e, expert_kwargs)
        return self.token_dispatcher.reduce(out_RH, handle.plan)

    @step_timer.timed("experts")
    def _run_local_experts(self, rows_RH: Tensor, probs_R: Tensor, counts_e: Tensor, expert_kwargs: dict) -> Tensor:
        return self.experts(rows_RH, counts_e, probs_R, **expert_kwargs)[0]

    def _beside_shared_experts(
        self, dispatched: Iterator[DispatchHandle], hidden_states: Tensor
    ) -> tuple[DispatchHandle, Tensor | None]:
        """The first chunk, launched, and what shared experts make of all tokens.

        To launch it the host waits for its sizes, and what is queued by then keeps a device at work: all of the shared
        experts where nothing is exchanged, otherwise all but their last product, which is left to hide the exchange. A
        CPU has nothing queued, and computes while the exchange is under way.
        """
        if not self.use_shared_expert:
            return next(dispatched), None
        if self.ep_group.size() == 1:
            shared = self._shared_experts(hidden_states)
            return next(dispatched), shared
        if is_on_host(hidden_states):
            return next(dispatched), self._shared_experts(hidden_states)
        launched: list[DispatchHandle] = []

        def launch(module, inputs) -> None:
            with step_timer.within("dispatch"):
                launched.append(next(dispatched))

        hook = self.shared_experts.linear_fc2.register_forward_pre_hook(launch)
        try:
            shared = self._shared_experts(hidden_states)
        finally:
            hook.remove()
        return launched[0], shared

    @step_timer.timed("shared experts")
    def _shared_experts(self, hidden_states: Tensor) -> Tensor:
        return self.shared_experts_compute(hidden_states)


def moe_layers_of(model: nn.Module) -> list[VariableMoELayer]:
    """In the order of the model's layers."""
    return [module for module in model.modules() if isinstance(module, VariableMoELayer)]


def prefetch_one(items: Iterable) -> Iterator:
    """The same items, each once the next has been made."""
    held: list = []
    for item in items:
        yield from held
        held = [item]
    yield from held
