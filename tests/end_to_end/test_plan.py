"""The planner's command: a trillion parameters on several sizes of a cluster, mistakes all at once, recorded routes."""

from __future__ import annotations

import json

import numpy as np
from commands import forked

from dsmoe.training.trace import path_of, trace_of, write_trace

TOOL = "tools/plan.py"
TRILLION = ["--config", "configs/plans/trillion.yaml", "--hardware", "configs/hardware/h100.yaml"]


def test_a_trillion_parameters_on_several_sizes(place):
    sizes = ["--nodes", "4,64,128", "--search", "--tokens", "1e12", "--json", str(place / "plans.json")]
    result = forked(TOOL, *TRILLION, *sizes, "router.name=topk", "router.k=8")  # `plan` may be left out
    assert result.code == 0, result.output
    assert "nothing fits" in result.output and "cheapest" in result.output
    found = json.loads((place / "plans.json").read_text())
    assert {one["ranks"] for one in found} == {32, 512, 1024} and all(one["parameters"] > 1e12 for one in found)
    assert any(one["fits"] for one in found)


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


def test_routes_are_replayed_up_to_a_rank_for_each_expert(place):
    maps = [np.random.default_rng(0).random((256, 64)) < 0.1]
    write_trace(path_of(place / "routes", 1), trace_of(maps, np.arange(256), 16, 1))
    hardware = ["--hardware", "configs/hardware/h100.yaml", "--json", str(place / "replay.json")]
    result = forked(TOOL, "replay", str(place / "routes"), "--ep", "8,64", *hardware)
    assert result.code == 0, result.output
    rows = json.loads((place / "replay.json").read_text())["rows"]
    assert {row["placement"] for row in rows} == {
        "forced balance",
        "contiguous",
        "round robin",
        "load-aware",
        "replicated",
    }
    result = forked(TOOL, "replay", str(place / "routes"), "--ep", "8,24,128")
    assert result.code == 2 and "found 24" in result.output and "found 128" in result.output
