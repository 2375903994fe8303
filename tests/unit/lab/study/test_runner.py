"""A study runs every cell once, keeps what fails, resumes what was cut off, matches compute, and reads old plans."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
from plan_files import edit
from rich.console import Console

from dsmoe.errors import ConfigError, TrainingError
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.grid import Cell
from dsmoe.lab.study.results import read_result, run_config
from dsmoe.lab.study.runner import RECORD, read_record, run_study


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


def cell_of(arm: str, seed: int) -> Cell:
    return Cell(arm, (("data.path", "data/letters"),), seed)


def test_cells_come_seed_by_seed(plan_file):
    cells = load_study(plan_file).cells()
    assert [cell.seed for cell in cells] == [1, 1, 1, 2, 2, 2]
    assert [cell.arm for cell in cells[:3]] == ["topk", "relu", "topk (longer)"]


def test_every_mistake_of_a_plan_is_named(plan_file):
    def spoil(tree):
        tree["baseline"] = "topq"
        tree["variants"][0]["match_compute_of"] = "relu"
        tree["variants"][1]["seeds"] = [1]

    edit(plan_file, spoil)
    with pytest.raises(ConfigError) as caught:
        load_study(plan_file)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "baseline", "arms.topk", "arms.topk (longer)"
    ]  # fmt: skip


def test_a_run_that_would_be_refused_is_refused_before_anything_runs(plan_file):
    edit(plan_file, lambda tree: tree["variants"][1].update(overrides=["router.kk=3"]))
    with pytest.raises(ConfigError, match="kk"):
        load_study(plan_file)


def test_runs_all_then_nothing(plan_file, tmp_path, quiet):
    plan, out = load_study(plan_file), tmp_path / "out"
    assert run_study(plan, out, 2, console=quiet) == 0
    logs = {cell: (cell.folder(out) / "log.txt").read_text() for cell in plan.cells()}
    assert run_study(plan, out, 2, console=quiet) == 0
    assert logs == {cell: (cell.folder(out) / "log.txt").read_text() for cell in plan.cells()}


def test_matched_variant_spends_what_the_other_spent(plan_file, tmp_path, quiet):
    plan, out = load_study(plan_file), tmp_path / "out"
    run_study(plan, out, 1, console=quiet)
    relu, longer = (read_result(cell_of(name, 1).folder(out)) for name in ("relu", "topk (longer)"))
    # 20 steps at 3 experts on average: 32 * 4 for the gate, 3 * 32 * 16 for an expert.
    assert longer.steps == round(20 * (128 + 3 * 1536) / (128 + 2 * 1536)) == 30
    assert longer.moe_compute == pytest.approx(relu.moe_compute, rel=0.02)
    assert run_config(cell_of("topk (longer)", 1).folder(out)).training.steps == 30


def test_a_failure_is_kept_and_the_rest_goes_on(plan_file, tmp_path, quiet):
    edit(plan_file, lambda tree: tree.update(seeds=[13, 1]))
    plan, out = load_study(plan_file), tmp_path / "out"
    assert run_study(plan, out, 2, console=quiet) == 3
    record = read_record(cell_of("topk", 13), out)
    assert record["status"] == "failed" and record["error"].endswith("the disk is full")
    assert "failed, which it needs" in read_record(cell_of("topk (longer)", 13), out)["error"]
    assert read_record(cell_of("relu", 1), out)["status"] == "done"
    log = (cell_of("topk", 13).folder(out) / "log.txt").read_text()
    assert run_study(plan, out, 2, console=quiet) == 3
    assert (cell_of("topk", 13).folder(out) / "log.txt").read_text() == log
    run_study(plan, out, 2, retry=True, console=quiet)
    assert (cell_of("topk", 13).folder(out) / "log.txt").read_text() == log * 2


def test_another_plan_does_not_mix_with_results(plan_file, tmp_path, quiet):
    out = tmp_path / "out"
    run_study(load_study(plan_file), out, 2, console=quiet)
    edit(plan_file, lambda tree: tree.update(overrides=["training.lr=0.1"]))
    with pytest.raises(ConfigError, match="another configuration"):
        run_study(load_study(plan_file), out, 2, console=quiet)


def test_a_key_of_a_later_version_and_what_is_logged_make_no_other_run(plan_file, tmp_path, quiet):
    out = tmp_path / "out"
    run_study(load_study(plan_file), out, 2, console=quiet)
    file = cell_of("topk", 1).folder(out) / RECORD
    record = json.loads(file.read_text())
    del record["config"]["training"]["decay_embeddings"]  # as if it had not been there yet
    file.write_text(json.dumps(record))
    edit(plan_file, lambda tree: tree.update(overrides=[*tree.get("overrides", []), "logging.interval=3"]))
    run_study(load_study(plan_file), out, 2, console=quiet)
    record["config"]["training"]["decay_embeddings"] = True
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="another configuration"):
        run_study(load_study(plan_file), out, 2, console=quiet)


def test_interrupted_it_stops_its_runs_and_later_goes_on(plan_file, tmp_path, quiet):
    edit(plan_file, lambda tree: tree.update(seeds=[1, 14]))
    plan, out = load_study(plan_file), tmp_path / "out"

    def interrupt():
        first = [cell for cell in plan.cells() if cell.seed == 1]
        while {(read_record(cell, out) or {}).get("status") for cell in first} != {"done"}:
            time.sleep(0.05)
        while not (cell_of("topk", 14).folder(out) / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, out, 2, console=quiet)
    assert {read_record(cell, out)["status"] for cell in plan.cells() if cell.seed == 1} == {"done"}
    assert read_record(cell_of("topk", 14), out)["status"] == "started"


def test_two_comparisons_do_not_share_a_folder(plan_file, tmp_path, quiet):
    edit(plan_file, lambda tree: tree.update(seeds=[14]))
    plan, out, refused = load_study(plan_file), tmp_path / "out", []

    def second():
        while not (cell_of("topk", 14).folder(out) / "metrics.jsonl").exists():
            time.sleep(0.05)
        try:
            run_study(plan, out, 1, console=quiet)
        except TrainingError as error:
            refused.append(str(error))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=second, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, out, 1, console=quiet)
    assert refused and "is running in" in refused[0]


def test_records_hold_the_command_and_the_steps(plan_file, tmp_path, quiet):
    plan, out = load_study(plan_file), tmp_path / "out"
    run_study(plan, out, 2, console=quiet)
    record = json.loads((cell_of("topk (longer)", 2).folder(out) / "cell.json").read_text())
    assert "training.steps=30" in record["command"] and "training.seed=2" in record["command"]
