"""What all pictures of a study share: their look, their axes, and what one of them is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from dsmoe.lab.study.grid import MEASURED
from dsmoe.lab.study.measures import Measured, StudyResults, at

# Arms beyond these colors begin with the first again, in another line and with another dot.
# Told apart with every kind of colour blindness (Okabe and Ito, 2008), without the yellow, which white hides.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
LINES, DOTS = ("-", "--", ":", "-."), "os^D"
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
    known = {"model.num_experts": "number of experts E", "granularity": "granularity G", "router.p": "p",
             "size": "hidden size"}  # fmt: skip
    return known.get(study.x, study.x)


def colors_of(results: StudyResults) -> dict[str, str]:
    return {arm: look["color"] for arm, look in looks_of(results).items()}


def looks_of(results: StudyResults, line: bool = True, dots: bool = False) -> dict[str, dict[str, str]]:
    """For each arm what `plot` draws it with, so that no two look alike: up to 32 arms."""
    looks = {}
    for place, arm in enumerate(results.study.arms):
        turn = place // len(PALETTE) % len(LINES)
        looks[arm.name] = {"color": PALETTE[place % len(PALETTE)], "linestyle": LINES[turn] if line else "",
                           "marker": DOTS[turn] if dots else ""}  # fmt: skip
    return looks


LINE = 10.5  # points from one label to the next
WIDE, NARROW = 9.6, 3.4  # inches; text has the same size in both
_narrow = ContextVar("narrow", default=False)


@contextmanager
def for_a_phone() -> Iterator[None]:
    """Figures that are drawn meanwhile have their panels below each other."""
    token = _narrow.set(True)
    try:
        yield
    finally:
        _narrow.reset(token)


def is_narrow() -> bool:
    return _narrow.get()


def panels(
    columns: int = 1, rows: int = 1, height: float = 4.2, count: int | None = None, **options
) -> tuple[Figure, numpy.ndarray]:
    """Axes [rows, columns], those beyond `count` not to be seen. On a phone all are below each other, column by column,
    and with `count` they are [count, 1]."""
    if not is_narrow():
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDE, height), layout="constrained", squeeze=False, **options
        )
        for axis in axes.flat[count or rows * columns :]:
            axis.set_visible(False)
        return figure, axes
    shape = (columns, rows) if count is None else (1, count)
    lines = shape[0] * shape[1]
    options = {name: value for name, value in options.items() if name != "sharex"}
    size = (NARROW, 0.5 + lines * min(height / rows, 2.7))
    figure, axes = plt.subplots(lines, 1, figsize=size, layout="constrained", squeeze=False, **options)
    return figure, axes.reshape(shape).T


def fit_words(figure: Figure) -> None:
    """Break what is too long for a phone."""
    for axis in figure.axes:
        axis.set_title(textwrap.fill(axis.get_title(loc="left"), 34))
        axis.set_xlabel(textwrap.fill(axis.get_xlabel(), 34))
        axis.set_ylabel(textwrap.fill(axis.get_ylabel(), 30))
    for legend in list(figure.legends):
        handles, names = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
        legend.remove()
        figure.legend(handles, names, loc="outside upper center", ncols=2)


def logarithmic(axis: Axes, places: list[float]) -> None:
    """A base-2 x axis with a tick at each place that was measured."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(places)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def has_axis(results: StudyResults) -> bool:
    return results.study.x is not None and len({run.x for run in results.full if run.x is not None}) > 1


def shade(run: Measured, among: list[Measured]) -> float:
    """Opacity that tells an arm's cells apart: stronger for larger x."""
    places = sorted({other.x for other in among if other.cell.arm == run.cell.arm and other.x is not None})
    return 1.0 if len(places) < 2 or run.x is None else 0.3 + 0.7 * places.index(run.x) / (len(places) - 1)


def label(run: Measured) -> str:
    """Its place on the axes."""
    return at(run.cell.point)


def first_seed(runs: list[Measured]) -> list[Measured]:
    """One of each arm and point, that of the smallest seed, so that nothing is missing whose first seed failed; small x
    first."""
    first: dict[tuple, Measured] = {}
    for run in sorted(runs, key=lambda run: (run.x or 0.0, run.cell.seed)):
        first.setdefault((run.cell.arm, run.cell.point), run)
    return list(first.values())


def first_seed_words(results: StudyResults) -> str:
    """Which seed a picture of single runs shows, for a caption."""
    return "One seed" if len({run.cell.seed for run in results.measured}) == 1 else "First seed of each arm and point"


def seeds_note(results: StudyResults) -> str:
    """What dots and bands are, for a caption."""
    seeds = {run.cell.seed for run in results.measured}
    if len(seeds) == 1:
        return "One seed: there is no interval."
    return (
        "Large dots are means over seeds, small ones single runs; bands are 95 % intervals of the mean (Student's t)."
    )


Ends = list[tuple[float, float, str, str]]  # x, y, name and color at the right ends of curves
_ends: WeakKeyDictionary[Axes, Ends] = WeakKeyDictionary()


def label_ends(axis: Axes, ends: Ends) -> None:
    """Have names at the ends of curves, once the whole figure is drawn: panels that share an axis move its limits."""
    _ends.setdefault(axis, []).extend(ends)


def place_labels(figure: Figure) -> None:
    """Write the names that `label_ends` was told, moved apart where they would overlap."""
    for axis in figure.axes:
        if ends := _ends.pop(axis, None):
            _write_names(axis, ends)


def _write_names(axis: Axes, ends: Ends) -> None:
    low, high = axis.get_ylim()
    height = axis.bbox.height * 72 / axis.figure.dpi  # points, as far as known before the layout
    gap = max(0.055, LINE / height) * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    places = [y for _, y, *_ in ends]
    for place in range(1, len(ends)):
        places[place] = max(places[place], places[place - 1] + gap)
    for place in reversed(range(len(ends))):  # not into the title
        above = places[place + 1] - gap if place + 1 < len(ends) else max(high, ends[-1][1])
        places[place] = min(places[place], above)
    for (x, y, name, color), placed in zip(ends, places, strict=True):
        axis.annotate(name, (x, y), textcoords="offset points", color=color, fontsize=9, va="center",
                      annotation_clip=False, xytext=(8, (placed - y) / (high - low) * height))  # fmt: skip


def in_log(axis: Axes, places: list[float]) -> bool:
    """Make the x axis logarithmic if all places are positive; whether it is."""
    if places and min(places) > 0:
        logarithmic(axis, places)
        return True
    return False
