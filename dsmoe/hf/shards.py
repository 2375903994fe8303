"""Tensors in Hugging Face's files, a few at a time: `model.safetensors`, or `model-0000x-of-0000y.safetensors` and an
index. A folder under construction has another name, so none ever looks complete that is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsmoe.checkpoint.files import complete_file, plain_name
from dsmoe.errors import CheckpointError
from dsmoe.runtime.files import sync_folder, write_atomically
from dsmoe.runtime.screen import make_console

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
T = TypeVar("T")


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MiB`. Raises `CheckpointError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B|)", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise CheckpointError(f"shard size: found {text!r}, expected a number and a unit, for example 5GB or 500MiB")
    return size


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a progress bar on a terminal's stderr."""
    console = make_console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes its name when the block ends without an error; nothing is left of it otherwise.

    Raises:
        CheckpointError: `folder` exists and is not empty, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; nothing is overwritten, choose another folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ShardWriter:
    """Collects tensors up to a size and writes them; a context manager that completes the folder at the end.

    Args:
        folder: an existing one, which nobody takes for complete yet (`new_folder`).
        max_shard_size: bytes of one file; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, max_shard_size: int):
        self.folder, self.max_shard_size = folder, max_shard_size
        self.parameters = self.bytes = 0
        self._kept: dict[str, Tensor] = {}
        self._kept_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises `CheckpointError` if there is such a tensor already, or the disk is full."""
        if name in self._names:
            raise CheckpointError(f"the tensor {name} comes twice")
        self._names.add(name)
        if self._kept and self._kept_bytes + tensor.nbytes > self.max_shard_size:
            self._write()
        # A copy: a view would keep all of its base in memory, and safetensors refuses tensors that share theirs.
        owned = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._kept[name] = owned
        self._kept_bytes += owned.nbytes
        self.parameters += owned.numel()
        self.bytes += owned.nbytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            self.finish()

    def finish(self) -> dict[str, str]:
        """Write the rest, give the files their names, and write the index. Returns tensor name -> file."""
        if self._kept:
            self._write()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, name in enumerate(names):
            self._unnamed(number).rename(self.folder / name)
        weight_map = {tensor: file for file, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
        if count > 1:
            totals = {"total_parameters": self.parameters, "total_size": self.bytes}
            index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
            write_atomically(self.folder / INDEX, json.dumps(index, indent=2).encode())
        sync_folder(self.folder)
        return weight_map

    def _unnamed(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.unnamed"

    def _write(self) -> None:
        path = self._unnamed(len(self._shards))
        try:
            save_file(self._kept, path, metadata={"format": "pt"})
            complete_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot write a shard into {self.folder}: {error}") from error
        self._shards.append(list(self._kept))
        self._kept, self._kept_bytes = {}, 0


class ShardReader:
    """Tensors of a model folder, each read when it is asked for.

    Attributes:
        shapes: name -> shape of everything in the files.

    Raises:
        CheckpointError: no safetensors files; a file that the index names is missing or damaged; index and files
            differ.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        weight_map = self._weight_map()
        for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]:
            self._open(file)
        if weight_map is not None:
            self._check(weight_map)

    def _weight_map(self) -> dict[str, str] | None:
        """The index, or None where one file holds everything."""
        path = self.folder / INDEX
        if path.is_file():
            try:
                weight_map = json.loads(path.read_text())["weight_map"]
                for name in weight_map.values():
                    plain_name(name)
                return weight_map
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
        if (self.folder / SINGLE).is_file():
            return None
        others = sorted(
            path.name for pattern in ("*.safetensors", "*.bin", "*.pt*") for path in self.folder.glob(pattern)
        )
        present = f"; found {', '.join(others[:5])}" if others else ""
        raise CheckpointError(
            f"{self.folder} has neither {SINGLE} nor {INDEX}{present} (only safetensors are read: other files may hold "
            f"code; transformers' save_pretrained writes them)"
        )

    def _open(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, and {INDEX} names it")
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or truncated: {error}") from error
        self._files[name] = file
        for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            if key in self._places:
                raise CheckpointError(f"the tensor {key} is in both {self._places[key]} and {name}")
            self._places[key] = name
            self.shapes[key] = tuple(file.get_slice(key).get_shape())

    def _check(self, weight_map: dict[str, str]) -> None:
        wrong = sorted(
            name for name in weight_map.keys() | self._places if weight_map.get(name) != self._places.get(name)
        )
        if wrong:
            raise CheckpointError(
                f"{self.folder / INDEX} and the files differ about {len(wrong)} tensors: {', '.join(wrong[:5])}"
            )

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        return self._files[self._places[name]].get_tensor(name)
