"""Code on pages: commands have the options that they are shown with, YAML and TOML mean something, Python runs.

What commands of README.md do is run by tests/end_to_end/test_readme.py.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
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
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, kind, text in found if kind in kinds]


@cache
def scripts() -> dict[str, list[str]]:
    """tools/plan.py and its like -> the words of the `dsmoe` command that they are."""
    names = {module: [name] for group in COMMANDS.values() for name, (module, first, _) in group.items() if not first}
    found = {}
    for path in (*ROOT.glob("launch/*.py"), *ROOT.glob("tools/*.py")):
        module = re.search(r"^from dsmoe\.cli\.(\w+) import main", path.read_text(), re.MULTILINE)
        if module:
            found[str(path.relative_to(ROOT))] = names.get(module[1], [])  # convert: the command is its first argument
    return found


@cache
def help_of(words: tuple[str, ...]) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return output.getvalue()


@cache
def options_of(words: tuple[str, ...]) -> set[str]:
    """Of a command, with those of the subcommand that its words name."""
    found = set(OPTION.findall(help_of(words[:1])))
    subcommands = re.search(r"^usage: .*? \{([\w,-]+)\} \.\.\.", help_of(words[:1]), re.MULTILINE)
    if subcommands:
        named = [word for word in words[1:2] if word in subcommands[1].split(",")]
        for name in named or subcommands[1].split(","):
            found |= set(OPTION.findall(help_of((words[0], name))))
    return found


def commands(text: str) -> list[list[str]]:
    """The words after `dsmoe`, for every line of code that runs it, as itself or as one of the scripts."""
    found = []
    for line in re.sub(r" \\\n *", " ", text).splitlines():
        try:
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        except ValueError:  # an output with an apostrophe
            continue
        for place, word in enumerate(words):
            if word == "dsmoe" and words[place + 1 : place + 2]:
                found.append(words[place + 1 :])
            elif word in scripts():
                found.append([*scripts()[word], *words[place + 1 :]])
            else:
                continue
            break
    return found


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
# (tests/end_to_end/test_page_commands.py).
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
