"""A router outside dsmoe, complete in this file: sigmoid gates above a threshold of each expert, moved by a controller.

s = sigmoid(x W);  gate_e = s_e where s_e > c_e, else 0;  c_e += rate * (share of tokens that use e - k / E) once a step
"""

from pathlib import Path

import torch
from pydantic import Field

from dsmoe.routers.base import Router, RouterOptions, Routing
from dsmoe.routers.controllers import Controller
from dsmoe.routers.scores import exceeded_by


class SigmoidThresholdOptions(RouterOptions):
    k: float = Field(1.0, gt=0)  # mean active experts per token
    rate: float = Field(0.1, gt=0)

    def validate_for_model(self, model):
        return self.at_most_num_experts("k", model)

    def target_experts_per_token(self, model):
        return self.k

    def initial_experts_per_token(self, model):
        return model.num_experts / 2  # where a random gate is above 0


class ThresholdController(Controller):
    def __init__(self, num_layers: int, num_experts: int, target_density: float, rate: float):
        super().__init__(thresholds=torch.full((num_layers, num_experts), 0.5))
        self.target_density, self.rate = target_density, rate

    def update(self, totals):
        share_LE = totals.counts_LE.float() / totals.tokens.clamp(min=1)
        self.state["thresholds"] = self.state["thresholds"] + self.rate * (share_LE - self.target_density)

    def metrics(self):
        return {"threshold": self.state["thresholds"].mean()}


class SigmoidThresholdRouter(Router):
    Options = SigmoidThresholdOptions
    summary = "sigmoid gates above a threshold for each expert"
    inference_file = Path(__file__).with_name("sigmoid_threshold_routing.py")

    @classmethod
    def make_controller(cls, options, num_layers, num_experts):
        return ThresholdController(num_layers, num_experts, options.k / num_experts, options.rate)

    @classmethod
    def inference_state(cls, controller, layer):
        return {"thresholds": controller.state["thresholds"][layer]}

    def route(self, hidden_TH, sequence_T):
        score_TE = self.gating(hidden_TH).sigmoid()
        map_TE = score_TE > self.controller.state["thresholds"][self.index].to(score_TE.device)
        return Routing(score_TE * map_TE, map_TE)

    def calibrate(self, hidden_TH, k):
        scores_TE = self.gating(hidden_TH).sigmoid()
        self.controller.state["thresholds"][self.index] = exceeded_by(scores_TE, k / self.num_experts)
