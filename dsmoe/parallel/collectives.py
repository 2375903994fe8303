"""Collectives with gradients. R rows of any width; splits count rows per rank of the group."""

from __future__ import annotations

import deepspeed.comm as dist
import torch
from torch import Tensor

from dsmoe.clock import clock


class Traffic:
    """Bytes of rows that this process has given to other ranks by all-to-all, forward and backward."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    def take(self) -> int:
        """Since the last call."""
        sent, self.sent_bytes = self.sent_bytes, 0
        return sent


traffic = Traffic()


class _AllToAllRows(torch.autograd.Function):
    """Variable-split all-to-all; its gradient is the same exchange with the splits swapped."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group) -> Tensor:
        ctx.splits, ctx.group = (send, receive), group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        send, receive = ctx.splits
        return _exchange(grad, receive, send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group) -> Tensor:
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    traffic.sent_bytes += (len(rows) - send[group.rank()]) * rows[:1].numel() * rows.element_size()
    with clock.within("exchange"):
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


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


def all_to_all_counts(counts: Tensor, group) -> Tensor:
    """Exchange one row of counts with each rank: int64 [ranks, n] by destination -> int64 [ranks, n] by source."""
    if group.size() == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def sum_over(group, values: Tensor) -> Tensor:
    """Sum without gradient over the group, in place; integers stay exact."""
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values
