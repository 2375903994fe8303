"""Options classes that a configuration is checked with, imported when they are asked for: after its file was read."""

from __future__ import annotations

from dsmoe.config.load import OptionClasses


def router_options() -> OptionClasses:
    from dsmoe.routers.registry import option_classes

    return option_classes()


def optimizer_options() -> OptionClasses:
    from dsmoe.optim.registry import option_classes

    return option_classes()
