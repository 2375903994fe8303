"""Read a trained run and write RUN/probe.json: `python -m dsmoe.lab.study.probe RUN`."""

from __future__ import annotations

import argparse
import json
from statistics import mean

from dsmoe.runtime.command_line import run, user_path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dsmoe.lab.study.probe", description=__doc__)
    parser.add_argument("run", type=user_path, metavar="RUN", help="a run's folder, or a checkpoint of it")
    parser.add_argument("--data", metavar="PATH", help="a dataset (default: the run's own)")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of held-out text (default: 4096)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="where to write (default: RUN/probe.json)")
    arguments = parser.parse_args()

    from dsmoe.lab.study.probe import FILE, probe
    from dsmoe.runtime.files import write_atomically

    result = probe(arguments.run, arguments.data, arguments.tokens)
    target = arguments.json or arguments.run / FILE
    write_atomically(target, (json.dumps(result, indent=1) + "\n").encode())
    _show(result)
    print(f"wrote {target}")


def _show(result: dict) -> None:
    from rich import box
    from rich.table import Table

    from dsmoe.runtime.screen import make_console

    console = make_console(highlight=False, soft_wrap=True)
    console.print(f"[bold]step {result['step']}[/], {result['tokens']:,} held-out tokens")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    headings = ("layer", "experts", "load", "dead", "cosine", "CKA", "weights", "flips", "bf16", "gradient")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, layer in enumerate(result["layers"]):
        alike = [f"{layer[name]['mean']:.2f}" if name in layer else "" for name in ("cosine", "cka", "weights")]
        flipped = f"{layer['flips_checkpoint']:.1%}" if "flips_checkpoint" in layer else ""
        norms = layer["gradient_norm"]
        table.add_row(
            str(number), f"{layer['experts_per_token']:.2f}", f"{layer['load']:.2f}", f"{layer['dead']:.0%}", *alike,
            flipped, f"{layer['flips_bf16']:.1%}", f"{min(norms):.0e}..{max(norms):.0e}",
        )  # fmt: skip
    console.print(table)
    kinds = sorted(result["kinds"].items(), key=lambda item: -item[1])
    text = [
        f"{kind} {mean(layer['by_kind'][kind] for layer in result['layers']):.2f}" for kind, share in kinds if share > 0
    ]
    console.print(f"[bold]experts a token[/]  {', '.join(text)}")
    for timing in result["latency"]:
        first, later = (f"{timing[name] * 1e3:.1f} ms" for name in ("first_token_seconds", "token_seconds"))
        console.print(
            f"[bold]{timing['setting']}[/]  {timing['experts_per_token']:.2f} experts a token, "
            f"loss {timing['loss']:.4f}; {first} to the first token, {later} for each after it"
        )


if __name__ == "__main__":
    run(main)
