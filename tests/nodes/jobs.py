"""The launchers' command lines for a job over the two hosts, and what a run left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hosts import NAMES, Hosts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BIN = Path(sys.executable).parent
TRAIN = "launch/train.py"
FAULT = str(HERE / "fault.py")
WARM = [sys.executable, str(ROOT / "tests" / "warm.py")]  # python, with the libraries loaded
TORCHRUN = [*WARM, str(BIN / "torchrun")]
DEADLINE = 140.0  # seconds; an idle machine needs about 10 for a short run


@dataclass(frozen=True)
class Ended:
    code: int
    lines: list[tuple[float, str]]  # of stdout and stderr together, and when they came

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    def when(self, text: str) -> float:
        """The time, as `time.time`, of the first line with that text."""
        return next(at for at, line in self.lines if text in line)


class Job:
    """A command that runs on one host, in a session of its own.

    Args:
        environment: beside that of the tests.
    """

    def __init__(self, hosts: Hosts, host: str, arguments: list[str], **environment: str):
        self.hosts, self.host = hosts, host
        variables = {
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TERM": "dumb",
            "PATH": f"{BIN}:{os.environ['PATH']}", **environment,
        }  # fmt: skip
        self.process = subprocess.Popen(
            hosts.command(host, *arguments), cwd=ROOT, env={**os.environ, **variables}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.time(), line))

    def finish(self, deadline: float = DEADLINE) -> Ended:
        """Wait for it; past the deadline (seconds) it is killed, and the test fails."""
        self._reader.join(deadline)
        late = self._reader.is_alive()
        if late:
            self.kill()
            self._reader.join(10)
        ended = Ended(self.process.wait(), self.lines)
        assert not late, f"not done after {deadline:.0f} s on {self.host}:\n{ended.output}"
        return ended

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        for host in NAMES:
            self.hosts.kill(host, "python", but="forkserver")  # its children end with what it started them for


def torchrun(hosts: Hosts, slots: int, arguments: list[str], *options: str, **environment: str) -> list[Job]:
    """torchrun on both hosts, which meet at nodeA."""
    port = free_port()
    command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", str(slots), "--rdzv-backend", "c10d"]
    command += ["--rdzv-id", str(port), "--rdzv-endpoint", f"nodeA:{port}", *options, *arguments]
    return [Job(hosts, name, command, **environment) for name in NAMES]


def on_one_host(hosts: Hosts, slots: int, arguments: list[str], **environment: str) -> Job:
    port = str(free_port())
    command = [*TORCHRUN, "--nproc-per-node", str(slots), "--master-port", port, *arguments]
    return Job(hosts, "nodeA", command, **environment)


def pdsh(hosts: Hosts, slots: int, arguments: list[str]) -> list[Job]:
    """The deepspeed command on nodeA, which starts both hosts by ssh and hands on what its environment file says."""
    hostfile = hosts.folder / f"hostfile.{slots}"
    hostfile.write_text("".join(f"{name} slots={slots}\n" for name in NAMES))
    (hosts.folder / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    command = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--launcher", "pdsh", "--master_port"]
    command += [str(free_port()), *arguments]
    return [Job(hosts, "nodeA", command, DS_ENV_FILE=str(hosts.folder / "deepspeed_env"))]


def mpirun(hosts: Hosts, slots: int, arguments: list[str]) -> list[Job]:
    command = [str(BIN / "mpirun"), "--allow-run-as-root", "--prefix", str(BIN.parent), "-n", str(2 * slots)]
    command += ["--host", ",".join(f"{name}:{slots}" for name in NAMES)]
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "PATH"):
        command += ["-x", name]
    return [Job(hosts, "nodeA", [*command, "-x", f"MASTER_PORT={free_port()}", sys.executable, *arguments])]


def sbatch(hosts: Hosts, slots: int, arguments: list[str]) -> list[Job]:
    """The batch script, as Slurm starts it on the first host. tests/nodes/slurm has stand-ins for scontrol and srun."""
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[A-B]", "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(free_port()), "SLURM_GPUS_PER_NODE": f"h100:{slots}", "STAND_INS": str(hosts.folder),
        "PATH": f"{HERE / 'slurm'}:{BIN}:{os.environ['PATH']}",
    }  # fmt: skip
    return [Job(hosts, "nodeA", ["bash", "launch/slurm/train.sbatch", *arguments[1:]], **slurm)]


def srun(hosts: Hosts, slots: int, arguments: list[str]) -> list[Job]:
    """The tasks of one srun, which know of each other only what Slurm tells them; one a host."""
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "node[A-B]"}
    return [
        Job(hosts, host, [sys.executable, *arguments], SLURM_PROCID=str(rank), SLURM_LOCALID="0", **common)
        for rank, host in enumerate(NAMES)
    ]


def finish_all(jobs: list[Job], deadline: float = DEADLINE) -> list[Ended]:
    """Wait for all of them, together."""
    until = time.monotonic() + deadline
    try:
        return [job.finish(max(1.0, until - time.monotonic())) for job in jobs]
    finally:
        for job in jobs:
            if job.process.poll() is None:
                job.kill()
                job.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> list[float]:
    """Of every step, which must be there once."""
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def wait_for_step(run_dir: Path, step: int, jobs: list[Job]) -> None:
    wait_until(lambda: len(metrics(run_dir)) >= step, f"step {step} in {run_dir}", jobs)


def wait_until(holds: Callable[[], bool], what: str, jobs: list[Job], deadline: float = DEADLINE) -> None:
    """While all jobs run."""
    until = time.monotonic() + deadline
    while not holds():
        if time.monotonic() > until or any(job.process.poll() is not None for job in jobs):
            ended = [job.finish(1) for job in jobs]
            raise AssertionError(f"no {what}:\n" + "\n".join(end.output for end in ended))
        time.sleep(0.05)
