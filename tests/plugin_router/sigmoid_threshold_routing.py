"""The router of sigmoid_threshold.py at inference, for an export: imports nothing but torch."""

import torch
from torch import nn


class SigmoidThresholdRouting(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("thresholds", torch.zeros(config.num_experts))

    def forward(self, hidden_TH):
        score_TE = nn.functional.linear(hidden_TH.float(), self.weight.float()).sigmoid()
        map_TE = score_TE > self.thresholds.float()
        return score_TE * map_TE, map_TE, None


def build_routing(config):
    return SigmoidThresholdRouting(config)
