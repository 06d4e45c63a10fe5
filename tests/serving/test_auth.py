"""Bearer tokens: from the environment, from a file, and during rotation."""

from __future__ import annotations

from pathlib import Path

import pytest

from caption_ray.serving import auth
from caption_ray.serving.auth import Tokens

OLD, NEW, FIXED = "old-token-of-enough-length", "new-token-of-enough-length", "f" * 32


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(auth, "REREAD_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text(f"{OLD}\n\n")
    return path


def test_without_any_nothing_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(auth.TOKENS_VARIABLE, raising=False)
    assert not Tokens(None).required


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (f"Bearer {FIXED}", True),
        (f"bearer  {FIXED} ", True),
        (f"Bearer {FIXED}x", False),
        (f"Bearer {FIXED[:-1]}", False),
        (f"Basic {FIXED}", False),
        (FIXED, False),
        ("Bearer", False),
        ("Bearer ", False),
        ("", False),
        ("Bearer \udcff\xff", False),
        (None, False),
    ],
)
def test_only_a_whole_token_as_bearer_is_accepted(
    monkeypatch: pytest.MonkeyPatch, header: str | None, accepted: bool
) -> None:
    monkeypatch.setenv(auth.TOKENS_VARIABLE, f" {FIXED} ,{NEW}")
    assert Tokens(None).accept(header) is accepted


def test_tokens_are_rotated_without_a_gap(file: Path) -> None:
    tokens = Tokens(str(file))
    assert tokens.accept(f"Bearer {OLD}") and not tokens.accept(f"Bearer {NEW}")
    file.write_text(f"{OLD}\n{NEW}\n")
    assert tokens.accept(f"Bearer {OLD}") and tokens.accept(f"Bearer {NEW}")
    file.write_text(f"{NEW}\n")
    assert not tokens.accept(f"Bearer {OLD}") and tokens.accept(f"Bearer {NEW}")


@pytest.mark.parametrize("content", ["", "\n", "short\n", None])
def test_a_file_that_becomes_useless_locks_nobody_out_and_lets_nobody_in(
    file: Path, content: str | None
) -> None:
    tokens = Tokens(str(file))
    file.unlink() if content is None else file.write_text(content)
    assert tokens.required
    assert tokens.accept(f"Bearer {OLD}") and not tokens.accept(f"Bearer {NEW}")
    assert not tokens.accept("Bearer short") and not tokens.accept("Bearer ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokens_file is .*No such file.*one per line"),
        ("\n", "holds no token"),
        ("short", "line 1 has a token of 5 characters: use at least 16"),
    ],
)
def test_a_useless_file_is_refused_at_the_start(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokens(str(path))


def token(name: str) -> str:
    return f"{name}-of-enough-length"


@pytest.mark.parametrize(
    ("content", "accepted", "refused"),
    [
        (f"{token('a')}\n{token('b')}", ["a", "b"], []),
        (f"\ufeff{token('a')}\r\n{token('b')}\r\n", ["a", "b"], []),
        (f"# {token('a')}\n{token('b')}\n", ["b"], ["a"]),
        (f"  #{token('a')}\n{token('b')}\n", ["b"], ["a"]),
        (f"{token('a')}  # of Zoë, until May\n\t\n{token('b')} #\n", ["a", "b"], []),
        (f"\ufeff# the two\n\n   \n{token('a')}\t# {token('b')}", ["a"], ["b"]),
        (f"{token('a')}#1\n", ["a-of-enough-length#1"], ["a"]),
    ],
)
def test_comments_marks_and_empty_lines_are_no_tokens(
    tmp_path: Path, content: str, accepted: list[str], refused: list[str]
) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content.encode())
    tokens = Tokens(str(path))

    def whole(name: str) -> str:
        return token(name) if len(name) == 1 else name

    assert all(tokens.accept(f"Bearer {whole(name)}") for name in accepted)
    others = [whole(name) for name in refused] + ["#", "# the two", "\ufeff", "of Zoë, until May"]
    assert not any(tokens.accept(f"Bearer {other}") for other in others)


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (f"{token('a')}\n\nshort\n".encode(), 3, "a token of 5 characters"),
        (f"# x\n{token('a')} {token('b')}\n".encode(), 2, "a space inside a token"),
        (f"{token('ä')}\n".encode(), 1, "a character that a header cannot carry"),
        (f"{token('ä')}\n".encode("latin-1"), 1, "a character that a header cannot carry"),
        (f"{token('a')}\n".encode("utf-16"), 1, "a text file in UTF-8"),
        (f"{token('a')}\n{token('b')}\x07\n".encode(), 2, "a character that a header"),
        (b"# only\n\n# comments\n", None, "holds no token"),
    ],
)
def test_what_is_no_token_is_refused_by_its_line_without_being_told(
    tmp_path: Path, content: bytes, line: int | None, reason: str
) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Tokens(str(path))
    assert reason in str(caught.value)
    assert line is None or f"{path}: line {line} has " in str(caught.value)
    assert "of-enough-length" not in str(caught.value)
