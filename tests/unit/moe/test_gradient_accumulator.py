"""Parts of a pass that add to one sum of weights' gradients give what each would give by itself, added."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dsmoe import native as build
from dsmoe.moe import blocked, native
from dsmoe.moe.gradient_accumulator import ChunkedGradAccumulator
from dsmoe.runtime.buffers import buffer_pool

WAYS = [blocked.swiglu_experts]
if build.unavailable() is None:
    WAYS.append(native.swiglu_experts)
# Rows of each expert in each part: none in any, in one, in the first or the last alone; more than a thread's share.
PARTS = [[3, 0, 0, 1, 40], [0, 0, 7, 200, 40], [1100, 0, 2, 0, 40]]
HIDDEN, FFN = 48, 32


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def weights(request) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(len(PARTS[0]), 2 * FFN, HIDDEN), (len(PARTS[0]), HIDDEN, FFN)]
    return [(torch.randn(shape, generator=generator) / 7).to(request.param).requires_grad_() for shape in shapes]


def rows_of(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    rows = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)
    return rows.requires_grad_(), torch.rand(sum(counts), generator=generator).requires_grad_()


def outputs(way, weights: list[torch.Tensor], sums: ChunkedGradAccumulator | None) -> list[torch.Tensor]:
    actual = []
    for counts in PARTS:
        gate_up, down = weights if sums is None else sums.shared(*weights)
        rows, probs = rows_of(counts, down.dtype)
        actual.append(way([(rows, gate_up)], down, probs, counts, *([] if sums is None else [sums.sums])))
    return actual


def loss_of(actual: list[torch.Tensor]) -> torch.Tensor:
    return sum((out.float() * torch.linspace(-1, 1, out.size(1))).sum() for out in actual)


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        exact = ours.dtype == torch.float32
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if exact else 2e-2, atol=(1e-5 if exact else 1e-2) * scale)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__module__)
def test_one_sum_is_the_sum_of_the_parts(way, weights, threads):
    expected = torch.autograd.grad(loss_of(outputs(way, weights, None)), weights)
    assert_close(torch.autograd.grad(loss_of(outputs(way, weights, ChunkedGradAccumulator())), weights), expected)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__module__)
def test_it_begins_anew_in_every_backward_pass(way, weights):
    loss = loss_of(outputs(way, weights, ChunkedGradAccumulator()))
    first = [grad.clone() for grad in torch.autograd.grad(loss, weights, retain_graph=True)]
    assert_close(torch.autograd.grad(loss, weights), first)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__module__)
def test_other_uses_of_the_weights_count_too(way, weights):
    """Wherever in the pass they come: autograd must not have copied an unfinished sum to add them."""
    plain = torch.autograd.grad(loss_of(outputs(way, weights, None)), weights)
    parts = outputs(way, weights, ChunkedGradAccumulator())
    penalty = sum(weight.float().square().sum() for weight in weights)
    actual = torch.autograd.grad(loss_of(parts[:1]) + penalty + loss_of(parts[1:]), weights)
    assert_close(actual, [grad + 2 * weight.detach() for grad, weight in zip(plain, weights, strict=True)])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__module__)
def test_parts_share_the_memory_of_one_gradient_and_leave_nothing(way, weights):
    buffer_pool.release()
    sums = ChunkedGradAccumulator()
    left = weakref.ref(sums)
    loss = loss_of(outputs(way, weights, sums))
    gc.disable()
    loss.backward()
    assert sums.sums == {}
    del sums, loss
    assert left() is None
    gc.enable()
    assert sum(len(storages) for storages in buffer_pool._storages.values()) == len(weights)
    buffer_pool.release()
