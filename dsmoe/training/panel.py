"""The panel of a run on a terminal: where it is and what its routing does, in a few rows that fit any width.

    step 120/300 ━━━━━━━━━━━━━━━───────────────────────  1 min 12 s left
    loss     5.231, held out 5.402                    ▇▆▅▄▄▃▃▂▂▁▁▁
    speed    12,345 tokens/s
    experts  2.31 per token, density 0.289 (target 0.250)  ▁▃▆█▅▃▂
    load     max/mean 1.94 in MoE layer 3, the worst
    lambda   1.2e-06                                  ▁▁▂▃

A step only leaves its numbers here; text is made when the panel is drawn.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

from dsmoe.training.history import duration

BLOCKS = "▁▂▃▄▅▆▇█"
LABEL = 9  # columns
CURVE = 40  # columns of a curve or bar at most
MIN_CURVE = 8
RECENT = 50  # steps behind the time that is left


class Curve:
    """The course of a number over a whole run, in a bounded number of means: of too many, neighbours merge."""

    POINTS = 256

    def __init__(self) -> None:
        self.means: list[float] = []
        self._stride = 1  # steps behind each mean
        self._pending: list[float] = []  # those of the next one

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) == self._stride:
            self.means.append(sum(self._pending) / self._stride)
            self._pending = []
        if len(self.means) == self.POINTS:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self._stride *= 2

    def draw(self, width: int) -> str:
        """At most `width` characters, from the smallest value to the largest."""
        count = min(width, len(self.means))
        edges = [place * len(self.means) // count for place in range(count + 1)] if count else [0]
        shown = [sum(self.means[a:b]) / (b - a) for a, b in pairwise(edges)]
        if not shown:
            return ""
        low, span = min(shown), (max(shown) - min(shown)) or 1.0
        return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in shown)


class Pace:
    """How long the rest takes, from the time between the last steps, saves and evaluations included."""

    def __init__(self, until: int):
        self.until = until
        self._marks: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def mark(self, step: int) -> None:
        self._marks.append((step, time.monotonic()))

    def left(self) -> str:
        """`1 min 12 s left`; nothing before there are two steps."""
        if len(self._marks) < 2:
            return ""
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        per_step = (ended - began) / max(1, last - first)
        left = (self.until - last) * per_step - (time.monotonic() - ended)
        return f"{duration(max(0.0, left))} left"


class Panel:
    """Args:
    steps: of the whole run. first: steps done already.
    target_density: share of active (token, expert) pairs that the router aims at.
    steered: names of metrics that the router's controller moves.
    """

    def __init__(self, steps: int, first: int, pace: Pace, target_density: float | None, steered: Sequence[str]):
        self.steps, self.step, self.pace, self.target_density = steps, first, pace, target_density
        self.curves = {name: Curve() for name in ("loss", "experts_per_token", *steered)}
        self.steered = steered
        self._metrics: dict[str, Any] = {}
        self._held_out: float | None = None

    def see(self, step: int, metrics: dict[str, Any]) -> None:
        self.step, self._metrics = step, metrics
        self._held_out = metrics.get("val_loss", self._held_out)
        for name, curve in self.curves.items():
            if name in metrics:
                curve.add(metrics[name])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = options.max_width
        yield self._first_row(width)
        for label, value, curve in self._rows():
            row = Text.assemble((f"{label:{LABEL}}", "dim"), value, no_wrap=True, overflow="crop")
            columns = min(CURVE, width - row.cell_len - 2)
            if curve is not None and columns >= MIN_CURVE:
                row.append(f"  {curve.draw(columns)}", "cyan")
            row.truncate(width)
            yield row

    def _first_row(self, width: int) -> Text:
        step, left = f"step {self.step}/{self.steps}", self.pace.left()
        row = Text(step, no_wrap=True, overflow="crop")
        columns = min(CURVE, width - len(step) - len(left) - 3)
        if columns >= MIN_CURVE:
            done = round(columns * self.step / self.steps)
            row.append(" ").append("━" * done, "green").append("─" * (columns - done), "dim")
        return row.append(f"  {left}" if left else "", "bold")

    def _rows(self) -> Iterator[tuple[str, str, Curve | None]]:
        """Label, value and curve of each."""
        now = self._metrics
        if not now:
            return
        skipped = " (skipped)" if now.get("skipped") else ""
        held_out = "" if self._held_out is None else f", held out {self._held_out:.3f}"
        yield "loss", f"{now['loss']:.3f}{skipped}{held_out}", self.curves["loss"]
        yield "speed", f"{now['tokens_per_second']:,.0f} tokens/s", None
        target = "" if self.target_density is None else f" (target {self.target_density:.3f})"
        experts = f"{now['experts_per_token']:.2f} per token, density {now['density']:.3f}{target}"
        yield "experts", experts, self.curves["experts_per_token"]
        yield "load", f"max/mean {now['worst_imbalance']:.2f} in MoE layer {now['worst_layer']}, the worst", None
        for name in self.steered:
            yield name, f"{now[name]:.4g}", self.curves[name]
