"""Parses URIs: each is a local path or a place in some storage, or is refused with a reason.

A path with a colon in its first part is never taken for a local one: a mistyped bucket name would
otherwise create a folder called `s3:`. Names are percent-encoded where the URI standard asks for it
(web servers, `file:` and pyarrow's schemes); S3 keys are written literally, as in other S3 tools.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote, unquote_to_bytes

ARROW_SCHEMES = ("gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "hf")
"""Schemes that pyarrow supports itself; `fsspec+NAME://` reaches any file system of fsspec."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")

_BUCKET = re.compile(
    # the names that boto3 accepts (some servers allow more than Amazon's does), and access points
    r"(?P<bucket>(?!\.+(?:/|$))[a-zA-Z0-9._-]{1,255}"
    r"|arn:aws[^:/]*:s3(?:-object-lambda)?:[a-z0-9-]*:\d{12}:accesspoint[/:][a-zA-Z0-9.-]{1,63}"
    r"|arn:aws[^:/]*:s3-outposts:[a-z0-9-]+:\d{12}:outpost[/:][a-zA-Z0-9-]{1,63}"
    r"[/:]accesspoint[/:][a-zA-Z0-9-]{1,63})(?:/(?P<key>.*))?",
    re.DOTALL,
)

_HOST = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d+)?")

_PLACE = re.compile(r"(?:[\w.-]+@)?[\w.-]+(?::\d+)?")
"""The bucket, host or container at the start of one of pyarrow's URIs."""

_RESERVED = ":/?#[]@!$&'()*+,;=~"
"""Characters that have a meaning in a URI unless they are escaped."""


def scheme(uri: str) -> str:
    """The scheme (`s3`, `http`, ...) of a URI, or `file` for a local path. Raises ValueError if it
    could be either."""
    if not uri.strip():
        _refuse(
            uri, "names nothing; give a path or a URI (. is this folder; is a variable not set?)"
        )
    if uri[0].isspace():
        _refuse(uri, "begins with a space; remove it")
    if "\0" in uri:
        _refuse(uri, "no name has a zero byte")
    head = _head(uri)
    if head is None:
        return "file"
    kind, rest = head.lower(), uri[len(head) + 1 :]
    known = kind in ("file", "s3", "http", "https", *ARROW_SCHEMES) or kind.startswith("fsspec+")
    if len(head) == 1 and rest[:1] in ("\\", "/"):
        _refuse(uri, "a path of Windows; give a path of this machine or a URI")
    if not rest.startswith("//") and not (kind == "file" and rest.startswith("/")):
        meant = f"write {kind}://..., or " if known else ""
        _refuse(uri, f"neither a URI nor a path; {meant}write ./{shown(uri)} for a local file")
    if kind in ("s3a", "s3n"):
        _refuse(uri, "Hadoop's name for S3; write s3://")
    if not known or not _SCHEME.fullmatch(head):
        _refuse(
            uri,
            f"no storage of this kind ({head}); give a local path, s3://, https:// or another "
            f"scheme that pyarrow knows ({', '.join(ARROW_SCHEMES)})",
        )
    return kind


def resolve(uri: str) -> str:
    """The absolute form of `uri`, which means the same in every process and working directory.

    Raises ValueError, naming `uri` and what to write instead, if it is invalid or ambiguous.
    """
    kind = scheme(uri)
    if kind == "file":
        return _resolve_path(uri)
    if uri[-1].isspace():
        _refuse(uri, "ends with a space; remove it")
    rest = uri[len(kind) + 3 :]
    if kind == "s3":
        return _resolve_s3(uri, rest.rstrip("/"))
    place, path = re.match(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    web = kind in ("http", "https")
    if "@" in place and (web or ":" in place.partition("@")[0]):
        _refuse_credentials(uri, "use a link that carries a token, or download the file" if web
                            else "pyarrow finds them in the environment")  # fmt: skip
    if not (_HOST if web else _PLACE).fullmatch(place):
        if place or kind not in ("hdfs", "viewfs"):  # these have a default
            _refuse(uri, f"{place!r} is no name of a {'server' if web else 'bucket or host'}; "
                    f"write {kind}://name/... (is a variable not set?)")  # fmt: skip
    base, tail = _cut(f"{kind}://{place}{_escape_illegal(path)}")
    # on a web server a trailing slash may make a difference; elsewhere it only marks a folder
    return base + tail if web else base.rstrip("/") + tail


def is_local(uri: str) -> bool:
    """Whether `uri` is a path on this machine."""
    return (_head(uri) or "file").lower() == "file"


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`. The parts are plain names: characters such as `?` or `%` are escaped where
    they would have a meaning in the URI."""
    if not uri:
        scheme(uri)  # raises: joining to an empty URI would give a path from the root
    kind = _kind(uri)
    if kind == "file":
        uri = resolve(uri)
    names = [part.strip("/") for part in parts]
    base, tail = uri, ""
    if _is_escaped(kind):
        base, tail = _cut(uri)
        names = [quote(name, safe="/") for name in names]
    if not base.endswith("://"):
        base = base.rstrip("/")
    return "/".join([base, *names]) + tail


def name(uri: str) -> str:
    """The last part of `uri`, unescaped."""
    kind = _kind(uri)
    last = (_cut(uri)[0] if _is_escaped(kind) else uri).rstrip("/").rsplit("/", 1)[-1]
    return unquote(last) if _is_escaped(kind) or kind == "file" else last


def parent(uri: str) -> str:
    """`uri` without its last part."""
    base, tail = _cut(uri) if _is_escaped(_kind(uri)) else (uri, "")
    above, slash, _ = base.rstrip("/").rpartition("/")
    if above.endswith(":/"):
        _refuse(uri, "nothing is above it; name something in it")
    return (above or slash or ".") + tail


def relative(uri: str, folder: str) -> str:
    """The unescaped path of `uri` below `folder`. Both must be resolved."""
    if not _is_escaped(_kind(uri)):
        return uri[len(folder.rstrip("/")) + 1 :]
    return unquote(_cut(uri)[0][len(_cut(folder)[0].rstrip("/")) + 1 :])


def arrow_uri(uri: str) -> str:
    """The URI by which pyarrow, and so Ray, finds the same place. They expect escaped S3 keys, and
    read options after a question mark, one of which makes them create buckets."""
    uri = resolve(uri)
    if _kind(uri) != "s3":
        return uri
    bucket, key = split_bucket(uri)
    if ":" in bucket or "//" in f"/{key}":
        _refuse(uri, "neither an access point nor an empty name between slashes is anything that "
                "Ray can write to; name a bucket and write single slashes")  # fmt: skip
    return f"s3://{bucket}/{quote(key)}".rstrip("/")


def split_bucket(uri: str) -> tuple[str, str]:
    """The bucket and the key, which may be empty, of a resolved S3 URI."""
    match = _BUCKET.fullmatch(uri.removeprefix("s3://"))
    assert match is not None, "not resolved"
    return match["bucket"], match["key"] or ""


def shown(uri: str) -> str:
    """The URI as error messages show it: without anything that may be credentials."""
    return re.sub(r"^([^:]*:/*)(?=[^/]*[:@]).*@", r"\1***@", uri, flags=re.DOTALL)


def _refuse(uri: str, why: str) -> NoReturn:
    raise ValueError(f"{shown(uri)!r}: {why}")


def _refuse_credentials(uri: str, remedy: str) -> NoReturn:
    _refuse(uri, f"credentials have no place in a URI, which is logged and stored; {remedy}")


def _resolve_s3(uri: str, rest: str) -> str:
    match = _BUCKET.fullmatch(rest)
    if match is None:
        place = rest.partition("/")[0]
        if "@" in place or (":" in place and "@" in rest):
            _refuse_credentials(
                uri, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, instead"
            )
        _refuse(uri, "no name of a bucket, which has letters, digits, dots, hyphens and "
                "underscores; write s3://bucket/key (is a variable not set?)")  # fmt: skip
    key = match["key"] or ""
    if {".", ".."} & set(key.split("/")):
        _refuse(uri, "S3 has no . or .. in keys; write out the key that is meant")
    return f"s3://{rest}"


def _resolve_path(uri: str) -> str:
    path = _path_of(uri) if _kind(uri) == "file" else uri
    try:
        # Path drops a leading ./, which tells a file named ~x from the home folder of user x
        return str((Path(path).expanduser() if path[0] == "~" else Path(path)).resolve())
    except RuntimeError as error:  # no such user, or links in a circle
        _refuse(uri, f"no path ({error}); write ./{path} for a name that begins with ~"
                if path.startswith("~") else f"no path ({error}); name another")  # fmt: skip


def _path_of(uri: str) -> str:
    """The local path of a `file:` URI."""
    rest = uri[len("file:") :]
    host, path = "", rest
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        path = slash + path
    if host not in ("", "localhost"):
        _refuse(uri, f"a file of another machine ({host}); write file:///path, or the path alone")
    if not path:
        _refuse(uri, "names no path; write file:///path, or the path alone")
    if re.search(r"[?#]|%(?![0-9A-Fa-f]{2})|%00", path):
        _refuse(uri, "?, # and % are written %3F, %23 and %25 in a file: URI, and no name has a "
                "zero byte; write the path alone")  # fmt: skip
    return os.fsdecode(b"/" + unquote_to_bytes(path).lstrip(b"/"))


def _head(uri: str) -> str | None:
    """The text before the colon in the first part of `uri`; None if there is no colon there."""
    head, colon, _ = uri.partition(":")
    return head if colon and "/" not in head else None


def _kind(uri: str) -> str:
    """The scheme if `uri` looks like a URI, else an empty string. Unlike `scheme`, never raises."""
    head = _head(uri) or ""
    return head.lower() if _SCHEME.fullmatch(head) and uri[len(head) + 1 :][:1] == "/" else ""


def _is_escaped(kind: str) -> bool:
    return kind not in ("", "file", "s3")


def _cut(uri: str) -> tuple[str, str]:
    """`uri` up to its query or fragment, and the rest."""
    match = re.search("[?#]", uri)
    at = match.start() if match else len(uri)
    return uri[:at], uri[at:]


def _escape_illegal(text: str) -> str:
    """Escape the characters that a URI may not contain; existing escapes are kept."""
    return re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", quote(text, safe=f"{_RESERVED}%"))
