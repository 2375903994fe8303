"""Routers by name: registered with a decorator in this package, with the entry point `dsmoe.routers` in others.

A package outside dsmoe adds a router with one line of its own pyproject.toml:

    [project.entry-points."dsmoe.routers"]
    my_router = "my_package.my_router:MyRouter"
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from dsmoe.errors import RouterError
from dsmoe.runtime.plugins import import_submodules, installed_plugins

if TYPE_CHECKING:
    from dsmoe.routers.base import Router, RouterOptions

GROUP = "dsmoe.routers"
_routers: dict[str, type[Router]] = {}


def register(name: str):
    """Class decorator that makes a router selectable as `router.name`.

    Raises `RouterError` if the name is taken or if the decorated object is no router.
    """

    def add(router: type[Router]) -> type[Router]:
        from dsmoe.routers.base import Router

        if not (isinstance(router, type) and issubclass(router, Router)):
            raise RouterError(f"router {name!r} is {router!r}, expected a subclass of dsmoe.routers.base.Router")
        known = _routers.get(name)
        if known is not None and _path(known) != _path(router):  # a reloaded module may replace its own
            raise RouterError(f"router name {name!r} is taken by {_path(known)}; {_path(router)} needs another")
        router.name = name
        _routers[name] = router
        return router

    return add


def _path(router: type) -> str:
    return f"{router.__module__}.{router.__qualname__}"


def available() -> dict[str, type[Router]]:
    """All routers, of this package and of installed plugins. Raises `RouterError` for a plugin that fails to load."""
    import_submodules("dsmoe.routers")
    for point in installed_plugins(GROUP):
        try:
            register(point.name)(point.load())
        except RouterError:
            raise
        except Exception as error:
            raise RouterError(f"router plugin {point.name!r} ({point.value}) cannot be loaded: {error}") from error
    return dict(sorted(_routers.items()))


def get(name: str) -> type[Router]:
    """The router class of that name. Raises `RouterError` that lists the available ones."""
    routers = available()
    if name not in routers:
        close = difflib.get_close_matches(name, routers, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RouterError(f"no router is called {name!r}{hint}; available: {', '.join(routers)}")
    return routers[name]


def option_classes() -> dict[str, type[RouterOptions]]:
    """Name -> options class of every router, for `dsmoe.config.load_config`."""
    return {name: router.Options for name, router in available().items()}
