"""Every MLP that an expert can be, by every way that computes it, against a loop over rows in fp64 that is written out
here; and what asks `ExpertMLP` about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from dsmoe.config.schema import ExpertActivation
from dsmoe.errors import ConfigError
from dsmoe.moe.activations import ACTIVATIONS
from dsmoe.moe.expert_mlp import ExpertMLP, per_row
from dsmoe.moe.experts import GroupedExperts, LowRankExperts
from dsmoe.moe.gradient_accumulator import ChunkedGradAccumulator
from dsmoe.optim.groups import Role, role_of

HIDDEN, FFN, RANK = 16, 24, 8
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
SHAPES = SimpleNamespace(num_moe_experts=4, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN)
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 7], [0, 0, 0, 0]]
SPECS = [(name, bias) for name in ACTIVATIONS for bias in (False, True)]
OTHER = [spec for spec in SPECS if spec != ("swiglu", False)]  # which test_experts.py has with the kernels
# bf16 keeps 8 bits: one rounding of the result, and one of each of what enters it.
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.bfloat16: dict(rtol=4e-2, atol=4e-2)}


def plain(name: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """The activations as their papers and libraries have them."""
    sqrt = torch.tensor(2.0, dtype=gate.dtype).sqrt()
    tanh = (2 / torch.pi) ** 0.5
    value = {
        "swiglu": lambda: gate / (1 + torch.exp(-gate)) * up,
        "geglu": lambda: gate * (1 + torch.erf(gate / sqrt)) / 2 * up,
        "geglu_tanh": lambda: gate * (1 + torch.tanh(tanh * (gate + 0.044715 * gate**3))) / 2 * up,
        "reglu": lambda: gate.clamp(min=0) * up,
        "swigluoai": lambda: (
            (up.clamp(-7, 7) + 1) * gate.clamp(max=7) / (1 + torch.exp(-1.702 * gate.clamp(max=7)))
        ),
        "silu": lambda: gate / (1 + torch.exp(-gate)),
        "gelu": lambda: gate * (1 + torch.erf(gate / sqrt)) / 2,
        "relu": lambda: gate.clamp(min=0),
        "relu2": lambda: gate.clamp(min=0) ** 2,
    }  # fmt: skip
    return value[name]()


def reference(experts, rows: Tensor, counts: list[int], probs: Tensor, reduce: Tensor | None = None) -> Tensor:
    """One row after another through its expert, in fp64."""
    weights = {name: parameter.double() for name, parameter in experts.named_parameters()}
    name = experts.mlp.activation

    def project(projection: str, expert: int, x: Tensor) -> Tensor:
        bias = weights[f"{projection}_bias"][expert] if experts.mlp.bias else 0
        return weights[projection][expert] @ x + bias

    out = []
    expert_R = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for x, p, expert in zip(rows.double(), probs.double(), expert_R, strict=True):
        if reduce is not None:
            gate = project("gate_proj", expert, reduce[expert].double() @ x)
            up = project("up_proj", expert, x)
        elif ACTIVATIONS[name].gated:
            gate, up = project("gate_up_proj", expert, x).chunk(2)
        else:
            gate, up = project("up_proj", expert, x), None
        out.append(p * project("down_proj", expert, plain(name, gate, up)))
    return torch.stack(out) if out else (rows * 0).double()


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()


def build(spec: tuple[str, bool], implementation: str, dtype=torch.float32, rank: int = 0):
    options = dict(pg_collection=SimpleNamespace(ep=ALONE), implementation=implementation)
    kind, options = (LowRankExperts, options | {"rank": rank}) if rank else (GroupedExperts, options)
    experts = kind(4, SHAPES, **options, activation=spec[0], bias=spec[1]).to(dtype)
    for seed, (name, parameter) in enumerate(experts.named_parameters()):
        scale = 4.0 if name.endswith("_bias") else 0.5  # so that some reach the clamp of swigluoai
        parameter.data.copy_(random_tensor(*parameter.shape, dtype=dtype, seed=seed, scale=scale))
    return experts


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> None:
    scale = max(1.0, expected.abs().max().item() if len(expected) else 1.0)
    torch.testing.assert_close(actual.double() / scale, expected / scale, **TOLERANCE[dtype])
    here = torch.autograd.grad(actual.double().sum(), inputs)
    there = torch.autograd.grad(expected.sum(), inputs, allow_unused=True)
    for own, other in zip(here, there, strict=True):
        other = torch.zeros_like(own) if other is None else other
        scale = max(1.0, other.abs().max().item() if other.numel() else 1.0)
        torch.testing.assert_close(own / scale, other / scale, **TOLERANCE[dtype])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "loop", "auto"])
@pytest.mark.parametrize("spec", OTHER, ids=str)
def test_every_way_computes_every_mlp_it_takes(spec, implementation, counts):
    for dtype in TOLERANCE:
        experts = build(spec, implementation, dtype)
        rows, probs = random_tensor(sum(counts), HIDDEN, dtype=dtype), torch.rand(sum(counts), requires_grad=True)
        out, _ = experts(rows, torch.tensor(counts), probs)
        assert out.dtype == dtype
        assert_same(out, reference(experts, rows, counts, probs), [rows, probs, *experts.parameters()], dtype)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "loop", "auto"])
@pytest.mark.parametrize("spec", [spec for spec in OTHER if ACTIVATIONS[spec[0]].gated], ids=str)
def test_every_gated_mlp_takes_a_latent(spec, implementation, counts):
    experts = build(spec, implementation, rank=RANK)
    reduce = random_tensor(4, RANK, HIDDEN, dtype=torch.float32, seed=9)
    rows, probs = random_tensor(sum(counts), HIDDEN, dtype=torch.float32), torch.rand(sum(counts), requires_grad=True)
    out, _ = experts(rows, torch.tensor(counts), probs, reduce_erH=reduce)
    expected = reference(experts, rows, counts, probs, reduce)
    assert_same(out, expected, [rows, probs, reduce, *experts.parameters()], torch.float32)


@pytest.mark.parametrize("spec", [("reglu", True), ("relu2", False)], ids=str)
def test_parts_of_a_pass_add_up(spec):
    """As a layer with `model.moe_chunks` calls its experts."""
    experts, counts = build(spec, "auto"), torch.tensor([[2, 0, 1, 3], [0, 0, 4, 2]])
    rows, probs = random_tensor(12, HIDDEN, dtype=torch.float32), torch.rand(12)
    sums = ChunkedGradAccumulator()
    parts = [experts(rows[i * 6 :][:6], counts[i], probs[i * 6 :][:6], sums=sums)[0] for i in range(2)]
    actual = torch.autograd.grad(torch.cat(parts).sum(), list(experts.parameters()))
    whole = [reference(experts, rows[i * 6 :][:6], counts[i].tolist(), probs[i * 6 :][:6]) for i in range(2)]
    for here, there in zip(
        actual, torch.autograd.grad(torch.cat(whole).sum(), list(experts.parameters())), strict=True
    ):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_derivative_is_autograds(name):
    function = ACTIVATIONS[name]
    inputs = [random_tensor(40, 8, dtype=torch.float64, seed=i, scale=5) for i in range(1 + function.gated)]
    grad = random_tensor(40, 8, dtype=torch.float64, seed=7).detach()
    value = function.forward(*inputs)
    torch.testing.assert_close(value, plain(name, inputs[0], inputs[1] if function.gated else None))
    expected = torch.autograd.grad(value, inputs, grad)
    for here, there in zip(function.backward(grad, *(x.detach() for x in inputs)), expected, strict=True):
        torch.testing.assert_close(here, there)


def test_the_configuration_knows_every_activation():
    assert set(get_args(ExpertActivation)) == set(ACTIVATIONS)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_bias_is_a_vector_and_begins_at_zero(spec):
    experts = GroupedExperts(4, SHAPES, pg_collection=SimpleNamespace(ep=ALONE), activation=spec[0], bias=spec[1])
    roles = {name: role_of(f"mlp.experts.{name}", parameter) for name, parameter in experts.named_parameters()}
    assert {name for name, role in roles.items() if role is Role.VECTOR} == set(experts.mlp.biases)
    assert bool(experts.mlp.biases) == spec[1]
    assert not any(getattr(experts, name).any() for name in experts.mlp.biases)
    assert experts.mlp.parameters == sum(parameter[0].numel() for parameter in experts.parameters())


def test_the_gradient_of_a_bias_is_summed_in_fp32():
    """4096 rows of 1: bf16 would stop counting at 256."""
    bias = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    per_row(bias, torch.tensor([4096, 4096], dtype=torch.int32), 4096).backward(
        torch.ones(4096, 3, dtype=torch.bfloat16)
    )
    assert bias.grad.tolist() == [[4096.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("implementation", ["native", "blocked"])
@pytest.mark.parametrize("spec", [("reglu", False), ("swiglu", True), ("relu2", True)], ids=str)
def test_a_way_that_cannot_compute_an_mlp_says_which_can(spec, implementation):
    bias = str(spec[1]).lower()
    with pytest.raises(
        ConfigError,
        match=f"found {implementation}, which computes swiglu without biases only; expected auto, grouped_mm or loop "
        f"for model.expert_activation={spec[0]}, model.expert_bias={bias}",
    ):
        build(spec, implementation)


def test_an_activation_without_a_gate_has_no_use_for_a_latent():
    with pytest.raises(ConfigError, match="model.expert_activation: found relu2, expected one with a gate"):
        ExpertMLP(HIDDEN, FFN, "relu2", rank=RANK)
