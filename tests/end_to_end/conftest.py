"""A tiny corpus and configuration, prepared once with the real commands, in a folder with a space in its name; and two
runs on it that several tests look at and none changes. All workers of pytest-xdist share them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from browser import browser  # noqa: F401
from commands import TRAIN, Result, forked, python, run, torchrun

TOPICS = ("router", "expert", "token", "expert parallel rank", "gradient", "checkpoint", "tokenizer", "controller")


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("end to end") / "a place with spaces"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared by all" / "workers of a session"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(path: Path, make: Callable[[], Result]) -> Result:
    """What `make`, which makes `path`, returned: in the first worker that asks, while the others wait for it."""
    record = path.with_name(f"{path.name}.json")
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            result = make()
            assert result.code == 0, result.output
            record.write_text(json.dumps(asdict(result)))
    return Result(**json.loads(record.read_text()))


@pytest.fixture(scope="session")
def corpus(shared) -> Path:
    """A dataset folder made by tools/prepare_data.py from some text files."""
    made_once(shared / "data", lambda: prepare(shared / "texts", shared / "data"))
    return shared / "data"


def prepare(texts: Path, data: Path) -> Result:
    texts.mkdir()
    for number in range(24):
        lines = (f"The {TOPICS[(number + line) % 8]} of {number + line} is {TOPICS[line % 8]}.\n" for line in range(80))
        (texts / f"{number}.txt").write_text("".join(lines))
    options = ["--output", str(data), "--vocab-size", "300", "--valid-fraction", "0.2", "--workers", "1"]
    return forked("tools/prepare_data.py", str(texts), *options)


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
def alone(shared, config) -> tuple[Path, Result]:
    """Six steps in plain Python, one process: no launcher, no MPI library, no C++ compiler."""
    run_dir, extensions = shared / "alone", shared / "extensions"
    bare = {"PATH": str(shared / "no programs"), "TORCH_EXTENSIONS_DIR": str(extensions), "CXX": ""}
    command = python(TRAIN, "--config", str(config), f"logging.run_dir={run_dir}")
    result = made_once(run_dir, lambda: run(command, environment=bare))
    assert not extensions.exists() or not os.listdir(extensions)
    return run_dir, result


@pytest.fixture(scope="session")
def of_two(shared, config) -> Path:
    """Three of the six steps in two processes that share the experts, under torchrun."""
    run_dir = shared / "of two"
    options = ["training.stop_at=3", "parallel.expert_parallel=2", "parallel.zero_stage=2"]
    command = torchrun(2, TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", *options)
    made_once(run_dir, lambda: run(command))
    return run_dir
