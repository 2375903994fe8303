"""A report as one HTML page that needs no network."""

from __future__ import annotations

import html

from dsmoe.lab.study.drawing import Picture
from dsmoe.lab.study.measures import StudyResults
from dsmoe.lab.study.tables import Table, counts


def section(name: str, results: StudyResults, tables: list[Table], figures: list[tuple[Picture, str]]) -> str:
    study = results.study
    facts = [counts(results), results.machine, f"commits {', '.join(results.commits)}",
             f"{study.ranks} process{'es' if study.ranks > 1 else ''} a run"]  # fmt: skip
    chips = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts if fact)
    body = "".join(
        f'<figure id="{name}-{picture.name}-card"><h3>{html.escape(picture.title)}</h3>{svg}'
        f'<figcaption>{html.escape(picture.caption)} <a href="{name}/{picture.name}.csv">CSV</a></figcaption></figure>'
        for picture, svg in figures
    )
    body += "".join(f'<div class="card"><h3>{html.escape(table.title)}</h3>{_table(table)}</div>' for table in tables)
    return (
        f'<section id="{name}"><h2>{html.escape(study.title)}</h2><p class="question">{html.escape(study.question)}</p>'
        f'<ul class="facts">{chips}</ul>{body}</section>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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


def page(names: list[str], every: list[StudyResults], sections: list[str]) -> str:
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
