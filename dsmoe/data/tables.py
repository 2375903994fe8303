"""Documents in columns: Parquet files, and Arrow files as `datasets` saves them. Needs pyarrow (extra `tables`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsmoe.errors import DataError


def table_documents(path: Path, field: str) -> Iterator[str]:
    """The texts of a column, row after row; a row without one is left out.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or it has no such column of strings.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{path} is a table, which pyarrow reads, and it is not installed: "
            "pip install -c constraints.txt -e '.[tables]'"
        ) from error
    try:
        for batch in _batches(path, field):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is damaged or no {path.suffix} data: {error}") from error


def _batches(path: Path, field: str) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            _check(path, field, file.schema_arrow)
            yield from file.iter_batches(columns=[field])
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
            file = pyarrow.ipc.open_file(source)
            _check(path, field, file.schema)
            yield from (file.get_batch(i).select([field]) for i in range(file.num_record_batches))
            return
        _check(path, field, batches.schema)
        yield from (batch.select([field]) for batch in batches)


def _check(path: Path, field: str, schema) -> None:
    import pyarrow

    if field not in schema.names:
        raise DataError(f"{path}: no key {field!r} (found: {', '.join(map(repr, schema.names))}); name it with --field")
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: {field!r} is {kind}, expected a string")
