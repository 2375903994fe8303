"""What a person sees of a run, on rank 0: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Context manager; `update` after each optimizer step with that step's metrics.

    Without a terminal there are 20 lines a run, and never a minute without one: a thread of its own says that a long
    step, save or evaluation is still under way.

    Args:
        steps: of the whole run. first: steps done already.
        active: False on all ranks but one.
        silence: seconds without a line.
    """

    def __init__(self, steps: int, first: int, active: bool, silence: float = 60.0):
        self.silence, self.step = silence, first
        self._said, self._done = time.monotonic(), threading.Event()
        self.console = Console(quiet=not active, soft_wrap=True)
        self.steps, self.first = steps, first
        self._interactive = active and self.console.is_terminal
        self._bar = Progress(
            TextColumn("train"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(), console=self.console, disable=not self._interactive,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=first, numbers="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        if not self._interactive and not self.console.quiet:
            threading.Thread(target=self._break_silence, name="progress", daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._done.set()
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
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
        skipped = "  (skipped)" if metrics.get("skipped") else ""
        numbers = (
            f"loss {metrics['loss']:.3f}{skipped}  experts/token {metrics['experts_per_token']:.2f}  "
            f"{metrics['tokens_per_second']:,.0f} tok/s"
        )
        self._bar.update(self._task, completed=step, numbers=numbers)
        self.step, every = step, max(1, self.steps // 20)
        due = step % every == 0 or step in (self.first + 1, self.steps)
        if not self._interactive and (due or time.monotonic() - self._said >= self.silence / 2):
            self.say(f"step {step}/{self.steps}  {numbers}")
