"""The page of an inspection: page.html with its style, script and figures put in. It needs no network."""

from __future__ import annotations

import copy
import html
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsmoe.lab.look import style

SHOWN = 3000  # tokens of each text on the page; figures are of all


def render(report: dict[str, Any]) -> str:
    names = [Path(model["name"]).name or model["name"] for model in report["models"]]
    parts = {
        "title": html.escape(f"Inside {' and '.join(names)}"),
        "style": style() + _read("page.css"),
        "script": _read("page.js"),
        # A "<" could end the script that the figures lie in.
        "report": json.dumps(_shortened(report), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = _read("page.html")
    pieces = page.split("@")  # no "@" but those around names: what is put in is never searched
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def _read(name: str) -> str:
    return files("dsmoe.lab.inspect").joinpath(name).read_text(encoding="utf-8")


def _shortened(report: dict[str, Any]) -> dict[str, Any]:
    """With the first tokens of each text only."""
    models = []
    for model in report["models"]:
        columns, seen = model["per_token"], Counter[int]()
        keep = []
        for place, text in enumerate(columns["text"]):
            seen[text] += 1
            if seen[text] <= SHOWN:
                keep.append(place)
        if len(keep) < len(columns["text"]):
            model = copy.copy(model)
            model["per_token"] = {
                name: [[layer[place] for place in keep] for layer in column]
                if name in ("experts", "effective", "routes")
                else [column[place] for place in keep]
                for name, column in columns.items()
            }
        models.append(model)
    return {**report, "models": models}
