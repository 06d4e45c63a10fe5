"""caption_ray.storage on a real S3 server, behind a proxy that injects faults."""

import http.server
import json
import os
import threading
import time
from datetime import datetime, timedelta, timezone

import boto3
import numpy as np
import patience
import pytest
from fault_proxy import FAULTS, FaultProxy

from caption_ray import storage


@pytest.fixture
def proxy(s3, monkeypatch):
    """The proxy without faults; storage goes through it, with short timeouts."""
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.05)
    monkeypatch.setenv(storage.READ_TIMEOUT_VARIABLE, str(patience.scaled(0.5)))
    with FaultProxy(s3.endpoint_url, trickle_s=0.1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage._backend.cache_clear()
        yield proxy
        storage._backend.cache_clear()


def _bytes(size):
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_written_and_read_through_faults_is_right(bucket, proxy, fault):
    rate = 0.15 if fault in ("hang", "trickle") else 0.3  # each of these costs a timeout
    proxy.rates, proxy.seed = {fault: rate}, 7
    objects = {storage.join(bucket, "folder", f"{n:02d}"): _bytes(3_000 + n) for n in range(8)}
    for uri, data in objects.items():
        storage.write_bytes(uri, data)
    for uri, data in objects.items():
        assert storage.read_bytes(uri) == data
        assert storage.read_verified(uri, len(data), storage.checksum(data)) == data
        assert storage.size(uri) == len(data)
    assert storage.list_files(storage.join(bucket, "folder")) == sorted(objects)
    assert proxy.injected[fault] >= 3
    print(f"{fault}: {proxy.injected[fault]} of {proxy.requests} requests")


def test_an_object_in_parts_survives_faults(bucket, proxy):
    proxy.rates = {fault: 0.06 for fault in ("drop", "500", "503", "429", "truncate", "corrupt")}
    data, uri = _bytes(20 << 20), storage.join(bucket, "large")
    storage.write_bytes(uri, data)
    while proxy.injected.total() < 6:  # parts come in any order, and not every fault fits each
        assert storage.read_bytes(uri) == data


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "SlowDown"),
        ("drop", "closed"),
        ("hang", "[Tt]imeout"),
        ("truncate", "IncompleteRead"),
        ("trickle", "did not come within"),
        ("corrupt", "ETag"),
    ],
)
def test_what_stays_broken_is_named(bucket, proxy, monkeypatch, fault, reason):
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    uri = storage.join(bucket, "broken")
    storage.write_bytes(uri, _bytes(2_000))
    proxy.rates = {fault: 1.0}
    with pytest.raises(storage.StorageError, match=rf"{uri}.*{reason}.*3 times"):
        storage.read_bytes(uri)


def test_a_wrong_byte_that_stays_is_damage_and_no_other_error(bucket, proxy, monkeypatch):
    uri, data = storage.join(bucket, "shard"), _bytes(2_000)
    storage.write_bytes(uri, data)
    proxy.rates = {"corrupt": 1.0}
    with pytest.raises(storage.DamagedError, match=uri):
        storage.read_verified(uri, len(data), storage.checksum(data))


def test_etags_that_are_no_digests_are_accepted_after_a_second_look(bucket, monkeypatch):
    uri = storage.join(bucket, "encrypted")
    storage.write_bytes(uri, b"data")
    backend = storage._backend("s3", os.getpid())
    real = backend.client.get_object

    def opaque(**where):
        return {**real(**where), "ETag": '"0123456789abcdef0123456789abcdef"'}

    monkeypatch.setattr(backend.client, "get_object", opaque)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.0)
    assert storage.read_bytes(uri) == b"data"
    assert backend.opaque == {bucket.removeprefix("s3://")}
    storage._backend.cache_clear()


def test_unfinished_uploads_are_removed_where_asked_and_nowhere_else(bucket):
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("run/checkpoint-1/model", "run/checkpoint-1", "run/checkpoint-10/model", "other"):
        client.create_multipart_upload(Bucket=name, Key=key)
    storage.write_bytes(storage.join(bucket, "run/checkpoint-1/config.json"), b"{}")
    storage.delete_partial(storage.join(bucket, "run/checkpoint-1"))
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=name)["Uploads"]]
    assert left == ["other", "run/checkpoint-10/model"]
    assert storage.exists(storage.join(bucket, "run/checkpoint-1/config.json"))
    storage.delete_partial(bucket)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=name)


class _Credentials(http.server.BaseHTTPRequestHandler):
    """What ECS and EKS serve to containers: credentials that expire in a few minutes."""

    keys: tuple[str, str]
    lifetime = timedelta(minutes=5)  # below botocore's refresh threshold, so it always asks again
    asked = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        type(self).asked += 1
        expires = datetime.now(timezone.utc) + self.lifetime
        answer = {
            "AccessKeyId": self.keys[0],
            "SecretAccessKey": self.keys[1],
            "Token": "",
            "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def container(s3, monkeypatch, tmp_path):
    """A credential endpoint instead of keys in the environment."""
    handler = type("Handler", (_Credentials,), {"keys": (s3.access_key, s3.secret_key)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    address = f"http://127.0.0.1:{server.server_port}/credentials"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", address)
    storage._backend.cache_clear()
    yield handler
    storage._backend.cache_clear()
    server.shutdown()
    thread.join()
    server.server_close()


def test_credentials_that_expire_are_asked_for_again(bucket, container):
    uri = storage.join(bucket, "x")
    storage.write_bytes(uri, b"1")
    asked = container.asked
    assert asked >= 1
    time.sleep(1.1)
    assert storage.read_bytes(uri) == b"1"
    assert container.asked > asked
