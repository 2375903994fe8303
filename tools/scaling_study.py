#!/usr/bin/env python
"""Scaling studies: train a grid of router x experts x granularity x seed at equal active compute, and report on it.

    python tools/scaling_study.py corpus --output data/study
    python tools/scaling_study.py run configs/studies/relu_over_experts.yaml --out runs/studies/relu --parallel 2
    python tools/scaling_study.py report runs/studies/relu --target docs/results/scaling

Ctrl-C stops after a checkpoint; the same command goes on where it was. How a study is written: docs/studies.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsmoe.runtime.command_line import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run", help="train what is not finished yet")
    train.add_argument("study", metavar="STUDY.yaml")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the study's runs")
    train.add_argument("--parallel", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    train.add_argument("--retry", action="store_true", help="also run again what failed")
    report = commands.add_parser("report", help="write one HTML page, one Markdown file, and a CSV for each picture")
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of studies that were run")
    report.add_argument("--target", type=Path, metavar="DIR", help="where it goes (default: report/ in the first DIR)")
    report.add_argument("--limits", type=Path, metavar="PAGE.md", help="a page that shows the limits, between marks")
    corpus = commands.add_parser("corpus", help="make the studies' dataset of what this machine has installed")
    corpus.add_argument("--output", type=Path, default=Path("data/study"), metavar="FOLDER", help="default: data/study")
    corpus.add_argument("--linux", type=Path, metavar="FILE", help="default: /usr/src/linux-source-*.tar.xz, if there")
    corpus.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="default: 2048")
    corpus.add_argument("--limit-mb", type=float, metavar="X", help="use X MB of text (default: all, about 430)")
    corpus.add_argument("--workers", type=int, default=2, metavar="N", help="processes that tokenize (default: 2)")
    corpus.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    arguments = parser.parse_args()
    if arguments.command == "corpus":
        return make_corpus(arguments)
    if arguments.command == "report":
        from dsmoe.lab.study.scaling_report import write_report

        target = arguments.target or arguments.folders[0] / "report"
        for path in write_report(arguments.folders, target, arguments.limits):
            print(path)
        return 0
    if arguments.parallel < 1:
        parser.error(f"--parallel: found {arguments.parallel}, expected at least 1")
    from dsmoe.lab.study.grid import load_study
    from dsmoe.lab.study.scaling import run_study

    study = load_study(arguments.study)
    failed = run_study(study, arguments.out, arguments.parallel, arguments.retry)
    if failed:
        print(f"{failed} of {len(study.cells())} cells failed; their errors are in {arguments.out}/*/*/*/cell.json")
    return 1 if failed else 0


def make_corpus(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from dsmoe.lab.study.corpus import build_corpus

    limit = None if arguments.limit_mb is None else int(arguments.limit_mb * 1e6)
    description = build_corpus(
        arguments.output, linux=arguments.linux, vocab_size=arguments.vocab_size, limit_bytes=limit,
        workers=arguments.workers, overwrite=arguments.overwrite, console=Console(),
    )  # fmt: skip
    for name, split in description.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    run(main)
