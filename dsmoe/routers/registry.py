"""Routers by name: registered with a decorator in this package, with the entry point `dsmoe.routers` in others.

A package outside dsmoe adds a router with one line of its own pyproject.toml:

    [project.entry-points."dsmoe.routers"]
    my_router = "my_package.my_router:MyRouter"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsmoe.errors import RouterError
from dsmoe.runtime.plugins import PluginRegistry

if TYPE_CHECKING:
    from dsmoe.routers.base import Router, RouterOptions

routers: PluginRegistry[Router] = PluginRegistry(
    kind="router",
    field="router.name",
    base="dsmoe.routers.base:Router",
    group="dsmoe.routers",
    modules=("dsmoe.routers.*",),
    error=RouterError,
)
register, available, get = routers.register, routers.available, routers.get


def option_classes() -> dict[str, type[RouterOptions]]:
    """Name -> options class of every router, for `dsmoe.config.load_config`."""
    return {name: router.Options for name, router in available().items()}
