"""What is imported is declared, and what is declared is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {
    "apex",
    "transformer_engine",
    "megablocks",
    "scattermoe",
    "triton",
}  # used or measured where they are installed


def normalised(requirement: str) -> str:
    return re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def imported(folders: Iterable[str]) -> dict[str, str]:
    """Top-level name of each third-party import -> a file that has it."""
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"dsmoe", "tests"}
    names = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    modules = [node.module]
                names |= {module.split(".")[0]: str(path.relative_to(ROOT)) for module in modules}
    return {name: path for name, path in names.items() if name not in ours | sys.stdlib_module_names | OPTIONAL}


def undeclared(folders: Iterable[str], extras: Iterable[str]) -> list[str]:
    optional = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    declared = {normalised(line) for line in requirements}
    providers = packages_distributions()
    return [
        f"{path} imports {name}"
        for name, path in sorted(imported(folders).items())
        if not declared & {normalised(distribution) for distribution in providers.get(name, [name])}
    ]


def test_every_import_of_the_package_is_a_dependency():
    assert undeclared(["dsmoe", "launch", "tools"], PROJECT["optional-dependencies"].keys() - {"test"}) == []


def test_every_import_of_the_tests_is_declared():
    assert undeclared(["tests"], PROJECT["optional-dependencies"]) == []


def test_every_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line) for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if line and not line.startswith("#"))
    extras = [lines for name, lines in PROJECT["optional-dependencies"].items() if name != "gpu"]
    lines = [line for lines in (PROJECT["dependencies"], *extras) for line in lines]
    assert [line for line in lines if normalised(line) not in pinned and "==" not in line] == []


def test_no_folder_of_tests_hides_or_stands_for_a_package():
    """pytest puts the folders of tests on the path, where a folder without __init__.py is a package to `import`."""
    folders = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()} - {"tests"}
    assert not folders & (OPTIONAL | packages_distributions().keys())


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name: a second file of one name is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
