"""Experts on a CPU, by whichever way is fastest there.

native      C++ around torch's micro-kernels (`dsmoe.moe.native`); SwiGLU without biases only
native_few  the same, with products of its own for experts with few rows
blocked     torch's products, a block of rows through all projections (`dsmoe.moe.blocked`); the same
grouped_mm  torch's grouped GEMM, all rows through one projection after another
loop        one expert after another: the reference

Shapes: R rows ordered by expert, e experts, H hidden, F expert width, K width of a source's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe.moe import blocked, expert_mlp, native
from dsmoe.moe.expert_mlp import ExpertMLP, Linear, Projections
from dsmoe.moe.gradient_accumulator import ChunkedGradAccumulator
from dsmoe.moe.linear import grouped_linear, loop_linear
from dsmoe.native import supports, unavailable
from dsmoe.native.ways import fastest, forward_and_backward, multiplies_bf16

# Of the problem that ways are compared on, at most. A few experts fit into a cache: what gradients cost would not show.
PROBE_ROWS, PROBE_NUMBERS = 1 << 13, 1 << 25
MAX_PROBE_ROWS = 512  # of an expert


def weighted_outputs(
    implementation: str, mlp: ExpertMLP, projections: Projections, down_eHF: Tensor, probs_R: Tensor,
    counts_e: Tensor, biases: Sequence[Tensor] = (), sums: ChunkedGradAccumulator | None = None,
) -> Tensor:  # fmt: skip
    """Weighted expert outputs [R, H].

    Args:
        implementation: a way, or "auto". Native goes blocked where it does not support the tensors.
        counts_e: rows of each expert.
        biases: of `mlp.biases`.
        sums: of the weights' gradients, shared with other parts of the pass; native's and blocked add to them.
    """
    counts = counts_e.tolist()  # on a CPU nothing waits
    ways = available(mlp, projections, down_eHF, biases)
    name = implementation
    if name == "auto":
        name = _fastest(ways, mlp, projections, down_eHF, counts)
    elif name not in ways:
        name = "blocked"
    if sums is None or name not in ("native", "native_few", "blocked"):
        return ways[name](projections, down_eHF, probs_R, counts)
    rows, weights = zip(*projections, strict=True)
    *shared, down_eHF = sums.shared(*weights, down_eHF)
    return ways[name](list(zip(rows, shared, strict=True)), down_eHF, probs_R, counts, sums.sums)


def available(
    mlp: ExpertMLP, projections: Projections, down_eHF: Tensor, biases: Sequence[Tensor] = ()
) -> dict[str, Callable[..., Tensor]]:
    """The ways that can work with such tensors here, by name: (projections, down_eHF, probs_R, counts) -> [R, H]."""
    rows, weights = zip(*projections, strict=True)
    weights = (*weights, down_eHF)
    row_bytes = [size * down_eHF.element_size() for weight in weights for size in weight.shape[1:]]
    ways: dict[str, Callable[..., Tensor]] = {"loop": partial(_by_projection, mlp, loop_linear, biases)}
    if hasattr(F, "grouped_mm") and all(size % 16 == 0 for size in row_bytes):
        ways["grouped_mm"] = partial(_by_projection, mlp, grouped_linear, biases)
    if not mlp.is_plain_swiglu:
        return ways
    ways["blocked"] = blocked.swiglu_experts
    fits = supports(*rows, *weights, dtypes=native.DTYPES) and row_bytes[-2] % 32 == 0
    if fits and not unavailable():
        computes_bf16 = down_eHF.dtype == torch.bfloat16 and multiplies_bf16()
        ways["native"] = partial(native.swiglu_experts, computes_bf16=computes_bf16)
        ways["native_few"] = partial(ways["native"], few=native.FEW)
    return ways


def _by_projection(
    mlp: ExpertMLP, linear: Linear, biases: Sequence[Tensor], projections: Projections, down_eHF: Tensor,
    probs_R: Tensor, counts: list[int],
) -> Tensor:  # fmt: skip
    ends_e = torch.tensor(counts).cumsum(0).to(torch.int32)
    return expert_mlp.weighted_outputs(mlp, linear, projections, down_eHF, probs_R, ends_e, biases)


def _fastest(
    ways: dict[str, Callable[..., Tensor]], mlp: ExpertMLP, projections: Projections, down_eHF: Tensor,
    counts: list[int],
) -> str:  # fmt: skip
    """Measured forward and backward on random tensors of the same widths, with as many rows for each of a few experts
    as these have on average, to a power of two; biases cost all alike. With gradients the first answer holds for these
    widths on all ranks."""
    mean = max(1, round(sum(counts) / max(1, len(counts))))
    rows = min(MAX_PROBE_ROWS, 1 << round(math.log2(mean)))
    weight_numbers = sum(t[0].numel() for t in (down_eHF, *(weight for _, weight in projections)))
    experts = max(1, min(len(counts), PROBE_ROWS // rows, PROBE_NUMBERS // weight_numbers))
    widths = [source.size(1) for source, _ in projections]
    dtype = str(down_eHF.dtype).removeprefix("torch.")
    other = "" if mlp.is_plain_swiglu else f", {mlp.activation}{' and biases' if mlp.bias else ''}"
    tensors = f"{dtype}, H={down_eHF.size(1)}, F={down_eHF.size(2)}, K={widths}{other}"
    shape = f"{tensors}, {experts} experts of {rows} rows"
    agreed_for = f"{tensors}, {len(counts)} experts with gradients" if torch.is_grad_enabled() else None
    problem: list = []

    def work(way: Callable[..., Tensor]) -> None:
        if not problem:
            problem.extend(_probe(projections, down_eHF, experts, rows))
        pairs, down, probs, probe_counts, grad = problem
        leaves = [*(tensor for pair in pairs for tensor in pair), down, probs]
        forward_and_backward(lambda: way(pairs, down, probs, probe_counts), leaves, grad)

    without_biases = available(replace(mlp, bias=False), projections, down_eHF) if mlp.bias else ways
    return fastest("experts", shape, {name: partial(work, without_biases[name]) for name in ways}, agreed_for)


def _probe(projections: Projections, down_eHF: Tensor, experts: int, rows: int) -> tuple:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.empty(shape).normal_(0, 0.1, generator=random)
        return drawn.to(down_eHF.dtype).requires_grad_()

    count = experts * rows
    pairs = [(draw(count, source.size(1)), draw(experts, *weight.shape[1:])) for source, weight in projections]
    probs = torch.rand(count, generator=random).requires_grad_()
    grad = draw(count, down_eHF.size(1)).detach()
    return pairs, draw(experts, *down_eHF.shape[1:]), probs, [rows] * experts, grad
