"""`make quickstart`, or `python tools/quickstart.py`: from source code on this disk to text of a model trained on it.

Four stages, each a command that you could type yourself: prepare a corpus, train half of the steps on two processes,
resume and finish, generate. Then a table of what came out. Nothing is downloaded.

A run that was interrupted goes on; one that is finished moves aside to `runs/quickstart-1`, so nothing is lost.
`section.key=value` arguments go to the training commands: `python tools/quickstart.py training.steps=40`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from dsmoe.checkpoint.files import Manifest, newest_checkpoint, read_manifest, step_of
from dsmoe.config import RunConfig, load_config
from dsmoe.errors import ConfigError, DsmoeError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
PROCESSES = 2
VOCABULARY = 2048  # small, so that so short a training spends its time on the experts and not on the embedding
PROMPT = "def "
LAUNCHER_PORT = 29500  # deepspeed's default
BARS = "▁▂▃▄▅▆▇█"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/quickstart.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for the training commands")
    overrides = parser.parse_args().overrides
    console = Console(highlight=False)
    os.chdir(ROOT)  # the commands shown are relative to it
    try:
        _quickstart(console, overrides)
    except StageFailed as failure:
        console.print(f"\n[bold red]Stage '{failure.stage}' failed[/] with exit code {failure.code}. The command was")
        console.print(f"  {failure.command}", markup=False, soft_wrap=True)
        return 1
    except DsmoeError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("\nInterrupted. [bold]make quickstart[/] goes on where this left off.")
        return 130
    return 0


def _quickstart(console: Console, overrides: Sequence[str]) -> None:
    if not (ROOT / CONFIG).is_file():
        missing = f"{ROOT / CONFIG} is missing: the quickstart runs in a checkout of dsmoe"
        raise ConfigError([missing], "this installation")
    started = time.monotonic()
    config = load_config(CONFIG, overrides)
    data, run_dir, steps = Path(config.data.path), Path(config.logging.run_dir), config.training.steps
    half = max(1, steps // 2)
    stages = Stages(console, total=4)

    stages.announce("Prepare the data", "The sources of Python's standard library, as tokens: they are on every disk.")
    if (data / "dataset.json").is_file():
        stages.skip(f"{data} is there already.")
    else:
        stages.run(_python("tools/prepare_data.py", "stdlib", "--output", str(data), "--vocab-size", str(VOCABULARY)))

    stages.announce(
        "Train half of the steps",
        f"{PROCESSES} processes share the experts (expert parallel), the optimizer is split by ZeRO-"
        f"{config.parallel.zero_stage}. {_router_story(config)}",
    )
    done = _make_room(stages, run_dir, config)
    train = _deepspeed("launch/train.py", "--config", CONFIG, *overrides)
    if done >= half:
        stages.skip(f"{run_dir} has a checkpoint of step {done} of {steps}: an interrupted run goes on.")
    else:
        stages.run([*train, f"training.stop_at={half}"], saves_on_interrupt=True)

    stages.announce("Resume and finish", "The same command goes on from the checkpoint, with the next sample.")
    stages.run(train, saves_on_interrupt=True)

    stages.announce("Generate", "One process reads the checkpoint that two have written.")
    stages.run(_python("launch/generate.py", str(run_dir), "--prompt", PROMPT, "--tokens", "160"))

    console.print()
    console.print(_summary(run_dir, config, time.monotonic() - started))
    _what_next(console, run_dir, config)


def _router_story(config: RunConfig) -> str:
    if config.router.name != "relu":
        return f"The router is {config.router.name}."
    return (
        "The ReLU router lets every token have as many experts as it likes: first it takes more and more, then a "
        "growing lambda thins them out to a mean of "
        f"{config.router.options.get('k', 1):g} of {config.model.num_experts}."
    )


# --- running commands --------------------------------------------------------------------------------------------


class StageFailed(Exception):
    """A stage's command ended with an error, which it has told about itself."""

    def __init__(self, stage: str, command: str, code: int):
        super().__init__(stage)
        self.stage, self.command, self.code = stage, command, code


@dataclass
class Stages:
    """Announces and runs one stage after another."""

    console: Console
    total: int
    number: int = 0
    title: str = ""
    environment: dict[str, str] = field(default_factory=lambda: {**os.environ, **_accelerator()})

    def announce(self, title: str, why: str) -> None:
        self.number, self.title = self.number + 1, title
        self.console.print()
        self.console.print(Rule(f"[bold]{self.number}/{self.total}  {title}[/]", align="left"))
        self.console.print(f"[dim]{why}[/]")

    def skip(self, reason: str) -> None:
        self.console.print(f"Skipped: {reason}", soft_wrap=True)

    def run(self, command: Sequence[str], saves_on_interrupt: bool = False) -> None:
        """Run a command on this terminal. Raises `StageFailed`; `KeyboardInterrupt` when it has ended after Ctrl-C."""
        shown = shlex.join(command)
        self.console.print(f"[bold green]$[/] [bold]{shown}[/]\n", soft_wrap=True)
        sys.stdout.flush()
        prepare = _ignore_sigint if saves_on_interrupt else None
        code = _wait(subprocess.Popen(command, env=self.environment, preexec_fn=prepare))
        if code:
            raise StageFailed(self.title, shown, code)


def _wait(process: subprocess.Popen) -> int:
    """Its exit code. Ctrl-C reaches the child too: let it save and leave before this process does."""
    interrupted = False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return code


def _ignore_sigint() -> None:
    """For the `deepspeed` command itself, which would leave before its ranks have saved; those install handlers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _python(script: str, *arguments: str) -> list[str]:
    return [_beside_python(Path(sys.executable).name), script, *arguments]


def _deepspeed(script: str, *arguments: str) -> list[str]:
    """The launcher, quiet about its own doings, on a port of its own where another job has the usual one."""
    port = [] if _is_free(LAUNCHER_PORT) else ["--master_port", str(_free_port())]
    return [_beside_python("deepspeed"), "--quiet", "--num_gpus", str(PROCESSES), *port, script, *arguments]


def _beside_python(name: str) -> str:
    """A command of this virtual environment, as short as it can be typed here."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _accelerator() -> dict[str, str]:
    """Two processes need two GPUs; with fewer, DeepSpeed is told to take the CPU, which it then does silently."""
    from dsmoe.runtime.device import gpu_count  # takes seconds, so only when something is about to run

    if "DS_ACCELERATOR" in os.environ or gpu_count() >= PROCESSES:
        return {}
    return {"DS_ACCELERATOR": "cpu"}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a job that just ended is free
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- an earlier run ----------------------------------------------------------------------------------------------


def _make_room(stages: Stages, run_dir: Path, config: RunConfig) -> int:
    """Steps that an interrupted run has done already; any other earlier run is moved aside."""
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return 0
    if step_of(newest) < config.training.steps and _same_settings(read_manifest(newest), config):
        return step_of(newest)
    taken = [re.fullmatch(rf"{re.escape(run_dir.name)}-(\d+)", path.name) for path in run_dir.parent.iterdir()]
    aside = run_dir.with_name(f"{run_dir.name}-{1 + max((int(match[1]) for match in taken if match), default=0)}")
    run_dir.rename(aside)
    stages.console.print(f"The earlier run in {run_dir} moves to {aside}; this one starts anew.", soft_wrap=True)
    return 0


def _same_settings(manifest: Manifest, config: RunConfig) -> bool:
    """Whether a checkpoint is of this very run: where it should stop and the settled vocabulary may differ."""

    def essence(tree: dict) -> dict:
        tree = json.loads(json.dumps(tree))
        tree["model"].pop("vocab_size", None)
        tree["training"].pop("stop_at", None)
        router = tree.pop("router")
        return tree | {"router": {key: router.get(key) for key in ["name", *config.router.options]}}

    return essence(manifest.config) == essence(config.model_dump(mode="json"))


# --- what came out -----------------------------------------------------------------------------------------------


def _summary(run_dir: Path, config: RunConfig, seconds: float) -> Table:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    loss = mean(line["loss"] for line in lines[-10:])  # one step sees few sequences
    density = [line["density"] for line in lines]
    experts = config.model.num_experts
    total, active = _parameters(read_manifest(newest_checkpoint(run_dir)), density[-1])
    speed = median(line["tokens_per_second"] for line in lines)
    target = config.router.options.get("k")

    title = f"Done in {seconds // 60:.0f} min {seconds % 60:.0f} s"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False,
                  padding=(0, 3, 0, 0))  # fmt: skip
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    held = f"held out {last['val_loss']:.2f}"
    table.add_row("loss", f"{first['loss']:.2f} at step 1, {loss:.2f} at step {last['step']}; {held}")
    if "val_bpb" in last:
        table.add_row("bits per byte", f"{last['val_bpb']:.2f} on held-out files (8 for text of random bytes)")
    table.add_row("speed", f"{speed:,.0f} tokens a second (median step), {last['tokens']:,} tokens in all")
    aim = "" if target is None else f"; the aim is {target:g}"
    table.add_row("experts per token", f"{density[0] * experts:.1f} at first, {max(density) * experts:.1f} at most, "
                                       f"{density[-1] * experts:.1f} at the end{aim}")  # fmt: skip
    table.add_row("", f"[cyan]{sparkline(density, 48)}[/]")
    if "lambda" in last:
        table.add_row("lambda", f"{first['lambda']:.1e} at step 1, {last['lambda']:.1e} at step {last['step']}")
    table.add_row("parameters", f"{total:,} in all, {active:,} active for a token on average")
    table.add_row("run", f"{run_dir} (metrics.jsonl, checkpoints, TensorBoard)")
    return table


def _parameters(manifest: Manifest, density: float) -> tuple[int, int]:
    """All parameters, and those that a token uses on average at this density."""
    experts = rest = 0
    for name, shape in manifest.tensors.items():
        numel = 1
        for size in shape:
            numel *= size
        if ".experts." in name:
            experts += numel
        else:
            rest += numel
    return experts + rest, rest + round(experts * density)


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` characters, from 0 to the largest value; each shows the mean of its part."""
    width = min(width, len(values))
    edges = [len(values) * column // width for column in range(width + 1)]
    means = [mean(values[a:b]) for a, b in pairwise(edges)]
    top = max(means) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in means)


def _what_next(console: Console, run_dir: Path, config: RunConfig) -> None:
    python, deepspeed = _beside_python(Path(sys.executable).name), _beside_python("deepspeed")
    train = ["launch/train.py", "--config", CONFIG]
    longer = f"training.steps={2 * config.training.steps}"
    other_layout = ["parallel.expert_parallel=1", "parallel.zero_stage=3", longer]
    suggestions = [
        ("another prompt", [python, "launch/generate.py", str(run_dir), "--prompt", "import ", "--temperature", "0.5"]),
        (
            "a router with exactly two experts per token",
            [deepspeed, "--num_gpus", "2", *train, "router.name=topk", "router.k=2", "logging.run_dir=runs/topk"],
        ),
        ("go on with the same model, as one process under ZeRO-3", [python, *train, *other_layout]),
    ]
    console.print("\n[bold]What to try next[/]")
    for what, command in suggestions:
        console.print(f"  [dim]# {what}[/]")
        console.print(f"  {shlex.join(command)}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
