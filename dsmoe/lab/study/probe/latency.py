"""Inference with one user: seconds to the first token and for each one after it, and what they cost in loss."""

from __future__ import annotations

import time
from statistics import median

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.inference.generate import Reader
from dsmoe.routers.inference import routing_with
from dsmoe.training.evaluate import evaluate

TOKENS, REPEATS = 12, 3


def latencies(trained: TrainedModel, held) -> list[dict]:
    """One entry for each setting of the router, its own first."""
    routers = trained.model.recorder.routers
    results = []
    for setting, change in settings(trained):
        with routing_with(routers, change):
            loss = evaluate(trained.model, held, len(held), trained.groups, None)
            first, later = seconds(trained, held.batch(0, 1)["tokens"][0].tolist())
        results.append(
            {
                "setting": setting, "experts_per_token": loss["val_experts_per_token"], "loss": loss["val_loss"],
                "first_token_seconds": first, "token_seconds": later,
            }
        )  # fmt: skip
    return results


def settings(trained: TrainedModel) -> list[tuple[str, dict]]:
    """What the router is tried with: as trained, and, where an option decides it, with fewer and more experts."""
    changes = trained.model.recorder.routers[0].options.inference_settings(trained.config.model.num_experts)
    named = [(", ".join(f"{name}={value:g}" for name, value in change.items()), change) for change in changes]
    return [("as trained", {}), *named]


def seconds(trained: TrainedModel, ids: list[int]) -> tuple[float, float]:
    """To the first token after half a sequence, and for each of some more: medians."""
    half = len(ids) // 2
    first: list[float] = []
    later: list[float] = []
    for _ in range(REPEATS):
        reader = Reader(trained.model)
        for length in range(half, min(half + TOKENS, len(ids)) + 1):
            began = time.perf_counter()
            reader.logits(ids[:length])
            (first if length == half else later).append(time.perf_counter() - began)
    return median(first), median(later)
