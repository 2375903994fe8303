"""Optimizers by name: what each says of its state is what torch keeps; mistakes in the configuration are named."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from dsmoe.config import TrainingConfig, validate_config
from dsmoe.errors import ConfigError
from dsmoe.optim import registry
from dsmoe.optim.base import Optimizer, State
from dsmoe.optim.lion import TorchLion

ALL = registry.available()


def stepped(optimizer: type[Optimizer], steps: int) -> tuple[torch.Tensor, dict]:
    """A flat tensor after some steps, and what torch keeps for it."""
    flat = torch.nn.Parameter(torch.ones(6))
    training = TrainingConfig(optimizer=optimizer.name, lr=0.01)
    inner = optimizer.build([{"params": [flat], "weight_decay": 0.1}], training)
    for _ in range(steps):
        flat.grad = torch.arange(6.0)
        inner.step()
    return flat, inner.state[flat]


@pytest.mark.parametrize("name", ALL)
def test_an_optimizers_states_are_what_torch_keeps_and_begins_with(name):
    optimizer = ALL[name]
    flat, kept = stepped(optimizer, 3)
    per_element = {key for key, value in kept.items() if value.shape == flat.shape}
    assert per_element == {state.name for state in optimizer.states}
    created = optimizer.initial_state(flat, 3)
    assert created.keys() == kept.keys()
    for key, value in created.items():
        assert (value.shape, value.dtype) == (kept[key].shape, kept[key].dtype), key
        assert key in per_element or torch.equal(value, kept[key]), key  # counters are those of 3 steps
    for state in optimizer.states:
        assert not state.non_negative or kept[state.name].min() >= 0
    assert optimizer.kinds() == ("weight", *(state.name for state in optimizer.states))


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].__module__.startswith("dsmoe.")])
def test_an_optimizer_works_without_torchs_compiler(name, monkeypatch):
    """Which would be loaded in every start; and counts, hooks and arithmetic are those of torch's class."""
    expected, kept = stepped(ALL[name], 3)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # whoever imports it fails
    flat, actual = stepped(ALL[name], 3)
    assert torch.equal(flat, expected) and actual.keys() == kept.keys()
    inner, seen = ALL[name].build([{"params": [flat], "weight_decay": 0.1}], TrainingConfig(optimizer=name)), []
    inner.register_step_pre_hook(lambda *_: seen.append("before"))
    inner.register_step_post_hook(lambda *_: seen.append("after"))
    flat.grad = torch.ones(6)
    inner.step()
    inner.zero_grad()
    inner.load_state_dict(inner.state_dict())
    assert flat.grad is None and seen == ["before", "after"]


@pytest.mark.parametrize("name", ALL)
def test_going_on_from_saved_states_is_never_having_stopped(name):
    flat, kept = stepped(ALL[name], 3)
    other = torch.nn.Parameter(flat.detach().clone())
    groups = [{"params": [other], "weight_decay": 0.1}]
    inner = ALL[name].build(groups, TrainingConfig(optimizer=name, lr=0.01))
    inner.state[other] = ALL[name].initial_state(other, 3)
    for state in ALL[name].states:
        inner.state[other][state.name].copy_(kept[state.name])
    other.grad = torch.arange(6.0)
    inner.step()
    assert torch.equal(other, stepped(ALL[name], 4)[0])


# NVIDIA Apex's constructor as its master has it, and its way of counting steps, over torch's arithmetic.
APEX = """
import torch
from torch.optim.adamw import adamw
class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0., amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert bias_correction and adam_w_mode and not (amsgrad or capturable or master_weights)
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))
    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                if len(self.state[p]) == 0:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state = self.state[p]
                adamw([p], [p.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [],
                      [torch.tensor(float(group["step"] - 1))], amsgrad=False, beta1=group["betas"][0],
                      beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                      maximize=False)
"""


@pytest.fixture
def apex(tmp_path, monkeypatch):
    for name, text in {"normalization/__init__.py": "class FusedRMSNorm: pass", "optimizers/__init__.py": APEX}.items():
        path = tmp_path / "apex" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "apex" / "__init__.py").touch()
    for kernels in ("amp_C", "fused_layer_norm_cuda"):
        (tmp_path / f"{kernels}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("dsmoe.runtime.accelerations.on_gpu", lambda: True)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda")]:
        del sys.modules[name]


def adamw_steps(kernel: str, steps: int, first: dict | None = None) -> tuple[torch.Tensor, dict]:
    """As `stepped`, of two groups, from a saved state if there is one; what becomes of the second one."""
    training = TrainingConfig(lr=0.01, optimizer_options={"kernel": kernel})
    flats = [torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2)]
    inner = ALL["adamw"].build([{"params": [flat], "weight_decay": 0.1} for flat in flats], training)
    if first is not None:
        flats[1].data.copy_(first["weight"])
        inner.state[flats[1]] = {**ALL["adamw"].initial_state(flats[1], 3), **first["state"]}
    for _ in range(steps):
        flats[1].grad = torch.arange(6.0) - 2  # DeepSpeed steps on one group after the other
        inner.step()
    return flats[1].detach(), inner.state[flats[1]]


def test_adamw_by_apex_is_torchs_and_goes_on_from_torchs_state(apex):
    expected, state = adamw_steps("torch", 3)
    actual, kept = adamw_steps("apex", 3)
    torch.testing.assert_close(actual, expected)
    assert kept.keys() == state.keys() and float(kept["step"]) == 3
    first = {"weight": actual, "state": {name: kept[name].clone() for name in ("exp_avg", "exp_avg_sq")}}
    torch.testing.assert_close(adamw_steps("apex", 2, first)[0], adamw_steps("torch", 5)[0])


def test_apex_is_refused_where_it_is_not():
    with pytest.raises(ConfigError, match=r"optimizer_options.kernel: found apex, but NVIDIA Apex is .*expected torch"):
        adamw_steps("apex", 1)


def test_lion_is_its_equations():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, generator=generator)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = TorchLion([parameter], lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.3)
    plain, momentum = weight.double(), torch.zeros(50, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.randn(50, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        update = torch.sign(0.9 * momentum + 0.1 * gradient.double())
        plain = plain - 0.01 * (update + 0.3 * plain)
        momentum = 0.99 * momentum + 0.01 * gradient.double()
    torch.testing.assert_close(parameter.detach().double(), plain, rtol=0, atol=1e-6)
    assert torch.equal(parameter.grad, gradient)  # which expert metrics may still read


MISTAKES = {
    "an unknown one": ({"optimizer": "lyon"}, "training.optimizer: found 'lyon'.*did you mean 'lion'"),
    "an unknown option": (
        {"optimizer": "lion", "optimizer_options": {"beta3": 0.9}}, "optimizer_options.beta3: unknown key.*beta",
    ),
    "a value out of range": ({"optimizer": "lion", "optimizer_options": {"beta1": 1.5}}, "beta1: found 1.5"),
    "an option of another's": ({"optimizer": "lion", "adam_eps": 1e-6}, "training.adam_eps: is adamw's"),
    "options where keys are": ({"optimizer_options": {"beta1": 0.9}}, "optimizer_options.beta1: unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    training, message = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=message):
        validate_config({"training": training}, optimizers=registry.option_classes())


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name != "an option of another's"])
def test_a_mistake_is_named_where_the_engine_is_built_too(mistake):
    training, _ = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=r"training.optimizer"):
        registry.optimizer_class(TrainingConfig(**training))


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="'lion' is taken by dsmoe.optim.lion.Lion"):

        @registry.register("lion")
        class Other(Optimizer):
            states = (State("momentum"),)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match="expected a subclass of dsmoe.optim.base.Optimizer"):
        registry.register("sgd")(torch.optim.SGD)


def test_a_plugin_that_cannot_be_loaded_is_named(monkeypatch):
    broken = EntryPoint("broken", "no_such_package:Broken", registry.optimizers.group)
    monkeypatch.setattr(registry.optimizers, "installed", lambda: [broken])
    with pytest.raises(ConfigError, match="optimizer 'broken'.*no_such_package"):
        registry.available()
