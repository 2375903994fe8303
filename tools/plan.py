#!/usr/bin/env python
"""Replay the routes of a real step on other numbers of expert-parallel ranks: load, traffic, buffers.

    python launch/train.py --config configs/quickstart.yaml logging.trace=50
    python tools/plan.py replay runs/quickstart --ep 2,4,8 --hidden 256

What is counted, and how: dsmoe/planner/replay.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from dsmoe.command import run

BYTES = {"fp32": 4, "bf16": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    replay = commands.add_parser("replay", help="load and traffic of a recorded step on other numbers of ranks")
    replay.add_argument("trace", type=Path, metavar="TRACE", help="a .npz of logging.trace, or the run's folder")
    replay.add_argument("--ep", required=True, type=_integers, metavar="N,...", help="expert-parallel sizes")
    replay.add_argument("--hidden", type=int, default=4096, metavar="H", help="width of a row (default: 4096)")
    replay.add_argument("--dtype", choices=BYTES, default="bf16", help="of a row on its way (default: bf16)")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    arguments = parser.parse_args()

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dsmoe.checkpoint.files import write_atomically
    from dsmoe.planner.replay import replay as replayed
    from dsmoe.training.trace import read_trace

    trace = read_trace(arguments.trace)
    rows = replayed(trace, arguments.ep)
    console = Console(highlight=False)
    routes = trace.counts_LE().sum() / len(trace.layers) / len(trace.tokens_T)
    console.print(
        f"[bold]step {trace.step}[/]: {len(trace.tokens_T)} tokens, {len(trace.layers)} MoE layers of "
        f"{trace.num_experts} experts, {routes:.2f} experts a token"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("EP", "placement", "load", "worst", "rows", "sent MB", "by route"):
        table.add_column(column, justify="left" if column == "placement" else "right", no_wrap=True)
    for row in rows:
        sent = row.sent_bytes(arguments.hidden, BYTES[arguments.dtype])
        more = f"{row.sent_routes / row.sent_rows:.2f} x" if row.sent_rows else ""
        table.add_row(
            str(row.ranks), row.placement, f"{row.load:.2f}", f"{row.worst_load:.2f}", str(row.received_rows),
            f"{sent / 1e6:.2f}", more,
        )  # fmt: skip
    console.print(table)
    console.print(
        "[dim]load: routes of the busiest rank over the mean; mean of layers, and worst\n"
        "rows: what the busiest rank takes in at once\n"
        "sent MB: by a rank in a layer and step, forward and backward\n"
        "by route: as many times more, were a token sent to each of its experts[/]"
    )
    if arguments.json:
        content = {"step": trace.step, "tokens": len(trace.tokens_T), "rows": [asdict(row) for row in rows]}
        write_atomically(arguments.json, (json.dumps(content, indent=1) + "\n").encode())


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    run(main)
