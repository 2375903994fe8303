"""What a comparison runs: variants x corpora x seeds. A cell is one of them, and one training run.

    corpora: {stdlib: data/stdlib}          name: dataset folder
    seeds: [1, 2, 3]
    baseline: topk                          the variant that others are measured against
    overrides: [training.steps=600]         of every run
    variants:
      - {name: topk, config: configs/recipes/topk.yaml}
      - {name: relu, config: configs/recipes/relu.yaml, overrides: [training.lr=2e-3]}
      - {name: topk longer, config: configs/recipes/topk.yaml, match_compute_of: relu}

`match_compute_of` gives a variant as many steps as the MoE layers of the other one's run cost, dense start included.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from dsmoe.config import RunConfig, Section, load_config
from dsmoe.errors import ConfigError
from dsmoe.routers.registry import option_classes

ALWAYS = ("logging.tensorboard=false",)  # a comparison reads metrics.jsonl


class Variant(Section):
    """One way to train."""

    name: str = Field(min_length=1, pattern=r"^[\w .,()+-]+$")
    config: str  # YAML file of a run
    overrides: list[str] = []
    seeds: list[int] | None = None  # None: the plan's
    match_compute_of: str | None = None  # name of an earlier variant


class Plan(Section):
    """A whole comparison."""

    corpora: dict[str, str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    baseline: str
    overrides: list[str] = []
    variants: list[Variant] = Field(min_length=1)

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def problems(self) -> list[str]:
        """What does not fit together."""
        names, found = [variant.name for variant in self.variants], []
        if len(set(names)) < len(names) or len({slug(name) for name in names}) < len(names):
            found.append(f"variants: found the names {names}, expected each to be different")
        if self.baseline not in names:
            found.append(f"baseline: found {self.baseline!r}, expected one of {names}")
        for place, variant in enumerate(self.variants):
            other = variant.match_compute_of
            if other is None:
                continue
            if other not in names[:place]:
                found.append(f"variants.{variant.name}: match_compute_of names {other!r}, expected an earlier variant")
            elif not set(self.seeds_of(variant)) <= set(self.seeds_of(self.variant(other))):
                found.append(f"variants.{variant.name}: found seeds that {other!r}, whose compute it matches, has not")
        return found

    def seeds_of(self, variant: Variant) -> list[int]:
        return self.seeds if variant.seeds is None else variant.seeds

    def cells(self) -> list[Cell]:
        """All runs, one seed after the other: what a comparison has when it is cut short covers every variant."""
        seeds = sorted({seed for variant in self.variants for seed in self.seeds_of(variant)})
        return [
            Cell(variant.name, corpus, seed)
            for seed in seeds
            for corpus in self.corpora
            for variant in self.variants
            if seed in self.seeds_of(variant)
        ]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    variant: str
    corpus: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / slug(self.corpus) / slug(self.variant) / f"seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant} on {self.corpus}, seed {self.seed}"


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan, the configuration of each of its runs included.

    Raises:
        ConfigError: with every mistake of the plan, or those of the first run configuration that has some.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        plan = Plan.model_validate(tree)
    except OSError as error:
        raise ConfigError([f"cannot read the file: {error.strerror or error}"], str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {error}"], str(path)) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
        raise ConfigError(problems, str(path)) from error
    if problems := plan.problems():
        raise ConfigError(problems, str(path))
    for cell in plan.cells():
        cell_config(plan, cell, Path("runs"))
    return plan


def cell_overrides(plan: Plan, cell: Cell, out: Path, steps: int | None = None) -> list[str]:
    """What a cell's run adds to its variant's file. `steps`: of a variant that matches another's compute."""
    variant = plan.variant(cell.variant)
    return [
        *ALWAYS,
        *plan.overrides,
        *variant.overrides,
        f"data.path={plan.corpora[cell.corpus]}",
        f"training.seed={cell.seed}",
        f"logging.run_dir={cell.folder(out)}",
        *([] if steps is None else [f"training.steps={steps}"]),
    ]


def cell_config(plan: Plan, cell: Cell, out: Path, steps: int | None = None) -> RunConfig:
    """A cell's configuration. Raises `ConfigError`."""
    overrides = cell_overrides(plan, cell, out, steps)
    return load_config(plan.variant(cell.variant).config, overrides, option_classes())


def slug(name: str) -> str:
    """A name as a folder is called."""
    return "-".join("".join(c if c.isalnum() or c in "._-" else " " for c in name).split())
