"""A checkpoint on disk: its folder, its manifest, which ones are complete, and files that appear whole or not at all.

    RUN/checkpoints/step_00000100/      complete exactly if the folder has this name
        manifest.json                   step, samples, model, tensors, and size and sha256 of every file, its own too
        rank_00000.safetensors          what rank 0 of the saving job owned
        state.safetensors               router controllers
        idle_experts.safetensors        for how many steps each expert has had no token, if that is watched
    RUN/checkpoints/latest              the name of the folder that was completed last

A save writes into `step_00000100.partial` and renames it when every rank's files are on disk. `latest` follows; a job
that is killed between the two leaves a checkpoint whose serial number is higher than that of the one it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsmoe.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
CONTROLLER = "state.safetensors"
IDLE_EXPERTS = "idle_experts.safetensors"
_STEP = re.compile(r"step_(\d{8,})")


@dataclass
class Manifest:
    """What a checkpoint says about itself."""

    format: int
    step: int
    samples: int  # training sequences consumed: where the data goes on
    world_size: int
    expert_parallel: int
    zero_stage: int
    config: dict[str, Any]
    tensors: dict[str, list[int]]  # canonical name -> shape
    files: dict[str, dict[str, Any]]  # file name -> {"bytes", "sha256"}
    serial: int = 0  # saves of this run folder so far: which checkpoint was written last, whatever its step
    copied_experts: bool = False  # the run began with experts that were copies of one MLP (an upcycled dense model)

    @property
    def optimizer(self) -> str:
        """`training.optimizer` of the run; older runs had no such key."""
        return self.config.get("training", {}).get("optimizer", "adamw")

    def write(self, folder: Path) -> None:
        content = asdict(self)
        content["sha256"] = _digest(content)
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode())


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` if it is missing, not ours, of a newer format, or not as it was written."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {content['format']}, this version of dsmoe reads {FORMAT}")
        if content.pop("sha256") != _digest(content):
            raise ValueError("it does not have the content that was saved (sha256 differs)")
        return Manifest(**content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST} is missing") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_checkpoint_name(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def is_checkpoint_name(name: str) -> bool:
    return _STEP.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    return int(_STEP.fullmatch(folder.name).group(1))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint that was written last: not the one of the highest step in a run that was begun anew."""
    complete = complete_checkpoints(run_dir)
    pointer = run_dir / "checkpoints" / "latest"
    latest = pointer.with_name(pointer.read_text().strip()) if pointer.is_file() else None
    if latest in complete and serial_of(latest) is None:
        return latest  # damaged: loading it says so, and an older one is not taken in silence
    return max(complete, key=lambda path: (serial_of(path) or 0, path == latest, step_of(path)), default=None)


def serial_of(folder: Path) -> int | None:
    """The checkpoint's place in the order of saves; None if its manifest cannot be read."""
    try:
        return read_manifest(folder).serial
    except CheckpointError:
        return None


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `training.resume` means; None to start anew.

    Raises:
        CheckpointError: a path was given and there is no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(run_dir)
    path = Path(resume)
    if (path / MANIFEST).is_file():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            f"training.resume: {path} is neither a complete checkpoint (a folder with {MANIFEST}) "
            f"nor a run that has one"
        )
    return newest


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint, or None."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{name} has {size} bytes, expected {expected['bytes']}: truncated or overwritten"
    if checksum(path)["sha256"] != expected["sha256"]:
        return f"{name} does not have the content that was saved (sha256 differs)"
    return None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, a power cut included."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
