"""The keys of a configuration as text: `dsmoe train --help-config [SECTION]`.

Key, type and default come from the typed schema, and what a key means from the comment beside it there, so that
nothing is written down twice.
"""

from __future__ import annotations

import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dsmoe.config.schema import SECTIONS, UserPath
from dsmoe.errors import ConfigError, nearest


def keys_text(wanted: str, routers: Mapping[str, type[BaseModel]], width: int = 100) -> str:
    """The keys of one section, or of all, a paragraph each.

    Args:
        wanted: a section, or "all".
        routers: each router's options, by name.
        width: columns.

    Raises:
        ConfigError: there is no such section.
    """
    if wanted not in ("all", *SECTIONS):
        known = f"expected one of {', '.join(SECTIONS)}{nearest(wanted, SECTIONS)}"
        raise ConfigError([f"--help-config: found {wanted!r}, {known}"], "the command line")
    lines: list[str] = []
    for name, section in SECTIONS.items():
        if wanted in ("all", name):
            lines += _section(f"{name}: {_first_sentence(section)}", f"{name}.", section, width)
            if name == "router":
                for router, options in sorted(routers.items()):
                    lines += _section(f"with router.name={router}:", "router.", options, width)
    return "\n".join(lines).rstrip()


def _section(title: str, prefix: str, section: type[BaseModel], width: int) -> list[str]:
    return [*textwrap.wrap(title, width), "", *_keys(prefix, section, width), ""]


def _keys(prefix: str, section: type[BaseModel], width: int) -> Iterator[str]:
    comments = dict(_comments(section))
    for key, field in section.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _keys(f"{prefix}{key}.", type(default), width)
            continue
        shown = "required" if field.is_required() else f"default {_plain(default)}"
        yield f"  {prefix}{key}  ({type_name(field)}; {shown})"
        yield from textwrap.wrap(comments.get(key, ""), width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def type_name(field: FieldInfo) -> str:
    """Such as `integer >= 1`, `fp32 | bf16` or `number > 0 or null`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    rules = [(sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in signs.items()]
    bounds = [f"{sign} {bound:g}" for sign, bound in rules if bound is not None]
    is_path = any(rule in field.metadata for rule in get_args(UserPath)[1:])  # pydantic takes `Annotated` apart
    first, *others = ("path" if is_path else _type(field.annotation)).split(" or ")
    return " or ".join([" ".join([first, " and ".join(bounds)]).strip(), *others])


def _type(annotation: Any) -> str:
    if annotation == UserPath:
        return "path"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is list:
        return f"list of {' or '.join(map(_type, arguments))}"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plain(value: Any) -> str:
    """As YAML writes it."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip() or "''"


def _first_sentence(section: type[BaseModel]) -> str:
    return (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ")


def _comments(section: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """For each key of a class and its bases, the comment that ends its line."""
    for cls in reversed(section.__mro__):
        if cls is BaseModel or not issubclass(cls, BaseModel):
            continue
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # a plugin without its source
            continue
        key = None
        for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
            text = token.line.strip()
            if token.type == tokenize.NAME and text.startswith(f"{token.string}:") and token.string in cls.model_fields:
                key = token.string
            elif token.type == tokenize.COMMENT and key is not None:
                if not text.startswith("#") and not token.string.startswith("# fmt"):
                    yield key, token.string.lstrip("# ")
            elif token.type == tokenize.NEWLINE:
                key = None
