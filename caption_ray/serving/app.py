"""The endpoint on Ray Serve: `serve run serve_config.yaml`.

    client -> Ingress (CPU: HTTP, limits, decoding) -> Captioner (one device: batches)

Each scales independently. Importing this has no side effects: `build_app` builds the application.
"""

from __future__ import annotations

from typing import Annotated, Any

import ray
import torch
from pydantic import ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from caption_ray import cluster
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.checkpoint import CheckpointError
from caption_ray.captioning.predictor import Predictor
from caption_ray.config import (
    RULES,
    Bytes,
    GPUs,
    Name,
    Parallel,
    Positive,
    PositiveOrZero,
    Uri,
    default_storage,
    from_dict,
    from_environment,
)
from caption_ray.data import transforms
from caption_ray.fetch import check_allow_list
from caption_ray.serving.auth import Tokens
from caption_ray.serving.errors import Strict
from caption_ray.serving.ingress import Ingress, mend_proxies_that_run, require_own_port
from caption_ray.serving.port import PortTakenError
from caption_ray.serving.replica import DEPLOYMENT, CaptionerReplica, Serving, describe
from caption_ray.serving.service import Settings

CHECKPOINT_VARIABLE = "CAPTION_RAY_CHECKPOINT"
TOKENS_FILE_VARIABLE = "CAPTION_RAY_TOKENS_FILE"

MAX_QUEUE = 1024
"""Most pictures waiting for a captioner: 200 MB at 256 x 256. `max_queue_s` refuses earlier."""

INGRESS_REQUESTS = 1024
"""In-flight requests of one ingress before Ray queues them in its proxy. Far above what the ingress
admits, so that it is the ingress that refuses, in JSON and with a computed Retry-After."""


DecodingBytes = Annotated[Bytes, Field(ge=transforms.MAX_DECODING_BYTES)]


class Arguments(Strict):
    """The `args` in serve_config.yaml, or `key=value` after `serve run`."""

    model_config = ConfigDict(str_strip_whitespace=True, validate_default=True, **RULES)

    checkpoint: Uri = Field(default_factory=lambda: from_environment(CHECKPOINT_VARIABLE) or "best")
    """`best` or `latest` of the run in `storage` that was written to last, or the URI of a
    checkpoint or run (RUN means its best checkpoint, RUN/latest its latest); several URIs,
    separated by commas, caption together (default: $CAPTION_RAY_CHECKPOINT, else best)."""

    storage: Uri = Field(default_factory=default_storage)
    """URI of the folder that holds all runs, or of one run (default: $CAPTION_RAY_STORAGE, else
    ./runs in the folder where Ray was started, which is that of `serve run` if it starts Ray
    itself)."""

    follow_interval_s: Positive | None = 30.0
    """Seconds between looks for a newer checkpoint of a run, which then takes the place of the one
    that is served; null: the one found at the start stays."""

    num_gpus: GPUs | None = Field(default_factory=cluster.promised_gpus)
    """GPUs of each captioner, a fraction to share one; null: 1 if the cluster has any, else 0
    (default: $CAPTION_RAY_NUM_GPUS, for clusters that start GPU nodes on demand, else null)."""

    cpu_threads: Parallel | None = None
    """Threads of a captioner without GPU; null: as many as its node has cores."""

    cuda_graphs: bool = True
    """On GPUs, run the checkpoint's search as CUDA graphs: a batch takes a fraction of the time, a
    start some seconds more."""

    max_batch_size: Parallel = 16
    """Most pictures that are captioned at once."""

    batch_wait_timeout_s: PositiveOrZero = 0.0
    """Seconds that a picture waits for others on an idle device. On a busy one those that come in
    meanwhile make the next batch anyway."""

    max_queue_s: Positive = 10.0
    """Seconds that a picture may be expected to wait for a captioner; one that would wait longer is
    refused at once (429), so that those admitted keep their latency."""

    request_timeout_s: Positive = 30.0
    """Seconds in which a picture must be captioned, its wait included (else 504)."""

    body_timeout_s: Positive = 20.0
    """Seconds in which a request's body must have arrived (else 408)."""

    max_body_bytes: Bytes = 10 * 1024 * 1024
    """Largest request body, in bytes (else 413)."""

    max_buffered_bytes: Bytes = 256 * 1024 * 1024
    """Most bytes of bodies that one ingress holds at a time (else 429)."""

    max_decoding_bytes: DecodingBytes = 1024 * 1024 * 1024
    """Most memory that the pictures which one ingress decodes at a time may take, by what their
    headers say; others wait. One picture alone takes up to 600 MiB."""

    tokens_file: Uri | None = Field(default_factory=lambda: from_environment(TOKENS_FILE_VARIABLE))
    """File, on the nodes, with the tokens that are accepted in `Authorization: Bearer`, one per
    line; read again when it changes. Those in $CAPTION_RAY_TOKENS, separated by commas, are
    accepted too. With neither, everybody is served (default: $CAPTION_RAY_TOKENS_FILE, else null).
    """

    cors_origins: tuple[Name, ...] = ()
    """Origins (https://example.org) whose pages may call from a browser."""

    url_allow_list: tuple[Name, ...] = ()
    """Hosts (images.example.org, .example.org, 10.0.0.5:8080) from which pictures are fetched for
    OpenAI's clients; without any, they must send the picture itself."""

    model_name: Name = "caption_ray"
    """What OpenAI's clients call the model."""

    examples: Uri | None = None
    """URI of a folder of pictures to try on the page (the first four by name); null: drawn scenes,
    which only a captioner that was trained on the embedded data set understands."""


class StartError(CheckpointError, RayServeException):
    """There is nothing to serve.

    A RayServeException, because Ray then reports just its message; after any other error it calls
    `build_app` three more times and reports two tracebacks.
    """


def build_app(args: Arguments | dict[str, Any]) -> Application:
    """The application that serves one verified checkpoint; `args` are those of `Arguments`.

    Raises StartError, a CheckpointError, if there is none, or it is unreadable, of another model,
    or cannot caption: the application then never starts, and one already running continues. Raises
    the same for arguments that are unknown or out of bounds, and for tokens that cannot be read.
    """
    if not isinstance(args, Arguments):
        try:
            args = from_dict(Arguments, args, "args of caption_ray.serving.app:build_app")
        except ValueError as error:
            raise StartError(str(error)) from error
    try:
        require_own_port()
    except PortTakenError as error:
        raise StartError(str(error)) from error
    mend_proxies_that_run()  # so that they say that the endpoint is starting
    serving = Serving(
        checkpoint=args.checkpoint, storage=args.storage, follow_interval_s=args.follow_interval_s
    )
    try:
        predictor = Predictor(run_folder.read(serving.find, checkpoint.load), torch.device("cpu"))
        predictor.warm_up()
    except (ValueError, OSError) as error:
        raise StartError(f"checkpoint {args.checkpoint!r} cannot be served: {error}") from error
    try:
        Tokens(args.tokens_file)
        check_allow_list(args.url_allow_list)
    except ValueError as error:
        raise StartError(str(error)) from error
    num_gpus = args.num_gpus
    if num_gpus is None:
        if not ray.is_initialized():  # `serve run` with an import path builds before it connects
            cluster.connect()
        num_gpus = 1 if cluster.num_gpus() else 0

    captioner = serve.deployment(
        name=DEPLOYMENT,
        # Ray queues the excess in the ingresses and retries with backoff; queued here, it is in the
        # next batch.
        max_ongoing_requests=MAX_QUEUE + 2 * args.max_batch_size,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": cluster.SERVING_ENVIRONMENT},
        },
        user_config=serving.model_dump(),
    )(CaptionerReplica)
    ingress = serve.deployment(
        max_ongoing_requests=INGRESS_REQUESTS,
        ray_actor_options={
            "num_cpus": 1,
            "runtime_env": {"env_vars": cluster.SERVING_ENVIRONMENT | cluster.INGRESS_ENVIRONMENT},
        },
    )(serve.ingress()(Ingress))
    return ingress.bind(
        captioner.bind(
            predictor.uri,
            cpu_threads=args.cpu_threads,
            cuda_graphs=args.cuda_graphs,
            max_batch_size=args.max_batch_size,
            batch_wait_timeout_s=args.batch_wait_timeout_s,
            max_queue_s=args.max_queue_s,
            max_queue=MAX_QUEUE,
        ),
        predictor.encoder_config,
        describe(predictor, refused=None),
        Settings(
            max_body_bytes=args.max_body_bytes,
            max_buffered_bytes=args.max_buffered_bytes,
            max_decoding_bytes=args.max_decoding_bytes,
            body_timeout_s=args.body_timeout_s,
            request_timeout_s=args.request_timeout_s,
            tokens_file=args.tokens_file,
            cors_origins=args.cors_origins,
            url_allow_list=args.url_allow_list,
            model_name=args.model_name,
            examples=args.examples,
        ),
    )
