"""The grouped GEMM is the loop over experts, for any split of the rows: empty experts, one expert with all, no row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dsmoe.errors import ConfigError
from dsmoe.moe.experts import GroupedExperts, LowRankExperts, grouped_linear, loop_linear

HIDDEN, FFN, RANK = 16, 24, 8
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 7], [7, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1], [0]]
# bf16 keeps 8 bits: one rounding of the result and one of what enters it.
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2e-2, atol=2e-2)}
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
SHAPES = SimpleNamespace(num_moe_experts=4, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN)


def random_tensor(*shape, dtype, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_linear_is_the_loop(counts, dtype):
    ends_e = torch.tensor(counts).cumsum(0).to(torch.int32)
    results = []
    for linear in (grouped_linear, loop_linear):
        rows = random_tensor(sum(counts), HIDDEN, dtype=dtype)
        weight = random_tensor(len(counts), FFN, HIDDEN, dtype=dtype, seed=1)
        out = linear(rows, weight, ends_e)
        out.backward(random_tensor(sum(counts), FFN, dtype=dtype, seed=2).detach())
        results.append((out, rows.grad, weight.grad))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])
    for count, gradient in zip(counts, results[0][2], strict=True):
        assert gradient.any() == (count > 0), "an expert without rows must get a gradient, and it must be exactly 0"


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The operands of every call of torch's grouped GEMM."""
    seen, original = [], F.grouped_mm

    def grouped_mm(rows, weight, offs):
        seen.append((rows, weight, offs))
        return original(rows, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)
    return seen


def as_cuda_wants(rows, weight, offs) -> bool:
    strides = (rows.stride(0), *weight.stride()[:1], max(weight.stride()[1:]))
    aligned = rows.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and len(offs) < 1024 and all(stride * rows.element_size() % 16 == 0 for stride in strides)


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_a_weight_that_begins_anywhere_is_multiplied_where_cuda_can(offset, calls):
    """Under ZeRO-3 a weight is a view into flat memory, behind parameters of any size."""
    memory = random_tensor(offset + 4 * FFN * HIDDEN, dtype=torch.bfloat16).detach()
    weight = memory[offset:].view(4, FFN, HIDDEN).requires_grad_()
    rows, ends = random_tensor(9, HIDDEN, dtype=torch.bfloat16), torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    actual = grouped_linear(rows, weight, ends)
    torch.testing.assert_close(actual, loop_linear(rows, weight, ends), **TOLERANCE[torch.bfloat16])
    actual.backward(torch.ones_like(actual))
    assert weight.grad.shape == weight.shape and rows.grad is not None
    products = [call for call in calls if call[1].dim() == 3]  # forward, and the gradient of rows
    assert len(products) == 2 and all(as_cuda_wants(*call) for call in products)


@pytest.mark.parametrize("experts", [1023, 1024, 2050])
def test_any_number_of_experts_on_a_rank(experts, calls):
    counts = torch.randint(0, 3, (experts,), generator=torch.Generator().manual_seed(0))
    ends = counts.cumsum(0).to(torch.int32)
    results = []
    for linear in (grouped_linear, loop_linear):
        rows = random_tensor(int(ends[-1]), 8, dtype=torch.float32)
        weight = random_tensor(experts, 4, 8, dtype=torch.float32, seed=1)
        out = linear(rows, weight, ends)
        out.backward(torch.ones_like(out))
        results.append((out, rows.grad, weight.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    products = [call for call in calls if call[1].dim() == 3]  # forward, and the gradient of rows
    assert len(products) == 2 * -(-experts // 1023) and all(as_cuda_wants(*call) for call in products)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [3, 12])
def test_latents_of_any_width_on_a_cpu(rank, dtype):
    """rank 12 in bf16 was a stack trace after validation: its rows are not whole multiples of 16 bytes."""
    outputs = []
    for implementation in ("auto", "blocked", "loop"):
        experts = build(LowRankExperts, implementation, rank=rank).to(dtype)
        counts = torch.tensor([3, 0, 5, 1])
        rows, reduce = random_tensor(9, HIDDEN, dtype=dtype), random_tensor(4, rank, HIDDEN, dtype=dtype, seed=9)
        out, _ = experts(rows, counts, torch.ones(9), reduce_erH=reduce)
        out.sum().backward()
        outputs.append((out, rows.grad, reduce.grad))
    for actual in outputs[:2]:
        for tensor, expected in zip(actual, outputs[2], strict=True):
            scale = expected.detach().abs().max()  # a gradient is a sum of 24 terms of this size, rounded in any order
            torch.testing.assert_close(tensor / scale, expected / scale, **TOLERANCE[dtype])


def test_a_latent_that_grouped_gemm_cannot_take_is_refused_with_the_widths():
    with pytest.raises(ConfigError, match=r"router.rank: found 12, expected a multiple of 8"):
        build(LowRankExperts, "grouped_mm", rank=12)


@pytest.mark.parametrize("linear", [grouped_linear, loop_linear])
def test_no_row_still_hangs_rows_and_weights_in_the_graph(linear):
    """What came before the rows has to run backward too: it is an all-to-all that other ranks wait in."""
    visited = []
    rows = random_tensor(0, HIDDEN, dtype=torch.float32)
    weight = random_tensor(4, FFN, HIDDEN, dtype=torch.float32)
    passed = rows * 1
    passed.register_hook(lambda gradient: visited.append(tuple(gradient.shape)))
    linear(passed, weight, torch.zeros(4, dtype=torch.int32)).sum().backward()
    assert visited == [(0, HIDDEN)]
    assert weight.grad is not None and not weight.grad.any()


def build(kind: type, implementation: str, **options):
    experts = kind(4, SHAPES, pg_collection=SimpleNamespace(ep=ALONE), implementation=implementation, **options)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data.copy_(random_tensor(*parameter.shape, dtype=torch.float32, seed=seed))
    return experts


@pytest.mark.parametrize("implementation", ["grouped_mm", "native", "blocked", "loop"])
@pytest.mark.parametrize("counts", [counts for counts in COUNTS if len(counts) == 4])
def test_experts_are_swiglu_weighted_by_the_router(counts, implementation):
    experts = build(GroupedExperts, implementation)
    rows, probs = random_tensor(sum(counts), HIDDEN, dtype=torch.float32), torch.rand(sum(counts), requires_grad=True)
    out, bias = experts(rows, torch.tensor(counts), probs)
    expected = []
    for e, (block, weights) in enumerate(zip(rows.split(counts), probs.split(counts), strict=True)):
        gate, up = experts.gate_up_proj[e, :FFN], experts.gate_up_proj[e, FFN:]
        for x, p in zip(block, weights, strict=True):
            expected.append(p * (experts.down_proj[e] @ (F.silu(gate @ x) * (up @ x))))
    expected = torch.stack(expected) if expected else out * 0
    assert bias is None
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, [rows, probs, *experts.parameters()])


@pytest.mark.parametrize("implementation", ["grouped_mm", "native", "blocked", "loop"])
@pytest.mark.parametrize("counts", [counts for counts in COUNTS if len(counts) == 4])
def test_low_rank_experts_gate_on_the_latent_of_their_router(counts, implementation):
    experts = build(LowRankExperts, implementation, rank=RANK)
    reduce_erH = random_tensor(4, RANK, HIDDEN, dtype=torch.float32, seed=9)
    rows, probs = random_tensor(sum(counts), HIDDEN, dtype=torch.float32), torch.rand(sum(counts), requires_grad=True)
    out, _ = experts(rows, torch.tensor(counts), probs, reduce_erH=reduce_erH)
    expected = []
    for e, (block, weights) in enumerate(zip(rows.split(counts), probs.split(counts), strict=True)):
        for x, p in zip(block, weights, strict=True):
            gate = F.silu(experts.gate_proj[e] @ (reduce_erH[e] @ x))
            expected.append(p * (experts.down_proj[e] @ (gate * (experts.up_proj[e] @ x))))
    expected = torch.stack(expected) if expected else out * 0
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, [rows, probs, reduce_erH, *experts.parameters()])
    sent = experts.linear(rows, reduce_erH, torch.tensor(counts).cumsum(0).to(torch.int32))
    torch.testing.assert_close(experts(rows, torch.tensor(counts), probs, latents_Rr=sent)[0], out)


def assert_same_gradients(actual, expected, inputs) -> None:
    weights = torch.arange(1.0, HIDDEN + 1)
    here = torch.autograd.grad((actual * weights).sum(), inputs, retain_graph=True)
    there = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True)
    for one, other in zip(here, there, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # sums of up to 24 x 16 terms around 10


def test_a_width_that_grouped_mm_cannot_take_is_refused_before_work_starts():
    odd = SimpleNamespace(num_moe_experts=4, hidden_size=HIDDEN, moe_ffn_hidden_size=6)
    with pytest.raises(ConfigError, match=r"moe_ffn_hidden_size: found 6, expected a multiple of 8"):
        GroupedExperts(4, odd, pg_collection=SimpleNamespace(ep=ALONE), implementation="grouped_mm")
