"""Megatron-Core's MoE layer with any router, variable-count dispatch and grouped experts.

route -> plan -> [dispatch -> experts] -> combine -> + shared experts

The part in brackets can be recomputed in the backward pass, and from there to combine some of the tokens can be done at
a time. Routing and plans stay outside, so a recompute reuses the route that was taken: it cannot flip one, and counts
and controllers never see a token twice.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsmoe.clock import REST, clock
from dsmoe.moe.dispatch import PlanInProgress, RoutePlan, bring_home, dispatch, dispatch_latents, sum_of_routes


class VariableMoELayer(MoELayer):
    """`MoELayer` for 0..E experts per token.

    Args:
        recompute: redo dispatch and experts in the backward pass instead of keeping their activations.
        chunks: bring the tokens to the experts in that many parts, one after another. With `recompute`, buffers and
            activations of one part are all that exists at a time, however many routes a rank receives.
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
        (hidden_states,) = clock.boundary(REST, "routing", hidden_states)
        probs_TE, map_TE, *latent = self.router(hidden_states, padding_mask)
        probs_TE, *latent = clock.boundary("routing", "dispatch", probs_TE, *latent)
        # T tokens in all, t in a part.
        of_tokens = [hidden_states.flatten(0, 1), probs_TE]
        if latent and self.router.sends_latents:
            of_tokens.append(latent.pop())
        plans = [PlanInProgress(map_tE, self.ep_group) for map_tE in self._parts(map_TE)]
        shared = self._shared_experts(hidden_states)  # run while the plans' sizes travel to the host
        outputs = []
        for started, (hidden_tH, probs_tE, *sent) in zip(plans, zip(*map(self._parts, of_tokens)), strict=True):
            inputs = (hidden_tH, probs_tE, started.finish(), *sent, *latent)
            if self.recompute and self.training:
                rows_PH = checkpoint(self._at_experts, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                rows_PH = self._at_experts(*inputs)
            outputs.append(bring_home(rows_PH, inputs[2], self.exchange_dtype))
        output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view_as(hidden_states)
        (output,) = clock.boundary("combine", REST, output if shared is None else output + shared)
        return output, None

    def _shared_experts(self, hidden_states: Tensor) -> Tensor | None:
        if not self.use_shared_expert:
            return None
        (hidden_states,) = clock.boundary("dispatch", "shared experts", hidden_states)
        output = self.shared_experts_compute(hidden_states)
        return clock.boundary("shared experts", "dispatch", output)[0]

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The same number of parts on every rank, with tokens in them or not: each part is collective. All in one is
        no part: the gradient of a slice would be a copy."""
        return (rows,) if self.chunks == 1 else rows.tensor_split(self.chunks)

    def _at_experts(self, hidden_TH: Tensor, probs_TE: Tensor, plan: RoutePlan, *latent: Tensor) -> Tensor:
        """What this rank's experts make of the tokens that came here, [P, H]. On its way home nothing needs it in the
        backward pass, so a recompute ends here."""
        rows_RH, probs_R = dispatch(hidden_TH, probs_TE, plan, self.exchange_dtype)
        more = {}
        if latent and self.router.sends_latents:
            more["latents_Rr"] = dispatch_latents(latent[0], plan)
        elif latent:
            more["reduce_erH"] = latent[0]
        rows_RH, probs_R = clock.boundary("dispatch", "experts", rows_RH, probs_R)
        out_RH, _ = self.experts(rows_RH, plan.routes_per_expert_e, probs_R, **more)
        (out_RH,) = clock.boundary("experts", "combine", out_RH)
        return sum_of_routes(out_RH, plan)
