"""Megatron-Core's dataset modules, imported late and quietly.

They import most of Megatron (several seconds on a slow machine) and warn about the absence of Transformer Engine and
Apex, which reading and writing data has no use for.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType


def indexed_dataset() -> ModuleType:
    """`megatron.core.datasets.indexed_dataset`: the .bin/.idx format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import dsmoe.runtime.megatron  # noqa: F401  (first)

        # isort: split
        from megatron.core.datasets import indexed_dataset as module
    return module


def gpt_dataset() -> ModuleType:
    """`megatron.core.datasets.gpt_dataset`: documents to samples of one length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import dsmoe.runtime.megatron  # noqa: F401  (first)

        # isort: split
        from megatron.core.datasets import gpt_dataset as module
    return module


@contextlib.contextmanager
def only_errors(logger: logging.Logger) -> Iterator[None]:
    """Quiet a Megatron logger that warns of what is done on purpose."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
