"""Every use of Ray that its public interface does not promise, in one place.

Each is guarded: with a Ray that has changed here, the run goes on without the gain, and says so
once in the log. `cluster.py` and the serving ingress call these; nobody else reaches into Ray.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.data

DATA_STEP_SECONDS = 0.02
"""Between two looks of Ray Data at its tasks."""

logger = logging.getLogger(__name__)


@functools.cache
def _say_lost(gain: str, reason: str) -> None:
    logger.warning("Ray %s has changed: %s (%s)", ray.__version__, gain, reason)


class UnhurriedExecution:
    """Makes Ray Data pause between looks at its tasks while none of them has made progress.

    Ray Data polls without a pause wherever blocks are ready that nobody wants yet, which in
    training is nearly always: a thread inside the training process that takes a core, and Python's
    lock, from the training itself. (Two workers of one thread: 80 images/s instead of 250.)
    """

    def __init__(self) -> None:
        self._last = 0.0
        self._done: list[tuple[int, int, int]] = []

    def on_execution_step(self, executor: Any) -> None:
        try:
            metrics = [operator.metrics for operator in executor._topology]
            done = [
                (m.num_tasks_submitted, m.num_task_outputs_generated, m.num_outputs_taken)
                for m in metrics
            ]
        except (AttributeError, TypeError) as error:
            _say_lost("Ray Data polls its tasks without a pause", repr(error))
            return
        if done == self._done:
            time.sleep(max(0.0, self._last + DATA_STEP_SECONDS - time.monotonic()))
        self._last, self._done = time.monotonic(), done


def slow_down_polling() -> None:
    """Register `UnhurriedExecution` for all Ray Data executions of this process."""
    try:
        registered = ray.data.DataContext.get_current().custom_execution_callback_classes
        callback = _unhurried_callback()
        if callback not in registered:
            registered.append(callback)
    except (ImportError, AttributeError, TypeError) as error:
        _say_lost("Ray Data polls its tasks without a pause", repr(error))


@functools.cache
def _unhurried_callback() -> type:
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    return type("UnhurriedCallback", (UnhurriedExecution, ExecutionCallback), {})


def submission_id() -> str | None:
    """What `ray job stop` calls the job that this process drives; None if it was not submitted."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        found: str | None = config.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError) as error:
        _say_lost("a run cannot say which job it is", repr(error))
        return None
    return found


def is_started_here() -> bool:
    """Whether this process started the Ray that it uses, which then has no nodes but this machine
    and never will."""
    try:
        node = ray._private.worker._global_node  # of another Ray, that which it joined
        return node is not None and bool(node.is_head())
    except AttributeError as error:
        _say_lost("runs that are too large for this machine wait for ever", repr(error))
        return False


def pass_on_to_train(variable: str) -> None:
    """Have Ray Train's controller and its helpers see this environment variable of the driver."""
    try:
        # not for those who do not train: ray.train takes a while to load
        from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

        ENV_VARS_TO_PROPAGATE.add(variable)
    except (ImportError, AttributeError) as error:
        _say_lost(f"Ray Train does not see ${variable}", repr(error))


def without_object_store(handle: Any) -> Any:
    """A Serve handle that sends its arguments straight to the replica. By default Ray leads what is
    above 100 kB (a picture of 256 x 256) through its object store, which takes 5 ms more."""
    try:
        return handle.options(_by_reference=False)
    except TypeError as error:
        _say_lost("pictures take 5 ms longer from ingress to captioner", repr(error))
        return handle


def raylet_pid() -> int | None:
    """The process that started this one, if this is one of Ray's workers; else None."""
    try:
        worker = ray._private.worker.global_worker
        return os.getppid() if worker.mode == ray._private.worker.WORKER_MODE else None
    except AttributeError as error:
        _say_lost("nobody notices that two endpoints share a port", repr(error))
        return None


def http_port() -> int | None:
    """Where the Serve that runs in this cluster answers; None if none does."""
    try:
        from ray.serve.context import _get_global_client

        client = _get_global_client(raise_if_no_controller_running=False)
        return None if client is None else int(client.http_config.port)
    except (ImportError, AttributeError, TypeError) as error:
        _say_lost("nobody notices that two endpoints share a port", repr(error))
        return None


def _http_proxies() -> list[Any]:
    """Handles of Serve's HTTP proxies, one a node."""
    return [
        ray.get_actor(actor["name"], namespace=actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_PROXY_ACTOR")
    ]


def leave_http_port() -> None:
    """Have Serve's proxy on this node close its port, and so leave it to whoever else is there."""
    here = ray.get_runtime_context().get_node_id()

    # Functions inside of this one, as below: Ray sends them whole, to processes of its own that
    # may not find this package.
    def stop_listening(_: Any) -> None:
        import gc

        import uvicorn

        if ray.get_runtime_context().get_node_id() == here:
            for server in gc.get_objects():
                if isinstance(server, uvicorn.Server):
                    server.should_exit = True

    try:
        left = [proxy.__ray_call__.remote(stop_listening) for proxy in _http_proxies()]
        ray.get(left, timeout=10)
    except (AttributeError, ValueError, ray.exceptions.RayError) as error:
        _say_lost("the port that was taken stays open; end this Serve", repr(error))


_BODIES_LOST = "clients that ask for another protocol lose their bodies"


class ProxyMender:
    """Mends Ray's HTTP proxies, of all nodes.

    They read requests with h11: the parser that they use by default (httptools) takes a request
    with `Upgrade: h2c`, as the JDK's client and `curl --http2` send it, for the end of HTTP/1.1: it
    drops the body, and takes one that arrives later for a request of its own. h11 ignores an
    upgrade that nobody answers. What it lets pass is seen to as well: a request with two lengths is
    refused, one with a whole URL (RFC 9112, 3.2.2) is taken for its path, and an X-Request-ID,
    which the proxy decodes and sends back, is cut and has printable characters only.

    And until the first application runs they answer 503 in JSON, as the endpoint does, not Ray's
    404 or nothing at all.
    """

    def __init__(self) -> None:
        self._done: set[tuple[str, str]] = set()

    def mend(self) -> None:
        """Mend the proxies that have come since the last call; connections that are open already
        are left as they are."""
        self._apply(_BODIES_LOST, _reader)
        self._apply("until the endpoint runs, its port answers with Ray's 404", _doorkeeper)

    def _apply(self, loss: str, part: Callable[[], Callable[[Any], int]]) -> None:
        try:
            for proxy in _http_proxies():
                key = (part.__name__, proxy._actor_id.hex())
                if key not in self._done:
                    if ray.get(proxy.__ray_call__.remote(part()), timeout=10):
                        self._done.add(key)  # else it has not opened its port yet
        except (AttributeError, ray.exceptions.RayTaskError) as error:
            _say_lost(loss, repr(error))
        except (ValueError, ray.exceptions.RayError) as error:
            logger.debug("A proxy is mended later: %r", error)  # as it is just starting or ending


def _strict_protocol() -> Callable[[], type]:
    """What makes the class by which uvicorn reads connections; see ProxyMender."""

    def make() -> type:
        import re

        from uvicorn.protocols.http.h11_impl import H11Protocol

        assert callable(H11Protocol._should_upgrade_to_ws)

        def checked(app: Any) -> Any:
            async def call(scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] == "http":
                    names = {name for name, _ in scope["headers"]}
                    if {b"content-length", b"transfer-encoding"} <= names:
                        headers = [(b"connection", b"close"), (b"content-type", b"text/plain")]
                        await send(
                            {"type": "http.response.start", "status": 400, "headers": headers}
                        )
                        body = b"Content-Length and Transfer-Encoding: send one of them"
                        await send({"type": "http.response.body", "body": body})
                        return
                    if scope["path"].startswith(("http://", "https://")):
                        path = "/" + "".join(scope["path"].split("/", 3)[3:])
                        scope = {**scope, "path": path, "raw_path": path.encode()}
                    scope["headers"] = [
                        (name, re.sub(rb"[^!-~]", b"?", value[:128]))
                        if name == b"x-request-id"
                        else (name, value)
                        for name, value in scope["headers"]
                    ]
                await app(scope, receive, send)

            return call

        class StrictProtocol(H11Protocol):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                self.app = checked(self.app)

            def _should_upgrade_to_ws(self) -> bool:
                """Only GET opens a WebSocket (RFC 6455, 4.1); what else asks for one has a body,
                and is answered as if it had not asked."""
                return self.scope["method"] == "GET" and super()._should_upgrade_to_ws()

        return StrictProtocol

    return make


def _reader() -> Callable[[Any], int]:
    """What has a proxy read strictly, in its process; it returns how many servers it found."""
    make = _strict_protocol()

    def read_strictly(_: Any) -> int:
        import gc

        import uvicorn
        from uvicorn.protocols.http.h11_impl import H11Protocol

        servers = [found for found in gc.get_objects() if isinstance(found, uvicorn.Server)]
        for server in servers:
            if not issubclass(server.config.http_protocol_class, H11Protocol):  # not mended yet
                server.config.http_protocol_class = make()
        return len(servers)

    return read_strictly


def read_strictly_here() -> None:
    """Have the server that Ray starts in this process, an ingress to which HAProxy sends requests,
    read them as a mended proxy does. HAProxy ignores `Upgrade: h2c` itself, but no other one."""
    try:
        from uvicorn.protocols.http import auto

        auto.AutoHTTPProtocol = _strict_protocol()()
    except (ImportError, AttributeError) as error:
        _say_lost(_BODIES_LOST, repr(error))


def _doorkeeper() -> Callable[[Any], int]:
    """What has a proxy answer before the first application does; it returns how many servers it
    found in its process."""

    def answer_until_the_first_application_runs(proxy: Any) -> int:
        import gc
        import json

        import uvicorn

        servers = [found for found in gc.get_objects() if isinstance(found, uvicorn.Server)]
        if not servers:  # it is HAProxy's manager, or has not opened its port yet
            return 0
        router = proxy.http_proxy.proxy_router
        assert callable(router.match_route) and isinstance(router.route_info, dict)
        about = "The endpoint is starting; if this lasts, `serve status` says why"
        probes = ("/readyz", "/livez", "/info", "/")

        def may_pass(scope: Any) -> bool:
            if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own
                return True
            if not router.route_info:
                return False
            found = router.match_route(scope["path"])
            # Only what never starts an ingress by itself is answered for one that is not there:
            # a picture may be what an application that has scaled to zero waits for.
            is_probe = scope["method"] in ("GET", "HEAD") and scope["path"].endswith(probes)
            return found is None or not is_probe or found[1].running_replicas_populated()

        def guarded(app: Any) -> Any:
            async def call(scope: Any, receive: Any, send: Any) -> None:
                if may_pass(scope):
                    await app(scope, receive, send)
                    return
                answer: dict[str, Any] = {"error": about, "error_type": "unavailable"}
                if "/v1/" in scope["path"]:  # OpenAI's clients read an object
                    details = {"type": "server_error", "param": None, "code": "unavailable"}
                    answer = {"error": {"message": about, **details}}
                body = json.dumps(answer).encode()
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"retry-after", b"5"),
                ]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
                await send({"type": "http.response.body", "body": body})

            return call

        for server in servers:
            if not hasattr(server, "has_doorkeeper"):
                server.config.loaded_app = guarded(server.config.loaded_app)
                server.has_doorkeeper = True  # type: ignore[attr-defined]
        return len(servers)

    return answer_until_the_first_application_runs
