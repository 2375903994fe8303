"""What a study runs: arms x axes x seeds x lengths. A cell is one of them, and one training run.

    title: ReLU against top-k
    question: What the reader wants to know.
    config: configs/studies/base.yaml       of every run
    set: {training.steps: 300}              dotted configuration keys, for every run
    ranks: 1                                processes of a run; more than one are launched by deepspeed
    seeds: [1, 2, 3]
    compute: {experts: 2, width: 128}       a token's active compute, the same in every cell; null: as it comes
    x: model.num_experts                    what pictures have along their bottom: an axis, or experts_per_token
    axes:
      model.num_experts: [4, 8, 16]
    baseline: topk                          the arm that others are measured against
    arms:
      - {name: topk, set: {router.name: topk}}
      - {name: top_p, set: {router.name: top_p}, axes: {router.p: [0.3, 0.5]}, seeds: [1]}
      - {name: topk longer, set: {router.name: topk}, match_compute_of: relu}

`match_compute_of` gives an arm as many steps as the MoE layers of the other one's run cost, dense start included.

Three keys are no configuration keys and work in `set` and `axes` alike. `granularity: G` cuts every expert into G, of
which a token takes G times as many (arXiv 2402.07871). `active_experts: k` replaces `compute.experts`. `size: H` scales
the model (`Preset`).

With `compute`, three values of each cell are derived and need not be given: the options of the router that set its mean
number of experts per token (`RouterOptions.aim_at`), `model.num_experts` times G, and the width of an expert
(`dsmoe.lab.study.settings`).

With `training.schedule: wsd`, `lengths: [0.25, 0.5]` adds a cell for each of these shares of the steps. It continues
the checkpoint of the full run from which its own decay starts, so that it costs its decay alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dsmoe.config import RouterConfig, Section
from dsmoe.lab.study.results import BRANCH

ACTIVE, GRANULARITY, SIZE, BUDGET = "active_experts", "granularity", "size", "budget"
MEASURED = "experts_per_token"
# Of mixture-of-experts models at scale; `dsmoe.lab.study.limits` has what shows each.
LIMITS = ("routing", "memory", "communication", "starved", "redundant", "imbalance", "latency", "energy")
NAME = r"^[\w .,()+=-]+$"


class Compute(Section):
    """A token's active compute in an MoE layer: a gate and this many experts of this width."""

    experts: int = Field(ge=1)
    width: int = Field(ge=1)


class Arm(Section):
    """One way to train."""

    name: str = Field(min_length=1, pattern=NAME)
    config: str | None = None  # YAML file of its runs; None: the study's
    set: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}  # instead of the study's, where it has the same ones, and more
    seeds: list[int] | None = None  # None: the study's
    derive_width: bool = True  # False: the study's width, whatever the router costs
    match_compute_of: str | None = None  # an arm whose MoE compute decides the number of steps


class Gate(Section):
    """Small runs that decide which arms are worth long ones: an arm goes on if its loss is at most the baseline's in
    every one of them."""

    sizes: list[dict[str, Any]] = Field(min_length=1)  # what each small run sets, smallest first
    at: dict[str, Any] = {}  # the values of the axes; an axis that is missing has its first value
    margin: float = 0.0  # nats that an arm may be above the baseline


class Preset(Section):
    """Sizes of a model and the steps that each is trained for.

    `size` is the hidden size; layers, heads and expert widths follow in proportion, the learning rate as its power
    `lr_power` (1/width for Adam: arXiv 2203.03466) and the initialisation as 1/sqrt.
    isoflop   every size at every budget of FLOPs (Chinchilla's second approach, arXiv 2203.15556)
    ladder    every size at the same number of tokens for each active parameter
    """

    kind: Literal["isoflop", "ladder"]
    sizes: list[int] = Field(min_length=2)
    budgets: list[float] = []  # isoflop: training FLOPs
    tokens_per_parameter: float = Field(20.0, gt=0)  # ladder
    lr_power: float = -1.0

    @model_validator(mode="after")
    def _budgets_belong_to_isoflop(self) -> Preset:
        if (self.kind == "isoflop") != bool(self.budgets):
            raise ValueError("budgets for isoflop, and none for ladder")
        return self

    def axes(self) -> dict[str, list[Any]]:
        return {SIZE: self.sizes, **({BUDGET: self.budgets} if self.budgets else {})}


class Published(Section):
    """What a paper reports for the same question."""

    source: str
    quantity: str
    values: dict[str, dict[int | float, float]]  # arm -> place on the x axis -> value


class Study(Section):
    """A whole study."""

    title: str
    question: str
    config: str  # YAML file of a run
    set: dict[str, Any] = {}
    ranks: int = Field(1, ge=1)
    seeds: list[int] = Field(min_length=1)
    compute: Compute | None = None
    x: str | None = None  # None: there is no axis, arms are compared
    axes: dict[str, list[Any]] = {}
    arms: list[Arm] = Field(min_length=1)
    baseline: str | None = None  # an arm; None: topk, or the first
    lengths: list[float] = []  # shares of the steps, below 1, that wsd runs are also brought to an end at
    gate: Gate | None = None
    preset: Preset | None = None
    probe: bool = False  # read every trained model with dsmoe.lab.study.probe
    law: bool = False  # fit laws of the loss
    quality: bool = True  # False: too short to say anything of losses, which are left out
    timed: bool = False  # seconds are of a quiet machine and may be compared
    limits: list[str] = []  # of `LIMITS`, which this study speaks to
    watts_per_core: float = Field(4.0, gt=0)  # for modelled energy
    published: list[Published] = []

    def axes_of(self, arm: Arm) -> dict[str, list[Any]]:
        return {**(self.preset.axes() if self.preset else {}), **self.axes, **arm.axes}

    def cells(self) -> list[Cell]:
        """All runs: gates first, then one seed after the other and small ones first, so that what is cut short covers
        every arm; a length after the run that it branches off."""
        cells = []
        for arm in self.arms:
            axes = self.axes_of(arm)
            for values in itertools.product(*axes.values()):
                for seed in self.seeds if arm.seeds is None else arm.seeds:
                    cells.append(Cell(arm.name, tuple(zip(axes, values, strict=True)), seed))
        places = {arm.name: place for place, arm in enumerate(self.arms)}
        cells.sort(key=lambda cell: (cell.seed, [_order(value) for _, value in cell.point], places[cell.arm]))
        lengths = sorted(self.lengths)
        return [
            *self.gate_cells(),
            *(part for cell in cells for part in (cell, *(replace(cell, length=length) for length in lengths))),
        ]

    def gate_cells(self) -> list[Cell]:
        cells = []
        for number in range(len(self.gate.sizes) if self.gate else 0):
            for arm in self.arms:
                point = tuple((axis, self.gate.at.get(axis, values[0])) for axis, values in self.axes_of(arm).items())
                cells.append(Cell(arm.name, point, (arm.seeds or self.seeds)[0], gate=number))
        return cells

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def needed_by(self, cell: Cell) -> Cell | None:
        """The cell whose run this one branches off, or whose compute it takes."""
        if cell.length != 1:
            return cell.whole
        name = self.arm(cell.arm).match_compute_of
        return None if name is None or cell.gate is not None else Cell(name, cell.point, cell.seed)

    @property
    def reference(self) -> str:
        """The arm that others are measured against."""
        names = [arm.name for arm in self.arms]
        usual = RouterConfig().name
        return self.baseline or (usual if usual in names else names[0])

    def place_of(self, cell: Cell) -> tuple[tuple[str, Any], ...]:
        """A cell's values of the axes that the baseline has: arms are compared at one place."""
        axes = self.axes_of(self.arm(self.reference))
        return tuple((axis, value) for axis, value in cell.point if axis in axes)

    def series_of(self, cell: Cell) -> tuple[tuple[str, Any], ...]:
        """Its place, whatever the length of training: a law is fitted through these."""
        return tuple((axis, value) for axis, value in self.place_of(cell) if axis != BUDGET)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    point: tuple[tuple[str, Any], ...]  # axis and value
    seed: int
    length: float = 1.0  # share of the study's steps
    gate: int | None = None  # number of the small run that it is

    def folder(self, out: Path) -> Path:
        parts = [f"{axis.rpartition('.')[2]}-{value}" for axis, value in self.point]
        run = f"seed-{self.seed}" + (f"{BRANCH}{self.length:g}" if self.length != 1 else "")
        root = out if self.gate is None else out / f"gate-{self.gate + 1}"
        return root / slug(self.arm) / slug(" ".join(parts) or "run") / run

    @property
    def whole(self) -> Cell:
        """The run that it branches off, or itself."""
        return replace(self, length=1.0)

    def __str__(self) -> str:
        point = "".join(f", {axis.rpartition('.')[2]} {value}" for axis, value in self.point)
        length = f", length {self.length:g}" if self.length != 1 else ""
        return f"{self.arm}{point}, seed {self.seed}{length}" + ("" if self.gate is None else f", gate {self.gate + 1}")


def _order(value: Any) -> tuple:
    """Numbers by size, before everything else by its text."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def slug(name: str) -> str:
    """A name as a folder is called."""
    return "-".join("".join(c if c.isalnum() or c in "._-" else " " for c in name).split())
