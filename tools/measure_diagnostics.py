#!/usr/bin/env python
"""What watching a run costs of its steps, in processor time: panel, metrics, monitor, pictures, warnings.

    python tools/measure_diagnostics.py --config configs/quickstart.yaml data.path=data/stdlib training.steps=60

Trains in this process with everything on, and reads the kernel's counters of processor time by thread: around every
function that watches, and of the threads that write to TensorBoard and redraw the panel. Their sum is held against the
processor time that the main thread takes in the same steps, evaluations apart; the panel, which is drawn once a second,
against wall time. Other programs on the machine do not change these counters, as they would change wall time.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import Counter
from functools import wraps
from pathlib import Path

from dsmoe.runtime.command_line import run

REDRAWN = "panel, redrawn"
WARM = 5  # steps that are left out: first use of kernels, files and fonts

spent: Counter[str] = Counter()  # seconds of processor time by what took them
_depth = 0


def counted(name: str, function):
    """The function, its processor time added up, without what is inside another counted one."""

    @wraps(function)
    def call(*args, **kwargs):
        global _depth
        if threading.current_thread() is not threading.main_thread() or _depth:
            return function(*args, **kwargs)
        _depth, began = 1, time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _depth = 0
            spent[name] += time.thread_time() - began

    return call


def background() -> dict[str, float]:
    """Seconds of processor time of the threads that watch, by name."""
    names = {"_RefreshThread": REDRAWN, "_AsyncWriterThread": "TensorBoard's files"}
    found: Counter[str] = Counter()
    for thread in threading.enumerate():
        name = names.get(type(thread).__name__)
        if name is not None and thread.ident is not None:
            found[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return dict(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    os.environ["FORCE_COLOR"] = "1"  # a panel, wherever the output goes
    os.environ["TERM"] = "xterm-256color"

    from dsmoe.cli.options import optimizer_options, router_options
    from dsmoe.config import load_config
    from dsmoe.training import loop
    from dsmoe.training.history import RunHistory
    from dsmoe.training.metrics import MetricsWriter
    from dsmoe.training.monitor import RoutingMonitor
    from dsmoe.training.progress import TrainingProgress
    from dsmoe.training.run import train
    from dsmoe.training.watch import ExchangeWatch, RoutingWatch

    for kind, method, name in (
        (MetricsWriter, "write", "metrics.jsonl and scalars"), (RoutingMonitor, "after_step", "curves and heat maps"),
        (RoutingMonitor, "text", "text in colours"), (TrainingProgress, "update", "panel, told"),
        (RunHistory, "step_done", "events.jsonl"), (RoutingWatch, "see", "warnings"),
        (ExchangeWatch, "see", "warnings"),
    ):  # fmt: skip
        setattr(kind, method, counted(name, getattr(kind, method)))
    for name in ("routing_metrics", "layer_metrics", "worst_layer"):
        setattr(loop, name, counted("routing metrics", getattr(loop, name)))

    one_step, steps, in_steps, wall = loop.Trainer._one_step, 0, 0.0, 0.0
    threads_before: dict[str, float] = {}
    after: list[dict[str, float]] = []

    def measured_step(self, stop):
        nonlocal steps, in_steps, wall, threads_before
        steps += 1
        if steps == WARM + 1:
            spent.clear()
            threads_before = background()
        began, clock = time.thread_time(), time.monotonic()
        found = one_step(self, stop)
        if steps > WARM:
            in_steps += time.thread_time() - began
            wall += time.monotonic() - clock
        after[:] = [background()]
        return found

    loop.Trainer._one_step = measured_step
    config = load_config(Path(arguments.config), arguments.overrides, router_options, optimizer_options)
    train(config)

    watching = dict(spent) | {n: value - threads_before.get(n, 0.0) for n, value in after[0].items()}
    counted_steps = steps - WARM
    print(f"\n{counted_steps} steps, {1000 * in_steps / counted_steps:.1f} ms of the main thread's processor time each")
    # The panel is drawn once a second, however long a step takes on a busy machine.
    shares = {name: seconds / (wall if name == REDRAWN else in_steps) for name, seconds in watching.items()}
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {name:28}{1000 * watching[name] / counted_steps:8.3f} ms  {share:7.3%}")
    print(f"  {'all':28}{1000 * sum(watching.values()) / counted_steps:8.3f} ms  {sum(shares.values()):7.3%}")
    return 0


if __name__ == "__main__":
    run(main)
