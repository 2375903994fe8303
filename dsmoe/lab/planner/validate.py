"""Hold predictions to real runs that no coefficient was fitted to: memory, seconds of a step, bytes between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from dsmoe.lab.planner.calibrate import VOCABULARY, layout_of, with_precision
from dsmoe.lab.planner.hardware import Hardware
from dsmoe.lab.planner.measure import Case, MeasuredRun, measure_all, run_from
from dsmoe.lab.planner.predict import Prediction, predict
from dsmoe.routers.relu import ReLURouter
from dsmoe.routers.top_p import TopPRouter
from dsmoe.routers.topk import TopKRouter

MEMORY_BAR, SECONDS_BAR, BYTES_BAR = 0.10, 0.20, 0.05  # relative errors


@dataclass(frozen=True)
class Checked:
    """A run and what was predicted for it."""

    run: MeasuredRun
    prediction: Prediction

    @property
    def seconds_error(self) -> float:
        """Relative, as the others: above 0 where too much was predicted."""
        return self.prediction.step_seconds / self.run.seconds - 1

    @property
    def memory_error(self) -> float:
        return self.prediction.memory.total / self.run.peak_memory - 1

    @property
    def bytes_error(self) -> float | None:
        if not self.run.all_to_all:
            return None
        return self.prediction.flows["exchange"].bytes * self.run.case.ranks / self.run.all_to_all - 1

    def as_json(self) -> dict:
        return {
            **asdict(self.run),
            "predicted": {
                "seconds": self.prediction.step_seconds,
                "seconds_by_part": self.prediction.seconds,
                "peak_memory": self.prediction.memory.total,
                "all_to_all": self.prediction.flows["exchange"].bytes * self.run.case.ranks,
            },
            "errors": {"seconds": self.seconds_error, "memory": self.memory_error, "all_to_all": self.bytes_error},
        }


def cases(ranks: int, scale: int = 1) -> list[Case]:
    """Other shapes, routers, ZeRO stages and layouts than those of the calibration."""
    hidden, ffn = "model.hidden_size", "model.moe_ffn_hidden_size"
    count, batch, length = "model.num_experts", "training.global_batch_size", "model.sequence_length"
    zero, recompute = "parallel.zero_stage", "model.recompute"
    base: dict[str, Any] = {
        "model.num_layers": 3, "model.num_attention_heads": 4, hidden: 192 * scale, length: 192, count: 16,
        ffn: 192 * scale, "router.name": TopKRouter.name, "router.k": 2, batch: 6 * ranks,
    }  # fmt: skip
    spread = {"parallel.expert_parallel": ranks}
    relu = {"router.name": ReLURouter.name, "router.k": 2, "router.lambda_initial": 1e-4}
    varied: dict[str, dict[str, Any]] = {
        "replicated": {},
        "replicated, ZeRO 2": {zero: 2, count: 24},
        "replicated, ZeRO 3": {zero: 3, count: 12},
        "replicated, 4 experts a token": {"router.k": 4, count: 64, ffn: 96 * scale},
        "replicated, relu": {**relu, "model.num_layers": 2},
        "spread": spread,
        "spread, 32 experts, wide": {**spread, count: 32, ffn: 384 * scale, batch: 4 * ranks},
        "spread, 192 experts": {**spread, count: 192, ffn: 96 * scale, "model.num_layers": 2},
        "spread, ZeRO 2, accumulated": {**spread, zero: 2, "training.gradient_accumulation": 3},
        "spread, ZeRO 3": {**spread, zero: 3, count: 24},
        "spread, experts recomputed": {**spread, recompute: "moe", batch: 12 * ranks},
        "spread, all recomputed": {**spread, recompute: "full", length: 384},
        "spread, top-p": {**spread, "router.name": TopPRouter.name, "router.k": ..., "router.p": 0.4},
        "spread, relu": {**spread, **relu, count: 32},
        "spread, shared expert": {**spread, "model.moe_shared_expert_intermediate_size": 192 * scale},
        "spread, every second layer": {**spread, "model.moe_layer_freq": 2, "model.num_layers": 4},
    }
    settings = [
        {name: value for name, value in {**base, **keys}.items() if value is not ...} for keys in varied.values()
    ]
    cases_ = [Case(name, ranks, keys) for name, keys in zip(varied, settings, strict=True)]
    return cases_ if ranks > 1 else [case for case in cases_ if "spread" not in case.name]


def again(hardware: Hardware, measured: list[dict]) -> list[Checked]:
    """Predict anew what `validate` measured before."""
    return [Checked(run, predict(layout_of(run, hardware))) for run in map(run_from, measured)]


def validate(
    hardware: Hardware, ranks: int, scale: int = 1, rounds: int = 1, say: Callable[[str], None] = lambda text: None
) -> list[Checked]:
    """Run every case and predict it. Raises `TrainingError` where a run fails."""
    (precision,) = hardware.peak_tflops
    runs = [with_precision(case, precision) for case in cases(ranks, scale)]
    return [Checked(run, predict(layout_of(run, hardware))) for run in measure_all(runs, VOCABULARY, rounds, say)]


def table(checks: list[Checked]) -> Table:
    """One row a run: measured, predicted, error; those beyond a bar in red."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("run")
    for column in ("step ms", "memory MiB", "all-to-all MB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for check in checks:
        run, prediction = check.run, check.prediction
        sent = prediction.flows["exchange"].bytes * run.case.ranks
        shown.add_row(
            run.case.name,
            _beside(run.seconds * 1e3, prediction.step_seconds * 1e3, ".0f", check.seconds_error, SECONDS_BAR),
            _beside(run.peak_memory / 2**20, prediction.memory.total / 2**20, ".0f", check.memory_error, MEMORY_BAR),
            ""
            if check.bytes_error is None
            else _beside(run.all_to_all / 1e6, sent / 1e6, ".1f", check.bytes_error, BYTES_BAR),
        )
    return shown


def summary(checks: list[Checked]) -> str:
    """How many runs are within each bar, and the worst of each."""
    lines = []
    for what, bar, errors in (
        ("step time", SECONDS_BAR, [check.seconds_error for check in checks]),
        ("memory", MEMORY_BAR, [check.memory_error for check in checks]),
        ("all-to-all bytes", BYTES_BAR, [check.bytes_error for check in checks if check.bytes_error is not None]),
    ):
        if errors:
            within = sum(abs(error) <= bar for error in errors)
            worst = max(errors, key=abs)
            lines.append(f"{what}: {within} of {len(errors)} within {bar:.0%}, the worst {worst:+.1%}")
    return "\n".join(lines)


def _beside(measured: float, predicted: float, form: str, error: float, bar: float) -> str:
    shown = f"{error:+.1%}" if abs(error) <= bar else f"[red]{error:+.1%}[/]"
    return f"{measured:{form}} → {predicted:{form}} {shown}"
