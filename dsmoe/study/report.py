"""What a comparison shows: a table for each corpus as Markdown, every run as CSV, and plots.

A row is a variant. Numbers are means over its seeds, with the standard deviation (of a sample) where there are several.
`against BASELINE` is the mean over seeds of the difference to the baseline's run of the same seed: same data in the
same order, so it is sharper than the difference of the means.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from dsmoe.study.compare import read_record, shown
from dsmoe.study.plan import Cell, Plan
from dsmoe.study.results import RunResult, read_result

HEADINGS = (
    "router", "seeds", "held-out loss", "bits per byte", "loss against {baseline}", "experts/token: held-out",
    "end of training", "whole training", "MoE compute", "model compute", "tokens/s",
)  # fmt: skip


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


def write_report(plan: Plan, out: Path, target: Path) -> list[Path]:
    """Write `comparison.md`, `comparison.csv` and the plots into `target`; return what was written."""
    from dsmoe.study.plots import write_plots  # matplotlib takes a second to import

    target.mkdir(parents=True, exist_ok=True)
    outcomes = read_outcomes(plan, out)
    markdown = target / "comparison.md"
    markdown.write_text(to_markdown(plan, outcomes), encoding="utf-8")
    table = target / "comparison.csv"
    write_csv(outcomes, table)
    return [markdown, table, *write_plots(plan, outcomes, out, target)]


def to_markdown(plan: Plan, outcomes: list[Outcome]) -> str:
    """The tables, then what is missing or failed."""
    text = ""
    for corpus in plan.corpora:
        headings = [heading.format(baseline=plan.baseline) for heading in HEADINGS]
        text += f"### {corpus}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
        for variant in plan.variants:
            row = _row(plan, [outcome for outcome in outcomes if outcome.cell.corpus == corpus], variant.name)
            text += f"| {' | '.join(row)} |\n"
        text += "\n"
    missing = [outcome for outcome in outcomes if outcome.result is None]
    if missing:
        text += "### Not in the tables\n\n"
        for outcome in missing:
            status = "not run" if outcome.record is None else outcome.record["status"]
            error = (outcome.record or {}).get("error", "")
            text += f"- {outcome.cell}: {status}{': ' + error.splitlines()[-1] if error else ''}\n"
        text += "\n"
    return text


def _row(plan: Plan, outcomes: list[Outcome], variant: str) -> list[str]:
    found = {outcome.cell.seed: outcome.result for outcome in outcomes if outcome.cell.variant == variant}
    results = {seed: result for seed, result in found.items() if result is not None}
    if not results:
        return [variant, f"0 of {len(found)}", *["" for _ in HEADINGS[2:]]]
    base = {
        outcome.cell.seed: outcome.result
        for outcome in outcomes
        if outcome.cell.variant == plan.baseline and outcome.result is not None
    }
    shared = [seed for seed in results if seed in base]
    gaps = [results[seed].val_loss - base[seed].val_loss for seed in shared]
    relative = {
        name: [getattr(results[seed], name) / getattr(base[seed], name) for seed in shared]
        for name in ("moe_compute", "model_compute")
    }

    def column(name: str, form: str) -> str:
        values = [getattr(result, name) for result in results.values()]
        return "" if None in values else _spread(values, form)

    is_baseline = variant == plan.baseline
    experts = ("val_experts", "end_experts", "mean_experts")
    return [
        variant,
        str(len(results)) if len(results) == len(found) else f"{len(results)} of {len(found)}",
        column("val_loss", ".4f"),
        column("val_bpb", ".4f"),
        "" if is_baseline or not gaps else _spread(gaps, "+.4f"),
        *(f"{mean(getattr(result, name) for result in results.values()):.2f}" for name in experts),
        *(f"{mean(values):.3f}" if values else "" for values in relative.values()),
        f"{mean(result.tokens_per_second for result in results.values()):,.0f}",
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
