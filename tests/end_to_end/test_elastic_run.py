"""Real runs on real data: one that changes its layout on the way, and one that is killed without warning."""

from __future__ import annotations

import os
import signal

import pytest
from commands import TRAIN, finish, forked, metrics, python, start, wait_for_steps

from dsmoe.checkpoint.verify import checkpoints_of, verify_checkpoint

LONG = "training.steps=100000"
SPREAD = ["parallel.expert_parallel=2", "parallel.zero_stage=3"]


def test_another_layout_goes_on_with_the_next_samples(place, config):
    """One process under ZeRO 1, then two with the experts spread over them under ZeRO 3."""
    whole, parts = place / "runs" / "unchanged", place / "runs" / "changed"
    arguments = ["--config", str(config), "training.steps=5", "training.eval_interval=0", "checkpoint.interval=2"]
    for run_dir, processes, options in ((whole, 1, []), (parts, 1, ["training.stop_at=2"]), (parts, 2, SPREAD)):
        result = forked(TRAIN, *arguments, f"logging.run_dir={run_dir}", *options, processes=processes)
        assert result.code == 0, result.output
    lines, expected = metrics(parts), metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for name in ("tokens", "loss", "lambda", "experts_per_token"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], abs=1e-5), name
    for folder in checkpoints_of(parts, every=True):
        assert verify_checkpoint(folder).problems == []


def test_a_run_that_is_killed_goes_on(place, config):
    """It saves after every step, beside training; SIGKILL comes at no particular moment."""
    run_dir = place / "runs" / "killed"
    options = ["--config", str(config), f"logging.run_dir={run_dir}", "training.eval_interval=0", LONG]
    options += ["checkpoint.interval=1", "checkpoint.background=true"]
    process = start(python(TRAIN, *options))
    wait_for_steps(process, run_dir, 8)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    before = metrics(run_dir)
    (newest,) = checkpoints_of(run_dir)
    actual = verify_checkpoint(newest)
    assert actual.problems == []
    step = actual.manifest.step
    assert step >= 5  # one save may be under way, and a step or two may follow before it is complete
    again = forked(TRAIN, *options, f"training.stop_at={step + 3}")
    assert again.code == 0, again.output
    assert f"(step {step})" in again.output
    after = metrics(run_dir)
    assert [line["step"] for line in after] == list(range(1, step + 4))
    repeated = [line["loss"] for line in before[step : step + 3]]
    assert [line["loss"] for line in after[step : step + len(repeated)]] == repeated
