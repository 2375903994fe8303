"""The device of this process.

The only module that knows about CUDA: the rest of dsmoe asks here, and DeepSpeed's accelerator decides. With
DS_ACCELERATOR=cpu a machine's GPUs are left alone by everything. Importing this module imports nothing heavy.
"""

from __future__ import annotations

import os
import resource
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dsmoe.errors import ParallelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Sizes change in every step where tokens choose freely; segments that grow keep the allocator from fragmenting.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
PINNED_BYTES = 64 << 20  # of each of the two buffers that large copies to the host go through


def accelerator():
    """DeepSpeed's accelerator."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def on_gpu() -> bool:
    """Whether this process computes on an accelerator, not on the CPU."""
    return accelerator().device_name() != "cpu"


def device_name() -> str:
    """For `Tensor.to`: "cuda:1", or "cpu". Of several GPUs the one that `use_local_device` chose."""
    return accelerator().current_device_name()


def gpu_count() -> int:
    """GPUs this process may use; 0 where it computes on the CPU."""
    return accelerator().device_count() if on_gpu() else 0


def use_local_device() -> str:
    """Make the GPU of this process's LOCAL_RANK (mpirun's, or 0, where there is none) the current one, and return its
    name.

    Called where processes join their job, before anything asks for a device. A process that sees one GPU uses it
    whatever its rank: some launchers show every process its own.

    Raises:
        ParallelError: more processes on this host than GPUs.
    """
    if on_gpu():
        told = os.environ.get("LOCAL_RANK") or os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or "0"
        rank, count = int(told), gpu_count()
        if rank >= count > 1:
            raise ParallelError(
                f"LOCAL_RANK is {rank}, but this host has {count} GPUs: found more processes than GPUs, expected at "
                f"most {count} on a host. Launch fewer, or set DS_ACCELERATOR=cpu to compute on the CPU"
            )
        accelerator().set_device(rank if count > 1 else 0)
    return device_name()


def prefer_growing_segments() -> None:
    """Have torch's CUDA allocator use expandable segments, unless the user has configured it. Call it before torch is
    imported."""
    if not any(name in os.environ for name in ALLOCATOR_NAMES):
        os.environ.setdefault(*ALLOCATOR)


def gpu_model(index: int | None = None) -> str:
    """The name of a GPU, such as "NVIDIA H200"; of the current one unless said otherwise."""
    import torch

    return torch.cuda.get_device_name(accelerator().current_device() if index is None else index)


def gpu_capability() -> tuple[int, int]:
    """Compute capability of the current GPU: (9, 0) for Hopper. (0, 0) on a CPU or another maker's GPU."""
    import torch

    if accelerator().device_name() != "cuda" or torch.version.cuda is None:
        return 0, 0
    return torch.cuda.get_device_capability(accelerator().current_device())


def gpu_memory_bytes(index: int = 0) -> int:
    """Memory of a GPU."""
    return accelerator().total_memory(index)


def use_tf32(yes: bool) -> None:
    """Whether this process's fp32 products on a GPU are TF32, or fp32 as elsewhere."""
    if on_gpu():
        import torch

        # This name, since it keeps torch's older and newer settings equal; either may be read by a library.
        torch.backends.cuda.matmul.allow_tf32 = yes


def uses_tf32() -> bool:
    """What `use_tf32` has been told; False on a CPU."""
    import torch

    return on_gpu() and torch.backends.cuda.matmul.allow_tf32


def synchronize() -> None:
    """Wait for everything queued on the current GPU; nothing on a CPU."""
    if on_gpu():
        accelerator().synchronize()


def peak_memory_bytes() -> int:
    """The most memory this process has had: torch's on a GPU, resident pages elsewhere."""
    if on_gpu():
        return accelerator().max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def timestamp():
    """Now, for `seconds_between`: an event on the current stream of a GPU, the clock on a CPU."""
    if not on_gpu():
        return time.perf_counter()
    event = accelerator().Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    """Between two timestamps; on a GPU it waits for the second."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # from ms


class HostCopies:
    """Copies of tensors to host memory. From a GPU they go through two pinned buffers, on a stream of their own: while
    one is being filled, what arrived in the other moves on. From a CPU they are plain copies.

    Nothing may write to a source before `finish`.
    """

    def __init__(self):
        self._stream = None
        self._buffers: list[Tensor] = []
        self._under_way: list[tuple[Tensor, Tensor, Any]] = []  # buffer, where its bytes belong, event

    def copy(self, tensor: Tensor, clone: bool = True) -> Tensor:
        """A contiguous copy in host memory, complete after `finish`. `clone`: whether a tensor that lies in host memory
        already is copied as well."""
        import torch

        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            return tensor.to("cpu", copy=clone).contiguous()
        if self._stream is None:
            self._stream = accelerator().Stream()
            self._buffers = [torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        copied = torch.empty(tensor.shape, dtype=tensor.dtype)
        source = tensor.contiguous()
        self._stream.wait_stream(accelerator().current_stream())
        pieces = zip(*(t.view(-1).view(torch.uint8).split(PINNED_BYTES) for t in (source, copied)), strict=True)
        for piece, target in pieces if tensor.numel() else ():
            if len(self._under_way) == len(self._buffers):
                self._settle()
            buffer = self._buffers.pop()
            with accelerator().stream(self._stream):
                buffer[: len(piece)].copy_(piece, non_blocking=True)
            self._under_way.append((buffer, target, self._stream.record_event()))
        source.record_stream(self._stream)
        return copied

    def finish(self) -> None:
        """Wait until all copies are complete."""
        while self._under_way:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest transfer and move its bytes to where they belong."""
        buffer, target, arrived = self._under_way.pop(0)
        arrived.synchronize()
        target.copy_(buffer[: len(target)])
        self._buffers.append(buffer)


class HostValues:
    """A small tensor on its way to the host, on a stream of its own: reading it waits for nothing queued after it."""

    def __init__(self, tensor: Tensor):
        import torch

        stream = _value_stream(tensor.device)
        stream.wait_stream(accelerator().current_stream())
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with accelerator().stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self._done = stream.record_event()

    def tolist(self) -> list:
        """The values. Waits for them the first time."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return self._host.tolist()


def read_later(tensor: Tensor) -> HostValues | Tensor:
    """What has the values of a small tensor as they are when the work queued so far is done: `tolist`."""
    return HostValues(tensor) if on_gpu() else tensor


@lru_cache
def _value_stream(device: torch.device):
    return accelerator().Stream(device)
