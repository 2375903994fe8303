"""The report of scaling studies: one HTML page that needs no network, one Markdown file, and a CSV for each picture."""

from __future__ import annotations

import csv
import html
import io
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy

from dsmoe.checkpoint.files import write_atomically
from dsmoe.errors import ConfigError
from dsmoe.lab.study.drawing import Picture, x_title
from dsmoe.lab.study.law import fit_law
from dsmoe.lab.study.limits import at, limit_tables
from dsmoe.lab.study.measures import MEASURES, Measured, StudyResults, centre_and_band, read_results
from dsmoe.lab.study.pictures import draw_pictures
from dsmoe.lab.study.plan import slug
from dsmoe.lab.study.report import insert_tables
from dsmoe.lab.study.scaling import read_study
from dsmoe.lab.study.svg import svg_of

PAGE, MARKDOWN = "index.html", "report.md"


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.headings)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_report(folders: list[Path], target: Path, limits: Path | None = None) -> list[Path]:
    """Write the report of studies that were run in `folders` into `target`; return what was written.

    Args:
        limits: a page that shows a table for each limit, between `<!-- NAME -->` and `<!-- end of table -->`.

    Raises:
        ConfigError: a folder holds no study, or `limits` has a place for none of the tables.
    """
    every = [read_results(_study(folder), folder) for folder in folders]
    names = [slug(folder.resolve().name) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError([f"found folders with the names {names}, expected each to be different"], "report")
    written = []
    if limits is not None:
        written.append(
            insert_tables(limits, {name: Table("", *t).markdown() for name, t in limit_tables(every).items()})
        )
    sections, markdown = [], ["# Scaling studies\n"]
    for name, results in zip(names, every, strict=True):
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        tables, figures = _tables(results), []
        for picture in draw_pictures(results):
            svg, svg_file = svg_of(picture.figure, f"{name}-{picture.name}"), folder / f"{picture.name}.svg"
            svg_file.write_text(svg, encoding="utf-8")
            csv_file = folder / f"{picture.name}.csv"
            _write_csv(csv_file, picture.headings, picture.rows)
            figures.append((picture, svg))
            written += [svg_file, csv_file]
        cells = folder / "cells.csv"
        _write_csv(cells, *_cells(results))
        written.append(cells)
        markdown.append(_markdown(name, results, tables, [picture for picture, _ in figures]))
        sections.append(_section(name, results, tables, figures))
    for path, text in ((target / MARKDOWN, "\n".join(markdown)), (target / PAGE, _page(names, every, sections))):
        write_atomically(path, text.encode())
        written.append(path)
    return written


def _study(folder: Path):
    if not (folder / "study.yaml").exists():
        raise ConfigError([f"{folder}: found no study.yaml, expected a folder that `run --out` made"], "report")
    return read_study(folder)


def _tables(results: StudyResults) -> list[Table]:
    tables = (
        _summary(results, "All cells, means over seeds", inside=False),
        _summary(results, "What the experts became, means over seeds", inside=True),
        _laws(results),
        *_beside(results),
        _missing(results),
    )
    return [table for table in tables if table.rows]


def _summary(results: StudyResults, title: str, inside: bool) -> Table:
    """A row for each arm and point: means over seeds, the loss with its interval. Quantities of the run, or of its
    experts."""
    names = [
        name
        for name, measure in MEASURES.items()
        if measure.inside == inside and any(name in one.values for one in results.found)
    ]
    rows = []
    if not names:
        return Table(title, [], [])
    for arm in results.arms():
        for point, group in results.by_point(arm).items():
            means = (spread([one.values[name] for one in group if name in one.values], name) for name in names)
            rows.append([arm, at(point), str(len(group)), *means])
    headings = ["arm", "at", "seeds", *(MEASURES[name].heading for name in names)]
    return Table(title, headings, rows)


def spread(values: list[float], name: str) -> str:
    """A mean, for the loss with half of its 95 % interval."""
    if not values:
        return ""
    form, (middle, band) = MEASURES[name].form, centre_and_band(values)
    return f"{middle:{form}}" + (f" ± {band:{form}}" if name == "val_loss" and band is not None else "")


def _laws(results: StudyResults) -> Table:
    rows = []
    for arm in results.arms() if results.study.law and results.study.x else []:
        ones = [one for one in results.found if one.cell.arm == arm]
        x, loss = (numpy.array(v, float) for v in ([o.x for o in ones], [o.values["val_loss"] for o in ones]))
        law = fit_law(x, loss)
        if law is not None:
            said = "yes" if law.settled else "no: its interval reaches the end of what was searched"
            rows.append(
                [arm, str(len(ones)), *(f"{m:.3f} ({a:.3f} to {b:.3f})" for m, a, b in (law.a, law.b, law.c)), said]
            )
    headings = ["arm", "runs", "a", "b", "c", "do the runs settle c?"]
    return Table("Law: loss = a + b x^-c, with 95 % intervals", headings, rows)


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
        tables.append(
            Table(f"{published.quantity[0].upper()}{published.quantity[1:]} in {published.source}", headings, rows)
        )
    return tables


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


def _cells(results: StudyResults) -> tuple[list[str], list[list]]:
    """Every cell with all it measured."""
    axes = list(dict.fromkeys(axis for one in results.found for axis, _ in one.cell.point))

    def row(one: Measured) -> list:
        point = dict(one.cell.point)
        model = one.config.model
        return [one.cell.arm, one.cell.seed, *(point.get(axis, "") for axis in axes), model.num_experts,
                model.moe_ffn_hidden_size, *(one.values.get(name, "") for name in MEASURES)]  # fmt: skip

    headings = ["arm", "seed", *axes, "experts", "expert width", *MEASURES]
    return headings, [row(one) for one in results.found]


def _write_csv(path: Path, headings: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)
    write_atomically(path, text.getvalue().encode())


def _counts(results: StudyResults) -> str:
    cells = len(results.found) + len(results.missing)
    return f"{len(results.found)} of {cells} runs finished"


def _markdown(name: str, results: StudyResults, tables: list[Table], pictures: list[Picture]) -> str:
    study = results.study
    facts = f"{_counts(results)}; {results.machine}; commits {', '.join(results.commits)}."
    text = f"## {study.title}\n\n{study.question}\n\n{facts}\n"
    for table in tables:
        text += f"\n### {table.title}\n\n{table.markdown()}"
    for picture in pictures:
        text += f"\n### {picture.title}\n\n![{picture.title}]({name}/{picture.name}.svg)\n\n{picture.caption} "
        text += f"Numbers: [{picture.name}.csv]({name}/{picture.name}.csv).\n"
    return text


def _section(name: str, results: StudyResults, tables: list[Table], figures: list[tuple[Picture, str]]) -> str:
    study = results.study
    facts = [_counts(results), results.machine, f"commits {', '.join(results.commits)}",
             f"{study.ranks} process{'es' if study.ranks > 1 else ''} a run"]  # fmt: skip
    chips = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts if fact)
    body = "".join(
        f'<figure id="{name}-{picture.name}-card"><h3>{html.escape(picture.title)}</h3>{svg}'
        f'<figcaption>{html.escape(picture.caption)} <a href="{name}/{picture.name}.csv">CSV</a></figcaption></figure>'
        for picture, svg in figures
    )
    body += "".join(f'<div class="card"><h3>{html.escape(table.title)}</h3>{table.html()}</div>' for table in tables)
    return (
        f'<section id="{name}"><h2>{html.escape(study.title)}</h2><p class="question">{html.escape(study.question)}</p>'
        f'<ul class="facts">{chips}</ul>{body}</section>'
    )


STYLE = """
:root { --ink: #1d2733; --soft: #5b6675; --line: #e3e8ee; --paper: #ffffff; --ground: #f5f7fa; --accent: #2f6fde; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 4rem; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
header { padding: 3.2rem 1.5rem 2.2rem; color: #fff;
  background: linear-gradient(120deg, #14213d, #24457f 70%, #2f6fde); }
header > div, main, nav > div { max-width: 1060px; margin: 0 auto; }
header h1 { margin: 0 0 .4rem; font-size: 2.1rem; letter-spacing: -.02em; }
header p { margin: 0; max-width: 46rem; color: #d5e1f7; }
nav { position: sticky; top: 0; z-index: 1; padding: .65rem 1.5rem; background: #ffffffee;
  border-bottom: 1px solid var(--line); }
nav a { margin-right: 1.4rem; color: var(--soft); text-decoration: none; font-size: .92rem; }
nav a:hover, figcaption a { color: var(--accent); }
main { padding: 1rem 1.5rem 4rem; }
h2 { margin: 2.6rem 0 .3rem; font-size: 1.5rem; letter-spacing: -.01em; }
h3 { margin: 0 0 .7rem; font-size: 1.02rem; }
.question { margin: 0 0 .8rem; max-width: 50rem; color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: 0 0 1.2rem; list-style: none; }
.facts li { padding: .15rem .7rem; border: 1px solid var(--line); border-radius: 99px; background: var(--paper);
  color: var(--soft); font-size: .82rem; }
figure, .card { margin: 0 0 1.3rem; padding: 1.3rem 1.4rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: 14px; box-shadow: 0 1px 2px #14213d0d, 0 8px 24px #14213d0a; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .7rem; color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f5f8ff; }
@media print { nav { display: none; } figure, .card { break-inside: avoid; box-shadow: none; } }
"""


def _page(names: list[str], every: list[StudyResults], sections: list[str]) -> str:
    links = "".join(
        f'<a href="#{name}">{html.escape(results.study.title)}</a>' for name, results in zip(names, every, strict=True)
    )
    runs = sum(len(results.found) for results in every)
    many = "study" if len(every) == 1 else "studies"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling studies</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><div><h1>Scaling studies</h1><p>{len(every)} {many}, {runs} training runs. Small models on few cores "
        "show shapes and costs; they cannot show what a large one would reach.</p></div></header>"
        f"<nav><div>{links}</div></nav><main>{''.join(sections)}</main></body></html>\n"
    )
