"""Where text comes from: files, folders, globs and the built-in `stdlib`.

A corpus is a list of files in an order that depends on their names inside the sources only, a hash of the name: it is
the same on every machine, and any first part of the corpus looks like the whole. `documents` reads what is found here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dsmoe.data.saved_datasets import to_read
from dsmoe.errors import DataError

STDLIB = "stdlib"  # the sources of the running interpreter's standard library
# Installed packages are not the library; and some distributions leave its tests out.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
JSON_LINES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst")
TABLES = (".parquet", ".arrow")  # columns; a folder that `datasets` saved has the second
# What is taken from a folder; a file named by itself or by a glob may have any name.
FOLDER_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson", ".parquet", ".arrow")
GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus; `name` is its path inside the source, with '/' on every system."""

    path: Path
    name: str
    is_stdlib: bool = False

    @property
    def is_table(self) -> bool:
        return self.path.suffix.lower() in TABLES

    @property
    def is_json_lines(self) -> bool:
        return _content_suffix(self.path.name) in JSON_LINES


def find_files(sources: Sequence[str]) -> list[SourceFile]:
    """Every file of the sources, once, in an order that depends on names only.

    Args:
        sources: each a file, a folder (searched with all its subfolders; of one that `datasets` wrote its split
            `train`), a glob (`**` allowed) or `stdlib`.

    Raises:
        DataError: a source does not exist or has no file; the message says what was looked for.
    """
    if not sources:
        raise DataError(f"no source given: expected files, folders, globs or {STDLIB!r}")
    files = {file.path.resolve(): file for source in sources for file in _files_of(source)}
    return sorted(
        files.values(), key=lambda file: (hashlib.sha256(os.fsencode(file.name)).digest(), file.name, file.path)
    )


def passed_over(sources: Sequence[str]) -> dict[str, int]:
    """How many files of each suffix lie in the sources' folders and are not read: they are neither text nor JSON lines
    by their names. Hidden files are not counted."""
    counts: Counter[str] = Counter()
    for source in map(os.path.expanduser, sources):
        if source != STDLIB and os.path.isdir(source):
            names = (name for name in _walk(Path(source)) if _content_suffix(name) not in FOLDER_SUFFIXES)
            counts.update(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    return dict(counts.most_common())


def other_splits(sources: Sequence[str]) -> list[Path]:
    """Splits of `datasets` folders that are not read, each a source of its own: a folder or a file."""
    paths: list[Path] = []
    for source in map(os.path.expanduser, sources):
        if source != STDLIB and os.path.isdir(source):
            paths += (folder / name for folder, _, others in _folders(Path(source)) for name in others)
    return sorted(paths)


def _files_of(source: str) -> list[SourceFile]:
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [SourceFile(root / name, name, True) for name in _walk(root, skip=NOT_STDLIB) if name.endswith(".py")]
        if not files:
            raise DataError(f"source {STDLIB!r}: this Python keeps no *.py sources in {root}")
        return files
    source = os.path.expanduser(source)  # a shell leaves ~ alone in --option=~/x and between quotes
    path = Path(source)
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        files = [SourceFile(path / name, name) for name in _walk(path) if _content_suffix(name) in FOLDER_SUFFIXES]
        if not files:
            raise DataError(
                f"source {source!r}: the folder has no {', '.join(FOLDER_SUFFIXES)} file (or these with "
                f"{' or '.join(COMPRESSIONS)}); for other names give a glob such as '{path.as_posix()}/**/*.py'"
            )
        return files
    if GLOB_CHARACTERS & set(source):
        files = [SourceFile(Path(name), Path(name).as_posix()) for name in glob.glob(source, recursive=True)]
        files = [file for file in files if file.path.is_file()]
        if not files:
            raise DataError(f"source {source!r}: no file matches this glob (searched from {Path.cwd()})")
        return files
    raise DataError(
        f"source {source!r}: there is no such file or folder (looked for {path.absolute()}); "
        f"expected a file, a folder, a glob or {STDLIB!r}"
    )


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of all files below `root`, relative to it and with '/'.

    Hidden files and folders are left out: they are caches and version control, nothing a model should learn.
    """
    for folder, files, _ in _folders(root, skip):
        relative = folder.relative_to(root)
        yield from ((relative / name).as_posix() for name in files)


def _folders(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder that is searched, its files that are read, and its entries of other splits."""
    for folder, folders, files in os.walk(root):
        folders[:], files, others = to_read(
            Path(folder),
            [name for name in folders if name not in skip and not name.startswith(".")],
            [name for name in files if not name.startswith(".")],
        )
        yield Path(folder), files, others


def _content_suffix(name: str) -> str:
    """The suffix under the compression: '.jsonl' of 'part-0.jsonl.zst'."""
    path = PurePosixPath(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
