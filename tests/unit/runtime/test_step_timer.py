"""A step's seconds by part: they add up, follow gradients back, and cost nothing while nobody asks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch

from dsmoe.runtime.step_timer import REST, StepTimer, step_timer


class Sleep(torch.autograd.Function):
    """Takes known times, forward and backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.backward)
        return grad, None, None


def test_parts_are_timed_forward_and_backward_and_add_up():
    x = torch.ones(3, requires_grad=True)
    began = time.perf_counter()
    step_timer.start()
    y, nothing = step_timer.mark_region(REST, "inner", x, None)
    assert nothing is None
    y = Sleep.apply(y, 0.02, 0.04)
    with step_timer.within("wait"):
        time.sleep(0.03)
    (y,) = step_timer.mark_region("inner", REST, y)
    y = Sleep.apply(y, 0.0, 0.05)
    (2 * y).sum().backward()
    actual = step_timer.stop()
    whole = time.perf_counter() - began
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert set(actual) == {REST, "inner", "wait"}
    assert 0.06 <= actual["inner"] <= 0.06 + whole - 0.14
    assert 0.03 <= actual["wait"] <= 0.03 + whole - 0.14
    assert 0.05 <= actual[REST] <= 0.05 + whole - 0.14
    assert sum(actual.values()) == pytest.approx(whole, abs=0.01)


@dataclass
class Result:
    rows: torch.Tensor
    count: int


@step_timer.timed("outer")
def outer(x, scale):
    return Sleep.apply(inner(x * scale, [x]).rows, 0.02, 0.03)


@step_timer.timed("inner")
def inner(x, unused, fails=False):
    if fails:
        raise ValueError("here")
    return Result(Sleep.apply(x, 0.04, 0.06), 1)


def test_timed_functions_are_nested_regions_in_both_directions():
    x = torch.ones(3, requires_grad=True)
    step_timer.start()
    y = Sleep.apply(outer(x, 2.0), 0.0, 0.05)
    assert step_timer.switch(REST) == REST
    forward = step_timer.stop()
    step_timer.start()
    y.sum().backward()
    backward = step_timer.stop()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert set(forward) == set(backward) == {REST, "outer", "inner"}
    for seconds, times in ((forward, (0.02, 0.04, 0.0)), (backward, (0.03, 0.06, 0.05))):
        spare = sum(seconds.values()) - sum(times)  # of a busy machine
        for region, slept in zip(("outer", "inner", REST), times, strict=True):
            assert slept <= seconds[region] <= slept + spare + 1e-3


def test_a_timed_function_that_fails_ends_its_region():
    step_timer.start()
    with pytest.raises(ValueError, match="here"):
        inner(torch.ones(3), None, fails=True)
    assert step_timer.switch("next") == REST
    step_timer.stop()


def test_while_it_does_not_run_tensors_pass_untouched():
    own = StepTimer()
    x = torch.ones(3, requires_grad=True)
    assert own.mark_region(REST, "inner", x) == (x,)
    with own.within("wait"):
        assert own.switch("other") == "other"
    assert not own.running


def test_an_error_inside_a_part_ends_it():
    own = StepTimer()
    own.start()
    with pytest.raises(ValueError, match="here"), own.within("wait"):
        raise ValueError("here")
    assert own.switch("next") == REST
    assert set(own.stop()) == {REST, "wait", "next"}
