"""Whole training steps of several models in turn: which comparisons there are, and the driver of their processes."""

from __future__ import annotations

import json
import os
import selectors
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from dsmoe.lab.benchmark.jobs import HUGE_PAGES
from dsmoe.lab.benchmark.step import StepJob
from dsmoe.lab.children import rank_environment, start
from dsmoe.parallel.place import free_port
from dsmoe.routers import available

# Of all parameters that training holds: weights, gradients, both moments, the optimizer's copy; and working space of
# the same size, which dsmoe's way of writing gradients spares (dsmoe/optim/deepspeed.py).
COPIES, COPIES_OF_DSMOE = 6, 5.25


def peer_jobs(base: StepJob, ranks: int = 2) -> list[StepJob]:
    """dsmoe beside the same model under AutoEP and in plain transformers, each peer on small pages, as its users get
    it, and on dsmoe's huge ones; and the model's matrix products alone."""
    peers = [
        replace(base, name="transformers grouped_mm", kind="transformers"),
        replace(base, name=f"DeepSpeed AutoEP EP={ranks}", kind="autoep", ranks=ranks),
    ]
    return [
        replace(base, name="matmuls alone", kind="matmuls"),
        replace(base, name="matmuls and attention", kind="matmuls and attention"),
        *(replace(peer, huge_pages=False) for peer in peers),
        *(replace(peer, name=f"{peer.name}, huge pages") for peer in peers),
        replace(base, name=f"dsmoe EP={ranks}", kind="dsmoe", ranks=ranks),
    ]


def router_jobs(base: StepJob, ranks: int = 2) -> list[StepJob]:
    """Variable numbers of experts against top-k, at the same mean."""
    return [replace(base, name=f"dsmoe {router}", kind="dsmoe", ranks=ranks, router=router) for router in available()]


def growth_jobs(base: StepJob, experts: Iterable[int], ranks: int = 2) -> list[StepJob]:
    """More experts at the same active compute."""
    return [replace(base, name=f"dsmoe {count} experts", kind="dsmoe", ranks=ranks, experts=count) for count in experts]


class StepProcesses:
    """The ranks of one model, waiting for their turn."""

    def __init__(self, job: StepJob, folder: Path):
        self.job = job
        self.error: str | None = None
        description = folder / f"{job.name.replace(' ', '_')}.json"
        job.save(description)
        port = free_port()
        self.ranks = []
        for rank in range(job.ranks):
            read, write = os.pipe()
            environment = rank_environment(rank, job.ranks, port) | {HUGE_PAGES: str(int(job.huge_pages))}
            arguments = ["-m", "dsmoe.lab.benchmark.step", str(description), str(write)]
            log = description.with_suffix(f".{rank}.log")
            child = start(arguments, log, environment, pass_fds=[write], stdin=subprocess.PIPE)
            os.close(write)
            self.ranks.append((child, os.fdopen(read)))

    def answers(self, deadline: float) -> list[dict[str, Any]]:
        """What all ranks say next; empty, and `error` set, where one failed, ended, or is silent for `deadline` s."""
        by_rank: dict[int, dict] = {}
        with selectors.DefaultSelector() as ready:
            for rank, (_, replies) in enumerate(self.ranks):
                ready.register(replies, selectors.EVENT_READ, rank)
            end = time.monotonic() + deadline
            while len(by_rank) < len(self.ranks):
                events = ready.select(max(0.0, end - time.monotonic()))
                if not events:
                    return self._fail(f"no answer within {deadline:.0f} s")
                for key, _ in events:
                    line = self.ranks[key.data][1].readline()
                    answer = json.loads(line) if line else {"error": "the process ended"}
                    if "error" in answer:
                        return self._fail(answer["error"])
                    by_rank[key.data] = answer
                    ready.unregister(key.fileobj)
        return [by_rank[rank] for rank in range(len(self.ranks))]

    def _fail(self, error: str) -> list:
        self.error = error
        return []

    def step(self, deadline: float) -> list[dict[str, Any]]:
        for child, _ in self.ranks:
            try:
                child.process.stdin.write("step\n")
                child.process.stdin.flush()
            except OSError:
                return self._fail("the process ended")
        return self.answers(deadline)

    def close(self) -> None:
        for child, replies in self.ranks:
            child.kill()
            child.process.stdin.close()
            replies.close()


def run_steps(jobs: list[StepJob], rounds: int = 7, deadline: float = 900) -> list[dict[str, Any]]:
    """A row for each job: medians over `rounds` turns of tokens per second and seconds by stage; or its error.

    A model that would not fit into the free memory beside those before it is not started.
    """
    rows = {job.name: asdict(job) | {"tokens": job.tokens, "matmul_flops": job.matmul_flops()} for job in jobs}
    running: list[StepProcesses] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for job in jobs:
                copies = COPIES_OF_DSMOE if job.kind == "dsmoe" else COPIES
                need, free = 4 * copies * job.parameters(), psutil.virtual_memory().available
                if not job.kind.startswith("matmuls") and need > free:
                    rows[job.name]["error"] = f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
                    continue
                model = StepProcesses(job, Path(folder))
                running.append(model)
                if model.answers(deadline):
                    model.step(deadline)  # AdamW makes its moments in the first step
            by_model: dict[str, list[list[dict]]] = {model.job.name: [] for model in running}
            for number in range(rounds):
                turn = number % max(1, len(running))
                for model in running[turn:] + running[:turn]:
                    if model.error is None and (answers := model.step(deadline)):
                        by_model[model.job.name].append(answers)
            for model in running:
                if model.error:
                    rows[model.job.name]["error"] = model.error
                else:
                    rows[model.job.name] |= summary(model.job, by_model[model.job.name])
        finally:
            for model in running:
                model.close()
    return list(rows.values())


def summary(job: StepJob, rounds: list[list[dict]]) -> dict[str, Any]:
    """Medians over rounds of the slowest rank's seconds, by stage and in all."""
    stages = [name for name in rounds[0][0] if name != "mean_experts"]
    seconds = {
        name: statistics.median(max(answer[name] for answer in answers) for answers in rounds) for name in stages
    }
    whole = [max(sum(answer[name] for name in stages) for answer in answers) for answers in rounds]
    means = [answers[0].get("mean_experts", float(job.k)) for answers in rounds]
    return {
        "rounds": len(rounds), "seconds": statistics.median(whole), "fastest_seconds": min(whole),
        "slowest_seconds": max(whole), "stage_seconds": seconds, "mean_experts": statistics.mean(means),
        "tokens_per_second": job.tokens / statistics.median(whole),
    }  # fmt: skip
