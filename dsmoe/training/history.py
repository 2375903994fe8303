"""A run's life across restarts: RUN/events.jsonl, effective training time, time to recover.

    effective training time   seconds of the steps that led to where the run is, over all since it first started:
                              starts, saves, evaluations, steps done again and time in which nothing ran are lost
    time to recover           from the last sign of life before a restart to the first step after it

A line of events.jsonl has `time` (seconds since 1970), `event` and `step`:
    start     world, host, resumed_from, lost_steps, changes
    recovered seconds
    warning   text
    bad_step  what, decision
    end       why, effective, wall_seconds
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from dsmoe.training.metrics import FILE as METRICS
from dsmoe.training.metrics import AppendedFile, read_lines

FILE = "events.jsonl"


class RunHistory:
    """What happened to a run, on rank 0; other ranks keep none.

    Args:
        seconds: of the steps behind the checkpoint that the run resumes from.
        step: that it is at.
    """

    def __init__(self, run_dir: Path, rank: int, step: int, seconds: float, warn):
        self.seconds, self.active = seconds, rank == 0
        self.restarts = self.lost_steps = 0
        self.recoveries: list[float] = []
        self.lost_now = 0
        self._last_life: float | None = None
        self.began = time.time()
        self._file = AppendedFile(run_dir / FILE, warn) if self.active else None
        if self.active and step:  # else a new one is started in this folder
            self._read(run_dir, step)

    def _read(self, run_dir: Path, step: int) -> None:
        events = [event for event in _lines(run_dir / FILE) if isinstance(event.get("time"), int | float)]
        starts = [event for event in events if event.get("event") == "start"]
        for number, event in enumerate(starts):
            if event.get("step") == 0:
                starts = starts[number:]
        if not starts:  # resumed from another folder, or from an older dsmoe: its life is counted from here
            self.seconds = 0.0
        else:
            self.began, self.restarts = starts[0]["time"], len(starts)
            own = [event for event in events if event["time"] >= self.began]
            self.recoveries = [e["seconds"] for e in own if e.get("event") == "recovered" and "seconds" in e]
            self.lost_steps = sum(e.get("lost_steps", 0) for e in own if e.get("event") == "start")
        metrics = run_dir / METRICS
        try:
            self._last_life = metrics.stat().st_mtime
        except OSError:
            return
        reached = max((line["step"] for line in _lines(metrics) if isinstance(line.get("step"), int)), default=0)
        self.lost_now = max(0, reached - step)
        self.lost_steps += self.lost_now

    def start(self, step: int, **values: Any) -> None:
        self.write("start", step, host=socket.gethostname(), lost_steps=self.lost_now, **values)

    def write(self, event: str, step: int, **values: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"time": round(time.time(), 3), "event": event, "step": step, **values}))

    def step_done(self, step: int, seconds: float) -> float | None:
        """After each optimizer step. The time to recover, after the first one of a restart."""
        self.seconds += seconds
        if self._last_life is None:
            return None
        recovery = max(0.0, time.time() - self._last_life)
        self.recoveries.append(recovery)
        self.write("recovered", step, seconds=round(recovery, 3))
        self._last_life = None
        return recovery

    @property
    def effective(self) -> float:
        """Effective training time, 0 to 1."""
        return min(1.0, self.seconds / max(1e-9, time.time() - self.began, self.seconds))

    def end(self, step: int, why: str) -> str:
        """Write the end down. Returns a line for people."""
        wall = time.time() - self.began
        self.write("end", step, why=why, effective=round(self.effective, 4), wall_seconds=round(wall, 1))
        text = f"effective training time {self.effective:.1%} of {duration(wall)}"
        if self.restarts:
            middle = sorted(self.recoveries)[len(self.recoveries) // 2] if self.recoveries else 0.0
            text += (
                f"; {self.restarts} restart{'s' if self.restarts > 1 else ''}, {middle:.1f} s to recover (median), "
                f"{self.lost_steps} steps done again"
            )
        return text

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(path)
    except OSError:
        return []


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
