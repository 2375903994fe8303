"""Run a plan: real `launch/train.py` processes, several at a time, in a folder that a later call goes on with.

A cell leaves `cell.json` beside its run. One that ended well is never run again; one that failed is kept with its error
while the others go on; one that was cut off continues from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsmoe.checkpoint.files import write_atomically
from dsmoe.errors import ConfigError, TrainingError
from dsmoe.study.plan import Cell, Plan, cell_config, cell_overrides
from dsmoe.study.results import finished, matching_steps, read_result, run_lines

ROOT = Path(__file__).resolve().parents[2]
RECORD = "cell.json"
LOG = "log.txt"
POLL_SECONDS = 0.5
SHOW_SECONDS = {True: 3, False: 30}  # between two looks at what runs do, on a terminal and elsewhere
ERROR_LINES = 20  # of a failed run's output that are kept


@dataclass
class Running:
    """A cell at work."""

    cell: Cell
    process: subprocess.Popen
    record: dict
    steps: int
    first_step: int
    started: float = field(default_factory=time.monotonic)


def run_plan(plan: Plan, out: Path, parallel: int, retry: bool = False, console: Console | None = None) -> int:
    """Run what is not finished yet.

    Args:
        parallel: runs at a time; each gets its share of the cores.
        retry: also run again what failed.

    Returns:
        How many cells have failed, earlier calls included.

    Raises:
        ConfigError: `out` holds a cell that was run with another configuration.
        TrainingError: another comparison is at work in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = console or Console(soft_wrap=True)
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"another comparison, or a run it left behind, is at work in {out}") from None
        return Runner(plan, out, parallel, retry, console, lock.fileno()).run()


class Runner:
    """The scheduler. Cells start in the plan's order; one that needs another's result waits for it."""

    def __init__(self, plan: Plan, out: Path, parallel: int, retry: bool, console: Console, lock: int):
        self.plan, self.out, self.parallel, self.console, self.lock = plan, out, parallel, console, lock
        self.cells = plan.cells()
        self.running: list[Running] = []
        self.ended: dict[Cell, dict] = {}
        self.steps_seen: list[tuple[int, float]] = []  # (steps, seconds) of cells that ended here
        for cell in self.cells:
            record = read_record(cell, out)
            if record is not None and (record["status"] == "done" or (record["status"] == "failed" and not retry)):
                self.ended[cell] = record
        self.waiting = [cell for cell in self.cells if cell not in self.ended]
        self.planned = {cell: cell_config(plan, cell, out).training.steps for cell in self.waiting}

    def run(self) -> int:
        self._check_configurations()
        bar = Progress(
            TextColumn("compare"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        task = bar.add_task("compare", total=len(self.cells), completed=len(self.ended), now="")
        shown_at = time.monotonic()
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with bar:
                while self.waiting or self.running:
                    self._start_what_can()
                    time.sleep(POLL_SECONDS)
                    self._collect()
                    if time.monotonic() - shown_at < SHOW_SECONDS[self.console.is_terminal]:
                        continue
                    shown_at, now = time.monotonic(), self._now()
                    bar.update(task, completed=len(self.ended), now=now)
                    if bar.disable:
                        self.console.print(f"{len(self.ended)}/{len(self.cells)}  {now}", highlight=False)
        finally:
            self._stop_all()
            signal.signal(signal.SIGTERM, before)
        return sum(record["status"] == "failed" for record in self.ended.values())

    def _check_configurations(self) -> None:
        """Refuse to mix the results of two plans in one folder."""
        for cell in self.cells:
            record = read_record(cell, self.out)
            if record is None or record["status"] == "failed":
                continue
            if record["config"] != self._fingerprint(cell, record["matched_steps"]):
                folder = cell.folder(self.out)
                problem = f"{folder} was run with another configuration; use a new folder, or delete this one"
                raise ConfigError([problem], str(self.out))

    def _fingerprint(self, cell: Cell, matched_steps: int | None) -> str:
        config = cell_config(self.plan, cell, self.out, matched_steps)
        return hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16]

    def _command(self, cell: Cell, steps: int | None) -> list[str]:
        config = self.plan.variant(cell.variant).config
        script = os.path.relpath(ROOT / "launch" / "train.py")  # as short as the user would type it
        return [script, "--config", config, *cell_overrides(self.plan, cell, self.out, steps)]

    def _start_what_can(self) -> None:
        for cell in list(self.waiting):
            if len(self.running) >= self.parallel:
                return
            reference = self._reference(cell)
            if reference is None:
                self._start(cell, None)
            elif reference in self.ended:
                if self.ended[reference]["status"] == "failed":
                    self._end(cell, {"status": "failed", "error": f"{reference} failed, whose compute it matches"})
                else:
                    target = read_result(reference.folder(self.out))
                    self._start(cell, matching_steps(cell_config(self.plan, cell, self.out), target))

    def _reference(self, cell: Cell) -> Cell | None:
        name = self.plan.variant(cell.variant).match_compute_of
        return None if name is None else Cell(name, cell.corpus, cell.seed)

    def _start(self, cell: Cell, matched_steps: int | None) -> None:
        self.waiting.remove(cell)
        folder = cell.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        command = self._command(cell, matched_steps)
        record = {"command": command, "config": self._fingerprint(cell, matched_steps), "matched_steps": matched_steps}
        _write_record(folder, {"status": "started", **record})
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        with open(folder / LOG, "a") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": _python_path()},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops them in order
                pass_fds=(self.lock,),  # a run that outlives this process keeps the folder locked
            )
        steps = cell_config(self.plan, cell, self.out, matched_steps).training.steps
        lines = run_lines(folder)
        first = lines[-1]["step"] if lines else 0
        self.running.append(Running(cell, process, record, steps, first))

    def _collect(self) -> None:
        for run in list(self.running):
            code = run.process.poll()
            if code is None:
                continue
            self.running.remove(run)
            folder, seconds = run.cell.folder(self.out), time.monotonic() - run.started
            record = {**run.record, "seconds": round(seconds, 1)}
            if code == 0 and finished(run_lines(folder), run.steps):
                self.steps_seen.append((run.steps - run.first_step, seconds))
                self._end(run.cell, {"status": "done", **record})
            else:
                output = (folder / LOG).read_text(errors="replace").strip().splitlines()
                error = "\n".join([f"exit code {code}", *output[-ERROR_LINES:]])
                self._end(run.cell, {"status": "failed", **record, "error": error})

    def _end(self, cell: Cell, record: dict) -> None:
        if cell in self.waiting:
            self.waiting.remove(cell)
        self.ended[cell] = record
        folder = cell.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, record)
        if record["status"] == "failed":
            said = f"failed: {record['error'].splitlines()[-1]}"
        else:
            result = read_result(folder)
            said = f"held-out loss {result.val_loss:.4f}, {result.mean_experts:.2f} experts/token"
        self.console.print(f"{cell}: {said}", highlight=False, markup=False)

    def _now(self) -> str:
        """What is at work, and how long the rest will take at the pace so far."""
        parts, steps_left = [], 0
        for run in self.running:
            lines = run_lines(run.cell.folder(self.out))
            step = lines[-1]["step"] if lines else 0
            parts.append(f"{run.cell.variant} {step}/{run.steps}")
            steps_left += run.steps - step
        steps_left += sum(self.planned[cell] for cell in self.waiting)
        seen_steps, seen_seconds = (sum(pair[place] for pair in self.steps_seen) for place in (0, 1))
        left = "?" if not seen_steps else f"{steps_left * seen_seconds / seen_steps / self.parallel / 60:.0f} min"
        return f"{', '.join(parts)}  left: {left}"

    def _stop_all(self) -> None:
        """Ask the runs to write a checkpoint and stop; a later call goes on from there."""
        for run in self.running:
            run.process.terminate()
        for run in self.running:
            try:
                run.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()


def _write_record(folder: Path, record: dict) -> None:
    write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def read_record(cell: Cell, out: Path) -> dict | None:
    """How far a cell has come, or None if it was never started."""
    path = cell.folder(out) / RECORD
    return json.loads(path.read_text()) if path.exists() else None


def shown(command: list[str]) -> str:
    """A cell's command as one would type it."""
    return shlex.join(["python", *command])


def _python_path() -> str:
    """Runs use the package that this process runs, not another one that may be installed."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])


def _interrupt(*_) -> None:
    raise KeyboardInterrupt
