"""Start measuring jobs one after another, each on all cores in processes of its own, and gather their rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from dsmoe.lab.benchmark.problem import Problem
from dsmoe.lab.benchmark.worker import Job
from dsmoe.lab.children import start_ranks, wait_for_ranks

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def run_job(job: Job, huge_pages: bool = True, deadline: float = 7200) -> list[dict]:
    """The rows of a job, its times and then its memory; one row with the error where it failed as a whole. Each has
    the problem's fields."""
    rows = _rows_of(job, huge_pages, deadline)
    memory = {}
    if any(row["kind"] in ("peer", "ours") and "error" not in row for row in rows):
        measured = _rows_of(replace(job, what="memory"), huge_pages, deadline)
        memory = {(row["name"], row["load"]): row for row in measured if "error" not in row}
        rows += [row | {"kind": "memory"} for row in measured if "error" in row]
    return [memory.get((row["name"], row["load"]), {}) | asdict(job.problem) | row for row in rows]


def _rows_of(job: Job, huge_pages: bool, deadline: float) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder, "rows.json")
        description = Path(folder, "job.json")
        replace(job, result=str(result_file)).save(description)
        arguments = ["-m", "dsmoe.lab.benchmark.worker", str(description)]
        environment = {HUGE_PAGES: str(int(huge_pages))}
        error = wait_for_ranks(start_ranks(arguments, job.problem.ranks, Path(folder), environment), deadline)
        rows = json.loads(result_file.read_text()) if result_file.exists() else []
    if error or not rows:
        error = f"{job.what}: {error or 'it left no rows'}"
        rows.append({"name": "the whole job", "kind": "job", "load": "", "error": error})
    return rows


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
