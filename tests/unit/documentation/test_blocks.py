"""Code on pages: parsers take the command lines, make has the targets, YAML and TOML mean something, Python runs.

What commands of README.md and docs/tutorial.md do is run by tests/end_to_end/test_readme.py.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from dsmoe.cli import COMMANDS, main
from dsmoe.config import validate_config
from dsmoe.optim.base import Optimizer, State
from dsmoe.routers.base import Router
from dsmoe.routers.registry import option_classes

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Of programs that are not ours, as pages name them.
OTHERS = {
    "--hostfile", "--num_gpus", "--num_nodes", "--master_port", "--master_addr", "--launcher", "--module", "--include",
    "--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint", "--max-restarts",
    "--nodes", "--gpus-per-node", "--host", "--oversubscribe", "--trust-remote-code", "--requeue", "--logdir",
}  # fmt: skip


def blocks(page: Path, *kinds: str) -> list[str]:
    actual = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, kind, text in actual if kind in kinds]


@cache
def scripts() -> dict[str, list[str]]:
    """tools/plan.py and its like -> the words of the `dsmoe` command that they are."""
    names = {module: [name] for group in COMMANDS.values() for name, (module, first, _) in group.items() if not first}
    actual = {}
    for path in (*ROOT.glob("launch/*.py"), *ROOT.glob("tools/*.py")):
        module = re.search(r"^from dsmoe\.cli\.(\w+) import main", path.read_text(), re.MULTILINE)
        if module:
            actual[str(path.relative_to(ROOT))] = names.get(module[1], [])  # convert: the command is its first argument
    return actual


@cache
def help_of(words: tuple[str, ...]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return output.getvalue()


@cache
def options_of(words: tuple[str, ...]) -> set[str]:
    """Of a command, with those of the subcommand that its words name."""
    actual = set(OPTION.findall(help_of(words[:1])))
    subcommands = re.search(r"^usage: .*? \{([\w,-]+)\} \.\.\.", help_of(words[:1]), re.MULTILINE)
    if subcommands:
        named = [word for word in words[1:2] if word in subcommands[1].split(",")]
        for name in named or subcommands[1].split(","):
            actual |= set(OPTION.findall(help_of((words[0], name))))
    return actual


def started(words: list[str]) -> tuple[str, list[str]] | None:
    """What a command line starts of ours, and with which arguments: `dsmoe`, a file, `-m` and a module, or `make`."""
    if words[:1] == ["make"]:
        return "make", words[1:]
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        if word == "dsmoe" and rest:
            return "dsmoe", rest
        if word == "-m" and rest and rest[0].startswith("dsmoe."):
            return f"-m {rest[0]}", rest[1:]
        if re.fullmatch(r"(?:tools|launch|tests/nodes)/[\w/]+\.py", word):
            return word, rest
    return None


def command_lines(text: str) -> list[tuple[str, list[str]]]:
    actual = []
    for line in re.sub(r" \\\n\s*", " ", text).splitlines():
        with contextlib.suppress(ValueError):  # an output with an apostrophe
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            actual.append(started([word for word in words if word != "..."]))
    return [line for line in actual if line is not None]


def commands(text: str) -> list[list[str]]:
    """The words after `dsmoe`, for every line of code that runs it, as itself or as one of the scripts."""
    ours = [line for line in command_lines(text) if line[0] == "dsmoe" or line[0] in scripts()]
    return [[*scripts().get(program, []), *arguments] for program, arguments in ours]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_have_the_options_they_are_shown_with(page):
    text = page.read_text(encoding="utf-8")
    code = "\n".join([text for *_, text in BLOCK.findall(text)] + re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)))
    known = {name for group in COMMANDS.values() for name in group}
    wrong = []
    for words in commands(code):
        if words[0] in known:
            options = [word.partition("=")[0] for word in words[1:] if OPTION.match(word)]
            wrong += [(words[0], option) for option in options if option not in options_of(tuple(words[:2]))]
    assert not wrong


class Parsed(BaseException):
    """A parser took its arguments. No `Exception`, which commands explain to their user."""


@pytest.fixture
def parsers_only(monkeypatch):
    """Commands end when their parser has taken the arguments."""

    def ending(parse):
        def parse_and_end(self, args=None, namespace=None):
            parse(self, args, namespace)
            raise Parsed

        return parse_and_end

    monkeypatch.setattr("dsmoe.runtime.command_line.run", lambda main: main())
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))


def parse(program: str, arguments: list[str], monkeypatch) -> None:
    """Raises `Parsed` where a parser takes the arguments, and any error of it otherwise."""
    if program == "dsmoe" or program in scripts():
        raise SystemExit(main([*scripts().get(program, []), *arguments]))
    elif program == "make":
        told = ["make", "-n", "-o", ".venv/.installed", *arguments]
        done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        variables = {word.partition("=")[0] for word in arguments if "=" in word}
        assert all(f"\n{name} ?=" in (ROOT / "Makefile").read_text() for name in variables), variables
        for line in command_lines(done.stdout):
            with contextlib.suppress(Parsed):
                parse(*line, monkeypatch)
    else:
        name = program.removeprefix("-m ")
        path = ROOT / (f"{name.replace('.', '/')}.py" if program.startswith("-m ") else name)
        path = path if path.is_file() else path.with_suffix("") / "__main__.py"
        if re.search(r"\.parse_(?:intermixed_)?args\(", path.read_text()):  # others would start to work
            monkeypatch.setattr(sys, "argv", [str(path), *arguments])
            runpy.run_path(str(path), run_name="__main__")
    raise Parsed


def shown(page: Path) -> list[tuple[str, list[str]]]:
    """Of a page's blocks of code, those that are only indented too."""
    text = page.read_text(encoding="utf-8")
    indented = re.findall(r"^ {4}(\S.*)$", BLOCK.sub("", text), re.MULTILINE)
    return command_lines("\n".join([*blocks(page, "bash", "console", "sh"), *indented]))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_command_lines_are_taken_by_their_parsers(page, parsers_only, monkeypatch, capsys):
    """Subcommands, options, values and how many arguments there are; of make, targets and what they start."""
    for program, arguments in shown(page):
        try:
            parse(program, arguments, monkeypatch)
        except SystemExit as left:
            assert left.code == 0, (program, arguments, capsys.readouterr().err)
        except Parsed:
            continue


def test_what_a_parser_refuses_is_found(parsers_only, monkeypatch):
    """Or the test above would hold nothing."""
    for line in (
        "dsmoe plan reply RUN", "dsmoe export RUN", "dsmoe export RUN OUT --dtype fp8", "make ARGS=--quik benchmark",
        "python launch/supervise.py --nodes 3", "python -m dsmoe.lab.study.probe --all-of-it",
        "python tools/measure_diagnostics.py --configuration FILE", "deepspeed --module dsmoe generate",
        "dsmoe exprot RUN OUT",
    ):  # fmt: skip
        [(program, arguments)] = command_lines(line)
        with pytest.raises(SystemExit) as left:
            parse(program, arguments, monkeypatch)
        assert left.value.code == 2, line
    with pytest.raises(AssertionError, match="No rule to make target"):
        parse("make", ["gpu-tests"], monkeypatch)
    with pytest.raises(AssertionError, match="ARG"):
        parse("make", ["test", "ARG=-x"], monkeypatch)
    assert sum(len(shown(page)) for page in PAGES) > 60


SCRIPTS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("tests/nodes/*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_what_there_is(script):
    """Within functions too, which run for hours before they come to it, or on machines that are not here."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "dsmoe":
            module = import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or import_module(f"{node.module}.{name}"), name


@pytest.mark.parametrize("script", ["soak.py", "measure_dispatchers.py"])
def test_scripts_that_no_test_runs_can_start(script):
    """As their users start them: pytest's own path has more in it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "tests" / "nodes" / script), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (shown.returncode, shown.stderr) == (0, "") and "two hosts" in shown.stdout


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_named_in_text_exist(page):
    known = OTHERS | {option for group in COMMANDS.values() for name in group for option in options_of((name,))}
    for script in ("launch/supervise.py", "tools/gpu_first_hour.py", "tools/quickstart.py", "tests/nodes/soak.py"):
        known |= set(OPTION.findall((ROOT / script).read_text()))
    known |= set(OPTION.findall((ROOT / "dsmoe" / "runtime" / "supervisor.py").read_text()))
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    named = {option for code in re.findall(r"`([^`\n]+)`", text) for option in OPTION.findall(code)}
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_toml_names_entry_points_that_are_looked_for(page):
    groups = {"dsmoe.routers", "dsmoe.token_dispatchers", "dsmoe.optimizers"}
    for block in blocks(page, "toml"):
        assert set(tomllib.loads(block)["project"]["entry-points"]) <= groups


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_yaml_is_a_configuration_or_a_study(page, tmp_path):
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if "arms" not in tree:
            validate_config(tree, option_classes())
            continue
        from dsmoe.lab.study.check import load_study

        path = tmp_path / "study.yaml"
        path.write_text(block.replace("configs/", f"{ROOT}/configs/"))
        load_study(path)


# Blocks that other tests run: a whole router (tests/unit/routers/test_documentation.py), a model of transformers
# (tests/end_to_end/test_export.py).
ELSEWHERE = ("class SigmoidRouter(Router)", "from transformers import")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_runs(page):
    """Excerpts of a module get the names that its imports would bring."""
    for number, block in enumerate(blocks(page, "python")):
        if any(mark in block for mark in ELSEWHERE):
            continue
        names = {
            "__name__": f"block_{number}", "__file__": str(page), "Path": Path, "torch": torch, "Router": Router,
            "Optimizer": Optimizer, "State": State, "register": lambda name: lambda kind: kind,
        }  # fmt: skip
        exec(compile(block, str(page), "exec"), names)


def test_the_pages_have_code_of_every_kind():
    """Or the tests above would hold nothing."""
    kinds = {kind for page in PAGES for _, kind, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert {"bash", "console", "python", "toml", "yaml"} <= kinds
    assert "--data" in options_of(("evaluate",)) and "--ep" in options_of(("plan", "replay"))
    assert import_module("dsmoe.cli.plan") and commands("$ python tools/plan.py replay RUN --ep 2") == [
        ["plan", "replay", "RUN", "--ep", "2"]
    ]
