"""Whether somebody else answers at the endpoint's port as well.

Ray's proxies open their port in a way (SO_REUSEPORT) that lets others open it, too. So a second
`serve run` on the machine starts without a complaint, and the system deals out the calls: half of
them reach the other application, which may not even ask for a token. `app.py` and `ingress.py` ask
here before they serve.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil


class PortTakenError(ValueError):
    """Another process answers at the port already."""


class Listener(NamedTuple):
    """A process that listens at a port."""

    pid: int | None
    """None for a process of another user."""
    name: str
    since: float
    """When it was started, in seconds since 1970; 0 if that cannot be seen."""
    is_own: bool


def listeners(port: int, own: int) -> list[Listener]:
    """Who listens at a TCP port of this machine; processes below the process `own` are our own."""
    found = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            found[connection.pid] = _listener(connection.pid, own)
    return list(found.values())


def _listener(pid: int | None, own: int) -> Listener:
    try:
        process = psutil.Process(pid) if pid else None
        if process is not None:
            is_own = own in (parent.pid for parent in process.parents())
            return Listener(pid, process.name(), process.create_time(), is_own)
    except psutil.Error:
        pass
    return Listener(pid, "of another user", 0.0, False)


def require_alone(port: int, own: int) -> None:
    """Raise PortTakenError if a process that is not below the process `own` was at the port first:
    whoever was there first stays, and the other must not start."""
    found = listeners(port, own)
    since = min((one.since for one in found if one.is_own), default=time.time())
    for other in found:
        if not other.is_own and other.since < since:
            started = f", started {time.ctime(other.since)}" if other.since else ""
            raise PortTakenError(
                f"port {port} of this machine is taken: process {other.pid or '?'} ({other.name}"
                f"{started}) answers there, and calls would reach either of the two by chance; "
                "end it (serve shutdown, where it is Ray's), or give http_options another port"
            )
