"""Folders that are computed once and kept, however many processes ask for them at the same time.

A folder is built under a hidden name and renamed when complete, so nobody reads a half-written one. A file lock keeps
the processes of a node from doing the same work several times; the kernel releases it when its holder dies, and no
process waits for another rank, so nothing here can deadlock a distributed run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from dsmoe.errors import DataError

BUILDING = ".building-"


def cache_folders(beside: Path, chosen: str | None) -> list[Path]:
    """Where to keep what belongs to `beside`: the chosen folder, or beside it and, if that is read-only, in /tmp."""
    if chosen is not None:
        return [Path(chosen)]
    return [
        beside.with_name(beside.name + ".cache"),
        Path(tempfile.gettempdir()) / f"dsmoe-cache-{os.getuid()}",
    ]


def provide_folder(folders: list[Path], name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in one of `folders`; if it is in none, made in the first that can be written.

    Args:
        folders: where to look and, in this order, where to try to write.
        name: identifies the content: equal names must mean equal content.
        build: fills an empty folder.

    Raises:
        DataError: none of `folders` can be written; the message gives the reason for each.
    """
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    failures = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder) as is_locked:
                return _build(folder, name, build, is_locked)
        except OSError as error:
            failures.append(f"{folder}: {error.strerror or error}")
    raise DataError(f"no place to keep what is computed from the data ({'; '.join(failures)}); set data.cache_dir")


def _build(folder: Path, name: str, build: Callable[[Path], None], is_locked: bool) -> Path:
    target = folder / name
    if target.is_dir():  # another process was faster
        return target
    if is_locked:  # then whatever is being built here has lost its builder
        for leftover in folder.glob(f"{BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    unfinished = folder / f"{BUILDING}{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        build(unfinished)
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():  # if it is: without a lock, another process renamed its own, equal one first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Alone in the folder; False on a file system without locks, where the rename alone has to do."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
