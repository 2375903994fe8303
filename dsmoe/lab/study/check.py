"""What is wrong with a study: in itself, in the runs that it expands to, and with this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from dsmoe.config import RunConfig, read_yaml, validated
from dsmoe.errors import ConfigError
from dsmoe.lab.study.grid import LIMITS, MEASURED, Cell, Study, slug
from dsmoe.lab.study.plan import is_plan, study_of_plan
from dsmoe.lab.study.results import sized
from dsmoe.lab.study.settings import cell_config
from dsmoe.optim.registry import optimizer_class


def load_study(path: str | Path, to_run: bool = True) -> Study:
    """Read and check a study, or a plan of the earlier compare_routers (`dsmoe.lab.study.plan`).

    Args:
        to_run: also check the configuration of each of its runs, and whether they can run on this machine.

    Raises:
        ConfigError: with every mistake of the study, or every mistake of all its runs.
    """
    tree = read_yaml(path)
    study = validated(study_of_plan(tree, str(path)) if is_plan(tree) else tree, Study, str(path))
    if to_run and (problems := study_problems(study) or cell_problems(study)):
        raise ConfigError(problems, str(path))
    return study


def study_problems(study: Study) -> list[str]:
    """What does not fit together in the study itself."""
    problems, names = [], [arm.name for arm in study.arms]
    if len({slug(name) for name in names}) < len(names):
        problems.append(f"arms: found the names {names}, expected each to be different")
    if len(set(study.seeds)) < len(study.seeds):
        problems.append(f"seeds: found {study.seeds}, expected each to be different")
    if study.baseline not in (None, *names):
        problems.append(f"baseline: found {study.baseline!r}, expected an arm: {', '.join(names)}")
    if wrong := [length for length in study.lengths if not 0 < length < 1]:
        problems.append(f"lengths: found {wrong}, expected shares of the steps between 0 and 1")
    for place, arm in enumerate(study.arms):
        axes = study.axes_of(arm)
        problems += [f"arms.{arm.name}: axis {axis!r} has no values" for axis, values in axes.items() if not values]
        if study.x not in (None, MEASURED, *axes):
            problems.append(f"x: found {study.x!r}, expected {MEASURED} or an axis of arm {arm.name}: {sorted(axes)}")
        if (other := arm.match_compute_of) is None:
            continue
        if other not in names[:place]:
            problems.append(f"arms.{arm.name}: match_compute_of names {other!r}, expected an earlier arm")
        elif not set(arm.seeds or study.seeds) <= set(study.arm(other).seeds or study.seeds):
            problems.append(f"arms.{arm.name}: has seeds that {other!r}, whose compute it matches, does not have")
    if study.probe and find_spec("dsmoe.lab.study.probe") is None:
        problems.append("probe: found true, but this installation has no dsmoe.lab.study.probe; expected false")
    for limit in study.limits:
        if limit not in LIMITS:
            problems.append(f"limits: found {limit!r}, expected some of {', '.join(LIMITS)}")
    for published in study.published:
        for name in published.values:
            if name not in names:
                problems.append(f"published: found {name!r}, expected an arm: {', '.join(names)}")
    return problems


def cell_problems(study: Study) -> list[str]:
    """What is wrong with the runs: each reason once, with the first cell that has it."""
    problems: dict[str, str] = {}
    for cell in study.cells():
        if cell.seed != (study.arm(cell.arm).seeds or study.seeds)[0]:
            continue  # other seeds differ in nothing else
        try:
            config = cell_config(study, cell, Path("runs"))
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, str(cell))
            continue
        for problem in [*_launch_problems(study.ranks, config), *_branch_problems(study, cell, config)]:
            problems.setdefault(problem, str(cell))
    return [f"{cell}: {problem}" for problem, cell in problems.items()]


def _branch_problems(study: Study, cell: Cell, config: RunConfig) -> list[str]:
    """Whether the run that a shorter one branches off keeps the checkpoint for it."""
    if cell.length == 1 or config.training.decay_from is None:
        return []
    interval, step = config.checkpoint.keep_every, int(config.training.decay_from.rpartition("_")[2])
    if interval and step and step % interval == 0:
        return []
    expected = f"a divisor of {step}, where length {cell.length:g} begins to decay"
    return [f"checkpoint.keep_every: found {interval}, expected {expected}"]


def _launch_problems(ranks: int, config: RunConfig) -> list[str]:
    """What only shows when processes start, or when memory is gone."""
    problems, training, parallel = [], config.training, config.parallel
    if ranks % parallel.expert_parallel:
        problems.append(f"ranks: found {ranks}, expected a multiple of expert_parallel ({parallel.expert_parallel})")
    if training.global_batch_size % (ranks * training.gradient_accumulation):
        parts = ranks * training.gradient_accumulation
        problems.append(
            f"training.global_batch_size: found {training.global_batch_size}, expected a multiple of {parts}"
        )
    needed, available = memory_needed(config, ranks), memory_of_machine()
    if needed > available:
        problems.append(f"needs about {needed / 2**30:.0f} GiB of memory, this machine has {available / 2**30:.0f}")
    return problems


def memory_needed(config: RunConfig, ranks: int) -> float:
    """Bytes of all processes for weights, gradients and optimizer state in fp32, at the least, without activations."""
    copies, states = ranks // config.parallel.expert_parallel, len(optimizer_class(config.training).states)
    return sized(config).total * (8.0 * copies + 4.0 * states)  # the optimizer's state is split in every ZeRO stage


def memory_of_machine() -> float:
    """Bytes."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
