"""Where a step's time goes: seconds by part, forward and backward.

A step is one line of time, and at each moment one part of it is at work. Code that knows where a part ends says so:
`mark_region` in a forward pass, which then happens again, the other way round, when gradients come back through it;
`within` around what has no gradient. While the clock does not run, nothing is measured and nothing enters the graph.

On a GPU the boundaries are events on the current stream, read when the step is over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsmoe.runtime.device import seconds_between, timestamp

REST = "rest"  # projections around attention, dense MLPs, norms, embeddings, data, gradient reduction


class StepTimer:
    """Of one process. `running` between `start` and `stop`."""

    def __init__(self) -> None:
        self.running = False
        self._marks: list[tuple[str, object]] = []  # a part, and when it began

    def start(self) -> None:
        self.running, self._marks = True, [(REST, timestamp())]

    def switch(self, part: str) -> str:
        """From here on `part` is at work. Returns the part that was."""
        before = self._marks[-1][0] if self.running else part
        if before != part:
            self._marks.append((part, timestamp()))
        return before

    def stop(self) -> dict[str, float]:
        """Seconds of each part since `start`; together they are all of that time. On a GPU it waits for the device."""
        self.running = False
        ends = [*(began for _, began in self._marks[1:]), timestamp()]
        found: dict[str, float] = defaultdict(float)
        for (part, began), ended in zip(self._marks, ends, strict=True):
            found[part] += seconds_between(began, ended)
        self._marks = []
        return dict(found)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def mark_region(self, before: str, after: str, *tensors: Tensor | None) -> tuple:
        """The same tensors (or None). `after` begins once they exist, `before` again once their gradients do."""
        return _RegionMark.apply(before, after, *tensors) if self.running else tensors


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
