"""A SentencePiece tokenizer that gives every text back unchanged.

Language models of code need exact round trips: tabs, line ends, runs of spaces and rare characters must survive.
SentencePiece does that when it is trained without normalization, dummy prefix and space collapsing, with byte
fallback. One character is left: U+2581, SentencePiece's own sign for a space; `encode` writes it as its three bytes.

No BOS is ever added. The id of `</s>` marks the end of a document (`eod_id`).
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import sentencepiece

from dsmoe.errors import DataError

SPACE_SIGN = "\u2581"  # how SentencePiece spells a space inside a piece
# The trainer drops a whole sentence that has one of these: its word boundary, NUL, its "unknown" and space signs.
NOT_TRAINABLE = re.compile("[\t\0\u2047\u2581]+")
TRAINING_OPTIONS = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "allow_whitespace_only_pieces": True,  # runs of spaces, the indentation of code, become one token
    "split_digits": True,
    "character_coverage": 0.9995,
    "max_sentence_length": 1 << 16,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}


class Tokenizer:
    """A trained SentencePiece model.

    Attributes:
        path: the model's file.
        sha256: hexadecimal digest of the file, the tokenizer's identity in `dataset.json` and in checkpoints.
        vocab_size: number of ids; ids are 0 .. vocab_size - 1.
        eod_id: id that ends a document (`</s>`).
    """

    def __init__(self, path: Path, model: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._processor.vocab_size()
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path} is not a SentencePiece model, or it is damaged ({len(model)} bytes)") from error
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0:
            raise DataError(f"tokenizer {path} has no </s>, which dsmoe writes at the end of every document")
        # A model made elsewhere may put a space before every text; its round trip is then its own.
        self._adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE_SIGN)
        self._space_sign_ids = self._byte_ids(SPACE_SIGN.encode())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model file. Raises `DataError` where it is missing, unreadable or damaged."""
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        if not model:  # SentencePiece takes no bytes for a model of no pieces
            raise DataError(f"{path} is not a SentencePiece model: the file is empty")
        return cls(path, model)

    @classmethod
    def train(cls, texts: Iterable[str], path: str | Path, vocab_size: int) -> Tokenizer:
        """Train a model and write it to `path`. The same texts in the same order give the same file.

        Raises:
            DataError: the texts are empty, or too few for `vocab_size` (the largest possible size is named), or
                `vocab_size` has no room for 256 bytes, 3 control ids and the characters that occur.
        """
        sentences = (part for text in texts for part in NOT_TRAINABLE.split(_without_surrogates(text)) if part)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, **TRAINING_OPTIONS
            )
        except RuntimeError as error:
            raise _training_error(str(error), vocab_size) from error
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(model.getvalue())
        unfinished.replace(path)
        return cls.load(path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS or EOS. Lone surrogates, which no UTF-8 can hold, become '?'."""
        text = _without_surrogates(text)
        if SPACE_SIGN not in text or self._space_sign_ids is None or self._adds_space:
            return self._processor.encode(text)
        first, *others = text.split(SPACE_SIGN)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._space_sign_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control ids are silent, bytes that are no UTF-8 and unknown ids give U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of the ids as soon as it is complete: a character of several byte ids comes in one piece."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        drop_space = self._adds_space
        for token in ids:
            surface = self._surfaces[token] if 0 <= token < self.vocab_size else "\ufffd".encode()
            if drop_space and surface:
                surface, drop_space = surface.removeprefix(b" "), False
            text = decoder.decode(surface)
            if text:
                yield text
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest

    @cached_property
    def _surfaces(self) -> list[bytes]:
        """What each id writes, as UTF-8: the table behind `decode`."""
        return [self._surface(token) for token in range(self.vocab_size)]

    def _surface(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        if self._processor.is_control(token):
            return b""
        if self._processor.is_unknown(token):
            return "\ufffd".encode()
        return piece.replace(SPACE_SIGN, " ").encode()

    def _byte_ids(self, text: bytes) -> list[int] | None:
        """The byte-fallback ids of some bytes; None where the model has no byte fallback."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text]
        return ids if all(self._processor.is_byte(token) for token in ids) else None


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _training_error(message: str, vocab_size: int) -> DataError:
    """SentencePiece's complaint as advice: it names the limits, but in the words of its own options."""
    too_high = re.search(r"value <= (\d+)", message)
    too_small = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message)
    if too_high:
        return DataError(
            f"vocabulary of {vocab_size} is too large for these texts: found too little text, "
            f"expected a vocabulary size of at most {too_high.group(1)}"
        )
    if too_small:
        return DataError(
            f"vocabulary of {vocab_size} is too small: 256 bytes, 3 control ids and the characters of these texts "
            f"need at least {too_small.group(2)}"
        )
    return DataError(f"SentencePiece could not train a vocabulary of {vocab_size}: {message}")
