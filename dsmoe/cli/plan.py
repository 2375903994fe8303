"""What a run will need and how fast it will be, before it is started; the fastest way to lay it out; and recorded
routes replayed on other numbers of ranks. `plan` may be left out, and `--calibrate` is `calibrate`.

    dsmoe plan calibrate --out here.yaml
    dsmoe plan --config configs/quickstart.yaml --hardware here.yaml model.vocab_size=2048
    dsmoe plan --config configs/plans/trillion.yaml --hardware configs/hardware/h100.yaml --nodes 128,256,512 --search
    dsmoe plan --config CONFIG.yaml --hardware here.yaml --search --write-config fastest.yaml
    dsmoe plan validate --hardware here.yaml
    dsmoe plan replay RUN --ep 8,16,32 --hardware configs/hardware/h100.yaml

Exit code 2: the layout does not fit, or none does. What is counted, what is not, and how far off it was:
docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe.cli.options import router_options
from dsmoe.config.shipped import configs_folder
from dsmoe.errors import DataError
from dsmoe.runtime.command_line import require_path, user_path
from dsmoe.runtime.exit_codes import FINISHED, REFUSED

if TYPE_CHECKING:
    from dsmoe.lab.planner.predict import Prediction

BYTES = {"fp32": 4, "bf16": 2}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands.add_parser("plan", help="memory, time, traffic, energy and money of a run"))
    _add_calibrate(commands.add_parser("calibrate", help="measure this machine and write its hardware file"))
    _add_validate(commands.add_parser("validate", help="hold predictions for this machine to real runs"))
    published = commands.add_parser("published", help="figures of other projects beside predictions")
    published.add_argument("--json", type=user_path, metavar="FILE", help="write every number")
    published.set_defaults(run=show_published)
    _add_replay(commands.add_parser("replay", help="a recorded step on other numbers of ranks"))
    arguments = parser.parse_args(spelled_out(sys.argv[1:] if argv is None else argv))
    return arguments.run(arguments) or 0


def spelled_out(words: list[str]) -> list[str]:
    """With its command first, for those who write `plan.py --config ...` or `plan.py plan --calibrate`."""
    for command in ("calibrate", "validate"):
        if f"--{command}" in words:
            return [command, *(word for word in words if word not in ("plan", f"--{command}"))]
    return ["plan", *words] if words and words[0].startswith("--") and words[0] != "--help" else words


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=user_path, metavar="YAML", help="of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="configuration keys, such as model.vocab_size=32000"
    )
    parser.add_argument(
        "--hardware", required=True, type=user_path, metavar="YAML", help="configs/hardware/*.yaml, or your own"
    )
    parser.add_argument(
        "--nodes", type=_integers, default=[1], metavar="N", help="equal nodes (default: 1); several with --search"
    )
    parser.add_argument("--search", action="store_true", help="the fastest layouts that fit, instead of the given one")
    parser.add_argument("--tokens", type=float, metavar="T", help="of the whole run (default: those of training.steps)")
    parser.add_argument("--experts-per-token", type=float, metavar="K", help="default: what the router aims at")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--imbalance", type=float, default=1.0, metavar="X", help="load of the busiest rank over the mean"
    )
    load.add_argument("--skew", metavar="P:N", help="P %% of all routes on N experts, for example 30:4")
    load.add_argument("--trace", type=user_path, metavar="RUN", help="imbalance as in a run with logging.trace")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write every number")
    parser.add_argument(
        "--write-config",
        type=user_path,
        metavar="YAML",
        help="write the layout's configuration, or that of the fastest",
    )
    parser.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> int:
    from dsmoe.config import load_config
    from dsmoe.errors import ConfigError
    from dsmoe.lab.planner.hardware import load_hardware

    config, hardware = all_or_every_mistake(
        {
            arguments.config: lambda: load_config(arguments.config, arguments.overrides, router_options),
            arguments.hardware: lambda: load_hardware(arguments.hardware),
        }
    )
    config = config.with_precision(not hardware.cpu)  # as training does
    from dsmoe.lab.planner.layout import Layout, problems
    from dsmoe.lab.planner.load import even, of_skew, recorded
    from dsmoe.lab.planner.predict import predict
    from dsmoe.lab.planner.search import batch_problems, search
    from dsmoe.lab.planner.show import show_plan, show_search, show_sizes

    errors = [] if arguments.nodes else ["--nodes: found none, expected at least 1"]
    errors += [f"--nodes: found {nodes}, expected at least 1" for nodes in arguments.nodes if nodes < 1]
    if len(arguments.nodes) > 1 and not arguments.search:
        errors.append(f"--nodes: found {len(arguments.nodes)} of them, expected one, or --search")
    if len(arguments.nodes) > 1 and arguments.write_config:
        errors.append(f"--write-config: found {len(arguments.nodes)} numbers of nodes, expected one")
    errors += [f"--imbalance: found {arguments.imbalance}, expected at least 1"] if arguments.imbalance < 1 else []
    for nodes in arguments.nodes:
        ranks = nodes * hardware.devices_per_node
        mistakes = problems(config, ranks, hardware) if ranks > 0 else []
        if arguments.search:  # these are what it looks for
            mistakes = [line for line in mistakes if not line.startswith(("parallel.", "training.global"))]
            mistakes += batch_problems(config, ranks) if ranks > 0 else []
        errors += [line for line in mistakes if line not in errors]
    if errors:
        raise ConfigError(errors, "the plan")
    if arguments.skew:
        load = of_skew(arguments.skew, config.model.num_experts)
    else:
        load = recorded(arguments.trace, config.model.num_experts) if arguments.trace else even(arguments.imbalance)
    tokens = (
        arguments.tokens or config.training.steps * config.training.global_batch_size * config.model.sequence_length
    )
    searched = {
        nodes: search(config, hardware, nodes * hardware.devices_per_node, load, arguments.experts_per_token)
        for nodes in arguments.nodes
    }
    if arguments.search:
        if len(searched) > 1:
            show_sizes(_console(), searched, hardware, tokens)
        else:
            show_search(_console(), searched[arguments.nodes[0]], tokens)
        layouts = (layout for results in searched.values() for layout in (*results.fitting, *results.too_large))
        _write(arguments.json, [layout.as_json(tokens) for layout in layouts])
        best = next((results.best for results in searched.values() if results.best is not None), None)
        if best is not None:
            _write_config(arguments.write_config, best)
        return FINISHED if best is not None else REFUSED
    (results,) = searched.values()
    ranks = arguments.nodes[0] * hardware.devices_per_node
    layout = Layout(config, hardware, ranks, load(config.parallel.expert_parallel), arguments.experts_per_token)
    prediction = predict(layout)
    show_plan(_console(), prediction, results, tokens)
    _write(arguments.json, prediction.as_json(tokens))
    if prediction.fits:
        _write_config(arguments.write_config, prediction)
    return FINISHED if prediction.fits else REFUSED


def _write_config(path: Path | None, prediction: Prediction) -> None:
    """The configuration of a layout that fits, and how it is started."""
    from dsmoe.runtime.files import write_atomically

    if path is None:
        return
    ranks, per_node = prediction.layout.ranks, prediction.layout.hardware.devices_per_node
    nodes = f" on each of {ranks // per_node} nodes (docs/clusters.md)" if ranks > per_node else ""
    head = (
        f"# {ranks} ranks of {prediction.layout.hardware.name}{nodes}, written by dsmoe plan.\n"
        f"#   deepspeed --num_gpus {min(ranks, per_node)} --module dsmoe train --config {path}\n"
    )
    write_atomically(path, (head + prediction.layout.config.to_yaml()).encode())
    _console().print(f"wrote {path}")


def all_or_every_mistake(readers: dict[Path, Callable[[], object]]) -> list:
    """What each file holds. Raises `ConfigError` with the mistakes of all of them."""
    from dsmoe.errors import ConfigError

    read, mistakes = [], {}
    for path, reader in readers.items():
        try:
            read.append(reader())
        except ConfigError as error:
            mistakes[path] = error
    if len(mistakes) == 1:
        raise next(iter(mistakes.values()))
    if mistakes:
        raise ConfigError(
            [f"{path}: {line}" for path, error in mistakes.items() for line in error.problems], "the plan"
        )
    return read


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=user_path,
        default=Path("here.yaml"),
        metavar="YAML",
        help="the file to write (default: here.yaml)",
    )
    _add_devices(parser)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write what was measured, too")
    parser.add_argument("--again", type=user_path, metavar="FILE", help="fit again what an earlier --json measured")
    parser.set_defaults(run=calibrate)


def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="N", help="devices of this node (default: its GPUs, or its cores)")
    parser.add_argument(
        "--scale", type=int, default=1, metavar="X", help="widths of the runs' models, times 128 (GPUs: 8)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="do every run so often; its fastest counts (default: 1)"
    )


def _check_devices(arguments: argparse.Namespace) -> None:
    from dsmoe.errors import ConfigError

    counts = {name: getattr(arguments, name) for name in ("ranks", "scale", "rounds")}
    problems = [
        f"--{name}: found {value}, expected at least 1"
        for name, value in counts.items()
        if value is not None and value < 1
    ]
    if problems:
        raise ConfigError(problems, "the measurement")


def calibrate(arguments: argparse.Namespace) -> None:
    _check_devices(arguments)
    import yaml

    from dsmoe.lab.planner.calibrate import fit, measure_machine
    from dsmoe.lab.planner.hardware import Hardware
    from dsmoe.lab.planner.measure import run_from
    from dsmoe.runtime.files import write_atomically

    console = _console()
    if arguments.again:
        measured = json.loads(arguments.again.read_text())
        alone, runs = Hardware.model_validate(measured["alone"]), [run_from(run) for run in measured["runs"]]
    else:
        say = lambda text: console.print(f"measuring {text}")  # noqa: E731
        alone, runs = measure_machine(_ranks(arguments), arguments.scale, arguments.rounds, say)
    hardware = fit(alone, runs)
    written = hardware.model_dump(exclude_none=True, exclude_defaults=True)
    write_atomically(arguments.out, yaml.safe_dump(written, sort_keys=False).encode())
    _write(arguments.json, {"alone": alone.model_dump(exclude_none=True), "runs": [asdict(run) for run in runs]})
    console.print(f"wrote {arguments.out}: {hardware.name}, {hardware.devices_per_node} devices")


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hardware", required=True, type=user_path, metavar="YAML", help="what `calibrate` wrote here")
    parser.add_argument("--again", type=user_path, metavar="FILE", help="predict again what an earlier --json measured")
    _add_devices(parser)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write every number")
    parser.set_defaults(run=validate)


def validate(arguments: argparse.Namespace) -> None:
    from dsmoe.lab.planner.hardware import load_hardware

    _check_devices(arguments)
    console, hardware = _console(), load_hardware(arguments.hardware)
    from dsmoe.lab.planner.validate import again, summary, table
    from dsmoe.lab.planner.validate import validate as validated

    if arguments.again:
        results = again(hardware, json.loads(arguments.again.read_text()))
    else:
        results = validated(
            hardware, arguments.ranks or hardware.devices_per_node, arguments.scale, arguments.rounds,
            lambda text: console.print(f"measuring {text}"),
        )  # fmt: skip
    console.print(table(results))
    console.print(summary(results))
    _write(arguments.json, [result.as_json() for result in results])


def show_published(arguments: argparse.Namespace) -> None:
    from dsmoe.lab.planner.published import table

    shown, rows = table(configs_folder() / "hardware")
    console = _console()
    console.print(shown)
    for row in rows:
        console.print(f"[dim]{row['figure']}: {row['source']}{'; ' + row['note'] if row['note'] else ''}[/]")
    _write(arguments.json, rows)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=user_path, metavar="TRACE", help="a .npz of logging.trace, or the run's folder")
    parser.add_argument("--ep", required=True, type=_integers, metavar="N,...", help="expert-parallel sizes")
    parser.add_argument("--skew", metavar="P:N", help="instead of the recorded load: P %% of the routes on N experts")
    parser.add_argument("--hidden", type=int, metavar="H", help="width of a row (default: the run's)")
    parser.add_argument("--ffn", type=int, metavar="F", help="width of an expert (default: the run's)")
    parser.add_argument("--dtype", choices=BYTES, help="of a row on its way (default: the run's)")
    parser.add_argument("--hardware", type=user_path, metavar="YAML", help="adds seconds, and bytes between nodes")
    parser.add_argument(
        "--dispatcher", choices=("auto", "all_to_all"), default="auto",
        help="as model.token_dispatcher: auto is two_level where a group spans nodes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write every number")
    parser.set_defaults(run=replay)


def replay(arguments: argparse.Namespace) -> None:
    require_path(arguments.trace, "a .npz of logging.trace or the folder of its run", DataError)
    from rich import box
    from rich.table import Table

    from dsmoe.lab.planner.hardware import load_hardware
    from dsmoe.lab.planner.replay import Cost, cost_of, skewed
    from dsmoe.lab.planner.replay import replay as replayed
    from dsmoe.training.trace import read_trace

    trace = read_trace(arguments.trace)
    shape = _row_shape(arguments)
    trace = skewed(trace, arguments.skew) if arguments.skew else trace
    hardware = load_hardware(arguments.hardware) if arguments.hardware else None
    rows = replayed(trace, arguments.ep, hardware.devices_per_node if hardware else None, arguments.dispatcher)
    console = _console()
    routes = trace.counts_LE().sum() / len(trace.layers) / len(trace.tokens_T)
    console.print(
        f"[bold]step {trace.step}[/]: {len(trace.tokens_T)} tokens, {len(trace.layers)} MoE layers of "
        f"{trace.num_experts} experts, {routes:.2f} experts a token; rows {shape[0]} wide in {shape[2]}, experts "
        f"{shape[1]} wide"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["EP", "placement", "load", "worst", "rows", "MiB", "sent MB", "by route"]
    columns += ["between nodes", "experts ms", "exchange ms"] if hardware else []
    for column in columns:
        table.add_column(column, justify="left" if column == "placement" else "right", no_wrap=True)
    costs: list[Cost] = [cost_of(row, *shape, hardware) for row in rows]
    for row, cost in zip(rows, costs, strict=True):
        duplication = f"{row.sent_routes / row.sent_rows:.2f} x" if row.sent_rows else ""
        cells = [
            str(row.ranks), row.placement, f"{row.load:.2f}", f"{row.worst_load:.2f}", str(row.received_rows),
            f"{cost.buffer_bytes / 2**20:.2f}", f"{cost.sent_bytes / 1e6:.2f}", duplication,
        ]  # fmt: skip
        if hardware:
            cells += [
                f"{cost.between_share:.0%}",
                f"{cost.expert_seconds * 1e3:.3f}",
                f"{cost.exchange_seconds * 1e3:.3f}",
            ]
        table.add_row(*cells)
    console.print(table)
    two_level = sorted({str(row.ranks) for row in rows if row.dispatcher == "two_level"}, key=int)
    console.print(
        "[dim]load: routes of the busiest rank over the mean; mean of layers, and worst\n"
        "rows, MiB: what the busiest rank takes in at once, and its rows by expert with their activations\n"
        "sent MB: by a rank in a layer and step, forward and backward"
        + (f"; two_level at EP {', '.join(two_level)}" if two_level else "")
        + "\n"
        "by route: as many times more, were a token sent to each of its experts"
        + (
            "\nms: of the busiest rank in a layer, forward and backward; between nodes: share of what is sent"
            if hardware
            else ""
        )
        + "[/]"
    )
    content = {"step": trace.step, "tokens": len(trace.tokens_T)}
    _write(arguments.json, {**content, "rows": [{**asdict(r), **asdict(c)} for r, c in zip(rows, costs, strict=True)]})


def _row_shape(arguments: argparse.Namespace) -> tuple[int, int, str]:
    """Width of a row and of an expert, and the dtype of rows: those given, else those of the trace's run."""
    from dsmoe.config import ModelConfig, load_config
    from dsmoe.errors import ConfigError

    path = arguments.trace
    places = [path, *path.parents[:2]] if path.is_dir() else path.parents[:2]
    run = next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)
    shape = {name: getattr(arguments, name) for name in ("hidden", "ffn", "dtype")}
    if run is None and None in shape.values():
        missing = ", ".join(f"--{name}" for name, value in shape.items() if value is None)
        raise ConfigError([f"{missing}: not given, and no config.yaml of a run lies beside {path}"], "the replay")
    config = load_config(run) if run is not None else None
    model = config.model if config is not None else ModelConfig()
    precision = config.training.precision if config is not None else "fp32"
    wire = "bf16" if model.moe_exchange_dtype == "bf16" else precision
    return shape["hidden"] or model.hidden_size, shape["ffn"] or model.moe_ffn_hidden_size, shape["dtype"] or wire


def _ranks(arguments: argparse.Namespace) -> int:
    import os

    from dsmoe.runtime.device import gpu_count

    return arguments.ranks or gpu_count() or os.cpu_count() or 1


def _console():
    from dsmoe.runtime.screen import make_console

    width = None if sys.stdout.isatty() else 140  # in a file, tables are as wide as they need to be
    return make_console(highlight=False, soft_wrap=True, width=width)


def _write(path: Path | None, content) -> None:
    from dsmoe.runtime.files import write_atomically

    if path is not None:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word.strip()]
