"""Kept memory goes from tensor to tensor, never to two at once."""

from __future__ import annotations

import torch
from torch._utils import _flatten_dense_tensors

from dsmoe.memory import KeptMemory


def test_memory_is_used_again_once_nobody_holds_it():
    memory, shape = KeptMemory(), (4, 8)
    first = memory.empty(shape, torch.float32)
    place, view = first.data_ptr(), first[1].view(2, 4).detach()
    second = memory.empty(shape, torch.float32)
    assert second.data_ptr() != place
    del first
    assert memory.empty(shape, torch.float32).data_ptr() not in (place, second.data_ptr()), "a view holds it"
    del view
    again = memory.empty(shape, torch.float32)
    assert again.data_ptr() == place and again.shape == shape and again.is_contiguous()


def test_flat_tensors_are_deepspeeds_and_as_safe():
    memory = KeptMemory()
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(4, 2).t()]
    flat = memory.flatten(tensors)
    assert torch.equal(flat, _flatten_dense_tensors(tensors))
    kept = flat.clone()
    other = memory.flatten([tensor + 1 for tensor in tensors])
    assert torch.equal(flat, kept) and torch.equal(other, kept + 1), "what is held is never written to"
