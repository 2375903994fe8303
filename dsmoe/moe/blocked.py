"""SwiGLU experts on a CPU: a block of rows through all three projections, and every thread with experts of its own.

    h = [x G_i^T, x U_i^T];  inner = p * silu(h_gate) * h_up;  out = inner D_i^T

A grouped GEMM there is one small GEMM after another, each shared by all threads, with passes over all rows in between.
Here a block of rows stays in the cache from its first GEMM to its last, threads work on different experts, and only
rows, h and p are kept for the backward pass. `dsmoe.moe.experts.loop_linear` is the reference it is tested against.
`dsmoe.moe.native` takes fp32 and bf16 as well; this also takes widths that it does not, and needs no compiler.

Shapes: R rows ordered by expert, e experts, H hidden, F expert width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.moe.gradient_accumulator import gradient_sum

BLOCK = 512  # rows whose activations a core's cache can hold
FEW = 8  # experts of a block that are multiplied one by one; of more, a loop in Python costs more than a copy

Task = list[list["Segment"]]  # blocks, one after another, by one thread


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one expert."""

    expert: int
    rows: slice
    part: int = 0  # 0, or which share of an expert that several threads work on

    def within(self, block: list[Segment]) -> slice:
        """These rows, counted from the first of the block."""
        first = block[0].rows.start
        return slice(self.rows.start - first, self.rows.stop - first)


def split_work(counts: list[int], threads: int, block: int) -> list[Task]:
    """Tasks for threads, largest first; a task is a list of blocks, a block segments of together at most `block` rows.

    All rows of an expert are in one task, so that one thread sums its weight gradient; only an expert with more than
    its share of the rows is split, into parts. An expert without rows has no segment.
    """
    total = sum(counts)
    share = total if threads == 1 else max(block, -(-total // (2 * threads)))
    tasks: list[Task] = []
    small: list[Segment] = []  # of experts that share a block
    start = 0
    for expert, count in enumerate(counts):
        stop = start + count
        if 0 < count < block:
            if small and stop - small[0].rows.start > block:
                tasks.append([small])
                small = []
            small.append(Segment(expert, slice(start, stop)))
        elif count:
            if small:
                tasks.append([small])
                small = []
            for part, low in enumerate(range(start, stop, share)):
                high = min(low + share, stop)
                blocks = range(low, high, block)
                tasks.append([[Segment(expert, slice(at, min(at + block, high)), part)] for at in blocks])
        start = stop
    if small:
        tasks.append([small])
    return sorted(tasks, key=_rows, reverse=True)


def _rows(task: Task) -> int:
    return task[-1][-1].rows.stop - task[0][0].rows.start


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="experts")


def run_tasks(work: Callable[[Task], None], tasks: list[Task]) -> None:
    """All tasks, on as many threads as torch may use; torch itself gets one thread in each of them."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        for task in tasks:
            work(task)
        return
    allowed, queue, lock = torch.get_num_threads(), iter(tasks), threading.Lock()
    grad = torch.is_grad_enabled()

    def drain() -> None:
        torch.get_num_threads()  # a thread's first call sets its number to the process's
        torch.set_num_threads(1)
        with torch.set_grad_enabled(grad):
            while (task := _next(queue, lock)) is not None:
                work(task)

    try:
        others = [_workers(allowed).submit(drain) for _ in range(threads - 1)]
        drain()
        for other in others:
            other.result()
    finally:
        torch.set_num_threads(allowed)


def _next(queue: Iterator, lock: threading.Lock):
    with lock:
        return next(queue, None)


@lru_cache(maxsize=1)
def widens_bfloat16() -> bool:
    """Whether bf16 GEMMs run faster in fp32 here: a CPU without bf16 instructions emulates them, many times slower."""
    flags = torch.cpu.get_capabilities()
    return not any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 and widens_bfloat16() else dtype


def swiglu_experts(
    projections: Sequence[tuple[Tensor, Tensor]], down_eHF: Tensor, probs_R: Tensor, counts: list[int],
    sums: dict[int, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Weighted expert outputs [R, H].

    Args:
        projections: what makes h [R, 2F], gate first: one pair (rows [R, K], weight [e, 2F, K]), or one for the gate
            and one for up, with weights [e, F, K].
        down_eHF: down projections.
        probs_R: fp32 weight of each row.
        counts: rows of each expert.
        sums: of the weights' gradients, shared with other parts of the pass (`dsmoe.moe.gradient_accumulator`).
    """
    flat = [tensor for pair in projections for tensor in pair]
    return _SwiGLUExperts.apply(counts, sums, probs_R, down_eHF, *flat)


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts: list[int], sums, probs_R: Tensor, down_eHF: Tensor, *flat: Tensor) -> Tensor:
        rows, weights = flat[0::2], flat[1::2]
        dtype, (_, hidden, ffn) = rows[0].dtype, down_eHF.shape
        wide = _compute_dtype(dtype)
        h_RF = rows[0].new_empty(len(probs_R), 2 * ffn)
        out_RH = rows[0].new_empty(len(probs_R), hidden)
        columns = _columns(weights)

        def work(task: Task) -> None:
            for block in task:
                low, high = block[0].rows.start, block[-1].rows.stop
                h = h_RF[low:high] if wide == dtype else torch.empty(high - low, 2 * ffn, dtype=wide)
                for source, weight, where in zip(rows, weights, columns, strict=True):
                    _multiply(source[low:high].to(wide), weight.mT, block, h[:, where])
                inner = F.silu(h[:, :ffn]).mul_(h[:, ffn:]).mul_(probs_R[low:high, None])
                out = out_RH[low:high] if wide == dtype else torch.empty(high - low, hidden, dtype=wide)
                _multiply(inner, down_eHF.mT, block, out)
                if wide != dtype:
                    h_RF[low:high] = h
                    out_RH[low:high] = out

        run_tasks(work, split_work(counts, torch.get_num_threads(), BLOCK))
        ctx.counts, ctx.sums = counts, sums
        ctx.save_for_backward(h_RF, probs_R, down_eHF, *flat)
        return out_RH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH: Tensor):
        h_RF, probs_R, down_eHF, *flat = ctx.saved_tensors
        rows, weights = flat[0::2], flat[1::2]
        dtype, ffn = h_RF.dtype, down_eHF.size(2)
        wide = _compute_dtype(dtype)
        grad_probs_R = torch.empty_like(probs_R)
        grad_rows = [torch.empty_like(source) for source in rows]
        columns = _columns(weights)
        tasks = split_work(ctx.counts, torch.get_num_threads(), BLOCK)
        down = _WeightGradient(down_eHF, ctx.counts, wide, ctx.sums)
        others = [_WeightGradient(weight, ctx.counts, wide, ctx.sums) for weight in weights]

        def work(task: Task) -> None:
            for block in task:
                low, high = block[0].rows.start, block[-1].rows.stop
                out_grad = grad_RH[low:high].to(wide)
                grad_inner = out_grad.new_empty(high - low, ffn)
                _multiply(out_grad, down_eHF, block, grad_inner)
                h, probs = h_RF[low:high].to(wide), probs_R[low:high, None].to(wide)
                gate, up = h[:, :ffn], h[:, ffn:]
                silu = F.silu(gate)
                inner = silu * up
                grad_probs_R[low:high] = (grad_inner * inner).sum(1)
                inner.mul_(probs)
                grad_inner.mul_(probs)
                grad_h = torch.empty_like(h)
                torch.mul(grad_inner, silu, out=grad_h[:, ffn:])
                torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up), gate, grad_input=grad_h[:, :ffn])
                down.add(block, out_grad, inner)
                for source, weight, where, to, grad_rows_ in zip(
                    rows, weights, columns, others, grad_rows, strict=True
                ):
                    _multiply(grad_h[:, where], weight, block, grad_rows_[low:high])
                    to.add(block, grad_h[:, where], source[low:high].to(wide))

        run_tasks(work, tasks)
        grads = [x for pair in zip(grad_rows, (to.finish() for to in others), strict=True) for x in pair]
        return None, None, grad_probs_R, down.finish(), *grads


def _multiply(left_BK: Tensor, weight_eKN: Tensor, block: list[Segment], out_BN: Tensor) -> None:
    """out = left times each row's expert's matrix, for the rows of a block; in the dtype of `left`."""
    aligned = all(size * weight_eKN.element_size() % 16 == 0 for size in weight_eKN.shape[1:])
    if len(block) > FEW and aligned and weight_eKN.dtype == left_BK.dtype:
        experts = slice(block[0].expert, block[-1].expert + 1)
        counts = [0] * (experts.stop - experts.start)
        for s in block:
            counts[s.expert - experts.start] = s.rows.stop - s.rows.start
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
        out_BN.copy_(F.grouped_mm(left_BK, weight_eKN[experts], offs=ends))
        return
    for s in block:
        matrix = weight_eKN[s.expert].to(left_BK.dtype)
        if out_BN.dtype == left_BK.dtype:
            torch.mm(left_BK[s.within(block)], matrix, out=out_BN[s.within(block)])
        else:
            out_BN[s.within(block)] = left_BK[s.within(block)] @ matrix


def _columns(weights: Sequence[Tensor]) -> list[slice]:
    """Where each projection writes in h."""
    width = [weight.size(1) for weight in weights]
    return [slice(sum(width[:i]), sum(width[: i + 1])) for i in range(len(width))]


class _WeightGradient:
    """Gradient [e, N, K] of a packed weight, summed block by block; each (expert, part) by one thread. It may go onto
    what other parts of the pass have put there."""

    def __init__(self, weight: Tensor, counts: list[int], wide: torch.dtype, sums: dict[int, Tensor] | None):
        self.result, self.adds = gradient_sum(weight, sums)
        self.experts = self.result.unbind(0)
        self.ends = list(accumulate(counts))
        self.wide = wide
        self.sums: dict[tuple[int, int], Tensor] = {}
        for expert, count in enumerate(counts):
            if count and self.adds and wide == self.result.dtype:
                self.sums[expert, 0] = self.experts[expert]
            elif not count and not self.adds:
                self.experts[expert].zero_()

    def add(self, block: list[Segment], left_BN: Tensor, right_BK: Tensor) -> None:
        """Add left^T right of every segment."""
        sizes = [s.rows.stop - s.rows.start for s in block]
        for s, left, right in zip(block, left_BN.split(sizes), right_BK.split(sizes), strict=True):
            key = (s.expert, s.part)
            if key in self.sums:
                self.sums[key].addmm_(left.t(), right)
            elif s.part == 0 and self.wide == self.result.dtype:
                self.sums[key] = torch.mm(left.t(), right, out=self.experts[s.expert])
            else:
                self.sums[key] = torch.mm(left.t(), right)
            if self.wide != self.result.dtype and s.part == 0 and s.rows.stop == self.ends[s.expert]:
                self._put(s.expert, self.sums.pop(key))  # whole: no need to keep it wide

    def finish(self) -> Tensor | None:
        """The whole gradient, once all threads are done; None where another part returns it."""
        for (expert, part), total in sorted(self.sums.items(), reverse=True):
            if part:
                self.sums[expert, 0].add_(total)
            elif self.wide != self.result.dtype:
                self._put(expert, total)
        return None if self.adds else self.result

    def _put(self, expert: int, total: Tensor) -> None:
        if self.adds:
            self.experts[expert].add_(total)
        else:
            self.experts[expert].copy_(total)
