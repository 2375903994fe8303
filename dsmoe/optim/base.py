"""What dsmoe has to know of an optimizer: its options, and the state that it keeps for each element of a parameter.

Checkpoints save, load and verify the states that are named here; the reset of dead experts asks what an expert takes
over from the one it is copied from; the planner's memory model asks how many there are.

Under ZeRO an optimizer steps on flat fp32 tensors that hold many parameters, cut wherever a rank's share ends. So it
must be elementwise: what becomes of an element may depend on that element's gradient, weight and state, and on numbers
that all elements share (the step), but not on its neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dsmoe.config import TrainingConfig


@dataclass(frozen=True)
class State:
    """One fp32 number that an optimizer keeps for each element of a parameter.

    Attributes:
        name: its key in torch's optimizer state, and in a checkpoint's files.
        non_negative: whether a value below 0 means damage.
        inherited: whether an expert that is reset to a copy of another takes over the other's; else it starts at 0.
    """

    name: str
    non_negative: bool = False
    inherited: bool = False


class OptimizerOptions(BaseModel):
    """Base of an optimizer's own options, `training.optimizer_options`: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Optimizer(ABC):
    """An optimizer as dsmoe sees it. Subclasses are never instantiated: they name a torch optimizer and its state.

    Attributes:
        name: `training.optimizer`; set by `dsmoe.optim.registry.register`.
        Options: of `training.optimizer_options`.
        states: in the order in which they are saved.
        batch_exponent: the learning rate's that suits a batch of B tokens grows with B to this power.
    """

    name: ClassVar[str]
    Options: ClassVar[type[OptimizerOptions]] = OptimizerOptions
    states: ClassVar[tuple[State, ...]]
    batch_exponent: ClassVar[float] = 0.5

    @classmethod
    @abstractmethod
    def build(cls, groups: list[dict[str, Any]], training: TrainingConfig) -> torch.optim.Optimizer:
        """A torch optimizer over parameter groups that have `params` and `weight_decay` (dsmoe/optim/groups.py)."""

    @classmethod
    def shared_state(cls, flat: Tensor, step: int) -> dict[str, Tensor]:
        """What it keeps besides `states` for a flat tensor after `step` steps: its counters, if it has any."""
        return {}

    @classmethod
    def initial_state(cls, flat: Tensor, step: int) -> dict[str, Tensor]:
        """torch's state of a flat tensor after `step` steps, with zeros for `states`."""
        return {**cls.shared_state(flat, step), **{state.name: torch.zeros_like(flat) for state in cls.states}}

    @classmethod
    def kinds(cls) -> tuple[str, ...]:
        """What a checkpoint holds of every element: the fp32 master weight, then the states."""
        return ("weight", *(state.name for state in cls.states))

    @classmethod
    def options(cls, training: TrainingConfig) -> OptimizerOptions:
        return cls.Options.model_validate(training.optimizer_options)
