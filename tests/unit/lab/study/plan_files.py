"""How tests change a plan."""

from __future__ import annotations

from pathlib import Path

import yaml


def edit(path: Path, change) -> None:
    """Apply `change` to the tree of a YAML file."""
    tree = yaml.safe_load(path.read_text())
    change(tree)
    path.write_text(yaml.safe_dump(tree))
