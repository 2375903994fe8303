#!/usr/bin/env python
"""Measure one MoE layer, forward and backward: dsmoe's routers, other libraries' layers and the machine's limit.

    python tools/benchmark_moe.py --json layer.json
    python tools/benchmark_moe.py --experts 8,128 --skew 30:4 --only "topk,AutoEP"

All cases of one problem run in the same processes in turn, round by round; a time is the median over rounds. What is
measured and how: docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsmoe.command import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--experts", type=_integers, metavar="N,...", help="default: 8,32,128,512,1024")
    parser.add_argument("--dtype", type=_words, metavar="D,...", help="default: fp32,bf16")
    parser.add_argument("--ranks", type=_integers, metavar="N,...", help="expert-parallel sizes (default: 1,2)")
    parser.add_argument("--load", type=_words, metavar="L,...", help="default: balanced,real")
    parser.add_argument(
        "--skew", type=_words, default=[], metavar="P:N,...", help="more loads: P %% of routes on N experts"
    )
    parser.add_argument(
        "--only", type=_words, default=[], metavar="NAME,...", help="cases whose name contains one of these"
    )
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of all ranks together (default: 4096)")
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="H (default: 256)")
    parser.add_argument("--ffn", type=int, default=512, metavar="N", help="F (default: 512)")
    parser.add_argument("--k", type=int, default=2, metavar="N", help="mean experts of a token (default: 2)")
    parser.add_argument("--rounds", type=int, metavar="N", help="at least so many (default: 7, with --quick 3)")
    parser.add_argument(
        "--budget", type=float, default=60, metavar="S", help="seconds after which no round begins (60)"
    )
    parser.add_argument("--quick", action="store_true", help="8 and 128 experts, fp32, balanced, 3 rounds, unless said")
    parser.add_argument("--no-huge-pages", action="store_true", help="leave CPU tensors on small pages")
    arguments = parser.parse_args()

    from rich.console import Console

    from dsmoe.benchmark.jobs import jobs_of, run_job
    from dsmoe.benchmark.problem import Problem, check_load
    from dsmoe.benchmark.report import circumstances, show_rows, show_summary, write_json

    quick = arguments.quick
    loads = (arguments.load or (["balanced"] if quick else ["balanced", "real"])) + arguments.skew
    base = Problem(tokens=arguments.tokens, hidden=arguments.hidden, ffn=arguments.ffn, k=arguments.k)
    jobs = jobs_of(
        base,
        arguments.experts or ([8, 128] if quick else [8, 32, 128, 512, 1024]),
        arguments.dtype or (["fp32"] if quick else ["fp32", "bf16"]),
        arguments.ranks or [1, 2],
        loads,
        names=arguments.only,
        least=arguments.rounds or (3 if quick else 7),
        budget=0 if quick else arguments.budget,
    )
    for job in jobs:
        job.problem.check()
        for load in loads:
            check_load(job.problem.with_load(load))

    console = Console(highlight=False)
    tree = circumstances(sys.argv) | {"huge_pages": not arguments.no_huge_pages, "layer": []}
    for job in jobs:
        rows = run_job(job, huge_pages=not arguments.no_huge_pages)
        tree["layer"] += rows
        show_rows(rows, console)
        if arguments.json:
            write_json(arguments.json, tree)  # after every job: a long run that is stopped leaves what it has
    if len(jobs) > 1:
        show_summary(tree["layer"], console)
    return 0


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _integers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


if __name__ == "__main__":
    run(main)
