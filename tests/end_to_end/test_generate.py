"""launch/generate.py on a run of a few steps: the text is nonsense, the command is not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import TRAIN, python, run, torchrun


@pytest.fixture(scope="module")
def results(place, config):
    run_dir = place / "runs" / "to generate from"  # by two processes; generation is one
    command = torchrun(2, TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", "parallel.expert_parallel=2")
    trained = run([*command, "training.steps=2", "training.eval_sequences=1"])
    assert trained.code == 0, trained.output
    greedy = ["--prompt", "The router", "--tokens", "6", "--temperature", "0"]
    calls = {
        "greedy": [str(run_dir), *greedy],
        "greedy, another seed": [str(run_dir), *greedy, "--seed", "5"],
        "bad arguments": [str(run_dir), "--tokens", "0", "--temperature", "-1", "--top-p", "2"],
        "no run": [str(place / "no run")],
    }
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(run, python("launch/generate.py", *call)) for name, call in calls.items()}
    return {name: future.result() for name, future in futures.items()}


def test_a_prompt_is_continued(results):
    result = results["greedy"]
    assert result.code == 0, result.output
    assert result.output.startswith("The router")
    assert len(result.output.strip()) > len("The router")
    assert "WARNING" not in result.output


def test_temperature_zero_ignores_the_seed(results):
    assert results["greedy"].output == results["greedy, another seed"].output


def test_all_bad_arguments_are_named(results):
    result = results["bad arguments"]
    assert result.code == 2, result.output
    for option in ("--tokens: found 0", "--temperature: found -1", "--top-p: found 2"):
        assert option in result.output
    assert "Traceback" not in result.output


def test_a_run_that_is_not_there(results):
    result = results["no run"]
    assert result.code == 2, result.output
    assert "no run" in result.output and "Traceback" not in result.output
