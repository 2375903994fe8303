"""Optimizers by name: registered with a decorator here, through the entry point `dsmoe.optimizers` elsewhere."""

from __future__ import annotations

from pydantic import ValidationError

from dsmoe.config import TrainingConfig
from dsmoe.errors import ConfigError
from dsmoe.optim.base import Optimizer, OptimizerOptions
from dsmoe.runtime.plugins import PluginRegistry

optimizers: PluginRegistry[Optimizer] = PluginRegistry(
    kind="optimizer",
    field="training.optimizer",
    base="dsmoe.optim.base:Optimizer",
    group="dsmoe.optimizers",
    modules=("dsmoe.optim.*",),
    skip=("registry", "base", "deepspeed", "groups", "eager"),  # without an optimizer
)
register, available = optimizers.register, optimizers.available


def optimizer_class(training: TrainingConfig) -> type[Optimizer]:
    """The class of `training.optimizer`.

    Raises:
        ConfigError: no optimizer has this name, or `training.optimizer_options` do not suit it.
    """
    optimizer = optimizers.get(training.optimizer)
    try:
        optimizer.options(training)
    except ValidationError as error:
        known = ", ".join(optimizer.Options.model_fields) or "none"
        raise ConfigError(
            [
                f"training.optimizer_options.{'.'.join(map(str, item['loc']))}: found {item['input']!r}: {item['msg']} "
                f"(options of {training.optimizer}: {known})"
                for item in error.errors()
            ]
        ) from None
    return optimizer


def option_classes() -> dict[str, type[OptimizerOptions]]:
    """Name -> options class of every optimizer."""
    return {name: optimizer.Options for name, optimizer in available().items()}
