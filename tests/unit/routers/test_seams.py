"""Nothing outside dsmoe/routers knows a router by name: what there is to know, the class says."""

from __future__ import annotations

import ast
from pathlib import Path

import dsmoe
from dsmoe.routers import available

PACKAGE = Path(dsmoe.__file__).parent
# Defaults of a configuration, in files that cannot import a router; an activation is called as a router is; and models
# of transformers have a top-k gate and no router of ours.
DEFAULTS = {
    "config/schema.py", "hf/remote/configuration_dsmoe.py", "moe/activations.py", "lab/inspect/models.py",
}  # fmt: skip


def test_no_router_is_named_outside_its_package():
    names = {name for name, router in available().items() if router.__module__.startswith("dsmoe.")}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] == "routers" or str(place) in DEFAULTS:
            continue
        literals = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        texts = [text for text in literals if isinstance(text, str)]
        assigned = {text.rpartition("router.name=")[2] for text in texts}
        assert not names.intersection(texts) | names & assigned, place
