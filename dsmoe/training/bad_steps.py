"""Steps whose loss or gradients are not finite, or whose loss jumps: diagnosed, written down, and skipped or the end.

Every rank sees the same loss and the same gradient norm, so every rank comes to the same decision. In a bad step the
optimizer does not move: weights, its state and the router's controller stay as they were. RUN/bad_steps.jsonl has a
line for each: `step`, `what`, `decision`, and for each rank what `dsmoe.training.diagnose` found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
        first_step: that the run resumes from.

    Attributes:
        skipped: so far.
        grad_norm: of the last step.
    """

    def __init__(
        self, engine, training: TrainingConfig, run_dir: Path, rank: int, skipped: int, first_step: int, warn: Warn
    ):
        self.engine, self.training, self.path, self.skipped = engine, training, run_dir / FILE, skipped
        self.spikes = LossSpikes()
        self.grad_norm = math.nan
        self._held = False  # whether the optimizer may not move
        self._what: str | None = None  # is wrong with this step
        self._undecided: tuple[Callable[[], tuple[float, float]], Callable[[], None]] | None = None
        self._warn = warn
        self._report = LineWriter(self.path, rank, first_step, warn)
        veto_steps(engine, lambda norm: self._held or self._decide(norm) is not None)

    def before_update(self, losses: Callable[[], tuple[float, float]], accept: Callable[[], None]) -> None:
        """Before the optimizer's step.

        Args:
            losses: of language model and router over all ranks; called with the gradient norm at hand, so that the
                host waits for the device once.
            accept: called when the step is found good, before the optimizer moves.
        """
        self._undecided = losses, accept

    def after_update(self) -> str | None:
        """What was wrong with the step: with its losses, or with the gradients."""
        if self._undecided is not None:  # DeepSpeed has not asked, for the norm is not finite
            self._decide(float(self.engine.get_global_grad_norm()))
        return self._what

    def _decide(self, grad_norm: float) -> str | None:
        (losses, accept), self._undecided = self._undecided, None
        loss, router_loss = losses()
        self.grad_norm, self._what = grad_norm, None
        if not math.isfinite(loss + router_loss):
            self._what = f"the loss is {loss + router_loss}"
        elif (bound := self.spikes.see(loss)) is not None:
            what = f"the loss jumps to {loss:.4g}, beyond {bound:.4g}"
            if self.training.on_loss_spike == "log":
                self._warn(what)
            else:
                self._what = what
        if self._what is None and not math.isfinite(grad_norm):
            self._what = f"the gradient norm is {grad_norm}"
        if self._what is None:
            accept()
        return self._what

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
