"""Imports inside dsmoe run downward, in the order of the list in docs/architecture.md, and without a cycle.

Imports inside functions count as well; those under `TYPE_CHECKING` do not, as nothing runs them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "dsmoe").rglob("*.py")
}
MAX_ROOMS = 18


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from import_statements(child)


def imported_names(module: str) -> Iterator[str]:
    """Dotted names, of a module or of something in it."""
    for statement in import_statements(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        base = statement.module or ""
        if statement.level:
            package = module.split(".") + (["__init__"] if MODULES[module].name == "__init__.py" else [])
            base = ".".join(filter(None, (*package[: -statement.level], base)))
        yield from (f"{base}.{alias.name}" for alias in statement.names)


def module_of(name: str) -> str:
    """ "" for a name of another package."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@cache
def arrows() -> dict[str, set[str]]:
    """Module -> modules of dsmoe that it imports."""
    actual = {module: {module_of(name) for name in imported_names(module)} for module in MODULES}
    return {module: targets - {"", module} for module, targets in actual.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def listed_rooms() -> list[str]:
    """From the top, as docs/architecture.md lists them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listing = page.partition("```\ndsmoe/\n")[2].partition("```")[0]
    return re.findall(r"^  (\w+)(?:/|\.py) ", listing, re.MULTILINE)


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(arrows()).prepare()  # raises CycleError with the cycle


def test_every_room_is_listed():
    folders = {path.name for path in (ROOT / "dsmoe").iterdir() if any(path.glob("*.py"))}
    assert folders <= set(listed_rooms()) and len(folders) <= MAX_ROOMS


def test_imports_run_downward():
    order = {name: place for place, name in enumerate(["__main__", *listed_rooms(), "env", "dsmoe"])}
    order["env"] = order["cli"]  # `python -m dsmoe.env`
    upward = [
        f"{module} imports {target}"
        for module, targets in arrows().items()
        for target in targets
        if order[room(target)] < order[room(module)]
    ]
    assert not upward, "\n".join(upward)


def test_nothing_below_imports_the_lab():
    above = {"lab", "cli", "__main__"}
    assert [f"{m} imports {t}" for m, targets in arrows().items() for t in targets
            if room(t) == "lab" and room(m) not in above] == []  # fmt: skip
