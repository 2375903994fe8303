"""Where weight gradients of experts on a CPU are written: memory of earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientMemory:
    """Memory of earlier gradients that nobody holds any more, handed out again.

    Fresh memory costs a CPU as much as the product written to it: the kernel zeroes each page first. Between steps it
    keeps what was in use at once; under ZeRO, which takes a gradient away as soon as it is there, that of a layer.
    """

    def __init__(self):
        self._storages: dict[int, list[torch.UntypedStorage]] = {}

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of that shape and dtype."""
        known = self._storages.setdefault(tensor.nbytes, [])
        for storage in known:
            if torch._C._storage_Use_Count(storage._cdata) == 1:  # `known` alone
                return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)
        fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
        known.append(fresh.untyped_storage())
        return fresh

    def release(self) -> None:
        """Give everything back."""
        self._storages.clear()


gradient_memory = GradientMemory()
