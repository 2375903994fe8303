"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe.optim.base import Optimizer, State
from dsmoe.optim.registry import register


@register("adamw")
class AdamW(Optimizer):
    """Its options are `training.adam_beta1`, `adam_beta2` and `adam_eps`."""

    states = (State("exp_avg"), State("exp_avg_sq", non_negative=True, inherited=True))

    @classmethod
    def build(cls, groups, training) -> torch.optim.Optimizer:
        betas = training.adam_beta1, training.adam_beta2
        return torch.optim.AdamW(groups, lr=training.lr, betas=betas, eps=training.adam_eps, fused=True)

    @classmethod
    def shared_state(cls, flat: Tensor, step: int) -> dict[str, Tensor]:
        return {"step": torch.tensor(float(step), dtype=torch.float32, device=flat.device)}
