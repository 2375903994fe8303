"""The data of a run, found and checked before anything expensive starts.

`data.path` is a folder made by `dsmoe prepare-data`, or the PREFIX of a .bin/.idx pair that any Megatron tool wrote,
with or without the _KEY_document that Megatron's preprocess_data.py adds. Either becomes a `Corpus`: two ranges of
sequences, one to train on and one held out, and a tokenizer. Several of them are a blend (`dsmoe.data.blend`).
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy

from dsmoe.config import DataConfig
from dsmoe.data.cache import cache_folders
from dsmoe.data.description import DatasetDescription
from dsmoe.data.folder import DESCRIPTION
from dsmoe.data.token_files import TokenFiles
from dsmoe.data.tokenizer import TOKENIZER_FILES, Tokenizer, encode_alike
from dsmoe.errors import DataError

DECODED_TOKENS = 1_000_000  # enough held-out tokens to know how many bytes one stands for


@dataclass(frozen=True)
class Split:
    """The sequences `first` .. `stop - 1` of a pair of files."""

    name: str
    files: TokenFiles
    first: int
    stop: int

    @cached_property
    def tokens(self) -> int:
        return int(self.files.lengths[self.first : self.stop].sum(dtype="int64"))


@dataclass(frozen=True)
class Corpus:
    """What a run reads.

    Attributes:
        train: to learn from.
        valid: held out.
        tokenizer: None if there is none; then no text can be shown and no bits per byte computed.
        description: of a folder made by `prepare`; None for a foreign prefix.
        cache_dir: `data.cache_dir`.
    """

    train: Split
    valid: Split
    tokenizer: Tokenizer | None
    description: DatasetDescription | None = None
    cache_dir: str | None = None

    @property
    def parts(self) -> list[Corpus]:
        """The corpora it is made of: itself."""
        return [self]

    @cached_property
    def vocab_size(self) -> int:
        """The tokenizer's; without one, the largest id of the data and one."""
        return self.tokenizer.vocab_size if self.tokenizer else self.largest_token + 1

    @property
    def eod_id(self) -> int | None:
        return self.tokenizer.eod_id if self.tokenizer else None

    @cached_property
    def largest_token(self) -> int:
        """The largest id of both splits (in a file too large to be read whole, of an even part of it)."""
        if self.description:
            return max(split.largest_token for split in self.description.splits.values())
        pairs = {split.files.prefix: split.files for split in (self.train, self.valid)}
        return max(files.largest_token(cache_folders(files.prefix, self.cache_dir)) for files in pairs.values())

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Bytes of text for each token of the held-out split, end-of-document tokens counted; None: no tokenizer."""
        if self.description:
            return self.description.splits["valid"].bytes_per_token
        if self.tokenizer is None:
            return None
        size = tokens = 0
        for sequence in range(self.valid.first, self.valid.stop):
            ids = self.valid.files.indexed[sequence].tolist()
            size += len(self.tokenizer.decode(ids).encode())
            tokens += len(ids)
            if tokens >= DECODED_TOKENS:
                break
        return size / tokens if size else None

    def check_vocabulary(self, embedding_size: int) -> None:
        """Raises `DataError` where a token of the tokenizer or of the data has no row in the embedding."""
        if self.tokenizer and self.tokenizer.vocab_size > embedding_size:
            raise DataError(
                f"tokenizer {self.tokenizer.path} has {self.tokenizer.vocab_size} ids, more than the model's embedding "
                f"({embedding_size}); raise model.vocab_size or leave it out"
            )
        limit = min(self.vocab_size, embedding_size)
        if max(_largest_possible(split) for split in (self.train, self.valid)) < limit:
            return
        if self.largest_token >= limit:
            owner = "the model's embedding" if limit == embedding_size else "the tokenizer"
            raise DataError(
                f"{self.train.files.prefix} holds the token id {self.largest_token}, and {owner} has the ids "
                f"0 .. {limit - 1}: the data was made with another tokenizer"
            )


def open_corpus(data: DataConfig) -> Corpus:
    """Find and check the data of a run; reads no tokens.

    A prefix without `data.tokenizer` takes the tokenizer beside it, if there is one.

    Raises:
        DataError: something is missing or damaged, the tokenizer is not the one the data was made with, or the
            documents are too few to hold one out.
    """
    path = Path(str(data.path))
    if path.is_dir() and ((path / DESCRIPTION).is_file() or not _has_files(path)):
        return _open_folder(path, data)
    prefix = _megatron_prefix(_prefix(path))
    if not _has_files(prefix):
        raise DataError(
            f"data.path: found neither the folder {path} nor the files {prefix}.bin and {prefix}.idx; "
            f"make a dataset with: dsmoe prepare-data stdlib --output {path}"
        )
    return _open_prefix(prefix, data)


def _open_folder(folder: Path, data: DataConfig) -> Corpus:
    if not (folder / DESCRIPTION).is_file():
        prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
        raise DataError(
            f"data.path: {folder} has no {DESCRIPTION}, so it is no folder made by dsmoe prepare-data"
            + (f"; it holds the prefixes {', '.join(prefixes)}" if prefixes else "")
        )
    if data.valid_path is not None:
        raise DataError(
            f"data.valid_path: found {data.valid_path}, but {folder} has a held-out split of its own; leave it out"
        )
    description = DatasetDescription.load(folder)
    splits = {}
    for name, expected in description.splits.items():
        files = TokenFiles.open(folder / name)
        if files.tokens != expected.tokens:
            content = f"{folder / name}.idx has {files.tokens} tokens"
            raise DataError(f"{content}, and {DESCRIPTION} says {expected.tokens}: prepare it again")
        splits[name] = Split(name, files, 0, len(files.lengths))
    tokenizer = Tokenizer.load(data.tokenizer or folder / description.tokenizer.file)
    same = tokenizer.sha256 == description.tokenizer.sha256
    if not same and not encode_alike(tokenizer, Tokenizer.load(folder / description.tokenizer.file), more_ids=True):
        raise DataError(
            f"tokenizer {tokenizer.path} is not the one {folder} was made with "
            f"(sha256 {tokenizer.sha256[:12]}..., expected {description.tokenizer.sha256[:12]}...)"
        )
    return Corpus(splits["train"], splits["valid"], tokenizer, description, data.cache_dir)


def _open_prefix(prefix: Path, data: DataConfig) -> Corpus:
    files = TokenFiles.open(prefix)
    beside = (prefix.with_name(name) for name in TOKENIZER_FILES)
    model = data.tokenizer or next((path for path in beside if path.is_file()), None)
    tokenizer = Tokenizer.load(model) if model else None
    if data.valid_path is not None:
        held_out = TokenFiles.open(_prefix(Path(data.valid_path)))
        train, valid = Split("train", files, 0, len(files.lengths)), Split("valid", held_out, 0, len(held_out.lengths))
        return Corpus(train, valid, tokenizer, None, data.cache_dir)
    documents = len(files.boundaries) - 1
    if documents < 2:
        raise DataError(
            f"{prefix} has {documents} document(s), too few to hold some out; "
            "give another prefix as data.valid_path, or at least two documents"
        )
    train_documents = documents - min(max(round(data.valid_fraction * documents), 1), documents - 1)
    boundary = int(files.boundaries[train_documents])
    train, valid = Split("train", files, 0, boundary), Split("valid", files, boundary, len(files.lengths))
    return Corpus(train, valid, tokenizer, None, data.cache_dir)


def _prefix(path: Path) -> Path:
    """PREFIX, also where one of the two files was named."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _megatron_prefix(prefix: Path) -> Path:
    """PREFIX_KEY_document, which Megatron's preprocess_data.py makes of `--output-prefix PREFIX` and a key of the JSON
    lines, where only PREFIX was named. Raises `DataError` where there are several."""
    if _has_files(prefix):
        return prefix
    prefixes = [path.with_suffix("") for level in ("document", "sentence")
            for path in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}_*_{level}.idx"))]  # fmt: skip
    if len(prefixes) > 1:
        names = ", ".join(map(str, prefixes))
        raise DataError(
            f"data.path: {prefix} stands for several datasets of Megatron's: {names}; name one, or blend them"
        )
    return prefixes[0] if prefixes else prefix


def _has_files(prefix: Path) -> bool:
    """Whether one of the two files is there; that both have to be is for `TokenFiles.open` to say."""
    return any(prefix.with_name(prefix.name + suffix).is_file() for suffix in (".bin", ".idx"))


def _largest_possible(split: Split) -> int:
    """What the data type alone says; it spares the search for the largest id where 16 bits fit the embedding."""
    return int(numpy.iinfo(split.files.dtype).max)
