"""Mistakes through the real command line: a message that helps, exit code 2, no stack trace, and nothing lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import ROOT, TRAIN, Result, forked, metrics, python, run, run_loaded, torchrun
from safetensors.torch import load_file, save_file

from dsmoe.checkpoint.files import checksum, read_manifest
from dsmoe.runtime.exit_codes import FAILED, REFUSED


@pytest.fixture(scope="module")
def trained(alone) -> Path:
    """A run with checkpoints of the steps 3 and 6."""
    return alone[0]


def truncated_data(corpus: Path, place: Path) -> Path:
    copy = Path(shutil.copytree(corpus, place / "truncated data"))
    with open(copy / "train.bin", "rb+") as file:
        file.truncate(100)
    return copy


def damaged_run(trained: Path, place: Path) -> Path:
    copy = Path(shutil.copytree(trained, place / "runs" / "damaged"))
    file = copy / "checkpoints" / "step_00000006" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-8] ^= 255
    file.write_bytes(content)
    return copy


def poisoned_run(trained: Path, place: Path) -> Path:
    """A run whose newest checkpoint is intact on disk and holds a weight that is not a number."""
    copy = Path(shutil.copytree(trained, place / "runs" / "poisoned"))
    folder = copy / "checkpoints" / "step_00000006"
    tensors = load_file(folder / "rank_00000.safetensors")
    name = next(name for name in tensors if name.startswith("weight|") and ".layers.1." in name and "experts" in name)
    tensors[name][0] = float("nan")
    save_file(tensors, folder / "rank_00000.safetensors")
    manifest = read_manifest(folder)
    manifest.files["rank_00000.safetensors"] = checksum(folder / "rank_00000.safetensors")
    manifest.write(folder)
    return copy


@pytest.fixture(scope="module")
def overrides(place, corpus, trained) -> dict[str, list[str]]:
    """Name -> what makes a command of `config` a mistake."""
    nowhere, more = f"logging.run_dir={place / 'runs' / 'mistake'}", "training.steps=8"
    return {
        "configuration": ["training.step=9", "training.lr=fast", "parallel.expert_parallel=3", nowhere],
        "no data": [f"data.path={place / 'nothing here'}", nowhere],
        "truncated data": [f"data.path={truncated_data(corpus, place)}", nowhere],
        "vocabulary": ["model.vocab_size=64", nowhere],
        "damaged checkpoint": [f"logging.run_dir={damaged_run(trained, place)}", more],
        "not a number": [f"logging.run_dir={poisoned_run(trained, place)}", more],
        "other model": [f"training.resume={trained}", "model.hidden_size=64", more, nowhere],
    }


def train(config: Path, overrides: list[str], code: int = REFUSED) -> Result:
    result = forked(TRAIN, "--config", str(config), *overrides)
    assert result.code == code and "Traceback" not in result.output, result.output
    return result


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("configuration", ["3 mistakes", "training.step: unknown key (did you mean 'steps'?)",
                           "training.lr: found 'fast'", "expected a multiple of parallel.expert_parallel (3)"]),
        ("no data", ["nothing here", "dsmoe prepare-data"]),
        ("truncated data", ["train.bin", "100"]),
        ("vocabulary", ["300 ids", "64", "model.vocab_size"]),
        ("damaged checkpoint", ["rank_00000.safetensors", "sha256 differs", "step_00000003"]),
        ("not a number", ["step 7: the loss is nan", "rank 0 on", ": weight gpt.", "(layer 1)", "step 6"]),
        ("other model", ["model.hidden_size: 32 in the checkpoint, 64 now", "training.resume_with"]),
    ],
)  # fmt: skip
def test_mistake(config, overrides, name, said):
    result = train(config, overrides[name], FAILED if name == "not a number" else REFUSED)
    for text in said:
        assert text in result.output


def test_the_last_good_checkpoint_stays(config, overrides, place):
    train(config, overrides["not a number"], FAILED)
    folder = place / "runs" / "poisoned" / "checkpoints"
    assert (folder / "latest").read_text() == "step_00000006"
    assert {path.name for path in folder.iterdir()} == {"step_00000003", "step_00000006", "latest"}
    assert metrics(folder.parent)[-1]["step"] == 6


def test_a_process_of_its_own_says_no_more_than_the_message(config, overrides):
    result = run(python(TRAIN, "--config", str(config), *overrides["configuration"]))
    assert result.code == 2 and result.output.startswith("ConfigError: "), result.output
    assert len(result.output.splitlines()) == 4


def test_a_world_that_does_not_fit_is_refused_at_once(config, overrides, place):
    result = run_loaded(
        torchrun(2, TRAIN, "--config", str(config), "parallel.expert_parallel=4", overrides["no data"][-1])
    )
    assert result.code != 0
    assert str(ROOT / "dsmoe") not in result.output, "a stack trace of ours; torchrun always shows one of its own"
    assert "2 processes were launched, but parallel.expert_parallel is 4" in result.output
    assert "parameters" not in result.output, "something was built first"
    assert not (place / "runs" / "mistake").exists()
