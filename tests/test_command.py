"""What ends a job is told in a few lines, with a status of 1, whatever it is."""

import sys
import tempfile
from pathlib import Path

import pytest

from caption_ray import command, config, storage


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def ended(main, monkeypatch, *arguments):
    """What the job says at its end."""
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as end:
        command.run(main)
    return end.value.code


def raises(error):
    def main():
        raise error

    return main


class Wrapped(Exception):
    """As Ray's errors are: with the stacks of other processes in the text."""

    def __init__(self, cause=None, **others):
        super().__init__("a stack\n" * 100)
        self.cause = cause
        vars(self).update(others)


def test_a_bad_value_is_told_in_one_line_without_a_file(monkeypatch, scratch):
    said = ended(lambda: config.require(False, "out", "x", "give y"), monkeypatch)
    assert said == "error: --out is 'x': give y"
    assert not list(scratch.iterdir())


def test_storage_that_refuses_is_told_in_one_line_without_a_file(monkeypatch, scratch):
    error = storage.StorageError("s3://b/x: no credentials; set AWS_PROFILE")
    assert ended(raises(error), monkeypatch) == f"error: {error}"
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("x"), "error: KeyError: 'x'"),
        (RuntimeError(""), "error: RuntimeError"),
        (ValueError("not one of ours"), "error: not one of ours"),
        (RuntimeError("line\n\n" * 50), "error: RuntimeError: line\nline\nline\nline"),
        (OSError(28, "No space left on device", "/x"), "error: /x: No space left on device"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "error: No module named 'x'; inst"),
    ],
)
def test_what_nobody_foresaw_is_named_and_its_stack_kept(error, message, monkeypatch, scratch):
    *said, last = ended(raises(error), monkeypatch).splitlines()
    assert len(said) <= 4 and "\n".join(said).startswith(message)
    (file,) = scratch.iterdir()
    assert last == f"Details: {file}"
    assert "Traceback" in file.read_text() and type(error).__name__ in file.read_text()


def test_an_error_is_told_as_it_was_before_ray_wrapped_it(monkeypatch):
    cause = ValueError("--data.shards is 'x': none there")
    for error in (
        Wrapped(cause),
        Wrapped(Wrapped(cause)),
        Wrapped(worker_failures={1: Wrapped(cause)}),
        Wrapped(controller_failure=cause),
    ):
        said, last = ended(raises(error), monkeypatch).splitlines()
        assert said == f"error: {cause}"
        assert "a stack" in Path(last.removeprefix("Details: ")).read_text()


def test_debug_shows_the_stack_instead_of_keeping_it(monkeypatch, scratch, capsys):
    seen = []

    def main():
        seen.extend(sys.argv)
        raise KeyError("x")

    assert ended(main, monkeypatch, "--out", "y", "--debug") == "error: KeyError: 'x'"
    assert seen == ["job", "--out", "y"], "the job does not know of it"
    assert "Traceback" in capsys.readouterr().err
    assert not list(scratch.iterdir())


def test_a_stack_that_cannot_be_kept_hides_no_message(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    said = ended(raises(KeyError("x")), monkeypatch)
    assert said == "error: KeyError: 'x'\nDetails: run it again with --debug"


def test_a_job_that_is_interrupted_says_no_more_than_that(monkeypatch, capsys):
    assert ended(raises(KeyboardInterrupt()), monkeypatch) == 130
    assert capsys.readouterr().err == "Interrupted\n"


def test_a_job_that_ends_by_itself_is_left_alone(monkeypatch):
    assert ended(raises(SystemExit("Stopped; goes on")), monkeypatch) == "Stopped; goes on"
    command.run(lambda: None)
