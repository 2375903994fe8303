"""Differentiable all-to-alls that are launched early and waited for late.

An exchange of rows is under way from `launch` to `wait`, and one of their gradients from the gradient of `wait` to that
of `launch`. Autograd goes back through a forward pass last operation first, so work that hides an exchange in the
forward pass has its own gradient hide the exchange of gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe.moe.plan import RowIndex, Splits, numbers_of
from dsmoe.parallel.collectives import start_all_to_all
from dsmoe.runtime.step_timer import step_timer


class AsyncAllToAll:
    """Rows of a tensor under way to other ranks, or their gradients on the way back.

    Args:
        splits: rows to and from each rank of `group`.
        region: whose time it is, for the step timer.
        index: which rows, in the order of `splits.send`, a row as often as it is named; None: all.
        dtype: of rows and gradients while they are exchanged; None: as they are. Sums are taken in the tensor's own.
    """

    def __init__(
        self, splits: Splits, group, region: str, index: RowIndex | None = None, dtype: torch.dtype | None = None
    ):
        self.splits, self.group, self.region, self.index, self.dtype = splits, group, region, index, dtype
        self._wait: Callable[[], Tensor] | None = None

    def launch(self, source: Tensor) -> Tensor:
        """A placeholder: the shape of what will arrive, without its memory."""
        return _Launch.apply(source, self)

    def wait(self, placeholder: Tensor, on_gradient_launch: Callable[[], None] | None = None) -> Tensor:
        """The rows. `on_gradient_launch` is called when their gradients have been launched."""
        return _Wait.apply(placeholder, self, on_gradient_launch)

    def exchange(self, source: Tensor) -> Tensor:
        """Launch and wait at once."""
        return self.wait(self.launch(source))

    def send(self, source: Tensor) -> None:
        """Launch without a gradient, unless that has been done."""
        if self._wait is None:
            rows = source if self.index is None else source.index_select(0, numbers_of(self.index))
            self._send(rows, self.splits)

    def send_gradient(self, grad: Tensor) -> None:
        self._send(grad, self.splits.reversed())

    def receive(self, dtype: torch.dtype) -> Tensor:
        wait, self._wait = self._wait, None
        return wait().to(dtype)

    def _send(self, rows: Tensor, splits: Splits) -> None:
        rows = rows if self.dtype is None else rows.to(self.dtype)
        self._wait = start_all_to_all(rows, splits.send, splits.receive, self.group)


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange, ctx.rows = exchange, len(source)
        with step_timer.within(exchange.region):
            exchange.send(source)
        return source.new_zeros(()).expand(sum(exchange.splits.receive), *source.shape[1:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        exchange = ctx.exchange
        step_timer.switch(exchange.region)
        rows = exchange.receive(grad.dtype)
        return rows if exchange.index is None else sum_rows(rows, exchange.index, ctx.rows), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, placeholder: Tensor, exchange: AsyncAllToAll, on_gradient_launch: Callable[[], None] | None
    ) -> Tensor:
        ctx.exchange, ctx.on_gradient_launch = exchange, on_gradient_launch
        with step_timer.within(exchange.region):
            return exchange.receive(placeholder.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        step_timer.switch(ctx.exchange.region)
        ctx.exchange.send_gradient(grad)
        if ctx.on_gradient_launch is not None:
            ctx.on_gradient_launch()
        return grad.new_zeros(()).expand_as(grad), None, None


class Reorder(torch.autograd.Function):
    """Permutation of rows whose gradient is a gather too (autograd's own would scatter-add)."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def take_rows(rows_TH: Tensor, index: RowIndex) -> Tensor:
    """The rows that `index` names, as often as it names them."""
    return rows_TH.index_select(0, index) if isinstance(index, Tensor) else index.take_rows(rows_TH)


def sum_rows(rows: Tensor, index: RowIndex, count: int) -> Tensor:
    """[count, ...]: the sum of the rows that have each index, 0 where none has. A `TokenOrder` sums in fp32 and
    in a fixed order; torch's adds in the rows' dtype and, on a GPU, in any order."""
    if isinstance(index, Tensor):
        return rows.new_zeros(count, *rows.shape[1:]).index_add(0, index, rows)
    return index.sum_rows(rows)
