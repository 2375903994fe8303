"""What a person sees of a run, on rank 0: a panel on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.live import Live

from dsmoe.runtime.screen import make_console
from dsmoe.training.panel import Pace, Panel

REFRESH = 1  # panels a second: drawing one takes up to two milliseconds of the processor that trains


class TrainingProgress:
    """Context manager; `update` after each optimizer step with that step's metrics.

    Without a terminal, or with NO_COLOR or TERM=dumb, there are 20 lines a run, and never a minute without one: a
    thread of its own says that a long step, save or evaluation is still under way.

    Args:
        steps: of the whole run. first: steps done already.
        active: False on all ranks but one.
        until: the step at which this job stops; None: `steps`.
        target_density, steered: see `Panel`.
        silence: seconds without a line.
    """

    def __init__(
        self, steps: int, first: int, active: bool, until: int | None = None, target_density: float | None = None,
        steered: Sequence[str] = (), silence: float = 60.0,
    ):  # fmt: skip
        self.silence, self.step = silence, first
        self._said, self._done = time.monotonic(), threading.Event()
        self.console = make_console(quiet=not active, soft_wrap=True)
        self.steps, self.first = steps, first
        self._pace = Pace(until or steps)
        self._live: Live | None = None
        if active and self.console.is_terminal:
            self._panel = Panel(steps, first, self._pace, target_density, steered)
            self._live = Live(self._panel, console=self.console, refresh_per_second=REFRESH)

    def __enter__(self) -> TrainingProgress:
        self._pace.mark(self.first)
        if self._live is not None:
            self._live.start(refresh=True)
        elif not self.console.quiet:
            threading.Thread(target=self._break_silence, name="progress", daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._done.set()
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the panel."""
        self._said = time.monotonic()
        self.console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def _break_silence(self) -> None:
        began = time.monotonic()
        while not self._done.wait(max(0.01, self._said + self.silence - time.monotonic())):
            if time.monotonic() - self._said >= self.silence:
                elapsed = time.monotonic() - began
                self.say(f"step {self.step}/{self.steps} is done, the next is under way ({elapsed:.0f} s of this run)")

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        self.step = step
        self._pace.mark(step)
        if self._live is not None:
            self._panel.see(step, metrics)
            return
        due = step % max(1, self.steps // 20) == 0 or step in (self.first + 1, self.steps)
        if due or time.monotonic() - self._said >= self.silence / 2:
            skipped = "  (skipped)" if metrics.get("skipped") else ""
            self.say(
                f"step {step}/{self.steps}  {self._pace.left()}  loss {metrics['loss']:.3f}{skipped}  experts/token "
                f"{metrics['experts_per_token']:.2f}  {metrics['tokens_per_second']:,.0f} tok/s"
            )
