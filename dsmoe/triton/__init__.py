"""Kernels in Triton for GPUs, each beside its plain torch reference.

No GPU has run them yet: Triton's interpreter holds them to their references on a CPU, and they compile for sm_80, sm_90
and sm_100 (`python -m dsmoe.triton.compile`). `model.fused_kernels: auto` uses them on the kinds of GPU that
verdicts.json names, where `make gpu-first-hour` has found them right; `true` uses them on any.

Importing this package does not import Triton.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

from dsmoe.errors import ConfigError
from dsmoe.runtime.device import gpu_model, on_gpu

VERDICTS = Path(__file__).with_name("verdicts.json")


def verdicts() -> dict[str, dict[str, str]]:
    """By the name of a GPU: date, commit and versions of the tests that its kernels passed."""
    return json.loads(VERDICTS.read_text())


def use_fused(asked: bool | str) -> bool:
    """Whether a model uses these kernels, for a `model.fused_kernels` of "auto", True or False.

    Raises:
        ConfigError: they were asked for, and there is no Triton or nothing that runs them.
    """
    runs = on_gpu() or os.environ.get("TRITON_INTERPRET") == "1"
    installed = find_spec("triton") is not None
    if asked == "auto":
        return on_gpu() and installed and gpu_model() in verdicts()
    if asked and not (runs and installed):
        reason = "no GPU is used" if installed else "triton is not installed (pip install 'dsmoe[triton]')"
        raise ConfigError([f"model.fused_kernels: found true, but {reason}; expected auto or false"], "configuration")
    return bool(asked)
