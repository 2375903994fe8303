"""Memory of a CPU that is handed out again, for what a step makes anew and in the same sizes: gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


class BufferPool:
    """Memory of earlier tensors that nobody holds any more, handed out again.

    Fresh memory costs a CPU as much as what is written to it: the kernel zeroes each page first, and a virtual machine
    may have to ask its host for it. Between steps it keeps what was in use at once.
    """

    def __init__(self):
        self._storages: dict[int, list[torch.UntypedStorage]] = {}
        self._promised: dict[tuple[int, torch.Size], Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        known = self._storages.setdefault(math.prod(shape) * dtype.itemsize, [])
        for storage in known:
            if torch._C._storage_Use_Count(storage._cdata) == 1:  # `known` alone
                return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]  # without a stride, too
        fresh = torch.empty(tuple(shape), dtype=dtype)
        known.append(fresh.untyped_storage())
        return fresh

    def promise(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Pairs of a parameter and the memory that its next gradient goes to, once, instead of all pairs before."""
        self._promised = {(parameter.data_ptr(), parameter.shape): memory for parameter, memory in gradients}

    def gradient(self, parameter: Tensor) -> Tensor:
        """An uninitialised contiguous tensor for a parameter's gradient: what was promised, else kept memory.

        A parameter is known by where it lies: a recomputed forward pass saves another tensor over the same memory.
        """
        promised = self._promised.pop((parameter.data_ptr(), parameter.shape), None)
        return self.empty(parameter.shape, parameter.dtype) if promised is None else promised

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """All tensors in one of one dimension, as DeepSpeed's ZeRO makes one of its gradients in every step. Where they
        lie one after another already, it is over the same memory, as DeepSpeed's is of a single one."""
        flat = [tensor.contiguous().view(-1) for tensor in tensors]
        size = sum(map(len, flat))
        if all(before.data_ptr() + before.nbytes == after.data_ptr() for before, after in pairwise(flat)) and (
            len({tensor.untyped_storage().data_ptr() for tensor in flat}) == 1
        ):
            return part(flat[0], 0, [size])
        return torch.cat(flat, out=self.empty([size], flat[0].dtype))

    def release(self) -> None:
        """Give everything back."""
        self._storages.clear()
        self._promised.clear()


def part(of: Tensor, start: int, shape: Sequence[int]) -> Tensor:
    """A contiguous tensor over the same memory from element `start` on, and a view of nothing: what is written to it
    does not count as a change of `of`."""
    return torch.empty(0, dtype=of.dtype, device=of.device).set_(  # type: ignore[call-overload]
        of.untyped_storage(), of.storage_offset() + start, tuple(shape)
    )


buffer_pool = BufferPool()
