"""Run a scaling study: every cell of its grid, by `dsmoe.lab.study.runner`.

The folder holds the study beside its runs (`study.yaml`), so that a report needs nothing else.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import yaml
from rich.console import Console

from dsmoe.checkpoint.files import write_atomically
from dsmoe.lab.study.grid import Cell, Study, cell_config, cell_overrides, load_study
from dsmoe.lab.study.results import read_result
from dsmoe.lab.study.runner import ROOT, Launch, Runner, train_script
from dsmoe.parallel.place import free_port
from dsmoe.runtime.device import gpu_count, gpu_model, on_gpu

COPY = "study.yaml"
PROBE = "probe.json"


def run_study(study: Study, out: Path, parallel: int, retry: bool = False, console: Console | None = None) -> int:
    """Run what is not finished yet.

    Args:
        parallel: cells at a time; each gets its share of the cores.
        retry: also run again what failed.

    Returns:
        How many cells have failed, earlier calls included.

    Raises:
        ConfigError: `out` holds a cell that was run with another configuration.
        TrainingError: another study is at work in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    runner = ScalingStudy(study, out, parallel, retry, console)
    write_atomically(out / COPY, yaml.safe_dump(study.model_dump(), sort_keys=False, allow_unicode=True).encode())
    return runner.run()


def read_study(out: Path) -> Study:
    """The study that was run in a folder. Raises `ConfigError`."""
    return load_study(out / COPY, to_run=False)


class ScalingStudy(Runner):
    """Cells of a grid; each is launched with the study's ranks, then read by the probe if the study asks for it."""

    word = "study"

    def __init__(self, study: Study, out: Path, parallel: int, retry: bool = False, console: Console | None = None):
        self.study = study
        self.notes = {"machine": machine(), "commit": commit()}
        super().__init__(study.cells(), out, parallel, retry, console)

    def launch(self, cell: Cell) -> Launch:
        return self.planned(cell, None)

    def planned(self, cell: Cell, record: dict | None) -> Launch:
        arguments = [train_script(), "--config", self.study.config, *cell_overrides(self.study, cell, self.out)]
        after = self.after(cell)
        return Launch(
            [*_launcher(self.study.ranks), *arguments],
            cell_config(self.study, cell, self.out),
            self.study.ranks,
            *(after or (None, "")),
            notes=self.notes,
        )

    def after(self, cell: Cell) -> tuple[list[str], str] | None:
        return (["-m", "dsmoe.lab.study.probe", str(cell.folder(self.out))], PROBE) if self.study.probe else None

    def said(self, cell: Cell) -> str:
        result = read_result(cell.folder(self.out))
        return f"held-out loss {result.val_loss:.4f}, {result.mean_experts:.2f} experts/token"


def _launcher(ranks: int) -> list[str]:
    """The deepspeed command, as Python runs it; one process needs no launcher."""
    if ranks == 1:
        return []
    return ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", free_port()]


def machine() -> str:
    """What this machine is, in words."""
    if on_gpu():
        return f"{gpu_count()} x {gpu_model()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names) or 1} cores of {names[0] if names else platform.processor()}"


def commit() -> str:
    """Of the code that runs; empty outside a repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()
