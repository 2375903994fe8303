"""A start that cannot succeed ends on both hosts, with the same reason, within seconds; nobody waits for a timeout."""

from __future__ import annotations

from hosts import ADDRESSES, HOSTS_FILE
from jobs import Ended, finish_all, torchrun

SOON = 60.0  # seconds, on a machine that is busy; the default timeout is 300


def refused(hosts, train, *overrides: str) -> list[Ended]:
    """Both hosts' output of a start that must be refused."""
    run_dir, arguments = train("refused", *overrides)
    ended = finish_all(torchrun(hosts, 1, arguments, HURRY="1"), SOON)
    assert all(end.code for end in ended)
    assert not run_dir.exists()
    return ended


def test_a_name_that_means_the_loopback_is_refused_with_the_cure(hosts, train):
    """Debian's /etc/hosts: nodeB would tell nodeA to find it at 127.0.1.1, and nodeA would wait for ever."""
    with hosts.hosts_file("nodeB", HOSTS_FILE.replace(f"{ADDRESSES['nodeB']} nodeB", "127.0.1.1 nodeB")):
        ended = refused(hosts, train, "--check")
    for end in ended:
        assert "the run cannot start" in end.output
    for text in ("nodeB would tell the other hosts the address 127.0.1.1", "/etc/hosts", "GLOO_SOCKET_IFNAME=eth0"):
        assert text in ended[0].output


def test_data_that_one_host_lacks_ends_both(hosts, train, data):
    with hosts.hide("nodeB", data):
        ended = refused(hosts, train)
    assert "rank 1 on nodeB: DataError: data.path: found neither" in ended[0].output
    assert "DataError: data.path: found neither" in ended[1].output


def test_a_run_folder_that_is_not_shared_is_refused(hosts, train, place):
    (place / "runs").mkdir(exist_ok=True)
    with hosts.hide("nodeB", place / "runs"):
        ended = refused(hosts, train)
    for end in ended:
        assert "the run cannot start" in end.output
    assert "rank 1 on nodeB cannot see what rank 0 on nodeA writes" in ended[0].output
