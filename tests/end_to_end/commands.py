"""Real commands in real processes, each with a deadline, each in a process group that leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 150.0  # seconds; an idle machine needs about 10 for a short run
TRAIN = "launch/train.py"


@dataclass(frozen=True)
class Result:
    code: int
    output: str  # stdout and stderr together
    seconds: float


def run(command: Sequence[str], cwd: Path = ROOT, environment: dict[str, str] | None = None) -> Result:
    return finish(start(command, cwd, environment))


def start(command: Sequence[str], cwd: Path = ROOT, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command as the leader of a process group, as a shell does."""
    return subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, deadline: float = DEADLINE) -> Result:
    """Wait for it; a command past its deadline is killed with all its children and fails the test."""
    began = time.monotonic()
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {deadline:.0f} s: {process.args}\n{output}") from None
    return Result(process.returncode, output, time.monotonic() - began)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def beside_python(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent))


def deepspeed(processes: int | None, *arguments: str) -> list[str]:
    number = [] if processes is None else ["--num_gpus", str(processes)]
    return [beside_python("deepspeed"), "--master_port", str(free_port()), *number, *arguments]


def torchrun(processes: int, *arguments: str) -> list[str]:
    port = str(free_port())
    return [beside_python("torchrun"), "--nproc-per-node", str(processes), "--master-port", port, *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(run_dir)]


def wait_for_steps(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
    """Until so many steps are in metrics.jsonl."""
    until = time.monotonic() + DEADLINE
    while len(metrics(run_dir)) < steps:
        if process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"no step {steps} in {run_dir}: {finish(process, 1).output}")
        time.sleep(0.1)
