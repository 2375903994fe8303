"""Start measuring jobs one after another, each on all cores in processes of its own, and gather their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from dsmoe.lab.benchmark.problem import Problem
from dsmoe.lab.benchmark.worker import Job
from dsmoe.parallel.place import free_port

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_environment(rank: int, ranks: int, port: str, threads: int, huge_pages: bool) -> dict[str, str]:
    """Of one process of a job on this machine."""
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads),
        HUGE_PAGES: str(int(huge_pages)), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def run_job(job: Job, huge_pages: bool = True, deadline: float = 7200) -> list[dict]:
    """The rows of a job, its times and then its memory; one row with the error where it failed as a whole. Each has
    the problem's fields."""
    rows = _rows_of(job, huge_pages, deadline)
    memory = {}
    if any(row["kind"] in ("peer", "ours") and "error" not in row for row in rows):
        found = _rows_of(replace(job, what="memory"), huge_pages, deadline)
        memory = {(row["name"], row["load"]): row for row in found if "error" not in row}
        rows += [row | {"kind": "memory"} for row in found if "error" in row]
    return [memory.get((row["name"], row["load"]), {}) | asdict(job.problem) | row for row in rows]


def _rows_of(job: Job, huge_pages: bool, deadline: float) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "rows.json")
        description = Path(folder, "job.json")
        replace(job, result=str(found)).save(description)
        arguments = ["-m", "dsmoe.lab.benchmark.worker", str(description)]
        error = _run_ranks(arguments, job.problem.ranks, huge_pages, deadline, Path(folder))
        rows = json.loads(found.read_text()) if found.exists() else []
    if error or not rows:
        error = f"{job.what}: {error or 'it left no rows'}"
        rows.append({"name": "the whole job", "kind": "job", "load": "", "error": error})
    return rows


def _run_ranks(arguments: list[str], ranks: int, huge_pages: bool, deadline: float, folder: Path) -> str | None:
    """Run Python with these arguments on every rank; None, or the last words of the first rank that failed."""
    port, threads = free_port(), max(1, cores() // ranks)
    logs = [Path(folder, f"rank{rank}.log") for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            environment = rank_environment(rank, ranks, port, threads, huge_pages)
            command = [sys.executable, *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        return _wait(processes, logs, deadline)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: list[subprocess.Popen], logs: list[Path], deadline: float) -> str | None:
    """Wait for all; as soon as one fails, the others, who would wait for it, are given up."""
    waited = 0.0
    while running := [process for process in processes if process.poll() is None]:
        if any(process.poll() not in (None, 0) for process in processes) or waited > deadline:
            break
        try:
            running[0].wait(0.5)
        except subprocess.TimeoutExpired:
            waited += 0.5
    for rank, process in enumerate(processes):
        if process.poll() not in (None, 0):
            lines = logs[rank].read_text(errors="replace").strip().splitlines() or ["no output"]
            return f"rank {rank} ended with {process.poll()}: {lines[-1][:300]}"
    return f"not done after {deadline:.0f} s" if any(process.poll() is None for process in processes) else None


def jobs_of(
    base: Problem, experts: Iterable[int], dtypes: Iterable[str], ranks: Iterable[int], loads: list[str], **options
) -> list[Job]:
    """One job for each number of experts, precision and expert-parallel size. options: fields of `Job`."""
    return [
        Job(replace(base, experts=count, dtype=dtype, ranks=size), loads, "", **options)
        for count in experts
        for dtype in dtypes
        for size in ranks
    ]
