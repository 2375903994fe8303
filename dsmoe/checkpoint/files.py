"""A checkpoint on disk: its folder, its manifest, which ones are complete, and files that appear whole or not at all.

    RUN/checkpoints/step_00000100/      complete exactly if the folder has this name
        manifest.json                   step, samples, model, data, tensors; size and sha256 of every file, its own too
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
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from dsmoe.errors import CheckpointError
from dsmoe.runtime.files import write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
CONTROLLER = "state.safetensors"
IDLE_EXPERTS = "idle_experts.safetensors"
_STEP = re.compile(r"step_(\d{8,})", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def plain_name(name: str) -> str:
    """The name of a file inside its folder. Raises `ValueError` for anything that could lead out of it."""
    if not _PLAIN.fullmatch(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _file_entry(entry: dict[str, Any]) -> dict[str, Any]:
    if entry.keys() != {"bytes", "sha256"} or type(entry["bytes"]) is not int or entry["bytes"] < 0:
        raise ValueError("is not a size in bytes and a sha256")
    return entry


PlainName = Annotated[str, AfterValidator(plain_name)]
FileEntry = Annotated[dict[str, Any], AfterValidator(_file_entry)]  # "bytes" and "sha256" of a file when it was saved


@dataclass
class Manifest:
    """What a checkpoint says about itself."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # no annotation: it is no field

    format: int
    step: NonNegativeInt
    samples: NonNegativeInt  # training sequences consumed: where the data goes on
    world_size: PositiveInt
    expert_parallel: PositiveInt
    zero_stage: NonNegativeInt
    config: dict[str, Any]
    tensors: dict[str, list[NonNegativeInt]]  # canonical name -> shape
    files: dict[PlainName, FileEntry]
    serial: NonNegativeInt = 0  # saves of this run folder so far: which was written last, whatever its step
    copied_experts: bool = False  # the run began with experts that were copies of one MLP (an upcycled dense model)
    skipped_steps: NonNegativeInt = 0  # of `step`: bad ones, in which the optimizer did not move
    seconds: float | None = None  # that the steps behind it took (dsmoe/training/history.py)
    tokens: NonNegativeInt | None = None  # consumed; None: samples x sequence_length (older checkpoints)
    data: dict[str, Any] | None = None  # what was trained on (dsmoe/data/identity.py); None: unknown

    @property
    def optimizer(self) -> str:
        """`training.optimizer` of the run; older runs had no such key."""
        training = self.config.get("training")
        return str(training.get("optimizer", "adamw")) if isinstance(training, dict) else "adamw"

    def write(self, folder: Path) -> None:
        content = asdict(self)
        content["sha256"] = _digest(content)
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode())


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Position:
    """Where a run is: optimizer steps and tokens behind it, and the sample that comes next."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    copied_experts: bool = False
    skipped_steps: int = 0  # of `step`
    seconds: float = 0.0  # that these steps took, lost ones not counted


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises `CheckpointError` if it is missing, not ours, of a newer format, or not as it was written."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {content['format']}, this version of dsmoe reads {FORMAT}")
        if content.pop("sha256") != _digest(content):
            raise ValueError("it does not have the content that was saved (sha256 differs)")
        return _MANIFEST.validate_json(json.dumps(content))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is damaged: {where}: {first['msg']}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    try:
        if not folder.is_dir():
            return []
        folders = [path for path in folder.iterdir() if is_checkpoint_name(path.name)]
        checkpoints = [path for path in folders if (path / MANIFEST).is_file()]
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoints in {folder}: {error.strerror or error}") from error
    return sorted(checkpoints, key=step_of)


def is_checkpoint_name(name: str) -> bool:
    return _STEP.fullmatch(name) is not None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint that was written last: not the one of the highest step in a run that was begun anew."""
    complete = complete_checkpoints(run_dir)
    latest = _latest(run_dir)
    if latest in complete and serial_of(latest) is None:
        return latest  # damaged: loading it says so, and an older one is not taken in silence
    return max(complete, key=lambda path: (serial_of(path) or 0, path == latest, step_of(path)), default=None)


def _latest(run_dir: Path) -> Path | None:
    """The checkpoint that the pointer names, if it names one."""
    pointer = run_dir / "checkpoints" / "latest"
    try:
        name = pointer.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {pointer}: {error.strerror or error}") from error
    return pointer.with_name(name) if is_checkpoint_name(name) else None


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files all have the size and content that were saved, and what is wrong with those
    that are newer."""
    problems: list[str] = []
    for folder in sorted(complete_checkpoints(run_dir), key=lambda path: (serial_of(path) or 0, step_of(path)))[::-1]:
        problem = _damage(folder)
        if problem is None:
            return folder, problems
        problems.append(f"{folder.name}: {problem}")
    return None, problems


def _damage(folder: Path) -> str | None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    problems = (check_file(folder, name, expected) for name, expected in manifest.files.items())
    return next((problem for problem in problems if problem), None)


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
    if is_checkpoint(path):
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            f"training.resume: {path} is neither a complete checkpoint (a folder with {MANIFEST}) "
            f"nor a run that has one"
        )
    return newest


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a complete checkpoint, by its manifest. Raises `CheckpointError` where nobody may look."""
    try:
        return (path / MANIFEST).is_file()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint, or None."""
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, expected {expected['bytes']}: truncated or overwritten"
        if checksum(path)["sha256"] != expected["sha256"]:
            return f"{name} does not have the content that was saved (sha256 differs)"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    return None


def complete_file(path: Path) -> None:
    """Bring a file that safetensors wrote onto the disk, readable for whom the umask lets: it makes them for the owner
    alone."""
    with open(path, "rb+") as file:
        os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.fsync(file.fileno())


def _umask() -> int:
    """Of this process. Setting it is the only other way to read it, and would show in other threads' files."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
