"""A job under the deepspeed command on a real terminal of 60 columns: its panel, Ctrl-Z, Ctrl-C, and what is left."""

from __future__ import annotations

import os
import re
import shlex

import psutil
from commands import TRAIN, deepspeed, metrics
from terminal import CTRL_C, ESCAPES, Terminal, panels

CTRL_Z = b"\x1a"


def test_ctrl_c_under_deepspeed_saves_and_ends_with_our_message(place, config):
    """Typed into a shell with job control; two ranks start as a user's would, with all imports: about 15 s."""
    run_dir = place / "runs" / "terminal"
    rarely = ["checkpoint.interval=0", "training.eval_interval=0", "training.steps=100000", "logging.tensorboard=true"]
    command = deepspeed(2, TRAIN, "--config", str(config), f"logging.run_dir={run_dir}", *rarely)
    terminal = Terminal(60)
    try:
        terminal.start(["bash", "--norc", "--noprofile", "-i"], {"PS1": "shell> ", "HISTFILE": "/dev/null"})
        terminal.type(f"{shlex.join([*command, 'parallel.expert_parallel=2'])}\n".encode())
        terminal.wait_until(lambda: len(metrics(run_dir)) >= 5)
        rank = psutil.Process(terminal.foreground())
        runner = rank.parent().parent()
        assert "launch/train.py" in rank.cmdline() and os.getpgid(runner.pid) != rank.pid

        terminal.type(CTRL_Z)
        terminal.wait_until(lambda: "Stopped" in terminal.text)
        terminal.wait_until(lambda: rank.status() == runner.status() == psutil.STATUS_STOPPED)
        steps = len(metrics(run_dir))
        terminal.type(b"fg\n")
        terminal.wait_until(lambda: len(metrics(run_dir)) > steps + 2 and terminal.foreground() == rank.pid)

        terminal.type(CTRL_C)
        terminal.wait_until(lambda: not runner.is_running() or runner.status() == psutil.STATUS_ZOMBIE)
        terminal.type(b"echo exit code $?\n")
        terminal.wait_until(lambda: re.search(r"exit code \d+\r", terminal.text))
        text = terminal.text
        terminal.type(b"exit\n")
        terminal.wait()
    finally:
        terminal.close()
    said = ESCAPES.sub("", text).replace("\r\n", "\n")
    assert "exit code 75" in said
    assert not any(word in said for word in ("Traceback", "KeyboardInterrupt", "Warning")), said
    step = len(metrics(run_dir))
    assert f"stopped by a signal at step {step}; the same command resumes there" in said
    assert f"checkpoints/step_{step:08d}" in said.replace("\n", "")
    assert (run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").is_file()
    drawn = [panel for panel in panels(text) if panel and panel[0].startswith("step ") and len(panel) >= 6]
    assert drawn and all(panel[0].endswith(" left") and len(panel[0]) <= 60 for panel in drawn[1:-1])
