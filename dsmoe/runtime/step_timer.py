"""Where a step's time goes: seconds by region, forward and backward.

A step is one line of time, and at each moment one region of it is at work. `timed` makes a function a region in both
directions, `within` a piece of code that has no gradient. While the timer is off nothing is measured and nothing enters
the autograd graph.

On an accelerator the boundaries are events on the current stream, read when the step is over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import wraps

import torch
from torch import Tensor

from dsmoe.runtime.device import seconds_between, timestamp
from dsmoe.runtime.phase import COLLECTIVE, phase

REST = "rest"  # projections around attention, dense MLPs, norms, embeddings, data, gradient reduction

PHASES = {"exchange": COLLECTIVE}  # what a heartbeat calls a part, where it has another name


class StepTimer:
    """Of one process. `running` between `start` and `stop`."""

    def __init__(self) -> None:
        self.running = False
        self._marks: list[tuple[str, object]] = []  # a region, and when it began

    def start(self) -> None:
        self.running, self._marks = True, [(REST, timestamp())]

    def switch(self, region: str) -> str:
        """From here on `region` is at work. Returns the one that was."""
        before = self._marks[-1][0] if self.running else region
        if before != region:
            self._marks.append((region, timestamp()))
        return before

    def stop(self) -> dict[str, float]:
        """Seconds of each region since `start`; together they are all of that time. Waits for the device."""
        self.running = False
        ends = [*(began for _, began in self._marks[1:]), timestamp()]
        seconds: dict[str, float] = defaultdict(float)
        for (region, began), ended in zip(self._marks, ends, strict=True):
            seconds[region] += seconds_between(began, ended)
        self._marks = []
        return dict(seconds)

    @contextmanager
    def within(self, region: str) -> Iterator[str]:
        """A region without gradient. Yields the one around it."""
        before = self.switch(region)
        try:
            with phase.within(PHASES.get(region, region), in_layer=True):
                yield before
        finally:
            self.switch(before)

    def mark_region(self, before: str, after: str, *tensors: Tensor | None) -> tuple:
        """The same tensors (or None). `after` begins once they exist, `before` again once their gradients do."""
        return _RegionMark.apply(before, after, *tensors) if self.running else tensors

    def timed(self, region: str) -> Callable:
        """Decorator: a function of tensors becomes a region, forward and backward.

        Its backward pass begins when the gradient of an output arrives, and ends when those of its positional tensor
        arguments exist. Outputs are found in tuples and dataclasses as well.
        """

        def decorate(function: Callable) -> Callable:
            @wraps(function)
            def run(*args, **kwargs):
                if not self.running:
                    return function(*args, **kwargs)
                with self.within(region) as before:
                    result = function(*self._mark_arguments(before, region, args), **kwargs)
                for tensor in _tensors(result):
                    tensor.register_hook(lambda grad: self._enter(region))
                return result

            return run

        return decorate

    def _mark_arguments(self, before: str, region: str, args: tuple) -> list:
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        marked = iter(self.mark_region(before, region, *tensors) if tensors else ())
        return [next(marked) if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args]

    def _enter(self, region: str) -> None:
        self.switch(region)


step_timer = StepTimer()


class _RegionMark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before: str, after: str, *tensors: Tensor | None):
        ctx.before = before
        step_timer.switch(after)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        step_timer.switch(ctx.before)
        return None, None, *grads


def _tensors(result) -> list[Tensor]:
    """Those of a function's result that get a gradient."""
    if is_dataclass(result):
        result = tuple(vars(result).values())
    if isinstance(result, (tuple, list)):
        return [tensor for item in result for tensor in _tensors(item)]
    return [result] if isinstance(result, Tensor) and result.requires_grad else []
