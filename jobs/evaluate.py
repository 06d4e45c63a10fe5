"""Score a checkpoint: `python jobs/evaluate.py --shards URI [--checkpoint URI] [--split val]`.

Captions every picture of the split once and compares with what people wrote: BLEU, METEOR, ROUGE-L,
CIDEr-D, SPICE, the pointing game. Writes the results as COCO's evaluation server takes them, the
scores of each image, and a report to look at.
"""

from dataclasses import dataclass, field

from caption_ray import cluster, command, config
from caption_ray.captioning import run_folder
from caption_ray.data.dataset import open_shards
from caption_ray.evaluation import scorecard


@dataclass
class Arguments:
    shards: config.Uri
    """Folder or bucket prefix that jobs/ingest.py wrote."""
    checkpoint: config.Uri = field(default_factory=config.default_storage)
    """A checkpoint, a run (its best checkpoint) or a folder of runs (the newest run's best);
    several, separated by commas, caption together."""
    split: config.Name = "val"
    """Split of the shards."""
    out: config.Uri | None = None
    """Where the files go; None: below the run, evaluation/<split>."""
    name: config.FileName = "caption_ray"
    """What the results file calls the system."""
    search: config.SearchOverrides = field(default_factory=config.SearchOverrides)
    """How captions are searched for; None: as the checkpoint says."""
    java: bool = True
    """Also METEOR and SPICE, if Java and pycocoevalcap are there."""
    limit: config.Count | None = None
    """Score only this many pictures; None scores all of the split."""


def main() -> None:
    arguments = config.parse_arguments(Arguments, description=__doc__)
    loaded = run_folder.load(arguments.checkpoint)
    search = arguments.search.apply(loaded.search)
    out = arguments.out or run_folder.evaluation_folder(loaded.uri, arguments.split)
    command.check_output("out", out, folder=True)
    dataset = open_shards(arguments.shards)
    dataset.rows(arguments.split)  # refused before Ray starts if there is no such split
    cluster.connect(out)
    card = scorecard.make(
        loaded, dataset, arguments.split, out,
        name=arguments.name, search=search, java=arguments.java, limit=arguments.limit,
    )  # fmt: skip
    page = scorecard.log(card, loaded, arguments.split)
    print(f"{card.table()}\n\nFiles: {card.out}" + (f"\nLogged to run {page}" if page else ""))


if __name__ == "__main__":
    command.run(main)
