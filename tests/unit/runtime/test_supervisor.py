"""What the supervisor decides; what it starts is a stand-in for torchrun."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dsmoe.errors import ParallelError
from dsmoe.runtime import exit_codes, supervisor
from dsmoe.runtime.supervisor import Plan, Supervisor, is_own, lives, split_endpoint


@pytest.fixture
def attempts(tmp_path, monkeypatch):
    """supervise(codes, steps): the exit code, with what each attempt leaves; and the options of each attempt."""
    log = tmp_path / "attempts"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def supervise(codes: list[str], steps: list[int], give_up: int = 3, **changes) -> tuple[int, list[str]]:
        agent = f"""
import os, subprocess, sys, time
with open({str(log)!r}, "a+") as file:
    file.seek(0)
    number = len(file.readlines())
    print(*sys.argv[1:], file=file)
action = {codes!r}[min(number, {len(codes) - 1})]
if action == "wait":
    time.sleep(60)
if action == "slow":
    time.sleep(1.5)
    sys.exit(0)
if action == "orphan":  # an agent that is killed leaves a rank
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2); open({str(log)!r} + 'rank', 'w')"])
    os.kill(os.getpid(), 9)
if action == "after":
    sys.exit(0 if os.path.exists({str(log)!r} + "rank") else 3)
sys.exit(int(action))
"""
        monkeypatch.setattr(supervisor, "AGENT", agent)

        class Run:
            def saved_step(self) -> int:
                done = len(log.read_text().splitlines()) if log.exists() else 0
                return steps[min(done, len(steps) - 1)]

            def resume(self) -> list[str]:
                return ["training.resume=X"]

            def logged_bytes(self) -> int:
                return int(10 * time.monotonic())

            def training_seconds(self) -> float:
                return 0.5 * time.monotonic()

        changes = {"backoff": 0.01, "give_up": give_up, "last_call": 0, **changes}
        plan = Plan((1, 1), 1, ["localhost:1"], "id", ["train.py"], **changes)
        code = Supervisor(plan, Run()).run()
        return code, log.read_text().splitlines()

    yield supervise
    ctypes.CDLL(None).prctl(supervisor.PR_SET_CHILD_SUBREAPER, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_run_that_finishes_is_not_started_again(attempts):
    code, started = attempts(["0"], [0])
    assert code == 0 and len(started) == 1
    assert "--nnodes 1:1 --nproc-per-node 1" in started[0] and "--rdzv-endpoint localhost:1" in started[0]
    assert "--shutdown-timeout 300" in started[0] and started[0].endswith("train.py training.resume=X")


def test_failures_with_progress_go_on_and_without_it_end(attempts):
    assert len(attempts(["1", "1", "1", "1", "0"], [0, 10, 20, 30, 40])[1]) == 5


def test_it_gives_up_without_progress(attempts, capfd):
    code, started = attempts(["1", "75", "1"], [0, 10, 10, 10, 10])
    assert code == 1 and len(started) == 4
    assert "supervisor: 3 attempts without a new checkpoint; giving up" in capfd.readouterr().err


def test_ranks_without_their_agent_are_waited_for(attempts):
    assert attempts(["orphan", "after"], [0])[0] == 0


RANK = """
import sys, time
from pathlib import Path
from dsmoe.runtime.signals import StopRequest

with StopRequest() as stop:
    Path(sys.argv[1], "started").touch()
    until = time.monotonic() + 150
    while not stop.asked and time.monotonic() < until:
        time.sleep(0.05)
    if stop.asked:
        Path(sys.argv[1], "stopped").touch()
"""


def test_a_rank_notices_that_its_agent_was_killed(tmp_path):
    """The real agent, which ranks have to know for a launcher."""
    (tmp_path / "rank.py").write_text(RANK)
    options = ["--nnodes", "1", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-c", supervisor.AGENT, *options, str(tmp_path / "rank.py"), str(tmp_path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as agent:
        try:
            wait_for(tmp_path / "started")
        finally:
            agent.kill()
    wait_for(tmp_path / "stopped")


def wait_for(path, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.05)


def test_other_children_are_neither_waited_for_nor_killed(attempts):
    with subprocess.Popen(["sleep", "60"]) as other:
        began = time.monotonic()
        assert attempts(["1", "0"], [0, 10], grace=40.0)[0] == 0
        assert other.poll() is None and time.monotonic() - began < 40
        other.kill()


def test_times_to_recover_are_told(attempts, capfd):
    assert attempts(["1", "slow"], [0])[0] == 0
    assert re.search(
        r"supervisor: 2 attempts; recovered in [012] s; 50% of \d s went into steps", capfd.readouterr().err
    )


def test_a_run_that_is_refused_is_not_started_again(attempts):
    assert attempts(["2"], [0])[0] == 2


def test_a_signal_goes_to_the_agent_and_nothing_is_started_again(attempts):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    code, started = attempts(["wait"], [0])
    assert code == exit_codes.STOPPED and len(started) == 1 and time.monotonic() - began < 30


def test_a_signal_between_two_attempts_stops_the_run_too(attempts):
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    code, started = attempts(["1"], [0], backoff=60.0)
    assert code == exit_codes.STOPPED and len(started) == 1


def test_endpoints():
    assert split_endpoint("worker-0:29400") == ("worker-0", 29400)
    with pytest.raises(ParallelError, match="found 'worker-0', expected HOST:PORT"):
        split_endpoint("worker-0")
    assert is_own(f"{socket.gethostname()}:1") and is_own("127.0.0.1:1") and not is_own("192.0.2.1:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert lives(f"127.0.0.1:{port}")
    assert not lives(f"127.0.0.1:{port}")
