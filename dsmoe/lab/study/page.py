"""A report as one HTML page that needs no network."""

from __future__ import annotations

import html

from dsmoe.lab.look import style
from dsmoe.lab.study.drawing import Picture
from dsmoe.lab.study.measures import StudyResults
from dsmoe.lab.study.tables import Table, counts


def section(
    name: str, results: StudyResults, tables: list[Table], figures: list[tuple[Picture, str, str]], with_csv: bool
) -> str:
    """`figures`: each as SVG for a page, and for a phone. `with_csv`: the numbers of each are beside the page."""
    study = results.study

    def csv_of(picture: Picture) -> str:
        return f' <a href="{name}/{picture.name}.csv">CSV</a>' if with_csv else ""

    facts = [counts(results), results.machine, f"commits {', '.join(results.commits)}",
             f"{study.ranks} process{'es' if study.ranks > 1 else ''} a run"]  # fmt: skip
    chips = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts if fact)
    body = "".join(
        f'<figure class="card" id="{name}-{picture.name}-card"><h3>{html.escape(picture.title)}</h3>'
        f'<div class="wide">{svg}</div><div class="narrow">{narrow}</div>'
        f"<figcaption>{html.escape(picture.caption)}{csv_of(picture)}</figcaption></figure>"
        for picture, svg, narrow in figures
    )
    body += "".join(f'<div class="card"><h3>{html.escape(table.title)}</h3>{_table(table)}</div>' for table in tables)
    return (
        f'<section id="{name}"><h2>{html.escape(study.title)}</h2><p class="note">{html.escape(study.question)}</p>'
        f'<ul class="facts">{chips}</ul>{body}</section>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.headings)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _cell(text: str) -> str:
    words = ' class="words"' if len(text) > LONG else ""
    return f"<td{words}>{html.escape(text)}</td>"


LONG = 40  # characters of a cell that may be broken
STYLE = """
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: .2rem 1.2rem; overflow-x: auto; margin: 0 0 1rem;
  padding: .6rem max(1rem, calc((100% - 1180px) / 2 + 1rem)); background: var(--paper);
  border-bottom: 1px solid var(--line); font-size: .9rem; white-space: nowrap; }
nav a { color: var(--soft); text-decoration: none; }
nav a:hover, figcaption a { color: var(--accent); }
main > section > h2 { margin-top: 2.2rem; font-size: 1.35rem; }
figure svg { width: 100%; height: auto; }
figcaption { margin-top: .6rem; color: var(--soft); font-size: .88rem; }
tbody tr:hover { background: var(--ground); }
.narrow { display: none; }
th { vertical-align: bottom; }
td { white-space: nowrap; }
td.words { white-space: normal; min-width: 16rem; text-align: left; }
@media (max-width: 640px) {
  .wide { display: none; }
  .narrow { display: block; }
  .card { padding: .8rem; }
  table { font-size: .76rem; }
  th, td { padding-right: .45rem; }
  td { white-space: normal; }
  /* A table is swiped; its first column stays. */
  th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
}
/* Pictures are drawn for paper; turned over, their colours keep their hues on a dark ground. */
@media (prefers-color-scheme: dark) { figure svg { filter: invert(1) hue-rotate(180deg); } }
@media print { nav { display: none; } }
"""


def page(names: list[str], every: list[StudyResults], sections: list[str]) -> str:
    links = "".join(
        f'<a href="#{name}">{html.escape(results.study.title)}</a>' for name, results in zip(names, every, strict=True)
    )
    runs = sum(len(results.measured) for results in every)
    many = "study" if len(every) == 1 else "studies"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling studies</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{style()}{STYLE}</style></head><body><header>'
        f'<h1>Scaling studies</h1><p class="note">{len(every)} {many}, {runs} training runs. Small models on few cores '
        "show shapes and costs; they cannot show what a large one would reach.</p></header>"
        f"<nav>{links}</nav><main>{''.join(sections)}</main></body></html>\n"
    )
