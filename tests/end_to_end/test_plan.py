"""The planner's command: a trillion parameters on several sizes of a cluster, mistakes all at once, recorded routes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import TRAIN, forked

from dsmoe.config import load_config
from dsmoe.training.trace import path_of, trace_of, write_trace

TOOL = "tools/plan.py"
TRILLION = ["--config", "configs/plans/trillion.yaml", "--hardware", "configs/hardware/h100.yaml"]


def test_a_trillion_parameters_on_several_sizes(place):
    sizes = ["--nodes", "4,64,128", "--search", "--tokens", "1e12", "--json", str(place / "plans.json")]
    result = forked(TOOL, *TRILLION, *sizes, "router.name=topk", "router.k=8")  # `plan` may be left out
    assert result.code == 0, result.output
    assert "nothing fits" in result.output and "cheapest" in result.output
    actual = json.loads((place / "plans.json").read_text())
    assert {one["ranks"] for one in actual} == {32, 512, 1024} and all(one["parameters"] > 1e12 for one in actual)
    assert any(one["fits"] for one in actual)


def test_a_bad_plan_is_refused_with_all_its_mistakes(place):
    file = place / "machine.yaml"
    file.write_text("name: x\ndevices_per_node: 8\nmemory: 80\npeak_tflops: {bf16: 1}\nspeeds: {default: {}}\n")
    result = forked(TOOL, "plan", *TRILLION[:3], str(file), "parallel.expert_parallel=7", "router.kk=2")
    assert result.code == 2 and "Traceback" not in result.output
    named = ("parallel.expert_parallel", "router.kk", "memory_gib", "memory:", "within_node")
    assert all(name in result.output for name in named), result.output
    result = forked(TOOL, "plan", *TRILLION, "--nodes", "3,0", "--imbalance", "0.5", "training.precision=fp32")
    assert result.code == 2 and "has 5 mistakes" in result.output, result.output
    nothing = ["--rounds", "0", "--scale", "-1", "--ranks", "0"]
    for command in (["calibrate"], ["validate", "--hardware", "configs/hardware/two_cores_amd_epyc.yaml"]):
        result = forked(TOOL, *command, *nothing)
        assert result.code == 2 and "has 3 mistakes" in result.output, result.output


def test_a_plan_that_does_not_fit_exits_with_2(place):
    small = place / "small.yaml"
    content = yaml.safe_load(Path("configs/hardware/two_cores_amd_epyc.yaml").read_text())
    small.write_text(yaml.safe_dump(content | {"memory_gib": 0.01}))
    arguments = ["--config", "configs/quickstart.yaml", "--hardware", str(small), "model.vocab_size=2048"]
    result = forked(TOOL, *arguments, "--write-config", str(place / "none.yaml"))
    assert result.code == 2 and "does not fit" in result.output, result.output
    result = forked(TOOL, *arguments, "--search", "--write-config", str(place / "none.yaml"))
    assert result.code == 2 and "nothing fits" in result.output, result.output
    assert "parallel.expert_parallel=" in result.output and "training.gradient_accumulation=" in result.output
    assert not (place / "none.yaml").exists()


def test_the_configuration_that_a_plan_writes_starts(place, corpus):
    """On as many ranks as were planned for, up to the model and one optimizer step's shapes (--check)."""
    written = place / "fastest.yaml"
    hardware = ["--hardware", "configs/hardware/two_cores_amd_epyc.yaml"]
    overrides = ["model.vocab_size=512", f"data.path={corpus}", f"logging.run_dir={place / 'planned'}"]
    arguments = ["--config", "configs/quickstart.yaml", *hardware, "--search", "--write-config", str(written)]
    result = forked(TOOL, *arguments, *overrides)
    assert result.code == 0 and f"wrote {written}" in result.output, result.output
    assert "deepspeed --num_gpus 2 --module dsmoe train --config" in written.read_text()
    checked = forked(TRAIN, "--config", str(written), "--check", processes=2)
    assert checked.code == 0 and "ready: 2 ranks" in checked.output, checked.output


def test_routes_are_replayed_up_to_a_rank_for_each_expert(place):
    maps = [np.random.default_rng(0).random((256, 64)) < 0.1]
    write_trace(path_of(place / "routes", 1), trace_of(maps, np.arange(256), 16, 1))
    hardware = ["--hardware", "configs/hardware/h100.yaml", "--json", str(place / "replay.json")]
    sizes = ["--hidden", "4096", "--ffn", "2048", "--dtype", "bf16"]
    result = forked(TOOL, "replay", str(place / "routes"), "--ep", "8,64", *hardware)
    assert result.code == 2 and "--hidden, --ffn, --dtype: not given, and no config.yaml" in result.output
    result = forked(TOOL, "replay", str(place / "routes"), "--ep", "8,64", *sizes, *hardware)
    assert result.code == 0, result.output
    rows = json.loads((place / "replay.json").read_text())["rows"]
    assert {row["placement"] for row in rows} == {
        "forced balance",
        "contiguous",
        "round robin",
        "load-aware",
        "replicated",
    }
    config = load_config(None, ["model.hidden_size=96", "model.moe_ffn_hidden_size=40", "training.precision=bf16"])
    (place / "config.yaml").write_text(config.to_yaml())  # of the run that left the trace
    result = forked(TOOL, "replay", str(place / "routes"), "--ep", "8", *hardware)
    assert result.code == 0 and "rows 96 wide in bf16, experts 40 wide" in result.output, result.output
    of_the_run = json.loads((place / "replay.json").read_text())["rows"]
    wide = [row["sent_bytes"] for row in rows if row["ranks"] == 8]
    assert [row["sent_bytes"] * 4096 / 96 for row in of_the_run] == pytest.approx(wide)
    result = forked(TOOL, "replay", str(place / "routes"), "--ep", "8,24,128", *sizes)
    assert result.code == 2 and "found 24" in result.output and "found 128" in result.output
