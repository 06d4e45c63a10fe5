"""Train a captioner: `python jobs/train.py [shapes|coco|seed] [--section.setting value ...]`.

Without arguments: the embedded data set of drawn scenes, some minutes on a laptop.
On a cluster: `ray job submit --working-dir . -- python jobs/train.py coco --data.shards URI ...`.
"""

import shlex

from caption_ray import cluster, command, config
from caption_ray.captioning import checkpoint
from caption_ray.evaluation import evaluate, report
from caption_ray.training import trainer


def main() -> None:
    settings = config.parse(description=__doc__)
    trainer.check(settings)  # at once, before Ray starts
    command.check_output("run.storage", settings.run.storage, folder=True)
    trainer.check_inputs(settings)
    cluster.connect(settings.run.storage)
    try:
        finished = trainer.train(settings)
    except trainer.Stopped as stopped:
        raise SystemExit(str(stopped)) from None
    curve = report.write_loss_curve(finished.history, finished.run)
    drawn = settings.data.shards is None and settings.data.source is None
    loaded = checkpoint.load(finished.checkpoint)
    records = evaluate.caption_split(
        loaded, trainer.open_data(settings), "val", limit=None if drawn else 5
    )
    print("\nSample captions of validation pictures:")
    for record in records[:5]:
        said = record["caption"] if record["error"] is None else f"unreadable ({record['error']})"
        print(f"  {record['file']}: {said}")
    if drawn:
        share = evaluate.judge_shapes(records)
        print(
            f"Held-out scenes captioned truly and fully: {100 * share['exact']:.1f} % of "
            f"{len(records)} (true {100 * share['true']:.1f} %, naming every object "
            f"{100 * share['complete']:.1f} %)"
        )
    print(f"Loss curve: {curve}")
    print(f"Checkpoint: {finished.checkpoint}")
    print("Next: serve run serve_config.yaml")
    run = shlex.quote(finished.run)
    print(f"  or: python jobs/caption.py --checkpoint {run} --images FOLDER --out FILE")


if __name__ == "__main__":
    command.run(main)
