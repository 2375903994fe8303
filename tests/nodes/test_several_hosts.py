"""Every launcher over two hosts gives the losses of one host."""

from __future__ import annotations

import pytest
from jobs import finish_all, losses, mpirun, on_one_host, pdsh, sbatch, torchrun

STEPS = 6


@pytest.fixture(scope="module")
def of_two(hosts, train) -> list[float]:
    """Losses of two ranks on one host that share the experts."""
    return reference(hosts, train, 2)


def reference(hosts, train, ranks: int, *overrides: str) -> list[float]:
    run_dir, arguments = train(f"one host, {ranks} {overrides}", *overrides)
    ended = on_one_host(hosts, ranks, arguments).finish()
    assert ended.code == 0, ended.output
    assert len(losses(run_dir)) == STEPS
    return losses(run_dir)


@pytest.mark.parametrize("launcher", ["pdsh", "torchrun", "mpirun", "sbatch"])
def test_experts_on_both_hosts_give_the_losses_of_one_host(launcher, hosts, train, of_two):
    run_dir, arguments = train(launcher)
    if launcher == "torchrun":
        jobs = torchrun(hosts, 1, arguments)
    elif launcher == "sbatch":
        jobs = [sbatch(hosts, arguments)]
    else:
        jobs = [{"pdsh": pdsh, "mpirun": mpirun}[launcher](hosts, 1, arguments)]
    ended = finish_all(jobs)
    assert all(end.code == 0 for end in ended), ended[0].output
    assert losses(run_dir) == of_two


@pytest.mark.parametrize("experts", [2, 4])
def test_two_ranks_a_host(experts, hosts, train):
    """Experts shared inside each host, or by all four ranks over both."""
    ep = f"parallel.expert_parallel={experts}"
    run_dir, arguments = train(f"2x2 {experts}", ep)
    ended = pdsh(hosts, 2, arguments).finish()
    assert ended.code == 0, ended.output
    assert losses(run_dir) == pytest.approx(reference(hosts, train, 4, ep), abs=1e-6)
