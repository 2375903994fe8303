"""Megatron-Core without its compiled functions and without W&B; imported by the packages that build on it, before
anything of it.

Some modules of Megatron and DeepSpeed wrap functions in `torch.compile` while they are imported, and this alone loads
the whole Inductor compiler: 2 of the 7 CPU seconds that starting a process takes. dsmoe calls none of these functions:
its configuration asks Megatron for no fusion, and DeepSpeed for no Muon. Megatron's inference engine imports W&B where
it is installed, another half second; a run that logs to it imports it itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


def _not_compiled(function=None, **options):
    return _not_compiled if function is None else function


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let what is imported inside keep its functions as they are written."""
    with mock.patch("torch.compile", _not_compiled):
        yield


@contextmanager
def absent(module: str) -> Iterator[None]:
    """What is imported inside finds no such module, unless it has been imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # what Python documents to forbid an import
    try:
        yield
    finally:
        del sys.modules[module]


if "megatron.core" not in sys.modules:
    with uncompiled(), absent("wandb"):
        from megatron.core.jit import disable_jit_fuser
    disable_jit_fuser()  # for modules of Megatron that are imported later
