"""What dsmoe has in C++, as one library that ctypes loads: `swiglu.cpp` for `dsmoe.moe.native`, `logits.cpp` for
`dsmoe.routers.logits`, `loss.cpp`, `attention.cpp` and `norm.cpp` for `dsmoe.model`, all made of `kernels.h`, and
`share.cpp` for a thread's part in them.

It is compiled once for each kind of CPU, with the machine's own compiler, and kept in $DSMOE_CACHE, or ~/.cache/dsmoe,
under a name made of its source, the compiler and the CPU, so that machines which share a home do not share a library
that one of them cannot run. A process that finds none makes one beside it and renames it, so none ever loads half a
file and no lock can be left behind.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
DEADLINE = 300  # seconds for the compiler, which takes about 5
LANES, GROUP = 8, 32  # widths are multiples of LANES; rows that are multiplied side by side (kernels.h)


class NoKernel(Exception):
    """Why there is none here, in a few words."""


def library() -> ctypes.CDLL:
    """All kernels. Raises `NoKernel`."""
    found = _found()
    if isinstance(found, str):
        raise NoKernel(found)
    return found


def unavailable() -> str | None:
    """Why no kernel can run here; None where they can."""
    found = _found()
    return found if isinstance(found, str) else None


def takes(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether kernels can work with tensors such as these: on a CPU, all of one of these types, and the last size fills
    vectors, `LANES` fp32 numbers or twice as many bf16 ones."""
    dtype = tensors[0].dtype
    numbers = LANES * 4 // dtype.itemsize
    return dtype in dtypes and all(
        t.dtype == dtype and t.device.type == "cpu" and t.size(-1) % numbers == 0 for t in tensors
    )


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kernel", "arguments", "items")),
        ("count", ctypes.c_int64), ("next", ctypes.c_int64), ("failed", ctypes.c_int32),
    ]  # fmt: skip


def run(name: str, arguments: ctypes.Structure, count: int, items: int | None = None, least: int = 1) -> None:
    """Call a kernel on `count` items, on as many threads as torch may use; they take items from one counter.

    Args:
        items: the address of an array of items, for kernels that have one.
        least: items that are worth a thread.

    Raises:
        MemoryError: there was none to work in.
    """
    kernel = ctypes.cast(getattr(library(), name), ctypes.c_void_p)
    call = _Call(kernel, ctypes.addressof(arguments), items, count)
    _in_team(min(torch.get_num_threads(), -(-count // least)), library().dsmoe_share, ctypes.byref(call))
    if call.failed:
        raise MemoryError(f"{name} found no memory for its working space")


def _in_team(threads: int, work, argument) -> None:
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
        torch_cpu = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
        return ctypes.CDLL(str(torch_cpu)).GOMP_parallel
    except (StopIteration, OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def compiler() -> str | None:
    """$CXX, else what the system calls its C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


@lru_cache(maxsize=1)
def _found() -> ctypes.CDLL | str:
    """A failure is remembered too: nobody waits for a compiler twice."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except NoKernel as reason:
        return str(reason)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def _compiled() -> Path:
    program = compiler()
    if program is None:
        raise NoKernel("no C++ compiler")
    path = _cache() / f"kernels-{_key(program)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / path.name
            sources = sorted(map(str, FOLDER.glob("*.cpp")))
            done = subprocess.run(
                [program, *FLAGS, *sources, "-o", str(made)], capture_output=True, text=True, timeout=DEADLINE
            )
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise NoKernel(f"{program} cannot compile it: {said}")
            os.replace(made, path)
    return path


def _key(program: str) -> str:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=DEADLINE).stdout
    sources = [path.read_text() for path in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")))]
    parts = (*sources, *FLAGS, version, platform.machine(), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native looks at, on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.partition("\t")[0].strip() in named))


def _cache() -> Path:
    """Where it is kept; a folder of this process's own where none can be written."""
    chosen = os.environ.get("DSMOE_CACHE")
    place = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmoe"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="dsmoe-"))
