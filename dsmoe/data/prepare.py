"""Text to a dataset that training reads: a tokenizer, two splits in Megatron's .bin/.idx format, and a description.

    survey     read everything once: count, choose the held-out documents, sample text
    tokenizer  train one on the sample, or copy a given one
    encode     read again, tokenize in worker processes, write

The folder appears when all of it is there. Its bytes depend on the sources and the options, not on the machine or the
number of workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

import dsmoe
from dsmoe.data.description import (
    DatasetDescription,
    SplitDescription,
    TokenizerDescription,
    file_sha256,
)
from dsmoe.data.documents import read_documents, separator_of
from dsmoe.data.encoding import encode_documents
from dsmoe.data.folder import new_folder
from dsmoe.data.megatron import indexed_dataset
from dsmoe.data.sources import COMPRESSIONS, SourceFile, find_files
from dsmoe.data.survey import Survey, byte_length, document_hash, first_bytes, survey_documents
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import DataError, printable

TYPICAL_COMPRESSION = 4  # text by gzip or zstd; only scales the tokenizer's sample


def prepare(
    sources: Sequence[str],
    output: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    valid_fraction: float = 0.02,
    valid_sources: Sequence[str] = (),
    split_documents: str | None = None,
    workers: int | None = None,
    field: str | Sequence[str] = "text",
    seed: int = 0,
    limit_bytes: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> DatasetDescription:
    """Make the dataset folder `output`: `{train,valid}.{bin,idx}`, the tokenizer, `dataset.json`.

    Args:
        sources: files, folders, globs, or `stdlib`; see `dsmoe.data.sources`.
        output: folder to make; it appears complete or not at all.
        vocab_size: of the tokenizer to train; unused with `tokenizer`.
        tokenizer: one to use instead of training one; see `Tokenizer.load`.
        valid_fraction: held-out part of the documents, in (0, 1); at least one document. Unused with `valid_sources`.
        valid_sources: like `sources`: what is held out. Documents that occur there too are left out of the rest.
        split_documents: what separates documents in a text file: "blank" (lines) or a regular expression; None: a file
            is one document.
        workers: processes that tokenize; None: one for each core this process may use.
        field: key of the text in JSON lines, or several; see `read_documents`.
        seed: of the choice of held-out documents and of the text the tokenizer learns from.
        limit_bytes: use the first documents up to so many bytes of text.
        overwrite: replace an existing dataset.
        console: where progress is shown; None: nowhere.

    Raises:
        DataError: any mistake in sources, options or output; nothing is left behind.
    """
    workers = workers or len(os.sched_getaffinity(0))
    _check_options(valid_fraction, workers, limit_bytes, seed)
    own_tokenizer = Tokenizer.load(tokenizer) if tokenizer else None
    separator = None if split_documents is None else separator_of(split_documents)
    held_out = _Texts(find_files(valid_sources), field, None, separator) if valid_sources else None
    texts = _Texts(find_files(sources), field, limit_bytes, separator)
    output = Path(output).expanduser()
    with new_folder(output, overwrite) as folder, _progress(console) as progress:
        texts = texts.holding_out(held_out, seed)
        survey = _survey(texts, valid_fraction, seed, own_tokenizer is None, progress)
        model = _provide_tokenizer(own_tokenizer, survey, folder, vocab_size, progress)
        splits = _encode(texts, survey, seed, model, folder, workers, progress)
        description = DatasetDescription(
            name=output.resolve().name,
            sources=[printable(str(source)) for source in sources],
            valid_sources=[printable(str(source)) for source in valid_sources],
            split_documents=split_documents,
            field=field if isinstance(field, str) else list(field),
            seed=seed,
            valid_fraction=valid_fraction,
            limit_bytes=limit_bytes,
            tokenizer=TokenizerDescription(
                file=model.path.name,
                sha256=model.sha256,
                vocab_size=model.vocab_size,
                eod_id=model.eod_id,
                trained_here=own_tokenizer is None,
            ),
            splits=splits,
            files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
            versions=written_by(model),
        )
        description.save(folder)
    return description


def written_by(tokenizer: Tokenizer) -> dict[str, str]:
    """Package -> version, of those that wrote a dataset's files."""
    packages = ("megatron-core", tokenizer.package)
    return {"dsmoe": dsmoe.__version__} | {package: version(package) for package in packages}


@dataclass(frozen=True)
class _Texts:
    """The corpus as the options describe it; it is read twice."""

    files: Sequence[SourceFile]
    field: str | Sequence[str]
    limit_bytes: int | None
    separator: re.Pattern | None = None
    held_out: _Texts | None = None  # comes after the rest
    held_out_hashes: frozenset[int] = frozenset()
    seed: int = 0

    def holding_out(self, others: _Texts | None, seed: int) -> _Texts:
        """These texts without those of `others`, and then those."""
        if others is None:
            return self
        hashes = frozenset(document_hash(text, seed) for text in others.documents())
        if not hashes:
            raise DataError("--valid: the held-out sources hold no text")
        return replace(self, held_out=others, held_out_hashes=hashes, seed=seed)

    def documents(self, progress: Callable[[int], None] | None = None) -> Iterator[str]:
        texts = read_documents(self.files, self.field, progress, self.separator)
        if self.held_out is not None:
            texts = (text for text in texts if document_hash(text, self.seed) not in self.held_out_hashes)
        yield from first_bytes(texts, self.limit_bytes)
        if self.held_out is not None:
            yield from self.held_out.documents(progress)

    @property
    def size_on_disk(self) -> int:
        others = 0 if self.held_out is None else self.held_out.size_on_disk
        return sum(file.path.stat().st_size for file in self.files) + others

    @property
    def expected_bytes(self) -> int:
        """Roughly how much text there is."""
        compressed = sum(file.path.stat().st_size for file in self.files if file.path.suffix.lower() in COMPRESSIONS)
        expected = self.size_on_disk + (TYPICAL_COMPRESSION - 1) * compressed
        return expected if self.limit_bytes is None else min(expected, self.limit_bytes)


def _check_options(valid_fraction: float, workers: int, limit_bytes: int | None, seed: int) -> None:
    if not 0 < valid_fraction < 1:
        raise DataError(f"valid_fraction: found {valid_fraction}, expected a number between 0 and 1")
    if workers < 1:
        raise DataError(f"workers: found {workers}, expected 1 or more")
    if limit_bytes is not None and limit_bytes < 1:
        raise DataError(f"limit: found {limit_bytes} bytes, expected at least 1")
    if not 0 <= seed < 1 << 32:
        raise DataError(f"seed: found {seed}, expected 0 .. 2^32 - 1")


def _progress(console: Console | None) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
        console=console or Console(quiet=True),
    )


def _survey(texts: _Texts, valid_fraction: float, seed: int, with_sample: bool, progress: Progress) -> Survey:
    task = progress.add_task("Reading", total=texts.size_on_disk, detail=_count(len(texts.files), "file"))
    documents = texts.documents(lambda count: progress.advance(task, count))
    expected = texts.expected_bytes if with_sample else None
    survey = survey_documents(documents, valid_fraction, seed, expected, texts.held_out_hashes)
    summary = f"{survey.documents:,} documents, {survey.bytes / 1e6:,.1f} MB of text"
    progress.update(task, total=1, completed=1, detail=summary)
    return survey


def _provide_tokenizer(
    own_tokenizer: Tokenizer | None, survey: Survey, folder: Path, vocab_size: int, progress: Progress
) -> Tokenizer:
    if own_tokenizer is not None:
        own_tokenizer.copy_to(folder)
        return Tokenizer.load(folder)
    task = progress.add_task("Training tokenizer", total=None, detail=f"vocabulary of {vocab_size:,}")
    model = Tokenizer.train(survey.sample, folder / "tokenizer.model", vocab_size)
    progress.update(task, total=1, completed=1)
    return model


def _encode(
    texts: _Texts, survey: Survey, seed: int, model: Tokenizer, folder: Path, workers: int, progress: Progress
) -> dict[str, SplitDescription]:
    task = progress.add_task("Encoding", total=survey.bytes, detail="loading Megatron-Core")
    writers = {name: SplitWriter(folder / name, model.vocab_size) for name in ("train", "valid")}
    progress.update(task, detail=_count(workers, "worker"))
    for group, encoded in encode_documents(texts.documents(), model.path, writers["train"].dtype, workers):
        size = 0
        for text, ids in zip(group, encoded, strict=True):
            split = "valid" if survey.is_held_out(document_hash(text, seed)) else "train"
            size += writers[split].add(text, ids)
        progress.advance(task, size)
    read = sum(writer.documents for writer in writers.values()), sum(writer.bytes for writer in writers.values())
    if read != (survey.documents, survey.bytes):
        raise DataError(
            f"the sources changed while they were read: found {read[0]} documents of {read[1]} bytes, "
            f"expected {survey.documents} of {survey.bytes}; run it again"
        )
    progress.update(task, detail=f"{sum(writer.tokens for writer in writers.values()):,} tokens")
    return {name: writer.finish() for name, writer in writers.items()}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class SplitWriter:
    """One split's .bin/.idx, and the sums that describe it."""

    def __init__(self, prefix: Path, vocab_size: int):
        module = indexed_dataset()
        self.dtype: type[numpy.integer] = module.DType.optimal_dtype(vocab_size)
        self._prefix = prefix
        self._builder = module.IndexedDatasetBuilder(f"{prefix}.bin", self.dtype)
        self.documents = self.tokens = self.bytes = self._largest = 0

    def add(self, text: str, ids: numpy.ndarray) -> int:
        """Append a document; returns the bytes of its text."""
        size = byte_length(text)
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += size
        self._largest = max(self._largest, int(ids.max()))
        return size

    def finish(self) -> SplitDescription:
        self._builder.finalize(f"{self._prefix}.idx")
        return SplitDescription(
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
            bytes_per_token=self.bytes / max(self.tokens, 1),
            largest_token=self._largest,
        )
