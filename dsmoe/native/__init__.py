"""What dsmoe has in C++, as a library that ctypes loads: compiled once for each kind of CPU, with the machine's own compiler, and kept.

It lies in $DSMOE_CACHE, or ~/.cache/dsmoe, under a name made of its source, the compiler and the CPU, so that machines
which share a home do not share a library that one of them cannot run. A process that finds none makes one beside it and
renames it, so none ever loads half a file and no lock can be left behind.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("swiglu.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
DEADLINE = 300  # seconds for the compiler, which takes about 5


class NoKernel(Exception):
    """Why there is none here, in a few words."""


def library() -> ctypes.CDLL:
    """The kernel. Raises `NoKernel`."""
    found = _found()
    if isinstance(found, str):
        raise NoKernel(found)
    return found


def compiler() -> str | None:
    """$CXX, else what the system calls its C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


@lru_cache(maxsize=1)
def _found() -> ctypes.CDLL | str:
    """A failure is remembered too: nobody waits for a compiler twice."""
    try:
        path = _compiled()
        loaded = ctypes.CDLL(str(path))
        for name in ("dsmoe_swiglu_forward", "dsmoe_swiglu_backward"):
            getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        return loaded
    except NoKernel as reason:
        return str(reason)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _compiled() -> Path:
    program = compiler()
    if program is None:
        raise NoKernel("no C++ compiler")
    path = _cache() / f"swiglu-{_key(program)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / path.name
            done = subprocess.run(
                [program, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=DEADLINE
            )
            if done.returncode:
                raise NoKernel(
                    f"{program} cannot compile it: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
                )
            os.replace(made, path)
    return path


def _key(program: str) -> str:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=DEADLINE).stdout
    parts = (SOURCE.read_text(), *FLAGS, version, platform.machine(), _cpu())
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
