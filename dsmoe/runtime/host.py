"""What a rank finds on its host: addresses, interfaces, free memory."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

import psutil

SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def peer_address() -> tuple[str | None, str | None, str | None]:
    """The address that gloo tells other ranks, its interface, and what is wrong, as far as it can be known here.

    torch takes GLOO_SOCKET_IFNAME's first interface, else what the host's name resolves to, else the loopback.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    addresses = interface_addresses()
    if chosen:
        if chosen not in addresses:
            known = ", ".join(sorted(addresses))
            return None, chosen, f"GLOO_SOCKET_IFNAME: found no interface {chosen} with an address (there are: {known})"
        return addresses[chosen], chosen, None
    address = "127.0.0.1"
    try:
        for family, kind, protocol, _, target in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind((target[0], 0))
            address = str(target[0])
            break
    except OSError:  # a name that nothing resolves, or another host's address
        pass
    interface = next((name for name, known in addresses.items() if known == address), None)
    return address, interface, None


def interface_addresses() -> dict[str, str]:
    """IPv4 address of each network interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def routable_interface() -> str | None:
    """An interface whose address is not the loopback's."""
    return next((name for name, address in interface_addresses().items() if not address.startswith("127.")), None)


def memory_free() -> int:
    """Bytes that processes of this host can still get: of the machine, or of its container where that is less."""
    free = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(cached.get("file", 0)))
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return free
