"""SVG that was made short still draws the same, and does not mix with another on its page."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib.pyplot as plt

from dsmoe.lab.study.svg import svg_of


def figure():
    drawn, axes = plt.subplots(1, 2)
    axes[0].plot([1, 2, 3], [0.0012345, 0.002, 0.003], "o-", label="some experts")
    axes[0].legend()
    axes[1].fill_between([1, 2], [0, 1], [1, 2], alpha=0.3)
    return drawn


def test_a_short_svg_is_whole():
    drawn = figure()
    file = io.StringIO()
    drawn.savefig(file, format="svg")
    text = svg_of(drawn, "one")
    plt.close(drawn)
    assert len(text) < 0.75 * len(file.getvalue())
    tree = ElementTree.fromstring(text)  # well-formed
    drawings = [len(re.findall(r"<(?:path|use)\b", one)) for one in (text, file.getvalue())]
    assert drawings[0] == drawings[1] and tree.get("viewBox")


def test_two_on_a_page_do_not_share_ids():
    drawn = figure()
    one, other = svg_of(drawn, "one"), svg_of(drawn, "other")
    plt.close(drawn)
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    used = [set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1] and used[0] <= ids[0] and used[1] <= ids[1]
    assert svg_of(figure(), "one") == one
