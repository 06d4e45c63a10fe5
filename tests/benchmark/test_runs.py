"""Only the steady part of a run is measured."""

import pytest

from caption_ray.benchmark import runs


def _window(step, seconds, images, waited):
    rates = {"train/images_per_second": images / seconds, "train/data_wait_share": waited / seconds}
    return {"step": step, "train/loss": 1.0, **rates}


def test_windows_after_the_first_steps_count_by_their_time():
    first = runs.WARM_UP
    history = [
        _window(1, 30.0, 32, 29.0),
        _window(first, 9.0, 32 * (first - 1), 8.0),
        {"step": first, "val/loss": 2.0},
        _window(first + 8, 2.0, 32 * 8, 0.5),
        _window(first + 16, 6.0, 32 * 8, 0.0),
    ]
    rate, waited = runs.steady(history, 32)
    assert rate == pytest.approx(32 * 16 / 8.0)
    assert waited == pytest.approx({"data": 0.5 / 8.0})
