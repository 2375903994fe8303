"""Classes selected by a name in the configuration: registered with a decorator here, through an entry point elsewhere.

A registry lives below the modules that fill it, so that a configuration is checked without importing what it names.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable

from dsmoe.errors import ConfigError
from dsmoe.runtime.plugins import installed_plugins


class PluginRegistry:
    """Name -> class.

    Args:
        kind: what it holds, for messages ("token dispatcher").
        field: the configuration key that selects one.
        group: entry point group of packages outside dsmoe.
        modules: dsmoe's own modules, imported before the first look-up; each registers with the decorator.
        base: "module:class" that every entry must be a subclass of.
    """

    def __init__(self, kind: str, field: str, group: str, modules: tuple[str, ...], base: str):
        self.kind, self.field, self.group, self.modules, self.base = kind, field, group, modules, base
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator. Raises `ConfigError` if the name is taken or the class is none of this kind."""

        def add(plugin: type) -> type:
            module, _, attribute = self.base.partition(":")
            base = getattr(importlib.import_module(module), attribute)
            if not (isinstance(plugin, type) and issubclass(plugin, base)):
                raise self._error(f"{self.kind} {name!r} is {plugin!r}, expected a subclass of {module}.{attribute}")
            known = self._classes.get(name)
            if known is not None and _path(known) != _path(plugin):  # a module that is loaded again replaces its own
                raise self._error(
                    f"{self.kind} name {name!r} is taken by {_path(known)}; {_path(plugin)} needs another"
                )
            plugin.name = name  # type: ignore[attr-defined]
            self._classes[name] = plugin
            return plugin

        return add

    def available(self) -> dict[str, type]:
        """Every class by name: dsmoe's own and those of installed packages. Raises `ConfigError` for one that fails."""
        for module in self.modules:
            importlib.import_module(module)
        for point in installed_plugins(self.group):
            try:
                plugin = point.load()
            except Exception as error:
                raise self._error(f"{self.kind} {point.name!r} ({point.value}) cannot be loaded: {error}") from error
            self.register(point.name)(plugin)
        return dict(sorted(self._classes.items()))

    def get(self, name: str) -> type:
        """The class of that name. Raises `ConfigError` that lists what there is."""
        classes = self.available()
        if name not in classes:
            raise self._error(f"{self.field}: found {name!r}, expected {expected_name(name, classes)}")
        return classes[name]

    def _error(self, problem: str) -> ConfigError:
        return ConfigError([problem])


def expected_name(name: str, known) -> str:
    """'one of a, b (did you mean a?)', for messages."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"one of {', '.join(known)}" + (f" (did you mean {close[0]!r}?)" if close else "")


def _path(plugin: type) -> str:
    return f"{plugin.__module__}.{plugin.__qualname__}"


token_dispatchers = PluginRegistry(
    kind="token dispatcher",
    field="model.token_dispatcher",
    group="dsmoe.token_dispatchers",
    modules=("dsmoe.moe.dispatch", "dsmoe.moe.all_to_all", "dsmoe.moe.two_level"),
    base="dsmoe.moe.dispatch:TokenDispatcher",
)
