"""Clocks and counters: interleaved times, peak memory, bytes sent to other ranks, waits of the host for the device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe.runtime.buffers import buffer_pool
from dsmoe.runtime.device import accelerator, device_name, on_gpu, synchronize

Kind = Literal["limit", "peer", "ours", "part"]


@dataclass
class Case:
    """Something to time: `forward` on leaves, then backward with fixed gradients of its outputs.

    Attributes:
        forward: leaves -> outputs; an output whose gradient is None is a scalar loss.
        leaves: inputs, whose gradient is part of the work if they ask for one.
        grads: gradients of the outputs, repeated as None where there are more outputs.
        parameters: whose gradients are part of the work; cleared before the clock starts.
        after: called after a run, outside the clock.
    """

    name: str
    kind: Kind
    forward: Callable[..., list[Tensor]]
    leaves: list[Tensor]
    grads: list[Tensor | None]
    parameters: Sequence[Tensor] = field(default_factory=list)
    after: Callable[[], object] = lambda: None
    mean_experts: Callable[[], float | None] = lambda: None
    flops: float = 0  # of a run, where it is a product whose rate counts

    def clear(self) -> None:
        for tensor in (*self.leaves, *self.parameters):
            tensor.grad = None

    def run(self) -> list[Tensor]:
        """Forward and backward; the outputs."""
        outputs = self.forward(*self.leaves)
        if not self.grads:
            return outputs
        grads = [*self.grads, *[None] * (len(outputs) - len(self.grads))]
        wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        torch.autograd.backward([output for output, _ in wanted], [grad for _, grad in wanted])
        return outputs


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def largest(values: list[float]) -> list[float]:
    """Of all ranks, by place."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    largest_values = torch.tensor(values, dtype=torch.float64, device=device_name())
    dist.all_reduce(largest_values, op=dist.ReduceOp.MAX)
    return largest_values.tolist()


@dataclass
class Timings:
    """Seconds of each case by round, of the slowest rank; and the order in which the cases ran."""

    seconds: dict[str, list[float]]
    order: list[str]


def interleave(
    cases: list[Case], budget: float, least: int = 7, most: int = 50, warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter, patience: float = 20.0,
) -> Timings:  # fmt: skip
    """Time all cases round by round, each round starting with another case, so that a machine that drifts or is
    disturbed hurts all of them alike. Every rank must call it with the same cases.

    Args:
        budget: seconds after which no round begins, once there are `least`.
        warm_up: rounds before the first that counts.
        patience: seconds in all after which a case that has 3 rounds takes part in no more.
    """
    own: dict[str, list[float]] = {case.name: [] for case in cases}
    order: list[str] = []
    began = clock()
    for number in range(most + warm_up):
        if number >= least + warm_up and largest([clock() - began])[0] > budget:
            break
        spent = largest([sum(own[case.name]) for case in cases])
        going = [c for c, seconds in zip(cases, spent, strict=True) if len(own[c.name]) < 3 or seconds < patience]
        turn = number % max(1, len(going))
        for case in going[turn:] + going[:turn]:
            case.clear()
            barrier()
            start = clock()
            outputs = case.run()
            synchronize()
            seconds = clock() - start
            del outputs
            case.after()
            case.clear()
            if number >= warm_up:
                own[case.name].append(seconds)
                order.append(case.name)
    slowest = {case.name: largest(own[case.name]) for case in cases}
    return Timings(slowest, order)


def map_blocks_one_by_one() -> None:
    """From here on glibc maps every block from 64 KB by itself, and gives it back when it is freed. By itself it would
    keep freed blocks, more of them the more has run in the process, and put others into parts of them."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def peak_growth(case: Case) -> int:
    """Bytes by which memory in use grows while the case runs, at its highest.

    On CUDA torch's allocator counts. On a CPU it is the kernel's count of this process's resident pages (VmHWM, reset
    before the run), which sees every thread and library; pages are small meanwhile, so that what is counted was
    touched. Holes that malloc keeps between blocks count as well, so call `map_blocks_one_by_one` first. The smallest
    of four runs counts: a library's first use of a buffer of its own is not the layer's.
    """
    case.clear()
    gc.collect()
    if on_gpu():
        accelerator().reset_peak_memory_stats()
        before = accelerator().memory_allocated()
        case.run()
        synchronize()
        return accelerator().max_memory_allocated() - before
    libc = ctypes.CDLL(None)
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    try:
        _run_and_drop(case)
        return min(_resident_growth(case, libc) for _ in range(4))
    finally:
        libc.prctl(41, 0, 0, 0, 0)


def _resident_growth(case: Case, libc: ctypes.CDLL) -> int:
    buffer_pool.release()  # what is kept from run to run counts as well
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    outputs = case.run()
    peak = _status("VmHWM")
    del outputs
    case.after()
    case.clear()
    return max(0, peak - before)


def _run_and_drop(case: Case) -> None:
    case.run()
    case.after()
    case.clear()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


@dataclass
class Counts:
    """What one forward and backward did on this rank."""

    sent_bytes: int = 0  # to other ranks, by all-to-all
    host_syncs: int = 0  # where the host would wait for a device


# Operators whose result the host needs, or whose shape depends on values.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal"}


class _Counter(TorchDispatchMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.__name__.split(".")[0]
        if name in _WAITING or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.counts.host_syncs += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            self.counts.host_syncs += any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        elif name == "alltoall_base_":
            self._count_rows(args[1], args[4] if len(args) > 4 else [])
        return operator(*args, **(kwargs or {}))

    def _count_rows(self, rows: Tensor, splits: list[int]) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        row_bytes = rows.nbytes // max(1, rows.size(0))
        own = splits[rank] if splits else rows.size(0) // ranks
        self.counts.sent_bytes += (rows.size(0) - own) * row_bytes


def count(case: Case) -> Counts:
    """Run the case once under a dispatcher that sees every operator. Forward and backward in one thread.

    `Tensor.tolist` reads memory without an operator on a CPU, so it is counted by itself.
    """
    counts = Counts()
    case.clear()
    with _counted_tolist(counts), torch.autograd.set_multithreading_enabled(False), _Counter(counts):
        case.run()
    case.after()
    case.clear()
    return counts


@contextlib.contextmanager
def _counted_tolist(counts: Counts) -> Iterator[None]:
    original = torch.Tensor.tolist

    def tolist(tensor):
        counts.host_syncs += 1
        return original(tensor)

    torch.Tensor.tolist = tolist
    try:
        yield
    finally:
        torch.Tensor.tolist = original
