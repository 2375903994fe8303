"""What this process is doing at the moment, in words: what a heartbeat says of a rank that falls silent.

Every rank of a job goes through the same phases in the same order, so the rank with the fewest changes is the one that
the others wait for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

LAYER = re.compile(r"layers\.(\d+)")
COLLECTIVE = "all-to-all"


class Phase:
    """Of one process. Written by the thread that trains, read by the one that tells others.

    Attributes:
        changes: how often the phase has changed.
        since: when it changed last, as `time.monotonic` counts.
    """

    def __init__(self) -> None:
        self.name, self.step = "start", 0
        self.layer: int | None = None
        self.changes, self.since = 0, time.monotonic()

    def enter(self, name: str, layer: int | None = None) -> None:
        self.name, self.layer = name, layer
        self.changes += 1
        self.since = time.monotonic()

    def begin_step(self, step: int) -> None:
        self.step = step
        self.enter("forward pass")

    @contextmanager
    def within(self, name: str, in_layer: bool = False) -> Iterator[None]:
        """`name` inside, what it was before outside; `in_layer`: it is a part of the layer at work.

        After an exception it stays `name`: that is where this process was when a collective broke.
        """
        before, layer = self.name, self.layer
        self.enter(name, layer if in_layer else None)
        yield
        self.enter(before, layer)

    def follow_layers(self, model) -> None:
        """From here on a forward pass of the model tells which layer is at work."""
        for name, module in model.named_modules():
            if number := LAYER.fullmatch(name.rpartition("decoder.")[2]):
                module.register_forward_pre_hook(self._hook(int(number[1])))

    def _hook(self, layer: int):
        def begin(module, inputs) -> None:
            self.enter(self.name, layer)

        return begin

    def __str__(self) -> str:
        """'the all-to-all of step 5 (layer 1)', 'the start'."""
        where = f" (layer {self.layer})" if self.layer is not None else ""
        if self.name == "forward pass" and self.layer is not None:
            return f"the forward pass of layer {self.layer} of step {self.step}"
        return f"the {self.name} of step {self.step}{where}" if self.step else f"the {self.name}"


phase = Phase()
