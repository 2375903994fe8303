"""What a run writes down: one JSON object a line in `metrics.jsonl`, and the same numbers to DeepSpeed's monitor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.files import write_atomically
from dsmoe.routers.recorder import RoutingTotals

FILE = "metrics.jsonl"


class LineWriter:
    """Appends JSON lines with a `step` to a file, on rank 0; on other ranks it does nothing.

    Args:
        first_step: a resumed run goes on after this step; lines of later steps, which are done again, are dropped.
    """

    def __init__(self, path: Path, rank: int, first_step: int = 0):
        self._file = None
        if rank == 0:
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] <= first_step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed in `close`)

    def write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({name: _short(value) for name, value in line.items()}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class MetricsWriter(LineWriter):
    """RUN/metrics.jsonl, and DeepSpeed's monitor (TensorBoard, W&B, CSV) if there is one."""

    def __init__(self, run_dir: Path, rank: int, monitor=None, first_step: int = 0):
        super().__init__(run_dir / FILE, rank, first_step)
        self.monitor = monitor

    def write(self, line: dict[str, Any]) -> None:
        """One line; `step` and `tokens` say where the run is, all other numbers, lists apart, go to the monitor too."""
        super().write(line)
        if self._file is not None and self.monitor is not None and self.monitor.enabled:
            values = {name: value for name, value in _scalars(line) if name not in ("step", "tokens")}
            self.monitor.write_events([(f"dsmoe/{name}", float(value), line["step"]) for name, value in values.items()])


def _scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{part}", number) for part, number in value.items())
        elif not isinstance(value, list):
            yield name, value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut short by a kill is dropped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def routing_metrics(totals: RoutingTotals, ep_size: int) -> dict[str, float]:
    """experts_per_token, density, imbalance, no_expert and dead_experts of some routing.

    imbalance: max over EP ranks of the routes they receive, over their mean; the mean of that over layers.
    expert_imbalance: the same over experts. no_expert: share of tokens that no expert of a layer took.
    dead_experts: share of experts that took no token.
    """
    counts_LE = totals.counts_LE.double()
    layers = counts_LE.size(0)
    tokens = totals.tokens.double().clamp(min=1)
    values = torch.stack(
        (
            counts_LE.sum() / (tokens * layers),
            totals.density(),
            _max_over_mean(counts_LE.view(layers, ep_size, -1).sum(-1)),
            _max_over_mean(counts_LE),
            totals.without_expert_L.double().sum() / (tokens * layers),
            (counts_LE == 0).double().mean(),
        )
    )
    names = ("experts_per_token", "density", "imbalance", "expert_imbalance", "no_expert", "dead_experts")
    return dict(zip(names, values.tolist(), strict=True))


def experts_per_token_by_layer(totals: RoutingTotals) -> list[float]:
    """Mean active experts of a token in each MoE layer, first layer first."""
    return (totals.counts_LE.sum(1).double() / totals.tokens.double().clamp(min=1)).tolist()


def _max_over_mean(load_LN: torch.Tensor) -> torch.Tensor:
    """Mean over layers of max/mean; 1 for a layer without any route."""
    mean = load_LN.mean(-1)
    return torch.where(mean > 0, load_LN.max(-1).values / mean.clamp(min=1e-12), torch.ones_like(mean)).mean()


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _short(entry) for name, entry in value.items()}
    return float(f"{value:.8g}") if isinstance(value, float) else value
