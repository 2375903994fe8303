"""A link that becomes slow, a link that is cut, a disk that fills up: what a running job says and does. Ranks that are
gone: test_supervise.py."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from hosts import NAMES
from jobs import DEADLINE, FAULT, finish_all, losses, metrics, on_one_host, torchrun, wait_for_step, wait_until

from dsmoe.training.metrics import read_lines

LIMIT = 6.0  # seconds without progress
SOON = 30.0  # seconds more, on a busy machine


def warned(run_dir: Path, text: str) -> bool:
    return any(text in event.get("text", "") for event in read_lines(run_dir / "events.jsonl"))


def job_over_a_link(hosts, train, name: str, limit: float = LIMIT) -> tuple[Path, list]:
    """15 s without a fault first: what an exchange usually takes is known after 20 steps. So many tokens that exchanges
    are most of what is sent, and a pause in each step, so that they are a small share of it before."""
    steps = [f"training.timeout.step={limit}", "training.steps=100000", "training.global_batch_size=64"]
    run_dir, arguments = train(name, *steps)
    jobs = torchrun(hosts, 1, arguments, PAUSE="0.4")
    wait_for_step(run_dir, 24, jobs)
    return run_dir, jobs


def test_a_lossy_link_is_warned_about_and_the_run_goes_on(hosts, train):
    """20 s: see `job_over_a_link`. What TCP sends again arrives late."""
    run_dir, jobs = job_over_a_link(hosts, train, "lossy", limit=60)
    with hosts.lossy(10):
        wait_until(lambda: warned(run_dir, "is a link slow or lossy?"), "warning", jobs)
    reached = len(metrics(run_dir))
    wait_for_step(run_dir, reached + 5, jobs)
    hosts.kill("nodeA", f"-u\0{FAULT}", signal.SIGTERM)
    assert "stopped by a signal at step" in finish_all(jobs)[0].output


def test_a_slow_link_is_warned_about_and_a_cut_one_told_on_both_sides(hosts, train):
    """30 s: see `job_over_a_link`, then the limit of a step."""
    run_dir, jobs = job_over_a_link(hosts, train, "link")
    with hosts.slow("2mbit"):
        wait_until(lambda: warned(run_dir, "is a link slow or lossy?"), "warning", jobs)
    with hosts.cut():
        until = time.monotonic() + LIMIT + SOON
        while any(hosts.processes(name, f"-u\0{FAULT}") for name in NAMES):
            assert time.monotonic() < until, "ranks that wait"
            time.sleep(0.2)
    ended = finish_all(jobs)  # torchrun waits a minute for its rendezvous, if the link stays cut
    assert all(end.code for end in ended)
    assert "rank 1 on nodeB silent for " in ended[0].output and "cut off" in ended[0].output
    assert "rank 0 on nodeA silent for " in ended[1].output and "cut off" in ended[1].output


def test_a_disk_that_fills_up_loses_logs_then_ends_the_run_at_its_save_and_costs_nothing_else(
    hosts, train, of_one_host
):
    run_dir, arguments = train("small disk", "checkpoint.interval=6")
    run_dir.mkdir(parents=True)
    with hosts.hide("nodeA", run_dir, "8m"):
        there = hosts.path("nodeA", run_dir)
        job = on_one_host(hosts, 2, arguments, PAUSE="0.3")
        wait_for_step(there, 7, [job])
        with open(there / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        ended = job.finish()
        assert ended.code == 1
        assert f"cannot write {run_dir}/metrics.jsonl (No space left on device)" in ended.output
        assert "training continues" in ended.output and "step 12/12" in ended.output
        said = (
            r"CheckpointError: the checkpoint step_00000012 could not be saved \(.*No space left on device.*\); earlier"
        )
        assert re.search(said, ended.output), ended.output
        assert (there / "checkpoints" / "latest").read_text() == "step_00000006"
        (there / "filler").unlink()
        ended = on_one_host(hosts, 2, arguments).finish(2 * DEADLINE)
        assert ended.code == 0, ended.output
        assert "(step 6)" in ended.output and losses(there) == of_one_host
