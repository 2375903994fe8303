"""Everything that a machine with GPUs has to show, in one command of about 40 minutes: `make gpu-first-hour`.

Environment, tests on the GPU, Triton kernels beside their references, layer and step benchmarks beside every peer that
is installed, 200 steps of training on all GPUs, a profile of five on one. Writes FOLDER/report.md and report.json with
the bars beside the numbers, the profile's trace, and a log for each part; what fails stays in the report. Where tests
and kernels pass, the GPU is written into dsmoe/triton/verdicts.json, and model.fused_kernels: auto uses the kernels on
it from then on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from dsmoe.runtime.command_line import run, user_path

ROOT = Path(__file__).resolve().parent.parent
LAYER = [
    "--tokens",
    "8192",
    "--hidden",
    "2048",
    "--ffn",
    "4096",
    "--experts",
    "8,64",
    "--dtype",
    "bf16",
    "--ranks",
    "1",
    "--load",
    "balanced",
]
STEPS, WARM = 200, 20


@dataclass(frozen=True)
class Part:
    """One command, its limit in seconds, and what it leaves to read."""

    name: str
    command: list[str]
    limit: float
    result: Path | None = None


@dataclass(frozen=True)
class Bar:
    """What was to be reached: `reached` tells a number that passes."""

    what: str
    number: float | None
    expected: str
    reached: bool | None  # None where it could not be measured


def parts(folder: Path, gpus: int) -> list[Part]:
    python = [sys.executable]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus)] if gpus > 1 else []
    benchmark = [*python, "tools/benchmark_moe.py", "--require-gpu"]
    return [
        Part("environment", [*python, "-m", "dsmoe.env", "--json"], 120),
        Part("tests", [*python, "-m", "pytest", "-q", "-m", "gpu"], 600),
        Part("kernels", [*python, "-m", "dsmoe.triton.check"], 300),
        Part("layer", [*benchmark, *LAYER, "--json", str(folder / "layer.json")], 900, folder / "layer.json"),
        Part(
            "step", [*benchmark, "--step", "--quick", "--experts", "64", "--json", str(folder / "step.json")], 600,
            folder / "step.json",
        ),
        Part(
            "training", [*python, *launcher, "launch/train.py", "--config", str(folder / "train.yaml")], 600,
            folder / "run" / "metrics.jsonl",
        ),
        Part(
            "profile",
            [*python, "tools/profile_steps.py", "--config", str(folder / "train.yaml"), "--trace",
             str(folder / "trace.json.gz"), "--json", str(folder / "profile.json"), "parallel.expert_parallel=1",
             "training.global_batch_size=8", "model.num_layers=2"], 300, folder / "profile.json",
        ),
    ]  # fmt: skip


def training_config(folder: Path, gpus: int) -> dict[str, Any]:
    """200 steps of a small mixture on random tokens, its experts spread over up to 8 GPUs."""
    return {
        "model": {
            "num_layers": 8, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 4,
            "sequence_length": 2048, "num_experts": 64, "moe_ffn_hidden_size": 1024, "vocab_size": 2048,
        },
        "router": {"name": "relu", "k": 4}, "parallel": {"expert_parallel": min(8, gpus), "zero_stage": 1},
        "data": {"path": str(folder / "tokens"), "valid_fraction": 0.1},
        "training": {
            "steps": STEPS, "global_batch_size": 8 * gpus, "precision": "bf16", "eval_interval": 0, "eval_sequences": 8,
        },
        "checkpoint": {"interval": 100},
        "logging": {"run_dir": str(folder / "run"), "timings": True, "tensorboard": False},
    }  # fmt: skip


def run_part(part: Part, folder: Path) -> dict[str, Any]:
    """Its status, seconds and output; the log lies in the folder."""
    began, log = time.perf_counter(), folder / f"{part.name}.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        try:
            status = subprocess.run(
                part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT if part.name != "kernels" else subprocess.DEVNULL, timeout=part.limit,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = f"not done after {part.limit:.0f} s"
    return {"status": status, "seconds": round(time.perf_counter() - began, 1), "log": log.name}


def bars(layer: dict | None, kernels: dict | None, lines: list[dict], matmul_tflops: float | None) -> list[Bar]:
    """The numbers that were measured beside what they should be.

    Args:
        layer: what benchmark_moe.py wrote, with `rows`.
        kernels: what dsmoe.triton.check printed.
        lines: of the training's metrics.jsonl.
        matmul_tflops: of a square bf16 product on this GPU.
    """
    rows = {} if layer is None else {(row["name"], row["experts"]): row for row in layer["rows"] if "median_ms" in row}

    def value(name: str, experts: int, field: str) -> float | None:
        return rows.get((name, experts), {}).get(field)

    def share_of_rate(experts: int) -> float | None:
        flops = value("dsmoe topk", experts, "flops_per_second")
        return None if flops is None or matmul_tflops is None else flops / 1e12 / matmul_tflops

    def relu_over_topk(experts: int) -> float | None:
        relu, topk = (value(f"dsmoe {name}", experts, "median_ms") for name in ("relu", "topk"))
        return None if relu is None or topk is None else relu / topk - 1

    timed = [line["seconds_by_part"] for line in lines[WARM:] if "seconds_by_part" in line]
    around = [sum(t.get(p, 0) for p in ("routing", "dispatch", "combine")) / sum(t.values()) for t in timed]
    losses = [line["loss"] for line in lines]
    fallen = median(losses[:5]) - median(losses[-5:]) if len(losses) == STEPS else None
    wrong = None if kernels is None else float(sum(not entry["right"] for entry in kernels["kernels"]))
    return [
        _bar("layer's share of the bf16 matrix rate, E=8", share_of_rate(8), ">= 0.60", lambda x: x >= 0.60),
        _bar("layer's share of the bf16 matrix rate, E=64", share_of_rate(64), ">= 0.45", lambda x: x >= 0.45),
        _bar("ReLU's time over top-k's at equal mean k, E=8", relu_over_topk(8), "<= 0.023", lambda x: x <= 0.023),
        _bar("ReLU's time over top-k's at equal mean k, E=64", relu_over_topk(64), "<= 0.023", lambda x: x <= 0.023),
        _bar("routing, dispatch and combine of a step", median(around) if around else None, "<= 0.12",
             lambda x: x <= 0.12),
        _bar("loss that 200 steps took off", fallen, "> 0", lambda x: x > 0),
        _bar("Triton kernels that differ from their reference", wrong, "0", lambda x: x == 0),
    ]  # fmt: skip


def _bar(what: str, number: float | None, expected: str, passes: Callable[[float], bool]) -> Bar:
    return Bar(what, number, expected, None if number is None else passes(number))


def report(
    machine: str, commit: str, outcomes: dict[str, dict], measured: list[Bar], profile: dict | None = None
) -> str:
    """The page. `profile`: what profile_steps.py wrote."""
    shown = {True: "reached", False: "**missed**", None: "not measured"}
    lines = [f"# First hour of {machine}", "", f"Commit {commit}, `make gpu-first-hour`.", "",
             "| what | measured | expected | |", "|---|---|---|---|"]  # fmt: skip
    for bar in measured:
        number = "-" if bar.number is None else f"{bar.number:.3g}"
        lines.append(f"| {bar.what} | {number} | {bar.expected} | {shown[bar.reached]} |")
    lines += ["", "| part | status | seconds | log |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        status = "passed" if outcome["status"] == 0 else f"**failed**: {outcome['status']}"
        lines.append(f"| {name} | {status} | {outcome['seconds']} | {outcome['log']} |")
    if profile is not None:
        lines += ["", f"{profile['steps']} steps of two layers kept {profile['device']} busy for "
                  f"{profile['total_ms']:.1f} ms; all of it over time: trace.json.gz, for ui.perfetto.dev", "",
                  "| operator | ms | share | calls |", "|---|---|---|---|"]  # fmt: skip
        for row in profile["operators"]:
            lines.append(f"| `{row['name']}` | {row['ms']:.2f} | {row['share']:.1%} | {row['calls']} |")
    return "\n".join(lines) + "\n"


def write_verdict(model: str, commit: str, outcomes: dict[str, dict], path: Path) -> bool:
    """Note that this kind of GPU has passed, if it has."""
    if any(outcomes[name]["status"] != 0 for name in ("tests", "kernels")):
        return False
    known = json.loads(path.read_text())
    known[model] = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "torch": metadata.version("torch"),
        "triton": metadata.version("triton"),
    }  # fmt: skip
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=user_path, default=Path("runs/gpu-first-hour"), help="default: %(default)s")
    folder = parser.parse_args().folder.resolve()
    from dsmoe.errors import ConfigError
    from dsmoe.runtime.device import gpu_count, gpu_model, on_gpu

    if not on_gpu():
        raise ConfigError(["found no GPU that this process may use, expected one"], "gpu-first-hour")
    import yaml

    from dsmoe.lab.children import commit
    from dsmoe.lab.planner.calibrate import matmul_tflops
    from dsmoe.lab.planner.measure import _random_corpus
    from dsmoe.training.metrics import read_lines
    from dsmoe.triton import VERDICTS

    folder.mkdir(parents=True, exist_ok=True)
    gpus, model = gpu_count(), gpu_model()
    _random_corpus(folder / "tokens", 2048)
    (folder / "train.yaml").write_text(yaml.safe_dump(training_config(folder, gpus)))
    rate = matmul_tflops("bf16")
    outcomes = {}
    for part in parts(folder, gpus):
        print(f"{part.name} (at most {part.limit / 60:.0f} minutes)", flush=True)
        outcomes[part.name] = run_part(part, folder)

    def read(path: Path) -> dict | None:
        try:
            text = path.read_text()
            return json.loads(text[text.index("{") :])
        except (OSError, ValueError):
            return None

    metrics = folder / "run" / "metrics.jsonl"
    lines = read_lines(metrics) if metrics.exists() else []
    measured = bars(read(folder / "layer.json"), read(folder / "kernels.log"), lines, rate)
    machine = f"{gpus} x {model}"
    profile = read(folder / "profile.json")
    page = report(machine, commit(), outcomes, measured, profile)
    (folder / "report.md").write_text(page)
    summary = {"machine": machine, "commit": commit(), "matmul_tflops": rate, "parts": outcomes, "profile": profile}
    (folder / "report.json").write_text(json.dumps(summary | {"bars": [vars(bar) for bar in measured]}, indent=2))
    print(page)
    if write_verdict(model, commit(), outcomes, VERDICTS):
        print(f"{VERDICTS.name} now names {model}: commit it, and model.fused_kernels: auto uses the kernels there.")
    return 0 if all(outcome["status"] == 0 for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    run(main)
