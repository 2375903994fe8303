"""Causal attention in C++ is torch's, in value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe import native
from dsmoe.model import attention, native_attention, rotary
from dsmoe.native import ways

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no C++ kernels here")

KERNEL = native_attention.causal_attention


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None, by=None) -> Tensor:
    query, key = (rotary.turn(x, by) for x in (query, key))
    heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=query.size(2) != key.size(2))
    return out.permute(2, 0, 1, 3)


def inputs(length: int, batch: int, heads: int, groups: int, size: int, scale: float = 1.0) -> list[Tensor]:
    """Parts of one tensor, as a fused projection leaves them."""
    generator = torch.Generator().manual_seed(length)
    together = scale * torch.randn(length, batch, heads + 2 * groups, size, generator=generator)
    return [x.detach().requires_grad_() for x in together.split([heads, groups, groups], dim=2)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 8), (7, 3, 2, 2, 16), (32, 2, 4, 2, 8), (33, 1, 4, 1, 24), (150, 2, 6, 3, 40)]
)
def test_the_kernel_is_torchs_attention(shape, scale, turned, threads):
    angles = rotary.angles(torch.arange(shape[0]), shape[-1], 100.0) if turned else None
    tensors = inputs(*shape)
    assert native_attention.supports(*tensors)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = native_attention.causal_attention(*tensors, scale, angles)
    expected = reference(*exact, scale, angles)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.linspace(-1, 1, actual.numel()).view(actual.transpose(0, 1).shape).transpose(0, 1)
    here, there = (
        torch.autograd.grad(actual, tensors, gradient),
        torch.autograd.grad(expected, exact, gradient.double()),
    )
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


def test_scores_of_any_size():
    tensors = inputs(40, 1, 2, 2, 8, scale=30.0)
    torch.testing.assert_close(
        native_attention.causal_attention(*tensors), reference(*tensors, None), rtol=1e-4, atol=1e-3
    )


def test_a_query_never_sees_later_keys():
    query, key, value = (x.detach() for x in inputs(70, 1, 1, 1, 8))
    before = native_attention.causal_attention(query, key, value)
    key[50:], value[50:] = 1e3, 1e3
    after = native_attention.causal_attention(query, key, value)
    assert torch.equal(before[:50], after[:50]) and not torch.isclose(before[50:], after[50:]).any()


def test_what_the_kernel_leaves_to_torch():
    query, key, value = inputs(8, 1, 2, 2, 8)
    assert not native_attention.supports(query[:1], key, value), "one new token and a cache"
    assert not native_attention.supports(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert not native_attention.supports(*inputs(8, 1, 2, 2, 12))


@pytest.mark.parametrize("way", ["native", "torch"])
def test_the_faster_way_is_taken(way, monkeypatch):
    called = []
    monkeypatch.setattr(ways, "fastest", lambda *question: way)
    monkeypatch.setattr(
        attention.native_attention, "causal_attention", lambda *x, kernel=KERNEL: called.append(1) or kernel(*x)
    )
    tensors = inputs(8, 2, 4, 2, 8)
    actual = attention.CausalAttention(None, 1, None, "self", rotary_base=100.0)(*tensors)
    assert bool(called) == (way == "native")
    expected = reference(*tensors, None, rotary.angles(torch.arange(8), 8, 100.0))
    torch.testing.assert_close(actual, expected.flatten(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotary_base", [None, 100.0])
def test_what_is_compared_runs(rotary_base):
    for work in attention.attention_candidates(8, 4, 2, 8, rotary_base, batch=1).values():
        work()
