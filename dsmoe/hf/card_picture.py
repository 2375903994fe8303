"""The picture of a model card: how many experts tokens take in each layer, and how evenly these have tokens.

Shapes: L MoE layers, T tokens, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dsmoe.training.pictures import HIGHEST_LOAD, VERMILION, colour

FILE = "routing.png"
WIDTH, DPI = 440, 200  # CSS pixels at most, a hundred of which are an inch of the figure; a phone shows it at 330
BAR, INK, SOFT = "#0072B2", "#16202b", "#52606d"
MAX_LABELS = 24  # layers that are all labelled


def draw_routing(folder: Path, layers: list[int], routes_LTE: Tensor) -> str:
    """Write the picture into a folder. Returns the Markdown that shows it.

    Args:
        layers: number of each MoE layer in the model.
        routes_LTE: bool, of held-out tokens.
    """
    counts_LE = routes_LTE.sum(1).double().numpy()
    _figure(layers, counts_LE, routes_LTE.size(1)).savefig(folder / FILE, dpi=DPI, metadata={"Software": None})
    experts_L, idle = counts_LE.sum(1) / routes_LTE.size(1), int((counts_LE == 0).sum())
    alt = (
        f"By layer: experts per token, {experts_L.min():.2f} to {experts_L.max():.2f}; load of each expert, at most "
        f"{_load(counts_LE).max():.1f} times the mean of its layer"
    )
    without = f" Vermilion: without a token here ({idle} of {counts_LE.size})." if idle else ""
    return (
        f'<img src="{FILE}" width="{WIDTH}" alt="{alt}">\n\n'
        f"Measured at export on {routes_LTE.size(1):,} held-out tokens; an expert has {counts_LE.mean():.0f} of them "
        f"on average. Right: brighter experts have more tokens; the number is the largest load of the layer.{without}"
    )


def _load(counts_LE: np.ndarray) -> np.ndarray:
    """Over the mean of the layer."""
    return counts_LE / np.maximum(counts_LE.mean(1, keepdims=True), 1e-12)


def _figure(layers: list[int], counts_LE: np.ndarray, tokens: int):
    from matplotlib.figure import Figure

    rows, experts_L, load_LE = len(layers), counts_LE.sum(1) / tokens, _load(counts_LE)
    labelled = [row for row in range(rows) if row % -(-rows // MAX_LABELS) == 0]
    height = max(0.6, min(0.3 * rows, 6.5))
    figure = Figure(figsize=(WIDTH / 100, height + 1.1), facecolor="white", layout="constrained")
    panels: list[list[str]] = [["bars", "map"], [".", "key"]]
    places: dict[str, Any] = figure.subplot_mosaic(panels, width_ratios=(2, 3), height_ratios=(height, 0.16))
    bars, heat, key = places["bars"], places["map"], places["key"]
    bars.barh(range(rows), experts_L, color=BAR, height=0.8)
    bars.set(xlim=(0, 1.5 * max(experts_L.max(), 1e-9)), ylim=(rows - 0.5, -0.5), xticks=[])
    bars.set_yticks(labelled, [str(layers[row]) for row in labelled])
    bars.set_ylabel("layer", fontsize=11, color=SOFT)
    bars.set_title("experts per token", fontsize=11, color=INK, loc="left")
    colours_LE3 = colour(load_LE / HIGHEST_LOAD)
    colours_LE3[counts_LE == 0] = VERMILION
    heat.imshow(colours_LE3, aspect="auto", interpolation="nearest")
    ends = sorted({0, load_LE.shape[1] - 1})
    heat.set_xticks(ends, [f"expert {ends[0]}", *map(str, ends[1:])])
    heat.set_yticks([])
    heat.set_title("load of each expert", fontsize=11, color=INK, loc="left")
    beside: dict[str, Any] = dict(xytext=(4, 0), textcoords="offset points", va="center", fontsize=10, color=INK)
    for row in labelled:
        bars.annotate(f"{experts_L[row]:.2f}", (experts_L[row], row), **beside)
        heat.annotate(f"{load_LE[row].max():.1f}×", (1, row), xycoords=("axes fraction", "data"), **beside)
    key.imshow(colour(np.linspace(0, 1, 256))[None], aspect="auto", extent=(0, HIGHEST_LOAD, 0, 1))
    key.set(yticks=[])
    key.set_xticks([0, 1, HIGHEST_LOAD], ["0", "mean", f"{HIGHEST_LOAD:g}× or more"])
    first, _, last = key.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    for axis in places.values():
        axis.tick_params(length=0, labelsize=10, labelcolor=SOFT)
        axis.spines[:].set_visible(False)
    return figure
