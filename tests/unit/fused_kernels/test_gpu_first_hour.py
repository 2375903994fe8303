"""The first hour on a GPU, without one: its commands exist, its page says what was reached, missed and not measured."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import forked

from dsmoe.config import validate_config
from dsmoe.routers.registry import option_classes

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def hour():
    spec = importlib.util.spec_from_file_location("gpu_first_hour", ROOT / "tools" / "gpu_first_hour.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_first_hour"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_first_hour"]


def rows(relu: float, topk: float, rate: float) -> dict:
    made = []
    for experts in (8, 64):
        made.append({"name": "dsmoe topk", "experts": experts, "median_ms": topk, "flops_per_second": rate * 1e12})
        made.append({"name": "dsmoe relu", "experts": experts, "median_ms": relu})
    return {"rows": made}


def lines(overhead: float) -> list[dict]:
    parts = {"routing": overhead / 2, "combine": overhead / 2, "experts": 1 - overhead}
    return [{"loss": 8 - step / 100, "seconds_by_part": parts} for step in range(200)]


def test_bars_tell_reached_from_missed_and_from_not_measured(hour):
    kernels = {"kernels": [{"right": True}, {"right": True}]}
    good = hour.bars(rows(1.02, 1.0, 400), kernels, lines(0.1), 600)
    assert [bar.reached for bar in good] == [True] * 7
    assert good[0].number == pytest.approx(400 / 600) and good[2].number == pytest.approx(0.02)
    bad = hour.bars(rows(1.03, 1.0, 250), {"kernels": [{"right": False}]}, lines(0.2), 600)
    assert [bar.reached for bar in bad] == [False] * 5 + [True, False]
    assert {bar.reached for bar in hour.bars(None, None, [], None)} == {None}
    operator = {"name": "aten::mm", "ms": 41.257, "share": 0.4125, "calls": 90}
    profile = {"steps": 5, "device": "cuda:0", "total_ms": 100.0, "operators": [operator]}
    page = hour.report("8 x H100", "abc1234", {"tests": {"status": 0, "seconds": 3, "log": "tests.log"}}, bad, profile)
    assert "| `aten::mm` | 41.26 | 41.2% | 90 |" in page
    assert "**missed**" in page and "| tests | passed | 3 |" in page and "First hour of 8 x H100" in page


def test_its_configuration_is_valid_and_its_commands_exist(hour, tmp_path):
    for gpus in (1, 8):
        tree = yaml.safe_load(yaml.safe_dump(hour.training_config(tmp_path, gpus)))
        config = validate_config(tree, option_classes())
        assert config.training.steps == hour.STEPS and config.parallel.expert_parallel == gpus
    parts = hour.parts(tmp_path, 8)
    assert sum(part.limit for part in parts) < 60 * 60
    names = ["environment", "tests", "kernels", "layer", "step", "training", "profile"]
    assert [part.name for part in parts] == names
    for part in parts:
        assert part.command[0] == sys.executable
        for argument in part.command[1:]:
            assert not argument.endswith(".py") or (ROOT / argument).is_file(), argument
    options = subprocess.run(
        [sys.executable, "tools/benchmark_moe.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout  # fmt: skip
    used = {argument for part in parts if "tools/benchmark_moe.py" in part.command for argument in part.command}
    assert all(option in options for option in used if option.startswith("--"))


def test_the_profile_names_the_ten_dearest_operators_of_five_steps(hour, tmp_path):
    """As the part runs it, with a small model on the CPU."""
    (part,) = (part for part in hour.parts(tmp_path, 1) if part.name == "profile")
    tree = hour.training_config(tmp_path, 1)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree))
    small = {"hidden_size": 64, "sequence_length": 32, "num_experts": 4, "moe_ffn_hidden_size": 32, "vocab_size": 64}
    small = [f"model.{key}={value}" for key, value in small.items()]
    done = forked(*part.command[1:], *small, "router.k=1")
    assert done.code == 0, done.output
    actual = json.loads(part.result.read_text())
    times = [row["ms"] for row in actual["operators"]]
    assert len(times) == 10 and times == sorted(times, reverse=True) and 0 < sum(times) < actual["total_ms"]
    assert {"aten::mm", "aten::_grouped_mm"} & {row["name"] for row in actual["operators"]}
    with gzip.open(tmp_path / "trace.json.gz") as trace:
        assert json.load(trace)["traceEvents"]


def test_a_part_that_fails_or_hangs_is_a_line_of_the_report(hour, tmp_path):
    failing = hour.Part("failing", [sys.executable, "-c", "raise SystemExit(3)"], 20)
    hanging = hour.Part("hanging", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert hour.run_part(failing, tmp_path)["status"] == 3
    assert hour.run_part(hanging, tmp_path)["status"] == "not done after 1 s"


def test_a_verdict_is_written_only_where_tests_and_kernels_have_passed(hour, tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "verdicts.json"
    path.write_text("{}")
    passed, failed = {"status": 0}, {"status": 1}
    assert not hour.write_verdict("NVIDIA H200", "abc", {"tests": failed, "kernels": passed}, path)
    assert json.loads(path.read_text()) == {}
    assert hour.write_verdict("NVIDIA H200", "abc", {"tests": passed, "kernels": passed}, path)
    assert json.loads(path.read_text())["NVIDIA H200"]["commit"] == "abc"


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "tools/gpu_first_hour.py", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 2 and "found no GPU" in done.stderr and "Traceback" not in done.stderr


def test_the_check_of_the_kernels_runs_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-m", "dsmoe.triton.check", "--small"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kernels = json.loads(done.stdout[done.stdout.index("{") :])["kernels"]
    assert len(kernels) == 6 and all(entry["right"] for entry in kernels)
