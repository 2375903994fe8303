"""Which process of a job this is, from what launchers leave in the environment."""

from __future__ import annotations

import os

import pytest

from dsmoe.errors import ParallelError
from dsmoe.parallel.place import find_place, first_host, tasks_per_node

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Nobody's process; whatever is set in the test goes again."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith(("SLURM", "PMI", "OMPI")))]:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name in VARIABLES:
        os.environ.pop(name, None)


def test_a_process_nobody_launched_is_alone(environment):
    place = find_place()
    assert (place.rank, place.world, place.launcher) == (0, 1, "none")
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and 0 < int(os.environ["MASTER_PORT"]) < 2**16


def test_the_tasks_of_srun_find_each_other(environment):
    slurm = {"NTASKS": "4", "PROCID": "3", "LOCALID": "1", "JOB_ID": "4711", "STEP_NODELIST": "gpu[07-08]"}
    for name, value in slurm.items():
        environment.setenv(f"SLURM_{name}", value)
    environment.setenv("PMI_SIZE", "4")  # srun sets it too
    place = find_place()
    assert (place.rank, place.world, place.local_rank, place.launcher) == (3, 4, 1, "srun")
    assert os.environ["MASTER_ADDR"] == "gpu07"
    port = os.environ["MASTER_PORT"]
    assert 20000 <= int(port) < 40000
    for name in VARIABLES:
        os.environ.pop(name, None)
    environment.setenv("SLURM_PROCID", "0")
    find_place()
    assert os.environ["MASTER_PORT"] == port


@pytest.mark.parametrize(("per_node", "tasks"), [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,3(x2)", [1, 3, 3])])
def test_slurm_says_how_many_tasks_a_node_has(per_node, tasks, environment):
    assert tasks_per_node(per_node) == tasks
    slurm = {"NTASKS": str(sum(tasks)), "PROCID": "0", "STEP_NODELIST": "a", "TASKS_PER_NODE": per_node}
    for name, value in {**slurm, "NODEID": str(len(tasks) - 1)}.items():
        environment.setenv(f"SLURM_{name}", value)
    find_place()
    assert os.environ["LOCAL_WORLD_SIZE"] == str(tasks[-1])


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_NODELIST"])
def test_tasks_that_cannot_find_each_other_are_refused(missing, environment):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a,b"}.items():
        if name != missing:
            environment.setenv(name, value)
    with pytest.raises(ParallelError, match=f"SLURM_NTASKS is 2, but {missing} is not set"):
        find_place()


def test_one_task_of_slurm_is_alone(environment):
    environment.setenv("SLURM_NTASKS", "1")
    assert find_place().world == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[007-010,012],login1", "gpu007"), ("r[1-2]n[3,5]", "r1n3"), ("node[A-B]", "nodeA"),
     ("x-[4]-ib", "x-4-ib")],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first
