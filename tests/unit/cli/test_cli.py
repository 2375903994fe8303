"""The command `dsmoe`: help, mistakes, and that neither costs the time of loading the frameworks."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module

import pytest

from dsmoe import __version__
from dsmoe.cli import COMMANDS, main

ALL = {name: entry for group in COMMANDS.values() for name, entry in group.items()}


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ALL) and "examples:" in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_a_command_it_says_which_there_are(capsys):
    assert main([]) == 2
    assert "prepare-data" in capsys.readouterr().out


def test_a_mistyped_command_gets_the_nearest_name(capsys):
    assert main(["exprot"]) == 2
    assert "no command 'exprot' (did you mean 'export'?)" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsmoe {__version__}\n"


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help_under_its_own_name(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dsmoe"])
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    usage, _, rest = text.partition("\n\n")
    assert f"dsmoe {name}" in usage or name == "env"
    assert re.search(rf"^ *dsmoe {name} ", rest, re.MULTILINE) or name == "env", text  # an example


@pytest.mark.parametrize("module", sorted({module for module, *_ in ALL.values()}))
def test_every_module_has_a_main_that_takes_arguments(module):
    assert callable(import_module(f"dsmoe.cli.{module}").main)


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "--help-config", "training"], ["nothing"], ["plan", "--help"]]
)
def test_help_and_mistakes_load_no_framework(words):
    script = (
        "import sys; from dsmoe.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'megatron')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_output_that_nobody_reads_on_is_no_error():
    script = f"{sys.executable} -m dsmoe train --help-config | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("model: ") and done.stderr == ""
