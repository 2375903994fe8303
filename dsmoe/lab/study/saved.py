"""The numbers of a study as files, which a report can be made from when its runs are gone.

study.yaml    what was run
cells.csv     a line for each finished cell: arm, seed, length, axes, shape, and every quantity of `MEASURES`
curves.csv    loss, evaluations and cost over training, at most `POINTS` steps of each cell and its evaluations
about.json    machine, commits, what each `data.path` was, and the cells without a result with the reason
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dsmoe.data.dataset import open_corpus
from dsmoe.data.identity import data_identity, name_of
from dsmoe.errors import ConfigError
from dsmoe.lab.study.check import load_study
from dsmoe.lab.study.grid import Cell, Study
from dsmoe.lab.study.measures import CURVE, MEASURES, Measured, StudyResults, x_of
from dsmoe.lab.study.results import same_data
from dsmoe.lab.study.runner import same_run
from dsmoe.lab.study.settings import cell_config
from dsmoe.runtime.files import write_atomically

STUDY, CELLS, CURVES, ABOUT = "study.yaml", "cells.csv", "curves.csv", "about.json"


def save_results(results: StudyResults, folder: Path) -> list[Path]:
    """Write the four files into a folder; return them."""
    folder.mkdir(parents=True, exist_ok=True)
    study = yaml.safe_dump(results.study.model_dump(exclude_defaults=True), sort_keys=False, allow_unicode=True)
    missing = [[cell.arm, [list(axis) for axis in cell.point], cell.seed, cell.length, why]
               for cell, why in results.missing]  # fmt: skip
    about = {"machine": results.machine, "commits": results.commits, "data": results.data, "missing": missing}
    write_atomically(folder / STUDY, study.encode())
    write_atomically(folder / ABOUT, (json.dumps(about) + "\n").encode())
    axes = list(dict.fromkeys(axis for run in results.measured for axis, _ in run.cell.point))
    names = [name for name in MEASURES if any(name in run.values for run in results.measured)]
    identity = ["arm", "seed", "length", *axes]

    def of(cell: Cell) -> list:
        return [cell.arm, cell.seed, cell.length, *(dict(cell.point).get(axis, "") for axis in axes)]

    shapes = ["num_experts", "expert_width"]
    write_csv(
        folder / CELLS,
        [*identity, *shapes, *names],
        [[*of(run.cell), *(run.shape.get(name, "") for name in shapes), *(run.values.get(name, "") for name in names)]
         for run in results.measured],
    )  # fmt: skip
    columns = [*CURVE, "val_loss"]
    rows = [
        [*of(run.cell), *(point.get(name, "") for name in columns)] for run in results.measured for point in run.curve
    ]
    write_csv(folder / CURVES, [*identity, *columns], rows)
    return [folder / name for name in (STUDY, CELLS, CURVES, ABOUT)]


def read_saved(folder: Path) -> StudyResults:
    """Raises `ConfigError` where the folder does not hold a study's files, or a file is damaged."""
    for name in (STUDY, CELLS):
        if not (folder / name).exists():
            raise ConfigError([f"{folder}: found no {name}, expected a folder that a report wrote"], "report")
    study = load_study(folder / STUDY, to_run=False)
    about = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).exists() else {}
    curves: dict[Cell, list[dict[str, float]]] = {}
    if (folder / CURVES).exists():
        for row in read_csv(folder / CURVES):
            names = (*CURVE, "val_loss")
            curves.setdefault(_cell(study, row, folder), []).append(
                {name: float(row[name]) for name in names if row.get(name)}
            )
    measured = []
    for row in read_csv(folder / CELLS):
        cell = _cell(study, row, folder)
        values = {name: float(row[name]) for name in MEASURES if row.get(name)}
        shape = {name: int(row[name]) for name in ("num_experts", "expert_width") if row.get(name)}
        x = x_of(study, cell, values.get("experts"))
        measured.append(Measured(cell, values, x, shape, curves.get(cell, [])))
    missing = [(Cell(arm, tuple((axis, value) for axis, value in point), seed, length), why)
               for arm, point, seed, length, why in about.get("missing", [])]  # fmt: skip
    machine, commits, data = about.get("machine", ""), about.get("commits", []), about.get("data", {})
    return StudyResults(study, folder, measured, missing, machine, commits, data)


def _cell(study: Study, row: dict[str, str], folder: Path) -> Cell:
    names = {arm.name for arm in study.arms}
    if row["arm"] not in names:
        known = ", ".join(sorted(names))
        raise ConfigError([f"arm: found {row['arm']!r}, expected one of {known}"], str(folder / CELLS))
    point = tuple((axis, yaml.safe_load(row[axis])) for axis in study.axes_of(study.arm(row["arm"])) if row.get(axis))
    return Cell(row["arm"], point, int(row["seed"]), float(row.get("length") or 1.0))


def merged(first: StudyResults, second: StudyResults) -> StudyResults:
    """The cells of both, the second's where both have one: a study that was run in two places. Raises `ConfigError`
    where they were not trained on the same data, or those that only the first has not with the same settings."""
    replaced = {run.cell for run in second.measured}
    arms = {run.cell.arm for run in first.measured if run.cell not in replaced}
    if problems := _other_settings(first.study, second.study, arms):
        raise ConfigError(problems, str(first.out))
    cells = {run.cell: run for run in (*first.measured, *second.measured)}
    missing = [(cell, why) for cell, why in second.missing if cell not in cells]
    commits = list(dict.fromkeys([*first.commits, *second.commits]))
    machine = first.machine or second.machine
    data = same_data(first.data, second.data, str(second.out))
    return replace(second, measured=list(cells.values()), missing=missing, commits=commits, machine=machine, data=data)


def _other_settings(before: Study, now: Study, arms: set[str]) -> list[str]:
    """What of the settings of these arms' runs differs between two versions of a study."""

    def settings(study: Study, name: str) -> dict[str, Any]:
        arm = next((arm for arm in study.arms if arm.name == name), None)
        if arm is None:
            return {}
        keys = {key: value for key, value in {**study.set, **arm.set}.items() if not key.startswith("logging.")}
        compute = None if study.compute is None else study.compute.model_dump()
        return {**keys, "config": arm.config or study.config, "compute": compute, "width": arm.derive_width}

    problems = []
    for name in sorted(arms):
        old, new = settings(before, name), settings(now, name)
        problems += [
            f"{name}: {key} was {old.get(key, 'not set')} in the cells that the report has, and is "
            f"{new.get(key, 'not set')} now; write another report, or delete that folder"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    return problems


def reported_cells(folder: Path, study: Study) -> set[Cell]:
    """The cells of `study` that need not be run again, as a report in `folder` has them: not those that a cell which it
    lacks branches off or takes its compute from.

    Raises:
        ConfigError: the report is of another study, or of other data than this machine has.
    """
    results = read_saved(folder)
    cells = {cell: cell_config(study, cell, folder) for cell in study.cells() if cell.gate is None}
    reported = {run.cell for run in results.measured} & cells.keys()
    problems = [
        f"{cell}: found the result of another configuration"
        for cell in sorted(reported, key=str)
        if not same_run(cell_config(results.study, cell, folder).model_dump(mode="json"), cells[cell])
    ]
    if problems:
        raise ConfigError(problems, str(folder))
    local_data = {}
    for config in {str(config.data.path): config for config in cells.values()}.values():
        if str(config.data.path) in results.data:
            local_data[str(config.data.path)] = name_of(data_identity(open_corpus(config.data))["train"])
    same_data(results.data, local_data, str(folder))
    needed = {study.needed_by(cell) for cell in cells if cell not in reported}
    return reported - needed - {study.needed_by(cell) for cell in needed if cell is not None}


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, headings: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([_short(value) for value in row] for row in rows)
    write_atomically(path, text.getvalue().encode())


def _short(value: Any) -> Any:
    """Six digits of a number, and all of a whole one."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
