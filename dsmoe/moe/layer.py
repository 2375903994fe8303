"""Megatron-Core's MoE layer with any router, variable-count dispatch and grouped experts.

route -> plan -> [dispatch -> experts] -> combine -> + shared experts

The part in brackets can be recomputed in the backward pass, and from there to combine some of the tokens can be done at
a time. Routing and plans stay outside, so a recompute reuses the route that was taken: it cannot flip one, and counts
and controllers never see a token twice.

While the experts work on one part of the tokens, the next part is on its way to them and the one before on its way
home; in the backward pass likewise, the other way round. Shared experts work while the first part travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsmoe.moe.dispatch import DispatchHandle, Return, sum_of_routes
from dsmoe.moe.gradient_accumulator import ChunkedGradAccumulator
from dsmoe.moe.plan import PendingPlan
from dsmoe.routers.scores import weights_at
from dsmoe.runtime.step_timer import REST, step_timer


class VariableMoELayer(MoELayer):
    """`MoELayer` for 0..E experts per token.

    Args:
        recompute: redo dispatch and experts in the backward pass instead of keeping their activations.
        chunks: bring the tokens to the experts in that many parts, of which two travel while one is worked on. With
            `recompute`, that is all that exists of buffers and activations, however many routes a rank receives.
        exchange_dtype: of rows and their gradients while they travel between ranks; None keeps that of the model.
        Others: Megatron-Core's. `submodules.experts` builds `dsmoe.moe.experts.GroupedExperts`.
    """

    def __init__(
        self, *args, recompute: bool = False, chunks: int = 1, exchange_dtype: torch.dtype | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.recompute, self.chunks, self.exchange_dtype = recompute, chunks, exchange_dtype
        self.token_dispatcher = None  # Megatron's sizes its buffers by top-k; `dsmoe.moe.dispatch` does the work

    def forward(self, hidden_states: Tensor, intermediate_tensors=None, padding_mask: Tensor | None = None):
        """hidden_states [S, B, H]; padding_mask [B, S], True = padding. Returns (output [S, B, H], None)."""
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        (hidden_states,) = step_timer.mark_region(REST, "routing", hidden_states)
        routed = self.router(hidden_states, padding_mask)
        map_TE, latents_TEr, reduce_erH = routed.map_TE, routed.latents_TEr, routed.reduce_erH
        probs_TE, latents_TEr, reduce_erH = step_timer.mark_region(
            "routing", "dispatch", routed.probs_TE, latents_TEr, reduce_erH
        )
        # T tokens in all, t in a part.
        of_tokens = [hidden_states.flatten(0, 1)]
        if latents_TEr is not None:
            of_tokens.append(latents_TEr)
        more = {} if reduce_erH is None else {"reduce_erH": reduce_erH}
        if self.chunks > 1:
            more["sums"] = ChunkedGradAccumulator()
        plans = [PendingPlan(map_tE, self.ep_group) for map_tE in self._parts(map_TE)]
        alone = self.ep_group.size() == 1
        shared = self._shared_experts(hidden_states) if alone else None  # while the plans' sizes travel to the host
        shipments = prefetch_one(self._shipments(plans, probs_TE, *map(self._parts, of_tokens)))
        first = next(shipments)
        del of_tokens, routed, probs_TE, map_TE, latents_TEr, plans  # with many experts as large as what these keep
        if not alone:
            shared = self._shared_experts(hidden_states)
        returns = prefetch_one(self._to_experts(shipment, more) for shipment in chain([first], shipments))
        outputs = [rows.arrive() for rows in returns]
        output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view_as(hidden_states)
        (output,) = step_timer.mark_region("combine", REST, output if shared is None else output + shared)
        return output, None

    def _shared_experts(self, hidden_states: Tensor) -> Tensor | None:
        if not self.use_shared_expert:
            return None
        (hidden_states,) = step_timer.mark_region("dispatch", "shared experts", hidden_states)
        output = self.shared_experts_compute(hidden_states)
        return step_timer.mark_region("shared experts", "dispatch", output)[0]

    def _shipments(
        self, plans: list[PendingPlan], probs_TE: Tensor, hidden_tH: tuple[Tensor, ...], *latents: tuple[Tensor, ...]
    ) -> Iterator[DispatchHandle]:
        low = 0
        for progress, hidden, *sent in zip(plans, hidden_tH, *latents, strict=True):
            plan = progress.finish()
            yield DispatchHandle(hidden, weights_at(probs_TE, plan.flat_N, low), plan, self.exchange_dtype, *sent)
            low += len(hidden)

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The same number of parts on every rank, with tokens in them or not: each part is collective. All in one is
        no part: the gradient of a slice would be a copy."""
        if self.chunks == 1:
            return (rows,)
        least, more = divmod(len(rows), self.chunks)
        return rows.split([least + (part < more) for part in range(self.chunks)])

    def _to_experts(self, shipment: DispatchHandle, more: dict) -> Return:
        recompute = self.recompute and self.training
        if recompute:
            rows_PH = checkpoint(self._at_experts, shipment, more, True, use_reentrant=False, preserve_rng_state=False)
        else:
            rows_PH = self._at_experts(shipment, more, False)
        return Return(rows_PH, shipment.plan, self.exchange_dtype, shipment if recompute else None)

    def _at_experts(self, shipment: DispatchHandle, more: dict, again: bool) -> Tensor:
        """What this rank's experts make of the tokens that came here, [P, H]. On its way home nothing needs it in the
        backward pass, so a recompute ends here."""
        rows_RH, probs_R, *latents_Rr = shipment.arrive(again)
        rows_RH, probs_R = step_timer.mark_region("dispatch", "experts", rows_RH, probs_R)
        sent = {"latents_Rr": latents_Rr[0]} if latents_Rr else {}
        out_RH, _ = self.experts(rows_RH, shipment.plan.routes_per_expert_e, probs_R, **sent, **more)
        (out_RH,) = step_timer.mark_region("experts", "combine", out_RH)
        return sum_of_routes(out_RH, shipment.plan)


def prefetch_one(items: Iterable) -> Iterator:
    """The same items, each once the next has been made."""
    held: list = []
    for item in items:
        yield from held
        held = [item]
    yield from held
