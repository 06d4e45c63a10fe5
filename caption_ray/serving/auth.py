"""Bearer tokens: which clients may ask for captions. http.py checks them on every request."""

from __future__ import annotations

import codecs
import hmac
import logging
import re
import time
from pathlib import Path

from caption_ray.config import from_environment

TOKENS_VARIABLE = "CAPTION_RAY_TOKENS"
"""Environment variable with the accepted tokens, separated by commas."""

REREAD_S = 1.0
"""Seconds until a change of the file takes effect, at most."""

MIN_LENGTH = 16
"""Characters of a token, at least; shorter ones could be guessed."""

logger = logging.getLogger("ray.serve")


class Tokens:
    """The accepted tokens: those of $CAPTION_RAY_TOKENS and those of a file.

    Several, so that a new token can be handed out before the old one is withdrawn. The file has one
    on each line; empty lines do not count, nor does what follows a # at the start of a line or
    after a space. It is read again when it changes; if that fails, its previous tokens stay valid.
    """

    def __init__(self, file: str | None) -> None:
        """Raises ValueError if the file cannot be read or has no token, or for what is no token;
        tokens themselves are in no message."""
        given = (from_environment(TOKENS_VARIABLE) or "").split(",")
        self._fixed = [
            _checked(token.strip(), f"${TOKENS_VARIABLE}: token {number}")
            for number, token in enumerate(given, 1)
            if token.strip()
        ]
        self._file = Path(file).expanduser() if file else None
        self._from_file: list[bytes] = []
        self._stamp: tuple[int, int] | None = None
        self._looked = time.monotonic()
        if self._file is not None:
            try:
                self._read(self._file)
            except OSError as error:
                raise ValueError(
                    f"tokens_file is {file!r}: {error.strerror}; write tokens into it, one per "
                    "line, or leave the setting out"
                ) from error

    @property
    def required(self) -> bool:
        """Whether tokens are configured; if not, every request is accepted."""
        return bool(self._fixed) or self._file is not None

    def accept(self, authorization: str | None) -> bool:
        """Whether the value of an `Authorization` header holds one of the tokens.

        The time it takes reveals nothing about them.
        """
        self._refresh()
        scheme, _, token = (authorization or "").partition(" ")
        given = token.strip().encode(errors="replace")
        matches = [hmac.compare_digest(given, known) for known in self._fixed + self._from_file]
        return scheme.lower() == "bearer" and any(matches)

    def _refresh(self) -> None:
        if self._file is None or time.monotonic() - self._looked < REREAD_S:
            return
        self._looked = time.monotonic()
        try:
            self._read(self._file)
        except (OSError, ValueError) as error:
            logger.error(f"The previous tokens stay valid: {self._file}: {error}")

    def _read(self, file: Path) -> None:
        status = file.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp == self._stamp:
            return
        tokens = _parse(file.read_bytes(), str(file))
        if not tokens:
            raise ValueError(f"{file} holds no token: write some into it, one per line")
        self._from_file, self._stamp = tokens, stamp


def _parse(content: bytes, file: str) -> list[bytes]:
    """The tokens of a file; ValueError naming the line of what is none."""
    tokens = []
    # as bytes, since a line that is not UTF-8 shall be named; editors of Windows begin with a mark
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        where = f"{file}: line {number}"
        token = re.split(rb"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if token:
            tokens.append(_checked(token.decode("latin-1"), where))
    return tokens


def _checked(token: str, where: str) -> bytes:
    """The token as a header carries it."""
    if any(character.isspace() for character in token):
        raise ValueError(f"{where} has a space inside a token: write one token, and any comment "
                         "after a space and #")  # fmt: skip
    if not token.isascii() or not token.isprintable():
        raise ValueError(
            f"{where} has a character that a header cannot carry: use letters, digits and "
            "punctuation of ASCII (openssl rand -hex 32 makes a token), in a text file in UTF-8"
        )
    if len(token) < MIN_LENGTH:
        raise ValueError(
            f"{where} has a token of {len(token)} characters: use at least {MIN_LENGTH} random "
            "ones (openssl rand -hex 32)"
        )
    return token.encode()
