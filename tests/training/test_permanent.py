"""What ends a run at once, and how its end is known where nothing can be written."""

import errno
import logging
from types import SimpleNamespace

import pytest

from caption_ray import cluster, ray_internals, storage
from caption_ray.config import coco, shapes
from caption_ray.model import encoder
from caption_ray.storage.failures import lasting
from caption_ray.training import trainer, worker

pytest.importorskip("botocore")


class _Mailbox:
    """A console without Ray."""

    def __init__(self, reason=None):
        self.reason = reason

    def fail(self, reason):
        self.reason = reason

    def failure(self):
        return self.reason


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Runs `work` as the only worker, whose start raises an error; (what it returns, mailbox)."""
    levels = {name: logging.getLogger(name).level for name in (None, "ray.train")}
    context = SimpleNamespace(get_world_size=lambda: 1)
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: context)

    def run(error, place=tmp_path, mailbox=None):
        def fail(assignment):
            raise error

        monkeypatch.setattr(worker, "_Worker", fail)
        claim = SimpleNamespace(run=str(place), is_lost=lambda: False, require=lambda: None)
        assignment = SimpleNamespace(claim=claim, console=mailbox or _Mailbox())
        return worker.work({"assignment": assignment}), assignment.console

    yield run
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _raised(number):
    """As storage raises it."""
    try:
        cause = OSError(number, "no")
        raise lasting("/x", cause) from cause
    except storage.StorageError as error:
        return error


NO_ROOM = _raised(errno.ENOSPC)


@pytest.mark.parametrize(
    "error", [ValueError("--x is 1: give 2"), NO_ROOM, OSError(errno.EROFS, "read-only")]
)
def test_an_error_that_lasts_ends_the_only_worker_without_a_restart(error, alone, tmp_path):
    complete, mailbox = alone(error)
    assert complete is False and mailbox.reason == f"{type(error).__name__}: {error}"
    assert (tmp_path / "failure.txt").read_text() == mailbox.reason


def test_the_driver_hears_of_an_error_that_cannot_be_written_down(alone, tmp_path):
    (tmp_path / "file").touch()
    complete, mailbox = alone(NO_ROOM, tmp_path / "file" / "run")
    assert complete is False and mailbox.reason == f"StorageError: {NO_ROOM}"


@pytest.mark.parametrize(
    "error", [_raised(errno.EIO), storage.StorageError("s3://b: (tried 6 times)"), OSError("reset")]
)
def test_an_error_that_may_pass_is_left_to_a_restart(error, alone, tmp_path):
    with pytest.raises(OSError):
        alone(error)
    assert not list(tmp_path.iterdir())


def test_workers_that_start_after_a_failure_end_at_once(alone):
    mailbox = _Mailbox("it cannot work")
    complete, _ = alone(AssertionError("was started"), mailbox=mailbox)
    assert complete is False


def test_storage_without_credentials_lasts_and_a_server_that_is_down_does_not():
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError

    for cause, is_lasting in (
        (NoCredentialsError(), True),
        (EndpointConnectionError(endpoint_url="x"), False),
    ):
        error = lasting("s3://b/x", cause)
        error.__cause__ = cause
        assert storage.lasts(error) == is_lasting


def test_weights_that_cannot_be_downloaded_are_told_in_one_sentence(monkeypatch):
    from torchvision.models import ResNet101_Weights

    def no_network(self, **_):
        raise OSError("no such host")

    monkeypatch.setattr(ResNet101_Weights, "get_state_dict", no_network)
    monkeypatch.setattr(cluster, "num_cpus", lambda: 64.0)
    settings = coco()
    with pytest.raises(ConnectionError) as refused:
        trainer._check_start(settings, gpus=0)
    assert "cannot download ResNet101_Weights." in str(refused.value)
    assert "from download.pytorch.org (no such host); give the path or URI" in str(refused.value)
    assert encoder.build_encoder(shapes().model.encoder, None)


def test_too_few_cpus_for_decoding_are_known_before_workers_start(monkeypatch):
    settings = shapes()
    needed = settings.train.num_workers * settings.train.cpus_per_worker
    monkeypatch.setattr(cluster, "num_cpus", lambda: needed)
    with pytest.raises(ValueError, match=r"leave 0 of the cluster's CPUs for decoding"):
        trainer._check_start(settings, gpus=0)
    monkeypatch.setattr(cluster, "num_cpus", lambda: 0.0)  # nodes may start on demand
    monkeypatch.setattr(ray_internals, "is_started_here", lambda: False)
    trainer._check_start(settings, gpus=0)
