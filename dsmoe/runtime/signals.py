"""SIGTERM, Ctrl-C and the death of the launcher ask a run to stop: it finishes the step, saves, and leaves with 75.

The deepspeed command has no handler for SIGTERM: it dies and leaves its ranks running. They notice by their ancestors.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

REPEAT = 3.0  # seconds in which a terminal and a launcher may both deliver the same Ctrl-C
# In the command line of a rank's parent; the last one: of the supervisor's agent, and of torch's modules for launching.
LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed")


class StopRequest:
    """Context manager that turns all of these into `asked`; a later second Ctrl-C ends the process at once."""

    def __init__(self):
        self._asked_at: float | None = None
        self._before: dict = {}

    @property
    def asked(self) -> bool:
        return self._asked_at is not None or _launcher_ancestors(_at_start) != _at_start

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > REPEAT:
            raise KeyboardInterrupt


def _launcher_ancestors(known: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """The launcher's process for this node and the command that started it; None without a launcher.

    A process whose parent dies gets another one, so either number changes when a launcher is gone.
    """
    parent = os.getppid()
    try:
        if known is None and not any(name in Path(f"/proc/{parent}/cmdline").read_text() for name in LAUNCHERS):
            return None
        fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
        return parent, int(fields[1])
    except OSError:  # gone, or a system without /proc
        return None


# Taken when a command starts, before the frameworks are loaded: a launcher can die in those seconds too.
_at_start = _launcher_ancestors()
