"""A supervised run goes on by itself: after a failure, on the hosts that are left, and after a save that takes long."""

from __future__ import annotations

import signal

import pytest
from hosts import NAMES
from jobs import DEADLINE, WARM, Job, finish_all, free_port, losses, metrics, wait_for_step

from dsmoe.runtime.exit_codes import STOPPED

LIMIT = 6  # seconds without progress
SOON = 30.0  # seconds more, on a busy machine


def supervise(hosts, arguments: list[str], *options: str, **environment: str) -> list[Job]:
    """A supervisor on each host."""
    port = free_port()
    command = [*WARM, "launch/supervise.py", "--rendezvous", ",".join(f"{name}:{port}" for name in NAMES)]
    command += ["--run-id", str(port), "--backoff", "1", *options, *arguments]
    return [Job(hosts, name, command, **environment) for name in NAMES]


@pytest.mark.timeout(600)
def test_ranks_that_are_gone_are_named_in_a_line_and_cost_a_restart_each(hosts, train, place, of_one_host):
    """Two are killed and one is stopped; the losses are those of a run that nothing happened to. Four starts."""
    faults = ("SIGKILL 1 5 all-to-all", "SIGKILL 0 8 optimizer", "SIGSTOP 1 11 all-to-all")
    run_dir, arguments = train("supervised", f"training.timeout.step={LIMIT}")
    jobs = supervise(hosts, arguments, "--nnodes", "2", FAULT=";".join(faults), FAULT_LOG=str(place / "faults"))
    ended = finish_all(jobs, 3.5 * DEADLINE)
    assert all(end.code == 0 for end in ended), ended[0].output
    for number, allowed in enumerate((SOON, SOON, LIMIT + SOON)):
        happened = float((place / f"faults{number or ''}").read_text())
        assert ended[0].when(f"supervisor: attempt {number + 1} ended with 1 after") - happened < allowed
        assert f"(step {3 * number + 3})" in ended[0].output
    output = ended[0].output
    (line,) = [line for line in output.splitlines() if "rank 1 on nodeB has gone" in line]
    assert line.startswith("[rank 0] rank 1 on nodeB has gone, in the all-to-all of step 5")
    assert "dsmoe/" not in output and "gloo" not in output, "a stack trace"
    assert "[rank 1] rank 0 on nodeA has gone, in the " in ended[1].output and "of step 8" in ended[1].output
    assert "[rank 0] no progress for 6 s (training.timeout.step): rank 1 on nodeB silent for " in output
    assert "last heard of in the all-to-all of step 11" in output
    assert losses(run_dir) == of_one_host
    # What it cost, over all restarts, in the metrics and at the end.
    lines = metrics(run_dir)
    assert [line["step"] for line in lines if "recovery_seconds" in line] == [4, 7, 10]
    assert 0 < lines[-1]["effective_time"] < 0.9
    assert "; 3 restarts, " in ended[0].output and "steps done again" in ended[0].output
    assert "supervisor: 4 attempts; recovered in " in ended[0].output


@pytest.mark.timeout(400)
def test_the_last_host_goes_on_alone(hosts, train, of_one_host):
    """The host where all met is gone: the other one takes over the rendezvous, and all experts. More than 20 s: it
    waits for the first host to come back, then for the run folder's owner to be dead."""
    run_dir, arguments = train("last host", "logging.interval=1")
    jobs = supervise(hosts, arguments, "--nnodes", "1:2", "--last-call", "4", PAUSE="0.3", HURRY="1")
    wait_for_step(run_dir, 7, jobs)
    hosts.power_off("nodeA")
    try:
        ended = jobs[1].finish(2 * DEADLINE)
    finally:
        hosts.boot("nodeA")
    assert ended.code == 0, ended.output
    assert "2 processes, expert parallel 2" in jobs[0].finish().output
    assert "1 process, expert parallel 1" in ended.output and "(step 6)" in ended.output
    assert losses(run_dir) == pytest.approx(of_one_host, abs=1e-5)


def test_a_save_that_torchrun_would_not_wait_for_survives_the_request_to_stop(hosts, train):
    """torchrun alone kills ranks 30 s after it has asked them to end; here after 2 s."""
    run_dir, arguments = train("slow save", "training.steps=100000", "checkpoint.interval=0")
    slow = {"SLOW_SAVE": "6", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    jobs = supervise(hosts, arguments, "--nnodes", "2", "--grace", "90", **slow)
    wait_for_step(run_dir, 3, jobs)
    for name in NAMES:
        hosts.kill(name, "launch/supervise.py", signal.SIGTERM, but="nsenter")  # which has the exit code
    ended = finish_all(jobs)
    step = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert f"stopped by a signal at step {step}" in ended[0].output
    assert [host.code for host in ended] == [STOPPED, STOPPED]
    assert not any("Traceback" in host.output for host in ended)
    assert losses(run_dir)[step - 1 :] != []
