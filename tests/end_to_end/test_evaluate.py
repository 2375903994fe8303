"""launch/evaluate.py: training's own numbers, whatever reads the weights - one process, two, or transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import forked, metrics

EVALUATE = "launch/evaluate.py"


@pytest.fixture(scope="module")
def expected(of_two) -> dict:
    """What the last evaluation of training found, on two processes that share the experts."""
    return {name: value for name, value in metrics(of_two)[-1].items() if name.startswith("val_")}


def check(target: Path, expected: dict, *arguments: str, processes: int = 1) -> None:
    result = forked(EVALUATE, *arguments, "--json", str(target), processes=processes)
    assert result.code == 0, result.output
    assert "val_bpb" in result.output and "WARNING" not in result.output
    actual = json.loads(target.read_text())
    assert {"val_loss", "val_ppl", "val_bpb", "val_experts_per_token_by_layer"} <= expected.keys() <= actual.keys()
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=2e-6), name
    assert actual["sequences"] == 6 and actual["sequence_length"] == 32


def test_a_run_in_one_process(of_two, expected, tmp_path):
    check(tmp_path / "results" / "run.json", expected, str(of_two))


def test_a_checkpoint_in_two_processes(of_two, expected, tmp_path):
    """In the second round the second process has no sequence left, and takes part all the same."""
    folder = of_two / "checkpoints" / "step_00000003"
    check(tmp_path / "run.json", expected, str(folder), "--batch-size", "2", processes=2)


def test_an_export(of_two, expected, corpus, tmp_path):
    made = forked("tools/convert_checkpoint.py", "export", str(of_two), str(tmp_path / "export"))
    assert made.code == 0, made.output
    options = ["--data", str(corpus), "--sequences", "6"]
    check(tmp_path / "export.json", expected, str(tmp_path / "export"), *options)
