"""Measure the machine at hand and describe it as a `Hardware`.

Matrix products and copies are timed alone. What a step's parts take is fitted to short training runs: for each part,
seconds = flops / rate + activation bytes / rate + weight bytes / rate + calls x overhead, with the work that
`dsmoe.lab.planner.work` counts and no coefficient below 0, to the least sum of squared relative errors. The network is
fitted to the part `exchange` of the runs on several ranks, waiting for the slower rank included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import torch
from scipy.optimize import least_squares, nnls

from dsmoe.lab.children import machine
from dsmoe.lab.planner import traffic
from dsmoe.lab.planner.hardware import Hardware, Link, Precision, Speed
from dsmoe.lab.planner.layout import Layout
from dsmoe.lab.planner.measure import Case, MeasuredRun, config_of, measure_all
from dsmoe.lab.planner.memory import memory
from dsmoe.lab.planner.work import work
from dsmoe.routers.topk import TopKRouter
from dsmoe.runtime.device import device_name, gpu_memory_bytes, on_gpu, synchronize, use_local_device

VOCABULARY = 2048
ON_GPU = 8192  # rows and columns of the products that are timed on one
TYPICAL = 0.05  # relative error that is nothing unusual
NOTICEABLE = 1e-4  # share of a run's time
FEATURES = ("flops", "activation_bytes", "weight_bytes", "calls")


def cases(scale: int, ranks: int) -> list[Case]:
    """What is run, always on all devices: a device with busy neighbours is slower than one alone. Small and large in
    every quantity that costs something. `scale` multiplies widths."""
    hidden, ffn = "model.hidden_size", "model.moe_ffn_hidden_size"
    count, batch = "model.num_experts", "training.global_batch_size"
    small = {
        "model.num_layers": 2, "model.num_attention_heads": 4, hidden: 128 * scale, "model.sequence_length": 128,
        count: 8, ffn: 128 * scale, "router.name": TopKRouter.name, "router.k": 2, batch: 4 * ranks,
    }  # fmt: skip
    varied = {
        "small": {},
        "deep": {"model.num_layers": 6, count: 16},
        "wide": {hidden: 256 * scale, ffn: 512 * scale},
        "long": {"model.sequence_length": 512, batch: 2 * ranks},
        "many tokens": {batch: 16 * ranks, count: 4},
        "128 experts": {count: 128, ffn: 64 * scale},
        "k 8 of 32": {count: 32, "router.k": 8},
        "ZeRO 3": {count: 32, "parallel.zero_stage": 3},
    }
    spread = {
        "spread": {count: 8 * ranks},
        "spread, wide": {hidden: 256 * scale, count: 16 * ranks},
        "spread, many tokens": {batch: 16 * ranks},
        "spread, many experts": {count: 128 * ranks, "router.k": 4},
        "spread, k 8": {count: 16 * ranks, "router.k": 8, "model.num_layers": 4},
        "spread, dense layers": {"model.num_layers": 4, "model.moe_layer_freq": 4},
    }
    runs = [Case(name, ranks, {**small, **keys}) for name, keys in varied.items()]
    if ranks > 1:
        small["parallel.expert_parallel"] = ranks
        runs += [Case(name, ranks, {**small, **keys}) for name, keys in spread.items()]
    return runs


def measure_machine(
    ranks: int, scale: int = 1, rounds: int = 1, say: Callable[[str], None] = lambda text: None
) -> tuple[Hardware, list[MeasuredRun]]:
    """Run everything, for `fit`: the machine with what its products and copies alone reach, and the runs. Minutes.

    Args:
        ranks: the devices of this node, one process each.
        scale: of the models' widths; more on an accelerator, which small ones keep waiting.
        rounds: how often everything is run.
        say: is told what is being measured.

    Raises:
        TrainingError: a run failed.
    """
    use_local_device()
    cpu = not on_gpu()
    precision: Precision = "fp32" if cpu else "bf16"
    say("matrix products and copies")
    matmul = matmul_tflops(precision)
    alone = Hardware(
        name=machine(), devices_per_node=ranks, cpu=cpu, memory_gib=_memory_gib(ranks),
        peak_tflops={precision: matmul}, within_node=Link(gb_s=copy_gb_s()),
        speeds={"default": Speed(tflops={precision: matmul}, gb_s=copy_gb_s())},
    )  # fmt: skip
    runs = [with_precision(case, precision) for case in cases(scale, ranks)]
    return alone, measure_all(runs, VOCABULARY, rounds, say)


def with_precision(case: Case, precision: str) -> Case:
    return replace(case, keys={**case.keys, "training.precision": precision})


def layout_of(run: MeasuredRun, hardware: Hardware) -> Layout:
    """A run as the planner sees it, with the experts per token and the imbalance that it had."""
    config = config_of(run.case, VOCABULARY)
    return Layout(config, hardware, run.case.ranks, run.load, run.experts_per_token)


def fit(alone: Hardware, runs: list[MeasuredRun]) -> Hardware:
    """The machine with speeds, network and memory that explain the runs best. No part gets a higher rate of matrix
    products than they have alone."""
    (precision,) = alone.peak_tflops
    layouts = [layout_of(run, alone) for run in runs]
    works = [work(layout) for layout in layouts]
    networked = alone.model_copy(update={"within_node": _link(alone, layouts, runs)})
    speeds = dict(alone.speeds)
    for part in sorted({name for done in works for name in done}):
        rows, times = [], []
        for run, done, layout in zip(runs, works, layouts, strict=True):
            if part in done:
                rows.append([*(getattr(done[part], feature) for feature in FEATURES), 1.0])
                measured = run.seconds_by_part.get(part, 0.0)
                times.append(max(measured - _network(part, replace(layout, hardware=networked)), 0.1 * measured))
        least = np.array([1e-12 / alone.peak_tflops[precision], 0.0, 0.0, 0.0, 0.0])
        speeds[part] = _speed(robust_fit(np.array(rows), np.array(times), least), precision)
    return _with_memory(networked.model_copy(update={"speeds": speeds}), layouts, runs)


def _link(alone: Hardware, layouts: list[Layout], runs: list[MeasuredRun]) -> Link:
    spread = [
        (traffic.exchange(layout), layout, run) for layout, run in zip(layouts, runs, strict=True) if layout.ep > 1
    ]
    if not spread:
        return alone.within_node
    rows = np.array([(flow.bytes * layout.load, flow.calls) for flow, layout, _ in spread])
    per_byte, per_call = non_negative_fit(rows, np.array([run.seconds_by_part["exchange"] for *_, run in spread]))
    return Link(gb_s=_rate(per_byte, 1e-9) or alone.within_node.gb_s, call_us=float(f"{per_call * 1e6:.4g}"))


def _with_memory(hardware: Hardware, layouts: list[Layout], runs: list[MeasuredRun]) -> Hardware:
    """What a process takes alone, and what its allocator holds for each byte of state and of activations."""
    counted = [memory(layout) for layout in layouts]
    rows = np.array([(1.0, predicted.state, predicted.transient) for predicted in counted])
    fitted = non_negative_fit(rows, np.array([run.peak_memory for run in runs]), np.array([0.0, 1.0, 1.0]))
    return hardware.model_copy(
        update={
            "process_gib": float(f"{fitted[0] / 2**30:.4g}"),
            "state_overhead": float(f"{fitted[1]:.4g}"),
            "activation_overhead": float(f"{fitted[2]:.4g}"),
        }
    )


def _network(part: str, layout: Layout) -> float:
    """Seconds of the network that the clock counts to a part: gradients to the rest, new weights to the optimizer."""
    flow = {"rest": traffic.gradients, "optimizer": traffic.weights}.get(part)
    return flow(layout).seconds(layout) if flow is not None and flow(layout).calls else 0.0


def _speed(seconds_per: np.ndarray, precision: Precision) -> Speed:
    flops, activation, weight, call, step = seconds_per
    return Speed(
        tflops={precision: _rate(flops, 1e-12)}, gb_s=_rate(activation, 1e-9), weights_gb_s=_rate(weight, 1e-9),
        call_us=float(f"{call * 1e6:.4g}"), step_us=float(f"{step * 1e6:.4g}"),
    )  # fmt: skip


def _rate(seconds_per_unit: float, unit: float) -> float | None:
    return float(f"{unit / seconds_per_unit:.4g}") if seconds_per_unit > 0 else None


def robust_fit(rows: np.ndarray, times: np.ndarray, least: np.ndarray) -> np.ndarray:
    """`non_negative_fit` with Huber's loss: a run that something else disturbed counts less. What explains no
    time of a run stays at `least`: none could have told it from another value."""
    scale = _scale(rows)
    start = np.maximum(non_negative_fit(rows, times, least) * scale, least * scale + 1e-9)

    def relative_errors(scaled: np.ndarray) -> np.ndarray:
        return rows / scale @ scaled / times - 1

    fitted = least_squares(relative_errors, start, bounds=(least * scale, np.inf), loss="huber", f_scale=TYPICAL)
    share = (rows / scale * fitted.x / times[:, None]).max(0)
    return np.where(share > NOTICEABLE, fitted.x / scale, least)


def non_negative_fit(rows: np.ndarray, times: np.ndarray, least: np.ndarray | None = None) -> np.ndarray:
    """x with rows @ x near times, to the least sum of squared relative errors. No x is below `least` (0)."""
    scale = _scale(rows)
    least = np.zeros(rows.shape[1]) if least is None else least
    fitted = nnls(rows / scale / times[:, None], 1.0 - rows @ least / times)[0]
    return least + fitted / scale


def _scale(rows: np.ndarray) -> np.ndarray:
    """Of each column, so that all coefficients are of about one size."""
    largest = np.abs(rows).max(0)
    return np.where(largest > 0, largest, 1.0)


def matmul_tflops(precision: str, size: int = 1024, seconds: float = 2.0) -> float:
    """The best of many square products, one thread on a CPU."""
    device = device_name()
    size = size if device == "cpu" else ON_GPU
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return float(f"{2 * size**3 / _best(lambda: a @ b, seconds) / 1e12:.4g}")


def copy_gb_s(megabytes: int = 64, seconds: float = 1.0) -> float:
    """Bytes read and written by a copy that no cache holds."""
    device = device_name()
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    return float(f"{2 * source.nbytes / _best(lambda: target.copy_(source), seconds) / 1e9:.4g}")


def _best(action: Callable[[], object], seconds: float) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        action()
        synchronize()
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(threads)
    return best


def _memory_gib(ranks: int) -> float:
    if on_gpu():
        return round(gpu_memory_bytes() / 2**30, 1)
    return round(psutil.virtual_memory().total / 2**30 / ranks, 1)
