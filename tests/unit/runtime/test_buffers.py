"""Kept memory goes from tensor to tensor, never to two at once."""

from __future__ import annotations

import torch
from torch._utils import _flatten_dense_tensors

from dsmoe.runtime.buffers import BufferPool, part


def test_memory_is_used_again_once_nobody_holds_it():
    memory, shape = BufferPool(), (4, 8)
    first = memory.empty(shape, torch.float32)
    place, view = first.data_ptr(), first[1].view(2, 4).detach()
    second = memory.empty(shape, torch.float32)
    assert second.data_ptr() != place
    del first
    assert memory.empty(shape, torch.float32).data_ptr() not in (place, second.data_ptr()), "a view holds it"
    del view
    again = memory.empty(shape, torch.float32)
    assert again.data_ptr() == place and again.shape == shape and again.is_contiguous()


def test_a_promised_gradient_is_given_once_and_to_nobody_else():
    memory = BufferPool()
    parameter, other = torch.zeros(3, 4), torch.zeros(3, 4)
    flat = torch.zeros(20)
    memory.promise([(parameter, part(flat, 5, parameter.shape))])
    assert memory.gradient(other).data_ptr() != flat[5:].data_ptr()
    given = memory.gradient(parameter.detach())
    assert given.data_ptr() == flat[5:].data_ptr() and given.shape == parameter.shape
    given.fill_(1)
    assert flat.tolist() == [0] * 5 + [1] * 12 + [0] * 3 and flat._version == 0
    assert memory.gradient(parameter).data_ptr() != given.data_ptr(), "the first gradient may still be wanted"
    memory.promise([(parameter, part(flat, 5, parameter.shape))])
    memory.promise(())
    assert memory.gradient(parameter).data_ptr() != given.data_ptr(), "taken back"


def test_what_lies_in_one_piece_is_flat_already():
    memory, whole = BufferPool(), torch.arange(24.0)
    lines = [whole[2:6].view(2, 2), whole[6:16], whole[16:23]]
    flat = memory.flatten(lines)
    assert flat.data_ptr() == whole[2:].data_ptr() and torch.equal(flat, whole[2:23])
    for apart in ([whole[:4], whole[6:8]], [whole[4:8], whole[:4]], [whole[:4], torch.arange(4.0)]):
        flat = memory.flatten(apart)
        assert torch.equal(flat, torch.cat(apart)) and flat.data_ptr() != apart[0].data_ptr()


def test_flat_tensors_are_deepspeeds_and_as_safe():
    memory = BufferPool()
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(4, 2).t()]
    flat = memory.flatten(tensors)
    assert torch.equal(flat, _flatten_dense_tensors(tensors))
    kept = flat.clone()
    other = memory.flatten([tensor + 1 for tensor in tensors])
    assert torch.equal(flat, kept) and torch.equal(other, kept + 1), "what is held is never written to"
