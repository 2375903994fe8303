"""A router package that is no part of dsmoe, installed: listed, validated, trained, checkpointed and resumed.

The wheel is zipped here by hand, since a build backend need not be there, and installed by pip without a network into
a folder of its own. Commands run in processes that have this folder on their path, as an environment would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from commands import TRAIN, Result, forked, metrics, run, torchrun
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
DEADLINE = 200.0  # seconds


def make_wheel(folder: Path) -> Path:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    distribution = f"{project['name'].replace('-', '_')}-{project['version']}"
    points = project["entry-points"]["dsmoe.routers"]
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: dsmoe-tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[dsmoe.routers]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()),
    }
    files = {path.name: path.read_text() for path in HERE.glob("sigmoid_threshold*.py")}
    files |= {f"{distribution}.dist-info/{name}": text for name, text in info.items()}
    record = f"{distribution}.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in [*files, record])
    wheel = folder / f"{distribution}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the package in it."""
    folder = tmp_path_factory.mktemp("site")
    wheel = make_wheel(tmp_path_factory.mktemp("wheel"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True, timeout=DEADLINE)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A tiny run on tiny data that tools/prepare_data.py made."""
    folder = tmp_path_factory.mktemp("plugin run")
    for number in range(8):
        lines = (f"Token {number + line} goes to expert {line % 4} of rank {number % 2}.\n" for line in range(120))
        (folder / f"{number}.txt").write_text("".join(lines))
    options = ["--output", str(folder / "data"), "--vocab-size", "300", "--valid-fraction", "0.2", "--workers", "1"]
    made = forked("tools/prepare_data.py", str(folder / "*.txt"), *options)
    assert made.code == 0, made.output
    tree = {
        "model": {
            "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "sequence_length": 32, "num_experts": 4,
            "moe_ffn_hidden_size": 16,
        },
        "router": {"name": "sigmoid_threshold", "k": 2.0},
        "data": {"path": str(folder / "data")},
        "training": {"steps": 4, "global_batch_size": 4, "warmup_steps": 0, "eval_interval": 0, "eval_sequences": 4},
        "checkpoint": {"interval": 2},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def with_package(site: Path) -> dict[str, str]:
    """The environment of a process that can import the package."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))}


def test_listed_and_validated_like_any_other(site, config, tmp_path):
    """The names there are, and what a wrong value of the model's makes the plugin's own check say."""
    script = (
        "import sys\n"
        "from dsmoe.config import load_config\n"
        "from dsmoe.errors import ConfigError\n"
        "from dsmoe.routers.registry import available, option_classes\n"
        "print('available:', *available())\n"
        "try:\n"
        "    load_config(sys.argv[1], ['router.k=9.0'], option_classes())\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    program = tmp_path / "program.py"
    program.write_text(script)
    said = forked(str(program), str(config), environment=with_package(site)).output
    assert "sigmoid_threshold" in next(line for line in said.splitlines() if line.startswith("available:")).split()
    assert "router.k: found 9.0, expected at most model.num_experts (4)" in said


def test_unknown_options_are_refused_at_the_start(site, config):
    overrides = ["router.rates=0.1", "router.rate=-1.0"]
    done = forked(TRAIN, "--config", str(config), *overrides, environment=with_package(site))
    assert done.code == 2, done.output
    assert "router.rates: unknown key (did you mean 'rate'?)" in done.output
    assert "router.rate: found -1.0, expected greater than 0" in done.output
    assert "Traceback" not in done.output


def test_without_the_package_the_name_is_refused(config):
    done = forked(TRAIN, "--config", str(config))
    assert done.code == 2, done.output
    assert "router.name: found 'sigmoid_threshold', expected one of" in done.output


def test_trained_checkpointed_and_resumed(site, config, tmp_path):
    """At once under torchrun; in two parts in processes that are forked."""
    arguments = [TRAIN, "--config", str(config), "parallel.expert_parallel=2", "parallel.zero_stage=2"]

    def checked(done: Result, run_dir: Path) -> list[dict]:
        assert done.code == 0, done.output
        return metrics(run_dir)

    def train_parts(*overrides: str) -> list[dict]:
        run_dir = f"logging.run_dir={tmp_path / 'parts'}"
        done = forked(*arguments, run_dir, *overrides, processes=2, environment=with_package(site))
        return checked(done, tmp_path / "parts")

    command = torchrun(2, *arguments, f"logging.run_dir={tmp_path / 'whole'}")
    whole = checked(run(command, environment=with_package(site)), tmp_path / "whole")
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert whole[0]["threshold"] != whole[3]["threshold"]
    assert [line["step"] for line in train_parts("training.stop_at=2")] == [1, 2]
    parts = train_parts()
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    for resumed, expected in zip(parts, whole, strict=True):
        for name in ("loss", "grad_norm", "density", "threshold"):
            assert resumed[name] == pytest.approx(expected[name], rel=1e-6), (resumed["step"], name)
    state = load_file(max((tmp_path / "parts").glob("checkpoints/step_*")) / "state.safetensors")
    assert state["thresholds"].shape == (2, 4)
    assert float(state["thresholds"].mean()) == pytest.approx(whole[3]["threshold"], rel=1e-6)
