"""Fetches pictures by URL, with no way into the operator's own network.

The endpoint fetches from an allow-list only (`fetch`), ingest from any public host and from those
of a list (`fetch_public`).

An entry of the list is a host name (`images.example.org`), all subdomains of one (`.example.org`),
or a literal IP address (`10.0.0.5`, `[::1]`), each optionally with `:port`; without, only the
scheme's default port is allowed. A name must resolve to public addresses only (a single private one
refuses it), and the connection goes to the checked addresses, so that DNS cannot answer differently
later. A literal address may be private if the URL names it. Redirects pass the same checks.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.client import HTTPException
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal, NamedTuple
from urllib.parse import urljoin

from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.util import Url, parse_url

REDIRECTS = 3
"""Most redirects that are followed."""

CHUNK = 1 << 16
"""Bytes per read."""

PORTS = {"http": 80, "https": 443}
FORMS = "images.example.org, .example.org (its subdomains), 10.0.0.5 or [::1], each also with :port"

GLOBAL_UNICAST = ip_network("2000::/3")  # all IPv6 addresses that have been allocated
NAT64 = ip_network("64:ff9b::/96")  # maps IPv4 addresses for hosts that have only IPv6
# (some versions of) Python call these global, but they are: Azure's host agent, the IETF protocol
# assignments, which include other clouds' agents, and two retired IPv6-to-IPv4 tunnels
INTERNAL = [
    ip_network(net) for net in ("168.63.129.16", "192.0.0.0/24", "192.88.99.0/24", "2002::/16")
]

Kind = Literal["refused", "failed", "too_large", "timeout"]


class FetchError(Exception):
    """A URL that must not (`refused`) or cannot be fetched; the client may see its message."""

    def __init__(self, kind: Kind, reason: str, target: object = "", *, passes: bool = False):
        super().__init__(f"{target} {reason}" if target else reason)
        self.kind: Kind = kind
        self.reason = reason
        """What is wrong, without the name of the host."""
        self.passes = passes
        """Whether the same request may succeed later."""


class _Entry(NamedTuple):
    host: str | IPv4Address | IPv6Address
    is_suffix: bool
    port: int | None


class _Target(NamedTuple):
    scheme: str
    host: str | IPv4Address | IPv6Address
    port: int
    path: str

    def __str__(self) -> str:
        """As in the Host header, without path and query, which may hold secrets."""
        host = f"[{self.host}]" if isinstance(self.host, IPv6Address) else str(self.host)
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def check_allow_list(allow: Sequence[str]) -> None:
    """Raises ValueError, naming the entry and the accepted forms, if an entry has none of them."""
    for entry in allow:
        _read_entry(entry)


def fetch(
    url: str,
    allow: Sequence[str],
    max_bytes: int,
    timeout_s: float,
    count: Callable[[int], object] = lambda _: None,
) -> bytes:
    """The body at `url`, of at most `max_bytes` bytes; raises FetchError if there is none.

    `count` is told how many bytes have come each time that some have; what it raises ends the
    fetch.
    Blocks for at most `timeout_s` seconds, from DNS to the last byte. Uses no proxies and no
    credentials from the environment.
    """
    entries = [_read_entry(entry) for entry in allow]
    return _follow(url, lambda url, base: _check(url, base, entries), max_bytes, timeout_s, count)


def fetch_public(url: str, also: Sequence[str], max_bytes: int, timeout_s: float) -> bytes:
    """The body at `url`, on any host that has public addresses only, or on one of the list `also`;
    otherwise as `fetch`."""
    entries = [_read_entry(entry) for entry in also]

    def check(url: str, base: str) -> _Target:
        target = _read_target(url, base)
        if not _is_listed(target, entries) and not (
            isinstance(target.host, str) or _is_public(target.host)
        ):
            raise FetchError("refused", "is an address that is not public", target)
        return target

    return _follow(url, check, max_bytes, timeout_s, lambda _: None)


def _follow(
    url: str,
    check: Callable[[str, str], _Target],
    max_bytes: int,
    timeout_s: float,
    count: Callable[[int], object],
) -> bytes:
    """The body at `url` or where that redirects to; `check` refuses what must not be asked."""
    deadline = time.monotonic() + timeout_s
    target = check(url, "")
    for _ in range(REDIRECTS + 1):
        answer = _get(target, max_bytes, deadline, count)
        if isinstance(answer, bytes):
            return answer
        following = check(answer, f"{target.scheme}://{target}{target.path}")
        if (target.scheme, following.scheme) == ("https", "http"):
            raise FetchError("refused", "redirects from https to http", target)
        target = following
    raise FetchError("failed", f"redirects more than {REDIRECTS} times", target)


# Checks ---------------------------------------------------------------------------------------


def _read_entry(entry: str) -> _Entry:
    is_suffix = entry.startswith(".")
    try:
        url = parse_url(f"http://{entry.removeprefix('.')}")
        if url != Url("http", host=url.host, port=url.port) or url.port == 0:
            raise ValueError("more than a host and a port")
        host = _read_host(url.host)
        if is_suffix and not isinstance(host, str):
            raise ValueError("an address has no subdomains")
    except ValueError as error:
        raise ValueError(f"{entry!r} on the allow-list: {error}; give {FORMS}") from None
    return _Entry(host, is_suffix, url.port)


def _read_host(host: str | None) -> str | IPv4Address | IPv6Address:
    """A host from `parse_url` (lower case, IDNA) as an address, or a name without a final dot."""
    host = (host or "").removesuffix(".")
    if host.startswith("[") and "%" not in host:
        return IPv6Address(host[1:-1])
    labels = host.split(".")
    if len(host) > 253 or not all(re.fullmatch(r"[a-z0-9_-]{1,63}", label) for label in labels):
        raise ValueError("not a host name")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        return IPv4Address(host)  # refuses 127.1, 0x7f.1, 2130706433: addresses to some resolvers
    return host


def _check(url: str, base: str, entries: Sequence[_Entry]) -> _Target:
    target = _read_target(url, base)
    if not _is_listed(target, entries):
        raise FetchError("refused", "is not a host that pictures are fetched from", target)
    return target


def _is_listed(target: _Target, entries: Sequence[_Entry]) -> bool:
    for entry in entries:
        is_host = target.host == entry.host
        if entry.is_suffix:
            is_host = isinstance(target.host, str) and target.host.endswith(f".{entry.host}")
        if is_host and target.port == (entry.port or PORTS[target.scheme]):
            return True
    return False


def _read_target(url: str, base: str) -> _Target:
    try:
        if re.search(r"[\x00-\x1f\x7f\\]", url):  # some parsers drop these, others stop at them
            raise ValueError("a control character or a backslash")
        parts = parse_url(urljoin(base, url))
        if parts.scheme not in PORTS:
            raise FetchError("refused", "only URLs of http and https are fetched")
        host = _read_host(parts.host)
    except ValueError as error:
        raise FetchError("refused", "not a valid URL of http or https") from error
    port = PORTS[parts.scheme] if parts.port is None else parts.port
    target = _Target(parts.scheme, host, port, parts.request_uri)
    if parts.auth is not None:
        raise FetchError("refused", "a URL with user or password is not fetched", f"{target}:")
    return target


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped or address in NAT64:
            return _is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in GLOBAL_UNICAST:
            return False
    is_internal = any(address in network for network in INTERNAL)
    return address.is_global and not address.is_multicast and not is_internal


# Network --------------------------------------------------------------------------------------


def resolve(host: str) -> list[str]:
    """The addresses of a host, best first; raises OSError if it has none."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _remaining(deadline: float) -> float:
    """Seconds until the deadline; raises TimeoutError if none are left."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _addresses(host: str | IPv4Address | IPv6Address, deadline: float) -> list[str]:
    if not isinstance(host, str):
        return [str(host)]
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            answer.set_result(resolve(host))
        except Exception as error:
            answer.set_exception(error)

    # getaddrinfo has no timeout: an abandoned thread ends when the resolver gives up
    threading.Thread(target=ask, daemon=True).start()
    addresses = answer.result(_remaining(deadline))
    if not all(_is_public(ip_address(address)) for address in addresses):
        raise FetchError("refused", "has addresses that are not public", host)
    return addresses


@functools.cache  # as it reads all of the system's certificates
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(target: _Target, deadline: float) -> socket.socket:
    addresses = _addresses(target.host, deadline)
    for left in range(len(addresses), 0, -1):
        try:  # each gets a share of the time, so that one without an answer leaves some for others
            share = _remaining(deadline) / left
            sock = socket.create_connection((addresses[-left], target.port), share)
            break
        except OSError:
            if left == 1:
                raise
    if target.scheme == "http":
        return sock
    with sock:  # wrapping takes over its connection, so that closing it then does nothing
        sock.settimeout(_remaining(deadline))
        return _tls().wrap_socket(sock, server_hostname=str(target.host))


@contextlib.contextmanager
def _cut_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Ends the connection at the deadline; a socket's own timeout restarts with every byte."""

    def cut() -> None:
        with contextlib.suppress(OSError):  # it may have ended already
            # not SSLSocket.shutdown, which drops the TLS layer while another thread reads
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(_remaining(deadline), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _get(
    target: _Target, max_bytes: int, deadline: float, count: Callable[[int], object]
) -> bytes | str:
    """The body, or where `target` redirects to."""
    try:
        with _connect(target, deadline) as sock, _cut_at(deadline, sock):
            connection = HTTPConnection(str(target), timeout=_remaining(deadline))
            connection.sock, connection.auto_open = sock, 0  # it must not reconnect by itself
            headers = {"Host": str(target), "User-Agent": "caption-ray"}
            headers["Accept-Encoding"] = "identity"
            connection.request(
                "GET", target.path, headers=headers, preload_content=False, decode_content=False
            )
            with connection.getresponse() as response:
                location = response.get_redirect_location()
                if location:
                    return location
                if response.status != 200:
                    busy = response.status in (408, 429) or response.status >= 500
                    reason = f"answers {response.status}"
                    raise FetchError("failed", reason, target, passes=busy)
                too_large = FetchError("too_large", f"sends more than {max_bytes} bytes", target)
                if (response.length_remaining or 0) > max_bytes:
                    raise too_large
                body = bytearray()
                # not stream(), which accepts chunk headers of any length
                while chunk := response.read(CHUNK, decode_content=False):
                    count(len(chunk))
                    body += chunk
                    if len(body) > max_bytes:
                        raise too_large
                    _remaining(deadline)
                _remaining(deadline)  # without a length, a body cut off by us looks complete
                return bytes(body)
    except ssl.SSLCertVerificationError as error:
        reason = f"has no valid certificate: {error.verify_message}"
        raise FetchError("failed", reason, target) from error
    except socket.gaierror as error:
        raise FetchError(
            "failed", "has no address that is known", target, passes=error.errno == socket.EAI_AGAIN
        ) from error
    except (OSError, HTTPException, HTTPError, FutureTimeoutError) as error:
        timeouts = (TimeoutError, ReadTimeoutError, FutureTimeoutError)
        if isinstance(error, timeouts) or time.monotonic() >= deadline:
            raise FetchError("timeout", "does not answer in time", target, passes=True) from error
        reason = "cannot be reached or broke off"
        raise FetchError("failed", reason, target, passes=True) from error
