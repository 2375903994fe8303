"""Classes that a configuration selects by name: dsmoe's own register with a decorator, others through an entry point.

A registry knows the names of modules and of the base class only, so it lies below them, and a configuration is checked
without importing what it does not name.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from dsmoe.errors import ConfigError, DsmoeError, one_of

T = TypeVar("T")


class PluginRegistry(Generic[T]):
    """Name -> class.

    Args:
        kind: what it holds, for messages ("token dispatcher").
        field: the configuration key that selects one.
        base: "module:class" that every entry must be a subclass of.
        group: entry point group of packages outside dsmoe.
        modules: dsmoe's own, imported before the first look-up; "package.*" for each module of one but those in `skip`.
        error: makes the exception of a message.
    """

    def __init__(
        self, kind: str, field: str, base: str, group: str, modules: tuple[str, ...], skip: tuple[str, ...] = (),
        error: Callable[[str], DsmoeError] = lambda message: ConfigError([message]),
    ):  # fmt: skip
        self.kind, self.field, self.base, self.group = kind, field, base, group
        self.modules, self.skip, self.error = modules, skip, error
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator that sets `name`. Raises `error` if the name is taken or the class is none of this kind."""

        def add(plugin: type) -> type:
            module, _, attribute = self.base.partition(":")
            base = getattr(importlib.import_module(module), attribute)
            if not (isinstance(plugin, type) and issubclass(plugin, base)):
                raise self.error(f"{self.kind} {name!r} is {plugin!r}, expected a subclass of {module}.{attribute}")
            known = self._classes.get(name)
            if known is not None and _path(known) != _path(plugin):  # a module that is loaded again replaces its own
                raise self.error(f"{self.kind} name {name!r} is taken by {_path(known)}; {_path(plugin)} needs another")
            plugin.name = name  # type: ignore[attr-defined]
            self._classes[name] = plugin
            return plugin

        return add

    def available(self) -> dict[str, type[T]]:
        """Every class by name: dsmoe's own and those of installed packages. Raises `error` for one that fails."""
        for module in self.modules:
            if module.endswith(".*"):
                import_submodules(module.removesuffix(".*"), self.skip)
            else:
                importlib.import_module(module)
        for point in self.installed():
            try:
                plugin = point.load()
            except Exception as error:
                raise self.error(f"{self.kind} {point.name!r} ({point.value}) cannot be loaded: {error}") from error
            self.register(point.name)(plugin)
        return dict(sorted(self._classes.items()))

    def installed(self) -> tuple[EntryPoint, ...]:
        """Entry points of installed packages."""
        return installed_plugins(self.group)

    def get(self, name: str) -> type[T]:
        """The class of that name. Raises `error` that lists what there is."""
        classes = self.available()
        if name not in classes:
            raise self.error(f"{self.field}: found {name!r}, expected {one_of(name, classes)}")
        return classes[name]


def _path(plugin: type) -> str:
    return f"{plugin.__module__}.{plugin.__qualname__}"


@cache
def import_submodules(package: str, skip: tuple[str, ...] = ()) -> None:
    """Import every module directly in a package, once in a process."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name not in skip:
            importlib.import_module(f"{package}.{module.name}")


def installed_plugins(group: str) -> tuple[EntryPoint, ...]:
    """Entry points of installed packages, read again only if the search path has changed."""
    return _read_plugins(group, tuple((entry, _modified(entry or ".")) for entry in sys.path))


@lru_cache(maxsize=8)
def _read_plugins(group: str, search_path: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _modified(entry: str) -> int:
    """When a folder or archive last changed, as it does when a package is installed into it; 0 if it is not there."""
    try:
        return os.stat(entry).st_mtime_ns
    except OSError:
        return 0


token_dispatchers: PluginRegistry[Any] = PluginRegistry(
    kind="token dispatcher",
    field="model.token_dispatcher",
    base="dsmoe.moe.dispatch:TokenDispatcher",
    group="dsmoe.token_dispatchers",
    modules=("dsmoe.moe.dispatch", "dsmoe.moe.dispatchers.*"),
)
