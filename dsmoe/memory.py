"""Memory of a CPU that is handed out again, for what a step makes anew and in the same sizes: gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class KeptMemory:
    """Memory of earlier tensors that nobody holds any more, handed out again.

    Fresh memory costs a CPU as much as what is written to it: the kernel zeroes each page first, and a virtual machine
    may have to ask its host for it. Between steps it keeps what was in use at once.
    """

    def __init__(self):
        self._storages: dict[int, list[torch.UntypedStorage]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        known = self._storages.setdefault(math.prod(shape) * dtype.itemsize, [])
        for storage in known:
            if torch._C._storage_Use_Count(storage._cdata) == 1:  # `known` alone
                return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))
        fresh = torch.empty(tuple(shape), dtype=dtype)
        known.append(fresh.untyped_storage())
        return fresh

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """All tensors in one of one dimension, as DeepSpeed's ZeRO makes one of its gradients in every step."""
        flat = [tensor.contiguous().view(-1) for tensor in tensors]
        return torch.cat(flat, out=self.empty([sum(map(len, flat))], flat[0].dtype))

    def release(self) -> None:
        """Give everything back."""
        self._storages.clear()


kept_memory = KeptMemory()
