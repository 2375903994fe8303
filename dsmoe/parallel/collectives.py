"""Collectives with gradients. R rows of any width; splits count rows per rank of the group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import deepspeed.comm as dist
import torch
from torch import Tensor

from dsmoe.parallel.topology import Topology
from dsmoe.runtime.step_timer import step_timer


class Traffic:
    """What this process exchanges by all-to-all, forward and backward: bytes of rows sent to other ranks, and seconds
    in which it did nothing but start exchanges and wait (on a CPU; a GPU's stream waits, not the process).

    Attributes:
        topology: which ranks share a node; None: all of them.
    """

    def __init__(self) -> None:
        self.topology: Topology | None = None
        self.sent_bytes, self.between_nodes_bytes, self.seconds = 0, 0, 0.0

    def take(self) -> tuple[int, int, float]:
        """Since the last call: bytes sent, those of them that left the node, and seconds."""
        totals = self.sent_bytes, self.between_nodes_bytes, self.seconds
        self.sent_bytes, self.between_nodes_bytes, self.seconds = 0, 0, 0.0
        return totals

    def count(self, rows_to_rank: list[int], row_bytes: int, group) -> None:
        self.sent_bytes += (sum(rows_to_rank) - rows_to_rank[group.rank()]) * row_bytes
        if self.topology is not None and len(self.topology.names) > 1:
            node_of_rank, here = self.topology.node_of_rank, dist.get_rank()
            ranks = torch.distributed.get_process_group_ranks(group)
            leaving = [
                rows for rows, rank in zip(rows_to_rank, ranks, strict=True) if node_of_rank[rank] != node_of_rank[here]
            ]
            self.between_nodes_bytes += sum(leaving) * row_bytes

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


traffic = Traffic()


class _AllToAllRows(torch.autograd.Function):
    """Variable-split all-to-all; its gradient is the same exchange with the splits swapped."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group) -> Tensor:
        ctx.splits, ctx.group = (send, receive), group
        return start_all_to_all(rows, send, receive, group)()

    @staticmethod
    def backward(ctx, grad: Tensor):
        send, receive = ctx.splits
        return start_all_to_all(grad, receive, send, ctx.group)(), None, None, None


def start_all_to_all(rows: Tensor, send: list[int], receive: list[int], group) -> Callable[[], Tensor]:
    """Begin what `all_to_all_rows` does, without a gradient. What it returns waits for the rows: what is done before it
    is called hides the exchange. Every rank must begin its exchanges in the same order."""
    if group.size() == 1:
        return lambda: rows
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    traffic.count(send, rows[:1].numel() * rows.element_size(), group)
    return _begin(received, rows, receive, send, group)


def _begin(received: Tensor, sent: Tensor, receive, send, group) -> Callable[[], Tensor]:
    with step_timer.within("exchange"), traffic.exchanging():
        work = dist.all_to_all_single(received, sent.contiguous(), receive, send, group=group, async_op=True)

    def arrived() -> Tensor:
        with step_timer.within("exchange"), traffic.exchanging():
            work.wait()
        return received

    return arrived


def all_to_all_rows(rows: Tensor, send: list[int], receive: list[int], group) -> Tensor:
    """Send the first `send[0]` rows to rank 0 of the group, the next `send[1]` to rank 1, and so on.

    Args:
        rows: [sum(send), ...], grouped by destination.
        send, receive: rows to and from each rank of the group; 0 is fine, for all of them too.

    Returns:
        [sum(receive), ...], grouped by source. Every rank of the group must call it, with 0 rows as well.
    """
    if group.size() == 1:
        return rows
    return _AllToAllRows.apply(rows, send, receive, group)


def all_gather_rows(rows: Tensor, sizes: list[int], group) -> Tensor:
    """The rows of all ranks of the group, in rank order; rank r brings `sizes[r]`. Its gradient sums over ranks."""
    ranks = group.size()
    return all_to_all_rows(rows.repeat(ranks, *[1] * (rows.dim() - 1)), [rows.size(0)] * ranks, sizes, group)


def start_counts(counts: Tensor, group) -> Callable[[], Tensor]:
    """Begin to exchange one row of counts with each rank: int64 [ranks, n] by destination. What it returns waits for
    int64 [ranks, n] by source."""
    if group.size() == 1:
        return lambda: counts
    return _begin(torch.empty_like(counts), counts, None, None, group)


def sum_over(group, values: Tensor) -> Tensor:
    """Sum without gradient over the group, in place; integers stay exact."""
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values
