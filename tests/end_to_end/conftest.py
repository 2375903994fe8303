"""A tiny corpus and configuration, prepared once with the real commands, in a folder with a space in its name; and two
runs on it that several tests look at and none changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from commands import TRAIN, Result, python, run, torchrun

TOPICS = ("router", "expert", "token", "expert parallel rank", "gradient", "checkpoint", "tokenizer", "controller")


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("end to end") / "a place with spaces"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def corpus(place) -> Path:
    """A dataset folder made by tools/prepare_data.py from some text files."""
    texts = place / "texts"
    texts.mkdir()
    for number in range(24):
        lines = (f"The {TOPICS[(number + line) % 8]} of {number + line} is {TOPICS[line % 8]}.\n" for line in range(80))
        (texts / f"{number}.txt").write_text("".join(lines))
    data = place / "data"
    options = ["--output", str(data), "--vocab-size", "300", "--valid-fraction", "0.2", "--workers", "1"]
    made = run(python("tools/prepare_data.py", str(texts), *options))
    assert made.code == 0, made.output
    return data


@pytest.fixture(scope="session")
def config(place, corpus) -> Path:
    """The YAML file of a small ReLU model; tests override what they are about."""
    tree = {
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "sequence_length": 32, "num_experts": 4,
            "moe_ffn_hidden_size": 16,
        },
        "router": {"name": "relu", "k": 1, "lambda_initial": 1e-4},
        "data": {"path": str(corpus)},
        "training": {"steps": 6, "global_batch_size": 4, "warmup_steps": 1, "eval_interval": 3, "eval_sequences": 6},
        "checkpoint": {"interval": 3},
        "logging": {
            "run_dir": str(place / "runs" / "unnamed"), "tensorboard": False, "trace": 3, "experts": 3, "timings": True,
        },
    }  # fmt: skip
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def alone(place, config) -> tuple[Path, Result]:
    """Six steps in plain Python, one process: no launcher, no MPI library, no C++ compiler."""
    run_dir = place / "runs" / "alone"
    bare = {"PATH": str(place / "no programs"), "TORCH_EXTENSIONS_DIR": str(place / "extensions"), "CXX": ""}
    result = run(python(TRAIN, "--config", str(config), f"logging.run_dir={run_dir}"), environment=bare)
    assert result.code == 0, result.output
    assert not (place / "extensions").exists() or not os.listdir(place / "extensions")
    return run_dir, result


@pytest.fixture(scope="session")
def of_two(place, config) -> Path:
    """Three of the six steps in two processes that share the experts."""
    run_dir = place / "runs" / "of two"
    options = ["training.stop_at=3", "parallel.expert_parallel=2", "parallel.zero_stage=2"]
    result = run(torchrun(2, TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", *options))
    assert result.code == 0, result.output
    return run_dir
