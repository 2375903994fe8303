"""What all tests share: quiet, one-threaded processes, and a reason where a test needs a GPU that is not here.

The environment is set before anything imports torch, and the processes that tests start inherit it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from multiprocessing import forkserver

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns where a process that used threads is forked
os.environ.pop("DS_ACCELERATOR", None)  # DeepSpeed is to detect the device, as a user's run does
os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, by whichever test imports it first

SLOW = 20  # seconds
LATE = ("test_pretended_model.py", "test_pretended_training.py")  # what they need is compiled by another file's tests


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores this process may use, as each waits a seventh of its time for launchers, timeouts and
    files; and no more than the memory of a usual machine can hold."""
    return min(len(os.sched_getaffinity(0)) + 1, 8)


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.user_properties.append(("docstring", bool(getattr(item, "function", item).__doc__)))


def pytest_terminal_summary(terminalreporter) -> None:
    """Name the tests that take more than `SLOW` seconds without a docstring that says why."""
    seconds: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport) and not dict(report.user_properties).get("docstring", True):
            seconds[report.nodeid] += report.duration
    slow = [f"{taken:.0f} s  {name}" for name, taken in seconds.most_common() if taken > SLOW]
    if slow:
        terminalreporter.section(f"more than {SLOW} s, and no docstring says why")
        terminalreporter.write_line("\n".join(slow))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "forked" in sys.modules:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONWARNINGS", "ignore")  # what libraries say while they are imported
            forkserver.ensure_running()  # while no test waits for it, and none has changed the environment
    items.sort(key=lambda item: item.path.name in LATE)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # takes seconds, so only where it decides something

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))
