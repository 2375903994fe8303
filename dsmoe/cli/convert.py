"""Carry a run's weights elsewhere: to Hugging Face, from there, and the proof that nothing was lost.

    dsmoe export runs/first exported/first
    dsmoe import downloads/OLMoE-1B-7B runs/olmoe
    dsmoe verify runs/first --all

What an export holds and how it is checked: docs/huggingface.md. What a checkpoint holds: docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
from os.path import expanduser

from dsmoe.errors import CheckpointError, ConversionError
from dsmoe.runtime.command_line import quiet_libraries, require_path, user_path
from dsmoe.runtime.exit_codes import REFUSED

RUN = "a run folder or one of its checkpoints"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_export, _add_import, _add_verify):
        add(commands)
    arguments = parser.parse_args(argv)
    quiet_libraries()
    return arguments.act(arguments)


def _add(commands, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}.\n\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _add_export(commands) -> None:
    examples = (
        "    dsmoe export runs/first exported/first --license mit\n    dsmoe export runs/first half --dtype bf16\n"
        "    dsmoe export runs/first fewer --set theta=0.1"
    )
    command = _add(commands, "export", "write a run as a Hugging Face model", examples)
    command.add_argument("run", type=user_path, metavar="RUN", help="a run folder, or one of its checkpoints")
    command.add_argument("out", type=user_path, metavar="OUT", help="the folder to write; it must not exist")
    command.add_argument("--format", default="dsmoe", metavar="NAME",
                         help="dsmoe: any router, with code of its own; an architecture of transformers that holds the "
                              "model exactly, such as mixtral; or auto for any (default: %(default)s)")  # fmt: skip
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    command.add_argument(
        "--data", type=expanduser, metavar="DATASET", help="prepared held-out text for the checks (default: the run's)"
    )
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
                         help="k, p or theta of the router at inference, as chosen from the sweep of dsmoe inspect "
                              "(default: as trained)")  # fmt: skip
    card = command.add_argument_group("of the model card")
    card.add_argument("--license", metavar="ID", help="an identifier of the Hub (default: an imported run's own)")
    card.add_argument("--language", metavar="CODE", help="such as en or code (default: an imported run's own)")
    command.set_defaults(act=_export)


def _export(arguments) -> int:
    require_path(arguments.run, RUN, CheckpointError)
    from dsmoe.hf.export import ExportOptions, export, summary

    names = ("format", "dtype", "max_shard_size", "data", "license", "language")
    options = ExportOptions(**{name: getattr(arguments, name) for name in names}, settings=tuple(arguments.settings))
    print(f"{arguments.out}: {summary(export(arguments.run, arguments.out, options))}")
    return 0


def _add_import(commands) -> None:
    examples = (
        "    dsmoe import downloads/OLMoE-1B-7B runs/olmoe\n"
        "    dsmoe import downloads/OLMoE-1B-7B runs/relu --router relu --config configs/recipes/router_surgery.yaml\n"
        "    dsmoe import downloads/Qwen3-0.6B-Base runs/upcycled --experts 8"
    )
    command = _add(commands, "import", "make a run of a Hugging Face model, or an MoE of a dense one", examples)
    command.add_argument("folder", type=user_path, metavar="HF_DIR", help="Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, "
                         "dots1, or an export of dsmoe; LLaMA or Qwen3 to be upcycled")  # fmt: skip
    command.add_argument("run", type=user_path, metavar="RUN", help="the run folder to make; it must not exist")
    command.add_argument("--router", metavar="NAME", help="of an MoE: another router with a gate, which starts from "
                         "the model's; upcycling: any router (default: topk, k 2, gates sum to 1)")  # fmt: skip
    command.add_argument("--config", type=user_path, metavar="YAML", help="training, data and other sections of the "
                         "run's configuration, such as configs/recipes/router_surgery.yaml")  # fmt: skip
    upcycling = command.add_argument_group("upcycling of a dense model")
    upcycling.add_argument("--experts", type=int, metavar="E", help="of a layer (default: 8)")
    upcycling.add_argument("--granularity", type=int, metavar="G", help="cut each MLP into G (default: 1)")
    upcycling.add_argument("--noise", type=float, metavar="X", help="added to experts, in units of each matrix's "
                           "standard deviation (default: 0)")  # fmt: skip
    command.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides",
                         help="of the run's configuration, for example router.k=2; may be given again")  # fmt: skip
    command.add_argument("--skip-check", action="store_true", help="do not hold the run to transformers' model, where "
                         "one whole model has no room in memory")  # fmt: skip
    command.set_defaults(act=_import)


def _import(arguments) -> int:
    require_path(arguments.folder, "a folder of a Hugging Face model; download it first", ConversionError)
    from dsmoe.hf.importing import ImportOptions, import_model, summary
    from dsmoe.hf.upcycle import UpcyclingOptions

    names = {"num_experts": arguments.experts, "granularity": arguments.granularity, "noise": arguments.noise}
    upcycling = {name: value for name, value in names.items() if value is not None}
    options = ImportOptions(
        router=arguments.router, config=arguments.config,
        upcycling=UpcyclingOptions(**upcycling) if upcycling else None,
        overrides=tuple(arguments.overrides), check=not arguments.skip_check,
    )  # fmt: skip
    print(summary(arguments.run, import_model(arguments.folder, arguments.run, options)))
    return 0


def _add_verify(commands) -> None:
    examples = "    dsmoe verify runs/first --all"
    command = _add(commands, "verify", "prove that a checkpoint is whole, tensor by tensor", examples)
    command.add_argument("path", type=user_path, metavar="RUN_OR_CHECKPOINT")
    command.add_argument("--all", action="store_true", help="every checkpoint of the run, not only the newest")
    command.set_defaults(act=_verify)


def _verify(arguments) -> int:
    require_path(arguments.path, RUN, CheckpointError)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from dsmoe.checkpoint.verify import checkpoints_of, verify_checkpoint
    from dsmoe.runtime.screen import make_console

    console, damaged = make_console(), 0
    for folder in checkpoints_of(arguments.path, arguments.all):
        columns = (TextColumn(folder.name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(folder.name, total=None)
            result = verify_checkpoint(folder, lambda done, total: progress.update(task, completed=done, total=total))  # noqa: B023
        console.print(result.report())
        damaged += bool(result.problems)
    return REFUSED if damaged else 0
