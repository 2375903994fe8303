"""A study runs its cells and reports on them: numbers, pictures with their CSV, one page without a network."""

from __future__ import annotations

import csv
import json
import re

import numpy
import pytest
from plan_files import edit
from rich.console import Console

from dsmoe.errors import ConfigError
from dsmoe.lab.study.grid import load_study
from dsmoe.lab.study.measures import centre_and_band, flops, read_results, spikes, wall
from dsmoe.lab.study.results import run_config, run_lines
from dsmoe.lab.study.runner import read_record
from dsmoe.lab.study.scaling import read_study, run_study
from dsmoe.lab.study.scaling_report import write_report

QUIET = Console(quiet=True)


@pytest.fixture
def finished(study_file, tmp_path):
    study, out = load_study(study_file), tmp_path / "more"
    assert run_study(study, out, 4, console=QUIET) == 0
    return study, out


def rows_of(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_study_is_run_once_and_kept_beside_its_runs(finished):
    study, out = finished
    assert read_study(out) == study
    logs = {cell: (cell.folder(out) / "log.txt").read_text() for cell in study.cells()}
    assert run_study(study, out, 4, console=QUIET) == 0
    assert logs == {cell: (cell.folder(out) / "log.txt").read_text() for cell in study.cells()}
    record = read_record(study.cells()[0], out)
    assert record["status"] == "done" and record["ranks"] == 1 and record["machine"]


def test_measures_of_a_cell(finished):
    study, out = finished
    results = read_results(study, out)
    one = next(one for one in results.found if str(one.cell) == "relu, num_experts 8, seed 2")
    assert one.x == 8 and one.values["val_loss"] == pytest.approx(4 - 0.2 - 0.07)
    assert "step_seconds" not in one.values and "peak_memory" not in one.values  # not timed; not recorded
    folder = one.cell.folder(out)
    dear, cheap = (flops(run_config(folder), [{"experts_per_token": k}])[0] for k in (3, 2))
    assert dear - cheap == 6 * 4 * 16 * 2 * (3 * 32 * 16)  # one expert more for each of 64 tokens in two layers


def test_report(finished, tmp_path):
    _, out = finished
    written = {path.relative_to(tmp_path / "report").as_posix() for path in write_report([out], tmp_path / "report")}
    pictures = {name for name in written if name.endswith(".svg")}
    assert {f"more/{name}.svg" for name in ("loss", "published", "loss_over_flops", "costs", "density")} <= pictures
    assert {name.replace(".svg", ".csv") for name in pictures} <= written
    loss = rows_of(tmp_path / "report" / "more" / "loss.csv")
    assert len(loss) == 8 and float(loss[0]["held-out loss"]) == pytest.approx(3.85)
    page, markdown = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    assert not re.search(r'(src|href)="(https?:)?//', page) and page.count("<svg") == len(pictures)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "16 of 16 runs finished" in markdown and "| topk | num_experts 4 | 2 | 3.8500 ± 0.6353 |" in markdown
    assert "no: its interval" in markdown  # invented losses do not depend on E


def test_a_study_of_cost_alone_shows_no_losses(study_file, tmp_path):
    edit(study_file, lambda tree: tree.update(seeds=[1], quality=False, timed=True, law=False))
    out = tmp_path / "cost"
    run_study(load_study(study_file), out, 4, console=QUIET)
    written = {path.name for path in write_report([out], tmp_path / "report")}
    assert "costs.svg" in written and not any(name.startswith(("loss", "published")) for name in written)
    assert {row["quantity"] for row in rows_of(tmp_path / "report" / "cost" / "costs.csv")} >= {"step_seconds"}
    header = (tmp_path / "report" / "report.md").read_text()
    assert "held-out loss" not in header and "step time" in header


def test_a_report_says_what_is_missing(study_file, tmp_path):
    edit(study_file, lambda tree: tree.update(seeds=[1, 13]))
    study, out = load_study(study_file), tmp_path / "more"
    assert run_study(study, out, 4, console=QUIET) == 8
    write_report([out], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "8 of 16 runs finished" in text and "| relu, seed 13: 4 cells | failed: the disk is full |" in text


def test_studies_without_an_axis_are_reported_by_arm(study_file, tmp_path):
    edit(study_file, lambda tree: tree.update(x=None, axes={}, published=[]))
    out = tmp_path / "arms"
    run_study(load_study(study_file), out, 4, console=QUIET)
    write_report([out], tmp_path / "report")
    assert [row["arm"] for row in rows_of(tmp_path / "report" / "arms" / "loss.csv")] == ["topk", "relu"]


def test_the_page_of_limits_gets_its_tables(finished, tmp_path):
    _, out = finished
    page = tmp_path / "limits.md"
    page.write_text("<!-- imbalance -->\n<!-- end of table -->\n<!-- latency -->\nkept\n<!-- end of table -->\n")
    write_report([out], tmp_path / "report", page)
    assert "| More experts | relu | num_experts 32 | 2 | 1.50 |" in page.read_text() and "kept" in page.read_text()


def test_a_report_needs_nothing_that_a_run_needs(finished, tmp_path, monkeypatch):
    _, out = finished
    (tmp_path / "base.yaml").unlink()
    monkeypatch.setattr("dsmoe.lab.study.grid.memory_there", lambda: 0.0)
    assert write_report([out], tmp_path / "report")


def test_a_report_needs_a_study(tmp_path):
    with pytest.raises(ConfigError, match=r"no study\.yaml"):
        write_report([tmp_path], tmp_path / "report")


def test_another_grid_is_not_mixed_into_a_folder(finished, study_file):
    _, out = finished
    edit(study_file, lambda tree: tree["compute"].update(width=8))
    with pytest.raises(ConfigError) as caught:
        run_study(load_study(study_file), out, 1, console=QUIET)
    assert len(caught.value.problems) == 16


def test_a_finished_cell_that_was_not_read_is_read_and_not_trained_again(finished, study_file, monkeypatch):
    study, out = finished
    steps = {cell: len(run_lines(cell.folder(out))) for cell in study.cells()}
    script = "import pathlib, sys; pathlib.Path(sys.argv[1], 'probe.json').write_text('{}')"
    monkeypatch.setattr(
        "dsmoe.lab.study.scaling.ScalingStudy.after",
        lambda self, cell: (["-c", script, str(cell.folder(self.out))], "probe.json"),
    )
    assert run_study(study, out, 4, console=QUIET) == 0
    for cell in study.cells():
        assert json.loads((cell.folder(out) / "probe.json").read_text()) == {}
        assert (cell.folder(out) / "log.txt").read_text().count("training") == 1
        assert len(run_lines(cell.folder(out))) == steps[cell]


def test_spikes_and_interrupted_steps():
    loss = (5 - numpy.arange(60) / 30 + 0.01 * numpy.sin(numpy.arange(60))).tolist()
    assert spikes(loss) == 0
    loss[40] += 3
    assert spikes(loss) == 1
    lines = [{"seconds": 1.0} for _ in range(40)]
    lines[20]["seconds"] = 500.0
    assert wall(lines)[-1] == pytest.approx(40.0)


def test_an_interval_of_two_runs_is_wide():
    assert centre_and_band([3.0]) == (3.0, None)
    assert centre_and_band([3.8, 3.9]) == pytest.approx((3.85, 12.706 * 0.05), rel=1e-3)
