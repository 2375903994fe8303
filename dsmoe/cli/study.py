"""Studies: train a grid of routers x experts x granularity x size x seed at equal active compute, and report on it.

    dsmoe study corpus --output data/study
    dsmoe study run configs/studies/relu_over_experts.yaml --out runs/studies/relu_over_experts
    dsmoe study report runs/studies/relu_over_experts --target docs/results/scaling
    dsmoe study rebuild docs/results/scaling

Ctrl-C stops after a checkpoint; the same command goes on where it was. How a study is written: docs/studies.md.
"""

from __future__ import annotations

import argparse
import shlex
from os.path import expanduser
from pathlib import Path

from dsmoe.runtime.command_line import user_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", help="train what is not finished yet"))
    report = commands.add_parser("report", help="write tables, pictures and CSV of what is finished, and an HTML page")
    report.add_argument("folders", nargs="+", type=user_path, metavar="DIR", help="folders of studies that were run")
    report.add_argument(
        "--target", type=user_path, metavar="DIR", help="where it goes (default: report/ in the first DIR)"
    )
    rebuild = commands.add_parser("rebuild", help="write a report again from the CSV files that it left")
    rebuild.add_argument("target", type=user_path, metavar="DIR", help="where a report was written")
    rebuild.add_argument("--html", type=user_path, metavar="FILE", help="also the page with all pictures, in one file")
    for command in (report, rebuild):
        command.add_argument(
            "--limits", type=user_path, metavar="PAGE.md", help="a page that shows the limits, between marks"
        )
    _add_corpus(commands.add_parser("corpus", help="make the studies' dataset of what this machine has installed"))
    arguments = parser.parse_args(argv)
    if arguments.command == "run" and arguments.parallel < 1:
        parser.error(f"--parallel: found {arguments.parallel}, expected at least 1")
    return {"run": run_study, "report": write_report, "rebuild": write_report, "corpus": make_corpus}[
        arguments.command
    ](arguments)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=expanduser, metavar="STUDY.yaml", help="or a plan of the earlier compare_routers")
    parser.add_argument("--out", required=True, type=user_path, metavar="DIR", help="folder of the study's runs")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    parser.add_argument("--retry", action="store_true", help="also run again what failed")
    parser.add_argument(
        "--reported", type=user_path, metavar="DIR", help="a study's folder of a report, whose cells are not run again"
    )
    parser.add_argument(
        "--before",
        metavar="COMMAND",
        help="run before each cell, which starts when it ends: to wait for a quiet machine",
    )


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=user_path, default=Path("data/study"), metavar="FOLDER", help="default: data/study"
    )
    parser.add_argument(
        "--linux", type=user_path, metavar="FILE", help="default: /usr/src/linux-source-*.tar.xz, if there"
    )
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="default: 2048")
    parser.add_argument("--limit-mb", type=float, metavar="X", help="use X MB of text (default: all, about 430)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that tokenize (default: 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")


def run_study(arguments: argparse.Namespace) -> int:
    from dsmoe.lab.study.check import load_study
    from dsmoe.lab.study.runner import run_study
    from dsmoe.lab.study.saved import reported_cells

    study = load_study(arguments.study)
    before = shlex.split(arguments.before) if arguments.before else None
    reported = set()
    if arguments.reported is not None:
        reported = reported_cells(arguments.reported, study)
        print(f"{len(reported)} of {len(study.cells())} cells are in {arguments.reported} and are not run again")
    failed = run_study(
        study, arguments.out, arguments.parallel, arguments.retry, before=before, reported=reported
    )  # fmt: skip
    if failed:
        print(f"{failed} of {len(study.cells())} cells failed; their errors are in {arguments.out}/*/*/*/cell.json")
    return 1 if failed else 0


def write_report(arguments: argparse.Namespace) -> int:
    from dsmoe.lab.study import report

    if arguments.command == "rebuild":
        written = report.rebuild(arguments.target, arguments.limits, arguments.html)
    else:
        target = arguments.target or arguments.folders[0] / "report"
        written = report.write_report(arguments.folders, target, arguments.limits)
    for path in written:
        print(path)
    return 0


def make_corpus(arguments: argparse.Namespace) -> int:
    from dsmoe.lab.study.corpus import build_corpus
    from dsmoe.runtime.screen import make_console

    limit = None if arguments.limit_mb is None else int(arguments.limit_mb * 1e6)
    description = build_corpus(
        arguments.output, linux=arguments.linux, vocab_size=arguments.vocab_size, limit_bytes=limit,
        workers=arguments.workers, overwrite=arguments.overwrite, console=make_console(),
    )  # fmt: skip
    for name, split in description.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
    return 0
