"""Turn pictures and captions into shuffled shards: `python jobs/ingest.py --source URI --out URI`.

The source is COCO as the world has it, WebDataset tars, Parquet files of the Hugging Face Hub, an
imagefolder, Karpathy's JSON, or a table of pictures (or their addresses) and captions. Run it again
to complete an interrupted ingest.
"""

from dataclasses import dataclass, field
from shlex import quote

from caption_ray import cluster, command, config
from caption_ray.data import ingest
from caption_ray.data.shards import outline
from caption_ray.training import feature_cache


@dataclass(frozen=True, kw_only=True)
class Arguments(config.SourceConfig):
    source: config.Uri
    """Folder, bucket prefix, file, pattern like {00000..00012}.tar or hf://datasets/NAME that holds
    pictures and captions; http://images.cocodataset.org is COCO's own server."""
    out: config.Uri
    """Folder or bucket prefix for the shards and their index."""
    image_size: config.Size | None = ingest.SHORTER_SIDE
    """Shrink larger pictures to this shorter side, in pixels; None keeps the originals."""
    images_per_shard: config.Count = ingest.IMAGES_PER_SHARD
    """Pictures in one shard."""
    splits: config.Names | None = None
    """Which splits to ingest; None: train, val, and test if there is one."""
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
    asked = config.parse_arguments(Arguments, description=__doc__)
    out = asked.out
    if asked.features:
        feature_cache.check_encoder(asked.encoder)  # at once, before Ray starts
    command.check_output("out", out, folder=True)
    found = ingest.inspect(  # what is wrong shows before Ray starts
        source=asked.source, image_size=asked.image_size, images_per_shard=asked.images_per_shard,
        seed=asked.seed, splits=asked.splits, karpathy=asked.karpathy, options=asked,
    ).at(out)  # fmt: skip
    cluster.connect(out)
    index = ingest.write(found)
    encoded = feature_cache.encode_shards(out, asked.encoder) if asked.features else {}
    print(index.summary())
    print(f"features: {encoded or 'none'}; left out: {outline(index.left_out) or 'nothing'}")
    print(f"Next: python jobs/train.py coco --data.shards {quote(out)}")


if __name__ == "__main__":
    command.run(main)
