"""`hf://datasets/NAME`, data sets of the Hugging Face Hub, which are read-only.

Listings are those of huggingface_hub's file system, and files are read by ranges as from any web
server. With HF_HUB_OFFLINE=1 a data set is read from the cache of earlier downloads instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from caption_ray.storage.common import Buffer, HttpStatus, StorageError
from caption_ray.storage.http import Http
from caption_ray.storage.local import Local
from caption_ray.storage.uris import join

SCHEME = "hf://"

_LOG_IN = (
    "log in with `hf auth login`, or set HF_TOKEN, and accept the data set's conditions on its page"
)


class Hub:
    """Data sets of the Hub; each operation is tried once."""

    def __init__(self) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import HfFileSystem, constants, errors
        except ImportError:
            raise ValueError(
                "hf:// needs huggingface_hub, which is not installed: pip install huggingface_hub"
            ) from None
        self.hub = huggingface_hub
        self.not_cached = errors.LocalEntryNotFoundError
        self.is_offline = bool(constants.HF_HUB_OFFLINE)
        self.files: Any = HfFileSystem(skip_instance_cache=True)
        self.web, self.local = Http(), Local()

    def read(self, uri: str, window: tuple[int, int] | None) -> bytes:
        if self.is_offline:
            return self.local.read(self.cached(uri), window)
        with _explained(uri):
            place = self.files.resolve_path(_path(uri))
            address = self.hub.hf_hub_url(
                place.repo_id,
                place.path_in_repo,
                repo_type=place.repo_type,
                revision=place.revision,
                endpoint=self.files.endpoint,
            )
            token = self.hub.get_token()
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return self.web.read(address, window, headers)

    def read_large(self, uri: str) -> Buffer:
        return self.read(uri, None)

    def size(self, uri: str) -> int:
        if self.is_offline:
            return self.local.size(self.cached(uri))
        with _explained(uri):
            found = self.files.info(_path(uri))
        if found["type"] != "file":
            raise FileNotFoundError(f"{uri}: no such file")
        return int(found["size"])

    def walk(self, uri: str) -> Iterator[str]:
        if self.is_offline:
            folder = self.cached(uri)
            for path in self.local.walk(folder):
                yield join(uri, path[len(folder) + 1 :])
            return
        with _explained(uri):
            top = self.files.resolve_path(_path(uri)).unresolve()
            for path in self.files.find(top):
                if path != top:
                    yield join(uri, path[len(top) + 1 :])

    def folders(self, uri: str) -> Iterator[str]:
        if self.is_offline:
            yield from self.local.folders(self.cached(uri))
            return
        try:
            with _explained(uri):
                for entry in self.files.ls(_path(uri), detail=True):
                    if entry["type"] == "directory":
                        yield entry["name"].rpartition("/")[2]
        except (FileNotFoundError, NotADirectoryError):
            return

    def cached(self, uri: str) -> str:
        """The local path of the file or folder in the cache; FileNotFoundError if there is none."""
        parts = _path(uri).split("/")
        name, _, revision = "/".join(parts[1:3]).partition("@")
        try:
            folder = self.hub.snapshot_download(
                name, repo_type="dataset", revision=revision or None, local_files_only=True
            )
        except self.not_cached:
            raise StorageError(
                f"{uri}: not in the cache of huggingface_hub, and HF_HUB_OFFLINE forbids to look "
                f"elsewhere; download it with `hf download {name} --repo-type dataset`"
            ) from None
        return str(Path(folder, *parts[3:]))

    def write(self, uri: str, data: bytes) -> None:
        raise ValueError(f"{uri}: the Hub is only read; give a local path or a bucket")

    def create(self, uri: str, data: bytes) -> bool:
        self.write(uri, data)
        return True

    def delete(self, uri: str) -> None:
        self.write(uri, b"")

    delete_partial = delete

    def check_writable(self, uri: str, folder: bool) -> None:
        self.write(uri, b"")


def _path(uri: str) -> str:
    """The place as huggingface_hub names it."""
    path = unquote(uri[len(SCHEME) :])
    parts = path.split("/")
    if parts[0] != "datasets" or len(parts) < 3 or not all(parts[1:3]):
        raise ValueError(f"{uri!r}: no data set of the Hub; write hf://datasets/OWNER/NAME")
    return path


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turns errors of the Hub into those of storage."""
    try:
        yield
    except Exception as error:
        status = _status(error)
        if status in (401, 403):
            raise StorageError(
                f"{uri}: no such data set, or not for everybody; {_LOG_IN}"
            ) from error
        if status is not None and status != 404 and not isinstance(error, HttpStatus):
            raise HttpStatus(status) from error
        raise


def _status(error: BaseException) -> int | None:
    """The answer's status behind an error; the Hub's client reports some refusals as files that are
    not there."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HttpStatus):
            return cause.status
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        cause = cause.__cause__
    return None
