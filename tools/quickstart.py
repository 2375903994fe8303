#!/usr/bin/env python
"""`make quickstart`, or `python tools/quickstart.py`: from source code on this disk to text of a model trained on it.

Four commands that you could type yourself: prepare a corpus, train half of the steps on two processes, resume and
finish, generate. Then a table of what came out. Nothing is downloaded. An interrupted run is resumed; a finished one
moves aside. `section.key=value` arguments go to the training commands: `python tools/quickstart.py training.steps=40`.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from dsmoe.checkpoint.files import newest_checkpoint, step_of
from dsmoe.config import RunConfig, load_config
from dsmoe.errors import TrainingError
from dsmoe.parallel.place import free_port
from dsmoe.runtime.command_line import run
from dsmoe.runtime.device import gpu_count

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quickstart.yaml"
PROCESSES = 2
VOCABULARY = 2048  # small, so that so short a training spends its time on the experts and not on the embedding
BARS = "▁▂▃▄▅▆▇█"
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return 0
    os.chdir(ROOT)  # the commands shown are relative to it
    config = load_config(CONFIG, overrides)
    data, run_dir, steps = Path(config.data.path), Path(config.logging.run_dir), config.training.steps
    if gpu_count() < PROCESSES:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _move_aside(run_dir, steps)
    python = [_beside_python(Path(sys.executable).name)]
    train = [_beside_python("deepspeed"), "--quiet", "--num_gpus", str(PROCESSES), "--master_port", free_port(),
             "launch/train.py", "--config", CONFIG, *overrides]  # fmt: skip

    _announce("1/4  Prepare the data", "The sources of Python's standard library, as tokens: they are on every disk.")
    if (data / "dataset.json").is_file():
        console.print(f"Skipped: {data} is there already.")
    else:
        prepare = ["tools/prepare_data.py", "stdlib", "--output", str(data), "--vocab-size", str(VOCABULARY)]
        _run([*python, *prepare])
    half = max(1, steps // 2)
    _announce("2/4  Train half of the steps", f"{PROCESSES} processes share the experts. {_router(config)}")
    _train([*train, f"training.stop_at={half}"], run_dir, half)
    _announce("3/4  Resume and finish", "The same command resumes from the checkpoint, with the next sample.")
    _train(train, run_dir, steps)
    _announce("4/4  Generate", "One process reads the checkpoint that two have written.")
    _run([*python, "launch/generate.py", str(run_dir), "--prompt", "def ", "--tokens", "160"])
    _summarize(run_dir)
    _what_next(run_dir, steps, shlex.join(python), _beside_python("deepspeed"))
    return 0


def _announce(title: str, why: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{title}[/]", align="left"))
    console.print(f"[dim]{why}[/]")


def _run(command: list[str]) -> None:
    console.print(f"[bold green]$[/] [bold]{shlex.join(command)}[/]\n")
    sys.stdout.flush()
    if code := subprocess.run(command).returncode:
        raise TrainingError(f"exit code {code} of the command {shlex.join(command)}")


def _train(command: list[str], run_dir: Path, until: int) -> None:
    """Ctrl-C is left to the ranks, which save; the launcher would leave before they have."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _run(command)
    finally:
        signal.signal(signal.SIGINT, before)
    newest = newest_checkpoint(run_dir)
    if newest is None or step_of(newest) < until:
        console.print("Interrupted. [bold]make quickstart[/] resumes it.")
        raise KeyboardInterrupt


def _move_aside(run_dir: Path, steps: int) -> None:
    """An earlier run that is finished."""
    newest = newest_checkpoint(run_dir)
    if newest is not None and step_of(newest) >= steps:
        names = (run_dir.with_name(f"{run_dir.name}-{number}") for number in count(1))
        aside = next(path for path in names if not path.exists())
        run_dir.rename(aside)
        console.print(f"The earlier run in {run_dir} moves to {aside}.")


def _router(config: RunConfig) -> str:
    if config.router.name != "relu":
        return f"The router is {config.router.name}."
    return (
        "With ReLU gates a token takes as many experts as it likes: first more and more, then a growing lambda thins "
        f"them out to a mean of {config.router.options.get('k', 1):g} of {config.model.num_experts}."
    )


def _summarize(run_dir: Path) -> None:
    # Here, because both load torch.
    from dsmoe.model.size import model_size
    from dsmoe.training.metrics import FILE, read_lines

    lines, config = read_lines(run_dir / FILE), load_config(run_dir / "config.yaml")
    first, last = lines[0], lines[-1]
    loss, speed = mean(line["loss"] for line in lines[-10:]), median(line["tokens_per_second"] for line in lines)
    experts, size = [line["experts_per_token"] for line in lines], model_size(config)
    table = Table(title="Done", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True, min_width=19)
    table.add_column(overflow="fold")
    held_out = f"held out {last['val_loss']:.2f}"
    table.add_row("loss", f"{first['loss']:.2f} at step 1, {loss:.2f} at step {last['step']}; {held_out}")
    if "val_bpb" in last:
        table.add_row("bits per byte", f"{last['val_bpb']:.2f} on held-out files (8 for text of random bytes)")
    table.add_row("speed", f"{speed:,.0f} tokens a second (median step), {last['tokens']:,} tokens in all")
    table.add_row("experts per token", f"{experts[0]:.1f} at first, {max(experts):.1f} at most, {experts[-1]:.1f} last")
    table.add_row("", f"[cyan]{sparkline(experts)}[/]")
    if "lambda" in last:
        table.add_row("lambda", f"{first['lambda']:.1e} at step 1, {last['lambda']:.1e} at step {last['step']}")
    table.add_row("parameters", f"{size.total:,} in all, {size.active:,} active for a token")
    table.add_row("run", f"{run_dir} (metrics.jsonl, checkpoints, TensorBoard)")
    console.print()
    console.print(table)


def sparkline(values: list[float], width: int = 48) -> str:
    """A curve of at most `width` characters, from 0 to the largest value."""
    shown = [values[place * len(values) // min(width, len(values))] for place in range(min(width, len(values)))]
    top = max(shown) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in shown)


def _what_next(run_dir: Path, steps: int, python: str, deepspeed: str) -> None:
    train = f"dsmoe train --config {CONFIG}"
    console.print("\n[bold]What to try next[/]")
    for what, command in (
        ("another prompt", f"{python} -m dsmoe generate {run_dir} --prompt 'import ' --temperature 0.5"),
        ("exactly two experts per token", f"{deepspeed} --num_gpus 2 --module {train} router.name=topk router.k=2 "
                                          "logging.run_dir=runs/topk"),
        ("train this model further, as one process under ZeRO-3", f"{python} -m {train} parallel.expert_parallel=1 "
                                                                  f"parallel.zero_stage=3 training.steps={2 * steps}"),
    ):  # fmt: skip
        console.print(f"  [dim]# {what}[/]")
        console.print(f"  {command}", markup=False)


def _beside_python(name: str) -> str:
    """A command of this virtual environment, as short as it can be typed here."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    run(main)
