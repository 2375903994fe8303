"""Plots of a comparison: loss over compute, experts per token over training and by layer, a lambda controller's stages.

One figure of each kind for a corpus. Curves are of each variant's first finished seed; a smoothed one is drawn over the
faint values of single steps.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy

from dsmoe.lab.study.plan import Plan
from dsmoe.lab.study.results import NEAR_TARGET, moe_compute, run_config, run_lines, target_density

COLORS, LINES = 10, ("-", "--", ":")  # of matplotlib's cycle, and what tells the variants after those apart
SMOOTH = 0.02  # of a run, each way
WIDTH = 10.0  # inches
DENSE = 0.95  # of the highest density: the dense stage lasts that long
ROUNDED = 1e-5  # a router loss below it is what is left of a difference of two losses in fp32


def write_plots(plan: Plan, outcomes: list, out: Path, target: Path) -> list[Path]:
    """Draw everything that finished runs allow; return the files. `outcomes`: from `dsmoe.lab.study.report`."""
    written = []
    looks = {
        variant.name: {"color": f"C{place % COLORS}", "linestyle": LINES[place // COLORS % len(LINES)]}
        for place, variant in enumerate(plan.variants)
    }
    for corpus in plan.corpora:
        runs = {}
        for outcome in outcomes:
            if outcome.cell.corpus == corpus and outcome.result is not None:
                runs.setdefault(outcome.cell.variant, outcome)
        if not runs:
            continue
        folders = {name: outcome.cell.folder(out) for name, outcome in runs.items()}
        by_layer = {name: outcome.result.val_experts_by_layer for name, outcome in runs.items()}
        uneven = {name: layers for name, layers in by_layer.items() if layers and len(set(layers)) > 1}
        figures = {"loss": loss_over_compute(folders, looks), "experts": experts_over_training(folders, looks)}
        if uneven:
            figures["layers"] = layer_profile(uneven, looks)
        for name, folder in folders.items():
            if "lambda" in run_lines(folder)[-1]:
                figures[f"stages-{folder.parent.name}"] = stages(folder, f"{name} on {corpus}")
        for name, figure in figures.items():
            path = target / f"{folders[next(iter(folders))].parent.parent.name}-{name}.png"
            figure.savefig(path, dpi=110)
            plt.close(figure)
            written.append(path)
    return written


def smoothed(values: numpy.ndarray, share: float = SMOOTH) -> numpy.ndarray:
    """Mean over a window of `share` of the run each way, cut at the ends."""
    reach = max(1, round(share * len(values)))
    sums = numpy.concatenate(([0.0], numpy.cumsum(values)))
    first = numpy.maximum(numpy.arange(len(values)) - reach, 0)
    last = numpy.minimum(numpy.arange(len(values)) + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _column(lines: list[dict], name: str) -> numpy.ndarray:
    return numpy.array([line[name] for line in lines])


def _figure(rows: int = 1, columns: int = 1, height: float = 5.0, **options):
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def loss_over_compute(folders: dict[str, Path], looks: dict[str, dict]):
    """Training loss over steps, and over the multiplications that the MoE layers really did."""
    figure, (by_step, by_compute) = _figure(1, 2, sharey=True)
    lowest, highest = numpy.inf, -numpy.inf
    for name, folder in folders.items():
        lines, config = run_lines(folder), run_config(folder)
        loss = smoothed(_column(lines, "loss"))
        tokens = config.training.global_batch_size * config.model.sequence_length
        cost = numpy.cumsum(tokens * moe_compute(config, _column(lines, "experts_per_token")))
        by_step.plot(_column(lines, "step"), loss, label=name, linewidth=1.3, **looks[name])
        by_compute.plot(cost / 1e9, loss, linewidth=1.3, **looks[name])
        lowest, highest = min(lowest, loss.min()), max(highest, loss[len(loss) // 10])
    by_step.set_ylim(lowest - 0.05, highest)
    by_step.set(xlabel="step", ylabel="training loss, smoothed (nats per token)")
    by_compute.set(xlabel="multiplications in MoE layers so far (10⁹)")
    by_step.legend(fontsize=8)
    for axis in (by_step, by_compute):
        axis.grid(alpha=0.3)
    return figure


def experts_over_training(folders: dict[str, Path], looks: dict[str, dict]):
    """Experts per token at every step, a panel for each variant where that changes."""
    lines = {name: run_lines(folder) for name, folder in folders.items()}
    experts = {name: _column(found, "experts_per_token") for name, found in lines.items()}
    changing = [name for name in folders if numpy.ptp(experts[name]) > 0]
    rows = max(1, -(-len(changing) // 2))
    figure, axes = _figure(rows, 2, height=2.6 * rows, squeeze=False)
    for axis in axes.flat[len(changing) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, changing, strict=False):
        steps = _column(lines[name], "step")
        axis.plot(steps, experts[name], color=looks[name]["color"], alpha=0.3, linewidth=0.7)
        axis.plot(steps, smoothed(experts[name]), color=looks[name]["color"], linewidth=1.5)
        config = run_config(folders[name])
        target = target_density(config)
        if target is not None:
            axis.axhline(target * config.model.num_experts, color="0.4", linestyle="--", linewidth=0.8)
        axis.set(xlabel="step", ylabel="experts per token", title=name)
        axis.grid(alpha=0.3)
    return figure


def layer_profile(by_layer: dict[str, list[float]], looks: dict[str, dict]):
    """Experts per token in each MoE layer, on held-out text at the end, of the variants whose layers differ."""
    figure, axis = _figure(height=4.0)
    for name, experts in by_layer.items():
        axis.plot(range(1, len(experts) + 1), experts, marker="o", label=name, **looks[name])
    axis.set(xlabel="MoE layer", ylabel="experts per token on held-out text", ylim=(0, None))
    axis.set_xticks(range(1, max(map(len, by_layer.values()), default=0) + 1))
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)
    return figure


def stage_bounds(density: numpy.ndarray, target: float) -> tuple[int, int]:
    """Where sparsifying begins (density was last close to its highest) and where it ends (first at the target)."""
    begins = int(numpy.flatnonzero(density >= DENSE * density.max())[-1])
    reached = numpy.flatnonzero(density[begins:] <= target + NEAR_TARGET)
    return begins, begins + int(reached[0]) if len(reached) else len(density)


def stages(folder: Path, title: str):
    """Density, lambda and the penalty of a run with a lambda controller, its three stages shaded."""
    lines, target = run_lines(folder), target_density(run_config(folder))
    steps, density, coefficient = (_column(lines, name) for name in ("step", "density", "lambda"))
    weighted = _column(lines, "router_loss")
    weighted = numpy.where(weighted > ROUNDED, weighted, numpy.nan)
    # A line holds lambda after its step; the step's loss was weighted by the one before.
    penalty = weighted[1:] / coefficient[:-1]
    figure, (top, middle, bottom) = _figure(3, 1, height=8.5, sharex=True)
    top.plot(steps, density, color="C0", alpha=0.35, linewidth=0.8)
    top.plot(steps, smoothed(density), color="C0", linewidth=1.6)
    near = f"target {target} ± {NEAR_TARGET}"
    top.axhspan(target - NEAR_TARGET, target + NEAR_TARGET, color="C2", alpha=0.3, label=near)
    top.set(ylabel="density", ylim=(0, 1.02), title=title)
    top.legend(fontsize=8, loc="upper right")
    middle.plot(steps, coefficient, color="C1")
    middle.set(ylabel="λ", yscale="log")
    bottom.plot(steps[1:], penalty, color="C3", label="penalty")
    bottom.plot(steps, weighted, color="C4", label="λ × penalty")
    bottom.set(ylabel="penalty", yscale="log", xlabel="step")
    bottom.legend(fontsize=8)
    first, second = stage_bounds(density, target)
    bounds = [steps[0], steps[first], steps[min(second, len(steps) - 1)], steps[-1]]
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
        for place, color in enumerate(("0.75", "0.9", "1.0")):
            axis.axvspan(bounds[place], bounds[place + 1], color=color, alpha=0.5, zorder=0, linewidth=0)
    for place, name in enumerate(("I", "II", "III")):
        if bounds[place + 1] - bounds[place] > 0.015 * steps[-1]:
            top.text((bounds[place] + bounds[place + 1]) / 2, 0.95, name, ha="center", va="top", color="0.3")
    return figure
