"""What a report says of made-up runs: means, spreads, paired differences, compute, what is missing; and its files."""

from __future__ import annotations

import csv

import numpy
import pytest
from plan_files import edit
from rich.console import Console

from dsmoe.errors import ConfigError
from dsmoe.lab.study.compare import run_plan
from dsmoe.lab.study.plan import Cell, load_plan
from dsmoe.lab.study.plots import smoothed, stage_bounds
from dsmoe.lab.study.report import read_outcomes, to_density_table, to_missing, to_table, write_report
from dsmoe.lab.study.results import read_result


@pytest.fixture
def finished(plan_file, tmp_path):
    plan, out = load_plan(plan_file), tmp_path / "out"
    run_plan(plan, out, 2, console=Console(quiet=True))
    return plan, out


def cells_of(markdown: str, row: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table(finished):
    plan, out = finished
    table = to_table(plan, read_outcomes(plan, out), "letters")
    topk, relu = cells_of(table, "topk"), cells_of(table, "relu")
    assert topk[1:5] == ["0.001", "2", "20", "3.8500 ± 0.0707"] and topk[6] == "" and topk[9] == "1.000"
    # By seed relu is 0.06 and 0.07 better; experts: 2 at the end, 3 on average.
    assert relu[6] == "-0.0650 ± 0.0071" and relu[7:9] == ["2.00", "3.00"]
    assert float(relu[9]) == pytest.approx((128 + 3 * 1536) / (128 + 2 * 1536), abs=1e-3)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| relu", "| topk", "| topk (longer)"]
    assert to_missing(read_outcomes(plan, out)) == ""


def test_missing_and_failed_runs_are_listed(plan_file, tmp_path):
    edit(plan_file, lambda tree: tree.update(seeds=[1, 13]))
    plan, out = load_plan(plan_file), tmp_path / "out"
    run_plan(plan, out, 2, console=Console(quiet=True))
    outcomes = read_outcomes(plan, out)
    assert "- topk on letters, seed 13: failed: the disk is full" in to_missing(outcomes)
    assert cells_of(to_table(plan, outcomes, "letters"), "relu")[2] == "1 of 2"


def test_nothing_run_yet(plan_file, tmp_path):
    plan = load_plan(plan_file)
    outcomes = read_outcomes(plan, tmp_path / "out")
    assert len(to_table(plan, outcomes, "letters").splitlines()) == 2  # the headings
    assert "- topk on letters, seed 1: not run" in to_missing(outcomes)


def test_files(finished, tmp_path):
    plan, out = finished
    written = {path.name for path in write_report(plan, out, tmp_path / "report")}
    assert {"comparison.md", "comparison.csv", "letters-loss.png", "letters-stages-relu.png"} <= written
    with open(tmp_path / "report" / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[0]["experts_by_layer"] == "2.500 1.500"
    assert all("launch/train.py --config" in row["command"] for row in rows)


def test_a_page_shows_the_tables_between_its_marks(finished, tmp_path):
    plan, out = finished
    page = tmp_path / "page.md"
    text = "above\n<!-- letters -->\n{0}<!-- end of table -->\n<!-- density on letters -->\n{1}<!-- end of table -->\n"
    page.write_text(text.format("| old |\n", ""))
    outcomes = read_outcomes(plan, out)
    tables = to_table(plan, outcomes, "letters"), to_density_table(outcomes, "letters")
    for _ in range(2):  # what the first report wrote, the next one replaces
        write_report(plan, out, tmp_path / "report", page)
        assert page.read_text() == text.format(*tables)
    assert all(table in (tmp_path / "report" / "comparison.md").read_text() for table in tables)


def test_a_page_without_a_place_for_a_table_is_left_alone(finished, tmp_path):
    plan, out = finished
    page = tmp_path / "page.md"
    page.write_text("<!-- end of table -->\n<!-- letters -->\n")
    with pytest.raises(ConfigError, match="no place for a table, expected a line '<!-- letters -->' or"):
        write_report(plan, out, tmp_path / "report", page)
    assert page.read_text() == "<!-- end of table -->\n<!-- letters -->\n"
    assert not (tmp_path / "report").exists()


def test_density_against_its_target(finished):
    plan, out = finished
    relu, topk = (read_result(Cell(name, "letters", 1).folder(out)) for name in ("relu", "topk"))
    assert relu.last_third_density == 0.5 and relu.last_third_near_target == 1.0
    assert topk.last_third_near_target is None
    rows = to_density_table(read_outcomes(plan, out), "letters").splitlines()[2:]
    assert rows == ["| relu | 1 | 0.5 | 0.5000 | 100% |", "| relu | 2 | 0.5 | 0.5000 | 100% |"]


def test_stages_of_a_density():
    density = numpy.array([0.5, 0.7, 0.9, 0.6, 0.4, 0.255, 0.24, 0.25])
    assert stage_bounds(density, 0.25) == (2, 5)
    assert stage_bounds(density[:4], 0.25) == (2, 4)


def test_smoothing_keeps_level_and_length():
    values = numpy.linspace(1.0, 2.0, 50)
    assert smoothed(values).shape == values.shape
    assert smoothed(numpy.ones(50)) == pytest.approx(numpy.ones(50))
    assert smoothed(values, 0.04)[25] == pytest.approx(values[25])
