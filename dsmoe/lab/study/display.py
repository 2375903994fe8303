"""What a person sees of a study at work: a live table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

EVERY_SECONDS = {True: 2, False: 30}  # between two looks at what runs do, on a terminal and elsewhere


@dataclass(frozen=True)
class Row:
    """A cell at work."""

    name: str
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    reading: bool = False  # trained; its probe is at work


class Display:
    """Context manager; `show` whenever `due`."""

    def __init__(self, console: Console, word: str, total: int):
        self.console, self.word, self.total = console, word, total
        self._started = self._shown = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc) -> None:
        self._live.stop()

    def due(self) -> bool:
        return time.monotonic() - self._shown >= EVERY_SECONDS[self.console.is_terminal]

    def show(self, ended: int, rows: list[Row], seconds_left: float | None) -> None:
        self._shown = time.monotonic()
        summary = f"{self.word} {ended}/{self.total}"
        times = f"{duration(self._shown - self._started)} so far, {duration(seconds_left)} left"
        if not self.console.is_terminal:
            now = ", ".join(f"{row.name} {'probe' if row.reading else f'{row.step}/{row.steps}'}" for row in rows)
            self.console.print(f"{summary}  {now}  {times}", highlight=False, markup=False)
            return
        table = Table(title=f"{summary}   {times}", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading, side in (("cell", "left"), ("step", "right"), ("", "left"), ("loss", "right"),
                              ("tokens/s", "right"), ("left", "right")):  # fmt: skip
            table.add_column(heading, justify="left" if side == "left" else "right", header_style="dim")
        for row in rows:
            done = round(16 * row.step / max(1, row.steps))
            table.add_row(
                row.name, "probe" if row.reading else f"{row.step}/{row.steps}", "━" * done + "╌" * (16 - done),
                "" if row.loss is None else f"{row.loss:.3f}",
                "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}", duration(row.seconds_left),
            )  # fmt: skip
        self._live.update(table, refresh=True)


def duration(seconds: float | None) -> str:
    """`1 h 05 min`, `12 min` or `40 s`; `?` for what is not known yet."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
