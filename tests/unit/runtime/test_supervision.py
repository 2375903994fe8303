"""The channel between ranks, with real processes and sockets; no framework is loaded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dsmoe.runtime.limits import Limits
from dsmoe.runtime.phase import Phase
from dsmoe.runtime.supervision import Server, lost_peer

RANK = """
import os, sys, time
from dsmoe.runtime import supervision
from dsmoe.runtime.phase import phase
from dsmoe.runtime.limits import Limits
from dsmoe.runtime.supervision import Client, Server

if sys.argv[5] == "fail early" and sys.argv[1] == "2":
    time.sleep(3)
rank, world, port, step_limit, action = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5]
limits = Limits(start=8, step=step_limit)
limits.note_step(0.1)
if rank == 0:
    channel = Server(rank, world, 0, "hostA", limits, token="secret")
    print(channel.port, flush=True)
else:
    channel = Client(rank, world, rank, "hostB", limits, address="127.0.0.1", port=int(port), token="secret")
"""
ENDINGS = {
    "consult": "print(channel.consult(rank * 10, sum, 8)); time.sleep(0.3); channel.close()",
    "fail": "phase.begin_step(5)\nif rank == 1: channel.fail('DataError: no data', 2)\ntime.sleep(60)",
    "fail early": "if rank == 1: channel.fail('DataError: no data', 2)\ntime.sleep(60)",
    "die": "phase.begin_step(5)\nwith phase.within('all-to-all'):\n    time.sleep(1.5)\n    rank == 1 and os._exit(0)\n"
    "    time.sleep(60)",
    "stop": "phase.begin_step(5)\ntime.sleep(1.5)\nif rank == 1: os.kill(os.getpid(), 19)\ntime.sleep(60)",
    "behind": "phase.begin_step(5)\nif rank != 1: phase.enter('optimizer')\ntime.sleep(60)",
    "leave": "channel.consult(0, sum, 8); time.sleep(rank * 0.2); channel.close(); time.sleep(1)",
}


def run_ranks(action: str, world: int = 3, step_limit: float = 60.0, present: int | None = None):
    """Exit code and output of each rank."""

    def start(rank: int, port: str) -> subprocess.Popen:
        program = RANK + ENDINGS[action]
        arguments = [sys.executable, "-c", program, str(rank), str(world), port, str(step_limit), action]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(arguments, start_new_session=True, **pipes)

    first = start(0, "-")
    port = first.stdout.readline().strip()
    processes = [first, *(start(rank, port) for rank in range(1, present or world))]
    if action == "stop":  # what torchrun does to the group of a rank that must end
        threading.Timer(4.0, os.killpg, (processes[1].pid, signal.SIGTERM)).start()
    ended, until = [], time.monotonic() + 40
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output = "it did not end: " + process.communicate()[0]
        ended.append((process.returncode, output.strip()))
    return ended


def test_values_of_all_ranks_reach_the_judge_and_its_answer_all():
    assert run_ranks("consult") == [(0, "30")] * 3


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_in_time():
    (code, output), (_, other) = run_ranks("consult", present=2)
    assert code == 1 and "rank 2 did not report within 8 s (training.timeout.start)" in output
    assert "rank 0 on 127.0.0.1 has gone" in other


def test_an_error_of_one_rank_ends_all_with_its_words_and_its_exit_code():
    ended = run_ranks("fail")
    assert [code for code, _ in ended] == [2, 2, 2]
    assert ended[0][1] == "[rank 0] rank 1 on hostB: DataError: no data"
    assert ended[1][1] == "DataError: no data"
    assert ended[2][1] == "[rank 2] rank 1 on hostB: DataError: no data"


def test_a_rank_that_comes_late_hears_why_there_is_no_run():
    ended = run_ranks("fail early")
    assert [code for code, _ in ended] == [2, 2, 2]
    assert ended[2][1] == "[rank 2] rank 1 on hostB: DataError: no data"


def test_a_rank_that_dies_is_named_on_every_survivor():
    ended = run_ranks("die")
    assert ended[1] == (0, "")
    for rank in (0, 2):
        assert ended[rank] == (1, f"[rank {rank}] rank 1 on hostB has gone, in the all-to-all of step 5")


@pytest.mark.slow
def test_a_stopped_rank_is_silent_and_named_after_the_limit():
    """And ended, since nothing else on its host would, also after its launcher has asked it to end."""
    ended = run_ranks("stop", step_limit=3.0)
    assert ended[1][0] == -signal.SIGKILL and "rank 1 on hostB has been stopped for" in ended[1][1]
    for rank in (0, 2):
        assert ended[rank][0] == 1
        assert "no progress for 3 s (training.timeout.step): rank 1 on hostB silent for " in ended[rank][1]
        assert "last heard of in the forward pass of step 5" in ended[rank][1]


@pytest.mark.slow
def test_a_rank_that_lives_and_does_not_move_is_named():
    ended = run_ranks("behind", step_limit=3.0)
    for code, output in ended:
        assert code == 1
        assert "no progress for 3 s (training.timeout.step): the others wait for rank 1 on hostB" in output
        assert "in the forward pass of step 5" in output


def test_ranks_that_leave_one_after_another_are_no_failure():
    assert run_ranks("leave") == [(0, "")] * 3


def test_strangers_change_nothing():
    """Whoever connects without the job's token, or speaks something else, is not heard."""
    server = Server(0, 2, 0, "hostA", Limits(step=0.0), token="secret")
    hello = {"rank": 1, "host": "hostB", "pid": 1, "token": "secret"}
    for line in (b"GET / HTTP/1.1", b"[1, 2]", b'{"hello": 3}', b'{"failed": "x", "code": 1}', b'{"hello": {}}',
                 json.dumps({"hello": {**hello, "token": "guess"}}).encode()):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.sendall(line + b"\n")
            stranger.settimeout(1.0)
            with contextlib.suppress(TimeoutError, ConnectionError):
                assert b"secret" not in stranger.recv(1000)
    with socket.create_connection(("127.0.0.1", server.port)) as rank:
        rank.sendall(json.dumps({"hello": hello}).encode() + b"\n" + json.dumps({"value": 2}).encode() + b"\n")
        assert server.consult(1, sum, 10) == 3
        server.close()


def test_the_limit_follows_the_steps():
    limits = Limits(start=300.0)
    assert limits.now() == 300.0
    for seconds in (1.0, 20.0, 8.0):
        limits.note_step(seconds)
    assert limits.now() == 80.0
    for _ in range(9):
        limits.note_step(0.1)
    assert limits.now() == 60.0
    assert limits.key == "training.timeout.step"
    limits.step = 0.0
    assert limits.now() == 0.0


def test_a_phase_on_disk_has_a_limit_of_its_own(monkeypatch):
    limits, here = Limits(step=7.0, save=90.0), Phase()
    limits.note_step(1.0)
    monkeypatch.setattr("dsmoe.runtime.limits.phase", here)
    here.begin_step(3)
    assert (limits.key, limits.now()) == ("training.timeout.step", 7.0)
    with here.within("save"):
        assert (limits.key, limits.now(), str(here)) == ("training.timeout.save", 90.0, "the save of step 3")
    assert limits.now() == 7.0


def test_phases_in_words():
    phase = Phase()
    assert str(phase) == "the start"
    phase.begin_step(7)
    phase.enter(phase.name, 1)
    assert str(phase) == "the forward pass of layer 1 of step 7"
    with phase.within("all-to-all", in_layer=True):
        assert str(phase) == "the all-to-all of step 7 (layer 1)"
    with phase.within("backward pass"):
        assert str(phase) == "the backward pass of step 7"
    assert (str(phase), phase.changes) == ("the forward pass of layer 1 of step 7", 6)


@pytest.mark.parametrize(
    ("text", "lost"),
    [("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer", True), ("shape '[2]'", False)],
)
def test_what_a_broken_collective_looks_like(text, lost):
    assert lost_peer(RuntimeError(text)) is lost
