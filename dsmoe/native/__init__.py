"""What dsmoe has in C++, as one library that ctypes loads: `swiglu.cpp` for `dsmoe.moe.native`, `logits.cpp` for
`dsmoe.routers.logits`, `loss.cpp`, `attention.cpp` and `norm.cpp` for `dsmoe.model`.

Their matrix products are torch's micro-kernels (`brgemm.h`); `kernels.h` has what else they share, `share.cpp` a
thread's part in them, `products.cpp` a measure. `build.py` compiles them at first use, `ways.py`
chooses by measurement.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from dsmoe.native import build
from dsmoe.native.build import KernelsUnavailable

LANES = 8  # numbers of a vector: widths are multiples of it in fp32, of twice it in bf16
NO_MEMORY = 1  # of `share.cpp`


def library() -> ctypes.CDLL:
    """All kernels. Raises `KernelsUnavailable`."""
    loaded = _load()
    if isinstance(loaded, str):
        raise KernelsUnavailable(loaded)
    return loaded


def unavailable() -> str | None:
    """Why no kernel can run here; None where they can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """A failure is remembered too: nobody waits for a compiler twice."""
    try:
        return ctypes.CDLL(str(build.compiled_library()))
    except (KernelsUnavailable, OSError) as reason:
        return str(reason)


def supports(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether kernels can work with tensors such as these: on a CPU, all of one of these types, and the last size a
    multiple of 32 bytes."""
    dtype = tensors[0].dtype
    multiple = LANES * 4 // dtype.itemsize
    return dtype in dtypes and all(
        t.dtype == dtype and t.device.type == "cpu" and t.size(-1) % multiple == 0 for t in tensors
    )


def require(condition: bool, message: str) -> None:
    """Checks what a kernel is given before C++ reads memory by it. Raises `ValueError`."""
    if not condition:
        raise ValueError(message)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kernel", "arguments", "items")),
        ("count", ctypes.c_int64), ("next", ctypes.c_int64), ("failure", ctypes.c_int32),
        ("message", ctypes.c_char * 256),
    ]  # fmt: skip


def run(
    name: str, arguments: ctypes.Structure, count: int, items: int | None = None, items_per_thread: int = 1
) -> None:
    """Call a kernel on `count` items, on as many threads as torch may use; they take items from one counter.

    Args:
        items: the address of an array of items, for kernels that have one.
        items_per_thread: so many are worth a thread.

    Raises:
        MemoryError: the kernel could not allocate its workspace.
        RuntimeError: torch's micro-kernels failed.
    """
    if not count:
        return
    kernel = ctypes.cast(getattr(library(), name), ctypes.c_void_p)
    call = _Call(kernel, ctypes.addressof(arguments), items, count)
    threads = min(torch.get_num_threads(), -(-count // items_per_thread))
    _run_on_threads(threads, library().dsmoe_share, ctypes.byref(call))
    if call.failure == NO_MEMORY:
        raise MemoryError(f"{name} could not allocate its workspace")
    if call.failure:
        raise RuntimeError(f"{name}: {call.message.decode(errors='replace')}")


def _run_on_threads(threads: int, work, argument) -> None:
    """Have each of `threads` call `work(argument)`, a function of C: torch's own, where its OpenMP can be asked. They
    wait for more work at full speed for some milliseconds after each of torch's operators; others beside them would get
    what is left of the cores."""
    if threads == 1:
        work(argument)
    elif team := _openmp():
        team(work, argument, threads, 0)
    else:
        others = [_workers(threads).submit(work, argument) for _ in range(threads - 1)]
        work(argument)
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _openmp():
    """GNU's entry into the OpenMP that torch was linked with, which those of Intel and LLVM have too; or None."""
    try:
        torch_cpu = next(build.TORCH_LIBRARIES.glob("libtorch_cpu.*"))
        return ctypes.CDLL(str(torch_cpu)).GOMP_parallel
    except (StopIteration, OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")
