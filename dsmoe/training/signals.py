"""SIGTERM and Ctrl-C ask a run to stop: it finishes the step, saves, and leaves with exit code 0."""

from __future__ import annotations

import signal
import time

REPEAT = 3.0  # seconds in which a terminal and a launcher may both deliver the same Ctrl-C


class StopRequest:
    """Context manager that turns the two signals into `asked`; a later second Ctrl-C ends the process at once."""

    def __init__(self):
        self.asked_at: float | None = None
        self._before: dict = {}

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked_at is None:
            self.asked_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > REPEAT:
            raise KeyboardInterrupt
