"""Plans of the earlier compare_routers, read as studies.

    corpora: {stdlib: data/stdlib}          -> axes: {data.path: [...]}
    overrides: [training.steps=600]         -> set
    variants: [{name, config, overrides}]   -> arms
    baseline, seeds, match_compute_of       the same

Folders of runs that compare_routers made keep their names, which differ from a study's; their results are in tables.
"""

from __future__ import annotations

from typing import Any

from dsmoe.config.load import apply_overrides
from dsmoe.errors import ConfigError


def is_plan(tree: dict[str, Any]) -> bool:
    return "variants" in tree


def study_of_plan(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """The tree of a study that trains what a plan trains. Raises `ConfigError` where it is no sound plan."""
    variants, corpora = tree.get("variants"), tree.get("corpora")
    problems = []
    if not isinstance(variants, list) or not all(
        isinstance(variant, dict) and "config" in variant for variant in variants
    ):
        problems.append("variants: expected a list of {name, config, overrides, seeds, match_compute_of}")
    if not isinstance(corpora, dict) or not corpora:
        problems.append("corpora: expected a mapping of names to dataset folders")
    if problems:
        raise ConfigError(problems, source)
    arms = []
    for variant in variants:
        arm = {key: value for key, value in variant.items() if key not in ("overrides", "seeds")}
        arms.append({**arm, "set": _settings(variant.get("overrides"), source), "seeds": variant.get("seeds")})
    return {
        "title": "Routers compared",
        "question": "Which router has the lowest held-out loss?",
        "config": variants[0]["config"],
        "set": _settings(tree.get("overrides"), source),
        "axes": {"data.path": list(corpora.values())},
        **{key: value for key, value in tree.items() if key not in ("variants", "corpora", "overrides")},
        "arms": arms,
    }


def _settings(overrides: list[str] | None, source: str) -> dict[str, Any]:
    """`section.key=value` lines as dotted keys and values."""
    nested: dict[str, Any] = {}
    if problems := apply_overrides(nested, overrides or []):
        raise ConfigError(problems, source)
    return {f"{section}.{key}": value for section, keys in nested.items() for key, value in keys.items()}
