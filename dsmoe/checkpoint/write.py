"""A checkpoint of weights alone, written by one process from tensors that come one after another (an import).

It is what a job of as many ranks as there are files could have saved before its first step: `load_checkpoint` reads it
at any layout, and the optimizer starts without state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsmoe.checkpoint import files
from dsmoe.config import RunConfig
from dsmoe.errors import CheckpointError
from dsmoe.runtime.files import write_atomically

FILE_SIZE = 1 << 30  # bytes; what is kept in memory before it is written


def write_weights(
    run_dir: Path,
    config: RunConfig,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    controller: Mapping[str, Tensor] | None = None,
    copied_experts: bool = False,
    file_size: int = FILE_SIZE,
) -> Path:
    """Write the checkpoint of step 0 of a run. The caller keeps `run_dir` from looking complete until all is done.

    Args:
        shapes: of every tensor of the model, by canonical name.
        tensors: all of them, in any order and dtype; kept as fp32.
        controller: state of the routers' controller, if the router has one.
        copied_experts: whether experts of a layer may be equal.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a tensor is missing, extra, comes twice, has another shape or values that are not finite; or
            the disk is full.
    """
    folder = files.folder_of(run_dir, 0)
    folder.mkdir(parents=True)
    written: dict[str, dict] = {}
    pending: dict[str, Tensor] = {}
    pending_bytes = 0
    left = dict(shapes)
    for name, tensor in tensors:
        shape = left.pop(name, None)
        if shape is None or tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(f"the tensor {name} {list(tensor.shape)} does not belong here, or comes twice")
        own = tensor.detach().to("cpu", torch.float32, copy=True).flatten()
        if not torch.isfinite(own).all():
            raise CheckpointError(f"the tensor {name} has values that are not finite")
        if pending and pending_bytes + own.nbytes > file_size:
            _write(folder, f"rank_{len(written):05d}.safetensors", pending, written)
            pending, pending_bytes = {}, 0
        pending[f"weight|{name}|0"] = own
        pending_bytes += own.nbytes
    if left:
        raise CheckpointError(f"{len(left)} tensors are missing: {', '.join(list(left)[:8])}")
    _write(folder, f"rank_{len(written):05d}.safetensors", pending, written)
    ranks = len(written)
    if controller is not None:
        state = {name: value.detach().cpu().contiguous() for name, value in controller.items()}
        _write(folder, files.CONTROLLER, state, written)
    files.Manifest(
        format=files.FORMAT, step=0, samples=0, world_size=ranks, expert_parallel=1,
        zero_stage=config.parallel.zero_stage, config=config.model_dump(mode="json"),
        tensors={name: list(shape) for name, shape in shapes.items()}, files=written, serial=1,
        copied_experts=copied_experts,
    ).write(folder)  # fmt: skip
    write_atomically(folder.parent / "latest", folder.name.encode())
    return folder


def _write(folder: Path, name: str, content: dict[str, Tensor], written: dict[str, dict]) -> None:
    try:
        save_file(content, folder / name)
        files.complete_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot write {folder / name}: {error}") from error
    written[name] = files.checksum(folder / name)
