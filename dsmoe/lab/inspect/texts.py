"""The user's texts: a file or a string each, cut into windows that the model can read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import ConfigError, DataError

LONGEST_NAME = 255  # bytes of a file's name; a longer argument is text


@dataclass(frozen=True)
class Text:
    """A text and what it is called: a file's name, or a number."""

    name: str
    content: str


@dataclass(frozen=True)
class Tokens:
    """A text in a model's tokens; `texts[i]` is what token i writes.

    Several byte tokens may write one character. It stands with the last of them, and the others write nothing.
    """

    name: str
    ids: list[int]
    texts: list[str]

    def windows(self, context: int) -> Iterator[tuple[int, list[int]]]:
        """(first token, ids) of consecutive windows of at most `context` tokens."""
        for first in range(0, len(self.ids), context):
            yield first, self.ids[first : first + context]


def read_texts(arguments: list[str]) -> list[Text]:
    """Each argument is a file if there is one of that name, else the text itself.

    Raises:
        DataError: a file that cannot be read or is not UTF-8, or what looks like one and is not there.
        ConfigError: an empty text.
    """
    texts: list[Text] = []
    for number, argument in enumerate(arguments, 1):
        path = Path(os.path.expanduser(argument))
        if argument and len(os.fsencode(argument)) <= LONGEST_NAME and path.is_file():
            try:
                texts.append(Text(path.name, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"--text: {argument} is not UTF-8 text ({error.reason} at byte {error.start})"
                ) from None
            except OSError as error:
                raise DataError(f"--text: cannot read {argument}: {error.strerror}") from error
        elif _looks_like_a_file(argument):
            raise DataError(f"--text: there is no file {argument}; a text of your own has a space in it, or an end")
        else:
            texts.append(Text("text" if len(arguments) == 1 else f"text {number}", argument))
    names = [text.name for text in texts]
    texts = [
        text if names.count(text.name) == 1 else Text(f"{text.name} ({number})", text.content)
        for number, text in enumerate(texts, 1)
    ]
    empty = [text.name for text in texts if not text.content.strip()]
    if empty:
        raise ConfigError([f"--text: {name} is empty" for name in empty], "the command line")
    return texts


def _looks_like_a_file(argument: str) -> bool:
    words = argument.split()
    if len(words) != 1 or words[0] != argument:
        return False
    return "/" in argument or Path(argument).suffix.lower() in (".txt", ".md", ".json", ".jsonl", ".py", ".html")


def tokenize(text: Text, tokenizer: Tokenizer, context: int, vocab_size: int, windows: int) -> Tokens:
    """Raises `ConfigError` for a text of one token, or longer than `windows` windows, and `DataError` for ids that the
    model does not have."""
    ids = tokenizer.encode(text.content)
    if len(ids) < 2:
        raise ConfigError(
            [f"--text: {text.name} is one token; at least 2 are needed, since a loss is of the token that follows"],
            "the command line",
        )
    if max(ids) >= vocab_size:
        raise DataError(f"{tokenizer.path} gives id {max(ids)}, and the model has {vocab_size}: they do not match")
    if len(ids) > windows * context:
        needed = -(-len(ids) // context)
        most = f"{windows} windows of {context}" if windows > 1 else f"the context of {context}"
        raise ConfigError(
            [
                f"--text: {text.name} has {len(ids)} tokens, more than {most}; give less, or --windows {needed} to "
                "read it in that many windows, each without what is before it"
            ],
            "the command line",
        )
    return Tokens(text.name, ids, tokenizer.texts_of(ids))
