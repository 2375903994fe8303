"""Commands of a host in processes that have the libraries loaded already, forked from a server that runs on it.

Importing torch, DeepSpeed and Megatron-Core is most of what a short job costs. `serve` puts a process of
tests/forked.py's server into a host's namespaces. A command that meets it (`hand_over`) sends its arguments,
environment and files there and becomes a go-between: it passes signals on and leaves as the forked process left; when
it is killed, so is the forked process. Launchers, supervisor and tests see an ordinary command. Where no server is,
nothing changes.

    python warm.py SCRIPT ARGUMENTS        or -c PROGRAM
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path

ADDRESS = "\0dsmoe warm"  # an abstract name: each network namespace has its own
NAMESPACES = ("net", "uts", "ipc", "mnt", "pid")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_in_forked_process = False


def hand_over(arguments: list[str]) -> None:
    """Let this host's server run `python ARGUMENTS`, and leave as it does. Returns if it must be run here."""
    if _in_forked_process:
        return
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(ADDRESS)
        except OSError:
            return
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: server.send(bytes([number])))
        request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
        files = [0, 1, 2]
        socket.send_fds(server, [struct.pack("<i", len(request))], files)
        server.sendall(request)
        for file in files:
            os.close(file)  # whoever reads them waits for the forked process alone
        answer = server.recv(4)
    (code,) = struct.unpack("<i", answer) if len(answer) == 4 else (-signal.SIGKILL,)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(first_process: str) -> None:
    """Start a host's server; returns when it listens.

    Args:
        first_process: of the host, as the machine counts.
    """
    from forked import context

    ready, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_enter, args=(first_process, theirs))
    process.start()
    theirs.close()
    ready.recv()
    process.join()


def _enter(first_process: str, ready) -> None:
    """Move into the host's namespaces and leave a server there."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [open(f"/proc/{first_process}/ns/{name}") for name in NAMESPACES]  # noqa: SIM115
    for space in spaces:
        if libc.setns(space.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns {space.name}")
    if os.fork() == 0:  # a namespace of processes is for children
        _Server(ready).run()


class _Server:
    """Answers `hand_over`."""

    def __init__(self, ready):
        import inspect

        import torch.distributed.run  # noqa: F401  (for agents)

        from dsmoe.runtime import supervisor

        here = str(Path(__file__).parent)
        agent = f"warm.main(['-c', {supervisor.AGENT!r}, *sys.argv[1:]])"
        supervisor.AGENT = f"import sys; sys.path.insert(0, {here!r}); import warm; {agent}"
        inspect.stack()  # which an agent asks for; the first time it looks at every module there is
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(ADDRESS)
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._children: dict[int, socket.socket] = {}  # by process file descriptor
        ready.send(True)
        ready.close()

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        request, files, *_ = socket.recv_fds(connection, 4, 3)
        (size,) = struct.unpack("<i", request)
        text = b""
        while len(text) < size:
            text += connection.recv(size - len(text))
        pid = os.fork()
        if pid == 0:
            for other in (*self._children.values(), connection, listener):
                other.close()
            self._selector.close()
            _become(files, *json.loads(text))
        for file in files:
            os.close(file)
        process = os.pidfd_open(pid)
        self._children[process] = connection
        self._selector.register(connection, selectors.EVENT_READ, lambda _: self._pass_on(connection, process))
        self._selector.register(process, selectors.EVENT_READ, lambda _: self._ended(connection, process, pid))

    def _pass_on(self, connection: socket.socket, process: int) -> None:
        if connection.fileno() < 0:  # it has just ended
            return
        try:
            numbers = connection.recv(16)
        except ConnectionError:
            numbers = b""
        for number in numbers or [signal.SIGKILL]:
            signal.pidfd_send_signal(process, number)
        if not numbers:  # whoever asked for it was killed
            self._selector.unregister(connection)

    def _ended(self, connection: socket.socket, process: int, pid: int) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._selector.unregister(process)
        if connection.fileno() in self._selector.get_map():
            self._selector.unregister(connection)
        del self._children[process]
        os.close(process)
        with contextlib.suppress(OSError):
            connection.send(struct.pack("<i", code))
        connection.close()


def _become(files: list[int], arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    """Be the process that the arguments of `python` describe."""
    from commands import run_in_this_process

    global _in_forked_process
    _in_forked_process = True
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    run_in_this_process(arguments, environment, cwd)


def main(command: list[str]) -> None:
    """`python COMMAND`, on the host's server if there is one."""
    hand_over(command)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
