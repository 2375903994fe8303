"""The fastest way to lay a run out: expert parallelism, ZeRO stage, recomputation, micro-steps, chunks. What is trained
stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsmoe.config import RunConfig
from dsmoe.lab.planner.hardware import Hardware
from dsmoe.lab.planner.layout import Layout, problems
from dsmoe.lab.planner.predict import Prediction, predict

CHUNKS = (1, 2, 4, 8)  # of a recomputed layer's tokens


@dataclass(frozen=True)
class SearchResult:
    """All layouts, the fastest that fit first; of those that do not fit, the nearest first."""

    fitting: list[Prediction]
    too_large: list[Prediction]

    @property
    def best(self) -> Prediction | None:
        return self.fitting[0] if self.fitting else None


def search(
    config: RunConfig,
    hardware: Hardware,
    ranks: int,
    load: Callable[[int], float] = lambda ep: 1.0,
    experts_per_token: float | None = None,
) -> SearchResult:
    """Try everything that divides.

    Args:
        load: routes of the busiest rank over the mean, by expert-parallel size.
        experts_per_token: None for what the router aims at.
    """
    predictions = []
    for candidate in layouts(config, ranks):
        if not problems(candidate, ranks, hardware):
            ep = candidate.parallel.expert_parallel
            predictions.append(predict(Layout(candidate, hardware, ranks, load(ep), experts_per_token)))
    fitting = sorted(
        (prediction for prediction in predictions if prediction.fits), key=lambda prediction: prediction.step_seconds
    )
    return SearchResult(
        fitting,
        sorted(
            (prediction for prediction in predictions if not prediction.fits),
            key=lambda prediction: prediction.missing_memory,
        ),
    )


def layouts(config: RunConfig, ranks: int) -> list[RunConfig]:
    """Every layout of a run on that many ranks."""
    if batch_problems(config, ranks):
        return []
    batch = config.training.global_batch_size
    spread = _divisors(config.model.num_experts) if any(config.model.moe_layers()) else [1]
    return [
        laid_out(config, ep, stage, recompute, micro_steps, chunks)
        for ep in spread
        if ranks % ep == 0
        for stage in (1, 2, 3)
        for recompute in ("none", "moe", "full")
        for micro_steps in _divisors(batch // ranks)
        for chunks in (CHUNKS if recompute != "none" else (1,))
        if chunks * ranks * micro_steps <= batch * config.model.sequence_length
    ]


def batch_problems(config: RunConfig, ranks: int) -> list[str]:
    """Why no layout has that many ranks."""
    batch = config.training.global_batch_size
    if batch % ranks:
        return [f"training.global_batch_size: found {batch}, expected a multiple of the {ranks} ranks"]
    return []


def laid_out(config: RunConfig, ep: int, stage: int, recompute: str, micro_steps: int, chunks: int) -> RunConfig:
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"recompute": recompute, "moe_chunks": chunks}),
            "parallel": config.parallel.model_copy(update={"expert_parallel": ep, "zero_stage": stage}),
            "training": config.training.model_copy(update={"gradient_accumulation": micro_steps}),
        }
    )


def choices(layout: Layout) -> dict[str, object]:
    """What `search` may change, by configuration key."""
    config = layout.config
    return {
        "parallel.expert_parallel": config.parallel.expert_parallel,
        "parallel.zero_stage": config.parallel.zero_stage,
        "model.recompute": config.model.recompute,
        "training.gradient_accumulation": config.training.gradient_accumulation,
        "model.moe_chunks": config.model.moe_chunks,
    }


def changes(to: Layout, current: Layout) -> list[str]:
    """Overrides that make one layout the other."""
    before = choices(current)
    return [f"{key}={value}" for key, value in choices(to).items() if value != before[key]]


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
