"""A job under the deepspeed command on a real terminal of 60 columns: its panel, Ctrl-Z, Ctrl-C, and what is left."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
from commands import TRAIN, deepspeed, metrics
from terminal import CTRL_C, ESCAPES, Terminal, panels

CTRL_Z = b"\x1a"


def test_ctrl_c_under_deepspeed_saves_and_ends_with_our_message(place, config):
    """Two ranks start as a user's would, with all imports: about 15 s. The test is the shell: it resumes the job."""
    run_dir = place / "runs" / "terminal"
    rarely = ["checkpoint.interval=0", "training.eval_interval=0", "training.steps=100000", "logging.tensorboard=true"]
    terminal = Terminal(60)
    try:
        command = deepspeed(2, TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", *rarely)
        terminal.start(
            [*command, "parallel.expert_parallel=2"], {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        )
        terminal.wait_until(lambda: len(metrics(run_dir)) >= 5)
        rank = terminal.foreground()
        job = psutil.Process(terminal._process.pid)
        assert rank != job.pid and rank in {child.pid for child in job.children(recursive=True)}

        terminal.type(CTRL_Z)
        terminal.wait_until(lambda: job.status() == psutil.STATUS_STOPPED)
        assert terminal.foreground() == os.getpgid(rank) == job.pid, "a shell could not resume the job"
        steps = len(metrics(run_dir))
        terminal.resume()
        terminal.wait_until(lambda: len(metrics(run_dir)) > steps + 2 and terminal.foreground() == rank)

        terminal.type(CTRL_C)
        code = terminal.wait()
        text = terminal.text
    finally:
        terminal.close()
    said = ESCAPES.sub("", text)
    assert "Traceback" not in said and "KeyboardInterrupt" not in said, said
    assert "Warning" not in said and "warning" not in said, said
    step = len(metrics(run_dir))
    assert f"stopped by a signal at step {step}; the same command resumes there" in said.replace("\r\n", "\n")
    assert f"checkpoints/step_{step:08d}" in said.replace("\r\n", "")
    assert (run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()
    assert code == 75
    drawn = [panel for panel in panels(text) if panel and panel[0].startswith("step ")]
    assert any(panel[0].endswith(" left") and len(panel) >= 6 for panel in drawn), "step and time that is left"
    assert all(len(line) <= 60 for panel in drawn[:-1] for line in panel[:1])
