"""What happens to one host of a running job is said on the other, and costs no more than a restart."""

from __future__ import annotations

import time

import pytest
from jobs import HERE, Ended, finish_all, losses, on_one_host, torchrun, wait_for_step

FAULT = str(HERE / "fault.py")
SOON = 30.0  # seconds in which a job ends after its fault or timeout, on a busy machine
QUICK = ["training.timeout.step=6", "checkpoint.interval=2"]


@pytest.fixture(scope="module")
def undisturbed(hosts, train) -> list[float]:
    run_dir, arguments = train("undisturbed")
    assert on_one_host(hosts, 2, arguments).finish().code == 0
    return losses(run_dir)


def fail(hosts, train, place, fault: str) -> tuple[list[Ended], list[str], float]:
    """Run into a fault: what both hosts printed, the arguments to go on with, and seconds from fault to end."""
    name = fault.replace(" ", "_")
    _, arguments = train(name, *QUICK, script=FAULT)
    log = place / f"{name}.log"
    ended = finish_all(torchrun(hosts, 1, arguments, FAULT=fault, FAULT_LOG=str(log)))
    seconds = time.time() - float(log.read_text())
    assert all(end.code for end in ended)
    return ended, arguments, seconds


def check_resumes(hosts, train, fault: str, undisturbed) -> None:
    run_dir, arguments = train(fault.replace(" ", "_"))
    ended = finish_all(torchrun(hosts, 1, arguments))
    assert all(end.code == 0 for end in ended), ended[0].output
    assert losses(run_dir) == undisturbed


@pytest.mark.parametrize("phase", ["all-to-all", "forward pass"])
def test_a_killed_rank_is_named_in_a_line(phase, hosts, train, place, undisturbed):
    fault = f"SIGKILL 1 5 {phase}"
    ended, _, seconds = fail(hosts, train, place, fault)
    assert seconds < SOON
    (line,) = [line for line in ended[0].output.splitlines() if "rank 1 on nodeB has gone" in line]
    assert line.startswith("[rank 0]") and "of step 5" in line
    if phase == "all-to-all":
        assert "in the all-to-all of step 5" in line
    assert "dsmoe/" not in ended[0].output and "gloo" not in ended[0].output, "a stack trace"
    check_resumes(hosts, train, fault, undisturbed)


def test_the_end_of_rank_0_is_told_by_the_others(hosts, train, place):
    ended, _, seconds = fail(hosts, train, place, "SIGKILL 0 5 optimizer")
    assert seconds < SOON
    assert "[rank 1] rank 0 on nodeA has gone, in the " in ended[1].output and "of step 5" in ended[1].output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_after_the_step_timeout(rank, hosts, train, place):
    ended, _, seconds = fail(hosts, train, place, f"SIGSTOP {rank} 4 all-to-all")
    name = f"rank {rank} on {'nodeA' if rank == 0 else 'nodeB'} silent for "
    assert name in ended[1 - rank].output and "the all-to-all of step 4" in ended[1 - rank].output
    assert seconds < 6 + 2 * SOON  # torchrun kills the stopped process 30 s after it asked it to end


def test_a_cut_link_is_told_on_both_sides(hosts, train):
    run_dir, arguments = train("cut", *QUICK, "training.steps=100000")
    jobs = torchrun(hosts, 1, arguments)
    wait_for_step(run_dir, 3, jobs)
    with hosts.cut():
        ended = finish_all(jobs, 6 + 2 * SOON)
    assert "rank 1 on nodeB silent for " in ended[0].output and "cut off" in ended[0].output
    assert "rank 0 on nodeA silent for " in ended[1].output and "cut off" in ended[1].output
