"""What a comparison shows: a table for each corpus as Markdown, every run as CSV, and plots.

A row is a variant, best held-out loss first. Numbers are means over its seeds, with the standard deviation (of a
sample) where there are several. MoE compute is over the baseline's, and counts the experts that every step really had.
`against BASELINE` is the mean over seeds of the difference to the baseline's run of the same seed: same data in the
same order, so it is sharper than the difference of the means.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from dsmoe.checkpoint.files import write_atomically
from dsmoe.errors import ConfigError
from dsmoe.lab.study.plan import Cell, Plan
from dsmoe.lab.study.results import NEAR_TARGET, RunResult, read_result
from dsmoe.lab.study.runner import read_record, shown

HEADINGS = (
    "router", "learning rate", "seeds", "steps", "held-out loss", "bits per byte", "loss against {baseline}",
    "experts/token: held-out", "whole training", "MoE compute",
)  # fmt: skip
DENSITY_HEADINGS = ("router", "seed", "target density", "last third of training", "of its steps within {near}")
TABLE_BEGIN, TABLE_END = "<!-- {name} -->\n", "<!-- end of table -->"  # in a page that shows the tables


@dataclass(frozen=True)
class Outcome:
    """A cell and how it ended."""

    cell: Cell
    record: dict | None
    result: RunResult | None  # of a run that was finished


def read_outcomes(plan: Plan, out: Path) -> list[Outcome]:
    """All cells of a plan, in its order."""
    outcomes = []
    for cell in plan.cells():
        record = read_record(cell, out)
        done = record is not None and record["status"] == "done"
        outcomes.append(Outcome(cell, record, read_result(cell.folder(out)) if done else None))
    return outcomes


def write_report(plan: Plan, out: Path, target: Path, page: Path | None = None) -> list[Path]:
    """Write `comparison.md`, `comparison.csv` and the plots into `target`; return what was written.

    Args:
        page: shows tables too, each between `<!-- NAME -->` and `<!-- end of table -->`. Names are `CORPUS`, for the
            comparison, and `density on CORPUS`.

    Raises:
        ConfigError: `page` has a place for none of the tables.
    """
    from dsmoe.lab.study.plots import write_plots  # matplotlib takes a second to import

    outcomes = read_outcomes(plan, out)
    tables = {corpus: to_table(plan, outcomes, corpus) for corpus in plan.corpora}
    densities = {f"density on {corpus}": to_density_table(outcomes, corpus) for corpus in plan.corpora}
    tables |= {name: table for name, table in densities.items() if table}
    written = [] if page is None else [insert_tables(page, tables)]
    target.mkdir(parents=True, exist_ok=True)
    markdown = target / "comparison.md"
    sections = [f"### {name[0].upper()}{name[1:]}\n\n{table}\n" for name, table in tables.items()]
    markdown.write_text("".join(sections) + to_missing(outcomes), encoding="utf-8")
    csv_file = target / "comparison.csv"
    write_csv(outcomes, csv_file)
    return [*written, markdown, csv_file, *write_plots(plan, outcomes, out, target)]


def insert_tables(page: Path, tables: dict[str, str]) -> Path:
    """Replace what `page` shows between the marks of each table that it has a place for; return `page`."""
    text, found = page.read_text(encoding="utf-8"), False
    for name, table in tables.items():
        before, begin, rest = text.partition(TABLE_BEGIN.format(name=name))
        _, end, after = rest.partition(TABLE_END)
        if begin and end:
            text, found = before + begin + table + end + after, True
    if not found:
        lines = " or ".join(repr(TABLE_BEGIN.format(name=name).strip()) for name in tables)
        problem = f"found no place for a table, expected a line {lines} and below it {TABLE_END!r}"
        raise ConfigError([problem], str(page))
    write_atomically(page, text.encode())
    return page


def to_table(plan: Plan, outcomes: list[Outcome], corpus: str) -> str:
    """The Markdown table of one corpus, without the variants of which no run has finished."""
    here = [outcome for outcome in outcomes if outcome.cell.corpus == corpus]
    losses = {
        variant.name: [o.result.val_loss for o in here if o.cell.variant == variant.name and o.result is not None]
        for variant in plan.variants
    }
    headings = [heading.format(baseline=plan.baseline) for heading in HEADINGS]
    text = f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    for name in sorted(filter(losses.get, losses), key=lambda name: mean(losses[name])):
        text += f"| {' | '.join(_row(plan, here, name))} |\n"
    return text


def to_density_table(outcomes: list[Outcome], corpus: str) -> str:
    """The Markdown table of all runs of one corpus that aim at a density; empty where none does."""
    rows, places = "", {name: place for place, name in enumerate(dict.fromkeys(o.cell.variant for o in outcomes))}
    for outcome in sorted(outcomes, key=lambda outcome: places[outcome.cell.variant]):  # a variant's seeds together
        result = outcome.result
        if outcome.cell.corpus == corpus and result is not None and result.target_density is not None:
            rows += f"| {outcome.cell.variant} | {outcome.cell.seed} | {result.target_density:g} | "
            rows += f"{result.last_third_density:.4f} | {result.last_third_near_target:.0%} |\n"
    headings = " | ".join(DENSITY_HEADINGS).format(near=NEAR_TARGET)
    return f"| {headings} |\n|{'---|' * len(DENSITY_HEADINGS)}\n{rows}" if rows else ""


def to_missing(outcomes: list[Outcome]) -> str:
    """What the tables lack, and why."""
    missing = [outcome for outcome in outcomes if outcome.result is None]
    if not missing:
        return ""
    text = "### Not in the tables\n\n"
    for outcome in missing:
        status = "not run" if outcome.record is None else outcome.record["status"]
        error = (outcome.record or {}).get("error", "")
        text += f"- {outcome.cell}: {status}{': ' + error.splitlines()[-1] if error else ''}\n"
    return text


def _row(plan: Plan, outcomes: list[Outcome], variant: str) -> list[str]:
    found = {outcome.cell.seed: outcome.result for outcome in outcomes if outcome.cell.variant == variant}
    results = {seed: result for seed, result in found.items() if result is not None}
    base = {
        outcome.cell.seed: outcome.result
        for outcome in outcomes
        if outcome.cell.variant == plan.baseline and outcome.result is not None
    }
    shared = [seed for seed in results if seed in base]
    gaps = [results[seed].val_loss - base[seed].val_loss for seed in shared]
    compute = [results[seed].moe_compute / base[seed].moe_compute for seed in shared]

    def column(name: str, form: str, spread: bool = True) -> str:
        values = [getattr(result, name) for result in results.values()]
        return "" if None in values else _spread(values, form) if spread else format(mean(values), form)

    return [
        variant,
        column("learning_rate", "g", spread=False),
        str(len(results)) if len(results) == len(found) else f"{len(results)} of {len(found)}",
        column("steps", ".0f", spread=False),
        column("val_loss", ".4f"),
        column("val_bpb", ".4f"),
        "" if variant == plan.baseline or not gaps else _spread(gaps, "+.4f"),
        column("val_experts", ".2f", spread=False),
        column("mean_experts", ".2f", spread=False),
        f"{mean(compute):.3f}" if compute else "",
    ]


def _spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    middle = format(mean(values), form)
    return middle if len(values) == 1 else f"{middle} ± {format(stdev(values), form.replace('+', ''))}"


def write_csv(outcomes: list[Outcome], path: Path) -> None:
    """One line a run, failed ones included."""
    names = [name for name in RunResult.__dataclass_fields__ if name != "val_experts_by_layer"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "corpus", "seed", "status", *names, "experts_by_layer", "seconds", "command"])
        for outcome in outcomes:
            cell, record = outcome.cell, outcome.record or {}
            values = asdict(outcome.result) if outcome.result else {}
            layers = " ".join(f"{experts:.3f}" for experts in values.get("val_experts_by_layer") or [])
            command = shown(record["command"]) if "command" in record else ""
            writer.writerow(
                [cell.variant, cell.corpus, cell.seed, record.get("status", "not run"),
                 *(_short(values.get(name)) for name in names), layers, record.get("seconds", ""), command]
            )  # fmt: skip


def _short(value) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
