"""A run folder over its life: what a checkpoint remembers of its data, resuming with something else, two writers,
files that others may read and files that nobody may."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks
from training_runs import lines_of, run_config, train_all, train_and_listen, write_tokens

from dsmoe.checkpoint.files import find_checkpoint, newest_checkpoint, read_manifest
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.errors import CheckpointError
from dsmoe.runtime.run_lock import FILE, Owner, RunLock


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def test_a_run_resumes_with_another_batch_at_the_next_sequence_and_says_what_changed(data, tmp_path):
    first = run_config(tmp_path, data, training={"steps": 6, "stop_at": 2})
    second = run_config(tmp_path, data, training={"steps": 6, "global_batch_size": 8, "lr": 5e-4})
    ((results, said),) = run_ranks(1, train_and_listen, [first, second])
    assert results == [("ended", 2, False), ("ended", 6, True)]
    manifest = read_manifest(newest_checkpoint(tmp_path))
    assert (manifest.samples, manifest.tokens) == (2 * 4 + 4 * 8, (2 * 4 + 4 * 8) * 16)
    assert manifest.data["train"]["tokens"] == 36 * 50 and len(manifest.data["train"]["fingerprint"]) == 64
    assert [line["tokens"] for line in lines_of(tmp_path)] == [64, 128, 256, 384, 512, 640]
    assert "changed training.global_batch_size: 4 in the checkpoint, 8 now" in said
    assert "changed training.lr: 0.001 in the checkpoint, 0.0005 now" in said
    assert verify_checkpoint(newest_checkpoint(tmp_path)).problems == []


def test_other_data_under_the_same_path_is_refused_on_every_rank(tmp_path):
    data = write_tokens(tmp_path / "data" / "tokens")
    config = run_config(tmp_path / "run", data, training={"stop_at": 2})
    assert run_ranks(2, train_all, [config])[0] == [("ended", 2, False)]
    write_tokens(tmp_path / "data" / "tokens", seed=1)  # the same index, another text
    more = run_config(tmp_path / "run", data)
    wanted = run_config(tmp_path / "run", data, training={"resume_with": ["data"]})
    for (kind, text, code), ended in run_ranks(2, train_all, [more, wanted]):
        assert (kind, code) == ("CheckpointError", 2)
        assert "data: 1,800 tokens" in text and "in the checkpoint, 1,800 tokens" in text
        assert ended == ("ended", 4, True)


def test_another_optimizer_begins_anew_where_that_is_wanted(data, tmp_path):
    first = run_config(tmp_path, data, training={"stop_at": 2})
    lion = {"optimizer": "lion", "lr": 1e-4}
    (results,) = run_ranks(1, train_all, [
        first, run_config(tmp_path, data, training=lion),
        run_config(tmp_path, data, training={**lion, "resume_with": ["training.optimizer"]}),
    ])  # fmt: skip
    assert results[1][0] == "CheckpointError" and "adamw in the checkpoint, lion now" in results[1][1]
    assert results[2] == ("ended", 4, True)
    assert verify_checkpoint(newest_checkpoint(tmp_path)).states == ("exp_avg",)


def in_a_held_folder(config) -> list[tuple]:
    if dist.get_rank():
        return train_all([config])
    with RunLock(Path(config.logging.run_dir)):
        return train_all([config])


def test_a_second_run_in_the_same_folder_is_refused_on_every_rank(data, tmp_path):
    config = run_config(tmp_path, data)
    for ((kind, text, code),) in run_ranks(2, in_a_held_folder, config):
        assert (kind, code) == ("RunFolderError", 2)
        assert f"{tmp_path} is in use: process" in text
    assert list(tmp_path.iterdir()) == []


DEAD = """
import os; from pathlib import Path; from dsmoe.runtime.run_lock import RunLock
RunLock(Path({!r})).acquire(); os._exit(9)
"""


def test_a_dead_runs_folder_is_taken_over_and_said_so(data, tmp_path):
    subprocess.run([sys.executable, "-c", DEAD.format(str(tmp_path))])
    assert (tmp_path / FILE).exists()
    config = run_config(tmp_path, data, training={"steps": 1})
    ((results, said),) = run_ranks(1, train_and_listen, [config])
    assert results == [("ended", 1, True)]
    assert "took the run folder over from process" in said
    assert not (tmp_path / FILE).exists()


def with_umask(mask: int, configs) -> list[tuple]:
    before = os.umask(mask)
    try:
        return train_all(configs)
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_umasks_mode(data, tmp_path, mask):
    assert run_ranks(1, with_umask, mask, [run_config(tmp_path, data, training={"steps": 1})])[0][0][0] == "ended"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".jsonl", ".yaml"}
    assert {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        str(path): oct(0o666 & ~mask) for path in files
    }


@pytest.fixture
def nobody(tmp_path):
    """Run a function as a user without rights, in a child process; gives what it returns as text."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; a test of its own denies itself with modes")
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        folder.chmod(0o755)

    def call(function) -> str:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            try:
                os.setgroups([])
                os.setuid(65534)
                text = str(function())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        return text

    return call


def test_who_may_not_read_gets_a_message(data, tmp_path, nobody):
    run_ranks(1, train_all, [run_config(tmp_path / "run", data, training={"steps": 1})])
    folder = newest_checkpoint(tmp_path / "run")
    (folder / "rank_00000.safetensors").chmod(0o600)
    assert "rank_00000.safetensors cannot be read: Permission denied" in nobody(
        lambda: verify_checkpoint(folder).problems
    )
    (folder / "manifest.json").chmod(0o600)
    assert (
        nobody(lambda: read_manifest(folder))
        == f"CheckpointError: cannot read {folder}/manifest.json: Permission denied"
    )
    folder.parent.chmod(0o700)
    for resume in ("auto", str(folder), str(tmp_path / "run")):
        told = nobody(lambda resume=resume: find_checkpoint(resume, tmp_path / "run"))
        assert told.startswith("CheckpointError: cannot read") and "Permission denied" in told
    (tmp_path / "run").chmod(0o555)
    told = nobody(lambda: RunLock(tmp_path / "run").acquire())
    assert told == f"RunFolderError: cannot write the run folder {tmp_path}/run: Permission denied"


def test_a_pointer_that_names_something_else_is_passed_over(data, tmp_path):
    run_ranks(1, train_all, [run_config(tmp_path, data, training={"steps": 1})])
    for text in ("../../elsewhere", "", "step_1/../..", "a\0b", "step_00000009"):
        (tmp_path / "checkpoints" / "latest").write_text(text)
        assert find_checkpoint("auto", tmp_path).name == "step_00000001"


OUTSIDE = ["../other.safetensors", "/etc/passwd", "rank_00000.safetensors/..", "a\\b", ".hidden"]


def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(data, tmp_path):
    run_ranks(1, train_all, [run_config(tmp_path, data, training={"steps": 1})])
    folder = newest_checkpoint(tmp_path)
    for name in OUTSIDE:
        manifest = read_manifest(folder)
        saved = (folder / "manifest.json").read_bytes()
        manifest.files[name] = manifest.files.pop("rank_00000.safetensors")
        manifest.write(folder)
        with pytest.raises(CheckpointError, match="is not a plain file name"):
            read_manifest(folder)
        (folder / "manifest.json").write_bytes(saved)


def train_while_another_takes_the_folder(config) -> list[tuple]:
    """As after a suspension of minutes: another run took this one for dead."""
    import dsmoe.training.run as training

    class Hasty(RunLock):
        def __init__(self, run_dir: Path):
            super().__init__(run_dir, interval=0.05)

    def take_over() -> None:
        lock = Path(config.logging.run_dir) / FILE
        while not done.wait(0.2):
            begun = (lock.parent / "metrics.jsonl").exists() and len(lines_of(lock.parent)) > 1
            if not begun or not lock.exists() or Owner.read(lock).token == "theirs":
                continue
            theirs = lock.with_name("theirs")
            theirs.write_text(json.dumps({**json.loads(lock.read_text()), "token": "theirs"}))
            os.replace(theirs, lock)

    training.RunLock, done = Hasty, threading.Event()
    taker = threading.Thread(target=take_over)
    if dist.get_rank() == 0:
        taker.start()
    try:
        return train_all([config])
    finally:
        done.set()


def test_a_run_that_has_lost_its_folder_ends_on_every_rank_and_leaves_the_others_lock(data, tmp_path):
    config = run_config(tmp_path, data, training={"steps": 100_000})
    for ((kind, text, code),) in run_ranks(2, train_while_another_takes_the_folder, config):
        assert (kind, code) == ("TrainingError", 1)
        assert text == f"another run has taken over {tmp_path}; this one ends"
    assert Owner.read(tmp_path / FILE).token == "theirs"
    assert newest_checkpoint(tmp_path) is None
