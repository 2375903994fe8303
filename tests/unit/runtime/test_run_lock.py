"""A run folder has one writer: who lives is left alone, who is gone is taken over from, whatever the clocks say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from dsmoe.errors import RunFolderError
from dsmoe.runtime.run_lock import FILE, Owner, RunLock

HOLD = (
    "import sys, time; from pathlib import Path; from dsmoe.runtime.run_lock import RunLock\n"
    "with RunLock(Path(sys.argv[1]), 0.1): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_live_writer_is_named_and_left_alone(tmp_path, holder):
    with pytest.raises(RunFolderError, match=f"process {holder.pid} on .* is writing there"):
        RunLock(tmp_path).__enter__()
    assert Owner.read(tmp_path / FILE).pid == holder.pid


def test_a_killed_writer_is_taken_over_from_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with RunLock(tmp_path) as lock:
        assert lock.taken_over.pid == holder.pid
        assert Owner.read(tmp_path / FILE).pid == os.getpid()
    assert time.monotonic() - began < 2
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_writer_lives(tmp_path, holder):
    os.kill(holder.pid, 19)  # SIGSTOP: no heartbeat any more
    with pytest.raises(RunFolderError, match="is in use"):
        RunLock(tmp_path).__enter__()


def foreign(path, **values) -> None:
    """A lock of another machine, whose clock is far off."""
    owner = Owner("nodeB", 4242, "another boot", "1", "their token", 0.1)
    path.write_text(json.dumps({**owner.__dict__, **values}))
    os.utime(path, (0, 0))


def test_another_machines_silent_lock_is_taken_over_after_some_intervals(tmp_path, capsys):
    foreign(tmp_path / FILE)
    with RunLock(tmp_path) as lock:
        assert lock.taken_over.text == "process 4242 on nodeB"
    assert "does process 4242 on nodeB still write" in capsys.readouterr().out


@pytest.mark.parametrize("skew", [-(10**9), 10**9])
def test_another_machines_heartbeat_is_seen_whatever_its_clock_says(tmp_path, skew):
    foreign(tmp_path / FILE)
    done = threading.Event()

    def beat():
        count = 0
        while not done.wait(0.05):
            count += 1
            foreign(tmp_path / FILE, beat=count)
            os.utime(tmp_path / FILE, (time.time() + skew, time.time() + skew))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunFolderError, match="process 4242 on nodeB is writing there"):
            RunLock(tmp_path).__enter__()
    finally:
        done.set()
        thread.join()


def test_a_damaged_lock_is_watched_and_taken_over(tmp_path):
    (tmp_path / FILE).write_text("{")
    with RunLock(tmp_path, interval=0.1) as lock:
        assert Owner.read(tmp_path / FILE).token == lock.owner.token


def test_of_many_newcomers_one_gets_a_dead_owners_folder(tmp_path):
    foreign(tmp_path / FILE)
    results: list = []

    def newcomer():
        try:
            results.append(RunLock(tmp_path, interval=0.2).__enter__())
        except RunFolderError:
            results.append(None)

    threads = [threading.Thread(target=newcomer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holders = [lock for lock in results if lock is not None]
    assert len(holders) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]  # no claim is left
    holders[0].__exit__()


def test_who_claimed_a_dead_owners_place_and_died_is_succeeded(tmp_path):
    foreign(tmp_path / FILE)
    dead = Owner.read(tmp_path / FILE)
    foreign(tmp_path / f".{FILE}.after.{dead.token}", token="claimant")
    with RunLock(tmp_path, interval=0.05) as lock:
        assert lock.taken_over == dead
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_who_claims_a_dead_owners_place_at_this_moment_is_not_disturbed(tmp_path):
    foreign(tmp_path / FILE)
    claim = tmp_path / f".{FILE}.after.{Owner.read(tmp_path / FILE).token}"
    claim.write_text(json.dumps(asdict(Owner.of_this_process(0.05))))
    with pytest.raises(RunFolderError, match="is in use"):
        RunLock(tmp_path, interval=0.05).acquire()
    assert Owner.read(tmp_path / FILE).host == "nodeB"


def test_an_owner_that_was_taken_for_dead_learns_it(tmp_path):
    with RunLock(tmp_path, interval=0.05) as lock:
        foreign(tmp_path / FILE)
        deadline = time.monotonic() + 5
        while not lock.lost and time.monotonic() < deadline:
            time.sleep(0.02)
        assert lock.lost
    assert Owner.read(tmp_path / FILE).host == "nodeB"  # not removed: it is another's


def test_heartbeats_are_written(tmp_path):
    with RunLock(tmp_path, interval=0.05):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not ((owner := Owner.read(tmp_path / FILE)) and owner.beat >= 2):
            time.sleep(0.02)
        assert Owner.read(tmp_path / FILE) is None or owner.beat >= 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write the run folder .*file"):
        RunLock(tmp_path / "file" / "run").__enter__()
