"""Ctrl-C under the `deepspeed` command, on a terminal: it reaches the run, which saves, and not the launcher.

A terminal sends Ctrl-C to every process of its foreground group. The launcher's runner has no handler: it dies at once,
with a stack trace, while its ranks still save. So the first rank of the node moves into a group of its own and makes
that one the foreground, as a shell does with a job; other ranks hear of a stop from the first. With Ctrl-Z it first
goes back, so that the shell suspends and resumes the whole job. A small process that outlives the rank, however that
ends, gives the terminal back.
"""

from __future__ import annotations

import os
import signal
import termios
from contextlib import suppress
from pathlib import Path


class Foreground:
    """The terminal of a job, and the process group that it belongs to."""

    def __init__(self, terminal: int, group: int):
        self.terminal, self.group = terminal, group

    @classmethod
    def of_launcher(cls) -> Foreground | None:
        """None unless the deepspeed command started this rank, the node's first, in the foreground of a terminal."""
        if os.environ.get("LOCAL_RANK") != "0" or "LOCAL_SIZE" not in os.environ:
            return None
        try:
            if "deepspeed.launcher.launch" not in Path(f"/proc/{os.getppid()}/cmdline").read_text():
                return None
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
            group = os.getpgrp()
            stops_background_output = termios.tcgetattr(terminal)[3] & termios.TOSTOP
            if os.tcgetpgrp(terminal) == group and not stops_background_output:
                return cls(terminal, group)
            os.close(terminal)
        except (OSError, termios.error):  # no terminal
            pass
        return None

    def take(self) -> None:
        """Make this process alone the foreground."""
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # which asks those who set it from the background to stop
        signal.signal(signal.SIGTSTP, self._suspend)
        os.setpgid(0, 0)
        os.tcsetpgrp(self.terminal, os.getpid())

    def watch_over(self) -> None:
        """Start the process that gives the terminal back when this one is gone. Before there are threads."""
        rank, (waits, lives) = os.getpid(), os.pipe()
        if os.fork():
            os.close(waits)
            return
        try:
            os.close(lives)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTTOU):
                signal.signal(number, signal.SIG_IGN)
            os.read(waits, 1)  # until the rank's end of the pipe is closed
            if os.tcgetpgrp(self.terminal) in (rank, 0):
                os.tcsetpgrp(self.terminal, self.group)
        finally:
            os._exit(0)

    def _go_back(self) -> None:
        with suppress(OSError):
            if os.tcgetpgrp(self.terminal) == os.getpid():
                os.tcsetpgrp(self.terminal, self.group)
            os.setpgid(0, self.group)

    def _suspend(self, number, frame) -> None:
        self._go_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.killpg(self.group, signal.SIGTSTP)
        # Here again after `fg`, or `bg`, with which the terminal stays with the shell.
        signal.signal(signal.SIGTSTP, self._suspend)
        with suppress(OSError):
            if os.tcgetpgrp(self.terminal) == self.group:
                self.take()


def take_foreground() -> None:
    """Where the deepspeed command started this process: let Ctrl-C reach it alone, until it ends."""
    foreground = Foreground.of_launcher()
    if foreground is not None:
        foreground.watch_over()
        foreground.take()
