"""What ends a job is told in a few lines, with a status of 1, whatever it is."""

import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest

from caption_ray import cluster, command, config, storage

JOBS = Path(__file__).resolve().parents[1] / "jobs"


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


def a_copy_by_ray(tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    return copy


@pytest.mark.parametrize("uri", ["./runs", "captions.jsonl", "a/b"])
def test_an_output_that_would_vanish_with_rays_copy_is_refused(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(a_copy_by_ray(tmp_path))
    remedy = r"which vanishes .*; give an absolute path on storage that all nodes share, or s3://"
    for given in (uri, str(Path.cwd() / uri)):
        with pytest.raises(ValueError, match=rf"^--out is .*{remedy}"):
            command.check_output("out", given, folder=True)
    assert not list(Path.cwd().iterdir())


def test_an_output_elsewhere_is_taken_from_within_rays_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(a_copy_by_ray(tmp_path))
    command.check_output("out", str(tmp_path / "runs"), folder=True)


@pytest.mark.parametrize("name", ["working_dir_files", "_ray_pkg_x", "working_dir_files/mine"])
def test_folders_that_only_look_like_rays_copy_are_taken(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    command.check_output("out", "runs", folder=True)


def load(job):
    spec = importlib.util.spec_from_file_location(f"job_{job}", JOBS / f"{job}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro looks for the docstrings
    spec.loader.exec_module(module)
    return module


WRITERS = [
    # the job, what it is started with but for where it writes, that option, and its default
    ("train", [], "run.storage", "./runs"),
    ("ingest", ["--source", "x"], "out", None),
    ("caption", ["--images", "x", "--checkpoint", "RUN"], "out", None),
    ("evaluate", ["--shards", "x", "--checkpoint", "RUN"], "out", None),
]


@pytest.mark.parametrize(("job", "arguments", "option", "default"), WRITERS)
def test_every_job_looks_at_its_output_before_it_starts_ray(
    job, arguments, option, default, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "connect", lambda *_: pytest.fail("Ray was to be started"))
    monkeypatch.delenv(config.STORAGE_VARIABLE, raising=False)
    main = load(job).main
    arguments = [tiny_run if word == "RUN" else word for word in arguments]
    (tmp_path / "file").touch()

    def said(*given):
        return ended(main, monkeypatch, *arguments, *given)

    for bad, reason in (
        (f"{tmp_path}/file/x", "a part of this path is a file"),
        ("http://example.com/x", "cannot write to a web server"),
    ):
        told = said(f"--{option}", bad)
        assert told.startswith(f"error: --{option} is '{bad}'") and reason in told
        assert len(told.splitlines()) == 1
    monkeypatch.chdir(a_copy_by_ray(tmp_path))
    assert "vanishes" in said(f"--{option}", "mine")
    if default is not None:
        assert f"--{option} is '{default}'" in said()


def test_captions_cannot_go_into_a_file_that_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match=rf"^--out is '{tmp_path}': a folder .*; name a file"):
        command.check_output("out", str(tmp_path), folder=False)


@pytest.mark.parametrize(("nodes", "output", "warned"), [
    (1, "runs", False), (2, "runs", True), (2, "s3://b/runs", False), (2, None, False),
])  # fmt: skip
def test_a_local_output_is_told_where_there_are_several_nodes(
    nodes, output, warned, monkeypatch, capsys
):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "configure_data", lambda: None)
    monkeypatch.setattr(cluster, "num_nodes", lambda: nodes)
    cluster.connect(output)
    assert (f"note: {Path.cwd()}/runs must be the same place on all 2" in capsys.readouterr().out
            ) == warned  # fmt: skip
