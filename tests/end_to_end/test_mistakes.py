"""Mistakes through the real command line: a message that helps, exit code 2, no stack trace, and nothing lost.

The commands start before the tests look at them, two at a time, since each spends its seconds on imports.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import ROOT, TRAIN, Result, metrics, python, run, torchrun
from safetensors.torch import load_file, save_file

from dsmoe.checkpoint.files import checksum, read_manifest


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
def answers(place, corpus, config, trained):
    """name -> Future of the result of a command with that mistake."""
    nowhere, more = f"logging.run_dir={place / 'runs' / 'mistake'}", "training.steps=8"
    runs = {
        "configuration": ["training.step=9", "training.lr=fast", "parallel.expert_parallel=3", nowhere],
        "no data": [f"data.path={place / 'nothing here'}", nowhere],
        "truncated data": [f"data.path={truncated_data(corpus, place)}", nowhere],
        "vocabulary": ["model.vocab_size=64", nowhere],
        "damaged checkpoint": [f"logging.run_dir={damaged_run(trained, place)}", more],
        "not a number": [f"logging.run_dir={poisoned_run(trained, place)}", more],
        "other model": [f"training.resume={trained}", "model.hidden_size=64", more, nowhere],
    }
    commands = {name: python(TRAIN, "--config", str(config), *rest) for name, rest in runs.items()}
    commands["world"] = torchrun(2, TRAIN, "--config", str(config), "parallel.expert_parallel=4", nowhere)
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, command) for name, command in commands.items()}


def answer(answers: dict[str, Future[Result]], name: str) -> Result:
    result = answers[name].result()
    assert "Traceback" not in result.output, result.output
    return result


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("configuration", ["3 mistakes", "training.step: unknown key (did you mean 'steps'?)",
                           "training.lr: found 'fast'", "expected a multiple of parallel.expert_parallel (3)"]),
        ("no data", ["nothing here", "python tools/prepare_data.py"]),
        ("truncated data", ["train.bin", "100"]),
        ("vocabulary", ["300 ids", "64", "model.vocab_size"]),
        ("damaged checkpoint", ["rank_00000.safetensors", "sha256 differs", "step_00000003"]),
        ("not a number", ["loss of step 7 is nan", "first tensor that is not finite: weight", ".layers.1.", "step 6"]),
        ("other model", ["of another model", "of another shape"]),
    ],
)  # fmt: skip
def test_mistake(answers, name, said):
    result = answer(answers, name)
    assert result.code == 2, result.output
    for text in said:
        assert text in result.output


def test_a_world_that_does_not_fit_is_refused_at_once(answers, place):
    result = answers["world"].result()
    assert result.code != 0
    assert str(ROOT / "dsmoe") not in result.output, "a stack trace of ours; torchrun always shows one of its own"
    assert "2 processes were launched, but parallel.expert_parallel is 4" in result.output
    assert "parameters" not in result.output, "something was built first"
    assert not (place / "runs" / "mistake").exists()


def test_the_last_good_checkpoint_stays(answers, place):
    assert answers["not a number"].result().code != 0
    folder = place / "runs" / "poisoned" / "checkpoints"
    assert (folder / "latest").read_text() == "step_00000006"
    assert {path.name for path in folder.iterdir()} == {"step_00000003", "step_00000006", "latest"}
    assert metrics(folder.parent)[-1]["step"] == 6
