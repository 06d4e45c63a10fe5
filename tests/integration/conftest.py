"""Real S3 servers, clusters, kills, browsers, npm and Java: all that is here is marked `slow`."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from page_visitor import browser, serve, visit, visitor  # noqa: F401
from serving_fixtures import (  # noqa: F401
    backend,
    captions,
    client,
    load_on,
    picture,
    predictor,
    refused,
    save_run,
)
from swift_server import swift_s3, why_unavailable

if TYPE_CHECKING:
    from swift_server import S3Server

FOLDER = Path(__file__).parent

# Each would make boto3 or pyarrow ignore the variables that the fixture sets.
COMPETING_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_REGION",
    "AWS_SESSION_TOKEN",
)


ALONE = {
    "test_autoscaler", "test_clusters", "test_faults", "test_one_endpoint",
    "test_serving_autoscaling", "test_serving_faults",
}  # fmt: skip
"""Files whose tests tell by time what is late from what is dead: Ray's nodes, proxies, servers."""

RAY_OF_THEIR_OWN = ALONE | {"test_another_ray", "test_coco_on_s3", "test_kills", "test_vanishing"}
"""Files whose tests start Ray themselves, as a user's commands do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if item.path.stem in ALONE:
                item.add_marker(pytest.mark.alone)
        if item.path.stem in RAY_OF_THEIR_OWN or "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server, to which the AWS_* environment variables point until the session ends."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with swift_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name in COMPETING_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[str]:
    """The URI of an empty bucket, removed after the test with all that it holds."""
    boto3 = pytest.importorskip("boto3")
    s3_client = boto3.client("s3")
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3_client.create_bucket(Bucket=name)
    yield f"s3://{name}"
    everything = boto3.resource("s3").Bucket(name)
    for upload in everything.multipart_uploads.all():
        upload.abort()
    everything.objects.all().delete()
    s3_client.delete_bucket(Bucket=name)
