"""Keep a run going over failures, on every host the same command:

    python launch/supervise.py --nnodes 1:2 --nproc-per-node 8 --rendezvous worker-0:29400,worker-1:29400 \
        launch/train.py --config CONFIG.yaml logging.run_dir=RUN

It starts torchrun, and again after a failure, from the newest checkpoint that is whole, on the hosts that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from os.path import expanduser
from pathlib import Path

from dsmoe.checkpoint.files import newest_checkpoint, newest_whole, step_of
from dsmoe.config import load_config
from dsmoe.errors import ParallelError
from dsmoe.runtime.command_line import run
from dsmoe.runtime.supervisor import Plan, Supervisor, say, split_endpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnodes", default="1", help="hosts, or MIN:MAX (default: %(default)s)")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks on this host (default: %(default)s)")
    parser.add_argument(
        "--rendezvous", default="localhost:29400",
        help="HOST:PORT where the hosts meet, or several: when a host is gone, the next one's (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--run-id", default="dsmoe", help="the same on all hosts of a run (default: %(default)s)")
    parser.add_argument("--grace", type=float, default=300, help="seconds for a save after SIGTERM (default: 300)")
    parser.add_argument("--backoff", type=float, default=5, help="seconds before the second attempt (default: 5)")
    parser.add_argument("--give-up", type=int, default=5, help="attempts without a new checkpoint (default: 5)")
    parser.add_argument(
        "--last-call", type=int, default=15,
        help="seconds for more hosts to come, once MIN are there; after twice as long the next rendezvous takes over "
        "(default: 15)",
    )  # fmt: skip
    parser.add_argument("script", help="launch/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args()
    fewest, _, most = options.nnodes.partition(":")
    if not fewest.isdigit() or not (most or fewest).isdigit() or not 0 < int(fewest) <= int(most or fewest):
        raise ParallelError(f"--nnodes: found {options.nnodes!r}, expected a number of hosts or MIN:MAX")
    rendezvous = options.rendezvous.split(",")
    for endpoint in rendezvous:
        split_endpoint(endpoint)
    plan = Plan(
        nodes=(int(fewest), int(most or fewest)), processes=options.nproc_per_node, rendezvous=rendezvous,
        run_id=options.run_id, command=[options.script, "--fit", *options.arguments], grace=options.grace,
        backoff=options.backoff, give_up=options.give_up, last_call=options.last_call,
    )  # fmt: skip
    return Supervisor(plan, RunFolder(run_folder(options.arguments))).run()


class RunFolder:
    """What the supervisor must know of the run: `dsmoe.runtime.supervisor.Run`."""

    def __init__(self, path: Path):
        self.path = path

    def saved_step(self) -> int:
        newest = newest_checkpoint(self.path)
        return step_of(newest) if newest else 0

    def resume(self) -> list[str]:
        whole, problems = newest_whole(self.path)
        for problem in problems:
            say(f"a damaged checkpoint is passed over: {problem}")
        return [f"training.resume={whole}"] if whole and problems else []

    def logged_bytes(self) -> int:
        log = self.path / "metrics.jsonl"
        return log.stat().st_size if log.exists() else 0

    def training_seconds(self) -> float:
        log, total = self.path / "metrics.jsonl", 0.0
        for text in log.read_text().splitlines() if log.exists() else ():
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                total += json.loads(text).get("seconds", 0.0)
        return total


def run_folder(arguments: list[str]) -> Path:
    """Of the run that the training script's arguments describe. Raises `ConfigError`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", type=expanduser, default="configs/quickstart.yaml")
    known, rest = parser.parse_known_args(arguments)
    return Path(load_config(known.config, [text for text in rest if "=" in text]).logging.run_dir)


if __name__ == "__main__":
    run(main)
