"""Inference settings of an export: `--set k=4`, `p=0.5` or `theta=0.1`, as a sweep of `dsmoe inspect` names them.

A setting replaces the option of the router that decides how many experts a token gets. So it stands in config.json like
any other option, the code beside the weights reads it, and an import makes it the run's.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dsmoe.config import ModelConfig, RouterConfig
from dsmoe.config.describe import type_name
from dsmoe.errors import ConversionError
from dsmoe.routers import get
from dsmoe.routers.base import RouterOptions
from dsmoe.routers.inference import SETTINGS, setting_of


def chosen_options(texts: tuple[str, ...], router: RouterConfig, model: ModelConfig) -> dict[str, Any]:
    """The change of the router's options that these `NAME=VALUE` ask for.

    Raises:
        ConversionError: the router has no such setting, or the value is out of range; with what it can be given.
    """
    options = get(router.name).Options.model_validate(router.options)
    name = setting_of(options)
    change: dict[str, Any] = {}
    for text in texts:
        given, _, value = text.partition("=")
        if name is None:
            raise ConversionError(
                f"--set {text}: router {router.name!r} has no option that decides at inference how many experts a "
                "token gets; what a sweep of dsmoe inspect shows drops routes afterwards, which an export cannot"
            )
        option = SETTINGS[name]
        allowed = f"{name}, {type_name(type(options).model_fields[option])}"
        if given != name or change:
            raise ConversionError(f"--set {text}: router {router.name!r} can be given {allowed}, once")
        change[option] = _number(value)
        if problems := _problems(options, change, model):
            raise ConversionError(f"--set {text}: router {router.name!r} can be given {allowed}; {problems}")
    return change


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _problems(options: RouterOptions, change: dict[str, Any], model: ModelConfig) -> str:
    try:
        changed = type(options).model_validate(options.model_dump() | change)
    except ValidationError as error:
        return "; ".join(problem["msg"] for problem in error.errors())
    return "; ".join(changed.validate_for_model(model))
