"""Save: every rank writes what it owns, one file each; the folder becomes a checkpoint when all have.

Keys in a rank's file are `KIND|NAME|START`: fp32 elements from START on of the flattened tensor with that canonical
name. Nothing is gathered, so saving needs no memory beyond what a rank holds already, and no layout is stored that a
loader would have to undo. The folder must be on a file system that all ranks see.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from torch import Tensor

from dsmoe.checkpoint import files
from dsmoe.checkpoint.files import Manifest
from dsmoe.checkpoint.fragments import owned_fragment
from dsmoe.config import CheckpointConfig, RunConfig
from dsmoe.errors import CheckpointError
from dsmoe.model.names import parameter_pieces


def save_checkpoint(engine, config: RunConfig, step: int, samples: int) -> Path:
    """Write the checkpoint of `step`; collective. Older ones are pruned as `config.checkpoint` says.

    Raises:
        CheckpointError: on every rank, if any rank could not write (a full disk, for example). What was complete
            before stays as it is.
    """
    run_dir = Path(config.logging.run_dir)
    folder = files.folder_of(run_dir, step)
    partial = folder.with_name(folder.name + files.PARTIAL)
    rank = dist.get_rank()
    problem = _attempt(lambda: _fresh_folder(partial)) if rank == 0 else None
    _raise_together(problem, partial)
    written: dict[str, dict] = {}
    problem = _attempt(lambda: written.update(_write_rank(engine, partial, rank)))
    _raise_together(problem, partial)
    own_pieces = [piece for _, pieces in parameter_pieces(engine.module) for piece in pieces]
    shapes = _gather({piece.name: list(piece.shape) for piece in own_pieces})
    manifest = Manifest(
        format=files.FORMAT, step=step, samples=samples, world_size=dist.get_world_size(),
        expert_parallel=config.parallel.expert_parallel, zero_stage=config.parallel.zero_stage,
        config=config.model_dump(mode="json"), tensors=shapes, files=_gather(written),
    )  # fmt: skip
    problem = _attempt(lambda: _publish(manifest, partial, folder, config.checkpoint)) if rank == 0 else None
    _raise_together(problem, partial)
    return folder


def _write_rank(engine, folder: Path, rank: int) -> dict[str, dict]:
    tensors: dict[str, Tensor] = {"rng|cpu|0": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        tensors["rng|device|0"] = get_accelerator().get_rng_state()
    for parameter, pieces in parameter_pieces(engine.module):
        fragment = owned_fragment(parameter, engine)
        if fragment is None:
            continue
        for piece in pieces:
            low = max(piece.start, fragment.start)
            high = min(piece.start + piece.numel, fragment.start + fragment.numel)
            for kind, flat in fragment.tensors.items() if low < high else ():
                own = flat[low - fragment.start : high - fragment.start]
                tensors[f"{kind}|{piece.name}|{low - piece.start}"] = own.detach().cpu().contiguous()
    written = {f"rank_{rank:05d}.safetensors": tensors}
    controller = engine.module.controller
    if rank == 0 and controller is not None:
        written["state.safetensors"] = {name: value.cpu().contiguous() for name, value in controller.state.items()}
    for name, content in written.items():
        save_file(content, folder / name)
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
    return {name: files.checksum(folder / name) for name in written}


def _fresh_folder(partial: Path) -> None:
    """An empty folder to write into; what killed saves left is removed."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.glob(f"step_*{files.PARTIAL}"):
        shutil.rmtree(left)
    partial.mkdir()


def _publish(manifest: Manifest, partial: Path, folder: Path, keep: CheckpointConfig) -> None:
    manifest.write(partial)
    if folder.exists():  # the same step again, after resuming from an older checkpoint
        shutil.rmtree(folder)
    os.rename(partial, folder)
    files.sync_folder(folder.parent)
    files.write_atomically(folder.parent / "latest", folder.name.encode())
    # Steps beyond this one are of a run that was begun anew in this folder; this one must outlive them.
    complete, step = files.complete_checkpoints(folder.parent.parent), files.step_of(folder)
    so_far = [path for path in complete if files.step_of(path) <= step]
    for old in so_far[: -keep.keep_last]:
        if not keep.keep_every or files.step_of(old) % keep.keep_every:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_name(old.name + files.PARTIAL)
            os.rename(old, doomed)
            shutil.rmtree(doomed)


def _attempt(action) -> str | None:
    """Run it; return what went wrong instead of raising, so that all ranks can stop together."""
    try:
        action()
    except Exception as error:  # safetensors has a class of its own for a full disk
        return f"{type(error).__name__}: {error}"
    return None


def _raise_together(problem: str | None, partial: Path) -> None:
    problems = _gather({dist.get_rank(): problem} if problem else {})
    if not problems:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    said = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(problems.items()))
    raise CheckpointError(
        f"the checkpoint {partial.name.removesuffix(files.PARTIAL)} could not be saved ({said}); "
        f"earlier checkpoints in {partial.parent} are untouched"
    )


def _gather(own: dict) -> dict:
    """All ranks' dictionaries in one, on every rank."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {key: value for part in everyone for key, value in part.items()}
