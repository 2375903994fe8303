"""What the machine allows a layer at best: the larger of its operations at the best rate of any matrix product that was
measured in the same run, and of the bytes that it must move at the bandwidth of a copy.

Shapes: H hidden, F expert width.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe import native
from dsmoe.lab.benchmark.measure import Case
from dsmoe.lab.benchmark.problem import Problem
from dsmoe.native.ways import has_bf16_products, repeat_product

COPY_BYTES = 1 << 28  # far more than any cache
ROWS, BLOCK = 1024, 64  # rows of torch's products; rows and columns of a micro-kernel's
RATE_FLOPS = 2e9  # of one run of a product


def limit_cases(world) -> list[Case]:
    """Products of these widths by torch and, on a CPU, its micro-kernels, in the problem's dtype and in fp32; a copy;
    and a dense SwiGLU over as many rows as this rank has active routes, for comparison."""
    problem, device = world.problem, world.device
    dtypes = dict.fromkeys((problem.torch_dtype, torch.float32))
    cases = [_torch_product(problem, dtype, device) for dtype in dtypes]
    if device == "cpu" and not native.unavailable():
        cases += [_micro_kernel(problem, dtype) for dtype in dtypes if dtype == torch.float32 or has_bf16_products()]
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return [*cases, Case("copy", "limit", lambda: [target.copy_(source)], [], []), _dense(problem, device)]


def _torch_product(problem: Problem, dtype: torch.dtype, device: str) -> Case:
    left = torch.ones(ROWS, problem.hidden, dtype=dtype, device=device)
    right = torch.ones(2 * problem.ffn, problem.hidden, dtype=dtype, device=device).t()
    out = left.new_empty(ROWS, 2 * problem.ffn)
    flops = 2.0 * ROWS * problem.hidden * 2 * problem.ffn
    times = max(1, round(RATE_FLOPS / flops))

    def products() -> list[Tensor]:
        for _ in range(times):
            torch.mm(left, right, out=out)
        return []

    return Case(f"torch.mm {_name(dtype)}", "limit", products, [], [], flops=times * flops)


def _micro_kernel(problem: Problem, dtype: torch.dtype) -> Case:
    inner = problem.hidden + problem.hidden % 2
    flops = 2.0 * BLOCK * BLOCK * inner
    times = max(1, round(RATE_FLOPS / flops))

    def products() -> list[Tensor]:
        repeat_product(dtype, BLOCK, BLOCK, inner, times)
        return []

    return Case(f"micro-kernel {_name(dtype)}", "limit", products, [], [], flops=times * flops)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _dense(problem: Problem, device: str) -> Case:
    rows, dtype = problem.routes // problem.ranks, problem.torch_dtype
    make = partial(torch.randn, device=device)
    weights = [
        nn.Parameter((make(*shape) * 0.05).to(dtype))
        for shape in ((2 * problem.ffn, problem.hidden), (problem.hidden, problem.ffn))
    ]

    def forward(rows_RH: Tensor) -> list[Tensor]:
        gate_RF, up_RF = F.linear(rows_RH, weights[0]).chunk(2, dim=-1)
        return [F.linear(F.silu(gate_RF) * up_RF, weights[1])]

    leaf = make(rows, problem.hidden).to(dtype).requires_grad_()
    return Case("dense SwiGLU", "limit", forward, [leaf], [make(rows, problem.hidden).to(dtype)], weights)


def limit_of(cases: list[Case], seconds: dict[str, list[float]], problem: Problem) -> dict[str, float | str]:
    """Both terms of the limit, in seconds, and what they were made of. Rates are of all of a rank's threads together;
    the gate's three products, forward and backward, count as the experts' do."""
    rates = {case.name: case.flops / statistics.median(seconds[case.name]) for case in cases if case.flops}
    best = max(rates, key=rates.get)
    gate = 6.0 * problem.tokens * problem.experts * problem.hidden
    compute = (problem.expert_flops() + gate) / problem.ranks / rates[best]
    bandwidth = 2 * COPY_BYTES / statistics.median(seconds["copy"])
    stream = problem.streamed_bytes() / bandwidth
    return {
        "seconds": max(compute, stream), "compute_seconds": compute, "stream_seconds": stream,
        "best_product": best, "flops_per_second": rates[best], "copy_bytes_per_second": bandwidth,
        "streamed_bytes": problem.streamed_bytes(), "dense_seconds": statistics.median(seconds["dense SwiGLU"]),
    }  # fmt: skip
