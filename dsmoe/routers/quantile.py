"""Quantile routing: each expert takes every token whose score reaches a running global quantile of its scores.

    r = x W;   z_te = 1{r_te >= c_e};   gate_te = sigmoid(r_te) where z_te = 1, else 0        0..E experts per token
    q_e  = the r_te that k / E of all tokens of the step exceed, over all ranks
    c_e <- a c_e + (1 - a) q_e    once per optimizer step, with Adam's bias correction c_e / (1 - a^m) after m steps

Quantile balancing without the constraint of k experts per token (kexue.fm 11626): every expert has the same load on
average, without a loss or a rate, and a route depends on its token only. It is expert_threshold.py without warm-up and
capacity. q comes from integer counts, a histogram of sigmoid(r) with 1,000 bins, so that the number of ranks does not
matter. In the first step c is 0, and about half of all pairs are active. The decay is ours.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from dsmoe.routers.base import INFERENCE_FILE, Router, RouterOptions, Routing
from dsmoe.routers.controllers import SIGMOID_HISTOGRAM, CutoffController
from dsmoe.routers.registry import register
from dsmoe.routers.scores import Decision, exceeded_by, in_blocks
from dsmoe.routers.trained_gate import cutoffs_E, shift_to_probabilities


class QuantileOptions(RouterOptions):
    k: float = Field(1.0, gt=0)  # mean experts per token
    decay: float = Field(0.9, ge=0, lt=1)  # a

    def validate_for_model(self, model):
        if self.k < model.num_experts:
            return []
        return [f"router.k: found {self.k}, expected less than model.num_experts ({model.num_experts})"]

    def target_experts_per_token(self, model):
        return self.k

    def initial_experts_per_token(self, model):
        return model.num_experts / 2  # where a random gate is above 0


@register("quantile")
class QuantileRouter(Router):
    Options = QuantileOptions
    options: QuantileOptions
    controller: CutoffController
    summary = "each expert takes the tokens above a global quantile of its scores; a token may get none"
    inference_file = INFERENCE_FILE
    routes_in_blocks = True

    @classmethod
    def make_controller(cls, options: QuantileOptions, num_layers: int, num_experts: int) -> CutoffController:
        return CutoffController(num_layers, num_experts, options.decay, options.k / num_experts)

    @classmethod
    def inference_state(cls, controller: CutoffController, layer: int) -> dict[str, Tensor]:
        return {"cutoffs": controller.value_E(layer)}

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
            router.controller.start_layer(router.index, cutoffs)
        return {}

    def route(self, hidden_TH: Tensor, sequence_T: Tensor) -> Routing:
        cutoff_E = self.controller.value_E(self.index).to(hidden_TH.device)
        training = self.training and torch.is_grad_enabled()
        routing = in_blocks(partial(_decide, cutoff_E, training), self.gate_scores(hidden_TH))
        routing.histogram_EB = routing.loss_inputs.pop("histogram_EB", None)
        return routing


def _decide(cutoff_E: Tensor, training: bool, logits_tE: Tensor, _, saved_selection: Tensor | None) -> Decision:
    map_tE = logits_tE >= cutoff_E
    score_tE = logits_tE.sigmoid()
    # Not in the backward pass, which runs this again with gradients.
    sums = {"histogram_EB": SIGMOID_HISTOGRAM.count(score_tE)} if training and not torch.is_grad_enabled() else {}
    return Decision(score_tE.where(map_tE, 0), map_tE, sums)
