"""Which checkpoint a run resumes from, and that the path from disk to model has no unpickling in it."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

import dsmoe.checkpoint
from dsmoe.checkpoint.files import FORMAT, MANIFEST, Manifest, checksum, folder_of, newest_checkpoint, newest_whole

ROOT = Path(__file__).resolve().parents[3]


def complete(run_dir: Path, step: int, serial: int) -> Path:
    folder = folder_of(run_dir, step)
    folder.mkdir(parents=True)
    Manifest(FORMAT, step, step, 1, 1, 1, config={}, tensors={}, files={}, serial=serial).write(folder)
    return folder


def point(run_dir: Path, name: str) -> None:
    (run_dir / "checkpoints" / "latest").write_text(name)


def test_the_newest_is_the_one_that_was_saved_last(tmp_path):
    complete(tmp_path, 7, serial=1)  # of a run that was then begun anew
    complete(tmp_path, 2, serial=2)
    last = complete(tmp_path, 4, serial=3)
    for pointed in ("step_00000004", "step_00000002"):  # a kill came between the rename and the pointer
        point(tmp_path, pointed)
        assert newest_checkpoint(tmp_path) == last
    (tmp_path / "checkpoints" / "latest").unlink()
    assert newest_checkpoint(tmp_path) == last


def test_without_numbers_the_pointer_decides_then_the_step(tmp_path):
    """Checkpoints of a version that did not count."""
    older, newer = complete(tmp_path, 2, serial=0), complete(tmp_path, 4, serial=0)
    assert newest_checkpoint(tmp_path) == newer
    point(tmp_path, older.name)
    assert newest_checkpoint(tmp_path) == older
    point(tmp_path, "step_00000009")
    assert newest_checkpoint(tmp_path) == newer


def test_a_damaged_one_is_not_passed_over_in_silence(tmp_path):
    complete(tmp_path, 2, serial=1)
    damaged = complete(tmp_path, 4, serial=2)
    point(tmp_path, damaged.name)
    (damaged / MANIFEST).write_text("{")
    assert newest_checkpoint(tmp_path) == damaged


def test_the_newest_whole_one_is_what_a_supervisor_resumes(tmp_path, capsys):
    """Each file is held to the size and content that were saved. Where none is whole the run itself refuses."""
    resume = runpy.run_path(str(ROOT / "launch" / "supervise.py"))["RunFolder"](tmp_path).resume
    assert resume() == []
    folders = []
    for serial, step in enumerate((2, 4, 6), 1):
        folder = complete(tmp_path, step, serial)
        (folder / "rank_00000.safetensors").write_bytes(b"tensors")
        files = {"rank_00000.safetensors": checksum(folder / "rank_00000.safetensors")}
        Manifest(FORMAT, step, step, 1, 1, 1, config={}, tensors={}, files=files, serial=serial).write(folder)
        folders.append(folder)
    assert resume() == [] and newest_whole(tmp_path) == (folders[2], [])
    (folders[2] / "rank_00000.safetensors").write_bytes(b"tensorz")  # as long as it was
    assert resume() == [f"training.resume={folders[1]}"]
    assert "a damaged checkpoint is passed over: step_00000006: rank_00000.safetensors" in capsys.readouterr().err
    (folders[1] / "rank_00000.safetensors").unlink()
    (folders[0] / MANIFEST).write_text("{")
    assert resume() == []
    assert capsys.readouterr().err.count("a damaged checkpoint is passed over: ") == 3


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None


FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MODULES = sorted(Path(dsmoe.checkpoint.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_package_has_no_way_to_unpickle(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN.intersection(name.name.partition(".")[0] for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in FORBIDDEN
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("np", "load")}
