"""What a run writes down: one JSON object a line in `metrics.jsonl`, and the same numbers to DeepSpeed's monitor."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.errors import RunFolderError
from dsmoe.routers.recorder import RoutingTotals
from dsmoe.runtime.files import write_atomically

FILE = "metrics.jsonl"
REPEAT_WARNING = 60.0  # seconds


Warn = Callable[[str], None]


class AppendedFile:
    """Lines at the end of a file. One that cannot be written is lost, with a warning: a log never ends a run.

    A file or folder that was deleted is made again. A line that was cut short by a full disk is ended first.
    """

    def __init__(self, path: Path, warn: Warn = print):
        self.path, self.warn = path, warn
        self._descriptor: int | None = None
        self._torn, self._lost, self._warned = False, 0, -math.inf

    def write(self, line: str) -> None:
        try:
            self._open()
            data = (("\n" if self._torn else "") + line + "\n").encode()
            written = os.write(self._descriptor, data)
            self._torn = written < len(data)
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._lost += 1
            if time.monotonic() - self._warned > REPEAT_WARNING:
                self._warned = time.monotonic()
                self.warn(
                    f"cannot write {self.path} ({error.strerror or error}): {self._lost} line"
                    f"{'s' if self._lost > 1 else ''} lost so far; training continues"
                )

    def _open(self) -> None:
        if self._descriptor is not None and not self.path.exists():
            self.close()
            self.warn(f"{self.path} was deleted; a new one is started")
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class LineWriter:
    """Appends JSON lines with a `step` to a file, on rank 0; on other ranks it does nothing.

    Args:
        first_step: a resumed run continues after this step; lines of later steps, which are done again, are dropped.
        warn: gets what could not be written.

    Raises:
        RunFolderError: the file of an earlier part of the run cannot be read or replaced.
    """

    def __init__(self, path: Path, rank: int, first_step: int = 0, warn: Warn = print):
        self._file, self._warn = None, warn
        if rank == 0:
            self._file = AppendedFile(path, warn)
            try:
                if path.exists():
                    lines = [line for line in read_lines(path) if _step_of(line) <= first_step]
                    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
            except OSError as error:
                raise RunFolderError(f"cannot continue {path}: {error.strerror or error}") from error

    def write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({name: _short(value) for name, value in line.items()}))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _step_of(line: dict[str, Any]) -> float:
    step = line.get("step")
    return step if isinstance(step, int) else math.inf


class MetricsWriter(LineWriter):
    """RUN/metrics.jsonl, and DeepSpeed's monitor (TensorBoard, W&B, CSV) if there is one."""

    def __init__(self, run_dir: Path, rank: int, monitor=None, first_step: int = 0, warn: Warn = print):
        super().__init__(run_dir / FILE, rank, first_step, warn)
        self.monitor = monitor if monitor is not None and monitor.enabled else None
        if self.monitor is not None:
            _forgive(self.monitor, warn)

    def write(self, line: dict[str, Any]) -> None:
        """One line; `step` and `tokens` say where the run is, all other numbers, lists apart, go to the monitor too."""
        super().write(line)
        if self._file is None or self.monitor is None:
            return
        values = {name: value for name, value in _scalars(line) if name not in ("step", "tokens")}
        self.monitor.write_events([(f"dsmoe/{name}", float(value), line["step"]) for name, value in values.items()])


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens now."""
    return interval > 0 and step % interval == 0


def _forgive(monitor, warn: Warn) -> None:
    """Let a monitor that fails once, on a full disk or in a deleted folder, be silent from then on: DeepSpeed's engine
    writes to it in the middle of a step."""
    write_events = monitor.write_events

    def write_or_give_up(events) -> None:
        if not monitor.enabled:
            return
        try:
            write_events(events)
        except Exception as error:  # TensorBoard's thread hands on whatever it met
            monitor.enabled = False
            warn(f"the monitor (TensorBoard) fails and is left out from now on: {error}")

    def without_the_writers(args: threading.ExceptHookArgs) -> None:  # what they meet is said above
        if type(args.thread).__name__ != "_AsyncWriterThread":
            threading.__excepthook__(args)

    threading.excepthook = without_the_writers
    monitor.write_events = write_or_give_up


def _scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{part}", number) for part, number in value.items())
        elif isinstance(value, int | float):
            yield name, value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut short by a kill is dropped."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def routing_metrics(totals: RoutingTotals, ep_size: int) -> dict[str, float]:
    """experts_per_token, density, imbalance, no_expert and dead_experts of some routing.

    imbalance: max over EP ranks of the routes they receive, over their mean; the mean of that over layers.
    expert_imbalance: the same over experts. no_expert: share of tokens that no expert of a layer took.
    dead_experts: share of experts that took no token.
    """
    counts_LE, without_expert_L, tokens = _on_host(totals)
    layers = len(counts_LE)
    experts_per_token = counts_LE.sum() / (tokens * layers)
    return {
        "experts_per_token": float(experts_per_token),
        "density": float(experts_per_token / counts_LE.shape[1]),
        "imbalance": float(_max_over_mean(counts_LE.reshape(layers, ep_size, -1).sum(-1)).mean()),
        "expert_imbalance": float(_max_over_mean(counts_LE).mean()),
        "no_expert": float(without_expert_L.sum() / (tokens * layers)),
        "dead_experts": float((counts_LE == 0).mean()),
    }


def experts_per_token_by_layer(totals: RoutingTotals) -> list[float]:
    """Mean active experts of a token in each MoE layer, first layer first."""
    counts_LE, _, tokens = _on_host(totals)
    return (counts_LE.sum(1) / tokens).tolist()


def layer_metrics(totals: RoutingTotals) -> dict[str, list[float]]:
    """Of each MoE layer, first layer first: experts_per_token; expert_imbalance, max/mean of its experts' load;
    no_expert, share of its tokens without one; dead_experts, share of its experts without a token."""
    counts_LE, without_expert_L, tokens = _on_host(totals)
    values = {
        "experts_per_token": counts_LE.sum(1) / tokens,
        "expert_imbalance": _max_over_mean(counts_LE),
        "no_expert": without_expert_L / tokens,
        "dead_experts": (counts_LE == 0).mean(1),
    }
    return {name: value.tolist() for name, value in values.items()}


def worst_layer(layers: dict[str, list[float]]) -> dict[str, float]:
    """The MoE layer whose busiest expert is furthest above the mean, and by how much."""
    imbalances = layers["expert_imbalance"]
    return {"worst_imbalance": max(imbalances), "worst_layer": imbalances.index(max(imbalances))}


def _on_host(totals: RoutingTotals) -> tuple[np.ndarray, np.ndarray, float]:
    """counts_LE, without_expert_L and tokens, at least 1, in fp64: an operator on a few numbers takes numpy a tenth of
    torch's time."""
    counts_LE, without_expert_L = totals.counts_LE.double().cpu(), totals.without_expert_L.double().cpu()
    return counts_LE.numpy(), without_expert_L.numpy(), max(1.0, float(totals.tokens))


def _max_over_mean(load_LN: np.ndarray) -> np.ndarray:
    """Of each layer; 1 for one without any route."""
    mean_L = load_LN.mean(-1)
    return np.where(mean_L > 0, load_LN.max(-1) / np.maximum(mean_L, 1e-12), 1.0)


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _short(entry) for name, entry in value.items()}
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None  # JSON has no word for the others
    return value
