"""Commands in processes of their own, each with a deadline, each in a process group that leaves nothing behind.

`run` starts a program as a shell does. `forked` runs one of our scripts in processes that have the libraries loaded
already (`forked.py`), which costs a tenth of a second instead of five: for tests of what a command does, and not of how
it is started.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

import torch
import warm
from forked import context

from dsmoe.parallel.place import free_port

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 400.0  # seconds: of a hang, not of a busy machine; an idle one needs about 10 for a short run
TRAIN = "launch/train.py"
PYTHON = "DSMOE_TEST_PYTHON"  # what a forked process takes for its Python


@dataclass(frozen=True)
class Result:
    code: int
    output: str  # stdout and stderr together
    seconds: float


# What a group of processes in this one has set: a command is not one of them.
PLACE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in PLACE}


def run(command: Sequence[str], cwd: Path = ROOT, environment: dict[str, str] | None = None) -> Result:
    return finish(start(command, cwd, environment))


def start(command: Sequence[str], cwd: Path = ROOT, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command as the leader of a process group, as a shell does."""
    return subprocess.Popen(
        command, cwd=cwd, env={**inherited(), **(environment or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
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


def forked(
    *arguments: str,
    processes: int = 1,
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
    without: str | None = None,
    loaded: bool = False,
) -> Result:
    """Run `python script.py argument...` in a process that has the libraries loaded; or in several, as torchrun does.
    `without`: a package that cannot be imported there. `loaded`: what it starts with its own Python has the libraries
    loaded as well.

    The code is that of the first process that fails, or 0. What of the environment is read while a library is imported
    has no effect here.
    """
    began, port = time.monotonic(), free_port()
    variables = {**inherited(), **(environment or {}), **(loaded_programs() if loaded else {})}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "output")
        log.touch()
        ranks = []
        for rank in range(processes):
            mine = variables if processes == 1 else variables | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            ranks.append(context.Process(target=_run_script, args=(arguments, mine, cwd, log, without)))
            ranks[-1].start()
        try:
            code = _first_failure(ranks, began + DEADLINE)
        finally:
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):  # with what it started itself
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        output = log.read_text(errors="replace")
    assert code is not None, f"not done after {DEADLINE:.0f} s: {arguments}\n{output}"
    return Result(code, output, time.monotonic() - began)


@functools.cache
def _server() -> str:
    """Of this test process: its address."""
    address = f"dsmoe warm {os.getpid()}"
    _servers.append(warm.serve(address))
    return address


_servers: list = []  # live as long as this process


@functools.cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return folder


def loaded_programs(folder: Path | None = None) -> dict[str, str]:
    """Make `python`, `deepspeed` and `torchrun`, whose processes have the libraries loaded, in a folder.

    Returns the environment in which they are that, and in which a forked process takes this python for its own.
    """
    folder = folder or _own_folder()
    python = [sys.executable, "-S", "-E", warm.__file__]
    launchers = {name: [*python, str(beside_python(name))] for name in ("deepspeed", "torchrun")}
    for name, command in {"python": python, **launchers}.items():
        program = folder / name
        program.unlink(missing_ok=True)
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        program.chmod(0o755)
    return {warm.NAME: _server(), PYTHON: str(folder / "python")}


def run_loaded(command: list[str]) -> Result:
    """`run` for a launcher: it and what it starts have the libraries loaded."""
    environment = loaded_programs()
    folder = Path(environment[PYTHON]).parent
    return run([str(folder / Path(command[0]).name), *command[1:]], environment=environment)


def _first_failure(processes: list, end: float) -> int | None:
    """The exit code of the first process that fails, 0 if none does, None if one is not done in time."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = wait(list(running), timeout=max(0.0, end - time.monotonic()))
        if not ended:
            return None
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return process.exitcode
    return 0


def _run_script(
    arguments: tuple[str, ...], environment: dict[str, str], cwd: Path, log: Path, without: str | None
) -> None:
    os.setsid()
    with open(log, "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.dump_traceback_later(DEADLINE - 5, file=sys.stderr)
    if without:
        for name in [name for name in sys.modules if name.split(".")[0] == without]:
            del sys.modules[name]
        sys.modules[without] = None  # type: ignore[assignment]  # whoever imports it fails
    run_in_this_process(arguments, environment, cwd)


def run_in_this_process(arguments: Sequence[str], environment: dict[str, str], cwd: Path | str) -> NoReturn:
    """Be `python argument...`: a script, -m MODULE or -c PROGRAM. For a process that was forked for it."""
    gc.freeze()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.executable = environment.get(PYTHON, sys.executable)
    script, *rest = arguments
    program = rest.pop(0) if script in ("-c", "-m") else None
    sys.argv = [script, *rest]
    sys.path[:0] = [
        "" if program else str(Path(script).resolve().parent),
        *filter(None, environment.get("PYTHONPATH", "").split(":")),
    ]
    if (signals := sys.modules.get("dsmoe.runtime.signals")) is not None:  # it is not where dsmoe may not be imported
        importlib.reload(signals)  # notes who started this process
    code: int | str | None
    try:
        if script == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        elif script == "-c":
            exec(program, {"__name__": "__main__"})
        else:
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def beside_python(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent))


def deepspeed(processes: int | None, *arguments: str) -> list[str]:
    number = [] if processes is None else ["--num_gpus", str(processes)]
    return [beside_python("deepspeed"), "--master_port", free_port(), *number, *arguments]


def torchrun(processes: int, *arguments: str) -> list[str]:
    port = free_port()
    return [beside_python("torchrun"), "--nproc-per-node", str(processes), "--master-port", port, *arguments]


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
