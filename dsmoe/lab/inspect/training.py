"""When routing settled: earlier checkpoints of a run against the one that is inspected, on the same tokens.

    saturation   routes that both choose / routes of the later one      router saturation of OLMoE (arXiv 2409.02060,
                 section 5.1), there for a fixed k: sum_t |E_t early & E_t late| / sum_t |E_t late|
    jaccard      routes that both choose / routes of either

Saturation alone is 1 for a checkpoint that uses all experts, which routers with a varying number do early on; jaccard
is not fooled. None in a layer where the denominator is 0.

Shapes: L MoE layers, T tokens, E experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsmoe.checkpoint.files import complete_checkpoints, folder_of, step_of
from dsmoe.lab.inspect.models import InspectedRun
from dsmoe.lab.inspect.reading import Array, Reading, read
from dsmoe.lab.inspect.texts import Tokens


def earlier_checkpoints(run_dir: Path, step: int, most: int) -> list[int]:
    """Steps before `step` that have a checkpoint, at most `most`, evenly chosen, the first and the last among them."""
    steps = sorted(saved for saved in map(step_of, complete_checkpoints(run_dir)) if saved < step)
    if len(steps) <= most:
        return steps
    return [steps[round(place)] for place in np.linspace(0, len(steps) - 1, most)] if most > 1 else steps[-1:]


def saturation(model: InspectedRun, reading: Reading, texts: list[Tokens], most: int) -> list[dict]:
    """By step: `layers`, a list of {saturation, jaccard}, with `loss` and `experts_per_token` of that checkpoint."""
    by_step = []
    for step in earlier_checkpoints(model.run_dir, model.step, most):
        early = read(InspectedRun(folder_of(model.run_dir, step)), texts, hidden=False)
        by_step.append(
            {
                "step": step,
                "loss": early.mean_loss,
                "experts_per_token": float(early.experts_LT.mean()),
                "layers": [shared(*maps_TE) for maps_TE in zip(early.map_LTE, reading.map_LTE, strict=True)],
            }
        )
    return by_step


def shared(early_TE: Array, late_TE: Array) -> dict:
    both, late, either = (early_TE & late_TE).sum(), late_TE.sum(), (early_TE | late_TE).sum()
    return {
        "saturation": float(both / late) if late else None,
        "jaccard": float(both / either) if either else None,
    }
