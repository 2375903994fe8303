"""A command on a terminal of its own, as a person would run it: a pseudo-terminal that one can type into and read."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence

from commands import DEADLINE, ROOT

CTRL_C = b"\x03"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
REDRAWN = re.compile(r"\r?\x1b\[2K(?:\x1b\[1A\x1b\[2K)*")  # how rich takes back the panel that it drew before


class Terminal:
    """The other side of a terminal. `path` is what a process opens."""

    def __init__(self, columns: int, rows: int = 24):
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.path, self._seen = os.ttyname(self._slave), b""
        self._process: subprocess.Popen | None = None

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """As the leader of a session whose terminal this is."""
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"TERM": "xterm-256color"} | environment, stdin=self._slave,
            stdout=self._slave, stderr=self._slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def foreground(self) -> int:
        """The process group that gets what is typed."""
        return os.tcgetpgrp(self._master)

    @property
    def text(self) -> str:
        """Everything that was written so far, with its escape sequences."""
        while select.select([self._master], [], [], 0)[0]:
            self._seen += os.read(self._master, 1 << 16)
        return self._seen.decode(errors="replace")

    def wait_until(self, condition: Callable[[], bool], deadline: float = DEADLINE) -> None:
        until = time.monotonic() + deadline
        while not condition():
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > until:
                raise AssertionError(f"{'it ended' if ended else 'nothing'} after:\n{self.text}")
            time.sleep(0.05)

    def wait(self, deadline: float = DEADLINE) -> int:
        """The command's exit code."""
        until = time.monotonic() + deadline
        while (code := self._process.poll()) is None:
            _ = self.text  # or the terminal fills, and who writes waits
            if time.monotonic() > until:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise AssertionError(f"not done after {deadline:.0f} s:\n{self.text}")
            time.sleep(0.05)
        return code

    def close(self) -> None:
        os.close(self._master)
        os.close(self._slave)


def take_terminal(path: str, environment: dict[str, str]) -> None:
    """Make it this process's own, which was forked for it; `environment` is added to that of a colour terminal."""
    os.setsid()
    screen = os.open(path, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(screen, descriptor)
    for name in ("NO_COLOR", "COLUMNS", "LINES"):  # pytest-xdist sets the size of its own terminal
        os.environ.pop(name, None)
    os.environ.update({"TERM": "xterm-256color"} | environment)


def panels(text: str) -> list[list[str]]:
    """What was drawn between one redrawing and the next, as lines without escape sequences."""
    return [[line.rstrip() for line in ESCAPES.sub("", part).splitlines()] for part in REDRAWN.split(text)]
