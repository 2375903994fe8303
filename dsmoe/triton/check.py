"""Every Triton kernel beside its reference on this machine's device, with fresh inputs: `python -m dsmoe.triton.check`.

Prints JSON: for each kernel the largest error over the largest value, the error it may have, and, on a GPU, the
milliseconds of both. Ends with status 1 where a kernel is wrong, or gives another result when it is called again. With
TRITON_INTERPRET=1 it runs on a CPU, at `--small` sizes.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dsmoe.runtime.command_line import quiet_libraries
from dsmoe.runtime.device import device_name, on_gpu, synchronize, use_local_device
from dsmoe.triton import grouped, plan, rows, scores, swiglu

ERROR = 2**-6  # of bf16 results: one rounding of the value, one of what it was made of


@dataclass(frozen=True)
class Verdict:
    kernel: str
    error: float  # largest difference over the largest value
    allowed: float
    milliseconds: float | None
    reference_milliseconds: float | None

    @property
    def right(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Sizes:
    tokens: int = 8192
    hidden: int = 2048
    ffn: int = 4096
    experts: int = 64
    k: int = 2
    rank: int = 32


SMALL = Sizes(tokens=24, hidden=32, ffn=16, experts=4, k=2, rank=8)


def cases(sizes: Sizes, seed: int) -> dict[str, tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]], float]]:
    """By kernel: it, its reference, and the error it may have. A token in 16 has no expert, one expert no token."""
    torch.manual_seed(seed)
    device, bf16 = device_name(), {"dtype": torch.bfloat16, "device": device_name()}
    tokens, hidden, ffn, experts = sizes.tokens, sizes.hidden, sizes.ffn, sizes.experts
    map_TE = torch.rand(tokens, experts, device=device) < sizes.k / experts
    map_TE[::16], map_TE[:, experts // 2] = False, False
    routes = int(map_TE.sum())
    order = plan.route_order_reference(map_TE)
    ends = map_TE.sum(0).cumsum(0).to(torch.int32)
    token_R = order.by_token.token_R
    rows_RH, grad_RF = torch.randn(routes, hidden, **bf16), torch.randn(routes, ffn, **bf16)
    gate, up = torch.randn(routes, 2 * ffn, **bf16).chunk(2, dim=1)
    probs = torch.rand(routes, device=device)
    weight = torch.randn(experts, ffn, hidden, **bf16) / hidden**0.5
    hidden_TH = torch.randn(tokens, hidden, **bf16)
    reduce = torch.randn(experts, sizes.rank, hidden, **bf16) / hidden**0.5
    factor = torch.randn(tokens, experts, device=device)

    def with_gradients(function, grad: Tensor, *leaves: Tensor) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            fresh = [leaf.detach().requires_grad_() for leaf in leaves]
            value = function(*fresh)
            return [value.detach(), *torch.autograd.grad(value, fresh, grad)]

        return run

    def fields(order: plan.RouteOrder) -> list[Tensor]:
        return [order.flat_N, order.by_token.place_R, order.by_token.start_T]

    return {
        "swiglu": (
            with_gradients(swiglu.swiglu, grad_RF, gate, up, probs),
            with_gradients(swiglu.swiglu_reference, grad_RF, gate, up, probs), ERROR,
        ),
        "sum_rows": (
            lambda: [rows.launch_sum_rows(rows_RH, order.by_token)],
            lambda: [rows.sum_rows_reference(rows_RH, token_R, tokens)], ERROR,
        ),
        "route_order": (
            lambda: fields(plan.route_order(map_TE, routes)), lambda: fields(plan.route_order_reference(map_TE)), 0.0,
        ),
        "latent_norms": (
            lambda: [scores.latent_norms(hidden_TH, reduce)],
            lambda: [scores.latent_norms_reference(hidden_TH, reduce)], 1e-3,
        ),
        "scaled_latents": (
            lambda: [scores.scaled_latents(hidden_TH, reduce, factor)],
            lambda: [scores.scaled_latents_reference(hidden_TH, reduce, factor)], ERROR,
        ),
        "grouped": (
            with_gradients(lambda r, w: grouped.grouped_linear(r, w, ends), grad_RF, rows_RH, weight),
            with_gradients(lambda r, w: grouped.grouped_reference(r, w, ends), grad_RF, rows_RH, weight), ERROR,
        ),
    }  # fmt: skip


def check(sizes: Sizes, seed: int) -> list[Verdict]:
    verdicts = []
    for name, (kernel, reference, allowed) in cases(sizes, seed).items():
        error = 0.0
        for value, expected in zip(kernel(), reference(), strict=True):
            value, expected = value.double(), expected.double()
            error = max(error, ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item())
        repeated = all(torch.equal(first, second) for first, second in zip(kernel(), kernel(), strict=True))
        error = error if repeated else float("inf")
        times = (_milliseconds(kernel), _milliseconds(reference)) if on_gpu() else (None, None)
        verdicts.append(Verdict(name, error, allowed, *times))
    return verdicts


def _milliseconds(action: Callable[[], object]) -> float:
    """The median of 20 calls."""
    times = []
    for _ in range(25):
        synchronize()
        began = time.perf_counter()
        action()
        synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[5:])[10]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsmoe.triton.check", description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes for Triton's interpreter")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a new one)")
    arguments = parser.parse_args()
    quiet_libraries()
    use_local_device()
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    verdicts = check(SMALL if arguments.small else Sizes(), seed)
    entries = [asdict(verdict) | {"right": verdict.right} for verdict in verdicts]
    print(json.dumps({"seed": seed, "kernels": entries}, indent=1))
    return 0 if all(verdict.right for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
