"""Where registered classes come from: modules of this package, and entry points of installed packages."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points


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
