"""Ray Train's controller, which dies of a single refusal of storage, is started again."""

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from caption_ray.training import trainer


class Shown:
    """A console that remembers what it was told."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def stop(self):
        raise AssertionError("nobody stops it")

    def failure(self):
        return None


class Trainer:
    """Dies so many times before it ends well."""

    def __init__(self, deaths):
        self.deaths = deaths
        self.calls = 0

    def fit(self):
        self.calls += 1
        if self.calls <= self.deaths:
            raise RayActorError(error_msg="Traceback\nOSError: HTTP status 429")
        return SimpleNamespace(return_value=True)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(trainer.time, "sleep", lambda _: None)


def test_a_controller_that_dies_is_started_again_and_the_console_says_why():
    shown = Shown()
    assert trainer._call_fit(Trainer(2), threading.Event(), shown).return_value
    assert len(shown.said) == 2
    assert all("HTTP status 429" in line for line in shown.said)


def test_a_controller_that_always_dies_ends_the_run_with_its_reason():
    always = Trainer(1000)
    with pytest.raises(trainer.RunError, match="controller died: OSError: HTTP status 429"):
        trainer._call_fit(always, threading.Event(), Shown())
    assert always.calls == trainer.CONTROLLER_ATTEMPTS
