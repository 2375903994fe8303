"""Lines of JSON between two processes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

LONGEST = 1 << 24  # bytes of a message


class Connection:
    """Lines of JSON over a socket."""

    def __init__(self, sock: socket.socket):
        self.sock, self._buffer, self._lock = sock, b"", threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(2.0)

    def send(self, **message: Any) -> None:
        """What cannot be sent is lost: whoever does not read is noticed by its silence."""
        with self._lock:
            with contextlib.suppress(OSError):
                self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None at the end of the connection."""
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > LONGEST:
            return None
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):  # none of ours
            return None


def listen() -> socket.socket:
    """On all addresses of this host, of both families."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError:  # IPv6 compiled in and switched off
            pass
    return socket.create_server(("", 0), backlog=1024)
