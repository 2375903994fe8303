"""Megatron-Core's MoE layer with any router, variable-count dispatch and grouped experts.

route -> plan -> [dispatch -> experts -> combine] -> + shared experts

The part in brackets can be recomputed in the backward pass. Routing and its plan stay outside, so a recompute reuses
the route that was taken: it cannot flip one, and counts and controllers never see a token twice.
"""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsmoe.moe.dispatch import RoutePlan, combine, dispatch, dispatch_latents, plan_routes


class VariableMoELayer(MoELayer):
    """`MoELayer` for 0..E experts per token.

    Args:
        recompute: redo dispatch, experts and combine in the backward pass instead of keeping their activations.
        Others: Megatron-Core's. `submodules.experts` builds `dsmoe.moe.experts.GroupedExperts`.
    """

    def __init__(self, *args, recompute: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.recompute = recompute
        self.token_dispatcher = None  # Megatron's sizes its buffers by top-k; `dsmoe.moe.dispatch` does the work

    def forward(self, hidden_states: Tensor, intermediate_tensors=None, padding_mask: Tensor | None = None):
        """hidden_states [S, B, H]; padding_mask [B, S], True = padding. Returns (output [S, B, H], None)."""
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        probs_TE, map_TE, *latent = self.router(hidden_states, padding_mask)
        plan = plan_routes(map_TE, self.ep_group)
        hidden_TH = hidden_states.flatten(0, 1)
        if self.recompute and self.training:
            out_TH = checkpoint(
                self._routed, hidden_TH, probs_TE, plan, *latent, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out_TH = self._routed(hidden_TH, probs_TE, plan, *latent)
        output = out_TH.view_as(hidden_states)
        shared = self.shared_experts_compute(hidden_states)
        return (output if shared is None else output + shared), None

    def _routed(self, hidden_TH: Tensor, probs_TE: Tensor, plan: RoutePlan, *latent: Tensor) -> Tensor:
        rows_RH, probs_R = dispatch(hidden_TH, probs_TE, plan)
        more = {}
        if latent and self.router.sends_latents:
            more["latents_Rr"] = dispatch_latents(latent[0], plan)
        elif latent:
            more["reduce_erH"] = latent[0]
        out_RH, _ = self.experts(rows_RH, plan.routes_per_expert_e, probs_R, **more)
        return combine(out_RH, plan)
