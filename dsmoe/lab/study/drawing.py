"""What all pictures of a study share: their look, their axes, and what one of them is."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from dsmoe.lab.study.grid import MEASURED
from dsmoe.lab.study.measures import Measured, StudyResults

PALETTE = ("#2f6fde", "#e0612b", "#1f9e77", "#a03fa5", "#c9a227", "#5b6675", "#d1436f", "#3aa6c9")
INK, FAINT = "#1d2733", "#dfe4ea"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dsmoe", "font.family": "sans-serif", "font.size": 10,
    "axes.edgecolor": "#9aa5b1", "axes.labelcolor": INK, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlecolor": INK, "text.color": INK, "xtick.color": "#5b6675",
    "ytick.color": "#5b6675", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": FAINT, "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 9, "lines.linewidth": 1.8, "lines.markersize": 5, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "xtick.bottom": False, "ytick.left": False,
    "ytick.minor.left": False, "xtick.minor.bottom": False,
}  # fmt: skip
POINTS = 120  # of a curve over training that are kept


@dataclass(frozen=True)
class Picture:
    """One figure. Its rows are its numbers, and its CSV."""

    name: str  # of its files
    title: str
    caption: str
    headings: list[str]
    rows: list[list]
    figure: Figure


def x_title(study) -> str:
    if study.x == MEASURED:
        return "experts per token, measured on held-out text"
    known = {"model.num_experts": "number of experts E", "granularity": "granularity G", "router.p": "p"}
    return known.get(study.x, study.x)


def colors_of(results: StudyResults) -> dict[str, str]:
    return {arm.name: PALETTE[place % len(PALETTE)] for place, arm in enumerate(results.study.arms)}


def panels(columns: int = 1, rows: int = 1, height: float = 4.2, **options) -> tuple[Figure, numpy.ndarray]:
    return plt.subplots(rows, columns, figsize=(9.6, height), layout="constrained", squeeze=False, **options)


def logarithmic(axis: Axes, places: list[float]) -> None:
    """A base-2 x axis with a tick at each place that was measured."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(places)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def has_axis(results: StudyResults) -> bool:
    return results.study.x is not None and len({one.x for one in results.found}) > 1


def shade(one: Measured, among: list[Measured]) -> float:
    """Opacity that tells an arm's cells apart: stronger for larger x."""
    places = sorted({other.x for other in among if other.cell.arm == one.cell.arm and other.x is not None})
    return 1.0 if len(places) < 2 or one.x is None else 0.3 + 0.7 * places.index(one.x) / (len(places) - 1)


def label(one: Measured) -> str:
    """Its place on the axes."""
    return ", ".join(f"{axis.rpartition('.')[2]} {value}" for axis, value in one.cell.point)


def first_seed(ones: list[Measured]) -> list[Measured]:
    """Those of the smallest seed, small x first."""
    seed = min(one.cell.seed for one in ones)
    return sorted((one for one in ones if one.cell.seed == seed), key=lambda one: one.x or 0.0)


def thinned(length: int) -> numpy.ndarray:
    """int [at most POINTS]: places along a curve that are drawn and kept, both ends among them."""
    return numpy.unique(numpy.linspace(0, length - 1, POINTS).round().astype(int))
