"""Figures as SVG that may share a page and are small enough to be kept in a repository."""

from __future__ import annotations

import hashlib
import io
import re

from matplotlib.figure import Figure

GROUP = re.compile(r"<g(?P<attributes>[^>]*)>|</g>")
NUMBERS = re.compile(r'\b(?:d|x|y|transform)="[^"]*"')


def svg_of(figure: Figure, name: str) -> str:
    """The figure, about half as long as matplotlib writes it.

    Args:
        name: of the picture, unlike that of any other on the page; ids are made from it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text).replace("<svg", '<svg font-family="sans-serif"', 1)
    text = re.sub(r"; stroke-linecap: square|; stroke-linejoin: \w+", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    # Tenths of a point are enough.
    text = NUMBERS.sub(lambda match: re.sub(r"(\.\d)\d+", r"\1", match[0]), text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups
    text = _without_bare_groups(text)
    text = re.sub(r"\s+", " ", text).replace("> <", ">\n<")
    return _renamed(text, hashlib.sha256(name.encode()).hexdigest()[:6]) + "\n"


def _without_bare_groups(text: str) -> str:
    """Groups without an attribute change nothing."""
    has_attributes: list[bool] = []

    def replace(match: re.Match) -> str:
        if match["attributes"] is None:
            return "</g>" if has_attributes.pop() else ""
        has_attributes.append(bool(match["attributes"].strip()))
        return match[0] if has_attributes[-1] else ""

    return GROUP.sub(replace, text)


def _renamed(text: str, prefix: str) -> str:
    """With short ids of this picture's own."""
    ids = list(dict.fromkeys(re.findall(r'\bid="([^"]+)"', text)))
    new = {old: f"s{prefix}{number}" for number, old in enumerate(ids)}
    text = re.sub(r'\bid="([^"]+)"', lambda match: f'id="{new[match[1]]}"', text)
    return re.sub(r"(url\(#|href=\"#)([^)\"]+)", lambda match: match[1] + new[match[2]], text)
