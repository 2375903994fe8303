"""Compiles `dsmoe/native/*.cpp` into one shared library, once for each kind of CPU and version of torch, and keeps it.

It lies in $DSMOE_CACHE, or ~/.cache/dsmoe, under a name made of its sources, the compiler, the CPU and torch, so that
machines which share a home do not share a library that one of them cannot run. One process of a machine compiles while
the others wait at a lock; the operating system takes the lock from a process that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC",
)  # fmt: skip
MORE_FLAGS = "DSMOE_CXXFLAGS"  # environment variable: further flags, as those of a sanitizer
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"


class KernelsUnavailable(Exception):
    """Why there are no kernels here, in a few words."""


def flags() -> list[str]:
    return [*FLAGS, *os.environ.get(MORE_FLAGS, "").split()]


def compiler() -> str | None:
    """$CXX, else what the system calls its C++ compiler."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def compiled_library() -> Path:
    """The library's file, made where there is none yet.

    Raises:
        KernelsUnavailable: no compiler, or it cannot compile or link the sources.
    """
    program = compiler()
    if program is None:
        raise KernelsUnavailable("no C++ compiler")
    path = cache_folder() / f"kernels-{machine_key(program)}.so"
    if not path.exists():
        with locked(path.parent):
            if not path.exists():
                _compile(program, path)
    return path


def _compile(program: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        library = Path(folder) / path.name
        sources = sorted(map(str, SOURCES.glob("*.cpp")))
        # Undefined symbols fail here, not at their first call: a torch without the micro-kernels is found out.
        strict = ["-Wl,-z,defs"] if platform.system() == "Linux" else []
        command = [program, *flags(), *sources, "-o", str(library), f"-L{TORCH_LIBRARIES}", "-ltorch_cpu", *strict]
        result = subprocess.run(command, capture_output=True, text=True)  # a busy machine may take minutes
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            if any("undefined reference" in line and "cpublas" in line for line in lines):
                raise KernelsUnavailable(f"torch {torch.__version__} does not export its brgemm micro-kernels")
            raise KernelsUnavailable(f"{program} cannot compile them: {lines[0]}")
        os.replace(library, path)


@lru_cache(maxsize=4)
def machine_key(program: str | None) -> str:
    """Of these sources, this compiler, CPU and torch: 16 hexadecimal digits."""
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    sources = [path.read_text() for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))]
    ingredients = (*sources, *flags(), version, platform.machine(), cpu_features(), torch.__version__)
    return hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]


def cpu_features() -> str:
    """What -march=native looks at, on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.partition("\t")[0].strip() in fields))


@lru_cache(maxsize=1)
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="dsmoe-"))


def cache_folder() -> Path:
    """Where compiled kernels and measurements are kept; a folder of this process's own where none can be written."""
    configured = os.environ.get("DSMOE_CACHE")
    folder = (
        Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmoe"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_folder()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process of a machine at a time, without a deadline. A file system without locks goes without."""
    with open(folder / "lock", "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
