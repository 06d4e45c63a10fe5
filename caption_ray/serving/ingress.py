"""The Ray Serve deployment that speaks HTTP: it reads, checks and decodes pictures, so that the
captioners only caption. app.py deploys it in front of replica.py's deployment."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, DeploymentStatus, ReplicaState

from caption_ray import ray_internals
from caption_ray.captioning.predictor import Box, Images, prepare_with_box
from caption_ray.config import EncoderConfig
from caption_ray.data import transforms
from caption_ray.serving.batching import QueueFullError
from caption_ray.serving.budget import Budget
from caption_ray.serving.contract import Answer, NextWords, Options, Status, UnavailableError
from caption_ray.serving.http import build_http
from caption_ray.serving.port import PortTakenError, require_alone
from caption_ray.serving.replica import DEPLOYMENT, Full, Outdated, Reply
from caption_ray.serving.service import Settings

DECODE_THREADS = 4
"""Pictures that one ingress decodes at a time, if their memory is within its budget."""

ATTEMPTS = 2
"""Most captioners to try if one dies with the picture: captioning it twice is harmless."""

STATUS_TIMEOUT_S = 2.0
"""Seconds in which Ray must report the captioners' state."""

UNAVAILABLE = (BackPressureError, DeploymentUnavailableError, RayActorError)

logger = logging.getLogger("ray.serve")


BEHIND_HAPROXY = (
    "HAProxy has opened ports 8404 and 9101 (or those of RAY_SERVE_HAPROXY_STATS_PORT and "
    "_METRICS_PORT) on all interfaces, without a token, and an admin socket that every user may "
    "write to: close them with a firewall, and name a private RAY_SERVE_HAPROXY_SOCKET_PATH"
)

MEND_SECONDS = 5.0
"""Between two looks for proxies on nodes that have come since."""


def require_own_port() -> None:
    """Raise PortTakenError if, on this node, somebody else was at Serve's port first. Nothing where
    that cannot be told: outside of Ray's workers, before Serve runs."""
    raylet, port = ray_internals.raylet_pid(), ray_internals.http_port()
    if raylet is not None and port is not None:
        try:
            require_alone(port, raylet)
        except PortTakenError:
            ray_internals.leave_http_port()  # `serve run` would keep it open, with nothing behind
            raise
        except psutil.AccessDenied:  # macOS lets only root look
            logger.warning(f"Whether port {port} has another endpoint cannot be seen here")


def mend_proxies_that_run() -> None:
    """Mend the proxies that Serve has already. Nothing outside of Ray's workers."""
    if ray_internals.raylet_pid() is not None and ray_internals.http_port() is not None:
        ray_internals.ProxyMender().mend()


def _keep_proxies_mended() -> None:
    """For as long as this process lives."""
    mender = ray_internals.ProxyMender()
    while True:
        mender.mend()
        time.sleep(MEND_SECONDS)


class Ingress:
    """The HTTP application's `Backend`: decodes a picture and sends it to a captioner."""

    def __init__(
        self,
        captioner: DeploymentHandle[Any],
        encoder: EncoderConfig,
        info: dict[str, Any],
        settings: Settings,
    ) -> None:
        """`encoder` and `info` are those of the checkpoint that is served first. Raises
        PortTakenError if somebody else answers at the port of this node already."""
        require_own_port()
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            logger.warning(BEHIND_HAPROXY)
            ray_internals.read_strictly_here()
        threading.Thread(target=_keep_proxies_mended, name="mend proxies", daemon=True).start()
        self.captioner = ray_internals.without_object_store(captioner)
        self.streaming_captioner = self.captioner.options(stream=True)
        self.encoder = encoder
        self.last_info = info
        self.settings = settings
        self.budget = Budget(settings.max_decoding_bytes)
        self.decoders = ThreadPoolExecutor(DECODE_THREADS, "decode")
        # of its own, since nothing that pictures do may keep the probes waiting
        self.prober = ThreadPoolExecutor(1, "probe")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http(self, self.settings)

    async def caption(self, picture: bytes, options: Options) -> Answer:
        async for part in self._ask(picture, options, streaming=False):
            if isinstance(part, Answer):
                return part
        raise AssertionError("the last part is the answer")

    async def stream(self, picture: bytes, options: Options) -> AsyncIterator[NextWords | Answer]:
        async for part in self._ask(picture, options, streaming=True):
            yield part

    async def _ask(
        self, picture: bytes, options: Options, streaming: bool
    ) -> AsyncIterator[NextWords | Answer]:
        """Yields words if streaming, then the answer. Prepares the picture again if the captioner's
        model has changed, and tries another captioner if it dies."""
        attempts = 0
        told = 0
        while True:
            encoder = self.encoder
            image, box = await self._prepare(picture, encoder)
            replies = (self._stream if streaming else self._call)(image, encoder, options)
            try:
                async for reply in replies:
                    if isinstance(reply, NextWords):
                        told += 1
                        yield reply
                    elif isinstance(reply, Outdated):
                        self.encoder = reply.encoder
                    elif isinstance(reply, Full):
                        raise QueueFullError(reply.retry_after)
                    else:
                        yield dataclasses.replace(reply, box=box)
                        return
            except UNAVAILABLE as error:
                attempts += 1
                may_again = isinstance(error, RayActorError) and not told and attempts < ATTEMPTS
                logger.warning(f"No captioner{', trying another' if may_again else ''}: {error}")
                if not may_again:
                    raise UnavailableError(str(error)) from error

    async def _prepare(self, picture: bytes, encoder: EncoderConfig) -> tuple[Images, Box]:
        loop = asyncio.get_running_loop()
        # on a thread, since a header may be long
        needed = await loop.run_in_executor(self.decoders, transforms.decoding_bytes, picture)
        async with self.budget.take(needed):
            decoding = loop.run_in_executor(self.decoders, prepare_with_box, picture, encoder)
            try:
                return await asyncio.shield(decoding)
            except asyncio.CancelledError:  # its thread goes on, and holds the memory, to the end
                await asyncio.wait([decoding])
                raise

    async def _call(
        self, image: Images, encoder: EncoderConfig, options: Options
    ) -> AsyncIterator[Reply]:
        response = self.captioner.remote(image, encoder, options)
        try:
            reply: Reply = await response
        except BaseException:  # including cancellation: the client has gone, or time is up
            response.cancel()
            raise
        yield reply

    async def _stream(
        self, image: Images, encoder: EncoderConfig, options: Options
    ) -> AsyncIterator[NextWords | Reply]:
        response = self.streaming_captioner.stream.remote(image, encoder, options)
        try:
            async for part in response:
                yield part
        except BaseException:
            response.cancel()
            raise

    async def status(self) -> Status:
        """From Ray's controller: asking a captioner would keep it from scaling to zero."""
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(
                loop.run_in_executor(self.prober, self._status), STATUS_TIMEOUT_S
            )
        except (asyncio.TimeoutError, ray.exceptions.RayError):
            return "starting"

    def _status(self) -> Status:
        context = serve.get_replica_context()
        application = serve.status().applications[context.app_name]
        deployment = application.deployments[DEPLOYMENT]
        if application.status == ApplicationStatus.DELETING:
            return "starting"
        if deployment.replica_states.get(ReplicaState.RUNNING, 0) > 0:
            return "ready"
        asleep = deployment.status == DeploymentStatus.HEALTHY and not deployment.replica_states
        return "asleep" if asleep else "starting"

    async def info(self) -> dict[str, Any]:
        if await self.status() == "ready":
            try:
                answer = self.captioner.info.remote()
                self.last_info = await asyncio.wait_for(answer, STATUS_TIMEOUT_S)
            except (asyncio.TimeoutError, TaskCancelledError, *UNAVAILABLE):
                logger.warning("No captioner answers /info: the last known answer is shown")
        return self.last_info
