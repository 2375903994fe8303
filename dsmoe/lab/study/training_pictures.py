"""Pictures of what changes over training: experts per token, by layer and by kind of token, and experts that starve."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy
from matplotlib.ticker import FuncFormatter

from dsmoe.lab.study.drawing import (
    PALETTE,
    Picture,
    colors_of,
    first_seed,
    first_seed_words,
    label,
    looks_of,
    panels,
    shade,
)
from dsmoe.lab.study.inside import idle, weak
from dsmoe.lab.study.measures import Measured, StudyResults, smoothed, thinned
from dsmoe.lab.study.probe.routes import KINDS
from dsmoe.lab.study.results import NEAR_TARGET, target_density

DENSE = 0.95  # of the highest density: the dense stage lasts that long
ROUNDED = 1e-5  # a router loss below it is what is left of a difference of two losses in fp32
AT_A_TIME = 5  # lines of experts.jsonl over which an expert without a token counts as idle
CONSTANT = 1e-9


def _changing(results: StudyResults) -> list[Measured]:
    """Cells, of each the first seed, in which the number of experts per token is not constant, small x first."""
    return [run for run in first_seed(results.with_runs) if _changes(run)]


def _changes(run: Measured) -> bool:
    return numpy.ptp([line["experts_per_token"] for line in run.lines]) > CONSTANT


def _panels_of(arms: list[str], height: float = 3.4, **options):
    """A panel for each arm, two in a row."""
    lines = -(-len(arms) // 2)
    return panels(columns=min(2, len(arms)), rows=lines, height=height * lines, count=len(arms), **options)


def _number(axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def density(results: StudyResults) -> Picture | None:
    """Experts per token at every step, where that changes in any arm."""
    shown, colors, rows = first_seed(results.with_runs), colors_of(results), []
    if not any(map(_changes, shown)):
        return None
    arms = [arm for arm in results.arms() if any(run.cell.arm == arm for run in shown)]
    figure, axes = _panels_of(arms)
    for axis, arm in zip(axes.flat, arms, strict=False):
        runs = [run for run in shown if run.cell.arm == arm]
        for run in runs:
            lines = [run.lines[place] for place in thinned(len(run.lines))]
            experts, steps = ([line[name] for line in lines] for name in ("experts_per_token", "step"))
            axis.plot(steps, experts, color=colors[arm], alpha=shade(run, runs), linewidth=1.2, label=label(run))
            rows += [[str(run.cell), line["step"], line["experts_per_token"], line["density"]] for line in lines]
        axis.set(title=arm, xlabel="step", ylabel="experts per token", yscale="log")
        _number(axis.yaxis)
        if len(runs) > 1:
            axis.legend(fontsize=8, ncols=2)
    caption = f"Mean over layers and tokens of each step. {first_seed_words(results)}."
    headings = ["cell", "step", "experts per token", "density"]
    return Picture("density", "Experts per token over training", caption, headings, rows, figure)


def layers(results: StudyResults) -> Picture | None:
    """Experts per token by layer on held-out text, of cells whose layers differ."""
    uneven = [run for run in results.with_runs if run.layers and len(set(run.layers)) > 1]
    if not uneven:
        return None
    looks, rows, shown = looks_of(results, dots=True), [], first_seed(uneven)
    figure, axes = panels(height=3.6)
    for run in uneven:
        rows += [[str(run.cell), layer, experts] for layer, experts in enumerate(run.layers, 1)]
        if run in shown:
            alpha = shade(run, uneven)
            axes[0, 0].plot(range(1, len(run.layers) + 1), run.layers, **looks[run.cell.arm], alpha=alpha,
                            linewidth=1.2, label=run.cell.arm if alpha == 1.0 else None)  # fmt: skip
    axes[0, 0].set(xlabel="MoE layer", ylabel="experts per token", xticks=range(1, len(uneven[0].layers) + 1))
    axes[0, 0].set_ylim(bottom=0)
    handles, names = axes[0, 0].get_legend_handles_labels()
    by_name = dict(zip(names, handles, strict=True))
    axes[0, 0].legend(by_name.values(), by_name)
    caption = f"On held-out text at the end of training. {first_seed_words(results)}; stronger lines are larger x."
    return Picture("layers", "Experts per token by layer", caption, ["cell", "layer", "experts"], rows, figure)


def layers_over_training(results: StudyResults) -> Picture | None:
    """Experts per token of each layer at the steps of experts.jsonl; of each arm the largest x is drawn."""
    changing = [run for run in _changing(results) if run.inside.expert_lines]
    if not changing:
        return None
    rows, last = [], {run.cell.arm: run for run in changing}  # small x first
    figure, axes = _panels_of(list(last))
    for run in changing:
        tokens = run.config.training.global_batch_size * run.config.model.sequence_length
        points = run.inside.layers_over_training(tokens)
        for step, by_layer in points:
            rows += [[str(run.cell), step, layer, experts] for layer, experts in enumerate(by_layer, 1)]
        if last[run.cell.arm] is run:
            axis = axes.flat[list(last).index(run.cell.arm)]
            steps = [step for step, _ in points]
            for layer in range(len(points[0][1])):
                experts = [by_layer[layer] for _, by_layer in points]
                axis.plot(steps, experts, color=PALETTE[layer % len(PALETTE)], label=f"layer {layer + 1}")
            axis.set(title=_title(run), xlabel="step", ylabel="experts per token")
            axis.set_yscale("symlog", linthresh=0.1)
            _number(axis.yaxis)
            axis.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    caption = (
        f"{first_seed_words(results)}, the largest x of each; the CSV has all of them. Below 0.1 the axis is linear."
    )
    headings = ["cell", "step", "layer", "experts per token"]
    title = "Experts per token over training, by layer"
    return Picture("layers_over_training", title, caption, headings, rows, figure)


def kinds(results: StudyResults) -> Picture | None:
    """Experts per token of each kind of token at the traced steps; of each arm the cell with the largest x is drawn."""
    traced_runs = [(run, run.inside.kinds_over_training()) for run in _changing(results)]
    traced_runs = [(run, traced) for run, traced in traced_runs if traced]
    if not traced_runs:
        return None
    rows, last = [], {run.cell.arm: run for run, _ in traced_runs}
    figure, axes = _panels_of(list(last))
    used = [kind for kind in KINDS if kind != "other"]  # parts of characters: a handful of tokens
    for run, traced in traced_runs:
        rows += [[str(run.cell), step, kind, value] for step, by_kind in traced for kind, value in by_kind.items()]
        if last[run.cell.arm] is not run:
            continue
        axis = axes.flat[list(last).index(run.cell.arm)]
        for place, kind in enumerate(used):
            points = [(step, by_kind[kind]) for step, by_kind in traced if kind in by_kind]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=PALETTE[place], linewidth=1.3, label=kind)
        axis.set(title=_title(run), xlabel="step", ylabel="experts per token")
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    caption = (
        "Mean over layers, on the tokens of the traced steps; a token's kind follows from its text alone. "
        f"{first_seed_words(results)}, the largest x of each; the CSV has all of them."
    )
    headings = ["cell", "step", "kind", "experts per token"]
    return Picture("kinds", "Experts per token by kind of token", caption, headings, rows, figure)


def starving(results: StudyResults) -> Picture | None:
    """Experts without tokens and experts almost without gradient over training, of every cell of the first seed."""
    runs = [run for run in first_seed(results.with_runs) if len(run.inside.expert_lines) >= AT_A_TIME]
    if not runs or not results.study.quality:
        return None
    figure, axes = panels(columns=2, height=3.8)
    looks, rows = looks_of(results), []
    for run in runs:
        lines = run.inside.expert_lines
        steps = [line["step"] for line in lines[AT_A_TIME - 1 :]]
        without = [idle(lines[end - AT_A_TIME : end]) for end in range(AT_A_TIME, len(lines) + 1)]
        faint = [weak(line) for line in lines[AT_A_TIME - 1 :]]
        rows += [[str(run.cell), *values] for values in zip(steps, without, faint, strict=True)]
        for axis, shares in zip(axes[0], (without, faint), strict=True):
            axis.plot(steps, shares, **looks[run.cell.arm], alpha=shade(run, runs), linewidth=1.3)
    every = run.config.logging.experts
    titles = (f"no token in {AT_A_TIME} looks, {every} steps apart", "under a tenth of the layer's mean gradient")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set(title=title, xlabel="step", ylabel="share of experts")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axis.set_ylim(bottom=0)
    arms = [arm for arm in results.arms() if any(run.cell.arm == arm for run in runs)]
    figure.legend([plt.Line2D([], [], **looks[arm]) for arm in arms], arms, loc="outside upper center", ncols=4)
    caption = f"{first_seed_words(results)}; stronger lines are larger x."
    headings = ["cell", "step", "experts without a token", "experts with a weak gradient"]
    return Picture("starving", "Starved experts over training", caption, headings, rows, figure)


def stage_bounds(density: numpy.ndarray, target: float) -> tuple[int, int]:
    """Where sparsifying begins (density was last close to its highest) and where it ends (first at the target)."""
    begins = int(numpy.flatnonzero(density >= DENSE * density.max())[-1])
    reached = numpy.flatnonzero(density[begins:] <= target + NEAR_TARGET)
    return begins, begins + int(reached[0]) if len(reached) else len(density)


def stages(results: StudyResults) -> Picture | None:
    """Density, lambda and penalty of each arm with a lambda controller, its three stages shaded; its largest x."""
    steered = {run.cell.arm: run for run in first_seed(results.with_runs) if "lambda" in run.lines[-1]}
    if not steered:
        return None
    figure, axes = panels(columns=len(steered), rows=3, height=7.2, sharex="col")
    rows = []
    for column, run in enumerate(steered.values()):
        target = target_density(run.config)
        names = ("step", "density", "lambda", "router_loss")
        steps, density, coefficient, weighted = (numpy.array([line[name] for line in run.lines]) for name in names)
        # A line holds lambda after its step; the step's loss was weighted by the one before.
        penalty = numpy.where(weighted > ROUNDED, weighted, numpy.nan)[1:] / coefficient[:-1]
        drawn = thinned(len(steps))
        rows += [[str(run.cell), steps[i], density[i], coefficient[i]] for i in drawn]
        for axis, x, values, name, scale in zip(
            axes[:, column], (steps, steps, steps[1:]), (smoothed(density), coefficient, penalty),
            ("density", "λ", "penalty"), ("linear", "log", "log"), strict=True,
        ):  # fmt: skip
            axis.plot(x, values, color=PALETTE[0], linewidth=1.3)
            axis.set(ylabel=name, yscale=scale)
        axes[0, column].set(title=_title(run), ylim=(0, 1.02))
        axes[2, column].set_xlabel("step")
        if target is not None:
            axes[0, column].axhspan(target - NEAR_TARGET, target + NEAR_TARGET, color=PALETTE[2], alpha=0.3)
            first, second = stage_bounds(density, target)
            for axis in axes[:, column]:
                axis.axvspan(steps[0], steps[first], color="0.75", alpha=0.5, zorder=0, linewidth=0)
                axis.axvspan(steps[first], steps[min(second, len(steps) - 1)], color="0.9", zorder=0, linewidth=0)
    caption = (
        f"{first_seed_words(results)}, the largest x of each. Dark: dense; light: until the density is first within "
        f"{NEAR_TARGET} of its target (green band)."
    )
    headings = ["cell", "step", "density", "lambda"]
    return Picture("stages", "Stages of a steered density", caption, headings, rows, figure)


def _title(run: Measured) -> str:
    return f"{run.cell.arm}, {label(run)}" if label(run) else run.cell.arm
