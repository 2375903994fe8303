"""Pictures of what compute buys: gain from experts, loss over compute, effective speedup, leverage, memory."""

from __future__ import annotations

import numpy
from matplotlib.ticker import FuncFormatter, NullLocator

from dsmoe.lab.study.drawing import Picture, colors_of, has_axis, in_log, label_ends, looks_of, panels, shade, x_title
from dsmoe.lab.study.grid import BUDGET, MEASURED
from dsmoe.lab.study.law import fit_power
from dsmoe.lab.study.measures import Measured, StudyResults
from dsmoe.lab.study.speedup import compute_note, compute_ratios, dense_arm, worth

EXPERTS = "model.num_experts"


def gain(results: StudyResults) -> Picture | None:
    """How much lower the held-out loss is than with the fewest experts, over training: from which length they pay."""
    if results.study.x != EXPERTS:
        return None
    colors, rows = colors_of(results), []
    runs = [run for run in results.full if any("val_loss" in point for point in run.curve)]
    arms = [arm for arm in results.arms() if len({run.x for run in runs if run.cell.arm == arm}) > 1]
    if not arms:
        return None
    figure, axes = panels(columns=len(arms), height=3.8, sharey=True)
    for axis, arm in zip(axes[0], arms, strict=True):
        curves, ends = _evaluations([run for run in runs if run.cell.arm == arm]), []
        fewest = min(curves)
        for x, curve in sorted(curves.items()):
            tokens = sorted(set(curve) & set(curves[fewest]))
            gains = [curves[fewest][t] - curve[t] for t in tokens]
            rows += [[arm, x, t, curve[t], value] for t, value in zip(tokens, gains, strict=True)]
            if x != fewest and tokens:
                alpha = 0.35 + 0.65 * sorted(curves).index(x) / (len(curves) - 1)
                axis.plot([t / 1e6 for t in tokens], gains, "o-", color=colors[arm], alpha=alpha, markersize=3)
                ends.append((tokens[-1] / 1e6, gains[-1], f"E = {x:g}", colors[arm]))
        axis.axhline(0, color="#5b6675", linewidth=1)
        axis.set(title=arm, xlabel="tokens so far (millions)")
        label_ends(axis, ends)
    axes[0, 0].set_ylabel("held-out loss below that of the fewest experts")
    caption = f"Above 0 more experts are better at the same number of tokens, not of compute. {_seeds(runs)}"
    headings = ["arm", "x", "tokens", "held-out loss", "gain"]
    return Picture("gain", "From which length more experts pay", caption, headings, rows, figure)


def _evaluations(runs: list[Measured]) -> dict[float, dict[float, float]]:
    """x -> tokens -> held-out loss, mean over seeds that got there."""
    every: dict[float, dict[float, list[float]]] = {}
    for run in runs:
        for point in run.curve:
            if "val_loss" in point:
                every.setdefault(run.x, {}).setdefault(point["tokens"], []).append(point["val_loss"])
    return {x: {t: float(numpy.mean(losses)) for t, losses in curve.items()} for x, curve in every.items()}


def loss_over_compute(results: StudyResults) -> Picture | None:
    """Held-out loss at the end of each length over realised compute; lines are power laws through the lengths."""
    runs = [run for run in results.measured if {"val_loss", "training_flops"} <= run.values.keys()]
    if len({run.cell.length for run in runs}) < 2 and results.study.preset is None:
        return None
    colors, rows, ends = colors_of(results), [], []
    dots, lines = looks_of(results, line=False, dots=True), looks_of(results)
    figure, axes = panels(height=4.4)
    axis = axes[0, 0]
    for arm in results.arms():
        of_arm = [run for run in runs if run.cell.arm == arm]
        groups: dict[tuple, list[Measured]] = {}
        for run in sorted(of_arm, key=lambda run: run.x or 0):
            groups.setdefault(tuple(axis for axis in run.cell.point if axis[0] != BUDGET), []).append(run)
        for point, group in groups.items():
            compute = numpy.array([run.values["training_flops"] for run in group])
            loss = numpy.array([run.values["val_loss"] for run in group])
            alpha, law = shade(group[0], runs), fit_power(compute, loss)
            axis.plot(compute, loss, **dots[arm], alpha=alpha)
            rows += [[arm, "" if run.x is None else run.x, run.cell.length, run.cell.seed, *pair]
                     for run, *pair in zip(group, compute, loss, strict=True)]  # fmt: skip
            if law:
                fine = numpy.geomspace(compute.min(), compute.max(), 40)
                axis.plot(fine, numpy.exp(law.p) * fine**-law.alpha, **lines[arm], alpha=alpha, linewidth=1.2)
            name = arm if len(groups) == 1 else f"{arm} {', '.join(str(value) for _, value in point)}"
            ends.append((compute.max(), loss.min(), name, colors[arm]))
    axis.set(xscale="log", xlabel="training FLOP, as realised", ylabel="held-out loss (nats per token)")
    label_ends(axis, ends)
    caption = f"Lines are power laws through the lengths of a run. {_seeds(runs, means=False)}"
    headings = ["arm", "x", "length", "seed", "FLOP", "held-out loss"]
    return Picture("loss_over_compute", "Held-out loss over compute", caption, headings, rows, figure)


def speedup(results: StudyResults) -> Picture | None:
    """Effective speedup of every cell over the dense law and over the baseline's at the same place."""
    valued = [run for run in worth(results) if run.over_dense is not None or run.over_baseline is not None]
    if not valued or not has_axis(results) or results.study.x == MEASURED:
        return None
    colors, looks, rows = colors_of(results), looks_of(results, dots=True), []
    kinds = [("over_dense", f"over {dense_arm(results)}"), ("over_baseline", f"over {results.study.reference}")]
    kinds = [kind for kind in kinds if any(getattr(run, kind[0]) is not None for run in valued)]
    figure, axes = panels(columns=len(kinds), height=3.8)
    for axis, (name, title) in zip(axes[0], kinds, strict=True):
        places, ends = [], []
        for arm in results.arms():
            points = [(w.run.x, w.run.cell.length, getattr(w, name)) for w in valued
                      if w.run.cell.arm == arm and getattr(w, name) is not None]  # fmt: skip
            for length in sorted({length for _, length, _ in points}):
                curve = sorted((x, value) for x, at, value in points if at == length)
                axis.plot(*zip(*curve, strict=True), **looks[arm], alpha=0.3 + 0.7 * length)
                if length == max(at for _, at, _ in points):
                    ends.append((*curve[-1], arm, colors[arm]))
            places += [x for x, *_ in points]
            rows += [[title, arm, x, length, value] for x, length, value in points]
        in_log(axis, places)
        axis.axhline(1, color="#5b6675", linewidth=1)
        axis.set(title=title, xlabel=x_title(results.study))
        label_ends(axis, ends)
    axes[0, 0].set_ylabel("effective speedup in compute")
    caption = (
        "Compute that the reference's law needs for a cell's loss, over the compute it took. Stronger lines are longer "
        f"runs. {_seeds([run.run for run in valued], means=False)}"
    )
    headings = ["reference", "arm", "x", "length", "speedup"]
    return Picture("speedup", "Effective speedup", caption, headings, rows, figure)


def leverage(results: StudyResults) -> Picture | None:
    """Efficiency leverage: the speedup over dense against the share of the experts that a token uses."""
    valued = [run for run in worth(results) if run.over_dense is not None and "mean_experts" in run.run.values]
    if len({run.run.shape.get("num_experts") for run in valued}) < 2:
        return None
    colors, looks, rows, ends = colors_of(results), looks_of(results, dots=True), [], []
    figure, axes = panels(height=3.8)
    axis = axes[0, 0]
    for arm in results.arms():
        mine = sorted(
            (w.run.values["mean_experts"] / w.run.shape["num_experts"], w.over_dense)
            for w in valued
            if w.run.cell.arm == arm and w.run.cell.length == 1
        )
        if mine:
            axis.plot(*zip(*mine, strict=True), **looks[arm])
            ends.append((*mine[0], arm, colors[arm]))
            rows += [[arm, *point] for point in mine]
    axis.set(xscale="log", xlabel="activation ratio: experts per token over E", ylabel="efficiency leverage")
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.axhline(1, color="#5b6675", linewidth=1)
    label_ends(axis, ends)
    caption = (
        "Dense compute over the cell's at equal loss, full length. Ling (arXiv 2507.17702) reports that it rises as "
        f"the activation ratio falls. {_seeds([run.run for run in valued], means=False)}"
    )
    return Picture("leverage", "Efficiency leverage", caption, ["arm", "activation ratio", "leverage"], rows, figure)


def iso_memory(results: StudyResults) -> Picture | None:
    """Held-out loss over all parameters, which is what memory is spent on."""
    runs = [run for run in results.full if {"val_loss", "parameters"} <= run.values.keys()]
    if len({run.values["parameters"] for run in runs}) < 3:
        return None
    colors, rows, ends, spent = colors_of(results), [], [], compute_ratios(results)
    looks = looks_of(results, dots=True)
    figure, axes = panels(height=3.8)
    axis = axes[0, 0]
    for arm in results.arms():
        groups = [group for group in results.by_point(arm).values() if all("val_loss" in o.values for o in group)]
        curve = sorted(
            (group[0].values["parameters"], float(numpy.mean([run.values["val_loss"] for run in group])))
            for group in groups
        )
        if curve:
            axis.plot(*zip(*curve, strict=True), **looks[arm])
            largest = max(groups, key=lambda group: group[0].values["parameters"])[0]
            ends.append((*curve[-1], arm + spent.get((arm, largest.cell.point, 1), ""), colors[arm]))
            rows += [[arm, *point] for point in curve]
    axis.set(xscale="log", xlabel="parameters in memory", ylabel="held-out loss (nats per token)")
    sizes = [run.values["parameters"] for run in runs]
    axis.set_xticks([min(sizes), max(sizes)], [f"{size / 1e6:.3g} M" for size in (min(sizes), max(sizes))])
    axis.xaxis.set_minor_locator(NullLocator())  # they may all lie between two powers of ten
    label_ends(axis, ends)
    caption = f"At one place on the axis arms take the same memory for weights. {_seeds(runs)}{compute_note(results)}"
    headings = ["arm", "parameters", "held-out loss"]
    return Picture("iso_memory", "Held-out loss over memory", caption, headings, rows, figure)


def _seeds(runs: list[Measured], means: bool = True) -> str:
    seeds = len({run.cell.seed for run in runs})
    if seeds == 1:
        return "One seed: there is no interval."
    return f"Means over {seeds} seeds." if means else f"Each point is a run, of {seeds} seeds."
