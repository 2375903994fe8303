"""The pictures of a scaling study. Each has its numbers as rows, which are also its CSV, and is drawn from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from dsmoe.study.grid import MEASURED
from dsmoe.study.law import fit_law
from dsmoe.study.measures import MEASURES, Measured, StudyResults, centre_and_band, flops, wall
from dsmoe.study.plots import smoothed

PALETTE = ("#2f6fde", "#e0612b", "#1f9e77", "#a03fa5", "#c9a227", "#5b6675", "#d1436f", "#3aa6c9")
INK, FAINT = "#1d2733", "#dfe4ea"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "dsmoe", "font.family": "sans-serif", "font.size": 10,
    "axes.edgecolor": "#9aa5b1", "axes.labelcolor": INK, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlecolor": INK, "text.color": INK, "xtick.color": "#5b6675",
    "ytick.color": "#5b6675", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": FAINT, "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 9, "lines.linewidth": 1.8, "lines.markersize": 5, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
POINTS = 120  # of a curve over training that the CSV keeps
COSTS = ("step_seconds", "tokens_per_second", "peak_memory", "all_to_all", "bytes_per_flop", "imbalance",
         "dead_experts", "no_expert", "joules_per_token")  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One figure."""

    name: str  # of its files
    title: str
    caption: str
    headings: list[str]
    rows: list[list]
    figure: Figure


def draw_pictures(results: StudyResults) -> Iterator[Picture]:
    """Everything that the finished cells of a study allow."""
    if not results.found:
        return
    with plt.rc_context(STYLE):
        of_losses = (_loss_over_x, _published, _over_flops, _over_time) if results.study.quality else ()
        for draw in (*of_losses, _costs, _density, _layers):
            picture = draw(results)
            if picture is not None:
                yield picture
                plt.close(picture.figure)


def x_title(study) -> str:
    if study.x == MEASURED:
        return "experts per token, measured on held-out text"
    known = {"model.num_experts": "number of experts E", "granularity": "granularity G", "router.p": "p"}
    return known.get(study.x, study.x)


def _colors(results: StudyResults) -> dict[str, str]:
    return {arm.name: PALETTE[place % len(PALETTE)] for place, arm in enumerate(results.study.arms)}


def _axes(columns: int = 1, rows: int = 1, height: float = 4.2, **options) -> tuple[Figure, numpy.ndarray]:
    return plt.subplots(rows, columns, figsize=(9.6, height), layout="constrained", squeeze=False, **options)


def _logarithmic(axis: Axes, places: list[float]) -> None:
    """A base-2 x axis with a tick at each place that was measured."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(places)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _has_axis(results: StudyResults) -> bool:
    return results.study.x is not None and len({one.x for one in results.found}) > 1


def _loss_over_x(results: StudyResults) -> Picture | None:
    study = results.study
    if not _has_axis(results):
        return _loss_by_arm(results)
    figure, axes = _axes()
    axis, rows, colors, places = axes[0, 0], [], _colors(results), []
    for arm in results.arms():
        xs, means, bands, every = [], [], [], []
        for group in results.by_point(arm).values():
            losses = [one.values["val_loss"] for one in group]
            x, (middle, band) = float(numpy.mean([one.x for one in group])), centre_and_band(losses)
            xs.append(x), means.append(middle), bands.append(band)
            every += [(one.x, one.values["val_loss"]) for one in group]
            rows.append(
                [arm, x, len(losses), middle, *((middle - band, middle + band) if band is not None else ("", ""))]
            )
        xs, means = numpy.array(xs, float), numpy.array(means)
        places += xs.tolist()
        axis.plot(xs, means, "o", color=colors[arm], label=arm)
        axis.scatter(*zip(*every, strict=True), s=8, color=colors[arm], alpha=0.45, linewidths=0)
        if None not in bands:
            low, high = means - numpy.array(bands), means + numpy.array(bands)
            axis.fill_between(xs, low, high, color=colors[arm], alpha=0.13, linewidth=0)
        law = fit_law(*(numpy.array(column, float) for column in zip(*every, strict=True))) if study.law else None
        if law is None:
            axis.plot(xs, means, color=colors[arm], linewidth=1.3)
        else:
            fine = numpy.geomspace(xs.min(), xs.max(), 80)
            axis.plot(fine, law.at(fine)[0], "--", color=colors[arm], linewidth=1.3)
    if study.x != MEASURED and min(places) > 0:
        _logarithmic(axis, places)
    axis.set(xlabel=x_title(study), ylabel="held-out loss (nats per token)")
    axis.legend()
    caption = (
        "Large dots are means over seeds, small ones single runs; bands are 95 % intervals of the mean (Student's t)."
    )
    if study.law:
        caption += " Dashed: loss = a + b E⁻ᶜ, fitted to all runs of an arm."
    headings = ["arm", "x", "seeds", "held-out loss", "low", "high"]
    return Picture("loss", f"Held-out loss over {x_title(study)}", caption, headings, rows, figure)


def _loss_by_arm(results: StudyResults) -> Picture | None:
    """Where arms are all there is: a dot for each, with its interval."""
    arms, rows, colors = results.arms(), [], _colors(results)
    figure, axes = _axes(height=1.1 + 0.42 * len(arms))
    axis = axes[0, 0]
    for place, arm in enumerate(arms):
        losses = [one.values["val_loss"] for one in results.found if one.cell.arm == arm]
        middle, band = centre_and_band(losses)
        axis.errorbar(middle, place, xerr=band, fmt="o", color=colors[arm], capsize=3)
        axis.scatter(losses, [place] * len(losses), s=8, color=colors[arm], alpha=0.45, linewidths=0)
        rows.append([arm, len(losses), middle, *((middle - band, middle + band) if band is not None else ("", ""))])
    axis.set(yticks=range(len(arms)), yticklabels=arms, xlabel="held-out loss (nats per token)")
    axis.invert_yaxis()
    caption = "Means over seeds with 95 % intervals (Student's t); small dots are single runs."
    return Picture("loss", "Held-out loss", caption, ["arm", "seeds", "held-out loss", "low", "high"], rows, figure)


def _published(results: StudyResults) -> Picture | None:
    """Ours and a paper's side by side, each as the change from its own smallest x."""
    study, colors = results.study, _colors(results)
    if not study.published or not _has_axis(results):
        return None
    figure, axes = _axes(columns=1 + len(study.published), height=3.8)
    ours = {
        arm: {numpy.mean([one.x for one in group]): numpy.mean([one.values["val_loss"] for one in group])
              for group in results.by_point(arm).values()}
        for arm in results.arms()
    }  # fmt: skip
    panels = [("dsmoe, here", "held-out loss", ours)]
    panels += [
        (published.source.partition(",")[0], published.quantity, published.values) for published in study.published
    ]
    rows = []
    for axis, (source, quantity, values) in zip(axes[0], panels, strict=True):
        places = sorted({float(x) for curve in values.values() for x in curve})
        for arm, curve in values.items():
            xs = sorted(curve)
            axis.plot(xs, [curve[x] - curve[xs[0]] for x in xs], "o-", color=colors[arm], label=arm)
            rows += [[source, arm, x, curve[x], curve[x] - curve[xs[0]]] for x in xs]
        _logarithmic(axis, places)
        axis.set(title=source, xlabel=x_title(study), ylabel=f"{quantity}, change from x = {places[0]:g}")
    axes[0, 0].legend()
    caption = "Only the shapes can be compared: models, data and lengths of training differ by orders of magnitude."
    headings = ["source", "arm", "x", "loss", "change"]
    return Picture("published", "Beside the paper", caption, headings, rows, figure)


def _over_training(results: StudyResults, name: str, title: str, caption: str, label: str, value, logarithmic: bool):
    """Smoothed training loss of each arm's first seed against a running cost, a panel for the ends of the x axis."""
    colors, rows = _colors(results), []
    seed = min(one.cell.seed for one in results.found)
    ones = [one for one in results.found if one.cell.seed == seed]
    places = sorted({one.x for one in ones if one.x is not None}) if _has_axis(results) else []
    panels = len(places) > 2 and results.study.x != MEASURED
    shown = [places[0], places[len(places) // 2], places[-1]] if panels else [None]
    figure, axes = _axes(columns=len(shown), height=3.8, sharey=True)
    for axis, place in zip(axes[0], shown, strict=True):
        for one in ones:
            if place is not None and one.x != place:
                continue
            cost, loss = value(one), smoothed(numpy.array([line["loss"] for line in one.lines]))
            axis.plot(cost, loss, color=colors[one.cell.arm], linewidth=1.3)
            kept = numpy.unique(numpy.linspace(0, len(loss) - 1, POINTS).round().astype(int))
            rows += [[str(one.cell), one.lines[i]["step"], cost[i], loss[i]] for i in kept]
        if logarithmic:
            axis.set_xscale("log")
        axis.set(xlabel=label, title="" if place is None else f"{results.study.x.rpartition('.')[2]} = {place:g}")
    axes[0, 0].set_ylabel("training loss, smoothed (nats per token)")
    arms = results.arms()
    axes[0, -1].legend([plt.Line2D([], [], color=colors[arm]) for arm in arms], arms)
    return Picture(name, title, caption, ["cell", "step", label, "loss"], rows, figure)


def _over_flops(results: StudyResults) -> Picture:
    caption = (
        "Six operations for each parameter that a token uses, with the experts every step really had: a dense start "
        "counts in full. First seed."
    )
    return _over_training(results, "loss_over_flops", "Loss against training compute", caption, "training FLOP so far",
                          lambda one: numpy.cumsum(flops(one.config, one.lines)), True)  # fmt: skip


def _over_time(results: StudyResults) -> Picture:
    caption = "Seconds inside optimizer steps. First seed."
    if not results.study.timed:
        caption += " Other work shared the cores, so that differences of a few per cent say nothing."
    return _over_training(results, "loss_over_time", "Loss against wall time", caption, "seconds of training so far",
                          lambda one: wall(one.lines), False)  # fmt: skip


def _costs(results: StudyResults) -> Picture | None:
    names = [name for name in COSTS if any(name in one.values for one in results.found)]
    if not _has_axis(results) or not names:
        return None
    columns = min(3, len(names))
    figure, axes = _axes(columns, -(-len(names) // columns), height=2.9 * -(-len(names) // columns))
    colors, rows = _colors(results), []
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        places = []
        for arm in results.arms():
            points = []
            for group in results.by_point(arm).values():
                values = [one.values[name] for one in group if name in one.values]
                if values:
                    x, (middle, band) = float(numpy.mean([one.x for one in group])), centre_and_band(values)
                    points.append((x, middle))
                    rows.append([name, arm, x, len(values), middle, "" if band is None else band])
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colors[arm], linewidth=1.3, label=arm)
                places += [x for x, _ in points]
        if results.study.x != MEASURED and min(places) > 0:
            _logarithmic(axis, places)
            axis.tick_params(axis="x", labelsize=8)
        axis.set_title(MEASURES[name].heading, fontsize=9)
        if "%" in MEASURES[name].form:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        else:
            axis.set_ylim(bottom=0)
    axes.flat[0].legend()
    headings = ["quantity", "arm", "x", "seeds", "mean", "half of the 95 % interval"]
    caption = f"Means over seeds, over {x_title(results.study)}."
    return Picture("costs", "What more experts cost", caption, headings, rows, figure)


def _density(results: StudyResults) -> Picture | None:
    """Experts per token at every step, of arms where that changes."""
    seed, colors, rows = min(one.cell.seed for one in results.found), _colors(results), []
    changing = [
        one for one in results.found
        if one.cell.seed == seed and numpy.ptp([line["experts_per_token"] for line in one.lines]) > 1e-9
    ]  # fmt: skip
    if not changing:
        return None
    arms = [arm for arm in results.arms() if any(one.cell.arm == arm for one in changing)]
    figure, axes = _axes(columns=min(2, len(arms)), rows=-(-len(arms) // 2), height=3.4 * -(-len(arms) // 2))
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    for axis, arm in zip(axes.flat, arms, strict=False):
        ones = sorted((one for one in changing if one.cell.arm == arm), key=lambda one: one.x or 0.0)
        for place, one in enumerate(ones):
            experts = numpy.array([line["experts_per_token"] for line in one.lines])
            label = ", ".join(f"{axis_name.rpartition('.')[2]} {value}" for axis_name, value in one.cell.point)
            steps = [line["step"] for line in one.lines]
            alpha = 1.0 if len(ones) == 1 else 0.3 + 0.7 * place / (len(ones) - 1)
            axis.plot(steps, experts, color=colors[arm], alpha=alpha, linewidth=1.2, label=label)
            kept = numpy.unique(numpy.linspace(0, len(steps) - 1, POINTS).round().astype(int))
            rows += [[str(one.cell), steps[i], experts[i], one.lines[i]["density"]] for i in kept]
        axis.set(title=arm, xlabel="step", ylabel="experts per token", yscale="log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if len(ones) > 1:
            axis.legend(fontsize=8, ncols=2)
    caption = "Mean over layers and tokens of each step, first seed; arms with a constant number are left out."
    headings = ["cell", "step", "experts per token", "density"]
    return Picture("density", "Experts per token over training", caption, headings, rows, figure)


def _layers(results: StudyResults) -> Picture | None:
    """Experts per token by layer on held-out text, of cells whose layers differ."""
    uneven: list[Measured] = [one for one in results.found if one.layers and len(set(one.layers)) > 1]
    if not uneven:
        return None
    seed, colors, rows = min(one.cell.seed for one in uneven), _colors(results), []
    figure, axes = _axes(height=3.6)
    for one in uneven:
        rows += [[str(one.cell), layer, experts] for layer, experts in enumerate(one.layers, 1)]
        if one.cell.seed == seed:
            same = sorted({o.x for o in uneven if o.cell.arm == one.cell.arm and o.x is not None})
            alpha = 1.0 if len(same) < 2 else 0.3 + 0.7 * same.index(one.x) / (len(same) - 1)
            last = not same or one.x == same[-1]
            axes[0, 0].plot(range(1, len(one.layers) + 1), one.layers, "o-", color=colors[one.cell.arm], alpha=alpha,
                            linewidth=1.2, label=one.cell.arm if last else None)  # fmt: skip
    axes[0, 0].set(xlabel="MoE layer", ylabel="experts per token", xticks=range(1, len(uneven[0].layers) + 1))
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend()
    caption = "On held-out text at the end of training, first seed; stronger lines are larger x."
    return Picture("layers", "Experts per token by layer", caption, ["cell", "layer", "experts"], rows, figure)
