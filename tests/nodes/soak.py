"""Random faults over two hosts under the supervisor, for as long as one likes: `make soak ARGS='--minutes 60'`.

A run with a rank on each host is killed, stopped and cut off at random moments. At the end its losses must be those of
the same run undisturbed, to the last digit. What was done and how long each recovery took goes to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from conftest import small_run, write_data
from hosts import NAMES, Hosts, unavailable
from jobs import FAULT, Job, free_port, losses, metrics, on_one_host

KINDS = ("kill a rank", "stop a rank", "terminate a rank", "kill an agent", "cut the link")
LOST = 180.0  # seconds without a recovery before the soak has failed


class Soak:
    def __init__(self, hosts: Hosts, place: Path, numbers: random.Random):
        self.hosts, self.place, self.numbers = hosts, place, numbers
        self.run_dir = place / "runs" / "soak"
        self.logs = {name: place / f"{name}.log" for name in NAMES}
        self.faults: list[dict] = []

    def start(self, arguments: list[str], pause: float) -> list[Job]:
        port = free_port()
        command = [sys.executable, "launch/supervise.py", "--nnodes", "2", "--run-id", str(port), "--backoff", "1"]
        command += ["--give-up", "20", "--rendezvous", ",".join(f"{name}:{port}" for name in NAMES), *arguments]
        shell = 'log=$1; shift; exec "$@" >"$log" 2>&1'
        return [
            Job(self.hosts, name, ["bash", "-c", shell, "-", str(self.logs[name]), *command], PAUSE=str(pause))
            for name in NAMES
        ]

    def resumed(self) -> int:
        """How often the run has done its first step after a restart."""
        attempts = self.logs["nodeA"].read_text().split("resumed from")[1:]
        return sum(re.search(r"^step \d+/", attempt, re.M) is not None for attempt in attempts)

    def harm(self) -> None:
        """One fault, and the time to the first step after it."""
        kind, host = self.numbers.choice(KINDS), self.numbers.choice(NAMES)
        before, step, began = self.resumed(), len(metrics(self.run_dir)), time.monotonic()
        if kind == "cut the link":
            with self.hosts.cut():
                time.sleep(15)
        elif kind == "kill an agent":
            self.hosts.kill(host, "ChildFailedError")  # its program is on its command line
        else:
            numbers = {"kill a rank": signal.SIGKILL, "stop a rank": signal.SIGSTOP, "terminate a rank": signal.SIGTERM}
            for pid in self.hosts.processes(host, "-u\0" + FAULT):
                os.kill(pid, numbers[kind])
        while self.resumed() == before and time.monotonic() - began < LOST:
            time.sleep(0.2)
        seconds = time.monotonic() - began
        self.faults.append({"kind": kind, "host": host, "step": step, "seconds": round(seconds, 1)})
        print(f"{kind} on {host} at step {step}: training again after {seconds:.1f} s", flush=True)
        if seconds >= LOST:
            raise SystemExit(f"no recovery:\n{self.logs['nodeA'].read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", default="30:60", help="seconds of training between faults, MIN:MAX")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds before each step")
    parser.add_argument("--json", type=Path, default=Path("runs/soak.json"))
    options = parser.parse_args()
    if reason := unavailable():
        raise SystemExit(reason)
    low, high = (float(text) for text in options.every.split(":"))
    place, numbers = Path(tempfile.mkdtemp(prefix="soak")), random.Random(options.seed)
    tree = small_run(write_data(place / "data"))
    (place / "keys").mkdir()
    (place / "tiny.yaml").write_text(yaml.safe_dump(tree))
    common = [FAULT, "--config", str(place / "tiny.yaml"), "checkpoint.interval=10", "training.timeout.step=8"]
    began = time.monotonic()
    with Hosts(place / "keys") as hosts:
        soak = Soak(hosts, place, numbers)
        # It ends by itself when it has trained for as long as is left after its faults; --minutes bounds the faults.
        steps = int(0.75 * options.minutes * 60 / (options.pause + 0.1))
        jobs = soak.start([*common, f"logging.run_dir={soak.run_dir}", f"training.steps={steps}"], options.pause)
        while not metrics(soak.run_dir):
            time.sleep(0.5)
        while time.monotonic() - began < options.minutes * 60:
            until = time.monotonic() + numbers.uniform(low, high)
            while time.monotonic() < until and any(job.process.poll() is None for job in jobs):
                time.sleep(0.5)
            if all(job.process.poll() is not None for job in jobs) or len(metrics(soak.run_dir)) > steps - 20:
                break
            soak.harm()
        codes = [job.finish(options.minutes * 60 + 600).code for job in jobs]
        wall = time.monotonic() - began
        reference = place / "runs" / "undisturbed"
        undisturbed = on_one_host(hosts, 2, [*common, f"logging.run_dir={reference}", f"training.steps={steps}"])
        assert undisturbed.finish(1200).code == 0
        equal = losses(soak.run_dir) == losses(reference)
    seconds = sorted(fault["seconds"] for fault in soak.faults)
    summary = {
        "minutes": round(wall / 60, 1), "steps": steps, "exit codes": codes, "losses equal": equal,
        "faults": dict(Counter(fault["kind"] for fault in soak.faults)),
        "p50": statistics.median(seconds), "p95": seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**summary, "each": soak.faults}, indent=1))
    print(json.dumps(summary, indent=1))
    raise SystemExit(0 if equal and codes == [0, 0] else 1)


if __name__ == "__main__":
    main()
