"""docs/gpu.md: its table of kernels is compiled.json's."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_table_of_kernels_is_what_was_compiled():
    text = (ROOT / "docs" / "gpu.md").read_text()
    compiled = json.loads((ROOT / "dsmoe" / "triton" / "compiled.json").read_text())
    assert f"Triton {compiled['triton']}" in text
    by_kernel: dict[str, list[dict]] = {}
    for entry in compiled["kernels"]:
        by_kernel.setdefault(entry["kernel"], []).append(entry)
    for name, entries in by_kernel.items():
        row = re.search(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
        registers = [str(entry["registers"]) for entry in entries]
        assert row == registers + [f"{entry['shared_bytes'] / 1024:.3g}" for entry in entries]
