"""Every Triton kernel compiles for three generations of NVIDIA's GPUs, spills nothing, and needs what docs/gpu.md says.

About 15 s of compiling, once: Triton keeps what it has compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install -e '.[triton]')")

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "dsmoe" / "triton" / "compiled.json"
MOST_SHARED = 100 << 10  # bytes of a block that leave room for a second one on an A100


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "dsmoe.triton.compile", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["kernels"]


def test_every_kernel_fits_and_spills_nothing(compiled):
    assert {entry["capability"] for entry in compiled} == {80, 90, 100} and len(compiled) % 3 == 0
    for entry in compiled:
        assert entry["spilled_bytes"] == 0 and entry["registers"] <= 255, entry
        assert entry["shared_bytes"] <= MOST_SHARED, entry


def test_products_run_on_each_generations_matrix_units(compiled):
    expected = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
    for entry in compiled:
        products = entry["kernel"] in ("grouped", "weight_gradient", "latent_norms", "scaled_latents")
        assert entry["tensor_cores"] == (expected[entry["capability"]] if products else ""), entry


def test_the_table_in_the_repository_is_what_this_triton_makes(compiled):
    table = json.loads(TABLE.read_text())
    if table["triton"] != metadata.version("triton"):
        pytest.skip(f"the table is triton {table['triton']}'s; renew it with python -m dsmoe.triton.compile --json")
    assert table["kernels"] == compiled
