"""A study runs its cells and reports on them: numbers, pictures with their CSV, one page without a network."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
import shutil

import numpy
import pytest
from plan_files import edit
from rich.console import Console

from dsmoe.errors import ConfigError
from dsmoe.lab.study import report
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.gates import reason_to_skip
from dsmoe.lab.study.measures import centre_and_band, flops, read_results, smoothed, spikes, wall
from dsmoe.lab.study.pictures import draw_pictures
from dsmoe.lab.study.report import rebuild, write_report
from dsmoe.lab.study.results import run_config, run_lines
from dsmoe.lab.study.runner import read_record, read_study, run_study
from dsmoe.lab.study.saved import read_saved
from dsmoe.lab.study.speedup import law_of, worth
from dsmoe.lab.study.tables import tables_of
from dsmoe.lab.study.training_pictures import stage_bounds

QUIET = Console(quiet=True)


@pytest.fixture
def finished(study_file, tmp_path):
    study, out = load_study(study_file), tmp_path / "more"
    assert run_study(study, out, 4, console=QUIET) == 0
    return study, out


@pytest.fixture
def tables_alone(monkeypatch):
    """Reports without pictures, which take seconds and are looked at by other tests."""
    monkeypatch.setattr(report, "draw_pictures", lambda *_, **__: [])


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
    one = next(one for one in results.measured if str(one.cell) == "relu, num_experts 8, seed 2")
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
    assert not re.search(r'(src|href)="(https?:)?//', page) and page.count("<svg") == 2 * len(pictures)  # for a phone
    widths = [float(width) for width in re.findall(r'<svg [^>]*width="([\d.]+)pt"', page)]
    assert widths == [691.2, 244.8] * len(pictures)
    saved = [w for w in worth(read_saved(tmp_path / "report" / "more")) if w.run.cell.arm == "relu"]
    ratio = numpy.mean([w.compute_ratio for w in saved if (w.run.x, w.run.cell.length) == (32, 1)])
    assert f">relu {ratio:.2f}×<" in page
    assert f"| relu | num_experts 32 | 2 | -0.0650 ± 0.0635 | {ratio:.2f} |" in markdown
    caption = "arms take the same memory for weights. Means over 2 seeds. ×: training compute that was realised"
    assert caption in page and "bands are 95 % intervals" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "16 of 16 runs finished" in markdown and "| topk | num_experts 4 | 2 | 3.8500 ± 0.6353 |" in markdown
    assert "no: its interval" in markdown  # invented losses do not depend on E


def test_a_study_of_cost_alone_shows_no_losses(study_file, tmp_path):
    edit(study_file, lambda tree: tree.update(seeds=[1], quality=False, timed=True, law=False))
    out = tmp_path / "cost"
    run_study(load_study(study_file), out, 1, console=QUIET)
    written = {path.name for path in write_report([out], tmp_path / "report")}
    assert "costs.svg" in written and not any(name.startswith(("loss", "published")) for name in written)
    assert {row["quantity"] for row in rows_of(tmp_path / "report" / "cost" / "costs.csv")} >= {"step_seconds"}
    header = (tmp_path / "report" / "report.md").read_text()
    assert "held-out loss" not in header and "step time" in header


def test_seconds_of_cells_that_shared_the_cores_are_not_shown(study_file, tmp_path):
    edit(study_file, lambda tree: tree.update(seeds=[1], timed=True))
    study, out = load_study(study_file), tmp_path / "shared"
    run_study(study, out, 4, console=QUIET)
    assert not any("step_seconds" in one.values for one in read_results(study, out).measured)


@pytest.mark.usefixtures("tables_alone")
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


@pytest.mark.usefixtures("tables_alone")
def test_the_page_of_limits_gets_its_tables(finished, tmp_path):
    _, out = finished
    page = tmp_path / "limits.md"
    page.write_text("<!-- imbalance -->\n<!-- end of table -->\n<!-- latency -->\nkept\n<!-- end of table -->\n")
    write_report([out], tmp_path / "report", page)
    assert "| More experts | relu | num_experts 32 | 2 | 1.50 |" in page.read_text() and "kept" in page.read_text()


@pytest.mark.slow
def test_a_report_needs_nothing_that_a_run_needs(finished, tmp_path, monkeypatch):
    _, out = finished
    (tmp_path / "base.yaml").unlink()
    monkeypatch.setattr("dsmoe.lab.study.check.memory_of_machine", lambda: 0.0)
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
        "dsmoe.lab.study.runner.StudyRunner.after",
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


@pytest.mark.slow
def test_a_report_is_rebuilt_from_its_csv_alone(finished, tmp_path):
    _, out = finished
    write_report([out], tmp_path / "report")
    first = (tmp_path / "report" / "more" / "cells.csv").read_text()
    text = (tmp_path / "report" / "report.md").read_text()
    shutil.rmtree(out)
    written = {path.name for path in rebuild(tmp_path / "report")}
    assert {"loss.svg", "published.svg", "cells.csv"} <= written and "index.html" not in written
    assert (tmp_path / "report" / "more" / "cells.csv").read_text() == first
    again = (tmp_path / "report" / "report.md").read_text()
    page = (tmp_path / "report" / "index.html").read_text()
    assert rebuild(tmp_path / "report", html=tmp_path / "page.html")[-1] == tmp_path / "page.html"
    rebuilt = (tmp_path / "page.html").read_text()
    drawn, before = (set(re.findall(r'<figure class="card" id="more-([\w-]+)-card"', text)) for text in (rebuilt, page))
    only_in_runs = {"density", "kinds", "layers", "layers_over_training", "stages", "starving"}
    assert before - only_in_runs <= drawn <= before
    assert len(drawn) >= 6 and ".csv" not in rebuilt
    assert (tmp_path / "report" / "report.md").read_text() == again
    table = text[text.index("### All cells") : text.index("### Held-out loss against topk")]
    assert table in again and "16 of 16 runs finished" in again


@pytest.mark.usefixtures("tables_alone")
def test_cells_of_an_earlier_report_stay(finished, study_file, tmp_path):
    study, out = finished
    write_report([out], tmp_path / "report")
    for cell in study.cells():
        if cell.seed == 2:
            shutil.rmtree(cell.folder(out))
    write_report([out], tmp_path / "report")
    rows = rows_of(tmp_path / "report" / "more" / "cells.csv")
    assert len(rows) == 16 and "16 of 16 runs finished" in (tmp_path / "report" / "report.md").read_text()


def test_rows_beyond_equal_compute_are_marked_and_speedups_counted(study_file, tmp_path):
    def change(tree):
        tree |= {"lengths": [0.5], "seeds": [1], "axes": {"model.num_experts": [4, 8, 16]}}
        tree["set"] |= {
            "training.schedule": "wsd",
            "training.steps": 20,
            "training.warmup_steps": 0,
            "checkpoint.keep_every": 4,
        }
        tree["arms"].append({"name": "dense", "set": {"router.name": "topk", "router.k": 1, "active_experts": 1},
                             "derive_width": False, "axes": {"model.num_experts": [1]}})  # fmt: skip

    edit(study_file, change)
    out = tmp_path / "speed"
    assert run_study(load_study(study_file), out, 4, console=QUIET) == 0
    results = read_results(read_study(out), out)
    by = {(w.run.cell.arm, w.run.x, w.run.cell.length, w.run.cell.seed): w for w in worth(results)}
    relu, topk = by["relu", 4, 1.0, 1], by["topk", 4, 1.0, 1]
    # A branch has cost what the run had cost up to there, and its decay.
    half = by["topk", 4, 0.5, 1].run
    assert half.values["training_flops"] == pytest.approx(topk.run.values["training_flops"] / 2)
    assert [point["step"] for point in half.curve] == list(range(1, 11))
    assert relu.beyond_equal_compute and not topk.beyond_equal_compute  # 3 experts on average, against 2
    assert relu.compute_ratio == pytest.approx(relu.run.values["training_flops"] / topk.run.values["training_flops"])
    law = law_of([one for one in results.measured if one.cell.arm == "topk" and one.x == 4])
    needed = law.compute_at(relu.run.values["val_loss"])
    assert relu.over_baseline == pytest.approx(needed / relu.run.values["training_flops"])
    dense = law_of([one for one in results.measured if one.cell.arm == "dense"])
    assert topk.over_dense == pytest.approx(
        dense.compute_at(topk.run.values["val_loss"]) / topk.run.values["training_flops"]
    )
    assert topk.over_dense_in_time is None  # not timed
    write_report([out], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "### Effective speedup" in text and "\u2020: more than 2% above topk's compute" in text
    assert "num_experts 4, length 0.5" in text and "### Held-out loss over compute" in text
    assert "### Joint law" in text
    assert_one_seed(tmp_path / "report")


def test_arms_are_ranked_by_loss_and_those_that_used_more_are_not(study_file, tmp_path):
    """relu's invented losses are the best, at 3 experts on average against 2."""
    edit(study_file, lambda tree: tree.update(seeds=[1]))
    out = tmp_path / "ranked"
    run_study(load_study(study_file), out, 4, console=QUIET)
    write_report([out], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    table = text.partition("### Held-out loss at equal compute")[2].partition("###")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    first = [row for row in rows if row[2] == "num_experts 4"]
    assert [row[:2] for row in first] == [["1", "topk"], ["\u2020", "relu"]]
    assert float(first[1][4]) < float(first[0][4]) and float(first[1][5]) > 1.02
    assert "\u2020: more than 2% above topk's compute, so not ranked." in table
    assert_one_seed(tmp_path / "report")


def assert_one_seed(report) -> None:
    """One seed is no mean and no first one, and has no interval: captions, notes and rows of the page say so."""
    page = html.unescape((report / "index.html").read_text())
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert len(captions) >= 4 and any("One seed" in caption for caption in captions)
    for caption in captions:
        words = caption.replace("One seed: there is no interval.", "")
        assert not re.search(r"over (\d+ )?seeds|[Ff]irst seed|of \d+ seeds|interval|bands|bars are|±", words), caption
    text = (report / "report.md").read_text()
    assert "over seeds" not in text and "First seed" not in text and "One seed" in text
    losses = text.partition("All cells")[2].partition("###")[0]
    assert "one seed" in losses.partition("\n")[0] and "±" not in losses


def test_losses_on_two_corpora_are_not_averaged(study_file, tmp_path):
    def change(tree):
        tree.update(x=None, axes={"data.path": ["data/letters", "data/digits"]}, seeds=[1], published=[])

    edit(study_file, change)
    study, out = load_study(study_file), tmp_path / "corpora"
    run_study(study, out, 4, console=QUIET)
    results = read_results(study, out)

    def on_digits(run):
        """A nat lower and dearer, as other text might be."""
        values = run.values | {name: run.values[name] * 1.5 for name in ("training_flops", "imbalance")}
        values["val_loss"] -= 1.0
        return dataclasses.replace(run, values=values) if ("data.path", "data/digits") in run.cell.point else run

    results = dataclasses.replace(results, measured=[on_digits(run) for run in results.measured])
    table = next(table for table in tables_of(results) if table.title == "Held-out loss at equal compute")
    assert {(row[0], row[1], row[2], row[4]) for row in table.rows} == {
        ("1", "topk", "path data/letters", "3.9000"), ("\u2020", "relu", "path data/letters", "3.8400"),
        ("1", "topk", "path data/digits", "2.9000"), ("\u2020", "relu", "path data/digits", "2.8400"),
    }  # fmt: skip
    ratios = {(w.run.cell.arm, w.run.cell.point): w.compute_ratio for w in worth(results)}
    letters, digits = ((("data.path", f"data/{name}"),) for name in ("letters", "digits"))
    assert ratios["relu", letters] == pytest.approx(ratios["relu", digits]) and ratios["relu", letters] > 1.02
    pictures = {picture.name: picture for picture in draw_pictures(results)}
    losses = {tuple(row[:2]): row[3] for row in pictures["loss"].rows}
    assert losses["relu", "path data/letters"] == pytest.approx(3.84)
    assert losses["relu", "path data/digits"] == pytest.approx(2.84) and len(losses) == 4
    costs = {tuple(row[1:3]): row[4] for row in pictures["costs"].rows if row[0] == "imbalance"}
    assert costs["topk", "path data/letters"] == 1.5 and costs["topk", "path data/digits"] == 2.25


@pytest.mark.parametrize("lost", [4, 8, 32])
def test_an_arm_whose_first_seed_failed_is_in_every_picture(finished, lost):
    """The first seed of relu lacks at one place of the axis: its second stands there for it."""
    results = read_results(*finished)
    actual = [one for one in results.measured if (one.cell.arm, one.cell.seed, one.x) != ("relu", 1, lost)]
    whole, pictures = (
        {picture.name: (picture.rows, drawn_lines(picture.figure)) for picture in draw_pictures(some)}
        for some in (results, dataclasses.replace(results, measured=actual))
    )
    assert {"loss", "gain", "loss_over_flops", "iso_memory", "costs", "density", "layers"} <= whole.keys()
    assert pictures.keys() == whole.keys()
    for name, (rows, lines) in pictures.items():
        assert lines == whole[name][1], name
        cells = {str(row[0]).partition(", seed")[0] for row in rows}
        assert cells == {str(row[0]).partition(", seed")[0] for row in whole[name][0]}, name


def drawn_lines(figure) -> list[int]:
    """How many lines with points each panel has."""
    return [sum(len(line.get_xdata()) > 0 for line in axis.lines) for axis in figure.axes]


def test_no_two_arms_look_alike(finished):
    """Nine routers, one more than there are colors."""
    results = read_results(*finished)
    relu = [one for one in results.measured if one.cell.arm == "relu"]
    names = [f"router {number}" for number in range(9)]
    arms = [results.study.arm("relu").model_copy(update={"name": name}) for name in names]
    nine = dataclasses.replace(
        results,
        study=results.study.model_copy(update={"arms": arms, "published": []}),
        measured=[
            dataclasses.replace(one, cell=dataclasses.replace(one.cell, arm=name)) for name in names for one in relu
        ],
    )
    compared = 0
    for picture in draw_pictures(nine):
        for legend in picture.figure.legends:
            looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in legend.get_lines()]
            assert len(looks) == len(set(looks)) == 9, picture.name
            compared += 1
        if picture.name == "loss_over_flops":
            looks = [(line.get_color(), line.get_linestyle()) for line in picture.figure.axes[0].lines]
            assert len(looks) == len(set(looks)) == 9
    assert compared >= 2


@pytest.mark.usefixtures("tables_alone")
def test_an_arm_that_fails_the_gate_is_not_trained(study_file, tmp_path):
    def change(tree):
        tree["gate"] = {"sizes": [{"training.steps": 4}, {"training.steps": 8}]}
        tree["arms"].append({"name": "worse", "set": {"router.name": "topk", "training.lr": 0.1}})
        tree["seeds"] = [1]

    edit(study_file, change)
    study, out = load_study(study_file), tmp_path / "gated"
    gates = study.gate_cells()
    assert study.cells()[: len(gates)] == gates and len(gates) == 6
    losses = {cell: 4.0 + 0.1 * (cell.arm == "worse") * cell.gate for cell in gates}
    assert reason_to_skip(study, "relu", losses) is None and reason_to_skip(study, "topk", losses) is None
    assert "gate 2: held-out loss 4.1000, expected at most topk's 4.0000 + 0" in reason_to_skip(study, "worse", losses)
    edit(study_file, lambda tree: tree["gate"].update(margin=0.2))
    assert reason_to_skip(load_study(study_file), "worse", losses) is None
    # The invented losses favour relu; topk, the baseline, goes on whatever it does.
    study = study.model_copy(update={"baseline": "relu"})
    assert run_study(study, out, 4, console=QUIET) == 0
    status = {(cell.arm, cell.gate): read_record(cell, out)["status"] for cell in study.cells()}
    assert status["relu", None] == "done" and status["topk", None] == "skipped" and status["topk", 0] == "done"
    write_report([out], tmp_path / "report")
    assert "skipped: gate 1: held-out loss" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("tables_alone")
def test_differences_to_the_baseline_are_of_the_same_seed(finished, tmp_path):
    _, out = finished
    write_report([out], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    # By seed relu is 0.06 and 0.07 better.
    assert "| relu | num_experts 8 | 2 | -0.0650 ± 0.0635 |" in text
    assert "| relu | num_experts 4 | 1 | 0.5 | 0.5000 | 100% |" in text  # its density reached the target


def test_stages_of_a_density():
    density = numpy.array([0.5, 0.7, 0.9, 0.6, 0.4, 0.255, 0.24, 0.25])
    assert stage_bounds(density, 0.25) == (2, 5)
    assert stage_bounds(density[:4], 0.25) == (2, 4)


def test_smoothing_keeps_level_and_length():
    values = numpy.linspace(1.0, 2.0, 50)
    assert smoothed(values).shape == values.shape
    assert smoothed(numpy.ones(50)) == pytest.approx(numpy.ones(50))
    assert smoothed(values, 0.04)[25] == pytest.approx(values[25])


def test_a_page_without_a_place_for_a_table_is_left_alone(finished, tmp_path):
    _, out = finished
    page = tmp_path / "page.md"
    page.write_text("<!-- end of table -->\n<!-- memory -->\n")
    with pytest.raises(ConfigError, match="no place for a table, expected a line '<!-- memory -->' or"):
        write_report([out], tmp_path / "report", page)
    assert page.read_text() == "<!-- end of table -->\n<!-- memory -->\n"
    assert not (tmp_path / "report").exists()
