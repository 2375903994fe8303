"""Text to ids and back, by the two kinds of tokenizer that models come with, behind one interface.

`tokenizer.model` is SentencePiece, which dsmoe trains itself; `tokenizer.json` is Hugging Face's, which imported models
bring. No BOS is ever added. The id `eod_id` marks the end of a document, and what the text of a document spells
is never a control token.

Language models of code need exact round trips: tabs, line ends, runs of spaces and rare characters must survive.
SentencePiece does that when it is trained without normalization, dummy prefix and space collapsing, with byte
fallback. One character is left: U+2581, SentencePiece's own sign for a space; `encode` writes it as its three bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from dsmoe.errors import DataError
from dsmoe.runtime.files import write_atomically

LONGEST_WAIT = 8  # ids, for the rest of a character: it has at most 4 bytes, and its ids may share them with others
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in a folder with both the first counts
SPACE_SIGN = "\u2581"  # how SentencePiece spells a space inside a piece
# The trainer drops a whole sentence that has one of these: its word boundary, NUL, its "unknown" and space signs.
NOT_TRAINABLE = re.compile("[\t\0\u2047\u2581]+")
# Texts that tell tokenizers apart: code, emoji, CJK, odd spaces, line ends, names of control tokens.
PROBES = (
    "", " ", "a", " a", "  a", "   leading spaces", "two  and   three", "trailing  ", " " * 40, "x" * 100,
    "\ttab\t\ttabs", "\nline\n\nlines\n", "carriage\r\nreturn\r", "mixed \t\n \r\n\t ", "NUL \0 inside",
    "def main(argv=None):\n    for i in range(10):\n\treturn {'x': i ** 2}  # done\n",
    "U+2581 \u2581 and \u2581\u2581 twice\u2581", "naïve café, Straße, Ελλάδα, Привет",
    "中文字符，日本語のテキスト、한국어",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 family, \U0001f680\U0001f680 rockets, \u2764\ufe0f heart",
    "</s> <s> <unk> <0x0A> are text", "1234567890 3.14e-10 0x1F", "=-=-=-=-=" * 5, "ababababa aaaaaaa",
    "\u200b\ufeff\u00a0 odd spaces \u3000", "e\u0301 is not \u00e9", "\U0010ffff\ue000 private",
)  # fmt: skip
TRAINING_OPTIONS: dict[str, Any] = {
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


class Tokenizer(ABC):
    """A tokenizer and the file it was read from.

    Attributes:
        path: the file, `tokenizer.model` or `tokenizer.json`, whatever it is called.
        sha256: hexadecimal digest of the file, the tokenizer's identity in `dataset.json` and in checkpoints.
        vocab_size: number of ids; ids are 0 .. vocab_size - 1.
        eod_id: id that ends a document.
        package: the library that reads it.
    """

    path: Path
    sha256: str
    vocab_size: int
    eod_id: int
    package: str

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a SentencePiece model, a `tokenizer.json`, or a folder that holds one of them (a run, a dataset, a
        Hugging Face model). Raises `DataError` where it is missing, unreadable or damaged."""
        path = Path(path)
        if path.is_dir():
            path = _file_in(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
        return kind(path, content)

    @staticmethod
    def train(texts: Iterable[str], path: str | Path, vocab_size: int) -> SentencePieceTokenizer:
        """Train a SentencePiece model; see `SentencePieceTokenizer.train`."""
        return SentencePieceTokenizer.train(texts, path, vocab_size)

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Name and content of the files of a folder from which `load` gets this tokenizer again."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS or EOS. Lone surrogates, which no UTF-8 can hold, become '?'."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; control ids are silent, bytes that are no UTF-8 give U+FFFD."""

    @abstractmethod
    def decode_stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """Text of the ids as soon as it is complete: a character of several byte ids comes in one piece.

        Args:
            after: the ids before them, whose text is not given again. A tokenizer that drops the space at the start
                of a text needs them to keep one that is not at the start.
        """

    def texts_of(self, ids: Sequence[int]) -> list[str]:
        """What each id writes; joined they are the text. The last of several ids that write one character has it."""
        texts, read = [""] * len(ids), 0

        def one_by_one() -> Iterator[int]:
            nonlocal read
            for token in ids:
                read += 1
                yield token

        for text in self.decode_stream(one_by_one()):
            texts[read - 1] += text
        return texts

    def copy_to(self, folder: Path) -> None:
        """Write `files` into a folder; the tokenizer that lay there is replaced, whatever its kind."""
        for name, content in self.files().items():
            write_atomically(folder / name, content)
        for name in set(TOKENIZER_FILES) - self.files().keys():
            (folder / name).unlink(missing_ok=True)


def _file_in(folder: Path) -> Path:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder} holds no tokenizer: found neither {' nor '.join(TOKENIZER_FILES)}; for a Hugging Face model with "
        "other files, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER) writes a tokenizer.json"
    )


class SentencePieceTokenizer(Tokenizer):
    """A trained SentencePiece model; `</s>` ends a document."""

    package = "sentencepiece"

    def __init__(self, path: Path, model: bytes):
        if not model:  # SentencePiece takes no bytes for a model of no pieces
            raise DataError(f"{path} is not a SentencePiece model: the file is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path} is not a SentencePiece model, or it is damaged ({len(model)} bytes)") from error
        self.path, self._model = path, model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise DataError(f"tokenizer {path} has no </s>, which dsmoe writes at the end of every document")
        # A model made elsewhere may put a space before every text; its round trip is then its own.
        self._adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE_SIGN)
        self._space_sign_ids = self._byte_ids(SPACE_SIGN.encode())

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}

    @classmethod
    def train(cls, texts: Iterable[str], path: str | Path, vocab_size: int) -> SentencePieceTokenizer:
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
        return cls(path, model.getvalue())

    def encode(self, text: str) -> list[int]:
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
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        drop_space = self._adds_space and not after
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


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, and from the files beside it the token that ends a document: `eos_token` of
    `tokenizer_config.json`, else `eos_token_id` of `generation_config.json` or `config.json`."""

    package = "tokenizers"

    def __init__(self, path: Path, content: bytes):
        from tokenizers import Tokenizer as Library  # only where it is needed: it takes a while to import

        try:
            self._library = Library.from_buffer(content)
        except Exception as error:  # the library knows no other type
            raise DataError(f"{path} is not a tokenizer of the tokenizers library, or it is damaged: {error}") from None
        # A file may ask for what is right in a pipeline but not for a corpus.
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # "</s>" in a text is four characters, not the end of a document
        self.path, self._content = path, content
        self.sha256 = hashlib.sha256(content).hexdigest()
        ids = self._library.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # of a vocabulary with gaps too
        self._settings = _read_json(path.with_name("tokenizer_config.json"))
        self.eod_id = self._find_eod()

    def _find_eod(self) -> int:
        token = self._settings.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            token_id = self._library.token_to_id(str(token))
            if token_id is None:
                raise DataError(f"{self.path} does not hold the eos_token {token!r} that tokenizer_config.json names")
            return token_id
        for name in ("generation_config.json", "config.json"):
            token_id = _read_json(self.path.with_name(name)).get("eos_token_id")
            token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
            if isinstance(token_id, int) and 0 <= token_id < self.vocab_size:
                return token_id
        raise DataError(
            f"cannot tell which token of {self.path} ends a document: the folder has no tokenizer_config.json with an "
            "eos_token, and no generation_config.json or config.json with an eos_token_id of the vocabulary"
        )

    def files(self) -> dict[str, bytes]:
        settings = self._settings | {"eos_token": self._library.id_to_token(self.eod_id)}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer.json": self._content, "tokenizer_config.json": text.encode()}

    def encode(self, text: str) -> list[int]:
        return self._library.encode(_without_surrogates(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        known = [token for token in ids if token != self.eod_id and 0 <= token < self.vocab_size]
        return self._library.decode(known, skip_special_tokens=True)

    def decode_stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        # What an id writes depends on its neighbours, so each piece is decoded together with the one before it.
        before, piece = list(after)[-LONGEST_WAIT:], []
        for token in ids:
            piece.append(token)
            text = self._text_after(before, piece)
            if text and (not text.endswith("\ufffd") or len(piece) >= LONGEST_WAIT):
                yield text
                before, piece = piece, []
        if text := self._text_after(before, piece):
            yield text

    def _text_after(self, before: list[int], piece: list[int]) -> str:
        return self.decode(before + piece)[len(self.decode(before)) :]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is no such file. Raises `DataError` where it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object")
    return content


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


def encode_alike(first: Tokenizer, second: Tokenizer, more_ids: bool = False) -> bool:
    """Whether they are the same, or the same in two kinds of file.

    Args:
        more_ids: `first` may have further ids, as after tokens were added.
    """
    if first.sha256 == second.sha256:
        return True
    sizes_fit = first.vocab_size == second.vocab_size or (more_ids and first.vocab_size > second.vocab_size)
    same = sizes_fit and first.eod_id == second.eod_id
    return same and all(first.encode(text) == second.encode(text) for text in PROBES)
