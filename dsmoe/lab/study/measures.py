"""What one cell of a study measured, by name. A quantity that a run has not recorded is missing, never 0.

Cells come from the folders of their runs, or from the `cells.csv`, `curves.csv` and `about.json` that a report wrote.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev

import numpy

from dsmoe.config import RunConfig
from dsmoe.lab.study.grid import MEASURED, Cell, Study
from dsmoe.lab.study.inside import REPLAYED, Inside
from dsmoe.lab.study.results import (
    END,
    finished,
    flops_per_token,
    history,
    read_result,
    run_config,
    same_data,
    sized,
    trained_on,
)
from dsmoe.lab.study.runner import read_record

SMOOTH = 0.02  # of a run, each way
POINTS = 40  # of a curve over training that are stored
CURVE = ("step", "tokens", "flops", "seconds", "loss", "experts_per_token")
SPIKE_WINDOW, SPIKE_SIZE = 20, 6.0  # steps before, and median absolute deviations above their median
PAUSE = 5.0  # a step that took this many times its neighbours' median was interrupted
T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom


@dataclass(frozen=True)
class Measure:
    """A quantity: what it is called, its unit, how it is written, whether seconds are in it, and whether it is of the
    experts rather than of the run."""

    title: str
    unit: str
    form: str
    timed: bool = False
    inside: bool = False

    @property
    def heading(self) -> str:
        return self.title + (f" ({self.unit})" if self.unit else "")


MEASURES = {
    "val_loss": Measure("held-out loss", "nats/token", ".4f"),
    "experts": Measure("experts per token, held-out", "", ".2f"),
    "mean_experts": Measure("experts per token, whole training", "", ".2f"),
    "parameters": Measure("parameters", "", ",.0f"),
    "active_parameters": Measure("active parameters", "", ",.0f"),
    "tokens": Measure("training tokens", "", ".3g"),
    "training_flops": Measure("training compute", "FLOP", ".3g"),
    "step_seconds": Measure("step time", "s", ".3f", True),
    "tokens_per_second": Measure("tokens per second", "1/s", ",.0f", True),
    "peak_memory": Measure("peak memory of a process", "MiB", ",.0f"),
    "bytes_per_flop": Measure("weights read per active FLOP", "byte", ".3g"),
    "all_to_all": Measure("all-to-all per token", "byte", ",.0f"),
    "imbalance": Measure("busiest expert over mean", "", ".2f"),
    "dead_experts": Measure("experts without a token in a step", "", ".1%"),
    "no_expert": Measure("tokens without an expert", "", ".1%"),
    "spikes": Measure("loss spikes", "", ".1f"),
    "joules_per_token": Measure("energy per token, modelled", "mJ", ".3f", True),
    "measured_joules": Measure("energy per token, measured", "mJ", ".3f", True),
    "passes_seconds": Measure("forward and backward", "s", ".3f", True),
    "optimizer_seconds": Measure("optimizer", "s", ".3f", True),
    "routing_share": Measure("routing, dispatch and combine in forward and backward", "", ".1%", True),
    "exchange_share": Measure("all-to-all in forward and backward", "", ".1%", True),
    "first_token": Measure("to the first token", "ms", ".2f", True),
    "token": Measure("for each token after it", "ms", ".2f", True),
    "idle_experts": Measure("experts without a token in the last tenth", "", ".1%", inside=True),
    "weak_experts": Measure("experts with under a tenth of the mean gradient", "", ".1%", inside=True),
    "expert_gradient": Measure("gradient norm of an expert, median", "", ".2g", inside=True),
    "output_cosine": Measure("likeness of experts' outputs, cosine", "", ".3f", inside=True),
    "output_cka": Measure("likeness of experts' outputs, CKA", "", ".3f", inside=True),
    "weights_alike": Measure("likeness of experts' weights above chance", "", ".3f", inside=True),
    "flips": Measure("routes changed since the checkpoint before", "", ".1%", inside=True),
    "flips_bf16": Measure("routes changed by bf16 inputs", "", ".2%", inside=True),
    "load_contiguous": Measure(f"busiest of {REPLAYED} ranks over mean, experts in order", "", ".2f", inside=True),
    "load_aware": Measure(f"busiest of {REPLAYED} ranks, experts placed by load", "", ".2f", inside=True),
    "load_replicated": Measure(f"busiest of {REPLAYED} ranks, hot experts copied", "", ".2f", inside=True),
    "by_route": Measure("rows sent without de-duplication, over ours", "", ".2f", inside=True),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A finished cell. `inside`, `config` and `lines` are there where its run is."""

    cell: Cell
    values: dict[str, float]
    x: float | None  # its place along the bottom of pictures
    shape: dict[str, int]  # number and width of experts
    curve: list[dict[str, float]]  # over training, `CURVE` at most `POINTS` times
    inside: Inside | None = None
    config: RunConfig | None = None
    lines: list[dict] = field(default_factory=list)
    layers: list[float] | None = None  # experts per token of each MoE layer, on held-out text


@dataclass(frozen=True)
class StudyResults:
    """A study and what came of it."""

    study: Study
    out: Path
    measured: list[Measured]
    missing: list[tuple[Cell, str]]  # cells without a result, and why
    machine: str
    commits: list[str]
    data: dict[str, str] = field(default_factory=dict)  # what each `data.path` was, where it is known

    @property
    def full(self) -> list[Measured]:
        """Cells of the whole length."""
        return [run for run in self.measured if run.cell.length == 1]

    @property
    def with_runs(self) -> list[Measured]:
        """Those of them whose runs are there, and not only their numbers."""
        return [run for run in self.full if run.lines]

    def arms(self) -> list[str]:
        """Those with a result, in the study's order."""
        return [arm.name for arm in self.study.arms if any(m.cell.arm == arm.name for m in self.measured)]

    def by_point(self, arm: str, length: float = 1.0) -> dict[tuple, list[Measured]]:
        """An arm's cells of a length that differ in the seed alone, together; in the order of x."""
        groups: dict[tuple, list[Measured]] = {}
        for run in self.measured:
            if run.cell.arm == arm and run.cell.length == length:
                groups.setdefault(run.cell.point, []).append(run)
        return dict(sorted(groups.items(), key=lambda item: mean(run.x or 0.0 for run in item[1])))

    def by_arm(self) -> list[tuple[str, str, list[Measured]]]:
        """Cells of the whole length that differ in the seed alone, together, arm by arm: the arm, its name with the
        point where the arm has several, and the cells."""
        groups = []
        for arm in self.arms():
            points = self.by_point(arm)
            groups += [
                (arm, arm if len(points) == 1 else f"{arm}, {at(point)}", runs) for point, runs in points.items()
            ]
        return groups


def at(point) -> str:
    """Where a cell lies on its axes."""
    return ", ".join(f"{axis.rpartition('.')[2]} {value}" for axis, value in point)


def read_results(study: Study, out: Path) -> StudyResults:
    """All cells of a study. Raises `ConfigError` where they were not trained on the same data."""
    measured, missing, machines, commits = [], [], [], []
    data: dict[str, str] = {}
    for cell in study.cells():
        if cell.gate is not None:
            continue
        record, folder = read_record(cell, out), cell.folder(out)
        if record is None or record["status"] != "done":
            error = (record or {}).get("error", "").strip().splitlines()
            missing.append(
                (cell, f"{'not run' if record is None else record['status']}{': ' + error[-1] if error else ''}")
            )
            continue
        machines.append(record.get("machine", ""))
        commits.append(record.get("commit", ""))
        run = measure(study, cell, folder, record)
        measured.append(run)
        if run.config is not None and (trained := trained_on(folder)) is not None:
            data = same_data(data, {str(run.config.data.path): trained}, str(folder))
    commits = list(dict.fromkeys(filter(None, commits)))
    return StudyResults(study, out, measured, missing, next(iter(machines), ""), commits, data)


def measure(study: Study, cell: Cell, folder: Path, record: dict) -> Measured:
    """Read one finished run."""
    config, result = run_config(folder), read_result(folder)
    lines = history(folder, config)
    if not finished(lines, config.training.steps):
        raise ValueError(f"{folder} is not finished")
    end = lines[-max(1, round(END * len(lines))) :]
    tokens = config.training.global_batch_size * config.model.sequence_length
    seconds = median(line["seconds"] for line in lines)
    values = {
        "val_loss": result.val_loss,
        "experts": result.val_experts,
        "mean_experts": result.mean_experts,
        "parameters": sized(config).total,
        "active_parameters": sized(config).active,
        "tokens": float(result.tokens),
        "training_flops": flops(config, lines).sum(),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "bytes_per_flop": 4 * sized(config).total / flops(config, lines[-1:])[0],
        "imbalance": result.expert_imbalance,
        "no_expert": result.no_expert,
        "spikes": float(spikes([line["loss"] for line in lines])),
        "joules_per_token": 1e3 * study.watts_per_core * record.get("cores", study.ranks) * seconds / tokens,
    }
    if "dead_experts" in lines[-1]:
        values["dead_experts"] = mean(line["dead_experts"] for line in end)
    if "peak_memory_bytes" in lines[-1]:
        values["peak_memory"] = lines[-1]["peak_memory_bytes"] / 2**20
    if "all_to_all_bytes" in lines[-1] and study.ranks > 1:
        values["all_to_all"] = median(line["all_to_all_bytes"] for line in end) / tokens
    inside = Inside(folder)
    values |= inside.values(lines)
    if "joules" in record:
        values["measured_joules"] = 1e3 * record["joules"] / (tokens * len(lines))
    if not (study.timed and record.get("alone", True)):
        values = {name: value for name, value in values.items() if not MEASURES[name].timed}
    if not study.quality:
        values = {name: value for name, value in values.items() if name not in ("val_loss", "spikes")}
    shape = {"num_experts": config.model.num_experts, "expert_width": config.model.moe_ffn_hidden_size}
    curve, x = curve_of(config, lines), x_of(study, cell, result.val_experts)
    return Measured(cell, values, x, shape, curve, inside, config, lines, result.val_experts_by_layer)


def x_of(study: Study, cell: Cell, experts: float | None) -> float | None:
    return experts if study.x == MEASURED else dict(cell.point).get(study.x)


def curve_of(config: RunConfig, lines: list[dict]) -> list[dict[str, float]]:
    """A run over training: smoothed loss and what it had cost, and each evaluation."""
    loss, cost, seconds = (
        smoothed(numpy.array([line["loss"] for line in lines])),
        numpy.cumsum(flops(config, lines)),
        wall(lines),
    )
    drawn = set(thinned(len(lines)).tolist())
    curve = []
    for place, line in enumerate(lines):
        if place in drawn or "val_loss" in line:
            values = (line["step"], line["tokens"], cost[place], seconds[place], loss[place], line["experts_per_token"])
            point = dict(zip(CURVE, map(float, values), strict=True))
            curve.append(point | ({"val_loss": line["val_loss"]} if "val_loss" in line else {}))
    return curve


def smoothed(values: numpy.ndarray, share: float = SMOOTH) -> numpy.ndarray:
    """Mean over a window of `share` of the run each way, cut at the ends."""
    reach = max(1, round(share * len(values)))
    sums = numpy.concatenate(([0.0], numpy.cumsum(values)))
    first = numpy.maximum(numpy.arange(len(values)) - reach, 0)
    last = numpy.minimum(numpy.arange(len(values)) + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def thinned(length: int) -> numpy.ndarray:
    """int [at most POINTS]: places along a curve that are drawn and stored, both ends among them."""
    return numpy.unique(numpy.linspace(0, length - 1, POINTS).round().astype(int))


def flops(config: RunConfig, lines: list[dict]) -> numpy.ndarray:
    """Training FLOPs of each step, with the experts it really had."""
    experts = numpy.array([line["experts_per_token"] for line in lines])
    tokens = config.training.global_batch_size * config.model.sequence_length
    return tokens * flops_per_token(config, experts)


def wall(lines: list[dict]) -> numpy.ndarray:
    """Seconds of training after each step, without the time a run was stopped in the middle of one."""
    seconds = numpy.array([line["seconds"] for line in lines])
    near = numpy.array([median(seconds[max(0, i - 10) : i + 11]) for i in range(len(seconds))])
    return numpy.cumsum(numpy.where(seconds > PAUSE * near, near, seconds))


def spikes(loss: list[float]) -> int:
    """Steps whose loss stands out above the steps before: the median and median absolute deviation of a window."""
    values, count = numpy.array(loss), 0
    for step in range(SPIKE_WINDOW, len(values)):
        before = values[step - SPIKE_WINDOW : step]
        middle = numpy.median(before)
        count += values[step] > middle + SPIKE_SIZE * max(1e-9, numpy.median(abs(before - middle)))
    return int(count)


def centre_and_band(values: list[float]) -> tuple[float, float | None]:
    """Mean over seeds and half of its 95 % interval (Student's t); None for a single seed."""
    if len(values) == 1:
        return values[0], None
    quantile = T_95[len(values) - 1] if len(values) <= len(T_95) else 1.96
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))
