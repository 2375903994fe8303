"""Functions in processes of their own, forked from a server that has loaded what takes seconds to import.

A process costs a tenth of a second instead of ten, and is as separate as any other. Each has a deadline: one that hangs
is a failure that says where it waits.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import torch

import dsmoe.routers

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "dsmoe.training.run", "dsmoe.hf.importing", "dsmoe.hf.observe", "dsmoe.moe.dispatchers.two_level",
        *(f"dsmoe.routers.{path.stem}" for path in Path(dsmoe.routers.__file__).parent.glob("*.py")),
        *("dsmoe.optim.adamw", "dsmoe.optim.lion"),
        "megatron.core.datasets.gpt_dataset",
        # What is imported at first use, and takes longer than a small training does by itself.
        *("torch._dynamo", "torch._subclasses.schema_check_mode", "torch.utils.serialization.config"),
        *("deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.compile.backend"),
        *("transformers.generation.utils", "transformers.modeling_layers", "transformers.integrations.moe"),
        *(f"transformers.models.{name}.modeling_{name}" for name in ("mixtral", "olmoe", "qwen3_moe")),
        *("dsmoe.lab.inspect.report", "matplotlib.figure", "matplotlib.backends.backend_svg", "scipy.optimize"),
        "pytest",  # of the module in which a function is
    ]
)  # fmt: skip


def call(function: Callable, *args, deadline: float = 60.0):
    """Call a module's top-level function in another process; return what it returned."""
    return call_each([(function, args)], deadline)[0]


def call_each(jobs: Sequence[tuple[Callable, tuple]], deadline: float = 60.0, name: str = "process") -> list:
    """Call several top-level functions at the same time, each in a process of its own; return what each returned.

    What they return must be picklable. Raises `AssertionError` with the traceback if one fails, and with the stacks of
    those that did not answer if the deadline (seconds) passes.
    """
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, str(index)) for index in range(len(jobs))]
        for (function, args), stack in zip(jobs, stacks, strict=True):
            ours, theirs = context.Pipe()
            job = pickle.dumps((function, args))  # its modules are imported in the environment of now
            process = context.Process(target=_answer, args=(theirs, stack, dict(os.environ), job), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, processes, stacks, deadline, name)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes, processes, stacks: list[Path], deadline: float, name: str) -> list:
    end = time.monotonic() + deadline
    results: dict[int, object] = {}
    while len(results) < len(pipes):
        waiting = [index for index in range(len(pipes)) if index not in results]
        ready = wait([pipes[index] for index in waiting], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            shown = [f"{name} {index}:\n{_stack(processes[index], stacks[index])}" for index in waiting]
            raise AssertionError("\n".join([f"{name}s {waiting} gave no answer within {deadline:.0f} s", *shown]))
        for index in waiting:
            if pipes[index] in ready:
                try:
                    good, value = pipes[index].recv()
                except EOFError:
                    processes[index].join(5)
                    raise AssertionError(f"{name} {index} died with exit code {processes[index].exitcode}") from None
                if not good:
                    raise AssertionError(f"{name} {index} failed:\n{value}")
                results[index] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[index] for index in range(len(pipes))]


def _stack(process, path: Path) -> str:
    """Where a process is, in its own words."""
    if not path.exists():
        return "had not started"
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return path.read_text()


def _answer(pipe, stack: Path, environment: dict[str, str], job: bytes) -> None:
    gc.freeze()  # DeepSpeed collects garbage often, and there are a million objects from the server that are none
    faulthandler.register(signal.SIGUSR1, file=open(stack, "w"))  # noqa: SIM115  (open as long as the process lives)
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    try:
        function, args = pickle.loads(job)
        answer = io.BytesIO()
        torch.save(function(*args), answer)  # by value: shared memory would go with this process
        pipe.send((True, answer.getvalue()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # gloo's destructor may wait for ranks that have gone
