"""Processes of the lab: a failed rank ends its job, a run is asked before it is killed, and output is kept."""

from __future__ import annotations

import time

import pytest

from dsmoe.lab.children import ROOT, start, start_ranks, stop, wait_for_ranks

RANK = "import os, sys, time; rank = int(os.environ['RANK']); print('rank', rank, 'of', os.environ['WORLD_SIZE']); "


def test_a_rank_that_fails_ends_the_others(tmp_path):
    script = RANK + "rank == 1 and sys.exit('the disk is full'); time.sleep(60)"
    children = start_ranks(["-c", script], 3, tmp_path, {})
    began = time.monotonic()
    assert wait_for_ranks(children, 50) == "rank 1 ended with 1: the disk is full"
    assert time.monotonic() - began < 40 and all(child.process.poll() is not None for child in children)


def test_ranks_that_end_well_leave_their_output(tmp_path):
    children = start_ranks(["-c", RANK + "print(os.environ['EXTRA'])"], 2, tmp_path, {"EXTRA": "more"})
    assert wait_for_ranks(children, 60) is None
    assert [(tmp_path / f"rank{rank}.log").read_text().split("\n")[:2] for rank in range(2)] == [
        ["rank 0 of 2", "more"], ["rank 1 of 2", "more"]
    ]  # fmt: skip
    assert children[1].last_lines(2) == "rank 1 of 2\nmore"


def test_a_job_that_takes_too_long_is_ended(tmp_path):
    children = start_ranks(["-c", "import time; time.sleep(60)"], 2, tmp_path, {})
    assert wait_for_ranks(children, 0.3) == "not done after 0 s"
    assert all(child.process.poll() is not None for child in children)


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_is_asked_to_stop_and_killed_when_it_does_not(tmp_path, saves):
    answer = "(print('saved', flush=True), sys.exit(0))" if saves else "None"
    script = (
        f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: {answer}); print('ready', flush=True); "
    )
    child = start(["-c", script + "[time.sleep(0.1) for _ in range(600)]"], tmp_path / "log")
    while "ready" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    stop([child], 30 if saves else 0.5)
    assert child.process.poll() == (0 if saves else -9)
    assert ("saved" in (tmp_path / "log").read_text()) == saves


def test_a_child_runs_this_package(tmp_path):
    child = start(["-c", "import os; print(os.environ['PYTHONPATH'])"], tmp_path / "log")
    assert child.process.wait(60) == 0
    assert child.last_lines().startswith(str(ROOT))
