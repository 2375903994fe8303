"""Two hosts and a small job for them, built once; skipped where hosts cannot be built."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from pathlib import Path

import numpy
import pytest
import yaml
from hosts import Hosts, unavailable
from jobs import FAULT, losses, on_one_host


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> Hosts:
    if reason := unavailable():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts"), loaded=True) as pair:
        yield pair


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="session")
def data(place) -> Path:
    """A folder with the pair text.bin, text.idx."""
    return write_data(place / "data")


def write_data(folder: Path) -> Path:
    """Make `folder` with a pair in Megatron's format: 40 documents of 200 tokens, each a walk in steps of its own."""
    folder.mkdir(parents=True)
    numbers = numpy.random.default_rng(1234)
    ids = [(numpy.arange(200) * numbers.integers(1, 4) + numbers.integers(64)) % 64 for _ in range(40)]
    numpy.concatenate(ids).astype("<u2").tofile(folder / "text.bin")
    with open(folder / "text.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(ids), len(ids) + 1))
        numpy.array([len(document) for document in ids], "<i4").tofile(index)
        (numpy.arange(len(ids), dtype="<i8") * 400).tofile(index)
        numpy.arange(len(ids) + 1, dtype="<i8").tofile(index)
    return folder


def small_run(data: Path) -> dict:
    """The configuration of a run of seconds."""
    return {
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "sequence_length": 32, "num_experts": 4,
            "moe_ffn_hidden_size": 16, "vocab_size": 64,
        },
        "router": {"name": "relu", "k": 1, "lambda_initial": 1e-4},
        "parallel": {"expert_parallel": 2, "zero_stage": 2},
        "data": {"path": str(data / "text")},
        "training": {"steps": 12, "global_batch_size": 4, "warmup_steps": 1, "eval_interval": 0, "eval_sequences": 4},
        "checkpoint": {"interval": 3},
        "logging": {"tensorboard": False},
    }  # fmt: skip


@pytest.fixture(scope="session")
def train(place, data):
    """Command line of a small training run: train(name, overrides) gives (its run folder, the arguments)."""
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(small_run(data)))

    def arguments(name: str, *overrides: str, script: str = FAULT) -> tuple[Path, list[str]]:
        run_dir = place / "runs" / name
        return run_dir, [script, "--config", str(path), f"logging.run_dir={run_dir}", *overrides]

    return arguments


@pytest.fixture(scope="session")
def of_one_host(hosts, train, tmp_path_factory) -> list[float]:
    """Losses of two ranks on one host that share the experts; trained once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    record = folder / "losses of one host.json"
    with open(folder / "one host.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            run_dir, arguments = train("one host")
            ended = on_one_host(hosts, 2, arguments).finish()
            assert ended.code == 0, ended.output
            record.write_text(json.dumps(losses(run_dir)))
    actual = json.loads(record.read_text())
    assert len(actual) == 12
    return actual
