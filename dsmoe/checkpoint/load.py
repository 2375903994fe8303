"""Load: every rank reads the elements it owns now, from whatever files they lie in.

The saving job's layout plays no role: EP, number of ranks and ZeRO stage may all differ. Files are checked against
the manifest first, each by one rank, and names and shapes against the model, so nothing is missing or left over.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dsmoe.checkpoint import files
from dsmoe.checkpoint.files import Manifest
from dsmoe.config import RunConfig, validate_config
from dsmoe.config.validate import is_allowed
from dsmoe.errors import CheckpointError
from dsmoe.model.gpt import LanguageModel
from dsmoe.model.names import parameter_pieces
from dsmoe.optim.deepspeed import flat_master_weights, inner_optimizer, owned_fragment, write_model_weight
from dsmoe.optim.registry import optimizer_class
from dsmoe.routers.registry import option_classes
from dsmoe.runtime.device import accelerator, on_gpu


class CheckpointReader:
    """Ranges of canonical tensors, assembled from the files that hold them.

    Args:
        folder: a complete checkpoint.
        names: the files to read from; None: all that the manifest lists.

    Raises:
        CheckpointError: the manifest or a file cannot be read.
    """

    def __init__(self, folder: Path, names: Iterable[str] | None = None):
        self.folder = folder
        self.manifest = files.read_manifest(folder)
        self._open: dict[str, Any] = {}
        self._places: dict[tuple[str, str], list[tuple[int, int, str, str]]] = defaultdict(list)
        for name in self.manifest.files if names is None else names:
            if name.startswith("rank_"):
                self.add(name)

    def add(self, name: str) -> None:
        """Read from this file too. Raises `CheckpointError` if it cannot be read or holds something else."""
        try:
            file = safe_open(self.folder / name, framework="pt")
        except Exception as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error
        fragments = []
        for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            kind, tensor, start = key.rsplit("|", 2) if key.count("|") >= 2 else ("", "", "")
            if kind == "rng":
                continue
            part = file.get_slice(key)
            flat_fp32 = part.get_dtype() == "F32" and len(part.get_shape()) == 1
            if not kind.isidentifier() or not start.isdecimal() or not flat_fp32:
                raise CheckpointError(f"{self.folder / name}: {key!r} is not fp32 elements KIND|NAME|START of a tensor")
            fragments.append(((kind, tensor), (int(start), int(start) + part.get_shape()[0], name, key)))
        self._open[name] = file
        for place, part in fragments:
            insort(self._places[place], part)

    def kinds(self) -> set[str]:
        """ "weight", and the optimizer's states that files hold."""
        return {kind for kind, _ in self._places}

    def ranges(self, kind: str) -> dict[str, list[tuple[int, int]]]:
        """For each tensor of this kind the ranges [low, high) of its elements that files hold, in order."""
        return {name: [part[:2] for part in parts] for (of, name), parts in self._places.items() if of == kind}

    def read(self, kind: str, name: str, low: int, high: int) -> Tensor:
        """fp32 elements [low, high) of the flattened tensor. Raises `CheckpointError` if any is missing."""
        parts, reached = [], low
        for start, stop, file, key in self._places.get((kind, name), ()):
            if stop <= reached or start >= high:
                continue
            if start > reached:
                break
            part = self._open[file].get_slice(key)[reached - start : min(stop, high) - start]
            parts.append(part)
            reached += part.numel()
        if reached < high:
            raise CheckpointError(f"{self.folder}: {kind} of {name} lacks elements {reached} to {high}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def random_state(self, rank: int) -> dict[str, Tensor]:
        file = self._open.get(f"rank_{rank:05d}.safetensors")
        return {} if file is None else {k: file.get_tensor(k) for k in file.keys() if k.startswith("rng|")}  # noqa: SIM118

    def controller_state(self) -> dict[str, Tensor]:
        return self._state(files.CONTROLLER)

    def idle_steps(self) -> Tensor | None:
        """int64 [L, E], of a run that revives idle experts."""
        return self._state(files.IDLE_EXPERTS).get("idle_steps")

    def _state(self, name: str) -> dict[str, Tensor]:
        if name not in self.manifest.files:
            return {}
        try:
            return load_file(self.folder / name)
        except Exception as error:  # safetensors has a class of its own
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error


def saved_config(manifest: Manifest, folder: Path) -> RunConfig:
    """The configuration of the run that saved a checkpoint; `model.vocab_size` is set.

    Raises:
        ConfigError: it is not valid here.
        CheckpointError: it is of a model that this checkpoint cannot hold.
    """
    config = validate_config(
        manifest.config, option_classes(), source=f"the configuration in {folder / files.MANIFEST}"
    )
    model, tensors = config.model, len(manifest.tensors)
    if model.vocab_size is None:
        raise CheckpointError(f"{folder / files.MANIFEST} is damaged: its model.vocab_size is not set")
    if max(model.num_layers, model.num_experts) > tensors:  # before a skeleton of any size is built
        what = f"{model.num_layers} layers and {model.num_experts} experts"
        raise CheckpointError(f"{folder / files.MANIFEST} is damaged: its model has {what}, its list {tensors} tensors")
    return config


def load_checkpoint(engine, config: RunConfig, folder: Path) -> Manifest:
    """Bring engine, controller and random state to where the checkpoint left them; collective.

    Raises:
        CheckpointError: a damaged or missing file, tensors of another model, another router's controller or optimizer.
    """
    check_files(folder)
    reader = CheckpointReader(folder)
    _check_model(reader.manifest, engine.module, config)
    kinds = _create_optimizer_state(engine, config, reader)
    for parameter, pieces in parameter_pieces(engine.module):
        fragment = owned_fragment(parameter, engine)
        for piece in pieces:
            write_model_weight(parameter, piece.start, reader.read("weight", piece.name, 0, piece.numel))
            if fragment is None:
                continue
            low = max(piece.start, fragment.start)
            high = min(piece.start + piece.numel, fragment.start + fragment.numel)
            for kind in kinds if low < high else ():
                values = reader.read(kind, piece.name, low - piece.start, high - piece.start)
                fragment.tensors[kind][low - fragment.start : high - fragment.start].copy_(values)
    controller = engine.module.controller
    if controller is not None and _same_router(reader.manifest, config):
        controller.load(reader.controller_state())
    if engine.module.revival is not None:
        engine.module.revival.load(reader.idle_steps())
    _restore_random_state(reader)
    return reader.manifest


def _create_optimizer_state(engine, config: RunConfig, reader: CheckpointReader) -> tuple[str, ...]:
    """Give a fresh optimizer the state that it has after the checkpoint's steps, with zeros to be filled. Returns the
    kinds of tensors to read: weights alone from a checkpoint that is older than its run's first step (an import)."""
    manifest, optimizer = reader.manifest, optimizer_class(config.training)
    if not manifest.step and reader.kinds() == {"weight"}:
        return ("weight",)
    if manifest.optimizer != optimizer.name and is_allowed("training.optimizer", config.training.resume_with):
        return ("weight",)  # its state begins anew
    if manifest.optimizer != optimizer.name:
        raise CheckpointError(
            f"the checkpoint's optimizer is {manifest.optimizer!r}, this run's training.optimizer is {optimizer.name!r}"
        )
    inner = inner_optimizer(engine)
    for flat in flat_master_weights(engine):
        inner.state[flat] = optimizer.initial_state(flat, max(0, manifest.step - manifest.skipped_steps))
    return optimizer.kinds()


def load_weights(model: LanguageModel, reader: CheckpointReader) -> None:
    """Weights alone, into a model without DeepSpeed's engine (generation, export)."""
    for parameter, pieces in parameter_pieces(model):
        for piece in pieces:
            write_model_weight(parameter, piece.start, reader.read("weight", piece.name, 0, piece.numel))
    if model.controller is not None:
        model.controller.load(reader.controller_state())


def check_files(folder: Path) -> None:
    """Every file against the manifest; the work is shared, the verdict too."""
    listed = sorted(files.read_manifest(folder).files.items())
    share = listed[dist.get_rank() :: dist.get_world_size()]
    own = [files.check_file(folder, name, expected) for name, expected in share]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [problem for problem in own if problem])
    problems = [problem for part in everyone for problem in part]
    if problems:
        older = [path.name for path in files.complete_checkpoints(folder.parent.parent) if path != folder]
        hint = f"; other checkpoints of this run: {', '.join(older)} (give one as training.resume)" if older else ""
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}{hint}")


def _same_router(manifest: Manifest, config: RunConfig) -> bool:
    return manifest.config.get("router", {}).get("name") == config.router.name


def _check_model(manifest: Manifest, model: torch.nn.Module, config: RunConfig) -> None:
    """The checkpoint must hold exactly this model's tensors; collective."""
    if not _same_router(manifest, config) and not is_allowed("router.name", config.training.resume_with):
        saved_router = manifest.config.get("router", {}).get("name")
        raise CheckpointError(
            f"the checkpoint's router is {saved_router!r}, this run's router.name is {config.router.name!r}"
        )
    own = {piece.name: list(piece.shape) for _, pieces in parameter_pieces(model) for piece in pieces}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)  # a rank knows its own experts only
    expected = {name: shape for part in everyone for name, shape in part.items()}
    missing = [name for name in expected if name not in manifest.tensors]
    extra = [name for name in manifest.tensors if name not in expected]
    other = [
        f"{name} {manifest.tensors[name]} (this model: {shape})"
        for name, shape in expected.items()
        if name in manifest.tensors and manifest.tensors[name] != shape
    ]
    differences = [("missing", missing), ("not in this model", extra), ("of a different shape", other)]
    problems = [f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in differences if names]
    if problems:
        raise CheckpointError(f"the checkpoint does not match this model: tensors {'; '.join(problems)}")


def _restore_random_state(reader: CheckpointReader) -> None:
    """The same ranks go on with the same random numbers; another number of ranks has no state to take."""
    if reader.manifest.world_size != dist.get_world_size():
        return
    for name, state in reader.random_state(dist.get_rank()).items():
        if name == "rng|cpu|0":
            torch.set_rng_state(state)
        elif on_gpu():
            accelerator().set_rng_state(state)
