"""The command `dsmoe`: help, mistakes, and that neither costs the time of loading the frameworks."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from dsmoe import __version__
from dsmoe.cli import COMMANDS, main
from dsmoe.runtime.command_line import user_path

ALL = {name: entry for group in COMMANDS.values() for name, entry in group.items()}


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for group, commands in COMMANDS.items():  # each under its heading
        _, _, block = text.partition(f"\n{group.lower()}:\n")
        assert [line.split()[0] for line in block.partition("\n\n")[0].splitlines()] == list(commands)
    assert len(COMMANDS) >= 3 and "examples:" in text
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


class Built(Exception):
    """A command's parser, before it reads anything."""


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from options_of(subparser)
        else:
            yield action


@pytest.mark.parametrize("module", sorted({module for module, *_ in ALL.values()}))
def test_every_path_on_a_command_line_may_begin_with_the_home_folder(module, monkeypatch):
    """A shell leaves ~ alone in --out=~/x and between quotes."""

    def built(parser, *_):
        raise Built(parser)

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, built)
    with pytest.raises(Built) as caught:
        import_module(f"dsmoe.cli.{module}").main([])
    (parser,) = caught.value.args
    named = re.compile(r"FILE|FOLDER|PATH|RUN|EXPORT|DIR|YAML|DATASET|PAGE|TRACE|OUT|OTHER|STUDY", re.IGNORECASE)
    read_elsewhere = {"sources", "valid", "texts"}  # each a path or something else: `find_files` and `read_texts`
    for option in options_of(parser):
        is_path = option.type is Path or isinstance(option.default, Path) or option.dest in ("model", "run", "config")
        if is_path or (named.search(option.metavar or "") and option.dest not in read_elsewhere):
            assert option.type in (user_path, os.path.expanduser), option.option_strings or option.dest


def test_the_home_folder_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/x") == Path("/home/somebody/x") and user_path("here/~") == Path("here/~")
