"""tools/benchmark_moe.py as a user calls it, on tiny sizes: every row, in tables and in valid JSON."""

from __future__ import annotations

import json

import pytest
from commands import forked

from dsmoe import native

TOOL = "tools/benchmark_moe.py"
SIZES = ("--tokens", "64", "--hidden", "32", "--ffn", "16")
ENVIRONMENT = {"COLUMNS": "120"}


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "layer.json"
    options = ["--quick", "--ranks", "2", "--experts", "4", *SIZES, "--json", str(path)]
    result = forked(TOOL, *options, environment=ENVIRONMENT, loaded=True)
    assert result.code == 0, result.output
    return result.output, json.loads(path.read_text(), parse_constant=pytest.fail)


def test_layer_on_two_ranks_has_every_row(layer):
    output, actual = layer
    routers = {"topk", "topk_bias", "relu", "top_p", "dtop_p", "expert_threshold", "quantile", "aoe", "routing_free"}
    products = {"torch.mm fp32"} | (set() if native.unavailable() else {"micro-kernel fp32"})
    names = {"dense SwiGLU", "copy", "experts' products alone", "DeepSpeed AutoEP", "DeepSpeed MoE"} | products
    names |= {f"dsmoe {name}" for name in routers}
    names |= {"route", "plan + dispatch", "experts", "combine"}
    names |= {"dsmoe aoe, latents sent", "dsmoe routing_free, latents sent", "dsmoe topk, 4 parts"}
    assert [row for row in actual["layer"] if "error" in row] == []
    assert {row["name"] for row in actual["layer"]} == names
    assert all(name in output for name in names - products - {"copy"}) and any(name in output for name in products)
    assert f"cores of {actual['machine']['cpu']}" in output and "chosen for experts, float32, H=32, F=16" in output
    assert actual["commit"] and actual["date"] and actual["machine"]["cpu"] and actual["versions"]["torch"]


def test_layers_agree_and_their_traffic_is_counted_over_two_ranks(layer):
    rows = {row["name"]: row for row in layer[1]["layer"]}
    for name in ("DeepSpeed AutoEP", "DeepSpeed MoE", "dsmoe topk"):
        assert rows[name]["difference"] < 1e-5
    sent = rows["dsmoe topk"]["sent_bytes"]
    # 32 tokens a rank, two experts each. A token crosses once or not at all: forward and back, both ways.
    assert 32 * 32 * 4 < sent < rows["DeepSpeed AutoEP"]["sent_bytes"]
    assert rows["dsmoe routing_free, latents sent"]["sent_bytes"] > rows["dsmoe routing_free"]["sent_bytes"]
    assert all(row["memory_over_ideal"] > 0 for row in rows.values() if row["kind"] in ("peer", "ours"))


def test_steps_of_all_models(tmp_path):
    path = tmp_path / "step.json"
    options = [
        "--step", "--quick", "--rounds", "2", "--experts", "4", *SIZES, "--layers", "2",
        "--heads", "4", "--vocabulary", "64", "--sequence", "16", "--only", "parts,matmuls and,dsmoe ep,relu,huge",
        "--json", str(path),
    ]  # fmt: skip
    result = forked(TOOL, *options, environment=ENVIRONMENT, loaded=True)
    assert result.code == 0, result.output
    tree = json.loads(path.read_text(), parse_constant=pytest.fail)
    parts = [row["part"] for row in tree["parts"]]
    expected = set() if native.unavailable() else {"attention with rotary embedding", "RMSNorm of tokens"}
    assert expected <= set(parts) and all(part in result.output for part in parts)
    assert all(row["native"] > 0 < row["torch"] for row in tree["parts"])
    actual = tree["step"]
    rows = {row["name"]: row for rows in actual.values() for row in rows}
    assert [row for row in rows.values() if "error" in row] == []
    assert set(rows) == {
        "matmuls and attention", "dsmoe EP=2", "dsmoe relu", "transformers grouped_mm, huge pages",
        "DeepSpeed AutoEP EP=2, huge pages",
    }  # fmt: skip
    for row in rows.values():
        assert row["rounds"] == 2 and row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
    assert rows["dsmoe relu"]["mean_experts"] == pytest.approx(2, abs=0.4)
    assert set(rows["dsmoe EP=2"]["stage_seconds"]) == {"forward", "backward", "optimizer"}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--experts", "3", "--ranks", "2"), "experts: found 3"),
        (("--experts", "4", "--skew", "99:1"), "one expert would get"),
        (("--skew", "thirty"), "PERCENT:EXPERTS"),
        (("--step", "--tokens", "100"), "expected an even number"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, expected):
    result = forked(TOOL, *arguments)
    assert result.code == 2
    assert expected in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_rank_that_dies_is_an_error_row():
    from dsmoe.lab.benchmark.jobs import run_job
    from dsmoe.lab.benchmark.problem import Problem
    from dsmoe.lab.benchmark.worker import Job

    (row,) = run_job(Job(Problem(dtype="fp8", tokens=64, hidden=32, ffn=16), ["balanced"], ""))
    assert "KeyError" in row["error"] and row["kind"] == "job" and row["experts"] == 8
