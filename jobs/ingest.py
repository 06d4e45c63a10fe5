"""Turn pictures and captions into shuffled shards: `python jobs/ingest.py --source URI --out URI`.

The source is COCO 2017 as the world has it (zips by URL, path or bucket, unpacked folders, JPEGs
and annotations) or a set in the same layout. Run it again to complete an interrupted ingest.
"""

from dataclasses import dataclass, field
from shlex import quote

from caption_ray import cluster, command, config
from caption_ray.data import ingest, sources
from caption_ray.data.shards import outline
from caption_ray.training import feature_cache


@dataclass
class Arguments:
    source: config.Uri
    """Folder, bucket prefix or address that holds the pictures and annotations, as COCO ships
    them: http://images.cocodataset.org is COCO's own."""
    out: config.Uri
    """Folder or bucket prefix for the shards and their index."""
    image_size: config.Size | None = ingest.SHORTER_SIDE
    """Shrink larger pictures to this shorter side, in pixels; None keeps the originals."""
    images_per_shard: config.Count = ingest.IMAGES_PER_SHARD
    """Pictures in one shard."""
    splits: config.Names = sources.SPLITS
    """Which splits to ingest."""
    karpathy: config.Uri | None = None
    """URI of Karpathy's dataset_coco.json: use his splits instead of COCO's."""
    seed: config.Seed = 0
    """Seed of the shuffle over shards."""
    features: bool = False
    """Compute what a frozen encoder makes of the pictures: runs that neither train it nor augment
    read that (and would compute it themselves)."""
    encoder: config.EncoderConfig = field(default_factory=config.EncoderConfig)
    """The encoder of these features: as --model.encoder of the training."""


def main() -> None:
    arguments = vars(config.parse_arguments(Arguments, description=__doc__))
    with_features, encoder = arguments.pop("features"), arguments.pop("encoder")
    if with_features:
        feature_cache.check_encoder(encoder)  # at once, before Ray starts
    out = arguments.pop("out")
    command.check_output("out", out, folder=True)
    found = ingest.inspect(**arguments).at(out)  # what is wrong shows before Ray starts
    cluster.connect(out)
    index = ingest.write(found)
    encoded = feature_cache.encode_shards(out, encoder) if with_features else {}
    for split in index.splits:
        shards = index.shards(split)
        megabytes = sum(shard.bytes for shard in shards) / 1e6
        print(f"{split}: {sum(index.rows(split))} images, {len(shards)} shards, {megabytes:.1f} MB")
    print(f"features: {encoded or 'none'}; left out: {outline(index.left_out) or 'nothing'}")
    print(f"Next: python jobs/train.py coco --data.shards {quote(out)}")


if __name__ == "__main__":
    command.run(main)
