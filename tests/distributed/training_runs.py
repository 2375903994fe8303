"""Whole runs of `dsmoe.training.run.train` on tiny data, inside the ranks of `ranks.run_ranks`."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy
import torch
from steps import tiny_config

from dsmoe.config import RunConfig
from dsmoe.data.megatron import indexed_dataset
from dsmoe.errors import DsmoeError

MODEL = dict(
    num_layers=1, hidden_size=16, num_attention_heads=2, sequence_length=16, vocab_size=64, num_experts=4,
    moe_ffn_hidden_size=16,
)  # fmt: skip


def write_tokens(prefix: Path, documents: int = 40, seed: int = 0) -> Path:
    """A .bin/.idx pair of random documents of 50 tokens below 64."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(documents):
        builder.add_document(torch.randint(0, 64, (50,), generator=generator), [50])
    builder.finalize(f"{prefix}.idx")
    return prefix


def run_config(run_dir: Path, data: Path, **sections) -> RunConfig:
    """Four steps of 4 sequences, on one MoE layer of 4 experts."""
    return tiny_config(
        model={**MODEL, **sections.pop("model", {})},
        router={"name": "topk", "k": 1, **sections.pop("router", {})},
        data={"path": str(data), "valid_fraction": 0.1},
        training={
            "steps": 4, "global_batch_size": 4, "gradient_accumulation": 1, "eval_interval": 0, "eval_sequences": 2,
            **sections.pop("training", {}),
        },
        logging={"run_dir": str(run_dir), **sections.pop("logging", {})},
        **sections,
    )  # fmt: skip


def train_all(configs: list[RunConfig]) -> list[tuple]:
    """One run after another: ("ended", step, whether it reached training.steps), or (error class, text, exit code)."""
    from dsmoe.training.run import train

    results: list[tuple] = []
    for config in configs:
        try:
            summary = train(config)
            results.append(("ended", summary.step, summary.finished))
        except DsmoeError as error:
            results.append((type(error).__name__, str(error), error.exit_code))
    return results


def train_and_listen(configs: list[RunConfig]) -> tuple[list[tuple], str]:
    """As `train_all`, and what rank 0 said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = train_all(configs)
    return results, said.getvalue()


def lines_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
