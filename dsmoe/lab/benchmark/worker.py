"""One process of a measuring job: `python -m dsmoe.lab.benchmark.worker JOB.json`; rank 0 writes the rows it found.

A job is one number of experts, precision and expert-parallel size. All cases of a load are built, warmed up and then
timed in turn; counters come after all clocks have stopped. Peak memory is a job of its own, in processes whose malloc
leaves no holes.
"""

from __future__ import annotations

import ctypes
import json
import signal
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from dsmoe.lab.benchmark.measure import Case, barrier, count, interleave, largest, map_blocks_one_by_one, peak_growth
from dsmoe.lab.benchmark.problem import Problem


@dataclass
class Job:
    """What one worker measures. `names`: parts of names of cases to keep; empty keeps all. Of times the limit always
    stays."""

    problem: Problem
    loads: list[str]
    result: str  # file
    names: list[str] = field(default_factory=list)
    budget: float = 60.0  # seconds of timed rounds for each load
    least: int = 7  # rounds
    most: int = 50
    what: Literal["times", "memory"] = "times"

    def wants(self, name: str) -> bool:
        return not self.names or any(part.lower() in name.lower() for part in self.names)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        tree = json.loads(path.read_text())
        return cls(**{**tree, "problem": Problem(**tree["problem"])})


PARTS = 4  # of the top-k layer that works part by part
Build = Callable[[tuple[Tensor, Tensor]], Case]


@dataclass
class Entry:
    """A case that can be made for any load."""

    name: str
    kind: str
    variable: bool  # whether its tokens have different numbers of experts
    build: Build


def entries_of(world, job: Job) -> list[Entry]:
    """Every peer and every router, by name."""
    from dsmoe.lab.benchmark import peers
    from dsmoe.routers import available
    from dsmoe.routers.topk import TopKRouter

    ranks = world.groups.ep_size
    entries = [
        Entry(name, "peer", False, _once(build, world, name))
        for name, build in peers.peers(ranks, world.device).items()
    ]
    for name, router in available().items():
        entries.append(_ours(world, f"dsmoe {name}", router))
        for variant, options in router.benchmark_variants(ranks).items():
            entries.append(_ours(world, f"dsmoe {name}, {variant}", router, **options))
        if ranks > 1 and router is TopKRouter:
            entries.append(_ours(world, f"dsmoe {name}, {PARTS} parts", router, chunks=PARTS))
    return [entry for entry in entries if job.wants(entry.name)]


def _ours(world, name: str, router: type, chunks: int = 1, **options) -> Entry:
    from dsmoe.lab.benchmark import cases

    layers: list = []

    def build(inputs: tuple[Tensor, Tensor]) -> Case:
        if not layers:
            layers.append(cases.build_layer(world, router, chunks, **options))
        return cases.layer_case(world, layers[0], name, inputs)

    return Entry(name, "ours", _varies(world, router), build)


def _varies(world, router: type) -> bool:
    from dsmoe.lab.benchmark import cases

    return cases.router_options(router, world.problem).fixed_experts_per_token() is None


def _once(build, world, name: str) -> Build:
    """A peer is built for the first load; for others it gets other tokens."""
    built: list[Case] = []

    def with_inputs(inputs: tuple[Tensor, Tensor]) -> Case:
        if not built:
            built.append(build(world, name, inputs))
        return replace(built[0], leaves=[inputs[0]], grads=[inputs[1]])

    return with_inputs


def measure(job: Job, world) -> list[dict[str, Any]]:
    """Rows for all loads of a job. Collective over all ranks; what fails on one rank is an error row on all."""
    return (_memory if job.what == "memory" else _times)(job, world)


def _memory(job: Job, world) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    entries = entries_of(world, job)
    for load in job.loads:
        inputs = {variable: world.inputs(load, variable) for variable in (False, True)}
        for entry in entries:
            warmed, error = _agreed(partial(_warmed, entry, inputs[entry.variable]))
            row = {"name": entry.name, "kind": entry.kind, "load": load}
            rows.append(row | ({"error": f"memory: {error}"} if error else memory_row(warmed[0], job.problem)))
    return rows


def _times(job: Job, world) -> list[dict[str, Any]]:
    from dsmoe.lab.benchmark import cases
    from dsmoe.lab.benchmark.limit import limit_cases, limit_of

    entries = entries_of(world, job)
    rows: list[dict[str, Any]] = []
    for load in job.loads:
        problem = job.problem.with_load(load)
        inputs = {variable: world.inputs(load, variable) for variable in (False, True)}
        good, outputs = limit_cases(world), {}
        if world.device == "cpu" and job.problem.dtype == "fp32":
            result, error = _agreed(partial(cases.products_case, world, inputs[False]))
            if error:
                rows.append({"name": "experts' products alone", "kind": "limit", "load": load, "error": error})
            else:
                good.append(result)
        for entry in entries:
            result, error = _agreed(partial(_warmed, entry, inputs[entry.variable]))
            if error:
                rows.append({"name": entry.name, "kind": entry.kind, "load": load, "error": error})
            else:
                good.append(result[0])
                outputs[entry.name] = result[1]
        if job.wants("dsmoe topk"):
            parts, error = _agreed(partial(_parts, world, inputs[False]))
            good += parts or []
            if error:
                rows.append({"name": "parts of dsmoe topk", "kind": "part", "load": load, "error": error})
        timings = interleave(good, job.budget, job.least, job.most)
        limit = limit_of(good, timings.seconds, problem)
        for case in good:
            row = time_row(case, timings.seconds[case.name], problem, limit) | {"load": load}
            if case.kind == "limit":
                row["limit"] = limit
            if case.name in outputs:
                row["difference"] = _difference(outputs, case.name)
            if case.kind in ("peer", "ours"):
                row.update(counter_row(case))
            rows.append(row)
    return rows


def _agreed(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns, and None; or an error, if there was one on any rank."""
    value = error = None
    try:
        value = work()
    except Exception as problem:
        error = f"{type(problem).__name__}: {str(problem).strip() or 'no message'}".splitlines()[0][:300]
        print(traceback.format_exc(), file=sys.stderr)
    if dist.get_world_size() > 1:
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = next((message for message in errors if message), None)
    return value, error


def _parts(world, inputs: tuple[Tensor, Tensor]) -> list[Case]:
    """The parts of the top-k layer, each run once."""
    from dsmoe.lab.benchmark.cases import part_cases

    part_list = part_cases(world, inputs)
    for case in part_list:
        case.clear()
        case.run()
        case.after()
        case.clear()
    return part_list


def _warmed(entry: Entry, inputs: tuple[Tensor, Tensor]) -> tuple[Case, Tensor]:
    """The case of an entry, and its first output."""
    case = entry.build(inputs)
    case.clear()
    output = case.run()[0].detach()
    case.after()
    case.clear()
    return case, output


def time_row(case: Case, seconds: list[float], problem: Problem, limit: dict[str, Any]) -> dict[str, Any]:
    middle = statistics.median(seconds)
    row: dict[str, Any] = {
        "name": case.name, "kind": case.kind, "rounds": len(seconds), "median_ms": 1e3 * middle,
        "fastest_ms": 1e3 * min(seconds), "slowest_ms": 1e3 * max(seconds),
    }  # fmt: skip
    if case.kind in ("peer", "ours") or case.name == "experts' products alone":
        row["over_limit"] = middle / limit["seconds"]
        row["flops_per_second"] = problem.expert_flops() / middle
        mean = case.mean_experts()
        row["mean_experts"] = float(problem.k) if mean is None else mean  # a peer's top-k is exact
    return row


def counter_row(case: Case) -> dict[str, Any]:
    """Bytes to other ranks and waits; the largest of all ranks."""
    counts = count(case)
    sent, syncs = largest([counts.sent_bytes, counts.host_syncs])
    return {"sent_bytes": int(sent), "host_syncs": int(syncs)}


def memory_row(case: Case, problem: Problem) -> dict[str, Any]:
    """Peak bytes; the largest of all ranks."""
    gradients = sum(parameter.nbytes for parameter in case.parameters)
    barrier()
    try:
        peak = float(peak_growth(case))
    except OSError:  # a kernel without this counter, or that does not allow it
        peak = float("nan")
    peak, gradient_bytes = largest([peak, gradients])
    rows = max(0.0, peak - gradient_bytes)
    return {
        "peak_bytes": peak, "gradient_bytes": gradient_bytes, "activation_bytes": problem.activation_bytes(),
        "memory_over_ideal": rows / problem.activation_bytes(),
    }  # fmt: skip


SAME_NUMBERS = ("transformers", "DeepSpeed", "Megatron", "MegaBlocks", "ScatterMoE", "dsmoe topk")


def _difference(outputs: dict[str, Tensor], name: str) -> float | None:
    """Largest difference to dsmoe's top-k over its largest output, for the cases that promise the same numbers."""
    reference = outputs.get("dsmoe topk")
    if reference is None or not name.startswith(SAME_NUMBERS) or name == "dsmoe topk_bias":
        return None
    scale = reference.abs().max().item()
    return largest([(outputs[name].float() - reference.float()).abs().max().item() / scale])[0]


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, however it went (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    from dsmoe.runtime.command_line import quiet_libraries

    end_with_parent()
    quiet_libraries()
    job = Job.load(Path(sys.argv[1]))
    if job.what == "memory":
        map_blocks_one_by_one()
    from dsmoe.lab.benchmark.cases import World
    from dsmoe.parallel.groups import create_groups, start_processes
    from dsmoe.runtime.device import device_name

    start_processes(timeout_minutes=20)
    device = device_name()
    world = World(job.problem, create_groups(job.problem.ranks), device)
    rows = measure(job, world)
    if dist.get_rank() == 0:
        unfinished = Path(job.result + ".partial")
        unfinished.write_text(json.dumps(rows))
        unfinished.rename(job.result)
    barrier()


if __name__ == "__main__":
    main()
