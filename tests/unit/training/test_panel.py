"""What a run shows on a terminal: a real one, of some width, and what takes the panel's place where there is none."""

from __future__ import annotations

import io

import pytest
from forked import call
from rich.console import Console
from terminal import Terminal, panels, take_terminal

from dsmoe.training.panel import BLOCKS, Curve, Pace, Panel
from dsmoe.training.progress import TrainingProgress

STEPS = 30


def metrics_of(step: int) -> dict:
    return {
        "loss": 6.0 - step / 10, "experts_per_token": 2.0 + step / STEPS, "density": 0.25 + step / 8 / STEPS,
        "tokens_per_second": 12345.0, "worst_imbalance": 1.94, "worst_layer": 3, "lambda": 1e-6 * step,
    }  # fmt: skip


def show_progress(terminal: str | None, environment: dict[str, str]) -> None:
    """In a process of its own whose terminal this is."""
    take_terminal(terminal, environment)
    with TrainingProgress(STEPS, 0, True, target_density=0.25, steered=("lambda",)) as progress:
        for step in range(1, STEPS + 1):
            progress.update(step, metrics_of(step))
            if step == 20:
                progress.say("held out")
                progress.warn("a warning")


def shown(columns: int, **environment: str) -> str:
    terminal = Terminal(columns)
    try:
        call(show_progress, terminal.path, environment)
        return terminal.text
    finally:
        terminal.close()


@pytest.mark.parametrize("columns", [120, 80, 60, 40])
def test_the_panel_fits_its_terminal(columns):
    text = shown(columns)
    assert "held out" in text and "warning: a warning" in text
    last = panels(text)[-1]
    assert [line.split()[0] for line in last] == ["step", "loss", "speed", "experts", "load", "lambda"]
    assert all(len(line) <= columns for line in last)
    assert last[0].startswith(f"step {STEPS}/{STEPS}") and last[0].endswith("0 s left")
    assert "3.000" in last[1] and "12,345 tokens/s" in last[2] and "max/mean 1.94" in last[4] and "3e-05" in last[5]
    if columns >= 60:
        assert "3.00 per token, density 0.375 (target 0.250)" in last[3] and "MoE layer 3" in last[4]
        assert BLOCKS[-1] in last[1] and last[5].endswith(BLOCKS[-1])  # lambda rises


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_none_gets_lines(environment):
    text = shown(60, **environment)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == STEPS + 2 and lines[0].startswith("step 1/30  ")
    assert all(" s left  loss " in line for line in lines if line.startswith("step "))


def draw(panel: Panel, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(panel)
    return console.file.getvalue().splitlines()


def test_a_panel_before_the_first_step_and_without_a_controller():
    panel = Panel(100, 40, Pace(100), None, ())
    assert draw(panel, 60)[0].startswith("step 40/100 ━")
    panel.see(41, metrics_of(1) | {"skipped": 1, "val_loss": 5.5})
    panel.see(42, metrics_of(2))
    lines = draw(panel, 80)
    assert "5.800, held out 5.500" in lines[1] and "target" not in "".join(lines) and len(lines) == 5
    panel.see(43, metrics_of(3) | {"skipped": 1, "loss": float("nan")})
    assert "nan (skipped)" in draw(panel, 80)[1]


def test_a_curve_has_its_course_however_long_it_is():
    curve = Curve()
    assert curve.draw(10) == ""
    for value in range(100_000):
        curve.add(value)
    curve.add(float("nan"))
    assert len(curve.means) < Curve.POINTS
    assert curve.draw(8) == BLOCKS
    flat = Curve()
    for _ in range(3):
        flat.add(2.0)
    assert flat.draw(8) == BLOCKS[0] * 3
