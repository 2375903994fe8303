"""launch/train.py in a process that has the libraries loaded (tests/warm.py), with a fault if one is asked for.

FAULT="SIGKILL 1 5 all-to-all" sends this process a signal when rank 1 enters that phase of step 5; the names of phases
are those of `dsmoe.runtime.phase`; several faults are separated by semicolons. Each happens once: FAULT_LOG gets the
time, for the second fault FAULT_LOG1, and so on. SLOW_SAVE is how many seconds a rank's files take to write, PAUSE how
many come before each step. HURRY cuts waits short that are there for slow file systems.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where a script is started that is not a test
import warm

from dsmoe.runtime.phase import Phase

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"


def inject(name: str, rank: str, step: str, where: str, log: Path) -> None:
    enter = Phase.enter

    def enter_and_fail(self: Phase, phase: str, layer: int | None = None) -> None:
        enter(self, phase, layer)
        here = (phase, os.environ.get("RANK"), str(self.step)) == (where, rank, step)
        if here and not log.exists():
            time.sleep(1.5)  # the others have met the phase, and heard of it
            log.write_text(str(time.time()))
            os.kill(os.getpid(), getattr(signal, name))

    Phase.enter = enter_and_fail


def slow_down(seconds: float) -> None:
    from dsmoe.checkpoint import save

    write = save._write_files

    def write_slowly(contents, folder):
        time.sleep(seconds)
        return write(contents, folder)

    save._write_files = write_slowly


def pause(seconds: float) -> None:
    begin = Phase.begin_step

    def begin_later(self: Phase, step: int) -> None:
        time.sleep(seconds)
        begin(self, step)

    Phase.begin_step = begin_later


def hurry() -> None:
    from dsmoe.parallel import preflight
    from dsmoe.runtime.run_lock import RunLock

    preflight.MARKER_WAIT = 2.0  # for a file to be seen on another host
    RunLock.__init__.__defaults__ = (1.0,)  # between heartbeats, four of which make an owner dead


if __name__ == "__main__":
    warm.hand_over(sys.argv)
    if seconds := os.environ.get("PAUSE"):
        pause(float(seconds))
    if faults := os.environ.get("FAULT"):
        for number, text in enumerate(faults.split(";")):
            inject(*text.split(maxsplit=3), Path(os.environ["FAULT_LOG"] + (str(number) if number else "")))
    if seconds := os.environ.get("SLOW_SAVE"):
        slow_down(float(seconds))
    if os.environ.get("HURRY"):
        hurry()
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
