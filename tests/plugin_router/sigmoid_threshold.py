"""A router outside dsmoe: sigmoid gates over one threshold that moves until k experts per token are active on average.

s = sigmoid(x W);  gate_e = s_e where s_e > c, else 0;  c += rate * (density - k / E) after each optimizer step
"""

import torch
from pydantic import Field

from dsmoe.routers.base import Router, RouterOptions, Routing
from dsmoe.routers.controllers import Controller


class SigmoidThresholdOptions(RouterOptions):
    k: float = Field(1.0, gt=0)  # mean active experts per token
    rate: float = Field(0.1, gt=0)

    def validate_for_model(self, model):
        if self.k > model.num_experts:
            return [f"router.k: found {self.k}, expected at most model.num_experts ({model.num_experts})"]
        return []

    def target_experts_per_token(self, model):
        return self.k


class ThresholdController(Controller):
    def __init__(self, target_density: float, rate: float):
        super().__init__(threshold=torch.tensor(0.5))
        self.target_density, self.rate = target_density, rate

    def update(self, totals):
        error = (totals.density() - self.target_density).float()
        self.state["threshold"] = self.state["threshold"] + self.rate * error

    def metrics(self):
        return {"threshold": self.state["threshold"]}


class SigmoidThresholdRouter(Router):
    Options = SigmoidThresholdOptions

    @classmethod
    def make_controller(cls, options, num_layers, num_experts):
        return ThresholdController(options.k / num_experts, options.rate)

    def route(self, hidden_TH, sequence_T):
        score_TE = self.gating(hidden_TH).sigmoid()
        map_TE = score_TE > self.controller.state["threshold"]
        return Routing(score_TE * map_TE, map_TE, loss_inputs={})
