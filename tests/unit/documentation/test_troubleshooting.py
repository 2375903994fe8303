"""docs/troubleshooting.md has every error that a user can meet."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import dsmoe.errors
from dsmoe.errors import DsmoeError

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TYPES = {name for name, kind in vars(dsmoe.errors).items() if isinstance(kind, type) and issubclass(kind, DsmoeError)}
SHORTEST = 8  # characters of a message by which one would look it up
# Where users do not run: those who measure and plan get the message alone.
ROOMS = sorted(path for path in (ROOT / "dsmoe").iterdir() if path.is_dir() and path.name not in ("lab", "cli"))


def literals(node: ast.expr) -> list[str]:
    """The literal pieces of a message, between what is put in."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            pieces = [""]
            for value in values:
                if isinstance(value, ast.Constant):
                    pieces[-1] += str(value.value)
                else:
                    pieces.append("")
            return pieces
        case ast.BinOp(left=left, right=right):
            return literals(left) + literals(right)
        case ast.List(elts=elements):
            return [piece for element in elements for piece in literals(element)]
    return []


def raised() -> dict[str, str]:
    """Longest literal piece of every message -> where it is made."""
    actual = {}
    for path in (path for room in ROOMS for path in room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TYPES and node.args:
                piece = max((piece.strip(" :;,.()'\n") for piece in literals(node.args[0])), key=len, default="")
                if len(piece) >= SHORTEST:
                    actual[piece] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return actual


def normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\\|", "|"))


def test_every_message_is_on_the_page():
    page = normalised(PAGE)
    missing = {piece: place for piece, place in raised().items() if normalised(piece.partition("\n")[0]) not in page}
    assert not missing, "\n".join(f"{place}: {piece}" for piece, place in missing.items())


@pytest.mark.parametrize("name", sorted(TYPES - {"DsmoeError"}))
def test_every_kind_of_error_has_a_section(name):
    assert re.search(rf"^## .*`{name}`", PAGE, re.MULTILINE)
