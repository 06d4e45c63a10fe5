"""A proxy in front of an S3 server that injects faults, reproducibly from a seed.

By hand::

    python tests/integration/fault_proxy.py --upstream http://127.0.0.1:8090 drop=0.02 corrupt=0.05

prints the variable that points boto3 at it, and on Ctrl-C what it injected. Tests use
``FaultProxy(...)`` as a context manager. Which fault meets a request depends on the seed, the
request and how often it was seen, not on the order in which concurrent requests arrive.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import aiohttp
import yarl
from aiohttp import web

STATUS_FAULTS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "429": (429, "TooManyRequests"),
    "expired": (400, "ExpiredToken"),
}
BODY_FAULTS = ("truncate", "corrupt", "trickle")
"""Faults of an object's bytes on their way back; `corrupt` also affects uploads."""
FAULTS = ("drop", "hang", "delay", *STATUS_FAULTS, *BODY_FAULTS)

HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}
AUTOMATIC = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class FaultProxy:
    """A proxy of `upstream` on a free port, in a thread of its own.

    `rates` (fault -> probability) may be replaced while it runs; `injected` counts the faults,
    `requests` all requests. Paths that match the pattern `spare` meet no fault.
    """

    def __init__(
        self,
        upstream: str,
        rates: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        port: int = 0,
        hang_s: float = 3600.0,
        delay_s: float = 0.2,
        trickle_s: float = 1.0,
        spare: str = "",
    ) -> None:
        self.upstream, self.seed, self.port = upstream.rstrip("/"), seed, port
        self.hang_s, self.delay_s, self.trickle_s = hang_s, delay_s, trickle_s
        self.spare = spare
        self.rates = rates or {}
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self.seen: Counter[str] = Counter()

    @property
    def rates(self) -> Mapping[str, float]:
        return self._rates

    @rates.setter
    def rates(self, rates: Mapping[str, float]) -> None:
        unknown = set(rates) - set(FAULTS)
        if unknown or sum(rates.values()) > 1:
            raise ValueError(f"rates {rates}: give {', '.join(FAULTS)}, 1 altogether at most")
        self._rates = dict(rates)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # Life ---------------------------------------------------------------------------------------

    def __enter__(self) -> FaultProxy:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self._run(self._start()).result(timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop()).result(timeout=30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _run(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def _start(self) -> None:
        # what the client signed must pass unchanged: its headers, its escapes, its bytes
        self.session = aiohttp.ClientSession(
            auto_decompress=False,
            skip_auto_headers=AUTOMATIC,
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0),
        )
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self.runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def _stop(self) -> None:
        await self.runner.cleanup()
        await self.session.close()
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    # Requests -----------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        sent = await request.read()
        self.requests += 1
        fault, rng = self._choose(request)
        if fault in STATUS_FAULTS:
            self.injected[fault] += 1
            status, code = STATUS_FAULTS[fault]
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
            return web.Response(status=status, text=text, content_type="application/xml")
        if fault == "hang":
            self.injected[fault] += 1
            await asyncio.sleep(self.hang_s)
            return self._drop(request)
        if fault == "drop" and rng.random() < 0.5:  # before or after the server has seen it
            self.injected[fault] += 1
            return self._drop(request)
        if fault == "delay":
            self.injected[fault] += 1
            await asyncio.sleep(self.delay_s)
        if fault == "corrupt" and sent:
            self.injected[fault] += 1
            sent = _with_a_wrong_byte(sent, rng)
            fault = None
        async with self.session.request(
            request.method,
            yarl.URL(self.upstream + request.raw_path, encoded=True),
            headers=[h for h in request.headers.items() if h[0].lower() not in HOP_BY_HOP],
            data=sent or None,
            allow_redirects=False,
        ) as answer:
            received = await answer.read()
        if fault == "drop":
            self.injected[fault] += 1
            return self._drop(request)
        return await self._answer(request, answer, received, fault, rng)

    def _choose(self, request: web.Request) -> tuple[str | None, random.Random]:
        # without the bucket, as tests choose its name at random
        below = request.raw_path.lstrip("/").partition("/")[2]
        key = f"{request.method} {below} {request.headers.get('Range')}"
        self.seen[key] += 1
        rng = random.Random(f"{self.seed} {key} {self.seen[key]}")
        kinds = [*self.rates, None]
        if self.spare and re.search(self.spare, below):
            return None, rng
        weights = [*self.rates.values(), 1 - sum(self.rates.values())]
        return rng.choices(kinds, weights)[0], rng

    async def _answer(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        data: bytes,
        fault: str | None,
        rng: random.Random,
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                response.headers.add(name, value)
        if request.method != "HEAD":
            response.content_length = len(data)
        is_object = answer.status in (200, 206) and "xml" not in answer.content_type and data
        if fault not in BODY_FAULTS or not is_object:
            fault = None
        else:
            self.injected[fault] += 1
        if fault == "corrupt":
            data = _with_a_wrong_byte(data, rng)
        try:
            await self._send(request, response, data, fault, rng)
        except ConnectionError:
            pass  # the client has timed out
        return response

    async def _send(
        self,
        request: web.Request,
        response: web.StreamResponse,
        data: bytes,
        fault: str | None,
        rng: random.Random,
    ) -> None:
        await response.prepare(request)
        if fault == "truncate":
            await response.write(data[: rng.randrange(len(data))])
            self._drop(request)
            return
        if fault == "trickle":
            for at in range(len(data)):
                await response.write(data[at : at + 1])
                await asyncio.sleep(self.trickle_s)
        elif request.method != "HEAD":
            await response.write(data)
        await response.write_eof()

    @staticmethod
    def _drop(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.close()  # bytes written before are still sent
        return web.Response()


def _with_a_wrong_byte(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    return bytes(changed)


def table(rows: Mapping[str, Mapping[str, object]]) -> str:
    """Rows of named figures as aligned text."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *columns]]
    lines += [[title, *(str(row.get(name, "")) for name in columns)] for title, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rates", nargs="+", metavar="FAULT=RATE", help=", ".join(FAULTS))
    parser.add_argument("--upstream", required=True, help="address of the S3 server")
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0: any")
    parser.add_argument("--spare", default="", help="pattern of paths that no fault meets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-s", type=float, default=3600.0)
    parser.add_argument("--delay-s", type=float, default=0.2)
    parser.add_argument("--trickle-s", type=float, default=1.0, help="pause between two bytes")
    arguments = vars(parser.parse_args())
    pairs = [rate.partition("=")[::2] for rate in arguments.pop("rates")]
    try:
        proxy = FaultProxy(rates={fault: float(rate) for fault, rate in pairs}, **arguments)
    except ValueError as error:
        parser.error(str(error))
    with proxy:
        print(f"export AWS_ENDPOINT_URL={proxy.url}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{proxy.requests} requests; {dict(proxy.injected)}")


if __name__ == "__main__":
    main()
