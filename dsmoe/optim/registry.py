"""Optimizers by name: registered with a decorator here, through the entry point `dsmoe.optimizers` elsewhere."""

from __future__ import annotations

import difflib

from pydantic import ValidationError

from dsmoe.config import TrainingConfig
from dsmoe.errors import ConfigError
from dsmoe.optim.base import Optimizer, OptimizerOptions
from dsmoe.runtime.plugins import import_submodules, installed_plugins

GROUP = "dsmoe.optimizers"
PACKAGE_MODULES = ("registry", "base", "deepspeed", "groups")  # of dsmoe.optim, without an optimizer
_optimizers: dict[str, type[Optimizer]] = {}


def register(name: str):
    """Class decorator: make an optimizer selectable as `training.optimizer`. Raises `ConfigError` if the name is
    taken, or if what gets it is no optimizer."""

    def add(optimizer: type[Optimizer]) -> type[Optimizer]:
        if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
            raise _refused(f"optimizer {name!r} is {optimizer!r}, expected a subclass of dsmoe.optim.base.Optimizer")
        known = _optimizers.get(name)
        if known is not None and _path(known) != _path(optimizer):  # a module that is loaded again replaces its own
            raise _refused(f"optimizer name {name!r} is taken by {_path(known)}; {_path(optimizer)} needs another")
        optimizer.name = name
        _optimizers[name] = optimizer
        return optimizer

    return add


def available() -> dict[str, type[Optimizer]]:
    """Every optimizer: this package's modules, then installed plugins. Raises `ConfigError` for a plugin that fails."""
    import_submodules("dsmoe.optim", skip=PACKAGE_MODULES)
    for point in installed_plugins(GROUP):
        try:
            register(point.name)(point.load())
        except ConfigError:
            raise
        except Exception as error:
            raise _refused(f"optimizer plugin {point.name!r} ({point.value}) cannot be loaded: {error}") from error
    return dict(sorted(_optimizers.items()))


def optimizer_class(training: TrainingConfig) -> type[Optimizer]:
    """The class of `training.optimizer`.

    Raises:
        ConfigError: no optimizer has this name, or `training.optimizer_options` do not suit it.
    """
    optimizers = available()
    name = training.optimizer
    if name not in optimizers:
        close = difflib.get_close_matches(name, optimizers, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise _refused(f"training.optimizer: found {name!r}, expected one of {', '.join(optimizers)}{hint}")
    try:
        optimizers[name].options(training)
    except ValidationError as error:
        known = ", ".join(optimizers[name].Options.model_fields) or "none"
        raise ConfigError(
            [
                f"training.optimizer_options.{'.'.join(map(str, item['loc']))}: found {item['input']!r}: {item['msg']} "
                f"(options of {name}: {known})"
                for item in error.errors()
            ]
        ) from None
    return optimizers[name]


def option_classes() -> dict[str, type[OptimizerOptions]]:
    """Name -> options class of every optimizer."""
    return {name: optimizer.Options for name, optimizer in available().items()}


def _refused(problem: str) -> ConfigError:
    return ConfigError([problem])


def _path(optimizer: type) -> str:
    return f"{optimizer.__module__}.{optimizer.__qualname__}"
