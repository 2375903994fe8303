"""Experts through Transformer Engine's grouped GEMM: called as its sources of 2.20.2 declare it, by a stand-in that
computes on the CPU. On a GPU with the package, the same against the loop."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dsmoe.errors import ConfigError
from dsmoe.moe.experts import GroupedExperts, LowRankExperts
from dsmoe.moe.linear import loop_linear, transformer_engine_linear
from dsmoe.runtime import accelerations, device
from dsmoe.runtime.device import on_gpu

COUNTS = [[3, 0, 5, 1], [0, 0, 0, 7], [7, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1], [0]]
TOLERANCE = dict(rtol=2e-2, atol=2e-2)  # bf16 keeps 8 bits
HIDDEN, FFN = 16, 24


def general_grouped_gemm(
    A, B, out, quantization_params, out_dtype, layout="TN", m_splits=None, gelu=False, grad=False, accumulate=False,
    bias=None, use_bias=False, use_split_accumulator=False, D_dtype=None, single_output=False,
):  # fmt: skip
    """What the Python and C++ of 2.20.2 do with plain tensors: matrices in columns, so that out = op(B) op(A); a single
    output is filled block after block; where an operand is empty, the block is 0 unless it accumulates."""
    assert all(isinstance(group, list) for group in (A, B, out, quantization_params))
    assert len(A) == len(B) == len(quantization_params) and quantization_params == [None] * len(A)
    assert not (gelu or accumulate or bias or use_bias or D_dtype) and out_dtype == out[0].dtype
    assert all(tensor.is_contiguous() and tensor.dim() == 2 for tensor in A + B + out)
    rows = [len(b) for b in B]
    if single_output:
        assert len(out) == 1 and m_splits == rows
        out = list(out[0].split(rows))
    assert len(out) == len(A)
    for a, b, block in zip(A, B, out, strict=True):
        left, right = b.t() if layout[1] == "T" else b, a.t() if layout[0] == "T" else a
        block.copy_(left @ right if a.numel() and b.numel() else torch.zeros_like(block))
    return out, [torch.Tensor()] * len(A), [torch.Tensor()] * len(A)


@pytest.fixture
def transformer_engine(monkeypatch):
    module = ModuleType("transformer_engine.pytorch.cpp_extensions")
    module.general_grouped_gemm = general_grouped_gemm
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    actual = accelerations.Acceleration("Transformer Engine", True, "fused RMSNorm", "2.20.2")
    monkeypatch.setattr("dsmoe.moe.experts.find_acceleration", lambda name: actual)


def random_tensor(*shape, seed, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).div(2).requires_grad_()


@pytest.mark.parametrize("counts", COUNTS)
def test_the_product_is_the_loop(transformer_engine, counts):
    ends_e = torch.tensor(counts).cumsum(0).to(torch.int32)
    results = []
    for linear in (transformer_engine_linear, loop_linear):
        rows, weight = random_tensor(sum(counts), HIDDEN, seed=0), random_tensor(len(counts), FFN, HIDDEN, seed=1)
        out = linear(rows, weight, ends_e)
        out.backward(random_tensor(sum(counts), FFN, seed=2).detach())
        results.append((out, rows.grad, weight.grad))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    for count, gradient in zip(counts, results[0][2], strict=True):
        assert gradient.any() == (count > 0), "an expert without rows must get a gradient, and it must be exactly 0"


@pytest.mark.parametrize("asked", [False, True])
def test_fp32_is_multiplied_as_tf32_where_that_is_asked_for(asked, transformer_engine, monkeypatch):
    called, extensions = [], sys.modules["transformer_engine.pytorch.cpp_extensions"]
    monkeypatch.setattr(
        extensions, "general_grouped_gemm", lambda *x, **how: called.append(x) or general_grouped_gemm(*x, **how)
    )
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    rows, weight = random_tensor(9, HIDDEN, seed=0, dtype=torch.float32), random_tensor(2, FFN, HIDDEN, seed=1).float()
    ends_e = torch.tensor([4, 9], dtype=torch.int32)
    expected = loop_linear(rows, weight, ends_e)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for wanted in (not asked, asked):  # the last word counts
            device.use_tf32(wanted)
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if asked else "ieee")
        actual = transformer_engine_linear(rows, weight, ends_e)
    finally:
        device.use_tf32(False)
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(called) == asked
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)  # the stand-in rounds nothing


@pytest.mark.skipif(on_gpu(), reason="on a GPU the package itself is called, below")
@pytest.mark.parametrize("kind", [GroupedExperts, LowRankExperts])
def test_experts_are_those_of_the_loop(transformer_engine, kind):
    shapes = SimpleNamespace(num_moe_experts=4, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN)
    alone = SimpleNamespace(ep=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    outputs = []
    for implementation in ("transformer_engine", "loop"):
        options = {"rank": 8} if kind is LowRankExperts else {}
        experts = kind(4, shapes, pg_collection=alone, implementation=implementation, **options).bfloat16()
        for seed, parameter in enumerate(experts.parameters()):
            parameter.data.copy_(random_tensor(*parameter.shape, seed=seed))
        rows, probs = random_tensor(9, HIDDEN, seed=7), torch.rand(9, generator=torch.Generator().manual_seed(8))
        if options:
            options = {"reduce_erH": random_tensor(4, 8, HIDDEN, seed=9)}
        out, _ = experts(rows, torch.tensor([3, 0, 5, 1]), probs, **options)
        out.sum().backward()
        outputs.append((out, rows.grad, *(parameter.grad for parameter in experts.parameters())))
    for actual, expected in zip(*outputs, strict=True):
        scale = expected.detach().abs().max()
        torch.testing.assert_close(actual / scale, expected / scale, **TOLERANCE)


@pytest.mark.skipif(on_gpu(), reason="there may be one")
def test_without_the_package_or_a_gpu_it_is_refused_with_the_reason():
    shapes = SimpleNamespace(num_moe_experts=4, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN)
    with pytest.raises(ConfigError, match=r"found transformer_engine, but Transformer Engine is .*pip install"):
        GroupedExperts(4, shapes, pg_collection=None, implementation="transformer_engine")


@pytest.mark.gpu
def test_the_installed_package_declares_what_is_called():
    extensions = pytest.importorskip("transformer_engine.pytorch.cpp_extensions")
    declared = inspect.signature(extensions.general_grouped_gemm).parameters
    assert list(declared) == list(inspect.signature(general_grouped_gemm).parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS)
def test_the_installed_package_is_the_loop(counts):
    pytest.importorskip("transformer_engine.pytorch")
    ends_e = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    results = []
    for linear in (transformer_engine_linear, loop_linear):
        rows = random_tensor(sum(counts), 64, seed=0).detach().cuda().requires_grad_()
        weight = random_tensor(len(counts), 32, 64, seed=1).detach().cuda().requires_grad_()
        out = linear(rows, weight, ends_e)
        out.sum().backward()
        results.append((out, rows.grad, weight.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE)
