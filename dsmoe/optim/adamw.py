"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's, fused, or NVIDIA Apex's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dsmoe.errors import ConfigError
from dsmoe.optim.base import Optimizer, OptimizerOptions, State
from dsmoe.optim.eager import eager
from dsmoe.optim.registry import register


class AdamWOptions(OptimizerOptions):
    kernel: Literal["torch", "apex"] = "torch"  # both update all elements in one launch


@register("adamw")
class AdamW(Optimizer):
    """Besides `kernel` its options are `training.adam_beta1`, `adam_beta2` and `adam_eps`."""

    Options = AdamWOptions
    states = (State("exp_avg"), State("exp_avg_sq", non_negative=True, inherited=True))

    @classmethod
    def build(cls, groups, training) -> torch.optim.Optimizer:
        betas = training.adam_beta1, training.adam_beta2
        if AdamWOptions.model_validate(training.optimizer_options).kernel == "apex":
            return _apex_class()(groups, lr=training.lr, betas=betas, eps=training.adam_eps, adam_w_mode=True)
        kind = eager(torch.optim.AdamW)
        return kind(groups, lr=training.lr, betas=betas, eps=training.adam_eps, fused=True)

    @classmethod
    def shared_state(cls, flat: Tensor, step: int) -> dict[str, Tensor]:
        return {"step": torch.tensor(float(step), dtype=torch.float32, device=flat.device)}


def _apex_class() -> Callable[..., torch.optim.Optimizer]:
    """Apex's FusedAdam, which counts steps in its groups, with the count beside each tensor's moments, where torch has
    it. Raises `ConfigError` where Apex is not usable."""
    from dsmoe.runtime.accelerations import find_acceleration

    if not (apex := find_acceleration("NVIDIA Apex")).active:
        problem = f"training.optimizer_options.kernel: found apex, but NVIDIA Apex is {apex.reason}; expected torch"
        raise ConfigError([problem])
    from apex.optimizers import FusedAdam

    class ApexAdamW(FusedAdam):
        def step(self, closure=None):
            used = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
            for group, parameters in zip(self.param_groups, used, strict=True):
                group["step"] = next((int(self.state[p]["step"]) for p in parameters if self.state.get(p)), 0)
            loss = super().step(closure)
            for group, parameters in zip(self.param_groups, used, strict=True):
                for parameter in parameters:
                    self.state[parameter]["step"] = torch.tensor(float(group["step"]), dtype=torch.float32)
            return loss

    return ApexAdamW
