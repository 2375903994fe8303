"""Megatron's .bin/.idx pair, looked at before Megatron does: every damage gets a sentence instead of an assertion.

`.idx` is: 9 bytes magic, int64 version, int8 dtype code, int64 S sequences, int64 D + 1 document boundaries, then
int32 length of each sequence, int64 byte offset of each sequence in `.bin`, int64 boundaries counted in sequences.
`.bin` is the ids of all sequences, one after the other. A "sequence" is what others call a document here: Megatron
allows several of them in one document.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy

from dsmoe.data.cache import provide_folder
from dsmoe.data.description import file_sha256
from dsmoe.data.megatron import indexed_dataset
from dsmoe.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}  # code in .idx; 6 and 7 are floats, which are no ids
SCAN_TOKENS = 1 << 28  # read at most to find the largest id: a second or so
PIECE = 1 << 22  # sequences of an index that are checked at a time
QUICK_TOKENS = 1 << 24  # so few are read again each time, which leaves no file behind


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """A pair PREFIX.bin, PREFIX.idx that fits together.

    Attributes:
        prefix: path without suffix.
        dtype: of the ids in `.bin`.
        lengths: `[S]` int32, tokens of each sequence (memory-mapped).
        boundaries: `[D + 1]` int64, the sequences at which documents begin, and their number.
        tokens: in the whole of `.bin`.
        states: path -> (inode, bytes) of both files when they were opened.
    """

    prefix: Path
    dtype: numpy.dtype
    lengths: numpy.ndarray
    boundaries: numpy.ndarray
    tokens: int
    states: dict[Path, tuple[int, int]]

    @classmethod
    def open(cls, prefix: Path) -> TokenFiles:
        """Check the pair without reading `.bin`.

        Raises:
            DataError: a file is missing, is not in the format, or the two do not belong together.
        """
        idx, bin_ = _with(prefix, ".idx"), _with(prefix, ".bin")
        missing = [str(path) for path in (bin_, idx) if not path.is_file()]
        if missing:
            raise DataError(f"no such file: {' and '.join(missing)}; a dataset PREFIX is PREFIX.bin and PREFIX.idx")
        try:
            size = idx.stat().st_size
            with open(idx, "rb") as content:
                header = content.read(HEADER.size)
            with open(bin_, "rb"):
                bin_size = bin_.stat().st_size
            states = {path: _state(path) for path in (idx, bin_)}
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
        if header[: len(MAGIC)] != MAGIC or len(header) < HEADER.size:
            header_text = f"it begins with {header[: len(MAGIC)]!r}, expected {MAGIC!r}"
            raise DataError(f"{idx} is not an index in Megatron's format: {header_text}")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != VERSION:
            raise DataError(f"{idx} has version {version} of Megatron's format, expected {VERSION}")
        if code not in DTYPES:
            raise DataError(f"{idx} has the data type code {code}, expected an integer type: one of {sorted(DTYPES)}")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if sequences < 0 or boundaries < 0:
            raise DataError(f"{idx} is damaged: its header claims {sequences} sequences and {boundaries} boundaries")
        if size < expected:
            raise DataError(f"{idx} is truncated: {size} bytes, and its header claims {expected}")
        lengths = numpy.memmap(idx, "i4", "r", HEADER.size, (sequences,)) if sequences else numpy.zeros(0, "i4")
        marks = numpy.memmap(idx, "i8", "r", HEADER.size + 12 * sequences, (boundaries,))
        if not boundaries or marks[-1] != sequences:
            raise DataError(f"{idx} is damaged: its documents do not add up to its {sequences} sequences")
        pointers = numpy.memmap(idx, "i8", "r", HEADER.size + 4 * sequences, (sequences,)) if sequences else lengths
        if problem := _damage(lengths, pointers, marks, numpy.dtype(DTYPES[code]).itemsize):
            raise DataError(f"{idx} is damaged: {problem}")
        files = cls(prefix, numpy.dtype(DTYPES[code]), lengths, marks, int(lengths.sum(dtype=numpy.int64)), states)
        claimed = files.tokens * files.dtype.itemsize
        if bin_size != claimed:
            word = "truncated" if bin_size < claimed else "longer than its index"
            raise DataError(f"{bin_} is {word}: {bin_size} bytes, and {idx.name} claims {claimed}; prepare it again")
        if not files.tokens:
            raise DataError(f"{bin_} is empty: no tokens")
        return files

    def check_size(self) -> None:
        """That neither file became shorter: the kernel ends a process that reads memory-mapped bytes beyond the end.

        Raises:
            DataError: a file was truncated since it was opened.
        """
        for path, (inode, size) in self.states.items():
            try:
                current_inode, current_size = _state(path)
            except OSError:
                continue  # what was deleted stays readable for who has it open
            if current_inode == inode and current_size < size:
                raise DataError(
                    f"{path} was truncated while it was read: {current_size} bytes, {size} when it was opened; "
                    "restore it and start again, from the newest checkpoint"
                )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content of `.idx`: what the order of training samples depends on."""
        return file_sha256(_with(self.prefix, ".idx"))

    @cached_property
    def indexed(self):
        """Megatron's `IndexedDataset` over the pair, memory-mapped."""
        return indexed_dataset().IndexedDataset(str(self.prefix), mmap=True)

    def largest_token(self, cache_folders: list[Path]) -> int:
        """The largest id, remembered in the cache; of a very large file, the largest of an evenly spaced part."""
        if self.tokens <= QUICK_TOKENS:
            return self._scan()
        state = _with(self.prefix, ".bin").stat()
        key = hashlib.sha256(f"{self.fingerprint} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:32]

        def scan(folder: Path) -> None:
            (folder / "value").write_text(str(self._scan()))

        return int((provide_folder(cache_folders, f"largest_token-{key}", scan) / "value").read_text())

    def _scan(self) -> int:
        ids = numpy.memmap(_with(self.prefix, ".bin"), self.dtype, "r")
        parts = 64
        length = min(-(-len(ids) // parts), SCAN_TOKENS // parts)
        starts = numpy.linspace(0, len(ids) - length, parts).astype(numpy.int64)
        return max(int(ids[start : start + length].max()) for start in starts)


def _damage(lengths: numpy.ndarray, pointers: numpy.ndarray, marks: numpy.ndarray, itemsize: int) -> str | None:
    """What is wrong with an index, a piece at a time: a wrong place in it would be read from beyond the file."""
    place = 0
    for start in range(0, len(lengths), PIECE):
        part = lengths[start : start + PIECE].astype("i8") * itemsize
        ends = place + part.cumsum()
        if part.min(initial=0) < 0:
            return "a sequence has less than no tokens"
        if not numpy.array_equal(pointers[start : start + PIECE], ends - part):
            return "its sequences do not lie one after another"
        place = int(ends[-1])
    if marks[0] != 0:
        return f"its first document begins at sequence {marks[0]}"
    for start in range(0, len(marks), PIECE):
        if (numpy.diff(marks[start : start + PIECE + 1]) < 0).any():
            return "its documents are not in order"
    return None


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_size


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
