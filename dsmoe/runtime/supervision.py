"""One channel between the ranks of a job, beside their collectives: what one rank meets, all ranks hear of.

A star of TCP connections: rank 0 listens, every other rank keeps one connection to it. Over it
- ranks compare what they found before any process group exists (`consult`);
- a rank that fails says why, and every rank ends with that reason;
- the kernel closes the connection of a rank that dies, which every other rank hears of at once;
- each rank says once a second what it is doing. A rank that is stopped, or behind a cut link, falls silent; it is
  named, and after the limit of its phase the job ends.

Only the standard library is used, on a thread of its own: it works before the frameworks are loaded and while the
training thread waits in a collective that will not return. That is also why the thread ends the process itself.
"""

from __future__ import annotations

import hmac
import math
import os
import resource
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsmoe.errors import ParallelError
from dsmoe.runtime.connection import Connection, listen
from dsmoe.runtime.exit_codes import FAILED, REFUSED
from dsmoe.runtime.limits import MIN_STEP_LIMIT, Limits, watch_this_process
from dsmoe.runtime.phase import phase

BEAT = 1.0  # seconds between heartbeats
WARN = 10.0  # seconds of silence before a rank is named
TOGETHER = 0.3  # seconds in which ranks that die together are named together
ANSWER = 5.0  # seconds that a rank waits to hear why a collective broke
LINGER = 30.0  # seconds that rank 0 waits for ranks that have not come yet, to tell them why there is no run


@dataclass
class Rank:
    """What is known of a rank."""

    rank: int
    host: str
    pid: int
    connection: Connection | None = None
    doing: str = "the start"
    changes: int = 0
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    warned: bool = False
    bereaved: bool = False  # it met a broken collective: its end is a consequence
    leaving: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def hear(self, beat: dict[str, Any]) -> None:
        self.heard, self.doing = time.monotonic(), beat["doing"]
        if beat["changes"] != self.changes:
            self.changes, self.moved = beat["changes"], self.heard


class Supervision:
    """A rank's end of the channel; `Server` on rank 0, `Client` on the others.

    Args:
        rank, world, host: of this process.
        local_rank: the first rank of a host prints whole messages there, the others one line.
    """

    def __init__(self, rank: int, world: int, local_rank: int, host: str, limits: Limits):
        self.rank, self.world, self.local_rank, self.host, self.limits = rank, world, local_rank, host, limits
        self._own_failure: str | None = None
        self._closing = threading.Event()
        self._checked = time.monotonic()
        if limits.step != 0:
            limit = (limits.step or MIN_STEP_LIMIT) + 2 * ANSWER  # the other ranks have ended before
            watch_this_process(limit, f"rank {rank} on {host}")

    def consult(self, value: Any, judge: Callable[[list], Any], timeout: float) -> Any:
        """Give a value (as JSON has them) to rank 0, and get what it makes of all values; collective.

        Args:
            judge: called on rank 0 with the values of all ranks.
            timeout: seconds for all ranks to come.

        Raises:
            ParallelError: on every rank that is there, when another has not come in time.
        """
        raise NotImplementedError

    def fail(self, text: str, code: int) -> None:
        """End all ranks, this one too, with this text and exit code. Returns only if nobody answers."""
        self._own_failure = text
        self._report(text, code)
        time.sleep(LINGER + ANSWER)

    def broken_collective(self) -> None:
        """Wait to hear which rank has gone; that ends this process. Returns if none has."""
        time.sleep(ANSWER)

    def close(self) -> None:
        """This rank leaves because the job is done."""
        self._closing.set()

    def _report(self, text: str, code: int) -> None:
        raise NotImplementedError

    def _end(self, text: str, code: int, culprit: int | None, host: str | None) -> None:
        """Print why, and leave."""
        if not self._closing.is_set():
            self._print(text, culprit, host)
            os._exit(code)

    def _print(self, text: str, culprit: int | None, host: str | None) -> None:
        """A rank that failed itself prints its own words, once a host where all met the same."""
        if culprit == self.rank:
            line = self._own_failure or text
        elif self._own_failure is not None and self._own_failure in text:
            line = self._own_failure if self.local_rank == 0 and host != self.host else ""
        else:
            line = f"[rank {self.rank}] {text if self.local_rank == 0 else text.splitlines()[0]}"
        if line:
            print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()

    def _paused(self, now: float) -> float:
        """Seconds in which this process itself was stopped (Ctrl-Z, a suspended machine): nobody was silent then."""
        gap, self._checked = now - self._checked, now
        return gap if gap > 5 * BEAT else 0.0


class Server(Supervision):
    """Rank 0: listens, compares, judges."""

    def __init__(self, *args, token: str):
        super().__init__(*args)
        self._token = token
        self._ranks: dict[int, Rank] = {0: Rank(0, self.host, os.getpid())}
        self._values: dict[int, tuple[Any, float]] = {}  # and when they came, by this host's clock
        self._arrivals: list[float] = []
        self._changed = threading.Condition()
        self._gone: list[Rank] = []
        self._gone_since = 0.0
        self._began = time.monotonic()
        self._final: list[Any] | None = None  # what ended the job: text, exit code, rank, its host
        self._leave_at = math.inf  # until it is printed
        if self.world > 500:  # a connection from each rank
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._listener = listen()
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, name="supervision", daemon=True)
        self._thread.start()

    def consult(self, value: Any, judge: Callable[[list], Any], timeout: float) -> Any:
        with self._changed:
            self._values[0] = value, time.time()
            self._changed.wait_for(lambda: len(self._values) == self.world, timeout)
            values, self._values = self._values, {}
        absent = sorted(set(range(self.world)) - values.keys())
        if absent:
            raise ParallelError(f"{self._names(absent)} did not report within {timeout:.0f} s (training.timeout.start)")
        in_order = [values[rank] for rank in range(self.world)]
        self._arrivals = [arrived for _, arrived in in_order]
        answer = judge([value for value, _ in in_order])
        self._broadcast(answer=answer)
        return answer

    def arrivals(self) -> list[float]:
        """When the values of the last `consult` came, by rank: `time.time()` of this host."""
        return self._arrivals

    def close(self) -> None:
        super().close()
        self._broadcast(done=True)

    def _names(self, ranks: list[int]) -> str:
        shown = [str(self._ranks[rank]) if rank in self._ranks else f"rank {rank}" for rank in ranks[:8]]
        return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _report(self, text: str, code: int) -> None:
        self._verdict(f"{self._ranks[0]}: {text}", code, self._ranks[0])

    def _verdict(self, text: str, code: int, culprit: Rank | None = None) -> None:
        """The first one counts. The serving thread leaves once all ranks have it, or had time to come for it."""
        with self._changed:
            if self._final is not None or self._closing.is_set():
                return
            about = [culprit.rank, culprit.host] if culprit else [None, None]
            self._final = [text, code, *about]
        self._broadcast(end=self._final)
        self._print(text, *about)
        complete = len(self._ranks) == self.world
        self._leave_at = 0.0 if complete else min(time.monotonic() + LINGER, self._began + self.limits.start)

    def _broadcast(self, **message: Any) -> None:
        for rank in list(self._ranks.values()):
            if rank.connection is not None:
                rank.connection.send(**message)

    def _serve(self) -> None:
        beat = time.monotonic()
        while True:
            for key, _ in self._selector.select(0.1):
                if key.data is None:
                    self._accept()
                else:
                    self._read(*key.data)
            now = time.monotonic()
            if self._final is not None:
                if now >= self._leave_at or (len(self._ranks) == self.world and self._leave_at < math.inf):
                    os._exit(self._final[1])
                continue
            if now - beat >= BEAT:
                beat = now
                self._broadcast(beat={"doing": str(phase), "changes": phase.changes})
                self._judge(now)
            if self._gone and now - self._gone_since > TOGETHER:
                self._judge_gone()

    def _accept(self) -> None:
        connection = Connection(self._listener.accept()[0])
        self._selector.register(connection.sock, selectors.EVENT_READ, (connection, []))

    def _read(self, connection: Connection, owner: list[Rank]) -> None:
        messages = connection.receive()
        for message in messages or ():
            if "hello" in message and not owner and isinstance(message["hello"], dict):
                self._greet(connection, owner, message["hello"])
            elif owner:
                self._hear(owner[0], message)
        if messages is None:
            self._selector.unregister(connection.sock)
            connection.sock.close()
            if owner and not owner[0].leaving and not self._closing.is_set():
                self._gone = self._gone or []
                self._gone.append(owner[0])
                self._gone_since = time.monotonic()

    def _greet(self, connection: Connection, owner: list[Rank], hello: dict[str, Any]) -> None:
        rank = hello.get("rank", 0)
        known = hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode())
        if not known or rank in self._ranks or rank not in range(1, self.world):
            text = f"ParallelError: rank {rank} of {self.world} is here already: does another job use this port?"
            connection.send(end=[text, REFUSED, rank, None])
            return
        owner.append(Rank(rank, hello["host"], hello["pid"], connection))
        self._ranks[rank] = owner[0]
        if self._final is not None:
            connection.send(end=self._final)

    def _hear(self, rank: Rank, message: dict[str, Any]) -> None:
        rank.heard = time.monotonic()
        if "beat" in message:
            rank.hear(message["beat"])
        elif "value" in message:
            with self._changed:
                self._values[rank.rank] = message["value"], time.time()
                self._changed.notify_all()
        elif "failed" in message:
            self._verdict(f"{rank}: {message['failed']}", message["code"], rank)
        elif "bereaved" in message:
            rank.bereaved = True
        elif "bye" in message:
            rank.leaving = True

    def _judge_gone(self) -> None:
        """Ranks whose connection ended without a word; those that were first hit by another's end last."""
        gone = [rank for rank in self._gone if not rank.bereaved] or self._gone
        verb = "has" if len(gone) == 1 else "have"
        last = f"; last heard of in {gone[0].doing}" if gone[0].doing != str(phase) else ""
        names = self._names([rank.rank for rank in gone])
        self._verdict(f"{names} {verb} gone, in {phase}{last}", FAILED)

    def _judge(self, now: float) -> None:
        """Name who is silent; end a job that stands still."""
        ranks = list(self._ranks.values())
        if paused := self._paused(now):
            for rank in ranks:
                rank.heard, rank.moved = rank.heard + paused, rank.moved + paused
        self._ranks[0].hear({"doing": str(phase), "changes": phase.changes})
        limit = self.limits.now()
        if len(ranks) < self.world or not limit:
            return
        for rank in ranks:
            silence = now - rank.heard
            if silence > WARN and not rank.warned and not rank.leaving:
                text = f"{rank} has been silent for {silence:.0f} s, last heard of in {rank.doing}"
                print(f"{text}; after {limit:.0f} s without progress the run ends", file=sys.stderr, flush=True)
            elif rank.warned and silence <= WARN:
                print(f"{rank} is heard of again", file=sys.stderr, flush=True)
            rank.warned = silence > WARN
        if now - max(rank.moved for rank in ranks) > limit:
            self._verdict(f"no progress for {limit:.0f} s ({self.limits.key}): {self._blame(now, limit)}", FAILED)

    def _blame(self, now: float, limit: float) -> str:
        ranks = list(self._ranks.values())
        silent = [rank for rank in ranks if now - rank.heard > _missed(limit) and not rank.leaving]
        fewest = min(rank.changes for rank in ranks)
        behind = [rank for rank in ranks if rank.changes == fewest]
        if silent:
            names = self._names([rank.rank for rank in silent])
            since = now - min(rank.heard for rank in silent)
            return f"{names} silent for {since:.0f} s (stopped, or cut off), last heard of in {silent[0].doing}"
        if len(behind) == self.world:
            return f"all ranks wait in {phase}"
        return f"the others wait for {self._names([rank.rank for rank in behind])}, in {behind[0].doing}"


class Client(Supervision):
    """Every rank but 0."""

    def __init__(self, *args, address: str, port: int, token: str):
        super().__init__(*args)
        self._answers: list[Any] = []
        self._resumed = 0.0  # when this process had been stopped itself
        self._changed = threading.Condition()
        self._first = Rank(0, address, 0)  # its host by that name until it says another
        try:
            self._connection = Connection(socket.create_connection((address, port), timeout=self.limits.start or None))
        except OSError as error:
            raise ParallelError(f"rank {self.rank} on {self.host} cannot reach {address}:{port}: {error}") from error
        self._connection.send(hello={"rank": self.rank, "host": self.host, "pid": os.getpid(), "token": token})
        threading.Thread(target=self._listen, name="supervision", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def consult(self, value: Any, judge: Callable[[list], Any], timeout: float) -> Any:
        self._connection.send(value=value)
        with self._changed:
            if not self._changed.wait_for(lambda: self._answers, timeout + ANSWER):
                raise ParallelError(f"{self._first} gave no answer within {timeout:.0f} s (training.timeout.start)")
            return self._answers.pop(0)

    def broken_collective(self) -> None:
        self._connection.send(bereaved=True)
        super().broken_collective()

    def close(self) -> None:
        super().close()
        self._connection.send(bye=True)

    def _report(self, text: str, code: int) -> None:
        self._connection.send(failed=text, code=code)

    def _listen(self) -> None:
        while True:
            messages = self._connection.receive()
            if messages is None:
                self._end(f"{self._first} has gone, in {phase}", FAILED, 0, None)
                return
            for message in messages:
                self._first.heard = time.monotonic()
                if "beat" in message:
                    self._first.hear(message["beat"])
                elif "end" in message:
                    self._end(*message["end"])
                elif "done" in message:
                    self._closing.set()
                elif "answer" in message:
                    with self._changed:
                        self._answers.append(message["answer"])
                        self._changed.notify_all()

    def _beat(self) -> None:
        while not self._closing.wait(BEAT):
            now = time.monotonic()
            if paused := self._paused(now):
                self._first.heard, self._resumed = self._first.heard + paused, now
            self._connection.send(beat={"doing": str(phase), "changes": phase.changes})
            limit, silence = self.limits.now(), now - self._first.heard
            still = now - max(phase.since, self._resumed)
            # Later than rank 0 would: it judges first where it can.
            if limit and still > limit + ANSWER and silence > _missed(limit) + ANSWER:
                why = f"silent for {silence:.0f} s (stopped, or cut off), last heard of in {self._first.doing}"
                self._end(f"no progress for {limit:.0f} s ({self.limits.key}): {self._first} {why}", FAILED, 0, None)


def _missed(limit: float) -> float:
    """Seconds after which a heartbeat is missing, and not only late."""
    return min(WARN, limit / 2)


current: Supervision | None = None  # of this process; None for a job of one


def supervise(supervision: Supervision | None) -> None:
    """Make it this process's."""
    global current
    current = supervision


def lost_peer(error: BaseException) -> bool:
    """Whether a collective broke, as it does when another rank has gone."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    return bool({"DistBackendError", "DistNetworkError", "DistStoreError"} & names) or "gloo" in text or "NCCL" in text
