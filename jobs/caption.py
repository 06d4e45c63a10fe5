"""Caption pictures: `python jobs/caption.py --checkpoint URI --images URI --out URI`.

Writes one JSON line a picture: file, caption and log-probability (or the error).
"""

from dataclasses import dataclass, field

from caption_ray import cluster, command
from caption_ray.captioning import run_folder
from caption_ray.config import SearchOverrides, Uri, default_storage, parse_arguments
from caption_ray.evaluation import evaluate
from caption_ray.evaluation.finding import find_images


@dataclass
class Arguments:
    images: Uri
    """One picture, a folder, a glob (in quotes) or a bucket prefix."""
    out: Uri
    """Where the JSON lines go."""
    checkpoint: Uri = field(default_factory=default_storage)
    """A checkpoint, a run (its best checkpoint) or a folder of runs (the newest run's best);
    several, separated by commas, caption together."""
    search: SearchOverrides = field(default_factory=SearchOverrides)
    """How captions are searched for; None: as the checkpoint says."""


def main() -> None:
    arguments = parse_arguments(Arguments, description=__doc__)
    command.check_output("out", arguments.out, folder=False)
    loaded = run_folder.load(arguments.checkpoint)
    search = arguments.search.apply(loaded.search)
    files = find_images(arguments.images)
    cluster.connect(arguments.out)
    unreadable = evaluate.caption_files(loaded, files, arguments.out, search=search)
    print(f"Captions of {loaded.uri} in {arguments.out}; {unreadable} unreadable pictures")


if __name__ == "__main__":
    command.run(main)
