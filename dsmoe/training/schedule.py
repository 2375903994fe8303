"""The learning rate of each step.

    cosine   linear warm-up, then a cosine to `final_lr` at `steps` (arXiv 1608.03983)
    wsd      linear warm-up, a constant rate, then a decay over `decay_steps` (MiniCPM, arXiv 2404.06395). The decay is
             1 - sqrt, the best of those tried by Haegele et al. (arXiv 2405.18392, section 3)

With wsd, one run gives several lengths: `decay_from` continues a checkpoint of its constant part with the decay alone.
"""

from __future__ import annotations

import math
from pathlib import Path

from dsmoe.config import TrainingConfig

DECAY_SHARE = 0.2  # of the steps, where `decay_steps` is not set


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Of the optimizer step after `step` finished ones."""
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    span = training.lr - training.final_lr
    if training.schedule == "wsd":
        start = decay_start(training)
        progress = (step - start) / max(1, training.steps - start)
        return training.final_lr + span * (1 - math.sqrt(min(1.0, max(0.0, progress))))
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.final_lr + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decay_start(training: TrainingConfig) -> int:
    """The step after which a wsd run decays."""
    if training.decay_from is not None:
        return int(Path(training.decay_from).name.removeprefix("step_"))
    decay = round(DECAY_SHARE * training.steps) if training.decay_steps is None else training.decay_steps
    return max(training.warmup_steps, training.steps - decay)
