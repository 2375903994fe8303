"""One writer for a run folder: a lock file with its owner and a heartbeat, RUN/run.lock.

    {"host": ..., "pid": ..., "machine": ..., "started": ..., "token": ..., "beat": 12, "interval": 5.0}

A second run is refused while the owner lives. Of an owner on the same machine (same boot, same PID namespace) the
kernel knows whether it lives. Of one on another machine the heartbeat tells: the file is watched until it changes, or
has not changed for several intervals by this machine's own clock. No clock is compared with another's, so skew is
harmless, and every look opens the file anew, which is when a network file system fetches it anew.

An owner that is gone is succeeded: a newcomer claims its place with a file named after its token, which one of several
can make, sees that the lock is still the dead owner's, and puts its own in its place in one step, so that there is no
moment without a lock. A claim whose maker died is succeeded like a lock. An owner that finds another's token in the
file (it was suspended for so long that it was taken for dead) has lost the folder and must stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from dsmoe.errors import RunFolderError

FILE = "run.lock"
INTERVAL = 5.0  # seconds between heartbeats
SILENT_INTERVALS = 4  # without a heartbeat before an owner on another machine is taken for dead


@dataclass
class Owner:
    """Who holds a run folder."""

    host: str
    pid: int
    machine: str  # boot and PID namespace: where `pid` means something
    started: str  # of the process, in the kernel's words: a PID is used again
    token: str
    interval: float
    beat: int = 0

    @classmethod
    def of_this_process(cls, interval: float) -> Owner:
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _machine(), _started(pid) or "", uuid.uuid4().hex, interval)

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """None where there is no lock, or its owner is writing it at this moment."""
        try:
            content = json.loads(path.read_text())
            own = cls(**{name: kind(content[name]) for name, kind in _FIELDS.items()})
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                return None
            raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError):
            return None
        return own

    @property
    def text(self) -> str:
        return f"process {self.pid} on {self.host}"


_FIELDS = {"host": str, "pid": int, "machine": str, "started": str, "token": str, "interval": float, "beat": int}


class RunLock:
    """Context manager that holds a run folder; it makes the folder if need be.

    Args:
        run_dir: the folder.
        interval: seconds between heartbeats.

    Attributes:
        taken_over: who held the folder before and is gone; None if nobody did.
        lost: whether another run has taken the folder over.
    """

    def __init__(self, run_dir: Path, interval: float = INTERVAL):
        self.path = run_dir / FILE
        self.owner = Owner.of_this_process(interval)
        self.taken_over: Owner | None = None
        self.lost = False
        self._made_folder = not run_dir.exists()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self) -> None:
        """Raises `RunFolderError`: another run holds the folder, or it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not (self._link_to(self.path) or self._succeed()):
                pass  # the folder changed hands meanwhile: look again
        except OSError as error:
            raise RunFolderError(
                f"cannot write the run folder {self.path.parent}: {error.strerror or error}"
            ) from error
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):
                self.path.unlink()
        if self._made_folder:
            with contextlib.suppress(OSError):  # something is in it
                self.path.parent.rmdir()

    def _link_to(self, path: Path) -> bool:
        """Make a file with this owner, complete at once; False if there is one."""
        complete = self._write()
        try:
            os.link(complete, path)  # atomic on network file systems too
        except FileExistsError:
            return False
        finally:
            complete.unlink()
        return True

    def _write(self) -> Path:
        complete = self.path.with_name(f".{FILE}.{self.owner.token}")
        complete.write_text(json.dumps(asdict(self.owner)))
        return complete

    def _claim_on(self, owner: Owner | None) -> Path:
        return self.path.with_name(f".{FILE}.after.{owner.token if owner else 'unreadable'}")

    def _succeed(self) -> bool:
        """Take the place of an owner that is gone; False if the lock is another's by now.

        Raises `RunFolderError` if the owner, or who claims its place, lives.
        """
        owner = Owner.read(self.path)
        if owner is None and not self.path.exists():
            return False  # it has just gone
        self._require_dead(self.path, owner)
        claims = [self._claim_on(owner)]
        while not self._link_to(claims[-1]):
            claimant = Owner.read(claims[-1])
            self._require_dead(claims[-1], claimant)
            claims.append(self._claim_on(claimant))
        try:
            # Tokens do not come back, so what is unchanged now stays so while the claim is held.
            now = Owner.read(self.path)
            unchanged = self.path.exists() and (now and now.token) == (owner and owner.token)
            if unchanged:
                os.replace(self._write(), self.path)
                self.taken_over = owner
                for claim in claims[:-1]:
                    claim.unlink(missing_ok=True)
        finally:
            claims[-1].unlink(missing_ok=True)
        return unchanged

    def _require_dead(self, path: Path, owner: Owner | None) -> None:
        if owner is not None and owner.machine == self.owner.machine:
            alive = _started(owner.pid) == owner.started
        else:
            owner, alive = self._watch(path, owner)
        if alive:
            who = owner.text if owner else "another process"
            raise RunFolderError(
                f"{self.path.parent} is in use: {who} is writing there ({self.path.name}). Wait for it, stop it, or "
                "give this run another folder with logging.run_dir"
            )

    def _watch(self, path: Path, owner: Owner | None) -> tuple[Owner | None, bool]:
        """The owner, and whether its file changes within some of its intervals."""
        interval = min(owner.interval, 60.0) if owner else self.owner.interval
        first, until = _content(path), time.monotonic() + SILENT_INTERVALS * interval
        who = owner.text if owner else "another process"
        if first is not None:
            print(f"waiting up to {SILENT_INTERVALS * interval:.0f} s: does {who} still write into {path.parent}?")
        while (now := _content(path)) is not None and time.monotonic() < until:
            if now != first:
                return Owner.read(path) or owner, True
            time.sleep(min(0.5, interval / 4))
        return owner, False

    def _beat(self) -> None:
        while not self._stop.wait(self.owner.interval):
            with contextlib.suppress(RunFolderError, OSError):  # a folder that is gone is not another's
                holder = Owner.read(self.path)
                if holder is not None and holder.token != self.owner.token:
                    self.lost = True
                    return
                self.owner.beat += 1
                with open(self.path, "r+") as file:  # in place: its readers open it anew each time
                    file.write(json.dumps(asdict(self.owner)))
                    file.truncate()
                    file.flush()
                    os.fsync(file.fileno())


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Where a PID of this process's kind means the same process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if there is no such process, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
