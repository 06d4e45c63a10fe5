"""Web servers, which are read-only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from caption_ray.storage.common import (
    CONNECT_TIMEOUT,
    Buffer,
    HttpStatus,
    read_timeout,
    time_limit,
)


class Http:
    """`http://` and `https://`, for example COCO's own zip files."""

    def __init__(self) -> None:
        import urllib3

        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=read_timeout())
        retries = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5)
        self.pool = urllib3.PoolManager(maxsize=32, timeout=timeout, retries=retries)

    def request(self, method: str, uri: str, headers: dict[str, str]) -> Any:
        """The server's response, with its body unread. Raises for an error status."""
        try:
            response = self.pool.request(method, uri, headers=headers, preload_content=False)
        except ValueError as error:  # a host or port that cannot be
            raise ValueError(f"{uri}: {error}") from None
        if response.status < 400:
            return response
        response.close()
        if response.status in (404, 410):
            raise FileNotFoundError(f"{uri}: HTTP {response.status}")
        raise HttpStatus(response.status)

    def read(
        self, uri: str, window: tuple[int, int] | None, headers: dict[str, str] | None = None
    ) -> bytes:
        headers = dict(headers or {})
        if window is not None:
            headers["Range"] = f"bytes={window[0]}-{window[0] + window[1] - 1}"
        response = self.request("GET", uri, headers)
        if window is not None and response.status != 206:
            response.close()  # instead of reading the whole of it
            raise ValueError(f"{uri}: this server does not serve ranges; download the file first")
        with time_limit(response, int(response.headers.get("Content-Length", 0))):
            data: bytes = response.read()
        response.release_conn()
        return data

    def read_large(self, uri: str) -> Buffer:
        return self.read(uri, None)

    def write(self, uri: str, data: bytes) -> None:
        raise ValueError(f"{uri}: cannot write to a web server; give a local path or a bucket")

    def create(self, uri: str, data: bytes) -> bool:
        self.write(uri, data)
        return True

    def size(self, uri: str) -> int:
        response = self.request("HEAD", uri, {})
        response.release_conn()
        length = response.headers.get("Content-Length")
        if length is None:
            raise ValueError(f"{uri}: the server does not say how long this is; download it first")
        return int(length)

    def walk(self, uri: str) -> Iterator[str]:
        return iter(())  # a web server has no listing

    folders = walk

    def delete(self, uri: str) -> None:
        self.write(uri, b"")

    delete_partial = delete

    def check_writable(self, uri: str, folder: bool) -> None:
        self.write(uri, b"")
