"""The pictures of a scaling study: all of them in order, and those of losses. Each has its numbers as rows, which are
also its CSV, and is drawn from them."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy

from dsmoe.lab.study.drawing import STYLE, Picture, colors_of, has_axis, logarithmic, panels, thinned, x_title
from dsmoe.lab.study.grid import MEASURED
from dsmoe.lab.study.law import fit_law
from dsmoe.lab.study.measures import StudyResults, centre_and_band, flops, wall
from dsmoe.lab.study.plots import smoothed
from dsmoe.lab.study.quantity_pictures import became, costs, latency, parts
from dsmoe.lab.study.training_pictures import density, kinds, layers, layers_over_training, starving


def draw_pictures(results: StudyResults) -> Iterator[Picture]:
    """Everything that the finished cells of a study allow."""
    if not results.found:
        return
    with plt.rc_context(STYLE):
        of_losses = (_loss_over_x, _published, _over_flops, _over_time) if results.study.quality else ()
        over_training = (density, layers, layers_over_training, kinds, starving)
        for draw in (*of_losses, costs, parts, latency, became, *over_training):
            picture = draw(results)
            if picture is not None:
                yield picture
                plt.close(picture.figure)


def _loss_over_x(results: StudyResults) -> Picture | None:
    study = results.study
    if not has_axis(results):
        return _loss_by_arm(results)
    figure, axes = panels()
    axis, rows, colors, places = axes[0, 0], [], colors_of(results), []
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
        logarithmic(axis, places)
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
    arms, rows, colors = results.arms(), [], colors_of(results)
    figure, axes = panels(height=1.1 + 0.42 * len(arms))
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
    study, colors = results.study, colors_of(results)
    with_shapes = [one for one in study.published if min(map(len, one.values.values())) > 1]  # a place is no shape
    if not with_shapes or not has_axis(results):
        return None
    figure, axes = panels(columns=1 + len(with_shapes), height=3.8)
    ours = {
        arm: {numpy.mean([one.x for one in group]): numpy.mean([one.values["val_loss"] for one in group])
              for group in results.by_point(arm).values()}
        for arm in results.arms()
    }  # fmt: skip
    curves = [("dsmoe, here", "held-out loss", ours)]
    curves += [(one.source.partition(",")[0], one.quantity, one.values) for one in with_shapes]
    rows = []
    for axis, (source, quantity, values) in zip(axes[0], curves, strict=True):
        places = sorted({float(x) for curve in values.values() for x in curve})
        for arm, curve in values.items():
            xs = sorted(curve)
            axis.plot(xs, [curve[x] - curve[xs[0]] for x in xs], "o-", color=colors[arm], label=arm)
            rows += [[source, arm, x, curve[x], curve[x] - curve[xs[0]]] for x in xs]
        logarithmic(axis, places)
        axis.set(title=source, xlabel=x_title(study), ylabel=f"{quantity}, change from x = {places[0]:g}")
    axes[0, 0].legend()
    caption = "Only the shapes can be compared: models, data and lengths of training differ by orders of magnitude."
    headings = ["source", "arm", "x", "loss", "change"]
    return Picture("published", "Beside the paper", caption, headings, rows, figure)


def _over_training(results: StudyResults, name: str, title: str, caption: str, label: str, value, logarithmic: bool):
    """Smoothed training loss of each arm's first seed against a running cost, a panel for the ends of the x axis."""
    colors, rows = colors_of(results), []
    seed = min(one.cell.seed for one in results.found)
    ones = [one for one in results.found if one.cell.seed == seed]
    places = sorted({one.x for one in ones if one.x is not None}) if has_axis(results) else []
    several = len(places) > 2 and results.study.x != MEASURED
    shown = [places[0], places[len(places) // 2], places[-1]] if several else [None]
    figure, axes = panels(columns=len(shown), height=3.8, sharey=True)
    for axis, place in zip(axes[0], shown, strict=True):
        for one in ones:
            if place is not None and one.x != place:
                continue
            cost, loss = value(one), smoothed(numpy.array([line["loss"] for line in one.lines]))
            kept = thinned(len(loss))
            axis.plot(numpy.asarray(cost)[kept], loss[kept], color=colors[one.cell.arm], linewidth=1.3)
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
