"""The vocabulary loss in chunks is the plain cross entropy, in value and gradients, without a tensor of all logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe.model import loss
from dsmoe.model.loss import linear_cross_entropy, plain_cross_entropy

TOKENS, VOCABULARY, HIDDEN = 37, 50, 8
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-6), torch.bfloat16: dict(rtol=2e-2, atol=1e-2)}


def inputs(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (scale * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator) * (torch.arange(TOKENS) % 5 > 0)
    return hidden, weight, labels, weights


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 5, 37, 1000])
def test_chunks_give_the_plain_loss_and_its_gradients(rows, dtype, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", rows * VOCABULARY)
    hidden, weight, labels, weights = inputs(dtype)
    found = linear_cross_entropy(hidden, weight, labels, weights)
    expected = plain_cross_entropy(hidden, weight, labels, weights)
    assert found.dtype == torch.float32 and found.dim() == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    here, there = (torch.autograd.grad(3 * value, (hidden, weight)) for value in (found, expected))
    for one, other in zip(here, there, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


def test_a_label_whose_probability_underflows_has_a_finite_loss():
    hidden, weight, labels, weights = inputs(scale=300.0)
    found = linear_cross_entropy(hidden, weight, labels, weights)
    assert torch.isfinite(found) and found > 1000
    torch.testing.assert_close(found, plain_cross_entropy(hidden, weight, labels, weights), rtol=1e-5, atol=0)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("learns", [True, False])
def test_no_tensor_of_all_logits(learns, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 4 * VOCABULARY)
    hidden, weight, labels, weights = (x.detach().requires_grad_(learns and x.is_floating_point()) for x in inputs())
    with LargestTensor() as seen:
        value = linear_cross_entropy(hidden, weight, labels, weights.detach())
        if learns:
            value.backward()
    assert seen.numel <= max(4 * VOCABULARY, VOCABULARY * HIDDEN) < TOKENS * VOCABULARY
