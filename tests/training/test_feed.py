import dataclasses
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ledgers import mask_of

from caption_ray import config
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.training.feed import Feed

SIZES = [4, 4, 4, 3]
SEEN = ([0, 1, 4], [2, 3, 5], [12, 13, 14])
"""What each of three ranks has learnt from: together the first and the last shard, half of the
second and none of the third."""


def _feed(rank=0, world_size=1, **data):
    settings = config.shapes()
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, **data),
        train=dataclasses.replace(settings.train, batch_size=2),
    )
    dataset = types.SimpleNamespace(rows=lambda split: SIZES)
    return Feed(
        settings, dataset, Vocabulary([]), rank=rank, world_size=world_size,
        device=torch.device("cpu"), decode_cpus=1,
    )  # fmt: skip


def _rank(rank, file, results):
    dist.init_process_group("gloo", f"file://{file}", world_size=len(SEEN), rank=rank)
    feed = _feed(rank, len(SEEN))
    feed.seen(np.array(SEEN[rank]))
    shared = feed.shared_ledger()
    own = np.flatnonzero(mask_of(feed.ledger)).tolist()
    feed.end_epoch()
    results.put((rank, shared.to_bytes(), own, feed.shared_ledger().left().tolist()))
    dist.destroy_process_group()


def test_every_rank_gets_the_pictures_that_any_has_seen(tmp_path):
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (str(tmp_path / "store"), results), nprocs=len(SEEN))
    found = sorted(results.get() for _ in SEEN)
    for _, shared, _, left_of_the_next in found:
        assert np.flatnonzero(mask_of(shared)).tolist() == sorted(sum(SEEN, []))
        assert left_of_the_next == SIZES
    assert [own for _, _, own, _ in found] == list(SEEN), "a rank's own ledger has changed"


@pytest.mark.parametrize(
    ("limit", "pictures", "steps"), [(None, 15, (4, 3)), (9, 9, (3, 1)), (99, 15, (4, 3))]
)
def test_steps_are_as_many_as_the_largest_share_of_what_is_left_needs(limit, pictures, steps):
    feed = _feed(world_size=2, max_images=limit)
    assert feed.num_pictures() == pictures
    feed.seen(np.array([0, 1, 2, 3, 4, 13]))
    within = 5 + (limit != 9)
    assert feed.num_pictures(feed.ledger) == pictures - within
    assert (feed.num_steps(), feed.num_steps(feed.ledger)) == steps
    assert feed.num_pictures() == pictures, "of the whole epoch"
    feed.end_epoch()
    assert feed.num_pictures(feed.ledger) == pictures
