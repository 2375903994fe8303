"""The report of studies: Markdown, pictures, the numbers as CSV, and one HTML page.

A report is made of the runs, or (`rebuild`) of the CSV files that an earlier report left, when the runs are gone.
"""

from __future__ import annotations

from pathlib import Path

from dsmoe.errors import ConfigError
from dsmoe.lab.study import page as html_page
from dsmoe.lab.study.drawing import Picture
from dsmoe.lab.study.grid import slug
from dsmoe.lab.study.limits import limit_tables
from dsmoe.lab.study.measures import StudyResults, read_results
from dsmoe.lab.study.pictures import draw_pictures
from dsmoe.lab.study.runner import read_study
from dsmoe.lab.study.saved import CELLS, merged, read_saved, save_results, write_csv
from dsmoe.lab.study.svg import svg_of
from dsmoe.lab.study.tables import Table, counts, tables_of
from dsmoe.runtime.files import write_atomically

PAGE, MARKDOWN = "index.html", "report.md"
TABLE_BEGIN, TABLE_END = "<!-- {name} -->\n", "<!-- end of table -->"  # in a page that shows the tables
# Drawn again from CSV for pages that are read in a repository; the others are in the tables.
REBUILT = ("loss", "gain", "loss_over_compute", "speedup", "leverage", "iso_memory", "published", "costs")


def write_report(folders: list[Path], target: Path, limits: Path | None = None) -> list[Path]:
    """Write the report of studies that were run in `folders` into `target`; return what was written.

    Cells that an earlier report left in `target` and that are not in `folders` stay.

    Args:
        limits: a page that shows a table for each limit, between `<!-- NAME -->` and `<!-- end of table -->`.

    Raises:
        ConfigError: a folder holds no study, or `limits` has a place for none of the tables.
    """
    names = [slug(folder.resolve().name) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError([f"found folders with the names {names}, expected each to be different"], "report")
    every = {}
    for name, folder in zip(names, folders, strict=True):
        if not (folder / "study.yaml").exists():
            raise ConfigError([f"{folder}: found no study.yaml, expected a folder that `run --out` made"], "report")
        results = read_results(read_study(folder), folder)
        if (target / name / CELLS).exists():
            results = merged(read_saved(target / name), results)
        every[name] = results
    return _write(every, target, limits, None, target / PAGE)


def rebuild(target: Path, limits: Path | None = None, html: Path | None = None) -> list[Path]:
    """Write the report of all studies in `target` again, from their CSV files alone; return what was written.

    Args:
        limits: as for `write_report`.
        html: where to write the page with all pictures; None: only Markdown and the pictures in `REBUILT`.
    """
    folders = sorted(path.parent for path in target.glob(f"*/{CELLS}"))
    if not folders:
        raise ConfigError([f"{target}: found no */{CELLS}, expected a folder that a report wrote"], "report")
    return _write({folder.name: read_saved(folder) for folder in folders}, target, limits, REBUILT, html)


def _write(
    every: dict[str, StudyResults], target: Path, limits: Path | None, pictures: tuple[str, ...] | None,
    html: Path | None,
) -> list[Path]:  # fmt: skip
    """`pictures`: those of which Markdown has a file; None: all, each beside its CSV. The page at `html` has all."""
    written = []
    if limits is not None:
        tables = {name: Table("", *table).markdown() for name, table in limit_tables(list(every.values())).items()}
        written.append(insert_tables(limits, tables))
    sections, markdown = [], ["# Studies\n"]
    for name, results in every.items():
        folder = target / name
        written += save_results(results, folder)
        shown, in_markdown, figures, narrow = tables_of(results), [], [], {}
        if html is not None:  # alone: images in Markdown cannot depend on the width
            for picture in draw_pictures(results, narrow=True):
                narrow[picture.name] = svg_of(picture.figure, f"{name}-{picture.name}-narrow")
        for picture in draw_pictures(results):
            in_file = pictures is None or picture.name in pictures
            if not in_file and html is None:
                continue
            svg = svg_of(picture.figure, f"{name}-{picture.name}")
            figures.append((picture, svg, narrow.get(picture.name, "")))
            if in_file:
                in_markdown.append(picture)
                written.append(folder / f"{picture.name}.svg")
                write_atomically(written[-1], svg.encode())
            if pictures is None:
                written.append(folder / f"{picture.name}.csv")
                write_csv(written[-1], picture.headings, picture.rows)
        markdown.append(_markdown(name, results, shown, in_markdown))
        sections.append(html_page.section(name, results, shown, figures, with_csv=pictures is None))
    texts = {target / MARKDOWN: "\n".join(markdown)}
    if html is not None:
        texts[html] = html_page.page(list(every), list(every.values()), sections)
    for file, text in texts.items():
        write_atomically(file, text.encode())
        written.append(file)
    return written


def _markdown(name: str, results: StudyResults, tables: list[Table], pictures: list[Picture]) -> str:
    study = results.study
    commits = f"; commits {', '.join(results.commits)}" if results.commits else ""
    text = f"## {study.title}\n\n{study.question}\n\n{counts(results)}; {results.machine}{commits}. "
    text += f"Numbers: [cells.csv]({name}/cells.csv), [curves.csv]({name}/curves.csv).\n"
    for picture in pictures:
        text += f"\n### {picture.title}\n\n![{picture.title}]({name}/{picture.name}.svg)\n\n{picture.caption}\n"
    for table in tables:
        text += f"\n### {table.title}\n\n{table.markdown()}"
    return text


def insert_tables(page: Path, tables: dict[str, str]) -> Path:
    """Replace what `page` shows between the marks of each table that it has a place for; return `page`."""
    text, inserted = page.read_text(encoding="utf-8"), False
    for name, table in tables.items():
        before, begin, rest = text.partition(TABLE_BEGIN.format(name=name))
        _, end, after = rest.partition(TABLE_END)
        if begin and end:
            text, inserted = before + begin + table + end + after, True
    if not inserted:
        lines = " or ".join(repr(TABLE_BEGIN.format(name=name).strip()) for name in tables)
        problem = f"found no place for a table, expected a line {lines} and below it {TABLE_END!r}"
        raise ConfigError([problem], str(page))
    write_atomically(page, text.encode())
    return page
