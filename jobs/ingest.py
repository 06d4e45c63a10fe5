"""Turn pictures and captions into shuffled shards: `python jobs/ingest.py --source URI --out URI`.

The source is COCO 2017 as the world has it (zips by URL, path or bucket, unpacked folders, raw
JPEGs with their annotation JSON) or any set in the same layout. Run it again to complete an
ingest that was interrupted.
"""

from collections import Counter
from dataclasses import dataclass

import tyro

from caption_ray import cluster, storage
from caption_ray.data import ingest, sources


@dataclass
class Arguments:
    source: str
    """Folder, bucket prefix or address that holds the pictures and annotations, as COCO ships
    them: http://images.cocodataset.org is COCO's own."""
    out: str
    """Folder or bucket prefix for the shards and their index."""
    image_size: int | None = 256
    """Shrink larger pictures to this shorter side, in pixels; None keeps the originals."""
    images_per_shard: int = ingest.IMAGES_PER_SHARD
    """Pictures in one shard."""
    splits: tuple[str, ...] = sources.SPLITS
    """Which splits to ingest."""
    karpathy: str | None = None
    """URI of Karpathy's dataset_coco.json: use his splits instead of COCO's."""
    seed: int = 0
    """Seed of the shuffle over shards."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    cluster.connect()
    try:
        index = ingest.ingest(**vars(arguments))
    except (ValueError, storage.StorageError) as error:
        raise SystemExit(f"error: {error}") from None
    for split in index.splits:
        shards = index.shards(split)
        megabytes = sum(shard.bytes for shard in shards) / 1e6
        print(f"{split}: {sum(index.rows(split))} images, {len(shards)} shards, {megabytes:.1f} MB")
    reasons = Counter(entry.reason for entry in index.left_out)
    print(f"left out: {sum(reasons.values())} {dict(reasons) if reasons else ''}")
    print(f"Next: python jobs/train.py coco --data.shards {arguments.out}")


if __name__ == "__main__":
    main()
