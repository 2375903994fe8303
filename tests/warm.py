"""Commands in processes that have the libraries loaded already, forked from a server.

Importing torch, DeepSpeed and Megatron-Core is most of what a short job costs. `serve` makes a process of forked.py's
server a server of its own, inside the namespaces of a host (tests/nodes) if need be. A command that meets it
(`hand_over`) sends its arguments, environment and files there and becomes a go-between: it passes signals on and leaves
as the forked process left; when it is killed, so is the forked process. Launchers, supervisors and tests see an
ordinary command. Where no server is, nothing changes.

    python warm.py SCRIPT ARGUMENTS        or -m MODULE
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path

NAME = "DSMOE_TEST_SERVER"  # in the environment: another than this one
ADDRESS = "dsmoe warm"  # an abstract name: each network namespace has its own
NAMESPACES = ("net", "uts", "ipc", "mnt", "pid")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_in_forked_process = False


def hand_over(arguments: list[str]) -> None:
    """Let this host's server run `python ARGUMENTS`, and leave as it does. Returns if it must be run here."""
    if _in_forked_process:
        return
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect("\0" + os.environ.get(NAME, ADDRESS))
        except OSError:
            return
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: server.send(bytes([number])))
        files = [file for file in _open_files() if file != server.fileno()]
        request = json.dumps([files, arguments, dict(os.environ), os.getcwd()]).encode()
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


def _open_files() -> list[int]:
    """Those that this process was started with."""
    files = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder itself
            os.fstat(int(name))
            files.append(int(name))
    return sorted(files)


def serve(address: str = ADDRESS, first_process: str | None = None):
    """Start a server; returns, when it listens, an object that it lives as long as.

    Args:
        first_process: of the host that it is to run on, as the machine counts.
    """
    from forked import context

    ours, theirs = context.Pipe()
    process = context.Process(target=_leave_a_server, args=(address, first_process, theirs))
    process.start()
    theirs.close()
    ours.recv()
    process.join()
    return ours


def _leave_a_server(address: str, first_process: str | None, owner) -> None:
    """Move into a host's namespaces and leave a server there."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = NAMESPACES if first_process else ()
    spaces = [open(f"/proc/{first_process}/ns/{name}") for name in names]  # noqa: SIM115
    for space in spaces:
        if libc.setns(space.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns {space.name}")
    if os.fork() == 0:  # a namespace of processes is for children
        _Server(address, owner).run()


class _Server:
    """Answers `hand_over`."""

    def __init__(self, address: str, owner):
        import inspect

        import torch.distributed.run  # noqa: F401  (for agents)

        from dsmoe.runtime import supervisor

        here = str(Path(__file__).parent)
        agent = f"warm.hand_over(['-c', {supervisor.AGENT!r}, *sys.argv[1:]])"
        supervisor.AGENT = f"import sys; sys.path.insert(0, {here!r}); import warm; {agent}"
        inspect.stack()  # which an agent asks for; the first time it looks at every module there is
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0" + address)
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._children: dict[int, socket.socket] = {}  # by process file descriptor
        self._selector.register(owner, selectors.EVENT_READ, lambda _: os._exit(0))  # it is gone
        owner.send(True)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        request, files, *_ = socket.recv_fds(connection, 4, 100)
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


def _become(files: list[int], numbers: list[int], arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    """Be the process that the arguments of `python` describe, with `files` as these numbers."""
    from commands import run_in_this_process

    global _in_forked_process
    _in_forked_process = True
    os.setsid()
    files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 200) for file in files]  # out of the way
    for number, file in zip(numbers, files, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (multiprocessing has put another in its place)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    run_in_this_process(arguments, environment, cwd)


def main(command: list[str]) -> None:
    """`python COMMAND`, on the server if there is one and it is a module or script."""
    wanted = command[1:] if command[:1] == ["-u"] else command
    if wanted and (wanted[0] == "-m" or wanted[0].endswith(("torchrun", "deepspeed", ".py"))):
        hand_over(wanted)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
