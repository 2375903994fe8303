"""Every launcher over two hosts gives the losses of one host."""

from __future__ import annotations

import pytest
from jobs import finish_all, losses, mpirun, on_one_host, pdsh, sbatch, srun, torchrun

LAUNCHERS = {"torchrun": torchrun, "pdsh": pdsh, "mpirun": mpirun, "sbatch": sbatch, "srun": srun}


@pytest.fixture(scope="module")
def of_one_host(hosts, train) -> list[float]:
    """Losses of two ranks on one host that share the experts."""
    run_dir, arguments = train("one host")
    ended = on_one_host(hosts, 2, arguments).finish()
    assert ended.code == 0, ended.output
    assert len(losses(run_dir)) == 6
    return losses(run_dir)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_experts_on_both_hosts_give_the_losses_of_one_host(launcher, hosts, train, of_one_host):
    """One rank a host. `srun python launch/train.py` brings no rendezvous: it must be one run, not two."""
    run_dir, arguments = train(launcher)
    ended = finish_all(LAUNCHERS[launcher](hosts, 1, arguments))
    assert all(end.code == 0 for end in ended), ended[0].output
    assert "10.77.7.2 (eth0)" in ended[0].output, "the table of the hosts"
    assert losses(run_dir) == of_one_host


@pytest.mark.parametrize("experts", [2, 4])
def test_two_ranks_a_host(experts, hosts, train, of_one_host):
    """Experts shared inside each host, or by all four ranks over both; sums run in another order than on two ranks."""
    run_dir, arguments = train(f"2x2 {experts}", f"parallel.expert_parallel={experts}")
    (ended,) = finish_all(pdsh(hosts, 2, arguments))
    assert ended.code == 0, ended.output
    assert losses(run_dir) == pytest.approx(of_one_host, abs=1e-5)
