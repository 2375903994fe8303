"""Keep a run going on this host: torchrun's elastic agent again and again, until the run has finished.

One supervisor runs on every host. What torchrun does is torchrun's: it finds the other hosts, starts the ranks, starts
over when a host comes or goes. The supervisor starts it again after a failure, later each time, from the newest
checkpoint that is whole; takes another rendezvous when the first host is gone; and gives up when nothing moves.
It ends only processes that it started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Protocol

import psutil

from dsmoe.errors import ParallelError
from dsmoe.runtime.exit_codes import FINISHED, REFUSED, STOPPED

LONGEST_WAIT = 300.0  # seconds between two attempts
PROBE = 2.0  # seconds to find out whether a rendezvous lives
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

AGENT = f"""
import sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    run.main(sys.argv[1:])
except ChildFailedError as error:
    sys.exit(max(1, error.get_first_failure()[1].exitcode))
except SignalException:  # its ranks have saved and ended
    sys.exit({STOPPED})
"""


@dataclass(frozen=True)
class Plan:
    """What to keep going.

    Attributes:
        nodes: fewest and most hosts. processes: on each host.
        rendezvous: HOST:PORT where hosts meet, in order of preference; the hosts of the later ones stand in for the
            first.
        command: the training script and its arguments.
        grace: seconds that a run may take to save when it is asked to stop.
        backoff: seconds before the second attempt; doubled with each that brings no new checkpoint.
        give_up: attempts without a new checkpoint, after which it is over.
        last_call: seconds in which more hosts may join, once the fewest are there; the next rendezvous takes over after
            twice as long.
    """

    nodes: tuple[int, int]
    processes: int
    rendezvous: list[str]
    run_id: str
    command: list[str]
    grace: float = 300.0
    backoff: float = 5.0
    give_up: int = 5
    last_call: int = 15


class Run(Protocol):
    """What the supervisor must know of the run."""

    def saved_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""

    def resume(self) -> list[str]:
        """Arguments that make the script resume from the newest checkpoint that is whole."""

    def logged_bytes(self) -> int:
        """Size of the log that every step adds to."""

    def training_seconds(self) -> float:
        """Spent in the steps that the run consists of, without those that were lost."""


class Supervisor:
    """Runs a plan on this host.

    Attributes:
        recoveries: seconds from each failure to the first step after it.
    """

    def __init__(self, plan: Plan, run: Run):
        self.plan, self._run = plan, run
        self.recoveries: list[float] = []
        self._agent: subprocess.Popen | None = None
        self._signal: int | None = None
        self._failed_at: float | None = None
        self._not_ours = set(psutil.Process().children(recursive=True))  # there before any attempt

    def run(self) -> int:
        """Until the run has finished (0), a signal has stopped it (75), or there is no hope; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        _adopt_orphans()
        fruitless, attempt = 0, 0
        started, trained = time.monotonic(), self._run.training_seconds()
        while True:
            attempt += 1
            before, began = self._run.saved_step(), time.monotonic()
            code = self._attempt()
            if code == FINISHED or self._signal is not None:
                self._report(attempt, self._run.training_seconds() - trained, time.monotonic() - started)
                return STOPPED if code < 0 else code  # a signal can come before there is a handler for it
            self._failed_at = time.monotonic()
            self._await_orphans()
            after = self._run.saved_step()
            if code == REFUSED and attempt == 1:
                say("the run was refused; nothing to restart")
                return code
            fruitless = 0 if after > before else fruitless + 1
            lasted = time.monotonic() - began
            say(f"attempt {attempt} ended with {code} after {lasted:.0f} s, checkpoint of step {after}")
            if fruitless >= self.plan.give_up:
                say(f"{fruitless} attempts without a new checkpoint; giving up")
                return code
            self._wait(min(LONGEST_WAIT, self.plan.backoff * 2 ** max(0, fruitless - 1)))
            if self._signal is not None:
                return STOPPED

    def _attempt(self) -> int:
        plan = self.plan
        options = [
            "--nnodes", f"{plan.nodes[0]}:{plan.nodes[1]}", "--nproc-per-node", str(plan.processes),
            "--rdzv-backend", "c10d", "--rdzv-id", plan.run_id, "--rdzv-endpoint", self._rendezvous(),
            "--rdzv-conf", f"last_call_timeout={plan.last_call},join_timeout=600", "--max-restarts", "0",
            "--shutdown-timeout", str(int(plan.grace)),
        ]  # fmt: skip
        # Without the first, an agent that starts over hands its ranks the addresses of the ones before.
        environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        command = [sys.executable, "-c", AGENT, *options, *plan.command, *self._run.resume()]
        self._agent = subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent, start_new_session=True)
        if self._signal is not None:  # it came in between
            self._agent.send_signal(signal.SIGTERM)
        logged = self._run.logged_bytes()
        while True:
            try:
                return self._agent.wait(0.5)
            except subprocess.TimeoutExpired:
                before, logged = logged, self._run.logged_bytes()
                if self._failed_at is not None and logged > before:  # it shrinks when the run resumes
                    self.recoveries.append(time.monotonic() - self._failed_at)
                    self._failed_at = None

    def _report(self, attempts: int, trained: float, lasted: float) -> None:
        if attempts > 1:
            times = ", ".join(f"{seconds:.0f}" for seconds in self.recoveries)
            say(
                f"{attempts} attempts; recovered in {times} s; {trained / lasted:.0%} of {lasted:.0f} s went into steps"
            )

    def _await_orphans(self) -> None:
        """Ranks whose agent was killed save and stop by themselves; the next attempt must not meet them."""
        ranks = set(psutil.Process().children(recursive=True)) - self._not_ours
        _, left = psutil.wait_procs(ranks, timeout=self.plan.grace)
        for process in left:
            process.kill()

    def _rendezvous(self) -> str:
        """One that lives; else, when its turn has come, this host's own."""
        plan, began = self.plan, time.monotonic()
        own = next((index for index, endpoint in enumerate(plan.rendezvous) if is_own(endpoint)), None)
        while True:
            for endpoint in plan.rendezvous:
                if lives(endpoint):
                    return endpoint
            if own is not None and time.monotonic() - began >= own * 2 * plan.last_call:
                return plan.rendezvous[own]
            if own is None and time.monotonic() - began >= plan.last_call:
                return plan.rendezvous[0]  # torchrun waits for it
            self._wait(1.0)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._signal is None and time.monotonic() < until:
            time.sleep(min(0.2, seconds))

    def _stop(self, number: int, frame) -> None:
        self._signal = number
        if self._agent is not None and self._agent.poll() is None:
            self._agent.send_signal(signal.SIGTERM)  # it asks its ranks to stop, and waits for the grace


def say(text: str) -> None:
    print(f"supervisor: {text}", file=sys.stderr, flush=True)


def is_own(endpoint: str) -> bool:
    """Whether an endpoint is on this host."""
    name = split_endpoint(endpoint)[0]
    if name in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        with socket.socket() as probe:
            probe.bind((socket.gethostbyname(name), 0))
        return True
    except OSError:
        return False


def lives(endpoint: str) -> bool:
    try:
        with socket.create_connection(split_endpoint(endpoint), timeout=PROBE):
            return True
    except OSError:
        return False


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Raises `ParallelError` if it is not HOST:PORT."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise ParallelError(f"--rendezvous: found {endpoint!r}, expected HOST:PORT")
    return host, int(port)


def _adopt_orphans() -> None:
    """What the agent starts becomes this process's child when the agent is gone."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _end_with_parent() -> None:
    """The agent saves and stops when the supervisor is killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
