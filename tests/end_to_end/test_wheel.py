"""A wheel and nothing else of ours: a virtual environment that has the libraries of this one, and dsmoe from a wheel
that was just built, in a folder that is no checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, Result, finish, free_port, start

TINY = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.num_query_groups=2",
    "model.sequence_length=32", "model.num_experts=4", "model.moe_ffn_hidden_size=16", "parallel.expert_parallel=1",
    "training.steps=4", "training.global_batch_size=4", "training.eval_sequences=4", "logging.tensorboard=false",
]  # fmt: skip
TRAINER = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert all(p.isfinite().all() and p.abs().max() < 10 for p in model.parameters())
ids = tokenizer("expert " * 200)["input_ids"][:128]
rows = [{"input_ids": ids[i : i + 32], "labels": ids[i : i + 32]} for i in range(0, 96, 8)]
arguments = TrainingArguments(out + "-trainer", max_steps=5, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                              learning_rate=5e-3, logging_steps=1, save_strategy="no", disable_tqdm=True)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model(out)
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
assert len(losses) == 5 and losses[-1] < losses[0], losses
import dsmoe
print(json.dumps({"losses": losses, "dsmoe": dsmoe.__file__}))
"""

# Of the new environment too: runs commands there in processes that have the wheel's dsmoe loaded.
FORKING = """
import json, os, sys
from dataclasses import asdict
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # libraries print while they are imported
from commands import forked
for line in sys.stdin:
    print(json.dumps(asdict(forked(*json.loads(line), cwd="."))), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of the new environment."""
    place = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", str(place), str(ROOT)], check=True, timeout=200)
    (wheel,) = place.glob("dsmoe-*.whl")
    venv.create(place / "venv", with_pip=False)
    interpreter = place / "venv" / "bin" / "python"
    libraries = Path(sysconfig.get_path("purelib", vars={"base": str(place / "venv")}))
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # no .pth of there is read
    options = ["--no-deps", "--no-index", "--ignore-installed", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--python", str(interpreter), "install", *options, str(wheel)], check=True, timeout=200)
    return interpreter


def run(python: Path, place: Path, *command: str) -> Result:
    """A command of the new environment, in a folder that is no checkout."""
    environment = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    result = finish(start([str(python.with_name(command[0])), *command[1:]], place, environment))
    assert result.code == 0 and not re.search(r"Warning|WARNING", result.output), f"{command}\n{result.output}"
    return result


@pytest.fixture(scope="module")
def place(python, tmp_path_factory) -> Path:
    """A folder with a dataset."""
    folder = tmp_path_factory.mktemp("no checkout")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(12):
        lines = (f"The token {number * line} goes to expert {line % 7}.\n" for line in range(60))
        (texts / f"{number}.txt").write_text("".join(lines))
    options = ["--output", "data", "--vocab-size", "310", "--valid-fraction", "0.2", "--workers", "1"]
    run(python, folder, "dsmoe", "prepare-data", "texts", *options)
    return folder


@pytest.fixture(scope="module")
def forks(python, place) -> Iterator[Callable[..., str]]:
    """forks(command...) runs a command as `run` does, in a process that has the libraries loaded; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([str(python), "-c", FORKING], cwd=place, env=environment, **pipes) as process:

        def fork(script: str, *arguments: str) -> str:
            print(json.dumps([script, *arguments]), file=process.stdin, flush=True)
            result = json.loads(process.stdout.readline())
            assert result["code"] == 0, f"{script} {arguments}\n{result['output']}"
            return result["output"]

        yield fork


def test_from_training_to_hugging_face_and_back(python, place, forks):
    """train -> export -> from_config -> Trainer -> save -> import -> train on 2 ranks.

    More than 20 s where cores are shared: torch is imported by the process that forks, a launcher and its ranks, and
    the processes that compare an export with its source.
    """
    dsmoe = str(python.with_name("dsmoe"))
    train = ["train", "--config", "configs/quickstart.yaml", "data.path=data", "logging.run_dir=runs/first"]
    forks(dsmoe, *train, *TINY)
    forks(dsmoe, "export", "runs/first", "exported")
    (place / "trainer.py").write_text(TRAINER)
    said = json.loads(forks("trainer.py", "exported", "saved").strip().splitlines()[-1])
    assert Path(said["dsmoe"]).is_relative_to(python.parents[1])
    forks(dsmoe, "import", "saved", "runs/second")
    report = json.loads((place / "runs" / "second" / "import_report.json").read_text())
    assert report["parity"]["gate"] and any("controller" in what for what in report["lost"])
    port = str(free_port())
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "dsmoe"]
    overrides = ["data.path=data", "parallel.expert_parallel=2", *(o for o in TINY if o.startswith(("tr", "log")))]
    run(python, place, "python", *launcher, "train", "--config", "runs/second/config.yaml", *overrides)
    lines = (place / "runs" / "second" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[-1])["val_loss"] > 0


def test_a_study_and_a_plan_need_no_checkout(python, place, forks):
    """A study starts its runs as `python -m dsmoe train`, with the configurations that the wheel has."""
    study = {
        "title": "One", "question": "Does it run?", "config": "configs/recipes/topk.yaml", "seeds": [1],
        "set": dict(o.split("=") for o in TINY) | {"data.path": "data"}, "arms": [{"name": "topk"}],
    }  # fmt: skip
    (place / "study.yaml").write_text(json.dumps(study))
    run(python, place, "dsmoe", "study", "run", "study.yaml", "--out", "runs/study")
    record = json.loads(next((place / "runs" / "study").glob("*/*/*/cell.json")).read_text())
    assert record["status"] == "done" and record["command"][:3] == ["-m", "dsmoe", "train"]
    plan = ["configs/quickstart.yaml", "--hardware", "configs/hardware/h100.yaml", "model.vocab_size=2048",
            "training.precision=bf16"]  # fmt: skip
    assert "fits" in forks(str(python.with_name("dsmoe")), "plan", "--config", *plan)
