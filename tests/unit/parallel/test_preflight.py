"""What is compared before a run starts."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest

from dsmoe.parallel.preflight import Report, agree, judge
from dsmoe.runtime import supervision
from dsmoe.runtime.host import interface_addresses, memory_free, peer_address

GIB = 2**30
GOOD = Report(
    rank=0, host="a", address="10.0.0.1", interface="eth0", routable="eth0", equal={"torch": "2.13.0", "data": "d1"},
    memory_free=8 * GIB, memory_needed=GIB, device_free=None, device_needed=0, disk_free=100 * GIB, disk_needed=GIB,
)  # fmt: skip


def on(rank: int, host: str, **changes) -> Report:
    return replace(GOOD, rank=rank, host=host, **changes)


def test_equal_ranks_may_start_and_have_a_line_a_host():
    verdict = judge([GOOD, on(1, "a"), on(2, "b", address="10.0.0.2")])
    assert (verdict.problems, verdict.warnings) == ([], [])
    header, first, second = verdict.table
    assert header.split()[:3] == ["host", "ranks", "address"]
    assert first.split()[:3] == ["a", "0-1", "10.0.0.1"] and second.split()[:3] == ["b", "2", "10.0.0.2"]


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"equal": {"torch": "2.11.0", "data": "d1"}},
         "torch differs between ranks: 2.13.0 on rank 0 (a); 2.11.0 on rank 1 (b)"),
        ({"equal": {"torch": "2.13.0", "data": "d2"}},
         "data differs between ranks: d1 on rank 0 (a); d2 on rank 1 (b)"),
        ({"address": "127.0.1.1", "routable": "ens5"},
         "b would tell the other hosts the address 127.0.1.1, which is their own. Map the host's name to its own "
         "address in /etc/hosts (Debian maps it to 127.0.1.1), or set GLOO_SOCKET_IFNAME=ens5 (for pdsh, as a line of "
         ".deepspeed_env)"),
        ({"memory_needed": 9 * GIB}, "b: 8.0 GiB of memory are free, and its 1 ranks need 9.0 GiB"),
        ({"device_free": GIB, "device_needed": 2 * GIB},
         "rank 1 on b: its GPU has 1.0 GiB free, and it needs 2.0 GiB"),
        ({"problems": ["no such interface"]}, "rank 1 on b: no such interface"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_problem_with_its_rank_and_host(other, problem):
    assert judge([GOOD, on(1, "b", **other)]).problems == [problem]


def test_what_may_not_fit_with_activations_is_a_warning_and_what_the_table_says_is_needed():
    host = judge([on(0, "a", expected=5 * GIB), on(1, "a", expected=5 * GIB)])
    assert not host.problems and host.warnings == [
        "a: 8.0 GiB of memory are free, and its 2 ranks may need 10.0 GiB with activations (dsmoe plan)"
    ]
    assert "10.0 GiB" in host.table[1]
    gpu = judge([on(0, "a", memory_needed=0, device_free=80 * GIB, device_needed=GIB, expected=90 * GIB)])
    assert not gpu.problems and gpu.warnings == [
        "rank 0 on a: its GPU has 80.0 GiB free, and it may need 90.0 GiB with activations (dsmoe plan)"
    ]
    assert not judge([on(0, "a", expected=7 * GIB)]).warnings


def test_ranks_of_a_host_share_its_memory():
    assert judge([GOOD, on(1, "a", memory_needed=8 * GIB)]).problems == [
        "a: 8.0 GiB of memory are free, and its 2 ranks need 9.0 GiB"
    ]


def test_one_host_may_use_its_loopback():
    assert not judge([on(rank, "a", address="127.0.0.1") for rank in range(2)]).problems


def test_clocks_and_a_small_disk_are_warnings():
    verdict = judge([replace(GOOD, disk_free=GIB // 2), on(1, "b", clock=-30.0)])
    assert not verdict.problems
    assert verdict.warnings == [
        "b: its clock is 30 s behind rank 0's",
        "a: 0.5 GiB are free for the run folder, and a checkpoint takes 1.0 GiB",
    ]


class Channel:
    """What rank 0 sees where all ranks say what it says itself, but for some of their answers."""

    def __init__(self, sees: bool = True):
        self._sees = sees

    def consult(self, value, judge, timeout):
        other = {**value, "rank": 1, "host": "b"} if isinstance(value, dict) else [1, "b", self._sees]
        return judge([value, other])

    def arrivals(self) -> list[float]:
        return [time.time()] * 2


@pytest.mark.parametrize(
    ("sees", "problems"),
    [(True, []), (False, ["logging.run_dir: rank 1 on b cannot see what rank 0 on a writes to {run_dir}; it must lie "
                          "on a file system that all hosts share"])],
)  # fmt: skip
def test_the_run_folder_is_seen_by_all_and_left_as_it_was(sees, problems, tmp_path, monkeypatch):
    run_dir = tmp_path / "runs" / "new"
    monkeypatch.setattr(supervision, "current", Channel(sees))
    verdict = agree(replace(GOOD, clock=time.time()), run_dir, 10)
    assert verdict.problems == [text.format(run_dir=run_dir) for text in problems]
    assert not run_dir.parent.exists()


def test_a_run_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(supervision, "current", Channel())
    (problem,) = agree(replace(GOOD, clock=time.time()), tmp_path / "file" / "run", 10).problems
    assert problem == f"logging.run_dir: rank 0 on a cannot write {tmp_path / 'file' / 'run'}: Not a directory"


def test_the_address_for_peers(monkeypatch):
    assert interface_addresses()["lo"] == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert peer_address() == ("127.0.0.1", "lo", None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    address, interface, problem = peer_address()
    assert (address, interface) == (None, "eth9")
    assert problem.startswith("GLOO_SOCKET_IFNAME: found no interface eth9") and "lo" in problem
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert peer_address()[:2] == ("127.0.0.1", "lo")


def test_free_memory_is_that_of_this_machine():
    assert 2**20 < memory_free() < 2**50
