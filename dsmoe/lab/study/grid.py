"""What a scaling study runs: arms x axes x seeds. A cell is one of them, and one training run.

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
    arms:
      - {name: topk, set: {router.name: topk}}
      - {name: top_p, set: {router.name: top_p}, axes: {router.p: [0.3, 0.5]}, seeds: [1]}

Two keys are no configuration keys and work in `set` and `axes` alike. `granularity: G` cuts every expert into G, of
which a token takes G times as many (arXiv 2402.07871). `active_experts: k` replaces `compute.experts`.

With `compute`, three values of each cell are derived and need not be given: the option of the router that says how many
experts a token takes (`k`, `target_density` or `expected_experts`), `model.num_experts` times G, and the width of an
expert. The width is such that router and experts of a layer multiply as often, for each token, as with a plain gate and
`compute.experts` experts of `compute.width`: a router that costs more gets narrower experts. Over E the gate's own cost
grows, and is not taken out of the experts: that is how the papers compare.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from dsmoe.config import RunConfig, Section, load_config
from dsmoe.errors import ConfigError
from dsmoe.lab.study.plan import slug
from dsmoe.lab.study.results import sized
from dsmoe.optim.registry import optimizer_class
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

ALWAYS = {"logging.tensorboard": False}  # a study reads metrics.jsonl
ACTIVE, GRANULARITY, MEASURED = "active_experts", "granularity", "experts_per_token"
TOLERANCE = 0.02  # of active compute: a width is a whole number
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
    set: dict[str, Any] = {}
    axes: dict[str, list[Any]] = {}  # instead of the study's, where it has the same ones, and more
    seeds: list[int] | None = None  # None: the study's
    derive_width: bool = True  # False: the study's width, whatever the router costs


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
    probe: bool = False  # read every trained model with dsmoe.lab.study.probe
    law: bool = False  # fit loss = a + b x^-c
    quality: bool = True  # False: too short to say anything of losses, which are left out
    timed: bool = False  # seconds are of a quiet machine and may be compared
    limits: list[str] = []  # of `LIMITS`, which this study speaks to
    watts_per_core: float = Field(4.0, gt=0)  # for modelled energy
    published: list[Published] = []

    def cells(self) -> list[Cell]:
        """All runs, one seed after the other and small ones first: what is cut short covers every arm."""
        found = []
        for arm in self.arms:
            axes = {**self.axes, **arm.axes}
            for values in itertools.product(*axes.values()):
                for seed in self.seeds if arm.seeds is None else arm.seeds:
                    found.append(Cell(arm.name, tuple(zip(axes, values, strict=True)), seed))
        places = {arm.name: place for place, arm in enumerate(self.arms)}
        return sorted(found, key=lambda cell: (cell.seed, [str(v).zfill(9) for _, v in cell.point], places[cell.arm]))

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    point: tuple[tuple[str, Any], ...]  # axis and value
    seed: int

    def folder(self, out: Path) -> Path:
        parts = [f"{axis.rpartition('.')[2]}-{value}" for axis, value in self.point]
        return out / slug(self.arm) / slug(" ".join(parts) or "run") / f"seed-{self.seed}"

    def __str__(self) -> str:
        point = "".join(f", {axis.rpartition('.')[2]} {value}" for axis, value in self.point)
        return f"{self.arm}{point}, seed {self.seed}"


def load_study(path: str | Path, to_run: bool = True) -> Study:
    """Read and check a study.

    Args:
        to_run: also check the configuration of each of its runs, and whether they can run on this machine.

    Raises:
        ConfigError: with every mistake of the study, or every mistake of all its runs.
    """
    try:
        study = Study.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError([f"cannot read the file: {error.strerror or error}"], str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
        raise ConfigError(problems, str(path)) from error
    if to_run and (problems := _problems(study) or _cell_problems(study)):
        raise ConfigError(problems, str(path))
    return study


def cell_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """All dotted keys that a cell sets beyond the study's file, the derived ones included. Raises `ConfigError`."""
    arm = study.arm(cell.arm)
    settings = {**ALWAYS, **study.set, **arm.set, **dict(cell.point), "training.seed": cell.seed}
    parts = settings.pop(GRANULARITY, 1)
    active = settings.pop(ACTIVE, None if study.compute is None else study.compute.experts)
    if study.compute is None:
        return settings
    experts, width = active * parts, study.compute.width / parts
    base = _load(study, settings)
    settings["model.num_experts"] = total = base.model.num_experts * parts
    option, value = _aim(base.router.name, experts, total)
    if option is not None:
        settings.setdefault(f"router.{option}", value)
    settings["model.moe_ffn_hidden_size"] = round(width)
    config = _load(study, settings)
    router, model = get(config.router.name), config.model
    options = router.Options.model_validate(config.router.options)
    aim = options.target_experts_per_token(model)
    if abs(aim - experts) > 1e-6:
        problem = f"router {config.router.name!r} aims at {aim:g} experts per token, expected {experts}"
        raise ConfigError([problem], str(cell))
    if not arm.derive_width:
        return settings
    hidden, rank = model.hidden_size, router.latent_rank(options)
    wanted = total * hidden + experts * 3 * hidden * width
    scores, each = router.parameter_count(model, options), experts * (2 * hidden + (rank or hidden))
    fitting = round((wanted - scores) / each)
    if fitting < 1 or abs(scores + fitting * each - wanted) > TOLERANCE * wanted:
        problem = (
            f"active compute of {wanted:,.0f} multiplications per token and layer cannot be met: the router takes "
            f"{scores:,.0f} of them, which leaves experts of width {(wanted - scores) / each:.1f}"
        )
        raise ConfigError([problem], str(cell))
    return {**settings, "model.moe_ffn_hidden_size": fitting}


def cell_overrides(study: Study, cell: Cell, out: Path) -> list[str]:
    """What a cell's run adds to the study's file, as on a command line."""
    settings = {**cell_settings(study, cell), "logging.run_dir": str(cell.folder(out))}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def cell_config(study: Study, cell: Cell, out: Path) -> RunConfig:
    """A cell's configuration. Raises `ConfigError`."""
    return load_config(study.config, cell_overrides(study, cell, out), option_classes())


def _load(study: Study, settings: dict[str, Any]) -> RunConfig:
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return load_config(study.config, overrides, option_classes())


def _aim(router: str, experts: int, total: int) -> tuple[str | None, Any]:
    """The option of a router that says how many experts a token takes, and its value."""
    fields = get(router).Options.model_fields
    if "k" in fields:
        return "k", experts
    if "target_density" in fields:
        return "target_density", experts / total
    if "expected_experts" in fields:
        return "expected_experts", experts
    return None, None


def _problems(study: Study) -> list[str]:
    """What does not fit together in the study itself."""
    found, names = [], [arm.name for arm in study.arms]
    if len({slug(name) for name in names}) < len(names):
        found.append(f"arms: found the names {names}, expected each to be different")
    if len(set(study.seeds)) < len(study.seeds):
        found.append(f"seeds: found {study.seeds}, expected each to be different")
    for arm in study.arms:
        axes = {**study.axes, **arm.axes}
        found += [f"arms.{arm.name}: axis {axis!r} has no values" for axis, values in axes.items() if not values]
        if study.x not in (None, MEASURED, *axes):
            found.append(f"x: found {study.x!r}, expected {MEASURED} or an axis of arm {arm.name}: {sorted(axes)}")
    if study.probe and find_spec("dsmoe.lab.study.probe") is None:
        found.append("probe: found true, but this installation has no dsmoe.lab.study.probe; expected false")
    for limit in study.limits:
        if limit not in LIMITS:
            found.append(f"limits: found {limit!r}, expected some of {', '.join(LIMITS)}")
    for published in study.published:
        for name in published.values:
            if name not in names:
                found.append(f"published: found {name!r}, expected an arm: {', '.join(names)}")
    return found


def _cell_problems(study: Study) -> list[str]:
    """What is wrong with the runs: each reason once, with the first cell that has it."""
    found: dict[str, str] = {}
    for cell in study.cells():
        if cell.seed != (study.arm(cell.arm).seeds or study.seeds)[0]:
            continue  # other seeds differ in nothing else
        try:
            config = cell_config(study, cell, Path("runs"))
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, str(cell))
            continue
        for problem in _launch_problems(study.ranks, config):
            found.setdefault(problem, str(cell))
    return [f"{cell}: {problem}" for problem, cell in found.items()]


def _launch_problems(ranks: int, config: RunConfig) -> list[str]:
    """What only shows when processes start, or when memory is gone."""
    found, training, parallel = [], config.training, config.parallel
    if ranks % parallel.expert_parallel:
        found.append(f"ranks: found {ranks}, expected a multiple of expert_parallel ({parallel.expert_parallel})")
    if training.global_batch_size % (ranks * training.gradient_accumulation):
        parts = ranks * training.gradient_accumulation
        found.append(f"training.global_batch_size: found {training.global_batch_size}, expected a multiple of {parts}")
    needed, there = memory_needed(config, ranks), memory_there()
    if needed > there:
        found.append(f"needs about {needed / 2**30:.0f} GiB of memory, this machine has {there / 2**30:.0f}")
    return found


def memory_needed(config: RunConfig, ranks: int) -> float:
    """Bytes of all processes for weights, gradients and optimizer state in fp32, at the least, without activations."""
    copies, states = ranks // config.parallel.expert_parallel, len(optimizer_class(config.training).states)
    return sized(config).total * (8.0 * copies + 4.0 * states)  # the optimizer's state is split in every ZeRO stage


def memory_there() -> float:
    """Bytes of this machine."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
