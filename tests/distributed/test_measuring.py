"""Ranks that measure which way is fastest answer each other, whatever order they ask in."""

from __future__ import annotations

import time

import torch.distributed as dist
from ranks import run_ranks

from dsmoe.native import ways


def test_ranks_do_not_wait_for_each_other_in_a_measurement(monkeypatch, tmp_path):
    """Rank 0 measures the outer question, which needs the inner one; rank 1 asks the inner one first. Rank 0 would wait
    for rank 1's answer, and rank 1 for the lock that rank 0 holds while it measures."""
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path))
    assert run_ranks(2, ask_crosswise, deadline=30) == [("asking", "fast")] * 2


def ask_crosswise() -> tuple[str, str]:
    def inner() -> str:
        return ways.fastest("inner", "8", {"slow": lambda: time.sleep(0.01), "fast": lambda: time.sleep(0.001)})

    def asking():
        time.sleep(0.2)  # rank 1 asks meanwhile
        inner()

    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.1)
        inner()
    chosen = ways.fastest("outer", "8", {"asking": asking, "idle": lambda: time.sleep(1)}), inner()
    dist.barrier()  # the store's answers go with rank 0
    return chosen
