"""A comparison whose trainings are a script that invents its numbers: what is tested is all around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dsmoe.lab.study import runner

MODEL = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "sequence_length": 16, "vocab_size": 64,
    "num_experts": 4, "moe_ffn_hidden_size": 16,
}  # fmt: skip

# Density falls from 1 to 0.5 halfway through a relu run, topk stays at 2 of 4; a seed of 13 fails, of 14 hangs. A run
# that branches off another ends half a nat higher.
TRAINING = """
import json, sys, time, yaml
arguments = sys.argv[1:]
config = yaml.safe_load(open(arguments[1]))
for override in arguments[2:]:
    key, _, value = override.partition("=")
    section, name = key.split(".")
    config.setdefault(section, {})[name] = yaml.safe_load(value)
seed, steps = config["training"]["seed"], config["training"]["steps"]
run_dir = config["logging"]["run_dir"]
print("training", seed)
if seed == 13:
    sys.exit("the disk is full")
yaml.safe_dump(config, open(run_dir + "/config.yaml", "w"))
adaptive = config["router"]["name"] == "relu"
short = 0.5 * bool(config["training"].get("decay_from"))
with open(run_dir + "/metrics.jsonl", "w") as file:
    for step in range(int((config["training"].get("decay_from") or "_0").rpartition("_")[2]) + 1, steps + 1):
        experts = 4.0 if adaptive and step <= steps // 2 else 2.0
        line = {"step": step, "tokens": step * 64, "loss": 5 - step / steps - seed / 10, "router_loss": 0.01,
                "tokens_per_second": 100.0, "seconds": 0.5, "experts_per_token": experts, "density": experts / 4,
                "no_expert": 0.0, "expert_imbalance": 1.5}
        if adaptive:
            line["lambda"] = 1e-4 * 1.1 ** step
        if step == steps:
            line |= {"val_loss": 4 - seed / 10 - adaptive * (0.05 + seed / 100) + short, "val_bpb": 2.0,
                     "val_experts_per_token": experts, "val_experts_per_token_by_layer": [experts + 0.5, experts - 0.5]}
        print(json.dumps(line), file=file, flush=True)
        if seed == 14:
            time.sleep(60)
"""


@pytest.fixture
def invented(tmp_path: Path, monkeypatch) -> None:
    """Runs are the script above."""
    monkeypatch.setattr(runner, "train_command", lambda ranks: [str(tmp_path / "train.py")])
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[4]))
    (tmp_path / "train.py").write_text(TRAINING)


@pytest.fixture
def plan_file(tmp_path: Path, invented) -> Path:
    """A plan of topk, relu and a topk that matches relu's compute; two seeds, one corpus."""
    for name in ("topk", "relu"):
        router = {"name": name, "k": 2}
        config = {"model": MODEL, "router": router, "training": {"steps": 20, "global_batch_size": 4, "lr": 0.001}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    plan = {
        "corpora": {"letters": "data/letters"},
        "seeds": [1, 2],
        "baseline": "topk",
        "variants": [
            {"name": "topk", "config": str(tmp_path / "topk.yaml")},
            {"name": "relu", "config": str(tmp_path / "relu.yaml")},
            {"name": "topk (longer)", "config": str(tmp_path / "topk.yaml"), "match_compute_of": "relu"},
        ],
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


@pytest.fixture
def study_file(tmp_path: Path, invented) -> Path:
    """A study of topk and relu over 4, 8, 16 and 32 experts, with two seeds."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"model": MODEL, "router": {"name": "topk", "k": 1}}))
    study = {
        "title": "More experts",
        "question": "Do more experts help?",
        "config": str(tmp_path / "base.yaml"),
        "set": {"training.steps": 24, "training.global_batch_size": 4},
        "seeds": [1, 2],
        "compute": {"experts": 2, "width": 16},
        "x": "model.num_experts",
        "axes": {"model.num_experts": [4, 8, 16, 32]},
        "arms": [{"name": "topk", "set": {"router.name": "topk"}}, {"name": "relu", "set": {"router.name": "relu"}}],
        "law": True,
        "limits": ["memory", "imbalance"],
        "published": [{"source": "A paper, a table", "quantity": "loss", "values": {"topk": {4: 2.0, 8: 1.9}}}],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path
