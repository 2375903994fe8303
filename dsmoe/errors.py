"""Every error a user can cause, in one place. Each message names what was found and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DsmoeError(Exception):
    """Base of all errors that are the user's to fix; launch files print the message without a stack trace.

    Attributes:
        exit_code: 2, refused before any work; 1 where work had begun (dsmoe/runtime/exit_codes.py).
    """

    exit_code = 2

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class ConfigError(DsmoeError):
    """One or more mistakes in a run configuration.

    Attributes:
        problems: one line each, `field: what is wrong (what was expected)`.
    """

    def __init__(self, problems: list[str], source: str = "configuration"):
        self.problems = problems
        count = len(problems)
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        super().__init__(f"{source} has {count} mistake{'s' if count != 1 else ''}:\n{lines}")


class ParallelError(DsmoeError):
    """The parallel plan does not fit the processes that were launched."""


class RouterError(DsmoeError):
    """A router is unknown, cannot be loaded, or breaks the contract of `dsmoe.routers.base`."""


class DataError(DsmoeError):
    """A corpus, a prepared dataset or a tokenizer is missing, damaged or does not fit the model."""


class CheckpointError(DsmoeError):
    """A checkpoint is missing, incomplete, damaged or belongs to another model."""


class ConversionError(DsmoeError):
    """A model cannot be carried to or from Hugging Face exactly, or the result does not compute the same."""


class RunFolderError(DsmoeError):
    """The run folder is in use by another run, or cannot be read or written."""


class TrainingError(DsmoeError):
    """Training cannot go on (for example a loss that is not finite)."""

    exit_code = 1


def printable(text: str) -> str:
    """Text in which bytes of a file name that are no UTF-8 are spelt out (`\\xff`): any terminal takes it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a name that looks like a known one, else nothing: to be added to a message."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(name: str, known: Iterable[str]) -> str:
    """`one of a, b (did you mean 'a'?)`, for messages."""
    known = list(known)
    return f"one of {', '.join(known)}{nearest(name, known)}"
