"""The scheduler of studies: real training runs, several at a time, in a folder that a later call goes on with.

A cell leaves `cell.json` beside its run. One that ended well is never run again; one that failed is kept with its error
while the others go on; one that was cut off continues from its last checkpoint.

`compare.py` and `scaling.py` say what a cell is; they subclass `Runner`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from dsmoe.checkpoint.files import write_atomically
from dsmoe.config import RunConfig
from dsmoe.errors import ConfigError, TrainingError
from dsmoe.lab.study.display import Display, Row
from dsmoe.lab.study.energy import find_meter
from dsmoe.lab.study.results import finished, run_lines

ROOT = Path(__file__).resolve().parents[3]
RECORD = "cell.json"
LOG = "log.txt"
POLL_SECONDS = 0.5
STOP_SECONDS = 60  # to write a checkpoint in, before a run is killed
ERROR_LINES = 20  # of a failed run's output that are kept


@dataclass(frozen=True)
class Launch:
    """How a cell is run.

    Attributes:
        command: what comes after the Python that runs this process.
        config: of the run; it tells whether a folder holds this cell or another one.
        ranks: processes that the command starts.
        then: a command that reads the finished run, or None. Its failure is kept beside a result that stays good.
        made: the file that `then` leaves in the cell's folder.
        notes: more to keep in the cell's record.
    """

    command: list[str]
    config: RunConfig
    ranks: int = 1
    then: list[str] | None = None
    made: str = ""
    notes: dict = field(default_factory=dict)


@dataclass
class Running:
    """A cell at work."""

    cell: Hashable
    launch: Launch
    process: subprocess.Popen
    record: dict
    first_step: int
    reading: bool = False  # at `launch.then`
    joules_before: float | None = None  # of the machine's meter when the first step was done
    started: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        return self.launch.config.training.steps


class Runner(ABC):
    """Cells start in order; one that needs another's result waits for it.

    Args:
        cells: all of them, each with `folder(out)` and a name as its `str`.
        parallel: cells at a time; each gets its share of the cores.
        retry: also run again what failed.
    """

    word = "run"  # what the display calls it

    def __init__(self, cells: list, out: Path, parallel: int, retry: bool = False, console: Console | None = None):
        self.cells, self.out, self.parallel = cells, out, parallel
        self.console = console or Console(soft_wrap=True)
        self.lock: int | None = None
        self.meter = find_meter() if parallel == 1 else None  # it counts the machine, not a run
        self.running: list[Running] = []
        self.ended: dict[Hashable, dict] = {}
        for cell in self.cells:
            record = read_record(cell, out)
            if record is not None and not self._to_do(cell, record, retry):
                self.ended[cell] = record
        self.waiting = [cell for cell in self.cells if cell not in self.ended]

    @abstractmethod
    def launch(self, cell) -> Launch | str | None:
        """How to run a cell; a text says why it cannot be run; None: it waits for another cell."""

    @abstractmethod
    def planned(self, cell, record: dict | None) -> Launch:
        """How a cell would be run, or, with its record, how it was; no other cell needs to have ended."""

    @abstractmethod
    def said(self, cell) -> str:
        """One line about a cell that ended well."""

    def after(self, cell) -> tuple[list[str], str] | None:
        """The command that reads a finished run, and the file it makes."""
        return None

    def run(self) -> int:
        """Run what is not finished yet. Returns how many cells have failed, earlier calls included.

        Raises:
            ConfigError: the folder holds a cell that was run with another configuration.
            TrainingError: another study is at work in the folder.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with _only_one(self.out) as self.lock, _sigterm_interrupts():
            self._check_configurations()
            try:
                with Display(self.console, self.word, len(self.cells)) as display:
                    while self.waiting or self.running:
                        self._start_what_can()
                        time.sleep(POLL_SECONDS)
                        self._collect()
                        if display.due():
                            display.show(len(self.ended), self._rows(), self._seconds_left())
            finally:
                self._stop_all()
        return sum(record["status"] == "failed" for record in self.ended.values())

    def _to_do(self, cell, record: dict, retry: bool) -> bool:
        if record["status"] == "failed":
            return retry
        if record["status"] != "done":
            return True
        after = self.after(cell)
        return (
            after is not None
            and not (cell.folder(self.out) / after[1]).exists()
            and (retry or "then_error" not in record)
        )

    def _check_configurations(self) -> None:
        """Refuse to mix the results of two studies in one folder, and name every cell that would."""
        problems = []
        for cell in self.cells:
            record = read_record(cell, self.out)
            if record is None or record["status"] == "failed":
                continue
            if not same_run(record["config"], self.planned(cell, record).config):
                folder = cell.folder(self.out)
                problems.append(f"{folder} was run with another configuration; use a new folder, or delete this one")
        if problems:
            raise ConfigError(problems, str(self.out))

    def _start_what_can(self) -> None:
        for cell in list(self.waiting):
            if len(self.running) >= self.parallel:
                return
            launch = self.launch(cell)
            if isinstance(launch, str):
                self._end(cell, {"status": "failed", "error": launch})
            elif launch is not None:
                self._start(cell, launch)

    def _start(self, cell, launch: Launch) -> None:
        self.waiting.remove(cell)
        folder = cell.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        before = read_record(cell, self.out)
        lines = run_lines(folder)
        if before is not None and before["status"] == "done":  # all that lacks is what reads it
            before.pop("then_error", None)
            process = self._process(folder, launch.then, 1)
            self.running.append(Running(cell, launch, process, before, launch.config.training.steps, reading=True))
            return
        record = {
            "command": launch.command,
            "config": launch.config.model_dump(mode="json"),
            "ranks": launch.ranks,
            **launch.notes,
        }
        _write_record(folder, {"status": "started", **record})
        process = self._process(folder, launch.command, launch.ranks)
        self.running.append(Running(cell, launch, process, record, lines[-1]["step"] if lines else 0))

    def _process(self, folder: Path, command: list[str], ranks: int) -> subprocess.Popen:
        threads = max(1, (os.cpu_count() or 1) // (self.parallel * ranks))
        with open(folder / LOG, "a") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": _python_path()},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops them in order
                pass_fds=(self.lock,),  # a run that outlives this process keeps the folder locked
            )

    def _collect(self) -> None:
        joules = self.meter.joules() if self.meter is not None else None
        for run in list(self.running):
            code, folder = run.process.poll(), run.cell.folder(self.out)
            if joules is not None and not run.reading and run.joules_before is None and run_lines(folder):
                run.joules_before = joules
            if code is None:
                continue
            self.running.remove(run)
            if run.reading:
                error = None if code == 0 and (folder / run.launch.made).exists() else _error(folder, code)
                self._end(run.cell, {**run.record, **({} if error is None else {"then_error": error})})
                continue
            record = {**run.record, "seconds": round(time.monotonic() - run.started, 1)}
            if code != 0 or not finished(run_lines(folder), run.steps):
                self._end(run.cell, {"status": "failed", **record, "error": _error(folder, code)})
                continue
            record["seconds_per_step"] = record["seconds"] / max(1, run.steps - run.first_step)
            if run.joules_before is not None and run.first_step == 0:  # a run in two parts was not seen whole
                record["joules"] = joules - run.joules_before
            record = {"status": "done", **record}
            if run.launch.then is None:
                self._end(run.cell, record)
            else:
                _write_record(folder, record)
                process = self._process(folder, run.launch.then, 1)
                self.running.append(Running(run.cell, run.launch, process, record, run.steps, reading=True))

    def _end(self, cell, record: dict) -> None:
        if cell in self.waiting:
            self.waiting.remove(cell)
        self.ended[cell] = record
        folder = cell.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, record)
        if record["status"] == "failed":
            said = f"failed: {record['error'].splitlines()[-1]}"
        else:
            said = self.said(cell)
            if "then_error" in record:
                said += f"; reading it failed: {record['then_error'].splitlines()[-1]}"
        self.console.print(f"{cell}: {said}", highlight=False, markup=False)

    def _rows(self) -> list[Row]:
        rows = []
        for run in self.running:
            lines = run_lines(run.cell.folder(self.out))
            last = lines[-1] if lines else {}
            rows.append(Row(str(run.cell), last.get("step", 0), run.steps, last.get("loss"),
                            last.get("tokens_per_second"), self._left(run), run.reading))  # fmt: skip
        return rows

    def _left(self, run: Running) -> float | None:
        """Seconds, at the pace of the last steps."""
        lines = run_lines(run.cell.folder(self.out))[-20:]
        if not lines or run.reading:
            return 0.0 if run.reading else None
        return (run.steps - lines[-1]["step"]) * sum(line.get("seconds", 0.0) for line in lines) / len(lines)

    def _seconds_left(self) -> float | None:
        """Of the whole study: what waits takes as long a step as what ended, on average."""
        paces = [record["seconds_per_step"] for record in self.ended.values() if "seconds_per_step" in record]
        if not paces:
            return None
        pace = sum(paces) / len(paces)
        steps = sum(self.planned(cell, None).config.training.steps for cell in self.waiting)
        return (steps * pace + sum(self._left(run) or 0.0 for run in self.running)) / self.parallel

    def _stop_all(self) -> None:
        """Ask the runs to write a checkpoint and stop; a later call goes on from there."""
        for run in self.running:
            _signal(run.process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for run in self.running:
            # A launcher dies at once and leaves its ranks, which save: the group is empty when all of them are done.
            while _signal(run.process, 0) and time.monotonic() < deadline:
                run.process.poll()
                time.sleep(0.1)
            _signal(run.process, signal.SIGKILL)
            run.process.wait()


def same_run(recorded: dict, config: RunConfig) -> bool:
    """Whether a cell's recorded configuration trains what `config` does.

    A key that came into dsmoe later counts as its default, so that an upgrade does not end a study. What is logged, and
    where, makes no other run of it.
    """
    try:
        before = RunConfig.model_validate(recorded)
    except ValidationError:
        return False
    return before.model_dump(exclude={"logging"}) == config.model_dump(exclude={"logging"})


def read_record(cell, out: Path) -> dict | None:
    """How far a cell has come, or None if it was never started."""
    path = cell.folder(out) / RECORD
    return json.loads(path.read_text()) if path.exists() else None


def shown(command: list[str]) -> str:
    """A cell's command as one would type it."""
    return shlex.join(["python", *command])


def train_script() -> str:
    """launch/train.py, as short as the user would type it."""
    return os.path.relpath(ROOT / "launch" / "train.py")


def _signal(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to a command and all it started; whether there was any of them left."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _error(folder: Path, code: int) -> str:
    output = (folder / LOG).read_text(errors="replace").strip().splitlines()
    return "\n".join([f"exit code {code}", *output[-ERROR_LINES:]])


def _write_record(folder: Path, record: dict) -> None:
    write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _python_path() -> str:
    """Runs use the package that this process runs, not another one that may be installed."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])


@contextmanager
def _only_one(out: Path) -> Iterator[int]:
    """Hold the folder's lock; yields its file descriptor."""
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"another study, or a run it left behind, is at work in {out}") from None
        yield lock.fileno()


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt
