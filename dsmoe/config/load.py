"""Every YAML file that dsmoe reads: a run's configuration with dotted overrides, and any other file by its model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dsmoe.config.explain import explain
from dsmoe.config.schema import RouterConfig, RunConfig
from dsmoe.config.shipped import find_config
from dsmoe.config.validate import validate_config
from dsmoe.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
OptionClasses = Mapping[str, type[BaseModel]]


def load_config(
    path: str | Path | None,
    overrides: list[str] | tuple[str, ...] = (),
    routers: OptionClasses | Callable[[], OptionClasses] | None = None,
    optimizers: OptionClasses | Callable[[], OptionClasses] | None = None,
) -> RunConfig:
    """Read, override and validate a configuration.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: dotted assignments such as `training.steps=50`; the value is read as YAML.
        routers: options class of every known router; with it the router's name and options are checked too. A function
            that returns it is called once the file has been read: it may import for seconds what a file that does not
            exist has no need of.
        optimizers: the same of every optimizer.

    Raises:
        ConfigError: with every mistake found, each naming field, value, expectation and the nearest known name.
    """
    tree = {} if path is None else read_yaml(path)
    problems = apply_overrides(tree, overrides)
    source = str(path) if path else "configuration"
    routers, optimizers = (options() if callable(options) else options for options in (routers, optimizers))
    return validate_config(tree, routers, problems, source, optimizers)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3 and makes a string of the rest) and refuses a key
    that is given twice (YAML's last one would silently win)."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\d[\d_]*\.[\d_]*|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def load_yaml(path: str | Path, model: type[Model]) -> Model:
    """Read a file that is one typed model, such as a study or a machine.

    Raises:
        ConfigError: with every mistake found, each naming field, value, expectation and the nearest known name.
    """
    return validated(read_yaml(path), model, str(path))


def validated(tree: dict[str, Any], model: type[Model], source: str) -> Model:
    """The model of a tree of plain values. Raises `ConfigError` with every mistake; `source` names the file."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(list(explain(error, model).values()), source) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A file's mapping; an empty file has none. Where there is no such file, the one that comes with dsmoe under that
    name. Raises `ConfigError`."""
    try:
        text = find_config(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"cannot read the file: {error.strerror or error}"], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(["cannot read the file: it is not UTF-8 text"], str(path)) from error
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, such as 2024-13-01
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    except RecursionError as error:
        raise ConfigError(["not valid YAML: it is nested too deeply"], str(path)) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"found {type(tree).__name__}, expected a mapping of keys to values"], str(path))
    return tree


def apply_overrides(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> list[str]:
    """Write `section.key=value` into the tree; return what could not be read."""
    problems = []
    # A new router drops the other one's options, so it is named before its own are set, in whatever order they came.
    for override in sorted(overrides, key=lambda override: not override.startswith("router.name=")):
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or len(parts) < 2 or not all(parts):
            problems.append(f"override {override!r}: expected section.key=value, for example training.steps=50")
            continue
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            problems.append(f"override {override!r}: the value is not valid YAML")
            continue
        _override_router_name(tree, parts, value)
        node = tree
        for part in parts[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[parts[-1]] = value
    return problems


def _override_router_name(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    """A new router.name on the command line drops the options the file gave to the other router."""
    router = tree.get("router")
    if parts == ["router", "name"] and isinstance(router, dict) and router.get("name", RouterConfig().name) != value:
        tree["router"] = {}
