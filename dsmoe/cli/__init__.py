"""The command `dsmoe`: `dsmoe train ...`, also as `python -m dsmoe train ...`, for launchers that start modules.

    deepspeed --num_gpus 2 --module dsmoe train --config FILE
    torchrun --nproc-per-node 2 -m dsmoe train --config FILE

Every command is a module with a `main(argv)`; it is imported when it is called, so that help and mistakes come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from dsmoe.errors import nearest
from dsmoe.runtime.command_line import run
from dsmoe.runtime.exit_codes import REFUSED

# name -> (module, arguments that stand before the user's, what it does); in groups, as help shows them
COMMANDS: dict[str, dict[str, tuple[str, list[str], str]]] = {
    "Data and training": {
        "prepare-data": ("prepare_data", [], "turn text into a dataset"),
        "train": ("train", [], "train or resume a run, in as many processes as the launcher starts"),
    },
    "Using a run": {
        "generate": ("generate", [], "write text"),
        "inspect": ("inspect", [], "see which tokens take which experts, and what experts are for"),
        "evaluate": ("evaluate", [], "loss on held-out text, or lm-eval tasks"),
        "export": ("convert", ["export"], "write a run as a Hugging Face model"),
        "import": ("convert", ["import"], "make a run of a Hugging Face model, or an MoE of a dense one"),
        "prune": ("prune", [], "drop experts that no token takes, merge those that do the same"),
        "verify": ("convert", ["verify"], "prove that a checkpoint is whole, tensor by tensor"),
    },
    "Measuring and planning": {
        "env": ("env", [], "what this machine has, and which accelerations are on"),
        "benchmark": ("benchmark", [], "an MoE layer, or whole steps, beside other implementations"),
        "plan": ("plan", [], "memory, time, traffic and money of a run before it is started"),
        "study": ("study", [], "train a grid of routers and experts, and report on it"),
    },
}

EXAMPLES = """\
examples:
  dsmoe prepare-data stdlib --output data/stdlib
  dsmoe train --config configs/quickstart.yaml data.path=data/stdlib parallel.expert_parallel=1
  deepspeed --num_gpus 2 --module dsmoe train --config configs/quickstart.yaml data.path=data/stdlib
  dsmoe generate runs/first --prompt "def main("
  dsmoe export runs/first exported/first

'dsmoe COMMAND --help' has the options of a command, 'dsmoe train --help-config' every key of a configuration."""


def help_text() -> str:
    lines = ["usage: dsmoe COMMAND ...", "", "Train mixture-of-experts language models with any router.", ""]
    for group, commands in COMMANDS.items():
        lines += [f"{group.lower()}:", *(f"  {name:14}{what}" for name, (*_, what) in commands.items()), ""]
    return "\n".join([*lines, EXAMPLES])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher puts this before everything else.
    launcher = [words.pop(0)] if words and words[0].startswith("--local_rank") else []
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else REFUSED
    if words[0] == "--version":
        from dsmoe import __version__

        print(f"dsmoe {__version__}")
        return 0
    known = {name: entry for group in COMMANDS.values() for name, entry in group.items()}
    name = words.pop(0)
    if name not in known:
        print(f"dsmoe: no command {name!r}{nearest(name, known)}; there are {', '.join(known)}", file=sys.stderr)
        return REFUSED
    module, first, _ = known[name]
    sys.argv[0] = f"dsmoe {name}" if not first else "dsmoe"  # what usage lines show
    return import_module(f"dsmoe.cli.{module}").main([*first, *(launcher if name == "train" else []), *words]) or 0


def entry_point() -> None:
    """Of the console script."""
    run(main)
