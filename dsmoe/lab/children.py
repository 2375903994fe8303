"""Processes that the lab starts on this machine: benchmark ranks, planner runs, cells of a study.

Each is this Python with arguments, in a process group of its own (Ctrl-C reaches the lab alone, which then stops them
in order), with this package on its path where it is not installed, and with its output in a file.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmoe.parallel.place import free_port
from dsmoe.runtime.device import gpu_count, gpu_model, on_gpu

ROOT = Path(__file__).resolve().parents[2]
IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Child:
    """A process and the file that has its output."""

    process: subprocess.Popen
    log: Path

    def last_lines(self, count: int = 1) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return "\n".join(lines[-count:])

    def signal(self, number: int) -> bool:
        """To the process and all that it started; whether any of them was left."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


def start(
    arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None, *, pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
) -> Child:  # fmt: skip
    """Start this Python with `arguments`; its output is appended to `log`."""
    paths = [str(ROOT)] * IN_CHECKOUT + [path for path in (os.environ.get("PYTHONPATH"),) if path]
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})} | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}),
            start_new_session=True,
            pass_fds=pass_fds,
        )
    return Child(process, log)


def rank_environment(rank: int, ranks: int, port: str) -> dict[str, str]:
    """Of one process of a job on this machine, as a launcher sets it; the cores are shared evenly."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def start_ranks(arguments: Sequence[str], ranks: int, folder: Path, environment: dict[str, str]) -> list[Child]:
    """All ranks of a job, with their logs in `folder`."""
    port = free_port()
    return [
        start(arguments, folder / f"rank{rank}.log", {**rank_environment(rank, ranks, port), **environment})
        for rank in range(ranks)
    ]


def wait_for_ranks(children: list[Child], deadline: float) -> str | None:
    """Wait for all, and stop all as soon as one fails, for which the others would wait. None, or what went wrong."""
    end = time.monotonic() + deadline
    try:
        while any(child.process.poll() is None for child in children) and time.monotonic() < end:
            if any(child.process.poll() not in (None, 0) for child in children):
                break
            time.sleep(POLL_SECONDS)
        for rank, child in enumerate(children):
            if child.process.poll() not in (None, 0):
                return f"rank {rank} ended with {child.process.poll()}: {child.last_lines()[:300]}"
        return f"not done after {deadline:.0f} s" if any(child.process.poll() is None for child in children) else None
    finally:
        for child in children:
            child.kill()


def stop(children: list[Child], seconds: float) -> None:
    """Ask for a checkpoint and an end, and kill what is left after `seconds`."""
    for child in children:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for child in children:
        # A launcher dies at once and leaves its ranks, which save: the group is empty when all of them are done.
        while child.signal(0) and time.monotonic() < deadline:
            child.process.poll()
            time.sleep(POLL_SECONDS)
        child.kill()


def train_command(ranks: int) -> list[str]:
    """`dsmoe train` as this Python runs it, inside and outside a checkout: by the deepspeed launcher, which one process
    does not need."""
    if ranks == 1:
        return ["-m", "dsmoe", "train"]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", free_port()]
    return [*launcher, "--module", "dsmoe", "train"]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """This machine in words."""
    if on_gpu():
        return f"{gpu_count()} x {gpu_model(0)}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names) or cores()} cores of {names[0] if names else platform.processor()}"


def commit() -> str:
    """Of the code that runs; empty outside a repository."""
    if not (ROOT / ".git").exists():  # installed, perhaps somewhere inside another repository
        return ""
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout.strip()
