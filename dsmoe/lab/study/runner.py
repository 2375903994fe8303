"""Run a study: its cells as real training runs, several at a time, in a folder that a later call continues with.

A cell leaves `cell.json` beside its run. One that ended well is never run again; one that failed is kept with its error
while the others go on; one that was cut off continues from its last checkpoint. The folder holds the study beside its
runs (`study.yaml`), so that a report needs nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console

from dsmoe.config import RunConfig
from dsmoe.errors import ConfigError, TrainingError
from dsmoe.lab.children import Child, commit, cores, machine, start, stop, train_command
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.display import Display, Row
from dsmoe.lab.study.energy import find_meter
from dsmoe.lab.study.gates import reason_to_skip
from dsmoe.lab.study.grid import Cell, Study
from dsmoe.lab.study.results import finished, matching_steps, read_result, run_lines
from dsmoe.lab.study.settings import cell_config, cell_overrides, config_file
from dsmoe.runtime.files import write_atomically
from dsmoe.runtime.screen import make_console
from dsmoe.training.schedule import decay_start

RECORD, LOG, COPY, PROBE = "cell.json", "log.txt", "study.yaml", "probe.json"
POLL_SECONDS = 0.5
STOP_SECONDS = 60  # to write a checkpoint in, before a run is killed
ERROR_LINES = 20  # of a failed run's output that are kept


def run_study(
    study: Study, out: Path, parallel: int, retry: bool = False, console: Console | None = None,
    before: list[str] | None = None, reported: Collection[Cell] = (),
) -> int:  # fmt: skip
    """Run what is not finished yet.

    Args:
        parallel: cells at a time; each gets its share of the cores.
        retry: also run again what failed.
        before: a command that is run before each cell, which starts when it has ended.
        reported: cells that are not run, as their results are elsewhere (`dsmoe.lab.study.saved.reported_cells`).

    Returns:
        How many cells have failed, earlier calls included.

    Raises:
        ConfigError: `out` holds a cell that was run with another configuration.
        TrainingError: another study is running in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    runner = StudyRunner(study, out, parallel, retry, console, before, reported)
    write_atomically(out / COPY, yaml.safe_dump(study.model_dump(), sort_keys=False, allow_unicode=True).encode())
    return runner.run()


def read_study(out: Path) -> Study:
    """The study that was run in a folder. Raises `ConfigError`."""
    return load_study(out / COPY, to_run=False)


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

    cell: Cell
    launch: Launch
    child: Child
    record: dict
    first_step: int
    reading: bool = False  # at `launch.then`
    joules_before: float | None = None  # of the machine's meter when the first step was done
    started: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        return self.launch.config.training.steps


class StudyRunner:
    """Cells start in order; one that needs another's result waits for it."""

    def __init__(
        self, study: Study, out: Path, parallel: int, retry: bool = False, console: Console | None = None,
        before: list[str] | None = None, reported: Collection[Cell] = (),
    ):  # fmt: skip
        self.study, self.out, self.parallel = study, out, parallel
        self.cells = [cell for cell in study.cells() if cell not in reported]
        self.console = console or make_console(soft_wrap=True)
        self.before = before
        self.notes = {"machine": machine(), "commit": commit()}
        self.lock: int | None = None
        self.meter = find_meter() if parallel == 1 else None  # it counts the machine, not a run
        self.running: list[Running] = []
        self.ended: dict[Cell, dict] = {}
        for cell in self.cells:
            record = read_record(cell, out)
            if record is not None and not self._to_do(cell, record, retry):
                self.ended[cell] = record
        self.waiting = [cell for cell in self.cells if cell not in self.ended]

    def launch(self, cell: Cell) -> Launch | dict | None:
        """How to run a cell; the record of one that cannot be run; None: it waits for another cell."""
        if cell.gate is None and self.study.gate is not None:
            gates = [run for run in self.study.gate_cells() if run.arm in (cell.arm, self.study.reference)]
            if not all(gate in self.ended for gate in gates):
                return None
            if reason := reason_to_skip(self.study, cell.arm, {gate: self._loss(gate) for gate in gates}):
                return {"status": "skipped", "error": reason}
        needed = self.study.needed_by(cell)
        if needed is None:
            return self._launch(cell, None)
        if needed not in self.ended:
            return None
        if self.ended[needed]["status"] != "done":
            return {"status": "failed", "error": f"{needed} {self.ended[needed]['status']}, which it needs"}
        if cell.length != 1:
            return self._launch(cell, None)
        target = read_result(needed.folder(self.out))
        return self._launch(cell, matching_steps(cell_config(self.study, cell, self.out), target))

    def planned(self, cell: Cell, record: dict | None) -> Launch:
        """How a cell would be run, or, with its record, how it was; no other cell needs to have ended."""
        return self._launch(cell, None if record is None else record.get("matched_steps"))

    def after(self, cell: Cell) -> tuple[list[str], str] | None:
        """The command that reads a finished run, and the file it makes."""
        return (["-m", "dsmoe.lab.study.probe", str(cell.folder(self.out))], PROBE) if self.study.probe else None

    def _launch(self, cell: Cell, steps: int | None) -> Launch:
        overrides = cell_overrides(self.study, cell, self.out, steps)
        return Launch(
            [*train_command(self.study.ranks), "--config", config_file(self.study, cell), *overrides],
            cell_config(self.study, cell, self.out, steps),
            self.study.ranks,
            *(self.after(cell) or (None, "")),
            notes={**self.notes, "cores": min(cores(), self.study.ranks), "alone": self.parallel == 1}
            | ({} if steps is None else {"matched_steps": steps}),
        )

    def _loss(self, cell: Cell) -> float | None:
        return read_result(cell.folder(self.out)).val_loss if self.ended[cell]["status"] == "done" else None

    def run(self) -> int:
        """Run what is not finished yet. Returns how many cells have failed, earlier calls included.

        Raises:
            ConfigError: the folder holds a cell that was run with another configuration.
            TrainingError: another study is running in the folder.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with _only_one(self.out) as self.lock, _sigterm_interrupts():
            self._check_configurations()
            try:
                with Display(self.console, "study", len(self.cells)) as display:
                    while self.waiting or self.running:
                        self._start_what_can()
                        time.sleep(POLL_SECONDS)
                        self._collect()
                        if display.due():
                            display.show(len(self.ended), self._rows(), self._seconds_left())
            finally:
                # They write a checkpoint and stop; a later call resumes them.
                stop([run.child for run in self.running], STOP_SECONDS)
        return sum(record["status"] == "failed" for record in self.ended.values())

    def _to_do(self, cell: Cell, record: dict, retry: bool) -> bool:
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
            if isinstance(launch, dict):
                self._end(cell, launch)
            elif launch is not None:
                if self.before:
                    subprocess.run(self.before, check=False, stdin=subprocess.DEVNULL)
                self._start(cell, launch)

    def _start(self, cell, launch: Launch) -> None:
        self.waiting.remove(cell)
        folder = cell.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        before = read_record(cell, self.out)
        lines = run_lines(folder)
        if before is not None and before["status"] == "done":  # all that lacks is what reads it
            before.pop("then_error", None)
            child = self._process(folder, launch.then, 1)
            self.running.append(Running(cell, launch, child, before, launch.config.training.steps, reading=True))
            return
        record = {
            "command": launch.command,
            "config": launch.config.model_dump(mode="json"),
            "ranks": launch.ranks,
            **launch.notes,
        }
        _write_record(folder, {"status": "started", **record})
        child = self._process(folder, launch.command, launch.ranks)
        branched_at = decay_start(launch.config.training) if launch.config.training.decay_from else 0
        self.running.append(Running(cell, launch, child, record, lines[-1]["step"] if lines else branched_at))

    def _process(self, folder: Path, command: list[str], ranks: int) -> Child:
        threads = max(1, cores() // (self.parallel * ranks))
        # The lock: a run that outlives this process keeps the folder locked.
        return start(
            command,
            folder / LOG,
            {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))},
            pass_fds=(self.lock,),
        )

    def _collect(self) -> None:
        joules = self.meter.joules() if self.meter is not None else None
        for run in list(self.running):
            code, folder = run.child.process.poll(), run.cell.folder(self.out)
            if joules is not None and not run.reading and run.joules_before is None and run_lines(folder):
                run.joules_before = joules
            if code is None:
                continue
            self.running.remove(run)
            if run.reading:
                error = None if code == 0 and (folder / run.launch.made).exists() else _error(run.child, code)
                self._end(run.cell, {**run.record, **({} if error is None else {"then_error": error})})
                continue
            record = {**run.record, "seconds": round(time.monotonic() - run.started, 1)}
            if code != 0 or not finished(run_lines(folder), run.steps):
                self._end(run.cell, {"status": "failed", **record, "error": _error(run.child, code)})
                continue
            record["seconds_per_step"] = record["seconds"] / max(1, run.steps - run.first_step)
            if run.joules_before is not None and run.first_step == 0:  # a run in two parts was not seen whole
                record["joules"] = joules - run.joules_before
            record = {"status": "done", **record}
            if run.launch.then is None:
                self._end(run.cell, record)
            else:
                _write_record(folder, record)
                child = self._process(folder, run.launch.then, 1)
                self.running.append(Running(run.cell, run.launch, child, record, run.steps, reading=True))

    def _end(self, cell, record: dict) -> None:
        if cell in self.waiting:
            self.waiting.remove(cell)
        self.ended[cell] = record
        folder = cell.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, record)
        if record["status"] != "done":
            message = f"{record['status']}: {record['error'].splitlines()[-1]}"
        else:
            result = read_result(folder)
            message = f"held-out loss {result.val_loss:.4f}, {result.mean_experts:.2f} experts/token"
            if "then_error" in record:
                message += f"; reading it failed: {record['then_error'].splitlines()[-1]}"
        self.console.print(f"{cell}: {message}", highlight=False, markup=False)

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


def same_run(recorded: dict, config: RunConfig) -> bool:
    """Whether a cell's recorded configuration trains what `config` does.

    A key that came into dsmoe later counts as its default, so that an upgrade does not end a study. What is logged, and
    where, makes no other run of it, nor does the folder that a study has moved to.
    """
    try:
        before = RunConfig.model_validate(recorded)
    except ValidationError:
        return False
    return _essence(before) == _essence(config)


def _essence(config: RunConfig) -> dict:
    tree = config.model_dump(exclude={"logging"})
    if tree["training"]["decay_from"] is not None:
        tree["training"]["decay_from"] = Path(tree["training"]["decay_from"]).name
    return tree


def read_record(cell, out: Path) -> dict | None:
    """How far a cell has come, or None if it was never started."""
    path = cell.folder(out) / RECORD
    return json.loads(path.read_text()) if path.exists() else None


def shown(command: list[str]) -> str:
    """A cell's command as one would type it."""
    return shlex.join(["python", *command])


def _error(child: Child, code: int) -> str:
    return f"exit code {code}\n{child.last_lines(ERROR_LINES)}"


def _write_record(folder: Path, record: dict) -> None:
    write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())


@contextmanager
def _only_one(out: Path) -> Iterator[int]:
    """Hold the folder's lock; yields its file descriptor."""
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"another study, or a run it left behind, is running in {out}") from None
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
