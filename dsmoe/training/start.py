"""The start of a run that cannot hang: every rank gets the same configuration, or the same reason why there is no run.

What only this process knows (a file it cannot read, a package it cannot import) is told to all ranks, before any
process group exists; see `dsmoe.parallel.preflight`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dsmoe.checkpoint.files import find_checkpoint
from dsmoe.config import RunConfig
from dsmoe.data.dataset import open_corpus
from dsmoe.data.identity import data_identity
from dsmoe.errors import ParallelError
from dsmoe.model.size import model_size
from dsmoe.parallel.groups import check_world
from dsmoe.parallel.place import Place, find_place
from dsmoe.parallel.preflight import Verdict, agree, find_report
from dsmoe.runtime.device import on_gpu, use_local_device
from dsmoe.runtime.limits import Limits
from dsmoe.training.run import with_vocabulary

BYTES_SAVED = 12  # of a parameter in a checkpoint: weight and both moments in fp32


Estimate: TypeAlias = Callable[[RunConfig, int], int]


@dataclass(frozen=True)
class Start:
    """What this process has read of the run that it is to start.

    Attributes:
        config: as the user wrote it.
        settled: with what data and device decide.
        equal: what all ranks must have the same.
        estimate: of a rank's memory with activations, from `settled` and the number of ranks; where less is free, the
            start warns.
    """

    config: RunConfig
    settled: RunConfig
    equal: dict[str, str]
    estimate: Estimate | None = None

    @classmethod
    def read(cls, config: RunConfig, fit: bool = False, estimate: Estimate | None = None) -> Start:
        """Look at the data and the run folder; `fit`: as `fit_plan`. Raises `DsmoeError`."""
        if fit:
            config = fit_plan(config, find_place().world)
        corpus = open_corpus(config.data)
        settled = with_vocabulary(config.with_precision(on_gpu()), corpus)
        checkpoint = find_checkpoint(config.training.resume, Path(config.logging.run_dir))
        return cls(config, settled, {
            "python": sys.version.split()[0],
            "configuration": _digest(settled.model_dump_json()),
            "data": _digest(json.dumps(data_identity(corpus))),
            "checkpoint to resume": str(checkpoint),
        }, estimate)  # fmt: skip

    @property
    def limits(self) -> Limits:
        timeout = self.config.training.timeout
        return Limits(timeout.start, timeout.step, timeout.save)

    def agree(self, place: Place, check: bool = False) -> None:
        """Compare with all other ranks; collective.

        Args:
            check: show what was found on every host, also where all is well.

        Raises:
            ParallelError: on every rank, if the run cannot start on any.
        """
        use_local_device()
        training, world = self.config.training, place.world
        check_world(world, self.config.parallel.expert_parallel, training.global_batch_size,
                    training.gradient_accumulation)  # fmt: skip
        run_dir = Path(self.config.logging.run_dir)
        needed = state_bytes(self.settled, world), BYTES_SAVED * model_size(self.settled).total
        expected = self.estimate(self.settled, world) if self.estimate else 0
        report = find_report(place, run_dir, self.equal, *needed, expected)
        verdict = agree(report, run_dir, training.timeout.start or 10**6)
        if place.rank == 0:
            _show(verdict, world, check)
        if verdict.problems:
            numbered = "\n".join(f"  {number}. {text}" for number, text in enumerate(verdict.problems, 1))
            raise ParallelError(f"the run cannot start:\n{numbered}")


def _show(verdict: Verdict, world: int, check: bool) -> None:
    several_hosts = len(verdict.table) > 2
    lines = list(verdict.table) if check or several_hosts or verdict.problems else []
    lines += [f"warning: {text}" for text in verdict.warnings]
    if check and not verdict.problems:
        lines.append(f"ready: {world} rank{'s' if world > 1 else ''}")
    if lines:
        print("\n".join(lines), flush=True)


def fit_plan(config: RunConfig, world: int) -> RunConfig:
    """The configuration for another number of ranks than it was written for.

    `parallel.expert_parallel` becomes the largest size, at most what it was, that divides ranks and experts;
    `training.gradient_accumulation` the smallest, at least what it was, with which the ranks divide the batch. Losses
    stay those of the run but for the order of sums.

    Raises:
        ParallelError: the ranks do not divide the batch.
    """
    training, experts = config.training, config.model.num_experts
    ep = next(size for size in range(min(config.parallel.expert_parallel, world), 0, -1)
              if world % size == 0 and experts % size == 0)  # fmt: skip
    batch = training.global_batch_size
    parts = (count for count in range(training.gradient_accumulation, batch + 1) if batch % (world * count) == 0)
    accumulation = next(parts, None)
    if accumulation is None:
        raise ParallelError(f"training.global_batch_size is {batch}, which {world} processes do not divide")
    return config.model_copy(update={
        "parallel": config.parallel.model_copy(update={"expert_parallel": ep}),
        "training": training.model_copy(update={"gradient_accumulation": accumulation}),
    })  # fmt: skip


def state_bytes(config: RunConfig, world: int) -> int:
    """Bytes of weights, gradients and optimizer state of one rank, without activations: what it needs at least.

    `dsmoe.lab.planner.memory` predicts all of it; a test holds the two together.
    """
    size, model, stage = model_size(config), config.model, config.parallel.zero_stage
    experts = sum(model.moe_layers()) * model.num_experts * size.expert
    local = size.total - experts + experts // config.parallel.expert_parallel
    owned = size.total // world
    weight = 2 if config.training.precision == "bf16" else 4
    master_and_moments = 12
    gradients = 4 * (local if stage == 1 else owned)
    return weight * (owned if stage == 3 else local) + gradients + master_and_moments * owned


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
