"""What a person sees of a run, on rank 0: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Context manager; `update` after each optimizer step with that step's metrics.

    Args:
        steps: of the whole run. first: steps done already.
        active: False on all ranks but one.
    """

    def __init__(self, steps: int, first: int, active: bool):
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
        return self

    def __exit__(self, *exc) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, highlight=False)

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        numbers = (
            f"loss {metrics['loss']:.3f}  experts/token {metrics['experts_per_token']:.2f}  "
            f"{metrics['tokens_per_second']:,.0f} tok/s"
        )
        self._bar.update(self._task, completed=step, numbers=numbers)
        every = max(1, self.steps // 20)
        if not self._interactive and (step % every == 0 or step in (self.first + 1, self.steps)):
            self.say(f"step {step}/{self.steps}  {numbers}")
