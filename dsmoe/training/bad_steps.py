"""Steps whose loss or gradients are not finite, or whose loss jumps: diagnosed, written down, and skipped or the end.

Every rank sees the same loss and the same gradient norm, so every rank comes to the same decision. In a bad step the
optimizer does not move: weights, its state and the router's controller stay as they were. RUN/bad_steps.jsonl has a
line for each: `step`, `what`, `decision`, and for each rank what `dsmoe.training.diagnose` found.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch

from dsmoe.config import TrainingConfig
from dsmoe.errors import TrainingError
from dsmoe.optim.deepspeed import veto_steps
from dsmoe.training.diagnose import RankReport, StepDiagnosis
from dsmoe.training.metrics import LineWriter, Warn
from dsmoe.training.watch import LossSpikes

FILE = "bad_steps.jsonl"


class BadSteps:
    """The decision about each step.

    Args:
        skipped: steps of the run that were skipped already.
        first_step: that the run goes on from.

    Attributes:
        skipped: so far.
    """

    def __init__(
        self, engine, training: TrainingConfig, run_dir: Path, rank: int, skipped: int, first_step: int, warn: Warn
    ):
        self.engine, self.training, self.path, self.skipped = engine, training, run_dir / FILE, skipped
        self.spikes = LossSpikes()
        self._held = False  # whether the optimizer may not move
        self._warn = warn
        self._report = LineWriter(self.path, rank, first_step, warn)
        veto_steps(engine, lambda: self._held)

    def before_update(self, loss: float, router_loss: float) -> str | None:
        """With the losses of all ranks, before the optimizer's step: what is wrong with them. It will not move then."""
        what = None
        if not math.isfinite(loss + router_loss):
            what = f"the loss is {loss + router_loss}"
        elif (bound := self.spikes.see(loss)) is not None:
            what = f"the loss jumps to {loss:.4g}, beyond {bound:.4g}"
            if self.training.on_loss_spike == "log":
                self._warn(what)
                what = None
        self._held = what is not None
        return what

    def after_update(self, what: str | None, grad_norm: float) -> str | None:
        """What was wrong with the step: with its losses, or with the gradients."""
        self._held = False
        return what or (None if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}")

    def diagnose(self, micro_steps: list[tuple[dict[str, torch.Tensor], list[int]]]) -> list[RankReport]:
        """Do a step again on its batches, each with the samples in it, and look at everything. Collective."""
        diagnosis = StepDiagnosis(self.engine.module)
        self._held = True
        for batch, samples in micro_steps:
            with diagnosis.micro_step(samples):
                loss, _ = self.engine(**batch)
                self.engine.backward(loss)
            self.engine.step()
        self._held = False
        self.engine.module.recorder.take()
        return diagnosis.gather()

    def decide(self, step: int, what: str, reports: list[RankReport]) -> bool:
        """Write a bad step down; whether it is skipped, and not the end."""
        finite = what.startswith("the loss jumps")
        wanted = (self.training.on_loss_spike if finite else self.training.on_bad_step) == "skip"
        skips = wanted and self.skipped < self.training.max_skipped_steps
        self.skipped += skips
        line = {"step": step, "what": what, "decision": "skip" if skips else "stop"}
        self._report.write({**line, "ranks": [asdict(report) for report in reports]})
        return skips

    def close(self) -> None:
        self._report.close()


def error_of(step: int, what: str, where: str, saved: str, path: Path, training: TrainingConfig) -> TrainingError:
    """Why a run ends with a bad step."""
    allowed = training.on_bad_step == "skip"
    limit = f" ({training.max_skipped_steps} steps were skipped, training.max_skipped_steps)" if allowed else ""
    return TrainingError(f"step {step}: {what}{limit}; {where}; more in {path}; {saved}")
