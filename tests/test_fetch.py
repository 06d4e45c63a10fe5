"""Fetching pictures by URL: real servers on this machine, and a fake resolver of names."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caption_ray import fetch as module
from caption_ray.fetch import FetchError, check_allow_list, fetch, fetch_public

PICTURE = bytes(range(256)) * 400
PUBLIC, OTHER_PUBLIC = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
CONNECT = socket.create_connection

Answer = Callable[[BaseHTTPRequestHandler], None]


def send(
    handler: BaseHTTPRequestHandler, body: bytes = PICTURE, status: int = 200, **headers: str
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler: BaseHTTPRequestHandler, head: bytes, drops: bytes) -> None:
    """Send `head`, then `drops` repeatedly, too fast for a timeout between bytes."""
    handler.wfile.write(head)
    for _ in range(100):
        handler.wfile.write(drops)
        time.sleep(0.05)


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[SimpleNamespace]:
    """A server: `answers` are functions by path, `/` is the picture; `seen` are the requests."""
    answers: dict[str, Answer] = {"/": send}
    seen: list[SimpleNamespace] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            seen.append(SimpleNamespace(path=self.path, headers=dict(self.headers)))
            with contextlib.suppress(OSError):  # the client may disconnect once it has enough
                answers[self.path](self)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        # the threads do the handshake: here it would block the one that accepts connections
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    host = f"127.0.0.1:{server.server_port}"
    scheme = "https" if tls else "http"
    yield SimpleNamespace(
        answers=answers, seen=seen, host=host, url=f"{scheme}://{host}", port=server.server_port
    )
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def web() -> Iterator[SimpleNamespace]:
    with serving() as server:
        yield server


class Names:
    """A fake resolver: successive `answers` by name, the last repeats; `asked` are the queries."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []
        self.connected: list[tuple[str, int]] = []

    def resolve(self, host: str) -> list[str]:
        self.asked.append(host)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self.answers[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, web: SimpleNamespace) -> Names:
    """The fake resolver, and a network in which every address leads to `web`, or another `port`."""
    names = Names(web.port)

    def connect(address: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
        names.connected.append(address)
        return CONNECT(("127.0.0.1", names.port), *rest, **options)

    monkeypatch.setattr(module, "resolve", names.resolve)
    monkeypatch.setattr(module.socket, "create_connection", connect)
    return names


def get(url: str, *allow: str, max_bytes: int = 1_000_000, timeout_s: float = 20.0) -> bytes:
    return fetch(url, allow, max_bytes, timeout_s)


def failure(url: str, *allow: str, **options: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        get(url, *allow, **options)
    return caught.value


# The allow-list -------------------------------------------------------------------------------


def test_every_form_of_entry_is_accepted():
    check_allow_list(
        ["images.example.org", ".example.org", "Images.Example.org.", "images.example.org:8080",
         ".example.org:8443", "10.0.0.5", "10.0.0.5:8080", "[::1]", "[fd00::5]:8080",
         "bücher.example", "minio"]
    )  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    ["", ".", "*", "*.example.org", "..example.org", "http://example.org", "example.org/pictures",
     "user@example.org", "example.org?a", "example.org#a", "example.org:0", "example.org:http",
     "example.org:99999", "a b", "example..org", "10.0.0.0/8", "127.1", "2130706433", "0x7f.1",
     "010.0.0.5", "10.0.0.256", ".0.0.5", ".[::1]", "::1", "[::1", "[::1%25eth0]", "a,b",
     "a" * 64, ".".join(["a" * 60] * 5)],
)  # fmt: skip
def test_an_entry_of_another_form_is_an_error_that_names_it_and_the_forms(entry):
    with pytest.raises(ValueError) as caught:
        check_allow_list(["example.org", entry])
    assert repr(entry) in str(caught.value)
    assert ".example.org (its subdomains), 10.0.0.5 or [::1]" in str(caught.value)


def test_an_empty_list_allows_nothing(web):
    assert failure(web.url).kind == "refused"
    assert not web.seen


@pytest.mark.parametrize(
    "url",
    ["http://images.example.org/", "http://images.example.org", "HTTP://Images.EXAMPLE.org./",
     "http://images.example.org:80/", "http://images.example.org:/"],
)  # fmt: skip
def test_a_name_is_compared_without_case_final_dot_and_default_port(names, web, url):
    names.answers["images.example.org"] = [[PUBLIC]]
    assert get(url, "images.example.org") == PICTURE
    assert names.connected == [(PUBLIC, 80)]
    assert web.seen[0].headers["Host"] == "images.example.org"


def test_a_name_of_other_letters_is_compared_as_dns_writes_it(names):
    names.answers["xn--bcher-kva.example"] = [[PUBLIC]]
    assert get("http://BÜCHER.example/", "xn--bcher-kva.example") == PICTURE
    assert get("http://xn--bcher-kva.example/", "bücher.example") == PICTURE


@pytest.mark.parametrize("host", ["a.example.org", "a.b.example.org", "A.Example.Org."])
def test_a_suffix_allows_all_subdomains(names, host):
    names.answers[host.lower().rstrip(".")] = [[PUBLIC]]
    assert get(f"http://{host}/", ".example.org") == PICTURE


@pytest.mark.parametrize(
    "host",
    ["example.org", "evilexample.org", "example.org.evil.com", "a.example.org.evil.com",
     "evil.com", "a.example.orgg", "example.org%2eevil.com",
     "evil.com%00.example.org", "a%2fexample.org", "evil.com%23.example.org",
     "evil.com#.example.org", "evil.com?.example.org", "evil.com\\.example.org",
     "evil.com/.example.org", ".example.org", "..example.org", "[::1].example.org"],
)  # fmt: skip
def test_a_suffix_allows_nothing_else(names, host):
    assert failure(f"http://{host}/", ".example.org").kind == "refused"
    assert names.asked == names.connected == []


@pytest.mark.parametrize(
    ("url", "entry", "allowed"),
    [
        ("http://a.org/", "a.org", True),
        ("http://a.org:8080/", "a.org", False),
        ("http://a.org:443/", "a.org", False),
        ("https://a.org:80/", "a.org", False),
        ("http://a.org:8080/", "a.org:8080", True),
        ("http://a.org/", "a.org:8080", False),
        ("http://b.a.org:8080/", ".a.org:8080", True),
        ("http://b.a.org:8081/", ".a.org:8080", False),
        ("http://10.0.0.5:22/", "10.0.0.5", False),
        ("http://10.0.0.5:22/", "10.0.0.5:80", False),
        ("http://a.org:0/", "a.org", False),
    ],
)
def test_only_the_port_of_the_entry_or_of_the_scheme_is_allowed(names, url, entry, allowed):
    names.answers = {"a.org": [[PUBLIC]], "b.a.org": [[PUBLIC]]}
    if allowed:
        assert get(url, entry) == PICTURE
    else:
        assert failure(url, entry).kind == "refused"
        assert not names.connected


def test_a_listed_private_address_is_allowed_to_a_url_that_names_it(web):
    assert get(f"{web.url}/", web.host) == PICTURE


def test_a_listed_ipv6_address_is_compared_as_a_number(names, web):
    assert get("http://[0:0::0:1]:8080/", "[::1]:8080") == PICTURE
    assert names.connected == [("::1", 8080)]
    assert web.seen[0].headers["Host"] == "[::1]:8080"


def test_a_listed_private_address_does_not_allow_names_that_lead_to_it(names):
    names.answers["images.example.org"] = [["10.0.0.5"]]
    error = failure("http://images.example.org/", "10.0.0.5", "images.example.org")
    assert error.kind == "refused"
    assert not names.connected


@pytest.mark.parametrize("host", [PUBLIC, "127.0.0.1", "[::1]", "[::ffff:10.0.0.5]"])
def test_an_address_that_is_not_listed_is_refused(names, host):
    assert failure(f"http://{host}/", "images.example.org", ".org", "10.0.0.5").kind == "refused"
    assert not names.connected


# The URL --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0x7F.1", "0177.0.0.1", "127.1", "127.0.1", "017700000001",
     "127.0.0.1.", "127.0.0.01", "0x7f.0x0.0x0.0x1", "1.0x", "１２７.0.0.1", "①②⑦.0.0.1",
     "127。0。0。1", "[::127.0.0.1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::1%25lo]"],
)  # fmt: skip
def test_other_spellings_of_an_address_are_neither_names_nor_listed(names, host):
    error = failure(f"http://{host}/", "images.example.org", "127.0.0.2")
    assert error.kind == "refused"
    assert names.asked == names.connected == []


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://a.org/", "gopher://a.org/", "data:image/png;base64,AA",
     "//a.org/", "a.org", "a.org/picture.jpg", "http:a.org", "http:/a.org", "http:///a.org", "http://",
     "", "javascript:alert(1)", "s3://a.org/b", "unix:///run/docker.sock", "http+unix://a.org/",
     "http://a.org:99999/", "http://a.org:-80/", "http://[a.org/", "http://a.org]/",
     "http://a.org\r\nX: y/", "http://a.org/\r\nX: y", "http://a.org/\t", "\x00http://a.org/",
     "http://a .org/", " http://a.org/", "https:\\\\a.org\\", "http://a.org\\@b.org/",
     f"http://{'a' * 64}.org/", f"http://{'a.' * 200}org/"],
)  # fmt: skip
def test_what_is_no_url_of_http_or_https_is_refused(names, url):
    names.answers["a.org"] = [[PUBLIC]]
    assert failure(url, "a.org", ".org").kind == "refused"
    assert names.asked == names.connected == []


@pytest.mark.parametrize("user", ["user", "user:secret", ":secret", "a.org:secret", "a.org%40"])
def test_a_url_with_user_info_is_refused_without_telling_it(names, user):
    error = failure(f"http://{user}@a.org/?token=secret", "a.org")
    assert error.kind == "refused"
    assert "secret" not in str(error) and "a.org: a URL with user" in str(error)


def test_the_host_is_what_stands_behind_the_last_at_sign(names):
    assert failure("http://a.org@b.org/", "a.org").kind == "refused"
    assert failure("http://a.org:80@b.org/", "a.org").kind == "refused"
    assert not names.connected


def test_path_and_query_arrive_encoded_and_the_fragment_stays_here(web):
    web.answers["/a%20b/%C3%BC?q=%201&r=2"] = send
    assert get(f"{web.url}/x/../a b/ü?q=%201&r=2#part", web.host) == PICTURE


# Addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
     "169.254.169.254", "100.100.100.200", "192.0.0.192", "168.63.129.16", "192.0.2.1",
     "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1",
     "::", "::1", "fe80::1", "fe80::1%2", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
     "ff0e::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.5", "::ffff:a9fe:a9fe",
     "::127.0.0.1", "::7f00:1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::10.0.0.5",
     "64:ff9b:1::7f00:1", "2002:7f00:1::1", "2002:a00:5::", "2001:0:7f00:1::", "5f00::1"],
)  # fmt: skip
def test_a_name_of_an_address_that_is_not_public_is_refused(names, address):
    names.answers["images.example.org"] = [[address]]
    error = failure("http://images.example.org/", "images.example.org", ".example.org")
    assert error.kind == "refused"
    assert not names.connected
    assert str(error) == "images.example.org has addresses that are not public"


@pytest.mark.parametrize(
    "address",
    [PUBLIC, OTHER_PUBLIC, "8.8.8.8", "172.32.0.1", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_a_name_of_a_public_address_is_connected_to_there(names, address):
    names.answers["images.example.org"] = [[address]]
    assert get("http://images.example.org/", "images.example.org") == PICTURE
    assert names.connected == [(address, 80)]


@pytest.mark.parametrize("addresses", [[PUBLIC, "10.0.0.5"], ["::1", PUBLIC]])
def test_one_private_address_among_public_ones_refuses_the_name(names, addresses):
    names.answers["images.example.org"] = [addresses]
    assert failure("http://images.example.org/", "images.example.org").kind == "refused"
    assert not names.connected


def test_dns_is_asked_once_so_a_second_answer_changes_nothing(names):
    names.answers["images.example.org"] = [[PUBLIC], ["127.0.0.1"]]
    assert get("http://images.example.org/", "images.example.org") == PICTURE
    assert names.asked == ["images.example.org"]
    assert names.connected == [(PUBLIC, 80)]


def test_a_redirect_to_the_same_name_is_checked_anew(names, web):
    web.answers["/"] = lambda handler: send(handler, b"", 302, Location="/again")
    web.answers["/again"] = send
    names.answers["images.example.org"] = [[PUBLIC], ["127.0.0.1"]]
    assert failure("http://images.example.org/", "images.example.org").kind == "refused"
    assert names.connected == [(PUBLIC, 80)]
    assert [request.path for request in web.seen] == ["/"]


def test_the_next_address_is_tried_when_one_is_dead(names, monkeypatch):
    names.answers["images.example.org"] = [[OTHER_PUBLIC, PUBLIC]]
    connect = module.socket.create_connection

    def no_ipv6(address: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
        if ":" in address[0]:
            raise OSError("Network is unreachable")
        return connect(address, *rest, **options)

    monkeypatch.setattr(module.socket, "create_connection", no_ipv6)
    assert get("http://images.example.org/", "images.example.org") == PICTURE
    assert names.connected == [(PUBLIC, 80)]


def test_the_real_resolver_finds_this_machine_and_is_refused():
    assert {"127.0.0.1", "::1"} & set(module.resolve("localhost"))
    assert failure("http://localhost/", "localhost").kind == "refused"


def test_a_name_that_is_nowhere_is_a_failure(names):
    error = failure("http://gone.example.org/a?token=secret", ".example.org")
    assert error.kind == "failed"
    assert "gone.example.org" in str(error) and "secret" not in str(error)


# The request ----------------------------------------------------------------------------------


def test_proxies_in_the_environment_are_ignored(names, web, monkeypatch):
    for variable in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://10.9.9.9:3128")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    names.answers["images.example.org"] = [[PUBLIC]]
    assert get("http://images.example.org/", "images.example.org") == PICTURE
    assert names.connected == [(PUBLIC, 80)]
    assert web.seen[0].path == "/"  # a proxy is sent the whole URL


def test_no_cookies_and_no_credentials_are_sent(web, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    web.answers["/first"] = lambda handler: send(
        handler, b"", 302, Location="/", Set_Cookie="session=1"
    )
    assert get(f"{web.url}/first", web.host) == PICTURE
    for request in web.seen:
        assert set(request.headers) == {"Host", "Accept-Encoding", "User-Agent"}
        assert request.headers["Accept-Encoding"] == "identity"


# Redirects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/", "{url}/", "//{host}/", "./x/../"])
def test_redirects_on_the_list_are_followed(web, status, location):
    location = location.format(url=web.url, host=web.host)
    web.answers["/first"] = lambda handler: send(handler, b"moved", status, Location=location)
    assert get(f"{web.url}/first", web.host) == PICTURE


@pytest.mark.parametrize(
    "location",
    ["http://evil.com/", "//evil.com/", "http://127.0.0.1:1/", "http://169.254.169.254/latest",
     "http://localhost:{port}/", "http://2130706433:{port}/", "http://[::1]:{port}/",
     "http://user:secret@{host}/", "file:///etc/passwd", "ftp://{host}/", "gopher://{host}/",
     "data:,x", "http://[", "http://@", "\\\\evil.com\\", "http:\\\\{host}/"],
)  # fmt: skip
def test_a_redirect_to_elsewhere_is_refused(web, location):
    location = location.format(port=web.port, host=web.host)
    web.answers["/first"] = lambda handler: send(handler, b"moved", 302, Location=location)
    error = failure(f"{web.url}/first", web.host, "images.example.org")
    assert error.kind == "refused"
    assert "secret" not in str(error)
    assert len(web.seen) == 1


def test_three_redirects_are_followed_and_a_loop_ends(web):
    for number in range(1, 5):
        web.answers[f"/{number}"] = lambda handler, to=f"/{number - 1}": send(
            handler, b"", 302, Location=to
        )
    web.answers["/0"] = send
    assert get(f"{web.url}/3", web.host) == PICTURE
    assert failure(f"{web.url}/4", web.host).kind == "failed"
    web.seen.clear()
    web.answers["/0"] = lambda handler: send(handler, b"", 302, Location="/0")
    error = failure(f"{web.url}/0", web.host)
    assert (error.kind, str(error)) == ("failed", f"{web.host} redirects more than 3 times")
    assert len(web.seen) == 4


# Answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [201, 204, 206, 300, 302, 304, 400, 401, 403, 404, 407, 500])
def test_other_answers_are_failures_that_tell_the_status_alone(web, status):
    web.answers["/"] = lambda handler: send(handler, b"internal secret", status, X_Key="secret")
    error = failure(f"{web.url}/", web.host)
    assert (error.kind, str(error)) == ("failed", f"{web.host} answers {status}")


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-OpenSSH_9.6 secret\r\n", b"HTTP/1.1 secret\r\n\r\n", b"\x00" * 100,
     b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsecret",
     b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\nsecret",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nsecret\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nsec",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 10**6,
     b"HTTP/1.1 200 OK\r\nA: " + b"a" * 10**5,
     b"HTTP/1.1 200 OK\r\n" + b"A: a\r\n" * 10**3],
)  # fmt: skip
def test_a_broken_answer_is_a_failure_that_tells_nothing_of_it(web, answer):
    web.answers["/"] = lambda handler: handler.wfile.write(answer)
    error = failure(f"{web.url}/", web.host)
    assert (error.kind, str(error)) == ("failed", f"{web.host} cannot be reached or broke off")


def test_a_port_where_nobody_listens_is_a_failure():
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
    assert failure(f"http://{host}/", host).kind == "failed"


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: %d\r\n\r\n%b", b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"],
)
def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not(web, head):
    answer = b"HTTP/1.1 200 OK\r\n" + head % (len(PICTURE), PICTURE)
    web.answers["/"] = lambda handler: handler.wfile.write(answer)
    assert get(f"{web.url}/", web.host, max_bytes=len(PICTURE)) == PICTURE
    error = failure(f"{web.url}/", web.host, max_bytes=len(PICTURE) - 1)
    assert error.kind == "too_large"
    assert f"more than {len(PICTURE) - 1} bytes" in str(error)


def test_an_announced_size_is_refused_before_the_body_comes(web):
    web.answers["/"] = lambda handler: drip(
        handler, b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", b""
    )
    assert failure(f"{web.url}/", web.host, max_bytes=1000, timeout_s=3).kind == "too_large"


@pytest.mark.parametrize("head", [b"\r\n", b"Content-Length: 9" + b"9" * 5000 + b"\r\n\r\n"])
def test_an_endless_body_is_read_no_further_than_the_limit(web, head):
    written = 0

    def pour(handler: BaseHTTPRequestHandler) -> None:
        nonlocal written
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + head)
        while True:
            written += handler.wfile.write(bytes(10**5))

    web.answers["/"] = pour
    assert failure(f"{web.url}/", web.host, max_bytes=10**6).kind == "too_large"
    assert written < 10**8  # some bytes stay in the kernel's buffers


def test_what_is_compressed_all_the_same_is_not_unpacked(web):
    bomb = gzip.compress(bytes(10**7))
    web.answers["/"] = lambda handler: send(handler, bomb, Content_Encoding="gzip")
    assert get(f"{web.url}/", web.host, max_bytes=10**5) == bomb


# Time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "drops"),
    [
        (b"", b""),
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"A: a\r\n"),
        (b"HTTP/1.1 200 OK\r\nA: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"a"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: a\r\n"),
    ],
    ids=["silence", "status", "headers", "header", "continue", "body", "announced body", "chunks",
         "chunk size", "trailers"],
)  # fmt: skip
def test_an_answer_that_drips_ends_at_the_deadline(web, head, drops):
    web.answers["/"] = lambda handler: drip(handler, head, drops)
    start = time.monotonic()
    error = failure(f"{web.url}/", web.host, timeout_s=0.4)
    assert (error.kind, str(error)) == ("timeout", f"{web.host} does not answer in time")
    assert 0.4 <= time.monotonic() - start < 3


def test_redirects_share_one_deadline(web):
    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        send(handler, b"", 302, Location="/")

    web.answers["/"] = slow
    start = time.monotonic()
    assert failure(f"{web.url}/", web.host, timeout_s=0.5).kind == "timeout"
    assert time.monotonic() - start < 3


def test_a_resolver_that_hangs_ends_at_the_deadline(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(module, "resolve", lambda host: [PUBLIC] if released.wait(10) else [])
    start = time.monotonic()
    assert failure("http://images.example.org/", ".example.org", timeout_s=0.3).kind == "timeout"
    assert time.monotonic() - start < 3
    released.set()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_only_listens_ends_at_the_deadline(scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        assert failure(f"{scheme}://{host}/", host, timeout_s=0.3).kind == "timeout"
        assert time.monotonic() - start < 3


def test_no_time_is_a_timeout(web):
    assert failure(f"{web.url}/", web.host, timeout_s=0).kind == "timeout"


def test_no_thread_or_connection_is_left_behind(web):
    web.answers["/first"] = lambda handler: send(handler, b"", 302, Location="/")
    web.answers["/no"] = lambda handler: send(handler, b"", 404)
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("no /proc to count open files in")
    before = len(list(folder.iterdir()))
    for _ in range(20):
        get(f"{web.url}/first", web.host)
        failure(f"{web.url}/no", web.host)
        failure(f"{web.url}/", web.host, max_bytes=5)
    end = time.monotonic() + 5  # the server closes its ends at any time
    while len(list(folder.iterdir())) > before + 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(list(folder.iterdir())) <= before + 3
    while time.monotonic() < end and any(
        isinstance(thread, threading.Timer) for thread in threading.enumerate()
    ):
        time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


# TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for images.example.org and 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        " -subj /CN=images.example.org"
        " -addext subjectAltName=DNS:images.example.org,IP:127.0.0.1"
    ).split()
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def secure_web(certificate: tuple[Path, Path]) -> Iterator[SimpleNamespace]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with serving(context) as server:
        yield server


@pytest.fixture
def trusted(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The default TLS context, with this certificate among the trusted ones."""
    context = ssl.create_default_context(cafile=str(certificate[0]))
    monkeypatch.setattr(module, "_tls", lambda: context)


def test_a_certificate_that_nobody_signed_is_refused(secure_web):
    error = failure(f"{secure_web.url}/", secure_web.host)
    assert error.kind == "failed"
    assert f"{secure_web.host} has no valid certificate: self" in str(error)
    assert not secure_web.seen


def test_the_certificate_must_be_of_the_name_in_the_url(secure_web, trusted, names):
    names.port = secure_web.port
    names.answers = {"images.example.org": [[PUBLIC]], "other.example.org": [[PUBLIC]]}
    assert get("https://images.example.org/", ".example.org") == PICTURE
    assert names.connected == [(PUBLIC, 443)]
    assert [request.headers["Host"] for request in secure_web.seen] == ["images.example.org"]
    error = failure("https://other.example.org/", ".example.org")
    assert error.kind == "failed"
    assert "other.example.org has no valid certificate: Hostname mismatch" in str(error)
    assert len(secure_web.seen) == 1


def test_the_certificate_of_an_address_must_name_it(secure_web, trusted):
    assert get(f"{secure_web.url}/", secure_web.host) == PICTURE


def test_https_is_not_left_by_a_redirect(secure_web, trusted, web):
    to_http = f"{web.url}/"
    secure_web.answers["/"] = lambda handler: send(handler, b"", 302, Location=to_http)
    error = failure(f"{secure_web.url}/", secure_web.host, web.host)
    assert (error.kind, "from https to http" in str(error)) == ("refused", True)
    assert not web.seen


def test_https_may_be_entered_by_a_redirect(secure_web, trusted, web):
    to_https = f"{secure_web.url}/"
    web.answers["/"] = lambda handler: send(handler, b"", 302, Location=to_https)
    assert get(f"{web.url}/", secure_web.host, web.host) == PICTURE


def test_a_body_that_drips_through_tls_ends_at_the_deadline(secure_web, trusted):
    secure_web.answers["/"] = lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\n\r\n", b"a")
    start = time.monotonic()
    assert failure(f"{secure_web.url}/", secure_web.host, timeout_s=0.5).kind == "timeout"
    assert time.monotonic() - start < 3


# Any public host ------------------------------------------------------------------------------


def public(url: str, *also: str) -> bytes:
    return fetch_public(url, also, 1_000_000, 20.0)


def refused(url: str, *also: str) -> str:
    with pytest.raises(FetchError) as caught:
        public(url, *also)
    assert caught.value.kind == "refused"
    return caught.value.reason


def test_ingest_may_ask_any_public_host_at_any_port(names):
    names.answers["images.example.org"] = [[PUBLIC]]
    assert public("http://images.example.org/") == PICTURE
    assert public("http://images.example.org:8080/") == PICTURE
    assert public(f"http://{PUBLIC}/") == public(f"http://[{OTHER_PUBLIC}]/") == PICTURE
    assert names.connected == [
        (PUBLIC, 80), (PUBLIC, 8080), (PUBLIC, 80), (OTHER_PUBLIC, 80)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.5", "169.254.169.254", "[::1]", "[::ffff:10.0.0.5]", "[fd00::1]"]
)
def test_ingest_asks_no_private_address_unless_it_is_listed(names, host):
    assert refused(f"http://{host}/") == "is an address that is not public"
    assert refused(f"http://{host}/", "10.9.9.9", "images.example.org") and not names.connected
    assert public(f"http://{host}/", host) == PICTURE


def test_ingest_asks_no_name_that_leads_inward_even_if_it_is_listed(names):
    names.answers["images.example.org"] = [[PUBLIC, "10.0.0.5"]]
    for also in ((), ("images.example.org",)):
        assert refused("http://images.example.org/", *also) == "has addresses that are not public"
    assert not names.connected


@pytest.mark.parametrize("location", ["http://127.0.0.1/", "http://inner.example.org/"])
def test_ingest_follows_no_redirect_inward(names, web, location):
    names.answers = {"images.example.org": [[PUBLIC]], "inner.example.org": [["10.0.0.5"]]}
    web.answers["/"] = lambda handler: send(handler, b"", 302, Location=location)
    assert "not public" in refused("http://images.example.org/")
    assert len(web.seen) == 1
