"""Pictures of measured quantities, over the x axis of a study or, where it has none, arm by arm."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy
from matplotlib.ticker import FuncFormatter

from dsmoe.lab.study.drawing import (
    PALETTE,
    Picture,
    colors_of,
    first_seed,
    has_axis,
    is_narrow,
    label,
    label_ends,
    logarithmic,
    looks_of,
    panels,
    x_title,
)
from dsmoe.lab.study.grid import MEASURED
from dsmoe.lab.study.inside import parts_of
from dsmoe.lab.study.measures import MEASURES, Measured, StudyResults, at, centre_and_band

COSTS = ("step_seconds", "tokens_per_second", "peak_memory", "all_to_all", "bytes_per_flop", "imbalance",
         "dead_experts", "no_expert", "joules_per_token", "measured_joules")  # fmt: skip
INSIDE = ("idle_experts", "weak_experts", "expert_gradient", "output_cosine", "output_cka", "weights_alike", "flips",
          "load_contiguous", "load_aware", "load_replicated", "by_route")  # fmt: skip
COLUMNS = 3
FEW_PARTS = ("routing", "dispatch", "exchange", "experts", "combine", "shared experts", "attention", "loss", "rest",
             "optimizer")  # fmt: skip


def costs(results: StudyResults) -> Picture | None:
    return _grid(results, COSTS, "costs", "What more experts cost" if has_axis(results) else "What each costs")


def became(results: StudyResults) -> Picture | None:
    # In a run too short to say anything of losses, experts are nearly what they began as; their routes can be counted.
    names = INSIDE if results.study.quality else tuple(name for name in INSIDE if name.startswith(("load_", "by_")))
    return _grid(results, names, "experts", "What the experts became" if results.study.quality else "Routes on 8 ranks")


def _grid(results: StudyResults, names: tuple[str, ...], file: str, title: str) -> Picture | None:
    """A panel for each quantity that any cell has, and that is not 0 in all of them."""
    names = tuple(name for name in names if any(run.values.get(name) for run in results.full))
    if not names:
        return None
    columns, rows = min(COLUMNS, len(names)), []
    height = 2.9 if has_axis(results) else 0.9 + 0.3 * len(results.by_arm())
    height *= -(-len(names) // columns)
    figure, axes = panels(columns, -(-len(names) // columns), height=height, count=len(names))
    draw = _over_x if has_axis(results) else _by_arm
    for place, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        rows += draw(results, axis, name)
        axis.set_title(_wrapped(MEASURES[name].heading), fontsize=9)
        if draw is _by_arm and place % columns and not is_narrow():
            axis.set_yticklabels([])
    if has_axis(results) and not is_narrow():
        arms = [arm for arm in results.arms() if len(results.by_point(arm)) > 0]
        lines = [plt.Line2D([], [], **looks_of(results, dots=True)[arm]) for arm in arms]
        figure.legend(lines, arms, loc="outside upper center", ncols=min(5, len(arms)))
    headings = ["quantity", "arm", "x" if has_axis(results) else "at", "seeds", "mean", "half of the 95 % interval"]
    over = f", over {x_title(results.study)}" if has_axis(results) else ""
    caption = f"Means over seeds{over}." if len({run.cell.seed for run in results.full}) > 1 else f"One seed{over}."
    return Picture(file, title, caption, headings, rows, figure)


def _over_x(results: StudyResults, axis, name: str) -> list[list]:
    colors, looks, places, ends = colors_of(results), looks_of(results, dots=True), [], []
    rows: list[list[Any]] = []
    for arm in results.arms():
        points = []
        for group in results.by_point(arm).values():
            values = [run.values[name] for run in group if name in run.values]
            if values:
                x, (middle, band) = float(numpy.mean([run.x for run in group])), centre_and_band(values)
                points.append((x, middle))
                rows.append([name, arm, x, len(values), middle, "" if band is None else band])
        if points:
            axis.plot(*zip(*points, strict=True), **looks[arm], linewidth=1.3)
            places += [x for x, _ in points]
            ends.append((*points[-1], arm, colors[arm]))
    if results.study.x != MEASURED and min(places) > 0:
        logarithmic(axis, places)
        axis.tick_params(axis="x", labelsize=8)
    _percent(axis.yaxis, name)
    if min(row[4] for row in rows) >= 0:
        axis.set_ylim(0, 1.08 * max(row[4] for row in rows) or None)
    if is_narrow():  # beside other panels there is no room, and a legend above all of them
        label_ends(axis, ends)
    return rows


def _by_arm(results: StudyResults, axis, name: str) -> list[list]:
    colors, groups, rows = colors_of(results), results.by_arm(), []
    for line, (arm, _, runs) in enumerate(groups):
        values = [run.values[name] for run in runs if name in run.values]
        if values:
            middle, band = centre_and_band(values)
            axis.barh(line, middle, color=colors[arm], height=0.6)
            axis.scatter(values, [line] * len(values), s=9, color="#1d2733", alpha=0.5, linewidths=0)
            rows.append([name, arm, at(runs[0].cell.point), len(values), middle, "" if band is None else band])
    axis.set(yticks=range(len(groups)), yticklabels=[name for _, name, _ in groups])
    axis.tick_params(labelsize=8)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    _percent(axis.xaxis, name)
    return rows


def _percent(axis, name: str) -> None:
    if "%" in MEASURES[name].form:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _wrapped(text: str, width: int = 38) -> str:
    """In two lines at most."""
    if len(text) <= width:
        return text
    at = text.rfind(" ", 0, width)
    return f"{text[:at]}\n{text[at + 1 :]}"


def parts(results: StudyResults) -> Picture | None:
    """Seconds of a step by part, stacked, a panel for each arm."""
    timed = [run for run in results.with_runs if results.study.timed and parts_of(run.lines)]
    arms = [arm for arm in results.arms() if any(run.cell.arm == arm for run in timed)]
    if not arms:
        return None
    rows: list[list] = []
    seen: dict = {}
    if has_axis(results):
        columns = min(COLUMNS, len(arms))
        lines = -(-len(arms) // columns)
        figure, axes = panels(columns, lines, height=0.6 + 2.9 * lines, count=len(arms), sharey=True)
        for axis, arm in zip(axes.flat, arms, strict=False):
            runs = sorted((run for run in timed if run.cell.arm == arm), key=lambda run: run.x or 0.0)
            for place, run in enumerate(runs):
                rows += _stack(axis.bar, "bottom", place, run, seen)
            axis.set_xticks(range(len(runs)), [label(run).rpartition(" ")[2] for run in runs])
            axis.set(title=arm, xlabel=x_title(results.study))
            axis.grid(axis="x", visible=False)
        for line in axes:
            line[0].set_ylabel("seconds of a step")
    else:
        runs = first_seed(timed)
        figure, axes = panels(height=1.3 + 0.4 * len(runs))
        for place, run in enumerate(runs):
            rows += _stack(axes[0, 0].barh, "left", place, run, seen)
        axes[0, 0].set_yticks(range(len(runs)), [f"{run.cell.arm} {label(run)}".strip() for run in runs])
        axes[0, 0].invert_yaxis()
        axes[0, 0].grid(axis="y", visible=False)
        axes[0, 0].set_xlabel("seconds of a step")
    names = [part for part in FEW_PARTS if part in seen]
    handles = [plt.Rectangle((0, 0), 1, 1, color=seen[part]) for part in names]
    figure.legend(handles, names, loc="outside upper center", ncols=5)
    caption = (
        "Medians over steps of the first rank. The all-to-all holds the wait for the slower rank; the rest is "
        "projections around attention, norms, embeddings and the reduction of gradients."
    )
    return Picture("parts", "Where a step's time goes", caption, ["cell", "part", "seconds"], rows, figure)


def _stack(bar, start: str, place: int, run: Measured, seen: dict[str, str]) -> list[list]:
    """Draw a cell's parts one on the other with `bar`, whose option `start` is where each begins; fills `seen`."""
    seconds, so_far, rows = parts_of(run.lines), 0.0, []
    for part in (part for part in FEW_PARTS if part in seconds):
        color = seen.setdefault(part, _part_color(part))
        bar(place, seconds[part], 0.7, **{start: so_far}, color=color, linewidth=0)
        so_far += seconds[part]
        rows.append([str(run.cell), part, seconds[part]])
    return rows


def _part_color(part: str) -> str:
    """The parts that only a layer of experts has stand out."""
    grey = {"attention": "#c3ccd6", "loss": "#aab4c0", "rest": "#8f9aa7", "optimizer": "#5b6675"}
    return grey.get(part) or PALETTE[FEW_PARTS.index(part) % len(PALETTE)]


def latency(results: StudyResults) -> Picture | None:
    """Seconds of a token at inference: over x, as trained; and over experts per token, at every setting tried."""
    runs = [run for run in results.with_runs if "token" in run.values]
    if not runs:
        return None
    figure, axes = panels(columns=3, height=3.6)
    dots, rows = looks_of(results, line=False, dots=True), []
    for run in runs:
        for tried in run.inside.probe["latency"]:
            first, later = (1e3 * tried[name] for name in ("first_token_seconds", "token_seconds"))
            rows.append([str(run.cell), tried["setting"], tried["experts_per_token"], first, later, tried["loss"]])
            axes[0, 2].plot(tried["experts_per_token"], later, **dots[run.cell.arm], alpha=0.7)
    for axis, name in zip(axes[0], ("first_token", "token"), strict=False):
        if has_axis(results):
            _over_x(results, axis, name)
        else:
            _by_arm(results, axis, name)
        axis.set(title=MEASURES[name].heading, xlabel=x_title(results.study) if has_axis(results) else "")
    axes[0, 2].set(title="each token, over experts per token", xlabel="experts per token")
    axes[0, 2].set_xscale("log", base=2)
    axes[0, 2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0, 2].set_ylim(bottom=0)
    arms = [arm for arm in results.arms() if any(run.cell.arm == arm for run in runs)]
    lines = [plt.Line2D([], [], **dots[arm]) for arm in arms]
    figure.legend(lines, arms, loc="outside upper center", ncols=min(5, len(arms)))
    caption = (
        "One sequence at a time in one process, after half a sequence of prompt. First two: as trained; third: "
        "every k, p or threshold that was tried at inference."
    )
    headings = ["cell", "router", "experts per token", "first token ms", "each token ms", "held-out loss"]
    return Picture("latency", "Latency at inference", caption, headings, rows, figure)
