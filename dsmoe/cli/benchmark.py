"""Measure one MoE layer, forward and backward, or whole training steps: dsmoe, other libraries, the machine's limit.

    dsmoe benchmark --json layer.json
    dsmoe benchmark --experts 8,128 --skew 30:4 --only "topk,AutoEP"
    dsmoe benchmark --step --json step.json

What is compared runs in turn, round by round, and a time is the median over rounds. What is measured and how:
docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from dsmoe.runtime.command_line import user_path


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.require_gpu:
        from dsmoe.runtime.device import on_gpu

        if not on_gpu():
            from dsmoe.lab.benchmark.problem import mistake

            raise mistake("--require-gpu: found no CUDA device, expected one")

    from dsmoe.lab.benchmark.report import circumstances, show_circumstances
    from dsmoe.runtime.screen import make_console

    console = make_console(highlight=False)
    tree = circumstances(sys.argv) | {"huge_pages": not arguments.no_huge_pages}
    show_circumstances(tree, console)
    if arguments.step:
        measure_steps(arguments, tree, console)
    else:
        measure_layer(arguments, tree, console)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = dict(type=int, metavar="N")
    parser.add_argument("--step", action="store_true", help="whole training steps instead of a layer")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--experts", type=_integers, metavar="N,...", help="default: 8,32,128,512,1024; steps: 16,64")
    parser.add_argument("--only", type=_words, default=[], metavar="NAME,...", help="cases with that in their name")
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer cases and 3 rounds")
    parser.add_argument("--rounds", **number, help="at least so many (default: 7, with --quick 3)")
    parser.add_argument("--tokens", default=4096, **number, help="of all ranks together (default: 4096)")
    parser.add_argument("--hidden", default=256, **number, help="H (default: 256)")
    parser.add_argument("--ffn", default=512, **number, help="F (default: 512)")
    parser.add_argument("--k", default=2, **number, help="mean experts of a token (default: 2)")
    parser.add_argument("--require-gpu", action="store_true", help="refuse to measure a CPU")
    parser.add_argument("--no-huge-pages", action="store_true", help="leave CPU tensors on small pages")
    layer = parser.add_argument_group("of a layer")
    layer.add_argument("--dtype", type=_words, metavar="D,...", help="default: fp32,bf16")
    layer.add_argument("--ranks", type=_integers, metavar="N,...", help="expert-parallel sizes (default: 1,2)")
    layer.add_argument("--load", type=_words, metavar="L,...", help="default: balanced,real")
    layer.add_argument("--skew", type=_words, default=[], metavar="P:N,...", help="more loads: P %% on N experts")
    layer.add_argument("--budget", type=float, default=60, metavar="S", help="seconds after which no round begins (60)")
    step = parser.add_argument_group("of a step")
    step.add_argument("--layers", default=4, **number, help="default: 4")
    step.add_argument("--heads", default=8, **number, help="default: 8")
    step.add_argument("--vocabulary", default=8192, **number, help="default: 8192")
    step.add_argument("--sequence", default=256, **number, help="tokens of a sequence (default: 256)")
    step.add_argument(
        "--growth", type=_integers, metavar="N,...", help="experts at fixed active compute (8,32,128,512)"
    )
    return parser.parse_args(argv)


def measure_layer(arguments: argparse.Namespace, tree: dict, console) -> None:
    from dsmoe.lab.benchmark.jobs import jobs_of, run_job
    from dsmoe.lab.benchmark.problem import Problem, check_load
    from dsmoe.lab.benchmark.report import processor, show_rows, show_summary, show_ways, write_json

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
    tree["layer"] = []
    for number, job in enumerate(jobs, 1):
        problem = job.problem
        console.print(
            f"[dim]{number}/{len(jobs)}: {problem.experts} experts, {problem.dtype}, EP={problem.ranks} ...[/]"
        )
        rows = run_job(job, huge_pages=not arguments.no_huge_pages)
        tree["layer"] += rows
        show_rows(rows, console)
        tree["processor"] = processor()  # with the ways that were chosen for this problem
        show_ways(tree["processor"]["ways"], f"H={problem.hidden}, F={problem.ffn}", console)
        if arguments.json:
            write_json(arguments.json, tree)  # after every job: a long run that is stopped leaves what it has
    if len(jobs) > 1:
        show_summary(tree["layer"], console)


def measure_steps(arguments: argparse.Namespace, tree: dict, console) -> None:
    from dsmoe.lab.benchmark.report import show_parts, show_steps, write_json
    from dsmoe.lab.benchmark.step import StepJob
    from dsmoe.lab.benchmark.step_parts import time_parts
    from dsmoe.lab.benchmark.steps import growth_jobs, peer_jobs, router_jobs, run_steps

    quick, experts = arguments.quick, arguments.experts or ([16] if arguments.quick else [16, 64])
    names = ("hidden", "ffn", "k", "layers", "heads", "vocabulary", "sequence")
    sizes = {name: getattr(arguments, name) for name in names}
    sequences = arguments.tokens // arguments.sequence
    bases = [StepJob("", "", experts=count, sequences=sequences, **sizes) for count in experts]
    for base in bases:
        base.check()
    growth = arguments.growth or ([] if quick else [8, 32, 128, 512])
    comparisons = {f"{base.experts} experts": peer_jobs(base) for base in bases}
    comparisons[f"Routers, {bases[0].experts} experts"] = router_jobs(bases[0])
    if growth:
        comparisons["More experts at the same active compute"] = growth_jobs(bases[0], growth)
    rounds = arguments.rounds or (3 if quick else 7)
    if not arguments.only or "parts" in arguments.only:
        tree["parts"] = time_parts(bases[0], rounds)
        show_parts(tree["parts"], console)
    tree["step"] = {}
    for title, jobs in comparisons.items():
        wanted = [part.lower() for part in arguments.only] or [""]
        chosen = [job for job in jobs if any(part in job.name.lower() for part in wanted)]
        if not chosen:
            continue
        if arguments.no_huge_pages:
            chosen = [replace(job, huge_pages=False) for job in chosen]
        rows = run_steps(chosen, rounds)
        tree["step"][title] = rows
        show_steps(title, rows, console)
        if arguments.json:
            write_json(arguments.json, tree)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _integers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]
