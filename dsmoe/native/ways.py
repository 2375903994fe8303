"""Which of several ways to compute the same thing is fastest here: measured at first use, then remembered.

A choice is one per kernel, shape, number of threads and machine. It is kept beside the compiled library, in
`ways-KEY.json`, and the processes of a job agree on it: the first one to ask measures, the others wait for its answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.distributed_c10d import _get_default_store

from dsmoe import native
from dsmoe.native import build

ROUNDS = 5  # after one that does not count
SECONDS = 0.3  # of one candidate, after which its rounds end

_chosen: dict[str, str] = {}
_seconds: dict[str, dict[str, float]] = {}  # of every candidate of what this process has measured or read
_measuring = False  # in this process, which holds the machine's lock then and lets the job wait for its answer


def fastest(
    kernel: str, shape: str, candidates: Mapping[str, Callable[[], object]], agreed_for: str | None = None
) -> str:  # fmt: skip
    """The name of the candidate that takes least time; the only one without a measurement.

    Args:
        kernel, shape: what a measurement is known by, beside the number of threads.
        candidates: each does the work once.
        agreed_for: what the processes of a job choose one way for, from the first to the last time they ask; None: each
            shape. Ranks that send each other gradients must take one: another graph may exchange them in another order.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    key = f"{kernel}, {shape}, {torch.get_num_threads()} threads"
    choice = f"{kernel}, {agreed_for or shape}, {torch.get_num_threads()} threads, of {' '.join(sorted(candidates))}"
    if _measuring and choice not in _chosen:
        return _for_a_candidate(key, candidates)
    if choice not in _chosen:
        _chosen[choice] = _agreed(choice, lambda: _remembered(key, candidates))
    return _chosen[choice]


def choices() -> dict[str, str]:
    """What has been chosen on this machine so far, by kernel, shape and threads, with the milliseconds of each
    candidate."""
    known = _read(_file()) | _seconds
    return {key: _line(seconds) for key, seconds in sorted(known.items())}


def _line(seconds: dict[str, float]) -> str:
    ordered = sorted(seconds, key=seconds.__getitem__)
    return ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in ordered)


def _agreed(key: str, decide: Callable[[], str]) -> str:
    """The answer of the process of this job that asks first."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide()
    store = _get_default_store()
    name = f"dsmoe/ways/{key}"
    if store.add(f"{name}/asked", 1) == 1:
        answer = ""
        try:
            answer = decide()
        finally:
            store.set(name, answer)
    return store.get(name).decode() or decide()


def _remembered(key: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    file = _file()
    seconds = _read(file).get(key, {})
    if set(seconds) != set(candidates):
        with build.locked(file.parent):  # one measurement at a time on a machine
            seconds = _read(file).get(key, {})
            if set(seconds) != set(candidates):
                seconds = _undisturbed(candidates)
                _write(file, _read(file) | {key: seconds})
    _seconds[key] = seconds
    return min(seconds, key=seconds.__getitem__)


def _undisturbed(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    global _measuring
    _measuring = True
    try:
        return measure(candidates)
    finally:
        _measuring = False


def _for_a_candidate(key: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    """An answer for a candidate that asks something itself while it is measured. To wait for the lock or for another
    rank, which may wait for it, would never end; so nothing is agreed on, and who asks outside of it measures anew."""
    seconds = _seconds.get(key) or _read(_file()).get(key, {})
    if set(seconds) != set(candidates):
        seconds = measure(candidates)
    _seconds[key] = seconds
    return min(seconds, key=seconds.__getitem__)


def forward_and_backward(work: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> None:
    """What a candidate does: `work`'s result and the gradients of `leaves`, whatever the surroundings record.

    Inside a recomputed region its hooks would take what is saved here, and run the region again to give it back.
    """
    with torch.enable_grad(), saved_tensors_hooks(_same, _same):
        torch.autograd.grad(work(), leaves, grad)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def measure(
    candidates: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, limit: float = SECONDS,
    of: Callable[[list[float]], float] = min,
) -> dict[str, float]:  # fmt: skip
    """Seconds of each candidate: `of` its rounds, after one that does not count and until they have taken `limit`.
    Rounds are in turn, so that a disturbance hurts all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, work in candidates.items():
            if sum(times[name]) < limit:
                began = time.perf_counter()
                work()
                seconds = time.perf_counter() - began
                if number:
                    times[name].append(seconds)
    return {name: of(taken) for name, taken in times.items()}


def _file() -> Path:
    return build.cache_folder() / f"ways-{build.machine_key(build.compiler())}.json"


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _write(file: Path, ways: dict[str, dict[str, float]]) -> None:
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(ways, indent=1) + "\n")
    os.replace(unfinished, file)


# ---- products -------------------------------------------------------------------------------------------------------


class _Products(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("bf16", "M", "N", "K")]


def repeat_product(dtype: torch.dtype, M: int, N: int, K: int, times: int) -> None:
    """Multiply [M, K] by [K, N] by the micro-kernels, so often on all threads together."""
    native.run("dsmoe_products", _Products(dtype == torch.bfloat16, M, N, K), times)


def has_bf16_products() -> bool:
    """Whether the CPU has instructions for them; without, torch's micro-kernels refuse bf16."""
    features = torch.cpu.get_capabilities()
    return bool((features.get("amx_bf16") or features.get("avx512_bf16")) and torch.backends.mkldnn.enabled)


def multiplies_bf16() -> bool:
    """Whether bf16 numbers are multiplied as such here, and not in fp32 copies: AMX is several times as fast as fp32,
    AVX-512's instruction twice as fast on an AMD EPYC and half as fast on an Intel Xeon."""
    candidates: dict[str, Callable[[], object]] = {"fp32": lambda: repeat_product(torch.float32, 64, 64, 256, 400)}
    if has_bf16_products():
        candidates["bf16"] = lambda: repeat_product(torch.bfloat16, 64, 64, 256, 400)
    return fastest("bf16 products", "64 x 64 x 256", candidates) == "bf16"
