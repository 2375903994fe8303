"""See inside: a text coloured by how many experts each token took, and what the experts of a model are for.

dsmoe inspect runs/first --text "The router sends every token to its experts."
dsmoe inspect runs/first --text prose.txt --text code.py --windows 20 --sweep --out look.html
dsmoe inspect exported/first --text notes.txt --plain
dsmoe inspect runs/relu --compare runs/topk --text notes.txt --json look.json --csv look

Writes one HTML page that needs no network. What each figure means: docs/inspect.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dsmoe.errors import CheckpointError, ConfigError
from dsmoe.runtime.command_line import quiet_libraries, require_path, user_path

PAGE = Path("inspect.html")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=user_path, help="a run folder, one of its checkpoints, an export, or a folder of "
                        "a Mixtral, OLMoE or Qwen3-MoE")  # fmt: skip
    parser.add_argument("--text", action="append", required=True, metavar="FILE|TEXT", dest="texts",
                        help="what the model reads; may be given again, each is a domain of its own")  # fmt: skip
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="read a text longer than the model's "
                        "context in up to N windows (default: 1)")  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="the run's checkpoint of that step (default: the newest)")
    parser.add_argument("--compare", type=user_path, metavar="OTHER", help="a second model, side by side")
    parser.add_argument("--sweep", action="append", nargs="?", const="", default=[], metavar="NAME[=V,...]",
                        dest="sweeps", help="loss and experts per token for values of k, p or theta at inference; "
                        "alone: what the router has, around its value; may be given again")  # fmt: skip
    parser.add_argument("--checkpoints", type=int, default=6, metavar="N", help="earlier checkpoints of the run to "
                        "compare routes with, at most (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="to compute in (default: fp32 for a run, else as the "
                        "folder says)")  # fmt: skip
    parser.add_argument("--out", type=user_path, metavar="PAGE", help=f"the HTML page (default: {PAGE}, unless "
                        "--plain, --json or --csv is given)")  # fmt: skip
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures there")
    parser.add_argument("--csv", type=user_path, metavar="FOLDER", help="write them there, a file a figure")
    parser.add_argument("--plain", action="store_true", help="show the coloured text and the main figures here")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code of the model's folder that is not dsmoe's own"
    )
    arguments = parser.parse_args(argv)
    quiet_libraries()
    expected = "a run folder, one of its checkpoints or a folder of a Hugging Face model"
    for path in filter(None, (arguments.model, arguments.compare)):
        require_path(path, expected, CheckpointError)
    page = arguments.out
    if page is None and not (arguments.plain or arguments.json or arguments.csv):
        page = PAGE
    for option, path in (("--out", page), ("--json", arguments.json)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            wrong = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
            raise ConfigError([f"{option}: {path} {wrong}; expected a file"], "the command line")
    from dsmoe.lab.inspect.page import render
    from dsmoe.lab.inspect.report import InspectOptions, inspect
    from dsmoe.lab.inspect.tables import write_tables
    from dsmoe.lab.inspect.terminal import show
    from dsmoe.runtime.files import write_atomically

    options = InspectOptions(
        texts=tuple(arguments.texts), windows=arguments.windows, step=arguments.step, compare=arguments.compare,
        sweeps=tuple(arguments.sweeps), checkpoints=arguments.checkpoints, dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )  # fmt: skip
    report = inspect(arguments.model, options)
    if arguments.plain:
        show(report)
    written = []
    if arguments.json is not None:
        write_atomically(arguments.json, (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
        written.append(arguments.json)
    if arguments.csv is not None:
        written += write_tables(report, arguments.csv)
    if page is not None:
        write_atomically(page, render(report).encode())
        written.append(page)
    for path in written:
        print(f"wrote {path}")
    return 0
