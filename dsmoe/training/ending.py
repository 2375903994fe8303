"""What the end of a run says: its numbers, where it lies, and what to do with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dsmoe.config import RunConfig
from dsmoe.data.tokenizer import TOKENIZER_FILES

PROMPT = "def main("
TEXT = "The router sends every token to its experts."


def ending(
    config: RunConfig, step: int, metrics: dict[str, Any], tokens_per_second: float | None, target: float
) -> str:
    """Rows with a label of 8 columns, as those of the start.

    Args:
        step: of the last checkpoint.
        metrics: of the last step and evaluation, as far as there are.
        target: experts per token that the router aims at.
    """
    run_dir, numbers = Path(config.logging.run_dir), []
    if "loss" in metrics:
        numbers.append(f"loss {metrics['loss']:.3f}")
    if "val_loss" in metrics:
        bits = f" ({metrics['val_bpb']:.3f} bits per byte)" if "val_bpb" in metrics else ""
        numbers.append(f"held out {metrics['val_loss']:.3f}{bits}")
    if "experts_per_token" in metrics:
        numbers.append(f"{metrics['experts_per_token']:.2f} experts per token (aim {target:.2f})")
    if tokens_per_second:
        numbers.append(f"{tokens_per_second:,.0f} tokens/s")
    tensorboard = ", tensorboard" if config.logging.tensorboard else ""
    lines = [
        f"numbers {', '.join(numbers)}",
        f"where   {run_dir}: checkpoints/step_{step:08d}, metrics.jsonl{tensorboard}",
    ]
    if step >= config.training.steps:
        lines += [f"{'' if number else 'next':8}{command}" for number, command in enumerate(_next(config, run_dir))]
    return "\n".join(lines)


def _next(config: RunConfig, run_dir: Path) -> list[str]:
    run = shlex.quote(str(run_dir))
    commands = [f"dsmoe export {run} {shlex.quote(f'exported/{run_dir.name}')}"]
    if any((run_dir / name).is_file() for name in TOKENIZER_FILES):
        commands.insert(0, f"dsmoe generate {run} --prompt {shlex.quote(PROMPT)}")
        commands.insert(1, f"dsmoe inspect {run} --text {shlex.quote(TEXT)}")
    if config.logging.tensorboard:
        commands.append(f"tensorboard --logdir {run}")
    return commands
