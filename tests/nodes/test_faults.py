"""What happens to one host of a running job is told on the other, in a line and in time."""

from __future__ import annotations

import time

from hosts import NAMES
from jobs import HERE, TRAIN, Ended, finish_all, torchrun, wait_for_step

FAULT = str(HERE / "fault.py")
LIMIT = 6.0  # seconds without progress
SOON = 30.0  # seconds more, on a busy machine


def fail(hosts, train, place, fault: str) -> tuple[list[Ended], float]:
    """Run into a fault: what both hosts printed, and the seconds from fault to end."""
    name = fault.replace(" ", "_")
    _, arguments = train(name, f"training.timeout.step={LIMIT}", script=FAULT)
    log = place / f"{name}.log"
    ended = finish_all(torchrun(hosts, 1, arguments, FAULT=fault, FAULT_LOG=str(log)))
    seconds = time.time() - float(log.read_text())
    assert all(end.code for end in ended)
    return ended, seconds


def test_a_killed_rank_is_named_in_a_line(hosts, train, place):
    ended, seconds = fail(hosts, train, place, "SIGKILL 1 5 all-to-all")
    assert seconds < SOON
    (line,) = [line for line in ended[0].output.splitlines() if "rank 1 on nodeB has gone" in line]
    assert line.startswith("[rank 0] rank 1 on nodeB has gone, in the all-to-all of step 5")
    assert "dsmoe/" not in ended[0].output and "gloo" not in ended[0].output, "a stack trace"


def test_the_end_of_rank_0_is_told_by_the_others(hosts, train, place):
    ended, seconds = fail(hosts, train, place, "SIGKILL 0 5 optimizer")
    assert seconds < SOON
    assert "[rank 1] rank 0 on nodeA has gone, in the " in ended[1].output and "of step 5" in ended[1].output


def test_a_stopped_rank_is_named_after_the_limit_and_ended(hosts, train, place):
    ended, seconds = fail(hosts, train, place, "SIGSTOP 1 4 all-to-all")
    assert "[rank 0] no progress for 6 s (training.timeout.step): rank 1 on nodeB silent for " in ended[0].output
    assert "last heard of in the all-to-all of step 4" in ended[0].output
    assert seconds < LIMIT + SOON


def test_a_cut_link_is_told_on_both_sides(hosts, train):
    run_dir, arguments = train("cut", f"training.timeout.step={LIMIT}", "training.steps=100000")
    jobs = torchrun(hosts, 1, arguments)
    wait_for_step(run_dir, 3, jobs)
    with hosts.cut():
        until = time.monotonic() + LIMIT + SOON
        while any(hosts.processes(name, f"-u\0{TRAIN}") for name in NAMES):
            assert time.monotonic() < until, "ranks that wait"
            time.sleep(0.2)
    ended = finish_all(jobs)  # torchrun waits a minute for its rendezvous, if the link stays cut
    assert "rank 1 on nodeB silent for " in ended[0].output and "cut off" in ended[0].output
    assert "rank 0 on nodeA silent for " in ended[1].output and "cut off" in ended[1].output
