"""Experts in C++ give what the plain loop over experts gives, and a machine that cannot compile them does without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsmoe import native as build
from dsmoe.moe import blocked, native
from dsmoe.moe.experts import loop_linear

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason="no C++ kernels here")

# Groups of 64 rows, chunks of 128 and 256, vectors of 8 and 16: below, at and above each; experts with none; a part
# for each thread.
COUNTS = [[3, 0, 5, 1], [0, 0], [1] * 30, [8, 16, 24, 32], [33, 7, 127], [0, 129, 0, 256], [1100, 2, 0, 1]]
# H, F, rank of a latent; more than one slice of F in the last ones.
SHAPES = [(16, 24, None), (40, 8, None), (64, 104, None), (16, 24, 8), (72, 40, 16), (24, 1064, None), (24, 520, 8)]
BF16_SHAPES = [
    (16, 48, None),
    (80, 16, None),
    (64, 112, None),
    (16, 48, 16),
    (144, 80, 32),
    (32, 1072, None),
    (32, 528, 16),
]


HAS_BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
COMPUTES_BF16 = [False, True] if HAS_BF16 else [False]


def tensors(
    counts: list[int], hidden: int, ffn: int, rank: int | None, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(counts) + hidden)
    rows, e = sum(counts), len(counts)
    shapes = [(rows, hidden), (e, 2 * ffn, hidden), (e, hidden, ffn)]
    if rank:
        shapes = [(rows, rank), (e, ffn, rank), (rows, hidden), (e, ffn, hidden), (e, hidden, ffn)]
    made = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]
    made = [t.to(dtype) for t in made]
    return [t.requires_grad_() for t in (*made, torch.rand(rows, generator=generator))]


def results(way, inputs: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    """The output and the gradients of all inputs."""
    *flat, down, probs = inputs
    out = way(list(zip(flat[0::2], flat[1::2], strict=True)), down, probs, counts)
    weights = torch.linspace(-1, 1, max(1, out.numel())).bfloat16().to(out.dtype)[: out.numel()].view_as(out)
    return [out, *torch.autograd.grad(out, inputs, weights)]


def loop(projections, down, probs, counts):
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    gate, up = torch.cat([loop_linear(x, w, ends) for x, w in projections], dim=1).chunk(2, dim=1)
    return loop_linear(F.silu(gate) * up * probs.unsqueeze(1), down, ends)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_the_kernel_is_the_loop(counts, shape, threads):
    inputs = tensors(counts, *shape)
    exact = results(loop, [t.detach().double().requires_grad_() for t in inputs], counts)
    for actual, expected in zip(results(native.swiglu_experts, inputs, counts), exact, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("computes_bf16", COMPUTES_BF16)
@pytest.mark.parametrize("shape", BF16_SHAPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_the_kernel_is_the_loop_in_bf16(counts, shape, computes_bf16, threads):
    """As far as bf16 goes: what leaves is rounded once, what the backward pass kept of h was rounded before."""
    inputs = tensors(counts, *shape, torch.bfloat16)
    exact = results(loop, [t.detach().double().requires_grad_() for t in inputs], counts)
    actual = results(partial(native.swiglu_experts, computes_bf16=computes_bf16), inputs, counts)
    assert [t.dtype for t in actual] == [torch.bfloat16, *(t.dtype for t in inputs)]
    for ours, expected in zip(actual, exact, strict=True):
        largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(ours.double(), expected, rtol=2e-2, atol=1e-2 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", BF16_SHAPES)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [1] * 30, [12, 13, 4, 8, 2, 7, 9, 11, 300]])
def test_products_of_few_rows_are_the_loop(counts, shape, dtype, threads):
    """They are of the forward pass alone; bf16 is widened whatever the CPU has."""
    inputs = tensors(counts, *shape, dtype)
    exact = results(loop, [t.detach().double().requires_grad_() for t in inputs], counts)
    actual = results(partial(native.swiglu_experts, few=native.FEW), inputs, counts)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2)
    for ours, expected in zip(actual, exact, strict=True):
        scale = max(1.0, float(expected.abs().max())) if dtype == torch.bfloat16 else 1.0
        torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize(
    ("dtype", "computes_bf16"), [(torch.float32, False), *((torch.bfloat16, computes) for computes in COMPUTES_BF16)]
)
def test_the_kernel_errs_no_more_than_torch(dtype, computes_bf16):
    counts = [70, 9, 131, 600]
    inputs = tensors(counts, 128, 256, None, dtype)
    exact = results(loop, [t.detach().double().requires_grad_() for t in inputs], counts)
    kernel = partial(native.swiglu_experts, computes_bf16=computes_bf16)
    both = [results(way, inputs, counts) for way in (kernel, blocked.swiglu_experts)]
    for ours, torchs, expected in zip(*both, exact, strict=True):
        errors = [(values.double() - expected).norm() for values in (ours, torchs)]
        assert errors[0] <= (1.5 if dtype == torch.float32 else 1.05) * errors[1]


@pytest.mark.parametrize("few", [0, 13])
def test_activations_of_any_size_and_what_is_not_finite(few):
    """silu and its slope from underflow to overflow; a row that is not a number spoils itself and nothing else."""
    gates = torch.tensor([0.0, 1e-30, 1.0, -1.0, 20.0, -20.0, 86.0, -86.0, 1e3, -1e3, 1e30, -1e30])
    rows = torch.zeros(len(gates) + 1, 8)
    rows[:-1, 0], rows[:, 1] = gates, 1.0
    rows[-1, 0] = float("nan")
    weight = torch.zeros(1, 16, 8)
    weight[0, :8, 0] = weight[0, 8:, 1] = 1.0  # gate is the first column, up is 1
    inputs = [
        rows.requires_grad_(),
        weight.requires_grad_(),
        torch.eye(8)[None].requires_grad_(),
        torch.ones(len(rows)),
    ]
    inputs[-1].requires_grad_()
    out, grad_rows, *_ = results(partial(native.swiglu_experts, few=few), inputs, [len(rows)])
    expected, expected_rows, *_ = results(loop, inputs, [len(rows)])
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(grad_rows, expected_rows, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert out[-1].isnan().all() and not out[:-1].isnan().any()


def test_gradients_accumulate_over_backward_passes():
    """The gradient of the first pass is memory that the second must not write to."""
    counts = [9, 0, 140]
    inputs = tensors(counts, 16, 24, None)
    for _ in range(3):
        native.swiglu_experts([(inputs[0], inputs[1])], inputs[2], inputs[3], counts).sum().backward()
    out = loop([(inputs[0], inputs[1])], inputs[2], inputs[3], counts)
    for tensor, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads_", [1, 2, 5])
@pytest.mark.parametrize("counts", [*COUNTS, [5000, 3, 4000]])
def test_items_hold_every_row_once(counts, threads_):
    work = native.items(counts, threads_)
    sizes = work["high"] - work["low"]
    assert (sizes > 0).all() and (np.diff(sizes) <= 0).all()
    owner = np.repeat(np.arange(len(counts)), counts)
    seen = np.full(len(owner), -1)
    for item in work:
        assert (seen[item["low"] : item["high"]] == -1).all()
        seen[item["low"] : item["high"]] = item["expert"]
    assert (seen == owner).all()
    if threads_ > 1 and sum(counts) > 4000:
        assert sizes.max() <= max(native.MIN_ROWS, -(-sum(counts) // (2 * threads_)))


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (torch.ones(2, 8), True),
        (torch.ones(2, 12), False),
        (torch.ones(2, 32, dtype=torch.bfloat16), True),
        (torch.ones(2, 24, dtype=torch.bfloat16), False),
        (torch.ones(2, 16, dtype=torch.float16), False),
    ],
)
def test_what_the_kernel_takes(tensor, fits):
    assert build.supports(torch.ones(1, 16, dtype=tensor.dtype), tensor, dtypes=native.DTYPES) == fits
    assert not build.supports(torch.ones(1, 16), torch.ones(1, 16, dtype=torch.bfloat16), dtypes=native.DTYPES)


def test_threads_are_torchs_own_or_else_a_pools(monkeypatch, threads):
    """The same numbers from both, and for a caller that is not the main thread."""
    counts = [1100, 2, 0, 1]
    inputs = tensors(counts, 40, 8, None)
    assert build._openmp() is not None
    with ThreadPoolExecutor(1) as other:
        outcomes = [results(native.swiglu_experts, inputs, counts)]
        outcomes.append(other.submit(results, native.swiglu_experts, inputs, counts).result(timeout=60))
        monkeypatch.setattr(build, "_openmp", lambda: None)
        outcomes.append(results(native.swiglu_experts, inputs, counts))
    for values in zip(*outcomes, strict=True):
        torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(values[2], values[0], rtol=1e-6, atol=1e-7)


def wrong(change) -> tuple:
    """Arguments of 8 rows for 2 experts, one of them changed."""
    arguments = dict(
        rows=torch.ones(8, 16), gate_up=torch.ones(2, 48, 16), down=torch.ones(2, 16, 24), probs=torch.ones(8),
        counts=[3, 5],
    )  # fmt: skip
    arguments |= change
    return [(arguments["rows"], arguments["gate_up"])], arguments["down"], arguments["probs"], arguments["counts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(counts=[3, 4]), r"probs: found \[8\], expected \[7\]: the counts' sum"),
        (dict(counts=[3, 5000]), "the counts' sum"),
        (dict(counts=[13, -5]), "counts: found -5, expected none below 0"),
        (dict(counts=[8]), r"down: found \[2, 16, 24\], expected \[1, H, F\] for 1 counts"),
        (dict(rows=torch.ones(7, 16)), r"rows: found \[7, 16\], expected \[8, K\]"),
        (dict(probs=torch.ones(8, 1)), "probs"),
        (dict(gate_up=torch.ones(2, 40, 16)), r"weight: found \[2, 40, 16\], expected \[2, 48, 16\]"),
        (dict(rows=torch.ones(8, 24)), r"weight: found \[2, 48, 16\], expected \[2, 48, 24\]"),
        (dict(rows=torch.ones(8, 12), gate_up=torch.ones(2, 48, 12)), "steps of 32 bytes"),
        (dict(rows=torch.ones(8, 16).bfloat16()), "expected one of float32 and bfloat16"),
        (dict(down=torch.ones(2, 16, 24, device="meta")), "on a CPU"),
        (dict(down=torch.ones(2, 12, 24)), "H in steps of 32 bytes"),
    ],
)
def test_what_does_not_fit_is_refused_before_memory_is_read(change, message):
    with pytest.raises(ValueError, match=message):
        native.swiglu_experts(*wrong(change))


def test_tensors_that_are_not_contiguous():
    counts = [3, 5]
    inputs = tensors(counts, 16, 24, None)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in inputs]
    for values, expected in zip(
        results(native.swiglu_experts, strided, counts), results(native.swiglu_experts, inputs, counts), strict=True
    ):
        torch.testing.assert_close(values, expected)
