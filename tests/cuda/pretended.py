"""A process that believes it has eight GPUs, where there is none: `start` in a process of its own.

Tensors say cuda:N and lie in host memory; `pretended.cpp` says what is refused and what is reported. DeepSpeed's
accelerator is one that answers as CUDA's does, so dsmoe and DeepSpeed take the paths that they take on a GPU, with gloo
in place of NCCL. A torch that is built with CUDA has kernels of its own for it, and needs no pretence.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import dsmoe
from dsmoe.native import build

SOURCE = Path(__file__).with_name("pretended.cpp")
FLAGS = ("-O0", "-shared", "-fPIC", "-std=c++20", "-w")
PACKAGES = [Path(package.__file__).parent for package in (dsmoe, deepspeed)]
DEVICES = 8  # as pretended.cpp has it
COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "gather", "scatter",
)  # fmt: skip
LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p)

needs_cpu_torch = pytest.mark.skipif(
    torch.version.cuda is not None or build.compiler() is None,
    reason="needs a C++ compiler and a torch without CUDA, whose place in the dispatcher is free",
)


def library() -> Path:
    """The compiled library; made once for each source and torch (15 s), then kept where dsmoe keeps its kernels."""
    key = hashlib.sha256("\0".join((SOURCE.read_text(), *FLAGS, torch.__version__)).encode()).hexdigest()[:16]
    path = build.cache_folder() / f"pretended-{key}.so"
    if not path.exists():
        with build.locked(path.parent):
            if not path.exists():
                _compile(path)
    return path


def _compile(path: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    includes = [f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch_dir}/lib", f"-Wl,-rpath,{torch_dir}/lib", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        made = Path(place) / path.name
        command = [build.compiler(), *FLAGS, *includes, str(SOURCE), *libraries, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        os.replace(made, path)


@dataclass(frozen=True)
class Event:
    """What a GPU, or NCCL, would have noticed: kinds as `pretended.cpp` has them."""

    kind: str
    op: str
    detail: str
    where: str
    thread: int


class Watch:
    """What has happened since it was made, and how often each operator ran."""

    def __init__(self):
        self.events: list[Event] = []
        self.kernels: Counter[str] = Counter()

    def mark(self, name: str) -> None:
        self.events.append(Event("mark", name, "", "", threading.get_ident()))

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    def where(self, *kinds: str) -> list[str]:
        return [f"{event.kind} {event.op} at {event.where}" for event in self.of(*kinds)]


_library: ctypes.CDLL | None = None
_watch: Watch | None = None


def start() -> None:
    """Pretend in this process from here on. Call it before the process's first backward pass: autograd counts devices
    once. LOCAL_RANK's device is current when the processes have been joined."""
    global _library
    if _library is not None:
        return
    _record_groups()
    for name in COLLECTIVES:
        setattr(torch.distributed, name, _on_devices_alone(getattr(torch.distributed, name)))
    torch.cuda._lazy_init = lambda: None  # Python's factories call it before they dispatch
    torch.cuda.device_count = lambda: DEVICES
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "pretended GPU"
    with _quiet_stderr():  # torch warns that collectives for CUDA are registered a second time
        _library = ctypes.CDLL(str(library()), ctypes.RTLD_GLOBAL)
    _library.pretended_start()
    _library.pretended_listen(_listen)
    real_accelerator.ds_accelerator = Accelerator()


@contextmanager
def capability(major: int, minor: int) -> Iterator[None]:
    """Of all devices. From 10.0 on weight gradients of empty groups are garbage, as torch's grouped_mm leaves them."""
    from dsmoe.moe import experts, linear

    users = [(module, module.gpu_capability) for module in (experts, linear)]
    for module, _ in users:
        module.gpu_capability = lambda: (major, minor)
    _library.pretended_blackwell(major >= 10)
    try:
        yield
    finally:
        _library.pretended_blackwell(0)
        for module, before in users:
            module.gpu_capability = before


def devices() -> list[int]:
    """Those that have run an operator in this process."""
    _library.pretended_devices.restype = ctypes.c_long
    bits = _library.pretended_devices()
    return [index for index in range(DEVICES) if bits >> index & 1]


# Each that this process has made since `start`: its ranks (None: all), and whether by these ranks alone.
groups: list[tuple[tuple[int, ...] | None, bool]] = []


def _on_devices_alone(collective):
    """NCCL has nothing for tensors of the CPU, which gloo takes. Collectives of objects place theirs as a backend
    wants, and reach torch's functions by another way."""

    @functools.wraps(collective)
    def checked(*args, **kwargs):
        if _watch is None:  # a model on the CPU, beside which another is put
            return collective(*args, **kwargs)
        given = (each for x in (*args, *kwargs.values()) for each in (x if isinstance(x, list) else [x]))
        if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in given):
            raise RuntimeError(f"{collective.__name__}: NCCL takes no tensor of the CPU")
        return collective(*args, **kwargs)

    return checked


def _record_groups() -> None:
    make = torch.distributed.new_group

    def make_and_record(ranks=None, *args, **kwargs):
        alone = bool(kwargs.get("use_local_synchronization"))
        groups.append((None if ranks is None else tuple(ranks), alone))
        return make(ranks, *args, **kwargs)

    torch.distributed.new_group = make_and_record


@contextmanager
def watching() -> Iterator[Watch]:
    """Record what happens inside."""
    global _watch
    _take_counts()
    _watch = actual = Watch()
    try:
        yield actual
    finally:
        _watch = None
        actual.kernels = _take_counts()


def _take_counts() -> Counter[str]:
    text = ctypes.create_string_buffer(1 << 16)
    _library.pretended_take_counts(text, ctypes.c_size_t(len(text)))
    lines = (line.split() for line in text.value.decode().splitlines())
    return Counter({name: int(count) for name, count in lines})


@LISTENER
def _listen(kind: bytes, op: bytes, detail: bytes) -> None:
    if _watch is None:
        return
    thread, main = threading.get_ident(), threading.main_thread().ident
    if kind == b"communicator" and thread != main and not _in_backward(main):
        _watch.events.append(Event("concurrent", op.decode(), detail.decode(), _place(), thread))
    _watch.events.append(Event(kind.decode(), op.decode(), detail.decode(), _place(), thread))


def _in_backward(thread: int) -> bool:
    """Whether a thread waits for autograd's, which then has its communicators to itself."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        frame = frame.f_back
    return frame is not None


def _place() -> str:
    """The innermost lines of dsmoe and its frameworks, innermost first."""
    frames: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(frames) < 3:
        for folder in PACKAGES:
            if frame.f_code.co_filename.startswith(f"{folder}/"):
                frames.append(f"{frame.f_code.co_filename.removeprefix(f'{folder.parent}/')}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(frames)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


class Accelerator(CPU_Accelerator):
    """DeepSpeed's, with CUDA's answers. Memory and random numbers are the CPU's."""

    def __init__(self):
        super().__init__()
        self.device_was_set = False  # by us or by DeepSpeed
        self.asked_too_early: list[str] = []

    def is_synchronized_device(self):
        return False

    def device_name(self, device_index=None):
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def device(self, device_index=None):
        return torch.device("cuda", device_index)

    def set_device(self, device_index):
        self.device_was_set = True
        torch.accelerator.set_device_index(device_index)

    def current_device(self):
        if not self.device_was_set:
            self.asked_too_early.append(_place())
        return torch.accelerator.current_device_index()

    def current_device_name(self):
        return f"cuda:{self.current_device()}"

    def device_count(self):
        return DEVICES

    def synchronize(self, device_index=None):
        torch.accelerator.synchronize()

    @property
    def Stream(self):
        return torch.Stream

    @property
    def Event(self):
        return torch.Event

    @contextmanager
    def stream(self, stream):
        before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def current_stream(self, device_index=None):
        return torch.accelerator.current_stream()

    def default_stream(self, device_index=None):
        return torch.accelerator.current_stream()

    def on_accelerator(self, tensor):
        return tensor.device.type == "cuda"

    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        return tensor.pin_memory()
