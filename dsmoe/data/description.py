"""`dataset.json`: what a prepared dataset consists of and how it was made.

It holds no time and no machine, so the same sources and options give the same file everywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsmoe.data.folder import DESCRIPTION
from dsmoe.errors import DataError

FORMAT_VERSION = 1


class SplitDescription(BaseModel):
    """One of the two splits; a token count includes the end-of-document token of every document."""

    model_config = ConfigDict(extra="ignore")

    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)  # of the text, in UTF-8
    bytes_per_token: float = Field(gt=0)
    largest_token: int = Field(ge=0)


class TokenizerDescription(BaseModel):
    model_config = ConfigDict(extra="ignore")

    file: str = "tokenizer.model"
    sha256: str
    vocab_size: int = Field(ge=1)
    eod_id: int = Field(ge=0)
    trained_here: bool  # on this corpus; False: copied from --tokenizer


class DatasetDescription(BaseModel):
    """The whole of `dataset.json`. Keys a later version adds are ignored; a changed meaning raises `format_version`."""

    model_config = ConfigDict(extra="ignore")

    format_version: Literal[1] = FORMAT_VERSION  # type: ignore[assignment]
    name: str
    sources: list[str]
    valid_sources: list[str] = []  # what was held out; none: chosen by `valid_fraction`
    split_documents: str | None = None  # what separates documents in a text file
    field: str | list[str]  # key of the text in JSON lines and tables, or several whose texts are one document
    seed: int
    valid_fraction: float
    limit_bytes: int | None
    tokenizer: TokenizerDescription
    splits: dict[Literal["train", "valid"], SplitDescription]
    files: dict[str, str]  # file name -> sha256
    versions: dict[str, str]  # package -> version that wrote the files

    def save(self, folder: Path) -> None:
        (folder / DESCRIPTION).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> DatasetDescription:
        """Read `folder/dataset.json`. Raises `DataError` where it is missing, damaged or of another format."""
        path = folder / DESCRIPTION
        try:
            description = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            message = f"{path} is no description of a dataset that this dsmoe reads: {where}: {first['msg']}"
            raise DataError(message) from error
        missing = {"train", "valid"} - set(description.splits)
        if missing:
            raise DataError(f"{path} does not describe the split {', '.join(sorted(missing))}")
        return description


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
