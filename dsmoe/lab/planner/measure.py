"""Short real training runs on random tokens, for calibration and for holding predictions to: `dsmoe train`, as a
user starts it, one thread a rank."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from dsmoe.config import RunConfig, load_config
from dsmoe.errors import TrainingError
from dsmoe.lab.children import start, train_command
from dsmoe.routers.registry import option_classes
from dsmoe.training.metrics import FILE, read_lines

WARM = 3  # steps that are not timed
STEPS = 15


@dataclass(frozen=True)
class Case:
    """A run: dotted configuration keys and a number of ranks."""

    name: str
    ranks: int
    keys: dict[str, object]


@dataclass(frozen=True)
class MeasuredRun:
    """Medians over steps."""

    case: Case
    seconds: float
    seconds_by_part: dict[str, float]
    peak_memory: float  # bytes, of the rank that had most
    all_to_all: float  # bytes in a step, sum over ranks
    experts_per_token: float
    load: float  # of the busiest rank over the mean, mean over layers and steps


def run_from(written: dict) -> MeasuredRun:
    """What `dataclasses.asdict` made of one, among other keys."""
    values = {field.name: written[field.name] for field in fields(MeasuredRun)}
    return MeasuredRun(**{**values, "case": Case(**written["case"])})


def settings(case: Case, vocabulary: int) -> dict[str, object]:
    """All keys of a case that say what is trained, without paths."""
    return {
        "model.vocab_size": vocabulary, "training.steps": STEPS, "training.warmup_steps": 1,
        "training.eval_interval": 0, "training.eval_sequences": case.ranks, "checkpoint.interval": 0,
        "logging.tensorboard": False, "logging.timings": True, **case.keys,
    }  # fmt: skip


def config_of(case: Case, vocabulary: int) -> RunConfig:
    """Raises `ConfigError`."""
    keys = settings(case, vocabulary)
    return load_config(None, [f"{name}={json.dumps(value)}" for name, value in keys.items()], option_classes())


def measure_all(
    cases: list[Case], vocabulary: int, rounds: int = 1, say: Callable[[str], None] = lambda text: None
) -> list[MeasuredRun]:
    """Run every case `rounds` times, each round in the opposite order of the last, so that a machine that drifts hurts
    none more than others. Of a case the fastest run counts, which others on the machine disturbed least. Raises
    `TrainingError` where a run fails."""
    fastest: dict[str, MeasuredRun] = {}
    for turn in range(rounds):
        for case in cases[:: -1 if turn % 2 else 1]:
            say(f"a run: {case.name}, {case.ranks} rank{'s' if case.ranks > 1 else ''}")
            run = measure(case, vocabulary)
            if case.name not in fastest or run.seconds < fastest[case.name].seconds:
                fastest[case.name] = run
    return [fastest[case.name] for case in cases]


def measure(case: Case, vocabulary: int) -> MeasuredRun:
    """Run it. Raises `TrainingError` with the end of its output."""
    with tempfile.TemporaryDirectory() as place:
        _random_corpus(Path(place) / "tokens", vocabulary)
        config = config_of(case, vocabulary)
        config.data.path, config.data.valid_fraction = f"{place}/tokens", 0.1
        config.logging.run_dir = f"{place}/run"
        (Path(place) / "run.yaml").write_text(config.to_yaml())
        command = [*train_command(case.ranks), "--config", f"{place}/run.yaml"]
        child = start(command, Path(place) / "log.txt", {"OMP_NUM_THREADS": "1"})
        try:
            code = child.process.wait()
        finally:
            child.kill()
        if code:
            raise TrainingError(f"the run {case.name!r} failed:\n{child.last_lines(12)}")
        lines = read_lines(Path(place) / "run" / FILE)[WARM:]
    parts = {part for line in lines for part in line["seconds_by_part"]}
    return MeasuredRun(
        case,
        median(line["seconds"] for line in lines),
        {part: median(line["seconds_by_part"].get(part, 0.0) for line in lines) for part in sorted(parts)},
        max(line["peak_memory_bytes"] for line in lines),
        median(line["all_to_all_bytes"] for line in lines),
        mean(line["experts_per_token"] for line in lines),
        mean(line["imbalance"] for line in lines),
    )


def _random_corpus(prefix: Path, vocabulary: int, tokens: int = 400_000) -> None:
    """Documents of random tokens, as Megatron's .bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16 if vocabulary < 2**16 else np.int32)
    for _ in range(40):
        builder.add_document(torch.from_numpy(random.integers(0, vocabulary, tokens // 40)), [tokens // 40])
    builder.finalize(f"{prefix}.idx")
