"""The vocabulary loss in chunks is the plain cross entropy, in value and gradients, without a tensor of all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dsmoe.model import loss
from dsmoe.model.loss import linear_cross_entropy, plain_cross_entropy
from dsmoe.native import ways

TOKENS, VOCABULARY, HIDDEN = 77, 130, 16
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2e-2, atol=3e-2)}


@pytest.fixture(autouse=True, params=["C++", "torch"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(ways, "fastest", lambda *question: "native" if request.param == "C++" else "torch")
    return request.param


def plain_cross_entropy_in_fp64(hidden, weight, labels, weights):
    return (F.cross_entropy(hidden @ weight.t(), labels, reduction="none") * weights).sum()


def inputs(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (scale * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator) * (torch.arange(TOKENS) % 5 > 0)
    return hidden, weight, labels, weights


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 5, 40, 77, 1000])
def test_chunks_give_the_plain_loss_and_its_gradients(rows, dtype, kernel, monkeypatch):
    """Of bf16 torch rounds logits to bf16, as the plain loss does; the kernel keeps their fp32 sums, as fp64 would."""
    monkeypatch.setitem(loss.CHUNK, "cpu", rows * VOCABULARY)
    hidden, weight, labels, weights = inputs(dtype)
    exact = kernel == "C++"
    leaves = [t.detach().to(torch.float64 if exact else dtype).requires_grad_() for t in (hidden, weight)]
    actual = linear_cross_entropy(hidden, weight, labels, weights)
    expected = (plain_cross_entropy_in_fp64 if exact else plain_cross_entropy)(*leaves, labels, weights)
    assert actual.dtype == torch.float32 and actual.dim() == 0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)
    here, there = torch.autograd.grad(3 * actual, (hidden, weight)), torch.autograd.grad(3 * expected, leaves)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.double(), **TOLERANCE[dtype])


def test_a_label_whose_probability_underflows_has_a_finite_loss():
    hidden, weight, labels, weights = inputs(scale=300.0)
    actual = linear_cross_entropy(hidden, weight, labels, weights)
    assert torch.isfinite(actual) and actual > 1000
    torch.testing.assert_close(actual, plain_cross_entropy(hidden, weight, labels, weights), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 8), (1, 1), (300, 1200)])
def test_any_number_of_tokens_words_and_threads(tokens, vocabulary, threads, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 96 * vocabulary)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator).requires_grad_()
    labels, weights = torch.randint(vocabulary, (tokens,), generator=generator), torch.ones(tokens)
    values = [way(hidden, weight, labels, weights) for way in (linear_cross_entropy, plain_cross_entropy)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    for pair in zip(*(torch.autograd.grad(value, (hidden, weight)) for value in values), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_is_not_hidden():
    hidden, weight, labels, _ = (tensor.detach().clone() for tensor in inputs())
    hidden[3, 0] = float("nan")
    assert linear_cross_entropy(hidden, weight, labels, torch.ones(TOKENS)).isnan()


@pytest.mark.parametrize("label", [-1, VOCABULARY])
def test_a_label_outside_the_vocabulary_is_an_error(label):
    hidden, weight, labels, weights = inputs()
    labels[5] = label
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, labels, weights)


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
    monkeypatch.setitem(loss.CHUNK, "cpu", 32 * VOCABULARY)
    hidden, weight, labels, weights = (x.detach().requires_grad_(learns and x.is_floating_point()) for x in inputs())
    with LargestTensor() as seen:
        value = linear_cross_entropy(hidden, weight, labels, weights.detach())
        if learns:
            value.backward()
    assert seen.numel <= max(32 * VOCABULARY, VOCABULARY * HIDDEN) < TOKENS * VOCABULARY
