"""Optimizers by name: what each says of its state is what torch keeps; mistakes in the configuration are named."""

from __future__ import annotations

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
