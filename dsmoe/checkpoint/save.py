"""Save: every rank writes what it owns, one file each; the folder becomes a checkpoint when all have.

Keys in a rank's file are `KIND|NAME|START`: fp32 elements from START on of the flattened tensor with that canonical
name. Nothing is gathered, so saving needs no memory beyond what a rank holds already, and no layout is stored that a
loader would have to undo. The folder must be on a file system that all ranks see.

Writing may go on beside training: a rank copies what it owns to host memory, and a thread of its own writes the copy.
That thread takes part in no collective, so it cannot get between those of training. Making the folder and turning it
into a checkpoint are collective and stay with the training thread, between two steps.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from dsmoe.checkpoint import files
from dsmoe.checkpoint.files import Manifest, Position
from dsmoe.config import CheckpointConfig, RunConfig
from dsmoe.errors import CheckpointError
from dsmoe.model.names import parameter_pieces
from dsmoe.optim.deepspeed import owned_fragment
from dsmoe.runtime.device import HostCopies, accelerator, on_gpu
from dsmoe.runtime.files import sync_folder, write_atomically
from dsmoe.runtime.phase import phase


class CheckpointSaver:
    """The saves of a run, one at a time. With `checkpoint.background`, `save` begins one and `finish` completes it.

    Both are collective and raise `CheckpointError` on every rank if any rank could not write (a full disk, for
    example); what was complete before stays as it is. Until `finish` returns, a save is no checkpoint.

    Args:
        step: of the checkpoint that the run resumes from, if any.
        data: what it says about the data.

    Attributes:
        step: of the last complete checkpoint; None if there is none.
    """

    def __init__(
        self, engine, config: RunConfig, step: int | None = None,
        data: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.engine, self.config, self.data = engine, config, data
        self.step = step
        self._save: _RankSave | None = None

    @phase.within("save")
    def save(self, position: Position) -> None:
        """Write the checkpoint of a step, or begin to. One that is under way is finished first."""
        self.finish()
        if self.step == position.step:
            return
        folder = files.folder_of(Path(self.config.logging.run_dir), position.step)
        partial = folder.with_name(folder.name + files.PARTIAL)
        problem = _attempt(lambda: _fresh_folder(partial)) if dist.get_rank() == 0 else None
        _raise_together(_exchange(problem), partial)
        self._save = _RankSave(partial, position)
        self._save.begin(self.engine, self.config.checkpoint.background)
        if not self.config.checkpoint.background:
            self.finish()

    @property
    def done(self) -> bool:
        """Whether a save is under way of which this rank has written its part, or failed to."""
        return self._save is not None and not self._save.writing

    @phase.within("save")
    def finish(self) -> None:
        """Wait for every rank's files and make them a checkpoint. Does nothing if no save is under way."""
        if self._save is None:
            return
        save, self._save = self._save, None
        save.wait()
        reports = _exchange((save.problem, save.written, save.shapes))
        _raise_together([problem for problem, _, _ in reports], save.partial)
        parallel = self.config.parallel
        manifest = Manifest(
            format=files.FORMAT, **asdict(save.position), world_size=dist.get_world_size(),
            expert_parallel=parallel.expert_parallel, zero_stage=parallel.zero_stage,
            config=self.config.model_dump(mode="json"),
            tensors={name: shape for _, _, shapes in reports for name, shape in shapes.items()},
            files={name: expected for _, written, _ in reports for name, expected in written.items()},
            data=self.data,
        )  # fmt: skip
        first = dist.get_rank() == 0
        problem = _attempt(lambda: _publish(manifest, save.partial, self.config.checkpoint)) if first else None
        _raise_together(_exchange(problem), save.partial)
        self.step = save.position.step


def save_checkpoint(engine, config: RunConfig, step: int, samples: int) -> None:
    """Write the checkpoint of `step` and wait for it; collective. Older ones are pruned as `config.checkpoint` says.

    Raises:
        CheckpointError: as `CheckpointSaver`.
    """
    saver = CheckpointSaver(engine, config)
    saver.save(Position(step, samples, samples * config.model.sequence_length))
    saver.finish()


class _RankSave:
    """One rank's part of one save."""

    def __init__(self, partial: Path, position: Position):
        self.partial, self.position = partial, position
        self.shapes: dict[str, list[int]] = {}
        self.written: dict[str, dict] = {}
        self.problem: str | None = None
        self._thread: threading.Thread | None = None

    def begin(self, engine, background: bool) -> None:
        """Write, or start to; what goes wrong is kept in `problem`."""
        pieces = [piece for _, pieces in parameter_pieces(engine.module) for piece in pieces]
        self.shapes = {piece.name: list(piece.shape) for piece in pieces}
        if not background:
            self._write(lambda: _owned(engine, copied=False))
            return
        try:
            contents = _owned(engine, copied=True)
        except (RuntimeError, MemoryError) as error:
            self.problem = f"no memory for the copy to write from: {error}"
            return
        # A daemon: a second Ctrl-C must not wait for the disk. What it leaves half done is no checkpoint.
        self._thread = threading.Thread(target=self._write, args=(lambda: contents,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write(self, contents: Callable[[], dict[str, dict[str, Tensor]]]) -> None:
        self.problem = _attempt(lambda: self.written.update(_write_files(contents(), self.partial)))


def _owned(engine, copied: bool) -> dict[str, dict[str, Tensor]]:
    """What this rank writes, by file and key, in host memory: views where it lies there already, unless `copied`."""

    copies = HostCopies()

    def on_host(tensor: Tensor) -> Tensor:
        return copies.copy(tensor, clone=copied)

    tensors: dict[str, Tensor] = {"rng|cpu|0": torch.get_rng_state()}
    if on_gpu():
        tensors["rng|device|0"] = accelerator().get_rng_state()
    for parameter, pieces in parameter_pieces(engine.module):
        fragment = owned_fragment(parameter, engine)
        if fragment is None:
            continue
        for piece in pieces:
            low = max(piece.start, fragment.start)
            high = min(piece.start + piece.numel, fragment.start + fragment.numel)
            for kind, flat in fragment.tensors.items() if low < high else ():
                own = flat[low - fragment.start : high - fragment.start]
                tensors[f"{kind}|{piece.name}|{low - piece.start}"] = on_host(own)
    rank = dist.get_rank()
    contents = {f"rank_{rank:05d}.safetensors": tensors}
    controller = engine.module.controller
    if rank == 0 and controller is not None:
        contents[files.CONTROLLER] = {name: on_host(value) for name, value in controller.state.items()}
    if rank == 0 and engine.module.revival is not None:
        contents[files.IDLE_EXPERTS] = {"idle_steps": on_host(engine.module.revival.idle_LE)}
    copies.finish()
    return contents


def _write_files(contents: dict[str, dict[str, Tensor]], folder: Path) -> dict[str, dict]:
    """Onto the disk, not only into its cache; size and sha256 of each file."""
    for name, content in contents.items():
        save_file(content, folder / name)
        files.complete_file(folder / name)
    return {name: files.checksum(folder / name) for name in contents}


def _fresh_folder(partial: Path) -> None:
    """An empty folder to write into; what killed saves left is removed."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.glob(f"step_*{files.PARTIAL}"):
        shutil.rmtree(left)
    for left in partial.parent.glob(".latest.*"):
        left.unlink()
    partial.mkdir()


def _publish(manifest: Manifest, partial: Path, keep: CheckpointConfig) -> None:
    folder, run_dir = partial.with_name(partial.name.removesuffix(files.PARTIAL)), partial.parent.parent
    manifest.serial = 1 + max((files.serial_of(path) or 0 for path in files.complete_checkpoints(run_dir)), default=0)
    manifest.write(partial)
    doomed = []
    if folder.exists():  # the same step again, after resuming from an older checkpoint
        doomed.append(_retire(folder))
    os.rename(partial, folder)
    sync_folder(folder.parent)
    write_atomically(folder.parent / "latest", folder.name.encode())
    # Steps beyond this one are of a run that was begun anew in this folder; this one must outlive them.
    complete, step = files.complete_checkpoints(run_dir), files.step_of(folder)
    so_far = [path for path in complete if files.step_of(path) <= step]
    for old in so_far[: -keep.keep_last]:
        if not keep.keep_every or files.step_of(old) % keep.keep_every:
            doomed.append(_retire(old))
    for old in doomed:
        shutil.rmtree(old)


def _retire(folder: Path) -> Path:
    """Rename it first: a half-deleted folder must not look like a checkpoint."""
    doomed = folder.with_name(f"{folder.name}.old{files.PARTIAL}")
    os.rename(folder, doomed)
    return doomed


def _attempt(action) -> str | None:
    """Run it; return what went wrong instead of raising, so that all ranks can stop together."""
    try:
        action()
    except Exception as error:  # safetensors has a class of its own for a full disk
        return f"{type(error).__name__}: {error}"
    return None


def _raise_together(problems: list[str | None], partial: Path) -> None:
    """Raise what any rank has met; `problems` is the same on every rank."""
    reasons = "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)
    if not reasons:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    raise CheckpointError(
        f"the checkpoint {partial.name.removesuffix(files.PARTIAL)} could not be saved ({reasons}); "
        f"earlier checkpoints in {partial.parent} are untouched"
    )


def _exchange(own) -> list:
    """Every rank's value, on every rank."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone
