"""What the lab's HTML pages share: a style for any width, for paper and for dark mode, and nothing from a network."""

from __future__ import annotations

from importlib.resources import files


def style() -> str:
    """look.css: colours as variables, header, cards, facts and tables."""
    return files("dsmoe.lab").joinpath("look.css").read_text(encoding="utf-8")
