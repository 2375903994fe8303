"""Experts in blocks of rows give what the plain loop gives, for any split of rows over experts and threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsmoe.moe import blocked
from dsmoe.moe.experts import loop_linear

HIDDEN, FFN, RANK = 16, 24, 8
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 70], [40, 1, 1, 1], [9, 9, 9, 9], [0, 0], [1] * 30, [0, 17, 0, 8, 8, 0, 30]]
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-5), torch.bfloat16: dict(rtol=4e-2, atol=4e-2)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 8)


def tensors(counts: list[int], dtype: torch.dtype, low_rank: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    rows, experts = sum(counts), len(counts)
    shapes = [(rows, HIDDEN), (experts, 2 * FFN, HIDDEN), (experts, HIDDEN, FFN)]
    if low_rank:
        shapes = [(rows, RANK), (experts, FFN, RANK), (rows, HIDDEN), (experts, FFN, HIDDEN), (experts, HIDDEN, FFN)]
    made = [(0.5 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    return [t.requires_grad_() for t in (*made, torch.rand(rows, generator=generator))]


def reference(counts: list[int], *projections, down, probs):
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    gate, up = torch.cat([loop_linear(x, w, ends) for x, w in projections], dim=1).chunk(2, dim=1)
    return loop_linear(F.silu(gate) * up * probs.unsqueeze(1).to(up.dtype), down, ends)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
def test_blocks_are_the_loop(counts, dtype, low_rank, threads):
    inputs = tensors(counts, dtype, low_rank)
    *flat, down, probs = inputs
    projections = list(zip(flat[0::2], flat[1::2], strict=True))
    actual = blocked.swiglu_experts(projections, down, probs, counts)
    expected = reference(counts, *projections, down=down, probs=probs)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
    gradient = torch.linspace(-1, 1, actual.numel()).view_as(actual).to(dtype)
    here = torch.autograd.grad(actual, inputs, gradient)
    there = torch.autograd.grad(expected, inputs, gradient)
    for one, other in zip(here, there, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])
    assert torch.get_num_threads() == threads


def test_widths_that_a_grouped_gemm_refuses():
    """It wants rows of a multiple of 16 bytes."""
    counts, generator = [1] * 8, torch.Generator().manual_seed(0)
    shapes = [(8, HIDDEN), (8, 12, HIDDEN), (8, HIDDEN, 6), (8,)]
    rows, gate_up, down, probs = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    actual = blocked.swiglu_experts([(rows, gate_up)], down, probs, counts)
    expected = reference(counts, (rows, gate_up), down=down, probs=probs)
    torch.testing.assert_close(actual, expected)
    here, there = (torch.autograd.grad(out.sum(), (rows, gate_up, down, probs)) for out in (actual, expected))
    torch.testing.assert_close(here, there)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_row_is_in_one_task_and_no_thread_shares_a_weight_gradient(counts, threads):
    tasks = blocked.split_work(counts, threads, block=8)
    segments = sorted((s for task in tasks for block in task for s in block), key=lambda s: s.rows.start)
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    assert [s.expert for s in segments for _ in range(s.rows.start, s.rows.stop)] == owner
    assert all(sum(s.rows.stop - s.rows.start for s in block) <= 8 for task in tasks for block in task)
    keys = [{(s.expert, s.part) for block in task for s in block} for task in tasks]
    assert sum(map(len, keys)) == len(set().union(*keys))


def test_gradients_accumulate_over_backward_passes():
    """The gradient of the first pass is memory that the second must not write to."""
    counts = [9, 0, 8]
    rows, gate_up, down, probs = tensors(counts, torch.float32, low_rank=False)
    for _ in range(3):
        blocked.swiglu_experts([(rows, gate_up)], down, probs, counts).sum().backward()
    expected = torch.autograd.grad(reference(counts, (rows, gate_up), down=down, probs=probs).sum(), (gate_up, down))
    torch.testing.assert_close((gate_up.grad, down.grad), tuple(3 * gradient for gradient in expected))


def test_an_expert_with_most_rows_is_shared_by_threads():
    assert len(blocked.split_work([1000, 1, 1], threads=2, block=8)) >= 4
    assert len(blocked.split_work([1000], threads=1, block=8)) == 1


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError):
            blocked.swiglu_experts(
                [(torch.ones(64, 4), torch.ones(2, 6, 5))], torch.ones(2, 4, 3), torch.ones(64), [32, 32]
            )
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
