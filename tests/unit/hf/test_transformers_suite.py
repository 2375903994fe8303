"""transformers' own model tests pass on the exported code."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from commands import forked

pytestmark = pytest.mark.slow
HERE, VERSION = Path(__file__).parent, metadata.version("transformers")
MAIN_CHECKS = {  # of ours, which run where transformers' tests cannot be had as well
    "test_remote_citizen.py": (
        "test_a_new_model_has_new_weights", "test_weights_that_a_folder_lacks_begin_anew",
        "test_embeddings_are_resized_and_stay_tied", "test_flex_attention_agrees", "test_a_classifier_trains",
    ),
    "test_remote_model.py": (
        "test_saved_and_loaded_in_bf16_the_router_stays_fp32", "test_padding_changes_nothing",
        "test_hidden_states_attentions_and_embeddings", "test_plain_attention_is_the_same",
        "test_gradients_are_the_same_with_checkpointing", "test_a_cache_gives_what_the_whole_text_gives",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def tests() -> Path:
    """The folder `tests` of the source distribution of the transformers that is installed, kept between runs. Where it
    cannot be had, what is left are `MAIN_CHECKS`."""
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "dsmoe", "tests")
    tests = kept / f"transformers-{VERSION}" / "tests"
    if not tests.is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        command = ["-m", "pip", "download", "-q", "--no-deps", "--no-binary", "transformers", "-d", str(kept)]
        done = subprocess.run(
            [sys.executable, *command, f"transformers=={VERSION}"], capture_output=True, text=True, timeout=250
        )
        if done.returncode:
            pytest.skip(
                f"the source distribution of transformers {VERSION} cannot be had, so its main checks run alone, in "
                f"{' and '.join(MAIN_CHECKS)}: {done.stderr[-200:]}"
            )
        with tarfile.open(kept / f"transformers-{VERSION}.tar.gz") as archive:
            archive.extractall(kept, filter="data")
    return tests


@pytest.mark.timeout(600)
@pytest.mark.parametrize("router", ["topk", "relu", "routing_free"])
def test_the_exported_code_passes(tests, router, tmp_path):
    """Some 20 s for each router: these are 110 tests of transformers' own, the pinned version's, as they are."""
    script = str(HERE / "transformers_suite.py")
    done = forked(script, str(tests), router, environment={"TMPDIR": str(tmp_path)})
    assert done.code == 0, done.output[-8000:]
    summary = next(line for line in reversed(done.output.splitlines()) if " passed" in line)
    assert int(summary.split(" passed")[0].split()[-1]) >= 100, summary


@pytest.mark.parametrize("file", MAIN_CHECKS)
def test_the_main_checks_are_there(file):
    text = (HERE / file).read_text()
    assert [name for name in MAIN_CHECKS[file] if f"def {name}(" not in text] == []
