"""transformers' own model tests pass on the exported code."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE, VERSION = Path(__file__).parent, metadata.version("transformers")


@pytest.fixture(scope="session")
def tests() -> Path:
    """The folder `tests` of the source distribution of the transformers that is installed, kept between runs."""
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "dsmoe", "tests")
    tests = kept / f"transformers-{VERSION}" / "tests"
    if not tests.is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        command = ["-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers", "-d", str(kept)]
        done = subprocess.run(
            [sys.executable, *command, f"transformers=={VERSION}"], capture_output=True, text=True, timeout=250
        )
        if done.returncode:
            pytest.skip(f"the source distribution of transformers {VERSION} cannot be had: {done.stderr[-200:]}")
        with tarfile.open(kept / f"transformers-{VERSION}.tar.gz") as archive:
            archive.extractall(kept, filter="data")
    return tests


@pytest.mark.timeout(600)
@pytest.mark.parametrize("router", ["topk", "relu", "routing_free"])
def test_the_exported_code_passes(tests, router, tmp_path):
    """About 30 s for each router: these are 110 tests of transformers' own, the pinned version's, as they are."""
    done = subprocess.run(
        [sys.executable, str(HERE / "transformers_suite.py"), str(tests), router], cwd=HERE.parents[2],
        env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= 100, summary
