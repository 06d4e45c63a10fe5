"""OpenStack Swift with its s3api middleware: a production S3 server on loopback.

By hand::

    python tests/integration/swift_server.py --port 8090

prints the environment variables that point boto3 and pyarrow at it, and serves until Ctrl-C. Tests
use ``swift_s3()``. Swift's four servers (proxy, account, container, object) run with one replica
in a temporary folder, which is removed at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LOOPBACK = "127.0.0.1"
STORAGE_SERVERS = ("account", "container", "object")
ACCESS_KEY, SECRET_KEY, REGION = "test:tester", "testing", "us-east-1"
START_SECONDS = 60.0
STOP_SECONDS = 10.0


class S3Server(NamedTuple):
    endpoint_url: str
    access_key: str
    secret_key: str
    region: str

    def environment(self) -> dict[str, str]:
        """The variables by which boto3 and pyarrow's ``FileSystem.from_uri`` find the server.

        pyarrow's ``S3FileSystem()`` does not read the first: give it ``endpoint_override``.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }


def why_unavailable() -> str | None:
    """Why Swift cannot run here, and the remedy; None if it can."""
    if importlib.util.find_spec("swift") is None:
        return "OpenStack Swift is not installed: pip install swift"
    if not hasattr(os, "setxattr"):
        return "OpenStack Swift runs on Linux only"
    with tempfile.NamedTemporaryFile() as probe:
        try:
            os.setxattr(probe.name, "user.swift.probe", b"x" * 1024)
        except OSError as error:
            return (
                f"OpenStack Swift keeps metadata in extended attributes, which "
                f"{tempfile.gettempdir()} refuses ({error.strerror}): set TMPDIR to a folder on "
                f"ext4, xfs or btrfs"
            )
    return None


@contextmanager
def swift_s3(host: str = LOOPBACK, prefix: Sequence[str] = ()) -> Iterator[S3Server]:
    """Run a server in its own processes, on a free port, for the duration of the block.

    host: the address to listen on. prefix: a command that wraps the server's, such as to run it in
    another network namespace. Raises RuntimeError, with the reason, if it cannot run or start.
    """
    reason = why_unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*prefix, sys.executable, __file__, "--host", host, "--until-eof"],
            stdin=subprocess.PIPE,  # ends the server when this process ends, however it does
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C must not stop the server before its tests
        )
        assert process.stdout is not None
        alarm = threading.Timer(START_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        alarm.start()
        try:
            # The endpoint is the first line, and it is printed once every server answers.
            endpoint_url = process.stdout.readline().partition("=")[2].strip()
            alarm.cancel()
            if not endpoint_url:
                log.seek(0)
                raise RuntimeError(
                    f"OpenStack Swift did not start within {START_SECONDS:.0f} s:\n"
                    + log.read().decode(errors="replace")[-4000:]
                )
            yield S3Server(endpoint_url, ACCESS_KEY, SECRET_KEY, REGION)
        finally:
            alarm.cancel()
            process.terminate()
            try:
                process.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def serve(folder: Path, host: str, port: int, until_eof: bool) -> None:
    """Serve until SIGTERM, Ctrl-C or, if asked, the end of the standard input."""

    def stop(*_: object) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    warnings.filterwarnings("ignore", r"\s*Eventlet is deprecated")
    import eventlet
    import swift.common.wsgi  # noqa: F401  once, before the forks

    # Bound before the configuration names the ports, so that no other process can take one.
    sockets = {
        name: eventlet.listen((host, port if name == "proxy" else 0), reuse_port=False)
        for name in ("proxy", *STORAGE_SERVERS)
    }
    for sock in sockets.values():
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise reads wait 40 ms
    ports = {name: sock.getsockname()[1] for name, sock in sockets.items()}
    build_rings(folder, host, ports)
    write_configuration(folder, host, ports)
    children: list[int] = []
    try:
        for name in sockets:
            children.append(fork_server(name, folder, sockets))
        for sock in sockets.values():
            sock.close()
        # Until a server is ready, its connections wait in the socket's queue.
        for number in ports.values():
            url = f"http://{host}:{number}/healthcheck"
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).close()
        server = S3Server(f"http://{host}:{ports['proxy']}", ACCESS_KEY, SECRET_KEY, REGION)
        for variable, value in server.environment().items():
            print(f"export {variable}={value}", flush=True)
        watched = [sys.stdin] if until_eof else []
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if select.select(watched, [], [], 0.5)[0] and not sys.stdin.read():
                return
        raise RuntimeError("one of Swift's servers has ended: its reason stands above")
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)  # so that none still writes while the folder is removed


def fork_server(name: str, folder: Path, sockets: Mapping[str, Any]) -> int:
    """Start one of Swift's servers on its socket; returns the id of its process."""
    from swift.common import wsgi

    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.dup2(2, 1)
        for other, sock in sockets.items():
            if other != name:
                sock.close()
        conf, logger, global_conf, _ = wsgi.check_config(
            str(folder / f"{name}-server.conf"), f"{name}-server", verbose=True
        )
        wsgi.run_server(conf, logger, sockets[name], global_conf=global_conf)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def build_rings(folder: Path, host: str, ports: Mapping[str, int]) -> None:
    from swift.common.ring import RingBuilder

    (folder / "devices" / "disk").mkdir(parents=True)
    for name in STORAGE_SERVERS:
        builder = RingBuilder(part_power=1, replicas=1, min_part_hours=1)
        address = {"ip": host, "port": ports[name], "device": "disk"}
        builder.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1.0, **address})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{name}.ring.gz"))


def write_configuration(folder: Path, host: str, ports: Mapping[str, int]) -> None:
    # All timeouts are far above Swift's defaults: with a single device there is no replica to turn
    # to, so on a busy machine a timeout would mean a 503, or a listing that lags behind.
    common = f"""
[DEFAULT]
bind_ip = {host}
bind_port = %d
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
conn_timeout = 30
node_timeout = 60
container_update_timeout = 60
post_quorum_timeout = 60
log_level = WARNING
"""
    filters = "".join(
        f"[filter:{name}]\nuse = egg:swift#{name}\n"
        for name in ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "copy", "slo")
    )
    account, user = ACCESS_KEY.split(":")
    # No memcache: so each request sees the bucket's current state, and tempauth needs one only for
    # tokens, which S3 clients do not use.
    proxy = f"""
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats s3api tempauth copy slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
error_suppression_limit = 1000000000

[filter:s3api]
use = egg:swift#s3api
location = {REGION}

[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user} = {SECRET_KEY} .admin

"""
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n")
    (folder / "proxy-server.conf").write_text(common % ports["proxy"] + proxy + filters)
    for name in STORAGE_SERVERS:
        storage = f"""
[pipeline:main]
pipeline = healthcheck {name}-server

[app:{name}-server]
use = egg:swift#{name}

"""
        (folder / f"{name}-server.conf").write_text(common % ports[name] + storage + filters)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve S3 until Ctrl-C.")
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--until-eof", action="store_true", help="or until the input ends")
    options = parser.parse_args()
    reason = why_unavailable()
    if reason is not None:
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="swift-") as folder:
        serve(Path(folder), options.host, options.port, options.until_eof)


if __name__ == "__main__":
    main()
