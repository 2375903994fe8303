"""Parameter groups: which parameters decay is decided by what a parameter is for, not by how many dimensions it has.

A parameter says so itself by an attribute `role`, which the module that makes it sets (`with_role`). One without is
taken for a matrix if each of the tensors that it holds is one: a packed [e, F] of e experts holds e vectors.

ZeRO wants experts in groups of their own, named after their expert-parallel group and marked `moe`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from dsmoe.config import TrainingConfig
from dsmoe.optim.deepspeed import logical_shape

EMBEDDINGS = ("word_embeddings.weight", "output_layer.weight")


class Role(StrEnum):
    """What a parameter is for."""

    MATRIX = "matrix"  # multiplies: projections, experts, gates of routers
    EMBEDDING = "embedding"  # a row for each token: the input embedding and the output layer
    VECTOR = "vector"  # scales and shifts: norms, biases, thresholds


def with_role(parameter: torch.nn.Parameter, role: Role) -> torch.nn.Parameter:
    """The same parameter, which now says what it is for."""
    parameter.role = Role(role)  # type: ignore[attr-defined]
    return parameter


def role_of(name: str, parameter: torch.nn.Parameter) -> Role:
    """`name` as in `model.named_parameters()`."""
    if hasattr(parameter, "role"):
        return Role(parameter.role)
    if name.endswith(EMBEDDINGS):
        return Role.EMBEDDING
    dimensions = len(logical_shape(parameter)) - hasattr(parameter, "first_expert")
    return Role.MATRIX if dimensions >= 2 else Role.VECTOR


def decays(role: Role, training: TrainingConfig) -> bool:
    """Whether weight decay touches it: matrices, and embeddings if `training.decay_embeddings` says so."""
    return role is Role.MATRIX or (role is Role.EMBEDDING and training.decay_embeddings)


def parameter_groups(model: torch.nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups with and without weight decay, experts apart."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if decays(role_of(name, parameter), training) else plain).append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": training.weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]
    return [group for group in split_params_into_different_moe_groups_for_optimizer(groups) if group["params"]]
