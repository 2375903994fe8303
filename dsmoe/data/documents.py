"""What a source file holds: one document in a text file, one a line in JSON lines, one a row of a Parquet or Arrow
table; text and JSON lines plain, gzip or zstd.

Text arrives exactly as it is written, line ends included. Whatever is wrong with a file is said with its name and,
for JSON lines, the line: nothing is skipped in silence.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, BinaryIO, TextIO, cast

import zstandard

from dsmoe.data.sources import SourceFile
from dsmoe.data.tables import table_documents
from dsmoe.errors import DataError

LONGEST_WINDOW = 1 << 31  # bytes; what `zstd --long=31` writes


def read_documents(
    files: Sequence[SourceFile],
    field: str | Sequence[str] = "text",
    progress: Callable[[int], None] | None = None,
    separator: re.Pattern | None = None,
) -> Iterator[str]:
    """The documents of the files, in order; empty ones are left out.

    Args:
        files: from `find_files`.
        field: key of the text in a JSON line, or column of a table. Of several the texts are one document, with a blank
            line between them, so that a title stays with its text whichever split they are in.
        progress: called with the number of bytes read from disk (before decompression) since its last call.
        separator: what ends a document in a text file, and belongs to none (`separator_of`); None: a file is one.

    Raises:
        DataError: a file is unreadable, damaged or no UTF-8 (a `stdlib` file that Python itself could not decode is
            left out), or a line is no JSON object with a string under `field`; names file and line.
    """
    fields = (field,) if isinstance(field, str) else tuple(field)
    for file in files:
        with _explained(file):
            with open(file.path, "rb") as raw:
                size, reported = os.fstat(raw.fileno()).st_size, 0
                for text in _documents_of(file, raw, fields, separator):
                    if progress:
                        position = raw.tell()
                        progress(position - reported)
                        reported = position
                    if text:
                        yield text
                if progress:
                    progress(size - reported)


def separator_of(pattern: str) -> re.Pattern:
    """`blank` for one or more blank lines, else a regular expression, in which ^ and $ are a line's ends.

    Raises:
        DataError: it is no regular expression.
    """
    try:
        return re.compile(r"(?<=\n)(?:[ \t]*\r?\n)+" if pattern == "blank" else pattern, re.MULTILINE)
    except re.error as error:
        raise DataError(
            f"--split-documents: found {pattern!r}, expected 'blank' or a regular expression: {error}"
        ) from error


def _split(text: str, separator: re.Pattern) -> Iterator[str]:
    start = 0
    for match in separator.finditer(text):
        yield text[start : match.start()]
        start = match.end()
    yield text[start:]


def _documents_of(
    file: SourceFile, raw: BinaryIO, fields: Sequence[str], separator: re.Pattern | None
) -> Iterator[str]:
    if file.is_table:
        yield from map(_joined, table_documents(file.path, fields))
        return
    if file.is_stdlib:
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # test data that is broken on purpose
            with tokenize.open(file.path) as text:
                yield text.read()
        return
    # newline="": line ends are part of a text and are kept as they are; utf-8-sig drops a byte order mark.
    with _decompressed(file, raw) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as text:
        if file.is_json_lines:
            yield from map(_joined, _json_documents(file, text, fields))
        elif separator is not None:
            yield from _split(text.read(), separator)
        else:
            yield text.read()


def _decompressed(file: SourceFile, raw: BinaryIO) -> IO[bytes]:
    suffix = file.path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw))
    return raw


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or several frames; zstandard's own reader takes a cut-off file for a short one."""

    def __init__(self, compressed: BinaryIO):
        self._compressed = compressed
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._unread = b""  # compressed, of the next frame
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._content:
            data = self._unread or self._compressed.read(1 << 17)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            self._unread = b""
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()
            self._content = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._unread, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def _joined(texts: list[str]) -> str:
    return "\n\n".join(filter(None, texts))


def _json_documents(file: SourceFile, lines: TextIO, fields: Sequence[str]) -> Iterator[list[str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        try:
            record = json.loads(line, parse_int=_short_integer)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg}); expected one JSON object a line") from error
        except RecursionError as error:
            raise DataError(f"{where}: nested too deeply; expected one JSON object a line") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise DataError(f"{where}: found a JSON {found}, expected an object with the key {fields[0]!r}")
        for field in fields:
            if field not in record:
                found = ", ".join(map(repr, record))
                raise DataError(f"{where}: no key {field!r} (found: {found}); name it with --field")
            if not isinstance(record[field], str):
                raise DataError(f"{where}: {field!r} is {type(record[field]).__name__}, expected a string")
        yield [record[field] for field in fields]


def _short_integer(digits: str) -> int:
    """Numbers are not read, and Python refuses to convert thousands of digits."""
    return int(digits) if len(digits) < 20 else 0


@contextlib.contextmanager
def _explained(file: SourceFile) -> Iterator[None]:
    """Turns what a damaged file raises into a `DataError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{file.path} is not UTF-8 text: {error.reason} ({byte})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{file.path} is damaged or not {file.path.suffix} data: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {file.path}: {error.strerror or error}") from error
