"""What each cell is worth in compute: the ratio between what a reference would need for its loss and what it took.

    effective speedup   compute that the reference's law needs for the cell's loss, over the compute it really took
    in wall time        that, times the cell's FLOP/s over the dense arm's; only from cells that were timed on a quiet
                        machine
    efficiency leverage the effective speedup against the dense law (Ling, arXiv 2507.17702)

A reference's law is a power law through its lengths (`fit_power`): the baseline's at the same place, that is, the same
values of the baseline's axes, and the dense arm's on the same data.
Cells are ranked by their speedup at the compute that they realised, not by their loss: a router that let its tokens
take more experts has paid for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import numpy

from dsmoe.lab.study.grid import Cell
from dsmoe.lab.study.law import Power, fit_power
from dsmoe.lab.study.measures import Measured, StudyResults

DENSE = "dense"  # an arm of this name, or whose models have one expert, is the dense reference
BEYOND = 0.02  # of the baseline's compute: more is no equal compute


@dataclass(frozen=True)
class Worth:
    """One cell beside the references."""

    run: Measured
    compute_ratio: float | None  # to the baseline's at the same place, length and seed
    over_baseline: float | None  # effective speedup
    over_dense: float | None
    extrapolated: bool  # the dense law was asked beyond its lengths
    throughput_ratio: float | None  # FLOP/s over the dense arm's

    @property
    def beyond_equal_compute(self) -> bool:
        return self.compute_ratio is not None and self.compute_ratio > 1 + BEYOND

    @property
    def over_dense_in_time(self) -> float | None:
        """Speedup in wall time."""
        if self.over_dense is None or self.throughput_ratio is None:
            return None
        return self.over_dense * self.throughput_ratio


def dense_arm(results: StudyResults) -> str | None:
    """The arm without a choice of experts, or None."""
    for arm in results.arms():
        shapes = {run.shape.get("num_experts") for run in results.measured if run.cell.arm == arm}
        if arm == DENSE or shapes == {1}:
            return arm
    return None


def worth(results: StudyResults) -> list[Worth]:
    """Every cell with a loss and a compute, in the study's order."""
    cells = [run for run in results.measured if {"val_loss", "training_flops"} <= run.values.keys()]
    reference, dense = results.study.reference, dense_arm(results)
    place = results.study.place_of
    series = results.study.series_of
    laws = {point: law_of(runs) for point, runs in _grouped(cells, reference, series).items()}
    dense_laws = {data: law_of(runs) for data, runs in _grouped(cells, dense, _data).items()}
    baseline = {(run.cell.point, run.cell.length, run.cell.seed): run.values["training_flops"]
                for run in cells if run.cell.arm == reference}  # fmt: skip
    speeds = [speed for run in cells if run.cell.arm == dense and (speed := _flop_per_second(run))]
    results_of_runs = []
    for run in cells:
        compute = run.values["training_flops"]
        at_equal = baseline.get((place(run.cell), run.cell.length, run.cell.seed))
        law, dense_law = laws.get(series(run.cell)), dense_laws.get(_data(run.cell))
        dense_compute = dense_law.compute_at(run.values["val_loss"]) if dense_law else None
        own_speed = _flop_per_second(run)
        results_of_runs.append(
            Worth(
                run,
                compute / at_equal if at_equal and run.cell.arm != reference else None,
                law.compute_at(run.values["val_loss"]) / compute if law and run.cell.arm != reference else None,
                dense_compute / compute if dense_law and run.cell.arm != dense else None,
                dense_law is not None and not dense_law.holds(dense_compute),
                own_speed / mean(speeds) if own_speed and speeds else None,
            )
        )
    return results_of_runs


def compute_ratios(results: StudyResults) -> dict[tuple[str, tuple, float], str]:
    """Arm, point and length -> realised compute over the reference's at that place, mean over seeds, for a label."""
    every: dict[tuple[str, tuple, float], list[float]] = {}
    for run in worth(results):
        if run.compute_ratio is not None:
            every.setdefault((run.run.cell.arm, run.run.cell.point, run.run.cell.length), []).append(run.compute_ratio)
    return {place: f" {mean(ratios):.2f}×" for place, ratios in every.items()}


def compute_note(results: StudyResults) -> str:
    """What the labels of `compute_ratios` are, for a caption."""
    if not compute_ratios(results):
        return ""
    return f" ×: training compute that was realised, over that of {results.study.reference} at the same place."


def law_of(runs: list[Measured]) -> Power | None:
    """Of an arm at one place, through its lengths and seeds."""
    compute = numpy.array([run.values["training_flops"] for run in runs], float)
    return fit_power(compute, numpy.array([run.values["val_loss"] for run in runs], float))


def _grouped(cells: list[Measured], arm: str | None, key: Callable[[Cell], tuple]) -> dict[tuple, list[Measured]]:
    groups = defaultdict(list)
    for run in cells:
        if run.cell.arm == arm:
            groups[key(run.cell)].append(run)
    return groups


def _data(cell: Cell) -> tuple:
    """What it was trained on, as far as that is an axis: losses on other data cannot be compared."""
    return tuple((axis, value) for axis, value in cell.point if axis.startswith("data."))


def _flop_per_second(run: Measured) -> float | None:
    values = run.values
    if not {"tokens_per_second", "tokens"} <= values.keys():
        return None
    return values["tokens_per_second"] * values["training_flops"] / values["tokens"]
