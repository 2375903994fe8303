"""Two hosts on one machine, for tests of several machines.

A host is a set of namespaces (network, processes, mounts, host name) with its own hosts file and sshd. A veth pair
joins the two. Nothing outside the namespaces changes but `/etc/netns/NAME`, which `ip netns exec` lays over /etc
inside, and `/run/sshd`. Both hosts see the machine's files; `hide` lays an empty folder over one of them on one host.

Processes need namespaces of their own because DeepSpeed's pdsh runner ends a job with `pkill -f`, which would reach
every deepspeed job of the machine.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where a script is started that is not a test
import warm

NAMES = ("nodeA", "nodeB")
ADDRESSES = {"nodeA": "10.77.7.1", "nodeB": "10.77.7.2"}
PACKAGES = "openssh-server openssh-client pdsh iproute2 nftables"
TOOLS = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "pdsh", "nft", "nsenter", "unshare")
_numbers = itertools.count()

SSHD_CONFIG = """HostKey /etc/ssh/hostkey
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
SSH_CONFIG = "Host *\n  IdentityFile /etc/ssh/key\n  BatchMode yes\n  ConnectTimeout 5\n"
HOSTS_FILE = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())


def unavailable() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if not sys.platform.startswith("linux"):
        return "two hosts on one machine need Linux's namespaces"
    if os.geteuid() != 0:
        return "two hosts on one machine need root"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(absent)} not installed: apt-get install {PACKAGES}"
    allowed = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True)
    if allowed.returncode:
        return f"no new namespaces here: {allowed.stderr.decode().strip()}"
    return None


class Hosts:
    """A pair of hosts; a context manager that removes them with all their processes.

    Args:
        folder: an empty folder for keys and logs of sshd.
        loaded: run commands that ask for it in processes that have the libraries loaded (tests/warm.py).
    """

    def __init__(self, folder: Path, loaded: bool = False):
        self.folder, self.loaded = folder, loaded
        self._tag = f"dsmoe{os.getpid()}x{next(_numbers)}"
        self._sshd: dict[str, subprocess.Popen] = {}
        self._servers: dict[str, object] = {}

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    def _build(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("key", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        for name in NAMES:
            _run("ip", "netns", "add", self._space(name))
        ends = [("netns", self._space(name)) for name in NAMES]
        _run("ip", "link", "add", "eth0", *ends[0], "type", "veth", "peer", "name", "eth0", *ends[1])
        for name in NAMES:
            space = self._space(name)
            for settings in ("link set lo up", f"addr add {ADDRESSES[name]}/24 dev eth0", "link set eth0 up"):
                _run("ip", "-n", space, *settings.split())
            self._write_etc(name)
            self.boot(name)

    def boot(self, name: str) -> None:
        """Start a host's sshd, which is its process 1."""
        command = ["ip", "netns", "exec", self._space(name), "unshare", "--uts", "--pid", "--mount", "--ipc", "--fork"]
        command += ["--kill-child", "--mount-proc", "sh", "-c", f"hostname {name}; exec /usr/sbin/sshd -D -e"]
        with open(self.folder / f"{name}.sshd.log", "w") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._sshd[name] = process
        until = time.monotonic() + 20
        while subprocess.run(self.command(name, "ssh", "-q", name, "true"), capture_output=True).returncode:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{name} does not answer: {(self.folder / f'{name}.sshd.log').read_text()}")
            time.sleep(0.05)
        if self.loaded:
            self._servers[name] = warm.serve(first_process=self._first_process(name))

    def power_off(self, name: str) -> None:
        """End a host's process 1 and with it all its processes."""
        process = self._sshd.pop(name)
        process.kill()  # unshare --kill-child: the kernel ends the host's processes with it
        process.wait()

    def remove(self) -> None:
        for name in NAMES:
            if name in self._sshd:
                self.power_off(name)
            self._servers.pop(name, None)
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
            shutil.rmtree(self._etc(name), ignore_errors=True)

    def command(self, name: str, *arguments: str) -> list[str]:
        """The command line that runs `arguments` on a host."""
        if name not in self._sshd:
            return ["false"]
        return ["nsenter", "--target", self._first_process(name), "--all", f"--wd={os.getcwd()}", "--", *arguments]

    def _first_process(self, name: str) -> str:
        """Of a host, as the machine counts."""
        children = Path(f"/proc/{self._sshd[name].pid}/task/{self._sshd[name].pid}/children")
        return (children.read_text().split() or ["-1"])[0] if children.exists() else "-1"

    def path(self, name: str, path: Path) -> Path:
        """A path as a host sees it, with what is mounted there."""
        return Path(f"/proc/{self._first_process(name)}/root{path}")

    def run(self, name: str, *arguments: str) -> str:
        """Run a short command on a host; its output. Raises `CalledProcessError`."""
        return _run(*self.command(name, *arguments))

    def processes(self, name: str, text: str) -> list[int]:
        """Process ids, as the machine counts them, of a host's processes with `text` in the command line."""
        space = os.stat(f"/run/netns/{self._space(name)}").st_ino
        actual = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.stat(folder / "ns" / "net").st_ino == space and text in (folder / "cmdline").read_text():
                    actual.append(int(folder.name))
            except OSError:  # gone
                continue
        return sorted(actual)

    def kill(self, name: str, text: str, number: int = signal.SIGKILL, but: str | None = None) -> None:
        """Send a signal to all of a host's processes with `text` in the command line, and not `but`."""
        spared = self.processes(name, but) if but else []
        for pid in self.processes(name, text):
            if pid not in spared:
                os.kill(pid, number)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """No packet passes between the hosts, and none is answered."""
        _run("ip", "-n", self._space("nodeB"), "link", "set", "eth0", "down")
        try:
            yield
        finally:
            _run("ip", "-n", self._space("nodeB"), "link", "set", "eth0", "up")

    @contextmanager
    def slow(self, rate: str) -> Iterator[None]:
        """So many bits a second from each host to the other, such as 100mbit."""
        limit = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
        for name in NAMES:
            self.run(name, "tc", "qdisc", "add", "dev", "eth0", "root", *limit)
        try:
            yield
        finally:
            for name in NAMES:
                self.run(name, "tc", "qdisc", "del", "dev", "eth0", "root")

    @contextmanager
    def lossy(self, percent: int) -> Iterator[None]:
        """So many of the packets that reach a host from the other are dropped, by chance."""
        chain = "add table inet lossy; add chain inet lossy input { type filter hook input priority 0; }"
        drop = f"add rule inet lossy input iifname eth0 numgen random mod 100 < {percent} drop"
        for name in NAMES:
            self.run(name, "nft", f"{chain}; {drop}")
        try:
            yield
        finally:
            for name in NAMES:
                self.run(name, "nft", "delete table inet lossy")

    @contextmanager
    def hide(self, name: str, folder: Path, size: str = "50%") -> Iterator[None]:
        """An empty disk of that size in the place of a folder, on one host."""
        self.run(name, "mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder))
        try:
            yield
        finally:
            self.run(name, "umount", "--lazy", str(folder))

    @contextmanager
    def hosts_file(self, name: str, text: str) -> Iterator[None]:
        """Another /etc/hosts on one host."""
        path = self._etc(name) / "hosts"
        before = path.read_text()
        path.write_text(text)  # in place: the file is bind-mounted
        try:
            yield
        finally:
            path.write_text(before)

    def _write_etc(self, name: str) -> None:
        ssh = self._etc(name) / "ssh"
        ssh.mkdir(parents=True)
        for key in ("key", "hostkey", "hostkey.pub"):
            shutil.copy(self.folder / key, ssh)
        shutil.copy(self.folder / "key.pub", ssh / "authorized_keys")
        host_key = " ".join((self.folder / "hostkey.pub").read_text().split()[:2])
        (ssh / "ssh_known_hosts").write_text("".join(f"{host} {host_key}\n" for host in NAMES))
        (ssh / "ssh_config").write_text(SSH_CONFIG)
        (ssh / "sshd_config").write_text(SSHD_CONFIG)
        (self._etc(name) / "hosts").write_text(HOSTS_FILE)
        (self._etc(name) / "hostname").write_text(name + "\n")

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _etc(self, name: str) -> Path:
        return Path("/etc/netns") / self._space(name)


def _run(*command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
