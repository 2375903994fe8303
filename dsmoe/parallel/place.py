"""Which process of a job this is: under torchrun, the deepspeed launcher, mpirun, Slurm's srun, or alone."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from dsmoe.errors import ParallelError

MPI_MARKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Place:
    """This process in its job.

    Attributes:
        local_rank: among the job's processes on this host.
        launcher: in words, for messages.
    """

    rank: int
    world: int
    local_rank: int
    host: str
    launcher: str


def find_place() -> Place:
    """Find out, and set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher has not; of srun's
    tasks also LOCAL_WORLD_SIZE, by which ranks share the cores of their host.

    Under mpirun it is collective. A process that nobody launched is a job of one and needs no MPI library.

    Raises:
        ParallelError: the launcher says too little, or MPI's library is missing.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "a launcher"
    elif _of_mpi():
        launcher = "mpirun"
        _ask_mpi()
    elif int(os.environ.get("SLURM_NTASKS") or 1) > 1:
        launcher = "srun"
        _ask_slurm()
    else:
        launcher = "none"
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", free_port())
    return Place(
        rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")), host=socket.gethostname(), launcher=launcher,
    )  # fmt: skip


def free_port() -> str:
    """A TCP port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _of_mpi() -> bool:
    """srun sets PMI's variables too, also for tasks that have nothing to do with MPI."""
    marked = any(mark in os.environ for mark in MPI_MARKS)
    return "OMPI_COMM_WORLD_SIZE" in os.environ or (marked and "SLURM_PROCID" not in os.environ)


def _ask_mpi() -> None:
    from deepspeed.comm import mpi_discovery

    try:
        mpi_discovery(distributed_port=int(os.environ.get("MASTER_PORT") or DEFAULT_PORT), verbose=False)
    except (ImportError, RuntimeError) as error:
        if "libmpi" not in str(error):
            raise
        raise ParallelError(
            "this process was started by an MPI launcher, but no MPI library can be loaded "
            f"({error}); install one with: pip install 'dsmoe[mpi]'"
        ) from error


def _ask_slurm() -> None:
    """Tasks of one srun: Slurm numbers them and names their hosts, of which the first is where they meet."""
    environ = os.environ
    tasks = environ["SLURM_NTASKS"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if "SLURM_PROCID" not in environ or not nodes:
        missing = "SLURM_PROCID" if "SLURM_PROCID" not in environ else "SLURM_STEP_NODELIST"
        raise ParallelError(
            f"SLURM_NTASKS is {tasks}, but {missing} is not set, so these processes cannot find each other and each "
            f"would train a copy of the model. Start them with srun, or one torchrun a node as in "
            f"launch/slurm/train.sbatch, or unset SLURM_NTASKS to train in one process"
        )
    job = int(environ.get("SLURM_JOB_ID") or 0) * 7 + int(environ.get("SLURM_STEP_ID") or 0)
    variables = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(20000 + job % 20000),  # two jobs may share a node
    }
    per_node = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "")
    node = int(environ.get("SLURM_NODEID") or len(per_node))
    if node < len(per_node):
        variables["LOCAL_WORLD_SIZE"] = str(per_node[node])
    for name, value in variables.items():
        environ.setdefault(name, value)


def tasks_per_node(counts: str) -> list[int]:
    """Of Slurm's text for them, such as `8(x3),4`."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts, such as `gpu[007-010,012],login1`."""
    first = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodes)
