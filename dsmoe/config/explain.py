"""What pydantic complains about, as lines for the user: field, value, expectation, nearest known name."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dsmoe.errors import nearest


def explain(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...] = ()) -> dict[str, str]:
    """A line for each field that pydantic complains about: field, value, expectation, nearest known name."""
    lines: dict[str, str] = {}
    for item in error.errors():
        path, known = _known_path(model, item["loc"])
        field = ".".join((*prefix, *path))
        expected = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines[field] = f"{field}: unknown key{nearest_or_all(path[-1], known)}"
        elif item["type"] == "missing":
            lines[field] = f"{field}: not set, but has no default"
        elif item["type"] == "model_type":
            keys = ", ".join(f"{field}.{key}" for key in known)
            lines[field] = f"{field}: found {item['input']!r}, expected a mapping: {keys}"
        elif field in lines:  # the other members of a union
            lines[field] += f" or {expected}"
        else:
            lines[field] = f"{field}: found {_shortened(repr(item['input']))}, expected {expected}"
    return lines


def _known_path(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """pydantic's location without the parts that name members of a union, and the fields of the model it ends in."""
    path: list[str] = []
    here: Any = model
    for part in location:
        inner = _model_in(here)
        if inner is not None and part in inner.model_fields:
            here = inner.model_fields[part].annotation
        elif not (isinstance(part, int) and _holds(here, list)) and not _holds(here, dict):
            if inner is not None and isinstance(part, str):  # an unknown key
                return [*path, part], list(inner.model_fields)
            break
        else:
            here = get_args(_container(here))[-1]
        path.append(str(part))
    inner = _model_in(here)
    return path, list(inner.model_fields) if inner is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation is, or is in a union with None."""
    candidates = (annotation, *get_args(annotation)) if not _container(annotation) else ()
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _container(annotation: Any) -> Any:
    """The list or dict that an annotation is, or is in a union with something else."""
    return next((kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) in (list, dict)), None)


def _holds(annotation: Any, kind: type) -> bool:
    return get_origin(_container(annotation)) is kind


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def nearest_or_all(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)`, or the list of what there is."""
    return nearest(name, known) or f" (known: {', '.join(sorted(known))})"
