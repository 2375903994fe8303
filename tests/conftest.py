"""What all tests share: quiet, one-threaded processes, and a reason where a test needs a GPU that is not here.

The environment is set before anything imports torch, and the processes that tests start inherit it.
"""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns where a process that used threads is forked
os.environ.pop("DS_ACCELERATOR", None)  # DeepSpeed is to detect the device, as a user's run does


def pytest_xdist_auto_num_workers() -> int:
    """One worker per core this process may use, and no more than the memory of a usual machine can hold."""
    return min(len(os.sched_getaffinity(0)), 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # takes seconds, so only where it decides something

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))
