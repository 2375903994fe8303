"""How long a job may make no progress, and what ends a process that is stopped."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field

from dsmoe.runtime.phase import phase

MIN_STEP_LIMIT = 60.0
STEP_FACTOR = 10.0
ON_DISK = ("save", "load")  # phases whose length the disk decides
PR_SET_PDEATHSIG = 1

# A process that is stopped (SIGSTOP) cannot even end: its launcher may wait for it for ever. This child, which Ctrl-Z
# stops together with its parent, ends it.
WATCH = f"""
import ctypes, os, signal, sys, time
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL)
for number in (signal.SIGTERM, signal.SIGINT):  # for its parent, who sees to the rest
    signal.signal(number, signal.SIG_IGN)
pid, limit, name = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
stopped, last = 0.0, time.monotonic()
while os.getppid() == pid:
    time.sleep(1)
    gap, last = time.monotonic() - last, time.monotonic()
    with open(f"/proc/{{pid}}/stat") as stat:
        state = stat.read().rpartition(")")[2].split()[0]
    stopped = stopped + gap if state == "T" and gap < 5 else 0.0
    if stopped > limit:
        print(f"{{name}} has been stopped for {{stopped:.0f}} s: killed", file=sys.stderr, flush=True)
        os.kill(pid, signal.SIGKILL)
"""


@dataclass
class Limits:
    """How long (seconds) a job may make no progress; 0 is for ever.

    Attributes:
        start: until the first step is done: imports, data, building the model, loading a checkpoint.
        step: None for 10 times the median step, at least 60 s.
        save: while a checkpoint is written or read.
    """

    start: float = 300.0
    step: float | None = None
    save: float = 1800.0
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))

    def note_step(self, seconds: float) -> None:
        self._steps.append(seconds)

    def now(self) -> float:
        """Of the phase this process is in."""
        return self._now()[1]

    @property
    def key(self) -> str:
        """The key that sets it."""
        return f"training.timeout.{self._now()[0]}"

    def _now(self) -> tuple[str, float]:
        if phase.name in ON_DISK:
            return "save", self.save
        if not self._steps:
            return "start", self.start
        if self.step is not None:
            return "step", self.step
        return "step", max(MIN_STEP_LIMIT, STEP_FACTOR * statistics.median(self._steps))


def watch_this_process(limit: float, name: str) -> None:
    """Have this process killed once it has been stopped for `limit` seconds; on Linux."""
    if sys.platform.startswith("linux"):
        command = [sys.executable, "-S", "-c", WATCH, str(os.getpid()), str(limit), name]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
