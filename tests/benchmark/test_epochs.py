import json

import pytest

from caption_ray.benchmark import epochs


@pytest.mark.parametrize("workers", [1, 4])
def test_both_ways_are_measured_on_the_same_epochs_and_only_ours_above_the_bound(
    monkeypatch, capsys, workers
):
    monkeypatch.setattr(epochs, "PICTURES", (1_003, 2_006))
    monkeypatch.setattr(epochs, "SIMPLE_UP_TO", 1_003)
    epochs.run(epochs.Epochs(shards=17, workers=workers, rounds=1))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["at"]
    assert [list(ways) for ways in found.values()] == [["caption_ray", "simple"]] * 2 + [
        ["caption_ray"]
    ] * 2
    for ways in found.values():
        assert ways["caption_ray"]["exchange_bytes"] < 17 + 2_006
