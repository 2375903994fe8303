"""Run a function on real gloo ranks, with a deadline: a hang is a failure that names the ranks and where they wait.

Ranks are forked from a server that has torch, DeepSpeed and Megatron-Core loaded already, so a 2-rank run costs about
a second instead of ten.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import io
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["dsmoe.training.engine"])


def once(function):
    """`functools.cache` that also keeps an `AssertionError`: what hangs or fails for many tests costs its time once."""

    @functools.cache
    def attempt(*args):
        try:
            return function(*args), None
        except AssertionError as error:
            return None, error

    @functools.wraps(function)
    def wrapper(*args):
        value, error = attempt(*args)
        if error is not None:
            raise error
        return value

    return wrapper


def run_ranks(world_size: int, function, *args, deadline: float = 120.0) -> list:
    """Call `function(*args)` on every rank of a new gloo job; return what each rank returned, by rank.

    `function` must be a module's top-level function; what it returns must be picklable. Raises `AssertionError` with
    the rank's traceback if one fails, and with the stacks of those that did not answer if the deadline (seconds)
    passes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, str(rank)) for rank in range(world_size)]
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            job = (rank, world_size, port, theirs, stacks[rank], function, args)
            process = _context.Process(target=_rank, args=job, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, stacks, time.monotonic() + deadline, deadline)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes, processes, stacks: list[Path], end: float, deadline: float) -> list:
    results: dict[int, object] = {}
    while len(results) < len(pipes):
        waiting = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            shown = [f"rank {rank}:\n{_stack(processes[rank], stacks[rank])}" for rank in waiting]
            raise AssertionError("\n".join([f"ranks {waiting} gave no answer within {deadline:.0f} s", *shown]))
        for rank in waiting:
            if pipes[rank] in ready:
                try:
                    good, value = pipes[rank].recv()
                except EOFError:
                    processes[rank].join(5)
                    raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
                if not good:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _stack(process, path: Path) -> str:
    """Where a process is, in its own words."""
    if not path.exists():
        return "had not started"
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return path.read_text()


def _rank(rank: int, world_size: int, port: int, pipe, stack: Path, function, args) -> None:
    gc.freeze()  # DeepSpeed collects garbage often, and there are a million objects from the server that are none
    faulthandler.register(signal.SIGUSR1, file=open(stack, "w"))  # noqa: SIM115  (open as long as the process lives)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        from dsmoe.parallel.groups import start_processes

        torch.set_num_threads(1)
        start_processes(timeout_minutes=2)
        answer = io.BytesIO()
        torch.save(function(*args), answer)  # by value: shared memory would go with this process
        pipe.send((True, answer.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # gloo's destructor may wait for ranks that have gone
