"""A folder that appears complete or not at all, also when the process is killed while writing it.

Everything is written to a hidden sibling, `.NAME.unfinished`, and renamed at the end. The sibling is locked by its
writer (`flock`, which the kernel releases when a process dies), so a later run knows a dead writer's remains from a
live one's work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsmoe.errors import DataError

DESCRIPTION = "dataset.json"  # its presence says that a folder is a prepared dataset


@contextlib.contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write into, which takes the name `output` when the block ends without an error.

    Args:
        output: the folder to make.
        overwrite: replace an earlier dataset; anything else that lies there is never replaced.

    Raises:
        DataError: `output` exists, another process is writing it, or the place cannot be written.
    """
    output = output.resolve()  # a link keeps pointing to the folder that is replaced
    unfinished = output.with_name(f".{output.name}.unfinished")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        lock = _lock(unfinished)
        try:
            _recover(replaced, output)
            _check_free(output, overwrite)
            _make_empty(unfinished)
            yield unfinished
            _flush(unfinished)
            if output.exists():
                output.rename(replaced)
            unfinished.rename(output)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            _recover(replaced, output)
            raise
        finally:
            os.close(lock)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}") from error


def _lock(folder: Path) -> int:
    """The locked descriptor of the folder, which is made if need be."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(f"another process is preparing this dataset at this moment (it holds {folder})") from None
        # The writer that held it may have renamed the folder to its final name in between: then this is not it.
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)


def _recover(replaced: Path, output: Path) -> None:
    """Undo an overwrite that ended between its two renames, by a kill or an error."""
    if replaced.exists():
        if output.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(output)


def _check_free(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / DESCRIPTION).is_file():
        raise DataError(f"{output} exists and is no prepared dataset (no {DESCRIPTION}); choose another output folder")
    if not overwrite:
        raise DataError(f"{output} already holds a prepared dataset; --overwrite replaces it")


def _make_empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _flush(folder: Path) -> None:
    """To the disk before the rename: else a power failure could leave complete names on empty files."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
