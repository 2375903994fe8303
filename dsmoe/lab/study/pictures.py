"""The pictures of a study: all of them in order, and those of losses. Each has its numbers as rows, which are also its
CSV, and is drawn from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import matplotlib.pyplot as plt
import numpy

from dsmoe.lab.study.drawing import (
    STYLE,
    Picture,
    colors_of,
    first_seed,
    first_seed_words,
    fit_words,
    for_a_phone,
    has_axis,
    in_log,
    label_ends,
    logarithmic,
    looks_of,
    panels,
    place_labels,
    seeds_note,
    x_title,
)
from dsmoe.lab.study.grid import MEASURED
from dsmoe.lab.study.law import fit_law
from dsmoe.lab.study.law_pictures import gain, iso_memory, leverage, loss_over_compute, speedup
from dsmoe.lab.study.measures import Measured, StudyResults, at, centre_and_band
from dsmoe.lab.study.quantity_pictures import became, costs, latency, parts
from dsmoe.lab.study.speedup import compute_note, compute_ratios, dense_arm
from dsmoe.lab.study.training_pictures import density, kinds, layers, layers_over_training, stages, starving


def draw_pictures(results: StudyResults, narrow: bool = False) -> Iterator[Picture]:
    """Everything that the finished cells of a study allow; `narrow`: as wide as a phone."""
    if not results.measured:
        return
    with plt.rc_context(STYLE), for_a_phone() if narrow else nullcontext():
        of_losses = (_loss_over_x, gain, loss_over_compute, speedup, leverage, iso_memory, _published, _over_flops,
                     _over_time) if results.study.quality else ()  # fmt: skip
        over_training = (density, layers, layers_over_training, kinds, stages, starving)
        for draw in (*of_losses, costs, parts, latency, became, *over_training):
            picture = draw(results)
            if picture is not None:
                place_labels(picture.figure)
                if narrow:
                    fit_words(picture.figure)
                yield picture
                plt.close(picture.figure)


def _loss_over_x(results: StudyResults) -> Picture | None:
    """A panel for each length."""
    study = results.study
    if not has_axis(results):
        return _loss_by_arm(results)
    lengths = sorted({run.cell.length for run in results.measured})
    figure, axes = panels(columns=len(lengths), height=4.2, sharey=len(lengths) > 1)
    rows = [row for axis, length in zip(axes[0], lengths, strict=True) for row in _loss_panel(results, axis, length)]
    axes[0, 0].set_ylabel("held-out loss (nats per token)")
    if len(lengths) > 1:
        for axis, length in zip(axes[0], lengths, strict=True):
            tokens = max(run.values.get("tokens", 0.0) for run in results.measured if run.cell.length == length)
            axis.set_title(f"{tokens / 1e6:.2f} M tokens" if tokens else f"length {length:g}")
    caption = seeds_note(results) + compute_note(results)
    if study.law and any(row[-1] for row in rows):
        caption += " Dashed: loss = a + b E⁻ᶜ, fitted to all runs of an arm."
    if dense_arm(results) is not None:
        caption += " The horizontal line has no choice of experts."
    headings = ["arm", "x", "length", "seeds", "held-out loss", "low", "high"]
    return Picture("loss", f"Held-out loss over {x_title(study)}", caption, headings, [r[:-1] for r in rows], figure)


def _loss_panel(results: StudyResults, axis, length: float) -> list[list]:
    """Draw one length; its rows, each with whether a law was drawn."""
    study, colors, rows, places, ends, flat = results.study, colors_of(results), [], [], [], []
    spent, dots, lines = compute_ratios(results), looks_of(results, line=False, dots=True), looks_of(results)
    for arm in results.arms():
        groups = list(results.by_point(arm, length).values())
        xs = [float(numpy.mean([run.x for run in group])) for group in groups]
        bands = [centre_and_band([run.values["val_loss"] for run in group]) for group in groups]
        every = [(run.x, run.values["val_loss"]) for group in groups for run in group]
        if not groups:
            continue
        means = numpy.array([middle for middle, _ in bands])
        law = fit_law(*(numpy.array(column, float) for column in zip(*every, strict=True))) if study.law else None
        for x, group, (middle, band) in zip(xs, groups, bands, strict=True):
            interval = (middle - band, middle + band) if band is not None else ("", "")
            rows.append([arm, x, length, len(group), middle, *interval, law is not None])
        if len(xs) == 1 and arm == dense_arm(results):
            axis.axhline(means[0], **lines[arm], linewidth=1.3)
            flat.append((arm + spent.get((arm, groups[0][0].cell.point, length), ""), means[0], colors[arm]))
            continue
        places += xs
        axis.plot(xs, means, **dots[arm], label=arm)
        axis.scatter(*zip(*every, strict=True), s=8, color=colors[arm], alpha=0.45, linewidths=0)
        if all(band is not None for _, band in bands):
            half = numpy.array([band for _, band in bands])
            axis.fill_between(xs, means - half, means + half, color=colors[arm], alpha=0.13, linewidth=0)
        if law is None:
            axis.plot(xs, means, **lines[arm], linewidth=1.3)
        else:
            fine = numpy.geomspace(min(xs), max(xs), 80)
            axis.plot(fine, law.at(fine)[0], "--", color=colors[arm], linewidth=1.3)
        ends.append((xs[-1], means[-1], arm + spent.get((arm, groups[-1][0].cell.point, length), ""), colors[arm]))
    if study.x != MEASURED:
        in_log(axis, places)
    right = max(places, default=1.0)
    label_ends(axis, [*ends, *((right, value, name, color) for name, value, color in flat)])
    axis.set_xlabel(x_title(study))
    return rows


def _loss_by_arm(results: StudyResults) -> Picture | None:
    """Without an x axis: a dot for each arm and point, with its interval."""
    groups, rows, colors, spent = results.by_arm(), [], colors_of(results), compute_ratios(results)
    figure, axes = panels(height=1.1 + 0.42 * len(groups))
    axis = axes[0, 0]
    for line, (arm, _, runs) in enumerate(groups):
        losses, point = [run.values["val_loss"] for run in runs], runs[0].cell.point
        middle, band = centre_and_band(losses)
        axis.errorbar(middle, line, xerr=band, fmt="o", color=colors[arm], capsize=3)
        axis.scatter(losses, [line] * len(losses), s=8, color=colors[arm], alpha=0.45, linewidths=0)
        axis.annotate(f"{middle:.4f}{spent.get((arm, point, 1), '')}", (1, line), xycoords=("axes fraction", "data"),
                      xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, color=colors[arm],
                      annotation_clip=False)  # fmt: skip
        interval = (middle - band, middle + band) if band is not None else ("", "")
        rows.append([arm, at(point), len(losses), middle, *interval])
    axis.set(yticks=range(len(groups)), yticklabels=[name for _, name, _ in groups],
             xlabel="held-out loss (nats per token)")  # fmt: skip
    axis.invert_yaxis()
    headings = ["arm", "at", "seeds", "held-out loss", "low", "high"]
    caption = seeds_note(results).replace("bands", "bars") + compute_note(results)
    return Picture("loss", "Held-out loss", caption, headings, rows, figure)


def _published(results: StudyResults) -> Picture | None:
    """Ours and a paper's side by side, each as the change from its own smallest x."""
    study, colors, looks = results.study, colors_of(results), looks_of(results, dots=True)
    with_shapes = [run for run in study.published if min(map(len, run.values.values())) > 1]  # a place is no shape
    if not with_shapes or not has_axis(results):
        return None
    figure, axes = panels(columns=1 + len(with_shapes), height=3.8)
    ours = {
        arm: {float(numpy.mean([run.x for run in group])): float(numpy.mean([run.values["val_loss"] for run in group]))
              for group in results.by_point(arm).values()}
        for arm in results.arms() if len(results.by_point(arm)) > 1
    }  # fmt: skip
    curves: list[tuple[str, str, dict[str, dict[float, float]]]] = [("dsmoe, here", "held-out loss", ours)]
    curves += [(run.source.partition(",")[0], run.quantity, run.values) for run in with_shapes]
    rows = []
    for axis, (source, quantity, values) in zip(axes[0], curves, strict=True):
        places, ends = sorted({float(x) for curve in values.values() for x in curve}), []
        for arm, curve in values.items():
            xs = sorted(curve)
            changes = [curve[x] - curve[xs[0]] for x in xs]
            axis.plot(xs, changes, **looks[arm])
            ends.append((xs[-1], changes[-1], arm, colors[arm]))
            rows += [[source, arm, x, curve[x], change] for x, change in zip(xs, changes, strict=True)]
        logarithmic(axis, places)
        label_ends(axis, ends)
        axis.set(title=source, xlabel=x_title(study), ylabel=f"{quantity}, change from x = {places[0]:g}")
    caption = "Only the shapes can be compared: models, data and lengths of training differ by orders of magnitude."
    headings = ["source", "arm", "x", "loss", "change"]
    return Picture("published", "Beside the paper", caption, headings, rows, figure)


def _over_training(results: StudyResults, name: str, title: str, caption: str, label: str, cost: str, log: bool):
    """Smoothed training loss of each cell's first seed against a running cost, a panel for the ends of the x axis.

    An arm with one place on the axis is in every panel.
    """
    runs = [run for run in results.full if any(cost in point for point in run.curve)]
    if not runs:
        return None
    looks, rows, runs = looks_of(results), [], first_seed(runs)
    single = {arm for arm in results.arms() if len({run.x for run in runs if run.cell.arm == arm}) == 1}
    places = sorted({run.x for run in runs if run.x is not None and run.cell.arm not in single})
    several = has_axis(results) and len(places) > 1 and results.study.x != MEASURED
    shown = sorted({places[0], places[len(places) // 2], places[-1]}) if several else [None]
    figure, axes = panels(columns=len(shown), height=3.8, sharey=True)
    for axis, place in zip(axes[0], shown, strict=True):
        drawn = [run for run in runs if place is None or run.x == place or run.cell.arm in single]
        for run in drawn:
            points = [point for point in run.curve if point.get(cost, 0.0) > 0]
            axis.plot([point[cost] for point in points], [point["loss"] for point in points],
                      **looks[run.cell.arm], linewidth=1.3)  # fmt: skip
        _zoomed(axis, drawn)
        if log:
            axis.set_xscale("log")
        axis.set(xlabel=label, title="" if place is None else f"{results.study.x.rpartition('.')[2]} = {place:g}")
    rows = [[str(run.cell), point["step"], point[cost], point["loss"]]
            for run in runs for point in run.curve if cost in point]  # fmt: skip
    axes[0, 0].set_ylabel("training loss, smoothed (nats per token)")
    arms = results.arms()
    figure.legend([plt.Line2D([], [], **looks[arm]) for arm in arms], arms, loc="outside upper center",
                  ncols=min(6, len(arms)))  # fmt: skip
    return Picture(name, title, caption, ["cell", "step", label, "loss"], rows, figure)


def _zoomed(axis, runs: list[Measured]) -> None:
    """Without the first tenth of a run's fall, beside which all else is flat."""
    losses = [[point["loss"] for point in run.curve if "loss" in point] for run in runs]
    if losses and all(len(curve) > 9 for curve in losses):
        low, high = min(map(min, losses)), max(curve[len(curve) // 10] for curve in losses)
        axis.set_ylim(low - 0.05 * (high - low), high)


def _over_flops(results: StudyResults) -> Picture | None:
    caption = (
        "Six operations for each parameter that a token uses and attention's own products, with the experts every step "
        f"really had: a dense start counts in full. {first_seed_words(results)}."
    )
    return _over_training(results, "loss_over_flops", "Loss against training compute", caption, "training FLOP so far",
                          "flops", True)  # fmt: skip


def _over_time(results: StudyResults) -> Picture | None:
    if not results.study.timed:
        return None  # seconds of a machine that did other work, too
    caption = f"Seconds inside optimizer steps. {first_seed_words(results)}."
    return _over_training(results, "loss_over_time", "Loss against wall time", caption, "seconds of training so far",
                          "seconds", False)  # fmt: skip
