"""Every launcher over two hosts gives the losses of one host. torchrun's agent is inside sbatch, and under the
supervisor (test_supervise.py). Under mpirun and sbatch ranks start as a user's do, under the others with the libraries
loaded (tests/warm.py)."""

from __future__ import annotations

import re
import signal

import pytest
from jobs import FAULT, TRAIN, Job, finish_all, losses, metrics, mpirun, pdsh, sbatch, srun, wait_for_step


@pytest.mark.parametrize("launcher", [mpirun, srun])
def test_a_rank_on_each_host_and_experts_on_both(launcher, hosts, train, of_one_host):
    """`srun python launch/train.py` brings no rendezvous: it must be one run, not two."""
    run_dir, arguments = train(launcher.__name__, script=TRAIN if launcher is mpirun else FAULT)
    check(launcher(hosts, 1, arguments))
    assert losses(run_dir) == of_one_host


@pytest.mark.parametrize(("launcher", "experts"), [(sbatch, 2), (pdsh, 4)])
def test_two_ranks_on_each_host(launcher, experts, hosts, train, of_one_host):
    """Experts shared inside each host, or by all ranks over both; sums run in another order than on two ranks. How many
    ranks a host gets, sbatch learns from Slurm."""
    dispatcher = "two_level" if experts == 4 else "auto"
    run_dir, arguments = train(
        launcher.__name__, f"parallel.expert_parallel={experts}", f"model.token_dispatcher={dispatcher}"
    )
    output = check(launcher(hosts, 2, arguments))
    assert f"4 processes, expert parallel {experts}" in output
    assert losses(run_dir) == pytest.approx(of_one_host, abs=1e-5)
    said = "every expert-parallel group lies inside a node" if experts == 2 else "(ranks 0+1+2+3): with two_level"
    assert "nodes   4 ranks on nodeA, nodeB; " in output and said in output.replace("\n", " ")
    assert bool(re.search(r"about \d+% of the rows they exchange cross nodes", output.replace("\n", " "))) == (
        experts == 4
    )
    crossed = [line["between_nodes_bytes"] for line in metrics(run_dir)]
    assert (max(crossed) == 0) if experts == 2 else (min(crossed) > 0)


def test_a_batch_job_whose_time_is_up_saves(hosts, train):
    """As train.sbatch asks of Slurm: SIGTERM to every process, some time before."""
    run_dir, arguments = train("time is up", "training.steps=100000", "checkpoint.interval=0")
    jobs = sbatch(hosts, 1, arguments)
    wait_for_step(run_dir, 3, jobs)
    hosts.kill("nodeA", "slurm/srun", signal.SIGTERM)
    (ended,) = finish_all(jobs)
    step = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert f"stopped by a signal at step {step}" in ended.output and len(metrics(run_dir)) == step


def check(jobs: list[Job]) -> str:
    """What the job printed on its first host, once it has succeeded on both."""
    ended = finish_all(jobs)
    assert all(end.code == 0 for end in ended), ended[0].output
    assert "10.77.7.2 (eth0)" in ended[0].output, "the table of hosts"
    return ended[0].output
