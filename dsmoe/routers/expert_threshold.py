"""Expert Threshold routing: each expert takes the tokens above a cutoff of its own (arXiv 2603.11535).

    r = x W;   z_te = 1{r_te >= c_e};   gate_te = sigmoid(r_te) where z_te = 1, else 0      no normalisation, no loss
    q_e   = the n-th largest r_te of the batch, n = T k / E                   what Expert Choice would cut at
    c_e  <- a c_e + (1 - a) mean(q_e)                                         once per optimizer step; used as
    c_e / (1 - a^m) after m steps                                             Adam's bias correction

mean(q) runs over ranks and micro-steps; the batch of a q is one rank's tokens of one micro-step, so the number of ranks
plays a part, as in the released code. With `cutoffs: global` q is that of all tokens of all ranks in the step, from
integer counts (a histogram of sigmoid(r) with 1,000 bins), so that only the warm-up and the capacity below depend on
the number of ranks. A token may get no expert: the paper adds a shared expert
(`model.moe_shared_expert_intermediate_size`) and keeps the first layer dense (`model.moe_layer_freq`).

Training, the first `warmup_steps`: Expert Choice (arXiv 2202.09368), every expert takes its n top tokens, which gives
perfect balance but lets a token's route depend on later tokens. After that, cutoffs, with the load of an expert held
within (1 - C) n and (1 + C) n tokens by moving its cutoff for this batch (`capacity_slack`, training only). Without any
warm-up the first step still runs on Expert Choice: there is no cutoff yet.
Evaluation and generation: always the cutoffs alone, so a route depends on its token only; before step 1 they are 0.

Published: a 0.999 (the code's default is 0.99), warm-up 4000 steps, C 0.5 in the paper (off in the code: null), Xavier
init of W (here model.init_std). k depends on the model.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import INFERENCE_FILE, Router, RouterOptions, Routing
from dsmoe.routers.controllers import SIGMOID_HISTOGRAM, CutoffController
from dsmoe.routers.registry import register
from dsmoe.routers.scores import exceeded_by
from dsmoe.routers.trained_gate import cutoffs_E, shift_to_probabilities


class ExpertThresholdOptions(RouterOptions):
    k: float = Field(1.0, gt=0)  # mean experts per token that the cutoffs stand for
    warmup_steps: int = Field(4000, ge=0)  # optimizer steps of Expert Choice
    decay: float = Field(0.999, ge=0, lt=1)  # a
    cutoffs: Literal["rank", "global"] = "rank"  # q_e of each rank's batch, averaged, or of all tokens of a step
    capacity_slack: float | None = Field(0.5, ge=0)  # C; null: no limit

    def validate_for_model(self, model):
        return self.at_most_num_experts("k", model)

    def target_experts_per_token(self, model):
        """k: exact in the warm-up, what the cutoffs give on average after it."""
        return self.k


@register("expert_threshold")
class ExpertThresholdRouter(Router):
    Options = ExpertThresholdOptions
    options: ExpertThresholdOptions
    controller: CutoffController
    summary = "each expert takes the tokens above its cutoff; a token may get none"
    paper = "2603.11535"
    inference_file = INFERENCE_FILE

    @classmethod
    def make_controller(cls, options: ExpertThresholdOptions, num_layers: int, num_experts: int) -> CutoffController:
        share = options.k / num_experts if options.cutoffs == "global" else None
        return CutoffController(num_layers, num_experts, options.decay, share)

    @classmethod
    def inference_state(cls, controller: CutoffController, layer: int) -> dict[str, Tensor]:
        return {"cutoffs": controller.value_E(layer)}

    @classmethod
    def benchmark_options(cls, k: int, num_experts: int, latent_norm: float):
        return {"k": float(k), "warmup_steps": 0, "capacity_slack": None}

    @classmethod
    def restore_controller(cls, controller: CutoffController, states) -> None:
        for layer, state in enumerate(states):
            controller.start_layer(layer, state["cutoffs"])

    def calibrate(self, hidden_TH: Tensor, k: float) -> None:
        self.controller.set_layer(self.index, exceeded_by(self.gating(hidden_TH), k / self.num_experts))

    @staticmethod
    def start_from_gates(routers, gates):
        for router, gate in zip(routers, gates, strict=True):
            shift_to_probabilities(router.weight.data, gate)
            cutoffs = cutoffs_E(router.weight.data, gate, router.options.k)
            router.controller.start_layer(router.index, cutoffs, router.options.warmup_steps)
        return {}

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        logits_TE = self.gating(hidden_TH)
        score_TE, cutoff_E = logits_TE.detach(), self.controller.value_E(self.index).to(logits_TE.device)
        if not self.training:
            map_TE = score_TE >= cutoff_E
            return Routing(logits_TE.sigmoid() * map_TE, map_TE)
        tokens, share, slack = score_TE.size(0), self.options.k / self.num_experts, self.options.capacity_slack
        if not tokens:  # a rank whose batch is all padding must not move the cutoffs
            return Routing(logits_TE.sigmoid(), score_TE >= cutoff_E, **self._for_controller(score_TE, cutoff_E))
        least, wanted, most = (
            min(tokens, round(tokens * share * (1 + change))) for change in (-(slack or 0), 0, slack or 0)
        )
        wanted = max(wanted, 1)
        best_nE, token_nE = score_TE.topk(max(wanted, most), dim=0)
        statistic_E = best_nE[wanted - 1]
        if self.controller.updates < max(self.options.warmup_steps, 1):
            map_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(0, token_nE[:wanted], True)
        else:
            if slack is not None:
                cutoff_E = torch.maximum(cutoff_E, best_nE[max(most, 1) - 1])
                cutoff_E = torch.minimum(cutoff_E, best_nE[least - 1]) if least > 0 else cutoff_E
            map_TE = score_TE >= cutoff_E
        return Routing(logits_TE.sigmoid() * map_TE, map_TE, **self._for_controller(score_TE, statistic_E))

    def _for_controller(self, score_TE: Tensor, statistic_E: Tensor) -> dict[str, Any]:
        if self.options.cutoffs == "rank":
            return {"statistic_E": statistic_E}
        return {"histogram_EB": SIGMOID_HISTOGRAM.count(score_TE.sigmoid())}
