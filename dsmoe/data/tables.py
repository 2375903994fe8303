"""Documents in columns: Parquet files, and Arrow files as `datasets` saves them. Needs pyarrow (extra `tables`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dsmoe.errors import DataError


def table_documents(path: Path, fields: Sequence[str]) -> Iterator[list[str]]:
    """The texts of the columns, row after row; without those that a row lacks.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or it has no such columns of strings.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{path} is a table, which pyarrow reads, and it is not installed: "
            "pip install -c constraints.txt -e '.[tables]'"
        ) from error
    try:
        for batch in _batches(path, list(fields)):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield [text for text in row if text is not None]
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is damaged or no {path.suffix} data: {error}") from error


def _batches(path: Path, fields: list[str]) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            _check(path, fields, file.schema_arrow)
            yield from (batch.select(fields) for batch in file.iter_batches(columns=fields))
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
            file = pyarrow.ipc.open_file(source)
            _check(path, fields, file.schema)
            yield from (file.get_batch(i).select(fields) for i in range(file.num_record_batches))
            return
        _check(path, fields, batches.schema)
        yield from (batch.select(fields) for batch in batches)


def _check(path: Path, fields: list[str], schema) -> None:
    import pyarrow

    for field in fields:
        if field not in schema.names:
            found = ", ".join(map(repr, schema.names))
            raise DataError(f"{path}: no key {field!r} (found: {found}); name it with --field")
        kind = schema.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: {field!r} is {kind}, expected a string")
