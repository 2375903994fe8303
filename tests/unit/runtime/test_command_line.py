"""Help and mistakes of a command line are answered before anything slow is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import ROOT

from dsmoe.runtime.device import ALLOCATOR, ALLOCATOR_NAMES

SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py"))
HEAVY = {"torch", "deepspeed", "megatron", "transformers", "matplotlib"}  # seconds each
PROGRAM = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *({HEAVY} & set(sys.modules)))
"""
ABSENT = "no/such/path"
PLAN = ["tools/plan.py", "--hardware", "configs/hardware/h100.yaml"]
MISTAKES = {
    "option": (["launch/train.py", "--no-such-option"], "unrecognized arguments"),
    "config": (["launch/train.py", "--config", ABSENT], "cannot read the file"),
    "config of a plan": ([*PLAN, "--config", ABSENT], "cannot read the file"),
    "not YAML": (["launch/train.py", "--config", "README.md"], "not valid YAML"),
    "sampling": (["launch/generate.py", ABSENT, "--tokens", "0"], "--tokens: found 0"),
    "run to generate from": (["launch/generate.py", ABSENT], "does not exist; expected a run folder"),
    "run to evaluate": (["launch/evaluate.py", ABSENT], "does not exist; expected a run folder"),
    "run to export": (["tools/convert_checkpoint.py", "export", ABSENT, "out"], "does not exist; expected a run"),
    "model to import": (["tools/convert_checkpoint.py", "import", ABSENT, "out"], "does not exist; expected a folder"),
    "checkpoint to verify": (["tools/convert_checkpoint.py", "verify", ABSENT], "does not exist; expected a run"),
    "text": (["tools/prepare_data.py", ABSENT, "--output", "out"], "there is no such file"),
    "routes": (["tools/plan.py", "replay", ABSENT, "--ep", "2"], "does not exist; expected a .npz"),
    "measurement": (["tools/plan.py", "calibrate", "--rounds", "0"], "--rounds: found 0"),
}


def answer(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def answers() -> dict[str, subprocess.CompletedProcess[str]]:
    commands = {name: arguments for name, (arguments, _) in MISTAKES.items()}
    commands |= {script: [script, "--help"] for script in SCRIPTS}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(answer, commands.values()), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(answers, script):
    assert answers[script].returncode == 0 and len(answers[script].stdout) > 100
    assert answers[script].stdout.splitlines()[-1] == "imported:"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_anything_heavy_is_imported(answers, name):
    assert answers[name].returncode == 2, answers[name].stderr
    assert MISTAKES[name][1] in answers[name].stderr
    assert "Traceback" not in answers[name].stderr
    assert answers[name].stdout.splitlines()[-1] == "imported:"


def test_a_command_configures_the_allocator_before_torch_reads_how():
    program = f"import os; from dsmoe.runtime.command_line import run; run(lambda: print(os.environ[{ALLOCATOR[0]!r}]))"
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_NAMES}
    answered = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert answered.stdout.strip() == ALLOCATOR[1], answered.stderr
