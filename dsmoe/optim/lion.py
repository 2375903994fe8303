"""Lion (Chen et al., arXiv 2302.06675): one momentum, and steps of one size in every coordinate.

    update_t = sign(beta1 m_{t-1} + (1 - beta1) g_t)
    w_t      = w_{t-1} - lr (update_t + weight_decay w_{t-1})
    m_t      = beta2 m_{t-1} + (1 - beta2) g_t

It keeps 4 bytes a parameter where AdamW keeps 8. Its updates are larger than AdamW's: the paper takes a third to a
tenth of AdamW's learning rate, and that much more weight decay.
"""

from __future__ import annotations

import torch
from pydantic import Field

from dsmoe.optim.base import Optimizer, OptimizerOptions, State
from dsmoe.optim.eager import eager
from dsmoe.optim.registry import register


class LionOptions(OptimizerOptions):
    beta1: float = Field(0.9, ge=0, lt=1)  # of the update's direction
    beta2: float = Field(0.99, ge=0, lt=1)  # of the momentum


class TorchLion(torch.optim.Optimizer):
    """Over any tensors, flat ones too."""

    def __init__(self, params, lr: float, beta1: float, beta2: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                update = torch.lerp(gradient, momentum, group["beta1"]).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - group["beta2"])


@register("lion")
class Lion(Optimizer):
    Options = LionOptions
    states = (State("exp_avg"),)

    @classmethod
    def build(cls, groups, training) -> torch.optim.Optimizer:
        return eager(TorchLion)(groups, lr=training.lr, **cls.options(training).model_dump())
