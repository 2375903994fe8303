"""Before any process group is built: do all ranks exist, reach each other, and mean the same run?

Each rank says what it finds on its host. Rank 0 compares, prints one table, and every rank gets one verdict. It goes
over the channel of `dsmoe.runtime.supervision`, whose place is announced in the store that torch's rendezvous uses.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from dsmoe.errors import ParallelError
from dsmoe.parallel.place import Place, find_place
from dsmoe.runtime import supervision
from dsmoe.runtime.device import accelerator, on_gpu
from dsmoe.runtime.host import memory_free, peer_address, routable_interface
from dsmoe.runtime.limits import Limits
from dsmoe.runtime.supervision import Client, Server

PACKAGES = ("torch", "deepspeed", "megatron-core", "dsmoe")
CLOCK_TOLERANCE = 2.0  # seconds
MARKER_WAIT = 10.0  # seconds in which a shared file system may be late to show a new file


@dataclass
class Report:
    """What one rank finds. Sizes in bytes; `equal` holds what all ranks must have the same."""

    rank: int
    host: str
    address: str | None  # that peers are told; None: they are told another way
    interface: str | None
    routable: str | None  # an interface whose address other hosts may reach
    equal: dict[str, str]
    memory_free: int  # of the host
    memory_needed: int  # by this rank on the host
    device_free: int | None  # of this rank's GPU
    device_needed: int
    disk_free: int
    disk_needed: int
    expected: int = 0  # of memory by this rank, with activations, on its GPU or else the host: an estimate
    clock: float = 0.0  # seconds that this host's clock is ahead of rank 0's
    problems: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """Of rank 0 about all reports.

    Attributes:
        problems: why the run must not start. warnings: what it can start with.
        table: one line a host.
        marker: a file that every rank must see; None where there are problems already.
    """

    problems: list[str]
    warnings: list[str]
    table: list[str]
    marker: str | None = None


def meet(read: Callable[[], Any]) -> tuple[Place, Any]:
    """Read what this process needs to start, and meet the other ranks, in that order; collective.

    Args:
        read: returns something with `limits`. What it raises is raised here once the other ranks are there to hear of
            it: an error of one rank, a package it cannot import included, ends all.

    Returns:
        This process's place, and what was read.
    """
    value, problem = None, None
    try:
        value = read()
    except Exception as error:
        problem = error
    place = find_place()
    join(place, value.limits if problem is None else Limits())
    if problem is not None:
        raise problem
    return place, value


def join(place: Place, limits: Limits) -> None:
    """Open the channel between the ranks of the job; a job of one needs none. Collective.

    Raises:
        ParallelError: rank 0 cannot be reached within `limits.start`, or its port is another job's.
    """
    if place.world == 1 or supervision.current is not None:
        return
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts_store = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=limits.start or 10**6)
    identity = (place.rank, place.world, place.local_rank, place.host, limits)
    prefix = f"dsmoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        # multi_tenant: torch's own rendezvous uses the same store later on.
        store = TCPStore(
            address, port, is_master=hosts_store, timeout=timeout, wait_for_workers=False, multi_tenant=hosts_store
        )
        shared = PrefixStore(prefix, store)
        if place.rank == 0:
            token = secrets.token_hex(16)
            server = Server(*identity, token=token)
            shared.set("channel", f"{server.port} {token}")
            supervision.supervise(server)
        else:
            channel, token = shared.get("channel").decode().split()
            supervision.supervise(Client(*identity, address=address, port=int(channel), token=token))
    except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
        what = "open" if hosts_store else "reach rank 0 at"
        reason = str(error).splitlines()[0]
        raise ParallelError(
            f"rank {place.rank} on {place.host} cannot {what} {address}:{port} within {limits.start:.0f} s "
            f"(training.timeout.start): {reason}. Another port: --master_port of deepspeed, MASTER_PORT"
        ) from error
    _kept.append(store)


_kept: list = []  # the store lives as long as the process


def find_report(
    place: Place, run_dir: Path, equal: dict[str, str], state_bytes: int, checkpoint_bytes: int, expected_bytes: int = 0
) -> Report:
    """What this rank finds.

    Args:
        equal: beside the versions of packages, what must be the same on all ranks.
        state_bytes: weights, gradients and optimizer state of a rank.
        expected_bytes: an estimate of all that it holds at a time, activations too.
    """
    gpu = on_gpu()
    address, interface, problem = (None, None, None) if gpu else peer_address()
    several_hosts = place.world > int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    problems = [problem] if problem and several_hosts else []
    return Report(
        rank=place.rank, host=place.host, address=address, interface=interface, routable=routable_interface(),
        equal={**{name: _version(name) for name in PACKAGES}, **equal},
        memory_free=memory_free(), memory_needed=0 if gpu else state_bytes,
        device_free=accelerator().available_memory() if gpu else None, device_needed=state_bytes if gpu else 0,
        disk_free=shutil.disk_usage(_existing(run_dir)).free, disk_needed=checkpoint_bytes, clock=time.time(),
        expected=expected_bytes, problems=problems,
    )  # fmt: skip


def agree(report: Report, run_dir: Path, timeout: float) -> Verdict:
    """Compare the reports of all ranks, and whether all see rank 0's run folder; collective. The same on every rank.

    Raises:
        ParallelError: a rank did not report in time.
    """
    if supervision.current is None:
        report.clock = 0.0
        return judge([report])
    created: list[Path] = []

    def judge_reports(values: list[dict]) -> dict:
        reports = [Report(**value) for value in values]
        for other, arrived in zip(reports, cast(Server, supervision.current).arrivals(), strict=True):
            other.clock -= arrived
        verdict = judge(reports)
        if not verdict.problems:
            marker = run_dir / f".preflight-{secrets.token_hex(8)}"
            try:
                created.extend(_make(run_dir))
                marker.touch()
                verdict.marker = str(marker)
            except OSError as error:
                reason = error.strerror or error
                verdict.problems.append(f"logging.run_dir: rank 0 on {report.host} cannot write {run_dir}: {reason}")
        return asdict(verdict)

    def judge_sight(values: list[list]) -> list[str]:
        blind = [f"rank {rank} on {host}" for rank, host, sees in values if not sees]
        os.unlink(verdict.marker)
        for folder in reversed(created):
            folder.rmdir()
        if not blind:
            return []
        return [
            f"logging.run_dir: {', '.join(blind)} cannot see what rank 0 on {report.host} writes to {run_dir}; "
            "it must lie on a file system that all hosts share"
        ]

    verdict = Verdict(**supervision.current.consult(asdict(report), judge_reports, timeout))
    if verdict.marker is not None:
        sees = _appears(Path(verdict.marker))
        verdict.problems = supervision.current.consult([report.rank, report.host, sees], judge_sight, timeout)
    return verdict


def judge(reports: list[Report]) -> Verdict:
    """Compare the reports of all ranks, in rank order."""
    problems = [f"rank {report.rank} on {report.host}: {text}" for report in reports for text in report.problems]
    for name in reports[0].equal:
        problems.extend(_differences(name, reports))
    by_host: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        by_host[report.host].append(report)
    local = [report for report in reports if report.address and report.address.startswith(("127.", "::1"))]
    if len(by_host) > 1 and local:
        problems.append(_loopback(local))
    warnings = []
    for host, own in by_host.items():
        free, needed = min(report.memory_free for report in own), sum(report.memory_needed for report in own)
        expected = sum(report.expected for report in own if report.device_free is None)
        if needed > free:
            problems.append(f"{host}: {_gib(free)} of memory are free, and its {len(own)} ranks need {_gib(needed)}")
        elif expected > free:
            more = f"its {len(own)} ranks may need {_gib(expected)} with activations (dsmoe plan)"
            warnings.append(f"{host}: {_gib(free)} of memory are free, and {more}")
        for report in own:
            if report.device_free is None:
                continue
            if report.device_needed > report.device_free:
                memory = f"its GPU has {_gib(report.device_free)} free, and it needs {_gib(report.device_needed)}"
                problems.append(f"rank {report.rank} on {host}: {memory}")
            elif report.expected > report.device_free:
                more = f"it may need {_gib(report.expected)} with activations (dsmoe plan)"
                warnings.append(
                    f"rank {report.rank} on {host}: its GPU has {_gib(report.device_free)} free, and {more}"
                )
        clock = max((report.clock for report in own), key=abs)
        if abs(clock) > CLOCK_TOLERANCE:
            warnings.append(f"{host}: its clock is {abs(clock):.0f} s {'ahead of' if clock > 0 else 'behind'} rank 0's")
    writer = reports[0]
    if writer.disk_free < writer.disk_needed:
        warnings.append(
            f"{writer.host}: {_gib(writer.disk_free)} are free for the run folder, and a checkpoint takes "
            f"{_gib(writer.disk_needed)}"
        )
    return Verdict(problems, warnings, _table(by_host))


def _loopback(local: list[Report]) -> str:
    hosts = sorted({report.host for report in local})
    cure = f"GLOO_SOCKET_IFNAME={local[0].routable or 'INTERFACE'}"
    return (
        f"{', '.join(hosts)} would tell the other hosts the address {local[0].address}, which is their own. "
        f"Map the host's name to its own address in /etc/hosts (Debian maps it to 127.0.1.1), or set {cure} "
        f"(for pdsh, as a line of .deepspeed_env)"
    )


def _differences(name: str, reports: list[Report]) -> list[str]:
    by_value: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        by_value[report.equal.get(name, "nothing")].append(report)
    if len(by_value) == 1:
        return []
    shown = [f"{value} on {_ranks(own)}" for value, own in by_value.items()]
    return [f"{name} differs between ranks: {'; '.join(shown)}"]


def _ranks(reports: list[Report]) -> str:
    numbers = ", ".join(str(report.rank) for report in reports[:8]) + (", ..." if len(reports) > 8 else "")
    hosts = sorted({report.host for report in reports})
    return (
        f"rank{'s' if len(reports) > 1 else ''} {numbers} ({', '.join(hosts[:4])}{', ...' if len(hosts) > 4 else ''})"
    )


def _table(by_host: dict[str, list[Report]]) -> list[str]:
    rows = [["host", "ranks", "address", "memory free", "needed", "disk free", "clock"]]
    for host, own in by_host.items():
        first = own[0]
        ranks = f"{first.rank}-{own[-1].rank}" if len(own) > 1 else str(first.rank)
        address = f"{first.address} ({first.interface})" if first.interface else str(first.address or "-")
        free = min(report.device_free if report.device_free is not None else report.memory_free for report in own)
        on_host = sum(max(report.memory_needed, report.expected) for report in own)
        needed = on_host if own[0].device_free is None else max(max(r.device_needed, r.expected) for r in own)
        row = [host, ranks, address, _gib(free), _gib(needed), _gib(min(report.disk_free for report in own))]
        rows.append([*row, f"{first.clock:+.2f} s"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _make(folder: Path) -> list[Path]:
    """Make a folder; those that were not there before, outermost first."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return absent[::-1]


def _appears(path: Path) -> bool:
    until = time.monotonic() + MARKER_WAIT
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes NFS look again
    return True


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "nothing"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**27 else f"{size / 2**20:.0f} MiB"
