"""Every Triton kernel is its plain torch reference, in Triton's interpreter, on a CPU: values and gradients, tokens and
experts without rows, sizes that fill no block."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (pip install -e '.[triton]')")

from dsmoe.triton import grouped, plan, rows, scores, swiglu  # noqa: E402

TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=1.6e-2, atol=1.6e-2)}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)
MAPS = {
    "some": lambda t, e: torch.rand(t, e) < 0.3,
    "none": lambda t, e: torch.zeros(t, e, dtype=torch.bool),
    "all": lambda t, e: torch.ones(t, e, dtype=torch.bool),
    "one expert": lambda t, e: torch.arange(e).eq(e // 2).expand(t, e).clone(),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def routes(kind: str, tokens: int, experts: int) -> torch.Tensor:
    map_TE = MAPS[kind](tokens, experts)
    map_TE[tokens // 2] = False  # a token without experts
    map_TE[0] |= kind == "some"  # and one with all
    return map_TE


def gradients(function, *leaves):
    """The value of a function and the gradients of its leaves, for a fixed gradient of its value."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, grad)]


def assert_same(actual, expected, dtype):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("count", "width"), [(0, 8), (5, 40), (3, 130)])
def test_swiglu(dtype, count, width):
    gate, up = (torch.randn(count, width).to(dtype) for _ in range(2))
    probs = torch.rand(count)
    assert_same(gradients(swiglu.swiglu, gate, up, probs), gradients(swiglu.swiglu_reference, gate, up, probs), dtype)
    both = torch.cat((gate, up), dim=1)
    halves = swiglu.swiglu(*both.chunk(2, dim=1), probs)  # of one tensor, as one product makes them
    torch.testing.assert_close(halves, swiglu.swiglu_reference(gate, up, probs), **TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("kind", MAPS)
def test_rows_are_summed_by_token_and_spread_again(dtype, kind):
    tokens, experts, hidden = 21, 6, 40
    token_R = routes(kind, tokens, experts).t().nonzero()[:, 1]
    order = rows.TokenOrder.of(token_R, tokens)
    values_RH, tokens_TH = torch.randn(len(token_R), hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    actual = gradients(lambda x: order.sum_rows(x), values_RH)
    assert_same(actual, gradients(lambda x: rows.sum_rows_reference(x, token_R, tokens), values_RH), dtype)
    assert not actual[0][tokens // 2].any(), "a token without experts gets exactly 0"
    assert torch.equal(actual[0], order.sum_rows(values_RH))  # in a fixed order
    actual = gradients(lambda x: order.take_rows(x), tokens_TH)
    assert torch.equal(actual[0], tokens_TH[token_R])
    expected = rows.sum_rows_reference(
        torch.randn(len(token_R), hidden, generator=torch.Generator().manual_seed(1)).to(dtype), token_R, tokens
    )
    torch.testing.assert_close(actual[1], expected, **TOLERANCE[dtype])


def test_sums_are_rounded_once():
    """bf16 has no 257: with a rounding at each addition, as atomics have it, the sum is 0."""
    token_R = torch.zeros(6, dtype=torch.int64)
    rows_RH = torch.tensor([256, 1, 1, 1, 1, -256], dtype=torch.bfloat16).view(6, 1).expand(6, 40).contiguous()
    assert rows.TokenOrder.of(token_R, 1).sum_rows(rows_RH).eq(4).all()


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (64, 8), (150, 6), (70, 33), (9, 300)])
def test_the_order_of_routes(kind, tokens, experts):
    map_TE = routes(kind, tokens, experts)
    actual, expected = plan.route_order(map_TE, int(map_TE.sum())), plan.route_order_reference(map_TE)
    assert torch.equal(plan.PendingOrder(map_TE).counts_X, map_TE.sum(0)) and torch.equal(
        actual.flat_N, expected.flat_N
    )
    for name in ("token_R", "place_R", "start_T"):
        assert torch.equal(getattr(actual.by_token, name), getattr(expected.by_token, name)), name


@DTYPES
@pytest.mark.parametrize(("experts", "rank"), [(3, 8), (2, 20), (1, 32)])
def test_norms_of_latents(dtype, experts, rank):
    hidden_TH, reduce_ErH = torch.randn(70, 72).to(dtype), torch.randn(experts, rank, 72).to(dtype)
    reduce_ErH[0] = 0
    actual = scores.latent_norms(hidden_TH, reduce_ErH)
    torch.testing.assert_close(actual, scores.latent_norms_reference(hidden_TH, reduce_ErH), rtol=1e-4, atol=1e-4)
    assert not actual[:, 0].any()
    factor_TE = torch.randn(70, experts)
    actual, expected = (
        function(hidden_TH, reduce_ErH, factor_TE)
        for function in (scores.scaled_latents, scores.scaled_latents_reference)
    )
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


COUNTS = [[3, 0, 5, 1], [0, 0, 0, 7], [40, 0, 1, 2], [0, 0], [9]]


def ends_of(counts) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@DTYPES
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products(dtype, counts):
    rows_RK = (0.3 * torch.randn(sum(counts), 72)).to(dtype)
    weight_eNK = (0.3 * torch.randn(len(counts), 40, 72)).to(dtype)
    ends = ends_of(counts)
    actual = gradients(lambda r, w: grouped.grouped_linear(r, w, ends), rows_RK, weight_eNK)
    assert_same(actual, gradients(lambda r, w: grouped.grouped_reference(r, w, ends), rows_RK, weight_eNK), dtype)
    for count, gradient in zip(counts, actual[2], strict=True):
        assert gradient.any() == (count > 0)


def test_parts_of_a_pass_add_to_one_gradient_of_each_weight():
    parts = [[3, 0, 5, 1], [0, 2, 0, 7], [1, 1, 1, 1]]
    weight = torch.randn(4, 24, 16, requires_grad=True)
    inputs = [torch.randn(sum(counts), 16) for counts in parts]
    sums: dict[int, torch.Tensor] = {}
    outputs = [grouped.grouped_linear(x, weight, ends_of(c), sums) for x, c in zip(inputs, parts, strict=True)]
    sum(out.square().sum() for out in outputs).backward()
    actual, weight.grad = weight.grad, None
    sum(grouped.grouped_reference(x, weight, ends_of(c)).square().sum() for x, c in zip(inputs, parts)).backward()
    torch.testing.assert_close(actual, weight.grad, rtol=1e-4, atol=1e-4)
    assert len(sums) == 1
