"""Hosts with their own addresses on one machine: network namespaces around one switch.

Each host is a network namespace whose `eth0` is one end of a cable (a veth pair); the other end is
in the namespace of the switch (a bridge). They have no route out: what runs there sees only the
other hosts. A host can be cut off, killed and restarted, as a machine in a rack can.
Needs Linux, root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

PREFIX = "caption-ray"
SUBNET = "10.83.0"
CLONE_NEWNET = 0x40000000
STOP_SECONDS = 10.0

T = TypeVar("T")


def why_unavailable() -> str | None:
    """Why hosts cannot be created here, and the remedy; None if they can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root: run the tests as root, in a container say"
    if shutil.which("ip") is None:
        return "no `ip` command: install iproute2"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    bridge = ["-n", probe, "link", "add", "name", "probe", "type", "bridge"]
    for command in (["netns", "add", probe], bridge):
        tried = subprocess.run(["ip", *command], capture_output=True, text=True)
        if tried.returncode:
            _delete(probe)
            return f"`ip {' '.join(command)}` is refused here: {tried.stderr.strip()}"
    _delete(probe)
    return None


class Host:
    """One host; everything that `start` runs there belongs to it."""

    def __init__(self, switch: str, name: str, number: int, log_folder: Path) -> None:
        self.name, self.address = name, f"{SUBNET}.{number}"
        self.namespace = f"{PREFIX}-{os.getpid()}-{name}"
        self._switch, self._port, self._logs = switch, f"port{number}", log_folder
        _ip("netns", "add", self.namespace)
        _ip("-n", switch, "link", "add", self._port, "type", "veth",
            "peer", "name", "eth0", "netns", self.namespace)  # fmt: skip
        _ip("-n", switch, "link", "set", self._port, "master", "switch", "up")
        _ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self.namespace, "link", "set", device, "up")
        # leads nowhere, but processes look up their route out to learn their own address
        _ip("-n", self.namespace, "route", "add", "default", "dev", "eth0")

    def command(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def start(self, *command: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Run a command there in the background; its output goes into the host's log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command(*command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self._logs / f"{self.name}.log"

    def cut(self) -> None:
        """Pull the cable: packets are lost without notice to either side."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def restore(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def kill(self) -> None:
        """Power off: SIGKILL to every process of the host at once."""
        _kill(self.namespace)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function of this process with the host's network."""
        # a thread may be in another network namespace than the rest of its process
        with ThreadPoolExecutor(1, initializer=self._enter) as thread:
            return thread.submit(function, *arguments).result()

    def _enter(self) -> None:
        with open(f"/run/netns/{self.namespace}") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")


@contextmanager
def hosts(names: Sequence[str], log_folder: Path) -> Iterator[dict[str, Host]]:
    """Named hosts on one switch, with nothing running; at the end all their processes are killed.

    Hosts left behind by an earlier process that was killed are removed first.
    """
    _sweep()
    switch = f"{PREFIX}-{os.getpid()}-switch"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        yield {name: Host(switch, name, n, log_folder) for n, name in enumerate(names, 1)}
    finally:
        for namespace in _namespaces():
            if _owner(namespace) == os.getpid():
                _delete(namespace)


class RayHost:
    """A node of a Ray cluster on a host of its own: `ray start --block`."""

    def __init__(
        self, host: Host, environment: Mapping[str, str], head: str | None, *options: str
    ) -> None:
        self.host, self.head = host, head or f"{host.address}:6379"
        self.environment = {
            **environment,
            "RAY_ADDRESS": self.head,
            # otherwise gloo binds to the address of the machine's name, which is none of the hosts'
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        self._is_head, self._options = head is None, options
        self._folders: list[str] = []

    def start(self) -> None:
        """Start Ray there; `process` lasts as long as the node, and SIGTERM drains it."""
        where = ["--head", "--port=6379"] if self._is_head else [f"--address={self.head}"]
        self.process = self.host.start(
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where,
            *self.options(), environment=self.environment,
        )  # fmt: skip

    def options(self) -> list[str]:
        """Options of `ray start` for the next start on this host."""
        # short, as sockets' paths are limited; new each time, as a restarted node is a new node
        self._folders.append(tempfile.mkdtemp(prefix="cr-", dir="/tmp"))
        address, folder = self.host.address, self._folders[-1]
        return [f"--node-ip-address={address}", f"--temp-dir={folder}", *self._options]

    def stop(self) -> None:
        """Power off, and remove its files."""
        self.host.kill()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)


def _ip(*arguments: str) -> str:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def _namespaces() -> list[str]:
    listed = (line.split()[0] for line in _ip("netns", "list").splitlines() if line)
    return [name for name in listed if name.startswith(f"{PREFIX}-")]


def _owner(namespace: str) -> int:
    return int(namespace.removeprefix(f"{PREFIX}-").partition("-")[0])


def _sweep() -> None:
    """Remove the hosts of processes that no longer exist."""
    for namespace in _namespaces():
        if not Path(f"/proc/{_owner(namespace)}").exists():
            _delete(namespace)


def _kill(namespace: str) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while pids := _ip("netns", "pids", namespace).split():
        for pid in map(int, pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise RuntimeError(f"{namespace}: processes {pids} survive SIGKILL")
        time.sleep(0.05)


def _delete(namespace: str) -> None:
    if Path(f"/run/netns/{namespace}").exists():
        _kill(namespace)
        _ip("netns", "delete", namespace)
