"""Every command in a ```bash block of README.md runs, in a fresh copy of the checkout whose path has spaces; and
those of docs/tutorial.md, one after another, in an empty folder.

The commands are the page's own; `SHORTER` lists what is appended to make them short. The first of each program starts
as a reader would start it; a later one of the same program, and what `make quickstart` starts, runs in forked
processes. A ```console block is a command
with its output, which must be exactly that. Blocks of another kind (text, toml) are not run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, Result, beside_python, forked, free_port, loaded_programs, run

README = (ROOT / "README.md").read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """One line each."""
    scripts = [re.sub(r" \\\n +", " ", block) for kind, block in blocks(text) if kind == "bash"]
    return [line for script in scripts for line in script.splitlines()]


COMMANDS = commands(README)

TINY = (
    "model.num_layers=1 model.hidden_size=32 model.sequence_length=64 model.moe_ffn_hidden_size=16 "
    "training.warmup_steps=1 training.eval_sequences=2 logging.tensorboard=false"
)
SHORTER = [  # what a command contains -> what is appended; the first that fits
    ("prepare-data stdlib", "--limit-mb 0.4"),
    ("training.steps=200", f"{TINY} training.steps=4"),
    ("training.steps=450", f"{TINY} training.steps=3"),
    ("launch/train.py", f"{TINY} training.steps=2"),
    ("make quickstart", f"ARGS='{TINY} training.steps=4'"),
    ("make test", "ARGS=--version"),
]
# Installing needs the network: make is told that .venv is up to date, and does all the rest.
INSTALLED = ("make ", "make -o .venv/.installed ")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("readme") / "a checkout with spaces"
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(list_files, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv" / "bin").mkdir(parents=True)
    for program in Path(sys.executable).parent.iterdir():
        (copy / ".venv" / "bin" / program.name).symlink_to(program)
    # What `make quickstart` prepares by itself, small.
    options = "stdlib --output data/quickstart --vocab-size 512 --limit-mb 0.4"
    made = forked("tools/prepare_data.py", *options.split(), cwd=copy, environment=environment(copy))
    assert made.code == 0, made.output
    return copy


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}


def shell(command: str, folder: Path) -> Result:
    return run(["bash", "-c", command], cwd=folder, environment=environment(folder))


def program(command: str) -> str | None:
    """The Python file that a command starts, or `dsmoe` with the name of its command."""
    words = shlex.split(command, comments=True)
    if words and words[0] == "dsmoe":
        return " ".join(words[:2])
    return next((word for word in words if word.endswith(".py")), None)


def shell_or_fork(command: str, folder: Path) -> Result:
    if command == "make quickstart":  # which starts the programs of the other commands
        loaded = loaded_programs(folder / ".venv" / "bin")
        return run(["bash", "-c", shortened(command)], cwd=folder, environment=environment(folder) | loaded)
    started = program(command)
    if started is None or started not in map(program, COMMANDS[: COMMANDS.index(command)]):
        return shell(shortened(command), folder)
    launcher, _, arguments = shortened(command).partition(started)
    processes = re.search(r"(?:--num_gpus|--nproc-per-node)[ =](\d+)", launcher)
    name, *before = started.split()
    words = [beside_python(name) or name, *before, *shlex.split(arguments)]
    return forked(*words, processes=int(processes[1]) if processes else 1, cwd=folder, environment=environment(folder))


def shortened(command: str) -> str:
    command = command.partition("  #")[0]
    extra = next((extra for mark, extra in SHORTER if mark in command), "")
    # Another job on this machine may have the launchers' usual port.
    for launcher in ("deepspeed", "torchrun"):
        command = re.sub(rf"^{launcher} ", f"{launcher} --master_port {free_port()} ", command)
    return f"{command.replace(*INSTALLED)} {extra}".strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, checkout):
    """More than 20 s where cores are shared: new interpreters import torch and transformers."""
    result = shell_or_fork(command, checkout)
    assert result.code == 0, result.output
    own = [line for line in result.output.splitlines() if not (line.startswith("[") and "deepspeed " in command)]
    assert not any(re.search(r"Warning|WARNING", line) for line in own), result.output  # of a library
    if command == "make quickstart":
        check_quickstart(result.output, checkout)


def test_the_tutorial(tmp_path):
    """All but the export, whose like README.md has."""
    lines = [line for line in commands((ROOT / "docs" / "tutorial.md").read_text()) if line.startswith("dsmoe ")]
    assert [line.split()[1] for line in lines] == ["prepare-data", "train", "inspect", "export", "prune"]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for command in (line for line in lines if not line.startswith("dsmoe export")):
        words = [beside_python("dsmoe"), *shlex.split(shortened(command))[1:]]
        done = forked(*words, cwd=tmp_path)
        assert done.code == 0, done.output
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")
    assert "8 -> 6 experts a layer" in done.output and (tmp_path / "runs" / "smaller" / "config.yaml").is_file()


def check_quickstart(output: str, checkout: Path) -> None:
    for stage in ("1/4  Prepare the data", "2/4  Train half of the steps", "3/4  Resume and finish", "4/4  Generate"):
        assert stage in output
    assert "training.stop_at=2" in output and "stopped at step 2" in output
    for row in ("loss", "bits per byte", "speed", "experts per token", "lambda", "parameters", "What to try next"):
        assert f"\n{row}" in output
    assert "[INFO]" not in output and "[WARNING]" not in output and "Traceback" not in output
    assert (checkout / "runs" / "quickstart" / "checkpoints" / "step_00000004").is_dir()


@pytest.mark.parametrize("block", [block for kind, block in blocks(README) if kind == "console"])
def test_output_shown(block, checkout):
    command, _, expected = block.partition("\n")
    assert command.startswith("$ ")
    result = shell(command.removeprefix("$ "), checkout)
    assert result.code == 2
    shown = [line for line in result.output.splitlines() if not line.startswith("[")]  # DeepSpeed's own log
    assert shown == expected.splitlines()


def test_the_router_table_is_complete():
    from dsmoe.routers import available

    # Other tests of the same session may have registered routers of their own.
    ours = {name for name, router in available().items() if router.__module__.startswith("dsmoe.")}
    table = README.partition("## Routers")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ours
