"""RMSNorm in C++ is torch's, in value and gradients."""

from __future__ import annotations

import pytest
import torch

from dsmoe import native
from dsmoe.model import native_norm
from dsmoe.model.native_norm import RMSNorm
from dsmoe.native import ways

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no C++ kernels here")


@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 16), (300, 2, 4, 24), (513, 256)])
@pytest.mark.parametrize("apart", [False, True])
def test_the_kernel_is_torchs_norm(shape, threads, apart, monkeypatch):
    monkeypatch.setattr(ways, "fastest", lambda *question: "native")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:-1], 3 * shape[-1], generator=generator).chunk(3, dim=-1)[1]
    x = (x if apart else x.contiguous()).detach().requires_grad_()
    norm = RMSNorm(shape[-1], eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    exact = torch.nn.RMSNorm(shape[-1], eps=1e-5).double()
    exact.weight.data.copy_(norm.weight)
    exact_x = x.detach().double().requires_grad_()
    actual, expected = norm(x), exact(exact_x)
    assert isinstance(actual.grad_fn, native_norm._RMSNorm._backward_cls)
    gradient = torch.randn(shape, generator=generator)
    here = torch.autograd.grad(actual, (x, norm.weight), gradient)
    there = torch.autograd.grad(expected, (exact_x, exact.weight), gradient.double())
    for one, other in zip((actual, *here), (expected, *there), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("x", [torch.ones(2, 12), torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(0, 8)])
def test_what_the_kernel_leaves_to_torch(x):
    norm, plain = RMSNorm(x.size(-1), eps=1e-5).to(x.dtype), torch.nn.RMSNorm(x.size(-1), eps=1e-5).to(x.dtype)
    assert torch.equal(norm(x), plain(x))


def test_the_faster_way_is_taken(monkeypatch):
    x, norm = torch.randn(3, 16, requires_grad=True), RMSNorm(16, eps=1e-5)
    for way, is_ours in ("native", True), ("torch", False):
        monkeypatch.setattr(ways, "fastest", lambda *question, way=way: way)
        assert isinstance(norm(x).grad_fn, native_norm._RMSNorm._backward_cls) == is_ours


def test_what_is_compared_does_the_same_work():
    for work in native_norm.norm_candidates(16, numbers=64).values():
        work()
