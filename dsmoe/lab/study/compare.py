"""Run a plan: every variant on every corpus with every seed, by `dsmoe.lab.study.runner`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dsmoe.lab.study.plan import Cell, Plan, cell_config, cell_overrides
from dsmoe.lab.study.results import matching_steps, read_result
from dsmoe.lab.study.runner import Launch, Runner, train_script


def run_plan(plan: Plan, out: Path, parallel: int, retry: bool = False, console: Console | None = None) -> int:
    """Run what is not finished yet.

    Args:
        parallel: runs at a time; each gets its share of the cores.
        retry: also run again what failed.

    Returns:
        How many cells have failed, earlier calls included.

    Raises:
        ConfigError: `out` holds a cell that was run with another configuration.
        TrainingError: another comparison is at work in `out`.
    """
    return Comparison(plan, out, parallel, retry, console).run()


class Comparison(Runner):
    """Cells of a plan; one that matches another's compute waits for its result."""

    word = "compare"

    def __init__(self, plan: Plan, out: Path, parallel: int, retry: bool = False, console: Console | None = None):
        self.plan = plan
        super().__init__(plan.cells(), out, parallel, retry, console)

    def launch(self, cell: Cell) -> Launch | str | None:
        name = self.plan.variant(cell.variant).match_compute_of
        if name is None:
            return self._launch(cell, None)
        reference = Cell(name, cell.corpus, cell.seed)
        if reference not in self.ended:
            return None
        if self.ended[reference]["status"] == "failed":
            return f"{reference} failed, whose compute it matches"
        target = read_result(reference.folder(self.out))
        return self._launch(cell, matching_steps(cell_config(self.plan, cell, self.out), target))

    def planned(self, cell: Cell, record: dict | None) -> Launch:
        return self._launch(cell, None if record is None else record["matched_steps"])

    def said(self, cell: Cell) -> str:
        result = read_result(cell.folder(self.out))
        return f"held-out loss {result.val_loss:.4f}, {result.mean_experts:.2f} experts/token"

    def _launch(self, cell: Cell, steps: int | None) -> Launch:
        config = self.plan.variant(cell.variant).config
        command = [train_script(), "--config", config, *cell_overrides(self.plan, cell, self.out, steps)]
        return Launch(command, cell_config(self.plan, cell, self.out, steps), notes={"matched_steps": steps})
