"""A study carried on elsewhere: what a report has is not run again, nor mixed with what it is not like."""

from __future__ import annotations

import json

import pytest
from plan_files import edit
from rich.console import Console

from dsmoe.errors import ConfigError
from dsmoe.lab.study import report, saved
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.report import write_report
from dsmoe.lab.study.results import same_data, trained_on
from dsmoe.lab.study.runner import read_record, run_study
from dsmoe.lab.study.saved import read_saved, reported_cells

QUIET = Console(quiet=True)
SMALL = {"model.num_experts": [4, 8]}


@pytest.fixture
def report_folder(study_file, tmp_path, monkeypatch):
    """The folder of a report of one seed; the study has two since."""
    monkeypatch.setattr(report, "draw_pictures", lambda *_, **__: [])  # they take seconds
    edit(study_file, lambda tree: tree.update(seeds=[1], axes=SMALL))
    out = tmp_path / "here" / "more"
    run_study(load_study(study_file), out, 4, console=QUIET)
    write_report([out], tmp_path / "report")
    edit(study_file, lambda tree: tree.update(seeds=[1, 2]))
    return tmp_path / "report" / "more"


def test_another_machine_runs_what_a_report_lacks(study_file, tmp_path, report_folder):
    study, out = load_study(study_file), tmp_path / "there" / "more"
    cells = reported_cells(report_folder, study)
    assert {cell.seed for cell in cells} == {1} and len(cells) == 4
    run_study(study, out, 4, console=QUIET, reported=cells)
    assert [cell.seed for cell in study.cells() if read_record(cell, out)] == [2] * 4
    write_report([out], report_folder.parent)
    results = read_saved(report_folder)
    assert {run.cell for run in results.measured} == set(study.cells()) and not results.missing
    assert reported_cells(report_folder, study) == set(study.cells())


def test_a_run_that_a_missing_cell_begins_from_is_run_again(study_file, tmp_path, report_folder):
    schedule = {"training.schedule": "wsd", "training.steps": 24, "checkpoint.keep_every": 10}
    edit(study_file, lambda tree: tree.update(lengths=[0.5], seeds=[1], set={**tree["set"], **schedule}))
    study, out = load_study(study_file), tmp_path / "lengths" / "more"
    run_study(study, out, 4, console=QUIET)
    write_report([out], tmp_path / "of lengths")
    file = tmp_path / "of lengths" / "more" / "cells.csv"
    lines = file.read_text().splitlines(keepends=True)
    removed = next(line for line in lines if line.startswith("relu,1,0.5,8,"))
    file.write_text("".join(line for line in lines if line != removed))
    to_run = {str(cell) for cell in set(study.cells()) - reported_cells(file.parent, study)}
    assert to_run == {"relu, num_experts 8, seed 1", "relu, num_experts 8, seed 1, length 0.5"}


def test_a_run_whose_compute_a_missing_cell_takes_is_run_again(study_file, tmp_path, report_folder):
    edit(study_file, lambda tree: tree["arms"].append(
        {"name": "longer", "set": {"router.name": "topk"}, "match_compute_of": "relu", "seeds": [1]}
    ))  # fmt: skip
    assert {cell.arm for cell in reported_cells(report_folder, load_study(study_file))} == {"topk"}


def test_results_of_another_configuration_are_refused(study_file, report_folder):
    edit(study_file, lambda tree: tree["set"].update({"training.lr": 0.1}))
    with pytest.raises(ConfigError, match="relu, num_experts 4, seed 1: found the result of another configuration"):
        reported_cells(report_folder, load_study(study_file))


def test_a_report_does_not_mix_settings(study_file, tmp_path, report_folder):
    edit(study_file, lambda tree: tree.update(seeds=[2]))
    edit(study_file, lambda tree: tree["arms"][1]["set"].update({"router.lambda_factor": 1.1, "logging.interval": 5}))
    out = tmp_path / "there" / "more"
    run_study(load_study(study_file), out, 4, console=QUIET)
    with pytest.raises(ConfigError) as caught:
        write_report([out], report_folder.parent)
    (problem,) = caught.value.problems
    assert problem.startswith("relu: router.lambda_factor was not set in the cells that the report has, and is 1.1 now")


def test_other_data_are_refused_before_a_run_and_in_a_report(study_file, tmp_path, report_folder, monkeypatch):
    edit(study_file, lambda tree: tree["set"].update({"data.path": "data/study"}))
    edit(report_folder / "study.yaml", lambda tree: tree["set"].update({"data.path": "data/study"}))
    about = json.loads((report_folder / "about.json").read_text())
    (report_folder / "about.json").write_text(json.dumps(about | {"data": {"data/study": "219 tokens (aaa)"}}))
    monkeypatch.setattr(saved, "open_corpus", lambda data: data.path)
    monkeypatch.setattr(saved, "data_identity", lambda path: {"train": {"tokens": 219, "fingerprint": "aaa"}})
    assert len(reported_cells(report_folder, load_study(study_file))) == 4
    monkeypatch.setattr(saved, "data_identity", lambda path: {"train": {"tokens": 186, "fingerprint": "bbb"}})
    with pytest.raises(ConfigError, match=r"data/study: found 186 tokens \(bbb\), expected 219 tokens \(aaa\)"):
        reported_cells(report_folder, load_study(study_file))
    with pytest.raises(ConfigError, match="a: found 2, expected 1"):
        same_data({"a": "1", "b": "1"}, {"a": "2", "c": "3"}, "here")
    assert same_data({"a": "1"}, {"b": "2"}, "here") == {"a": "1", "b": "2"}


def test_a_run_without_a_checkpoint_does_not_tell_its_data(tmp_path):
    assert trained_on(tmp_path) is None
