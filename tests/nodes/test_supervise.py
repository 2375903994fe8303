"""A supervised run goes on by itself: after a failure, on the hosts that are left, and after a save that takes long."""

from __future__ import annotations

import signal
import sys

import pytest
from hosts import NAMES
from jobs import DEADLINE, HERE, Job, finish_all, free_port, losses, on_one_host, wait_for_step

FAULT = str(HERE / "fault.py")


def supervise(hosts, arguments: list[str], *options: str, **environment: str) -> list[Job]:
    """A supervisor on each host."""
    port = free_port()
    command = [sys.executable, "launch/supervise.py", "--rendezvous", ",".join(f"{name}:{port}" for name in NAMES)]
    command += ["--run-id", str(port), "--backoff", "1", *options, *arguments]
    return [Job(hosts, name, command, **environment) for name in NAMES]


@pytest.fixture(scope="module")
def undisturbed(hosts, train) -> list[float]:
    run_dir, arguments = train("undisturbed", "training.steps=12")
    assert on_one_host(hosts, 2, arguments).finish().code == 0
    return losses(run_dir)


@pytest.mark.timeout(400)
def test_ranks_that_are_gone_cost_a_restart_each(hosts, train, place, undisturbed):
    """One is killed, one is stopped; the losses are those of a run that nothing happened to."""
    faults = "SIGKILL 1 5 forward pass;SIGSTOP 0 8 all-to-all"
    run_dir, arguments = train("supervised", "training.steps=12", "training.timeout.step=6", script=FAULT)
    jobs = supervise(hosts, arguments, "--nnodes", "2", FAULT=faults, FAULT_LOG=str(place / "faults"))
    ended = finish_all(jobs, 2.5 * DEADLINE)  # three starts
    assert all(end.code == 0 for end in ended), ended[0].output
    for attempt, step in ((1, 3), (2, 6)):
        assert f"supervisor: attempt {attempt} ended with 1 after" in ended[0].output
        assert f"(step {step})" in ended[0].output
    assert losses(run_dir) == undisturbed


@pytest.mark.timeout(400)
def test_the_last_host_goes_on_alone(hosts, train, undisturbed):
    """The host where all met is gone: the other one takes over the rendezvous, and all experts."""
    run_dir, arguments = train("last host", "training.steps=12", "logging.interval=1", script=FAULT)
    jobs = supervise(hosts, arguments, "--nnodes", "1:2", PAUSE="0.5")
    wait_for_step(run_dir, 7, jobs)
    hosts.power_off("nodeA")
    try:
        ended = jobs[1].finish(2 * DEADLINE)
    finally:
        hosts.boot("nodeA")
    assert ended.code == 0, ended.output
    assert "2 processes, expert parallel 2" in jobs[0].process.communicate()[0]
    assert "1 process, expert parallel 1" in ended.output and "(step 6)" in ended.output
    assert losses(run_dir) == pytest.approx(undisturbed, abs=1e-5)


def test_a_save_of_35_seconds_survives_the_request_to_stop(hosts, train):
    """torchrun alone kills ranks 30 s after it has asked them to end."""
    run_dir, arguments = train("slow save", "training.steps=100000", "checkpoint.interval=0", script=FAULT)
    jobs = supervise(hosts, arguments, "--nnodes", "2", "--grace", "90", SLOW_SAVE="35")
    wait_for_step(run_dir, 3, jobs)
    for name in NAMES:
        hosts.kill(name, "launch/supervise.py", signal.SIGTERM)
    ended = finish_all(jobs)
    step = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert f"stopped by a signal at step {step}" in ended[0].output
    assert losses(run_dir)[step - 1 :] != []
