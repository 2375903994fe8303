"""The fastest way is chosen by measurement, once for a machine, and the same by all processes of a job."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist
from forked import call

from dsmoe.native import ways


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(ways, "_chosen", {})
    monkeypatch.setattr(ways, "_seconds", {})


def timed(log: list[str], **milliseconds: float):
    def candidate(name: str, seconds: float):
        def work():
            log.append(name)
            time.sleep(seconds)

        return work

    return {name: candidate(name, 1e-3 * value) for name, value in milliseconds.items()}


def test_the_fastest_is_chosen_and_measured_once(tmp_path, monkeypatch):
    log: list[str] = []
    assert ways.fastest("sum", "8", timed(log, slow=30, fast=1)) == "fast"
    measured = len(log)
    assert ways.fastest("sum", "8", timed(log, slow=30, fast=1)) == "fast" and len(log) == measured
    monkeypatch.setattr(ways, "_chosen", {})  # another process
    assert ways.fastest("sum", "8", timed(log, slow=1, fast=30)) == "fast" and len(log) == measured
    (line,) = ways.choices().items()
    assert line[0] == f"sum, 8, {torch.get_num_threads()} threads" and line[1].startswith("fast ")


def test_shapes_and_candidates_are_told_apart():
    log: list[str] = []
    assert ways.fastest("sum", "8", timed(log, slow=30, fast=1)) == "fast"
    assert ways.fastest("sum", "9", timed(log, slow=1, fast=30)) == "slow"
    assert ways.fastest("sum", "8", timed(log, slow=30, other=1)) == "other"


def test_one_candidate_is_not_measured():
    assert ways.fastest("sum", "8", {"only": lambda: 1 / 0}) == "only"


def test_a_candidate_may_ask_something_itself():
    """As the vocabulary loss does, in bf16: on a new machine it waited for ever for the lock that it held."""
    seen = call(ask_within, deadline=20)
    assert seen["answers"] == {"fast"} and seen["outer"] == "asking"
    assert seen["inner measured"] == 2, "once while the outer question was measured and once for the job"


def ask_within() -> dict:
    log, answers = [], set()

    def asks():
        answers.add(ways.fastest("inner", "8", timed(log, slow=5, fast=1)))

    outer = ways.fastest("outer", "8", {"asking": asks, "idle": lambda: time.sleep(0.05)})
    answers.add(ways.fastest("inner", "8", timed(log, slow=5, fast=1)))
    return {"answers": answers, "outer": outer, "inner measured": log.count("slow") // (ways.ROUNDS + 1)}


def test_a_slow_candidate_does_not_get_all_rounds():
    log: list[str] = []
    ways.measure(timed(log, slow=400, fast=1))
    assert log.count("slow") == 2 and log.count("fast") == ways.ROUNDS + 1


def test_a_damaged_file_is_measured_anew(tmp_path):
    log: list[str] = []
    ways.fastest("sum", "8", timed(log, slow=30, fast=1))
    ways._chosen.clear()
    (file,) = tmp_path.glob("ways-*.json")
    file.write_text(file.read_text()[:-9])
    assert ways.fastest("sum", "8", timed(log, slow=1, fast=30)) == "slow"
    assert len(json.loads(file.read_text())) == 1


class Store:
    """What two processes share, seen from each in turn."""

    def __init__(self):
        self.values: dict[str, bytes] = {}

    def add(self, key: str, by: int) -> int:
        self.values[key] = str(int(self.values.get(key, b"0")) + by).encode()
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]


def test_processes_of_a_job_agree_whatever_each_would_measure(monkeypatch, tmp_path):
    store, log = Store(), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ways, "_get_default_store", lambda: store)
    assert ways.fastest("sum", "8", timed(log, slow=30, fast=1)) == "fast"
    monkeypatch.setattr(ways, "_chosen", {})
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "other"))  # another machine, where the other one is faster
    measured = len(log)
    assert ways.fastest("sum", "8", timed(log, slow=1, fast=30)) == "fast"
    assert len(log) == measured
