"""A run that is stopped, by a signal or by plan, goes on as if it had never stopped."""

from __future__ import annotations

import os
import signal

import pytest
from commands import TRAIN, deepspeed, finish, forked, losses, metrics, python, start, torchrun, wait_for_steps

LONG = "training.steps=100000"  # the schedule of a run that does not end within a test
TWO = ["parallel.expert_parallel=2", "parallel.zero_stage=2"]


def newest_step(run_dir) -> int:
    return int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))


def launch(launcher: str, *arguments: str) -> list[str]:
    if launcher == "python":
        return python(TRAIN, *arguments)
    return (torchrun if launcher == "torchrun" else deepspeed)(2, TRAIN, *arguments, *TWO)


@pytest.mark.parametrize(
    ("launcher", "number"), [("python", signal.SIGINT), ("torchrun", signal.SIGTERM), ("deepspeed", signal.SIGINT)]
)
def test_a_signal_saves_and_the_run_goes_on(launcher, number, place, config):
    run_dir = place / "runs" / f"signal {launcher}"
    rarely = ["checkpoint.interval=0", "training.eval_interval=0"]
    arguments = ["--config", str(config), f"logging.run_dir={run_dir}", *rarely, LONG]
    process = start(launch(launcher, *arguments))
    wait_for_steps(process, run_dir, 3)
    os.killpg(process.pid, number)
    stopped = finish(process)
    if launcher == "python":  # the launchers have exit codes of their own for a signal
        assert stopped.code == 75, stopped.output
    step = newest_step(run_dir)
    assert f"stopped by a signal at step {step}" in stopped.output
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, step + 1))
    before = losses(run_dir)
    processes, layout = (1, []) if launcher == "python" else (2, TWO)
    again = forked(TRAIN, *arguments, *layout, f"training.stop_at={step + 2}", processes=processes)
    assert again.code == 0, again.output
    assert f"(step {step})" in again.output
    assert losses(run_dir)[:step] == before
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, step + 3))


def test_ranks_whose_launcher_is_terminated_save_and_stop(place, config):
    """The deepspeed command itself dies of SIGTERM without a word to its ranks."""
    run_dir = place / "runs" / "orphans"
    options = [f"logging.run_dir={run_dir}", "checkpoint.interval=0", "training.eval_interval=0", LONG]
    process = start(deepspeed(2, TRAIN, "--config", str(config), *options, *TWO))
    wait_for_steps(process, run_dir, 3)
    process.terminate()
    stopped = finish(process)  # waits for the ranks too: they hold its output
    step = newest_step(run_dir)
    assert f"stopped by a signal at step {step}" in stopped.output
    assert metrics(run_dir)[-1]["step"] == step


def test_in_parts_equals_in_one_go(place, config):
    """On the same layout to the last digit of metrics.jsonl."""
    whole, parts = place / "runs" / "whole", place / "runs" / "parts"
    arguments = ["--config", str(config), "training.steps=5", "training.eval_interval=0", *TWO]
    arguments += ["training.expert_lr=load", "training.revive_idle_experts=2"]
    for run_dir, more in ((whole, []), (parts, ["training.stop_at=2"]), (parts, [])):
        result = forked(TRAIN, *arguments, f"logging.run_dir={run_dir}", *more, processes=2)
        assert result.code == 0, result.output
    ignored = {
        "seconds", "seconds_by_part", "tokens_per_second", "peak_memory_bytes", "exchange_share", "effective_time",
        "recovery_seconds",
    }  # fmt: skip
    for line, expected in zip(metrics(parts), metrics(whole), strict=True):
        extra = set() if "val_loss" in expected else {name for name in line if name.startswith("val_")}
        kept = line.keys() - ignored - extra
        assert {name: line[name] for name in kept} == {name: expected[name] for name in expected.keys() - ignored}
