"""The pretence refuses what a GPU or NCCL would refuse, and what has not been waited for is garbage.

What the other tests here rely on and would pass without. One process, 10 s, and 15 s more where it compiles first.
"""

from __future__ import annotations

from collections.abc import Callable

import pretended
import pretended_model as pm
import pytest
import torch
import torch.distributed as dist
from ranks import once, run_ranks
from torch.nn.functional import grouped_mm

pytestmark = pretended.needs_cpu_torch


def ones(*shape: int, device: str = "cuda:0", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, device=device, dtype=dtype)


def product(rows=None, weights=None, ends=None) -> torch.Tensor:
    """Of two experts, four rows and width 16 where nothing else is given."""
    ends = torch.tensor([1, 4], dtype=torch.int32, device="cuda:0") if ends is None else ends
    return grouped_mm(ones(4, 16) if rows is None else rows, ones(2, 16, 16) if weights is None else weights, offs=ends)


def weight_gradient(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return grouped_mm(gradient.t(), rows, offs=torch.tensor([1, 4], dtype=torch.int32, device="cuda:0"))


def exchange(sent: torch.Tensor, received: torch.Tensor | None = None):
    received = torch.empty_like(sent) if received is None else received
    return received, dist.all_to_all_single(received, sent, async_op=True)


def change_what_is_sent() -> None:
    sent = ones(4)
    _, work = exchange(sent)
    sent.zero_()
    work.wait()


def reduce_on_the_host() -> None:
    with pretended.watching():
        dist.all_reduce(ones(2, device="cpu"))


def copy_on_a_side_stream() -> None:
    source = ones(4)
    with torch.Stream("cuda:0"):
        torch.empty(4, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)


# What is tried, and what it raises.
REFUSED: dict[str, tuple[Callable, str]] = {
    # Of products, since torch itself refuses this of sums.
    "two GPUs": (lambda: ones(2, 2) @ ones(2, 2, device="cuda:1"), "mm: Expected all tensors to be on the same device"),
    "a GPU and the CPU": (lambda: ones(2, 2) @ ones(2, 2, device="cpu"), "mm: Expected all tensors to be on the same"),
    "grouped_mm: rows on no 16 bytes": (lambda: product(ones(65)[1:].view(4, 16)), "mat_a to be aligned to 16 bytes"),
    "grouped_mm: weights on no 16 bytes": (
        lambda: product(weights=ones(513)[1:].view(2, 16, 16)), "mat_b to be aligned to 16 bytes"
    ),
    "grouped_mm: a width of 24 bytes": (
        lambda: product(ones(4, 12), ones(2, 12, 16)), "strides of mat_a should be multiple of 16 bytes"
    ),
    "grouped_mm: rows with gaps": (lambda: product(ones(4, 32)[:, ::2]), "Invalid strides/sizes"),
    "grouped_mm: int64 offsets": (
        lambda: product(ends=torch.tensor([1, 4], device="cuda:0")), "Offsets have to be int32 on the device"
    ),
    "grouped_mm: offsets of the CPU": (
        lambda: product(ends=torch.tensor([1, 4], dtype=torch.int32)), "Offsets have to be int32 on the device"
    ),
    "grouped_mm: 1,024 groups": (
        lambda: product(weights=ones(1024, 16, 16), ends=torch.zeros(1024, dtype=torch.int32, device="cuda:0")),
        "more than 1024 groups",
    ),
    "grouped_mm: weights of another GPU": (
        lambda: product(weights=ones(2, 16, 16, device="cuda:1")), "on the same device"
    ),
    "grouped_mm: a weight gradient from columns": (
        lambda: weight_gradient(ones(16, 8).t(), ones(8, 8).t().contiguous().t()), "asserts on the device"
    ),
    "a collective of the CPU": (reduce_on_the_host, "no tensor of the CPU"),
    "a collective into the CPU": (
        lambda: dist.distributed_c10d.all_to_all_single(ones(2), ones(2, device="cpu")), "no tensor of the CPU"
    ),
    "a collective with gaps": (lambda: dist.all_reduce(ones(4, 4)[:, :2]), "contiguous"),
    "a collective of two dtypes": (
        lambda: dist.all_gather_into_tensor(ones(4), ones(4, dtype=torch.float32)), "one dtype, found two"
    ),
    "a change of what is sent": (change_what_is_sent, "changed before the exchange was waited for"),
    "a side stream that has waited for nothing": (copy_on_a_side_stream, "a side stream reads"),
}  # fmt: skip


def try_all() -> dict[str, str]:
    """What each raised; empty where nothing was refused."""
    pretended.start()
    pm.join(1)
    messages = {}
    for name, (attempt, _) in REFUSED.items():
        try:
            attempt()
            messages[name] = ""
        except (RuntimeError, ValueError) as error:
            messages[name] = str(error)
    product()  # raises nothing
    return messages | {"garbage": look_early()}


def look_early() -> dict[str, tuple[bool, bool]]:
    """Whether all is garbage before it is waited for, and right after it."""
    source, host = ones(4), torch.empty(4, dtype=torch.bfloat16, pin_memory=True)
    host.copy_(source, non_blocking=True)
    early = host.isnan().all().item()
    event = torch.accelerator.current_stream().record_event()
    source.mul_(2)  # a GPU may have copied before or after this
    event.synchronize()
    seen = {"copy": (early, torch.equal(host, 2 * torch.ones_like(host)))}
    for name, work_of in {
        "all_to_all": lambda tensor: exchange(tensor),
        "all_reduce": lambda tensor: (tensor, dist.all_reduce(tensor, async_op=True)),
    }.items():
        received, work = work_of(ones(4))
        early = received.isnan().all().item()
        work.wait()
        seen[name] = early, torch.equal(received, ones(4))
    with pretended.watching() as watch:
        exchange(ones(4))
    seen["never waited"] = True, len(watch.of("never waited")) == 1
    return seen


@once
def tried() -> dict:
    pretended.library()
    return run_ranks(1, try_all)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(name):
    assert REFUSED[name][1] in tried()[name]


@pytest.mark.parametrize("name", ["copy", "all_to_all", "all_reduce", "never waited"])
def test_what_has_not_been_waited_for_is_garbage(name):
    assert tried()["garbage"][name] == (True, True)
