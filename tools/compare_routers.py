#!/usr/bin/env python
"""Compare routers: train every variant of a plan on every corpus with every seed, then put the results side by side.

    python tools/compare_routers.py run configs/recipes/compare_stdlib_plan.yaml --out runs/comparison --parallel 2
    python tools/compare_routers.py report configs/recipes/compare_stdlib_plan.yaml --out runs/comparison

Ctrl-C stops after a checkpoint; the same command goes on where it was. How a plan is written: dsmoe/lab/study/plan.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsmoe.runtime.command_line import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run", help="train what is not finished yet")
    report = commands.add_parser("report", help="write tables (Markdown, CSV) and plots of what is finished")
    for command in (train, report):
        command.add_argument("plan", metavar="PLAN.yaml")
        command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the comparison's runs")
    train.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    train.add_argument("--retry", action="store_true", help="also run again what failed")
    report.add_argument("--target", type=Path, metavar="DIR", help="where the report goes (default: OUT/report)")
    report.add_argument("--page", type=Path, metavar="PAGE.md", help="a page that shows the tables, between marks")
    arguments = parser.parse_args()
    if arguments.command == "run" and arguments.parallel < 1:
        parser.error(f"--parallel: found {arguments.parallel}, expected at least 1")

    from dsmoe.lab.study.plan import load_plan

    plan = load_plan(arguments.plan)
    if arguments.command == "run":
        from dsmoe.lab.study.compare import run_plan

        failed = run_plan(plan, arguments.out, arguments.parallel, arguments.retry)
        if failed:
            print(f"{failed} of {len(plan.cells())} runs failed; their errors are in {arguments.out}/*/*/*/cell.json")
        return 1 if failed else 0
    from dsmoe.lab.study.report import write_report

    target = arguments.target or arguments.out / "report"
    for path in write_report(plan, arguments.out, target, arguments.page):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
