"""The tables of a study's report."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import numpy

from dsmoe.lab.study.drawing import x_title
from dsmoe.lab.study.law import Interval, fit_joint, fit_law
from dsmoe.lab.study.measures import MEASURES, Measured, StudyResults, at, centre_and_band
from dsmoe.lab.study.results import NEAR_TARGET, target_density
from dsmoe.lab.study.speedup import BEYOND, Worth, compute_ratios, dense_arm, worth

MARK = "†"


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (f"\n{self.note}\n" if self.note else "")


def counts(results: StudyResults) -> str:
    return f"{len(results.measured)} of {len(results.measured) + len(results.missing)} runs finished"


def tables_of(results: StudyResults) -> list[Table]:
    """Those that have rows."""
    tables = (
        _ranking(results),
        _by_loss(results),
        _summary(results, f"All cells, {_over_seeds(results)}", inside=False),
        _against_baseline(results),
        _summary(results, f"What the experts became, {_over_seeds(results)}", inside=True),
        _laws(results),
        _joint_laws(results),
        *_beside(results),
        _densities(results),
        _missing(results),
    )
    return [table for table in tables if table.rows]


def _ranking(results: StudyResults) -> Table:
    """Cells by their speedup at the compute that they realised, longest runs first."""
    every = [run for run in worth(results) if run.over_dense is not None or run.over_baseline is not None]
    if not results.study.quality or not every:
        return Table("", [], [])
    dense, reference = dense_arm(results), results.study.reference

    def order(run: Worth) -> tuple:
        return -run.run.cell.length, -(run.over_dense or run.over_baseline or 0.0)

    def row(run: Worth) -> list[str]:
        values, cell = run.run.values, run.run.cell
        compute = "" if run.compute_ratio is None else f"{run.compute_ratio:.2f}"
        return [
            cell.arm, at(cell.point), str(cell.seed), f"{values.get('tokens', 0) / 1e6:.2f} M",
            f"{values['val_loss']:.4f}", compute + (f" {MARK}" if run.beyond_equal_compute else ""),
            _number(run.over_baseline), _number(run.over_dense) + (" *" if run.extrapolated and run.over_dense else ""),
            _number(run.over_dense_in_time),
        ]  # fmt: skip

    headings = ["arm", "at", "seed", "tokens", "held-out loss", f"compute over {reference}'s",
                f"effective speedup over {reference}", f"over {dense or 'dense'}", "in wall time"]  # fmt: skip
    note = f"Ranked at the compute that each run realised. {MARK}: more than {BEYOND:.0%} above {reference}'s compute."
    if any(run.extrapolated for run in every):
        note += " *: the dense law is extrapolated beyond the lengths that were trained."
    if not any(run.over_dense_in_time for run in every):
        note += " No wall time: these cells were not timed on a quiet machine."
    return Table("Effective speedup", headings, [row(run) for run in sorted(every, key=order)], note)


def _by_loss(results: StudyResults) -> Table:
    """Cells by their loss, at each place and length: ranked are those that used no more compute than the baseline."""
    study, reference, rows, above = results.study, results.study.reference, [], False
    values = [run for run in results.measured if {"val_loss", "training_flops"} <= run.values.keys()]
    if not study.quality:
        values = []
    places: dict[tuple, dict[tuple, list[Measured]]] = {}  # length and place -> arm and point -> its seeds
    for run in sorted(values, key=lambda run: (-run.cell.length, run.x or 0.0)):
        here = places.setdefault((run.cell.length, study.place_of(run.cell)), {})
        here.setdefault((run.cell.arm, run.cell.point), []).append(run)
    for (length, place), groups in places.items():
        means = {key: mean(run.values["val_loss"] for run in runs) for key, runs in groups.items()}
        spent = {key: mean(run.values["training_flops"] for run in runs) for key, runs in groups.items()}
        baseline = spent.get((reference, place))
        ratios = {} if baseline is None else {key: flops / baseline for key, flops in spent.items()}
        beyond = {key for key, ratio in ratios.items() if ratio > 1 + BEYOND}
        above = above or bool(beyond)
        rank = 0
        for key in sorted(means, key=lambda key: (key in beyond, means[key])):
            rank += key not in beyond
            runs, (arm, point) = groups[key], key
            where = at(point) + ("" if length == 1 else f", length {length:g}")
            compute = f"{ratios[key]:.2f}" if key in ratios else ""
            rows.append([MARK if key in beyond else str(rank), arm, where, str(len(runs)),
                         spread([run.values["val_loss"] for run in runs], "val_loss"), compute])  # fmt: skip
    headings = ["rank", "arm", "at", "seeds", "held-out loss", f"compute over {reference}'s"]
    note = f"Ranked by held-out loss, {_over_seeds(results)}, at the training compute that was realised."
    if above:
        note += f" {MARK}: more than {BEYOND:.0%} above {reference}'s compute, so not ranked."
    return Table("Held-out loss at equal compute", headings, rows, note)


def _over_seeds(results: StudyResults) -> str:
    return "one seed" if len({run.cell.seed for run in results.measured}) == 1 else "means over seeds"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _summary(results: StudyResults, title: str, inside: bool) -> Table:
    """A row for each arm, point and length: means over seeds, the loss with its interval. Quantities of the run, or of
    its experts."""
    names = [
        name
        for name, measure in MEASURES.items()
        if measure.inside == inside and any(name in run.values for run in results.measured)
    ]
    rows = []
    if not names:
        return Table(title, [], [])
    lengths = sorted({run.cell.length for run in results.measured}, reverse=True)
    for arm in results.arms():
        for length in lengths:
            for point, group in results.by_point(arm, length).items():
                means = (spread([run.values[name] for run in group if name in run.values], name) for name in names)
                where = at(point) + ("" if length == 1 else f", length {length:g}")
                rows.append([arm, where, str(len(group)), *means])
    headings = ["arm", "at", "seeds", *(MEASURES[name].heading for name in names)]
    return Table(title, headings, rows)


def spread(values: list[float], name: str) -> str:
    """A mean, for the loss with half of its 95 % interval."""
    if not values:
        return ""
    form, (middle, band) = MEASURES[name].form, centre_and_band(values)
    return f"{middle:{form}}" + (f" ± {band:{form}}" if name == "val_loss" and band is not None else "")


def _against_baseline(results: StudyResults) -> Table:
    """The difference to the baseline's run of the same place, length and seed: same data in the same order, so it is
    sharper than a difference of means."""
    reference = results.study.reference
    title, rows = f"Held-out loss against {reference}, by seed", []
    losses = {run.cell: run.values["val_loss"] for run in results.measured if "val_loss" in run.values}
    spent = compute_ratios(results)
    base = {(cell.point, cell.length, cell.seed): loss for cell, loss in losses.items() if cell.arm == reference}
    lengths = sorted({cell.length for cell in losses}, reverse=True)
    for arm in results.arms():
        for length in lengths if arm != reference else []:
            for point, group in results.by_point(arm, length).items():
                place = results.study.place_of(group[0].cell)
                gaps = [losses[run.cell] - base[key] for run in group
                        if run.cell in losses and (key := (place, length, run.cell.seed)) in base]  # fmt: skip
                if gaps:
                    middle, band = centre_and_band(gaps)
                    where = at(point) + ("" if length == 1 else f", length {length:g}")
                    rows.append([arm, where, str(len(gaps)),
                                 f"{middle:+.4f}" + (f" ± {band:.4f}" if band is not None else ""),
                                 spent.get((arm, point, length), "").strip(" ×")])  # fmt: skip
    return Table(title, ["arm", "at", "seeds", "difference (nats/token)", f"compute over {reference}'s"], rows)


def _laws(results: StudyResults) -> Table:
    rows = []
    for arm in results.arms() if results.study.law and results.study.x else []:
        runs = [run for run in results.full if run.cell.arm == arm and "val_loss" in run.values]
        x, loss = (numpy.array(v, float) for v in ([o.x for o in runs], [o.values["val_loss"] for o in runs]))
        law = fit_law(x, loss)
        if law is not None:
            settled = "yes" if law.settled else "no: its interval reaches the end of what was searched"
            rows.append([arm, str(len(runs)), *(_interval(value) for value in (law.a, law.b, law.c)), settled])
    headings = ["arm", "runs", "a", "b", "c", "do the runs settle c?"]
    return Table("Law: loss = a + b x^-c, with 95 % intervals", headings, rows)


def _joint_laws(results: StudyResults) -> Table:
    rows = []
    for arm in results.arms() if results.study.law else []:
        runs = [run for run in results.measured if run.cell.arm == arm and run.shape.get("num_experts")
                and {"val_loss", "training_flops"} <= run.values.keys()]  # fmt: skip
        if len({run.cell.length for run in runs}) < 2 and results.study.preset is None:
            continue  # compute that differs by the routers' own cost alone is no length of training
        columns = ([run.values["training_flops"] for run in runs], [run.shape["num_experts"] for run in runs],
                   [run.values["val_loss"] for run in runs])  # fmt: skip
        law = fit_joint(*(numpy.array(column, float) for column in columns))
        if law is not None:
            pays = "" if law.pays_from is None else "{:.2g} ({:.2g} to {:.2g})".format(*law.pays_from)
            largest = max(numpy.abs(law.residuals))
            intervals = (_interval(value) for value in (law.b, law.c, law.d))
            residuals = f"{law.residual:.2%} (largest {largest:.2%})"
            rows.append([arm, str(len(runs)), *intervals, residuals, "yes" if law.settled else "no", pays])
    headings = [
        "arm",
        "runs",
        "b",
        "c",
        "d",
        "residuals, root mean square",
        "is d's sign settled?",
        "experts pay from (FLOP)",
    ]
    note = (
        "Clark et al., arXiv 2202.01169, with realised training compute C in the place of parameters. Intervals: "
        "bootstrap of residuals; with one seed they do not hold what another seed would change."
    )
    return Table("Joint law: ln loss = p + b ln C + c ln E + d ln C ln E, with 95 % intervals", headings, rows, note)


def _interval(value: Interval) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*value)


def _beside(results: StudyResults) -> list[Table]:
    """Published values, with ours next to them."""
    tables = []
    for published in results.study.published if results.study.quality else ():
        arms = list(published.values)
        ours = {
            arm: {mean(o.x for o in group): mean(o.values["val_loss"] for o in group) for group in groups.values()}
            for arm in arms
            for groups in [results.by_point(arm)]
        }
        places = sorted({float(x) for curve in published.values.values() for x in curve})
        rows = []
        for x in places:
            theirs = [published.values[arm].get(x) for arm in arms]
            here = [ours[arm].get(x) for arm in arms]
            rows.append([f"{x:g}", *("" if value is None else f"{value:g}" for value in theirs),
                         *("" if value is None else f"{value:.4f}" for value in here)])  # fmt: skip
        headings = [x_title(results.study), *(f"{arm}: paper" for arm in arms), *(f"{arm}: here" for arm in arms)]
        if not any(value for row in rows for value in row[1 + len(arms) :]):  # our x is measured, and never theirs
            headings, rows = headings[: 1 + len(arms)], [row[: 1 + len(arms)] for row in rows]
        title = f"{published.quantity[0].upper()}{published.quantity[1:]} in {published.source}"
        tables.append(Table(title, headings, rows))
    return tables


def _densities(results: StudyResults) -> Table:
    """How near a steered density came to its target."""
    rows = []
    for run in results.with_runs:
        target = target_density(run.config)
        if target is not None:
            third = [line["density"] for line in run.lines[-max(1, len(run.lines) // 3) :]]
            near = mean(abs(density - target) <= NEAR_TARGET for density in third)
            rows.append([run.cell.arm, at(run.cell.point), str(run.cell.seed), f"{target:g}", f"{mean(third):.4f}",
                         f"{near:.0%}"])  # fmt: skip
    headings = ["arm", "at", "seed", "target density", "last third of training", f"of its steps within {NEAR_TARGET}"]
    return Table("Steered densities", headings, rows)


def _missing(results: StudyResults) -> Table:
    """Cells of an arm and seed that lack for the same reason are one row."""
    alike: dict[tuple[str, int, str], list] = {}
    for cell, why in results.missing:
        alike.setdefault((cell.arm, cell.seed, why), []).append(cell)
    rows = [
        [str(cells[0]) if len(cells) == 1 else f"{arm}, seed {seed}: {len(cells)} cells", why]
        for (arm, seed, why), cells in alike.items()
    ]
    return Table("Not in the tables", ["cell", "why"], rows)
