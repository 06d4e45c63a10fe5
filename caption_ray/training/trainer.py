"""Ray Train, seen from the driver: the same run on one laptop or on many GPUs.

`train` settles the data, the vocabulary and the run's folder, and has Ray start the workers; what
these do is in worker.py.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime

import ray
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer

from caption_ray import cluster, ray_internals, storage
from caption_ray.captioning import checkpoint, ownership, run_folder
from caption_ray.captioning.checkpoint import Loaded
from caption_ray.captioning.ownership import Claim, LostError
from caption_ray.config import Config, DataConfig, EncoderConfig, require, to_dict
from caption_ray.data import unspaced
from caption_ray.data.dataset import DataSet, open_shards, open_source
from caption_ray.data.ingest import SHORTER_SIDE, ensure_ingested, ensure_shapes
from caption_ray.data.tokenizer import PTB, Tokenizer
from caption_ray.data.vocabulary import END, START, Vocabulary
from caption_ray.training import console, feature_cache, initial, rewards, validation
from caption_ray.training.feed import cpus_for_decoding
from caption_ray.training.worker import Assignment, work

MOST_CUT = 0.01
"""Share of training captions that may be cut at `data.caption_length` without a word about it."""

CONTROLLER_ATTEMPTS = 5
"""How often Ray Train's controller is started before a run ends because it dies."""


class RunError(RuntimeError):
    """The run stopped for a reason that starting its workers again would not mend."""


class Stopped(Exception):
    """The run was told to stop, saved where it stood, and can go on from there."""


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    run: str
    """URI of its folder."""
    checkpoint: str
    """URI of the best checkpoint."""
    history: list[dict[str, float]]
    """One record per logged point: step, epoch and metrics."""
    data: str
    """URI of the data set."""


def check(config: Config) -> None:
    """Raise ValueError for settings that cannot work, as far as that shows without Ray and data:
    for a job to ask before it starts anything."""
    feature_cache.is_wanted(config)
    require(
        not config.data.ingest or bool(config.data.source or config.data.shards),
        "data.ingest",
        config.data.ingest,
        "it needs --data.source, the pictures to ingest (or --data.shards, what an ingest wrote)",
    )
    initial.check_model(config)


def check_inputs(config: Config) -> None:
    """Raise ValueError or OSError for data, weights or a start that are not there: for a job to ask
    before it starts Ray, once its output is checked."""
    if config.data.shards is not None:
        open_shards(config.data.shards)
    if config.train.start_from is not None:
        run_folder.find(config.train.start_from)
    name = config.run.name
    run = name and storage.join(storage.resolve(config.run.storage), name)
    if not run or not run_folder.has_begun(run):
        _check_weights(config)


def train(config: Config) -> Finished:
    """Train the configured captioner, or go on with the run of that name.

    Needs a connection to Ray (`cluster.connect`). Raises ValueError for settings and data that
    cannot work, RunError for a run that diverged or whose data is unreadable, Stopped after SIGINT
    or SIGTERM, and Ray's TrainingFailedError when workers die more often than allowed.
    """
    check(config)
    take_over, config = config.run.take_over, _settle(config)
    gpus = cluster.num_gpus() if config.train.use_gpu is not False else 0
    if config.train.use_gpu:
        gpus = max(gpus, config.train.num_workers)
    require(
        gpus > 0 or config.data.decode != "device",
        "data.decode",
        config.data.decode,
        "training has no GPU: give auto, near or far",
    )
    assert config.run.name is not None
    run = storage.join(config.run.storage, config.run.name)
    storage.arrow_uri(config.run.storage)  # refused before anything is written
    if not run_folder.has_begun(run):
        _check_start(config, gpus)
    dataset = open_data(config)
    start = _start(config)
    if start is None:
        vocabulary = _vocabulary(config.data, dataset)
    else:
        vocabulary = start.vocabulary
        config = replace(config, train=replace(config.train, start_from=start.uri))
    job = ray_internals.submission_id()
    with ownership.held(run, job=job, take_over=take_over, say=_say) as (claim, lost):
        resumed = _settle_run(config, run, dataset, vocabulary)
        print(json.dumps(to_dict(config), indent=1))
        _say(
            f"Run {run}: {'resumed' if resumed else 'new'}; {sum(dataset.rows('train'))} training "
            f"and {sum(dataset.rows('val'))} validation pictures, {len(vocabulary)} words, "
            f"{config.train.num_workers} worker(s) on {'GPU' if gpus else 'CPU'}"
        )
        _train(config, claim, lost, dataset, vocabulary, start, gpus)
        return Finished(run, run_folder.find(run), run_folder.read_history(run), dataset.uri)


def _say(line: str) -> None:
    print(line, flush=True)


def _train(
    config: Config,
    claim: Claim,
    lost: threading.Event,
    dataset: DataSet,
    vocabulary: Vocabulary,
    start: Loaded | None,
    gpus: int,
) -> None:
    """Train with Ray's workers, to the end of the run."""
    resources = {"CPU": config.train.cpus_per_worker} | ({"GPU": 1} if gpus else {})
    run_folder.forget_failure(claim.run)
    pictures = shared = ray.put(dataset)
    if feature_cache.is_wanted(config):
        shared = ray.put(_with_features(config, dataset, len(vocabulary), start))
    cider = None
    if config.train.stage == "self-critical":
        cider = ray.put(rewards.document_frequencies(dataset, vocabulary.tokenizer))
    least, most = config.train.min_workers, config.train.num_workers
    cluster.configure_train(elastic=least is not None)
    cluster.keep_data_actors_here()
    with console.shown() as shown:
        assignment = Assignment(
            config, claim, shared, vocabulary, shown, start and ray.put(start), cider
        )
        trainer = TorchTrainer(
            work,
            train_loop_config={"assignment": assignment},
            torch_config=TorchConfig(
                backend=None if config.train.backend == "auto" else config.train.backend
            ),
            validation_config=_validation(config, claim, pictures, gpus),
            scaling_config=ScalingConfig(
                num_workers=most if least is None else (least, most),
                use_gpu=bool(gpus),
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=cluster.RESIZE_SECONDS,
            ),
            run_config=RunConfig(
                name=config.run.name,
                storage_path=storage.arrow_uri(config.run.storage),
                failure_config=FailureConfig(max_failures=config.train.max_failures),
                logging_config=LoggingConfig(log_level="WARNING"),
                worker_runtime_env={"env_vars": cluster.WORKER_ENVIRONMENT},
            ),
        )
        while not _fit(trainer, claim, lost, shown):
            shown.say(
                "Workers died as often as --train.max-failures allows, but the run got further: "
                "restarting"
            )


def _check_start(config: Config, gpus: float) -> None:
    """Raise ValueError or OSError, before workers start, for what would end each of them, or let
    them wait for ever."""
    workers = config.train.min_workers or config.train.num_workers
    option = "min-workers" if config.train.min_workers else "num-workers"
    for kind, each, there in (
        ("CPUs", config.train.cpus_per_worker, cluster.num_cpus()),
        ("GPUs", 1 if gpus else 0, cluster.num_gpus() if gpus else 0),
    ):
        if workers * each <= there:
            continue
        needs = f"{workers} workers need {workers * each:g} {kind}, of which there are {there:g}"
        if ray_internals.is_started_here():
            raise ValueError(
                f"--train.{option} is {workers}: {needs}; lower it"
                + (" or --train.cpus-per-worker" if kind == "CPUs" else "")
                + ", or submit the job to a larger cluster"
            )
        _say(f"note: {needs}: waiting for nodes that start on demand, if this cluster has such")
        return
    cpus_for_decoding(config, workers)
    _check_weights(config)


def _check_weights(config: Config) -> None:
    if config.train.start_from is None and config.model.encoder.weights != "none":
        _load_once(config.model.encoder)


@functools.cache
def _load_once(encoder: EncoderConfig) -> None:
    """Whether an encoder's weights can be had shows only when they are loaded."""
    initial.initial_encoder(encoder)


def _fit(
    trainer: TorchTrainer, claim: Claim, lost: threading.Event, shown: console.Console
) -> bool:
    """Let Ray start workers and replace them as often as allowed. Returns whether the run is
    complete; if not, it got further, so another attempt is worth it.
    """
    run = claim.run
    # Ray's own record of checkpoints would be restored under the same name, and fails where one
    # of them was pruned or Ray is newer; `latest.json` is the only truth about a run
    storage.delete(storage.join(run, "checkpoint_manager_snapshot.json"))
    run_folder.release_all(run)
    before = run_folder.latest_step(run)
    complete, failed = False, None
    try:
        complete = _call_fit(trainer, lost, shown).return_value
    except (TrainingFailedError, console.LeftAloneError) as error:
        failed = error
    reason = shown.failure()  # first, since the reason may be that storage cannot be read
    if reason is None:
        try:
            claim.require()
        except LostError as error:
            raise RunError(str(error)) from failed
        reason = run_folder.failure(run)
    if reason is not None:
        raise RunError(reason)
    if failed is not None and run_folder.latest_step(run) == before:
        raise failed
    if failed is None and not complete:
        raise Stopped(
            f"Stopped; {run_folder.find(run, 'latest')} holds all that was learnt: the same "
            f"command with --run.name {storage.name(run)} goes on"
        )
    return complete


def _call_fit(
    trainer: TorchTrainer, lost: threading.Event, shown: console.Console
) -> ray.train.Result:
    """`trainer.fit()`, again if Ray Train's controller dies: when it starts it looks into storage,
    where a single "too many requests" ends it, since Ray does not ask again."""
    for attempts_left in reversed(range(CONTROLLER_ATTEMPTS)):
        try:
            return console.call_until_told_to_stop(trainer.fit, shown.stop, lost, shown.failure)
        except ray.exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1]
            if not attempts_left:
                raise RunError(f"Ray Train's controller died: {reason}") from error
            shown.say(f"Ray Train's controller died ({reason}): starting it again")
            time.sleep(1)
    raise AssertionError("the last attempt returns or raises")


def _start(config: Config) -> Loaded | None:
    """The checkpoint that the run starts from, if any. It is loaded once for all workers, because
    the run that it belongs to may go on and prune it."""
    uri = config.train.start_from
    if uri is None:
        return None
    start = run_folder.load(uri)
    if start.members:
        raise ValueError(
            f"--train.start-from {uri}: weights come from one checkpoint, not from "
            f"{len(start.members)}; name one"
        )
    tokenizer = start.vocabulary.tokenizer.name
    require(
        config.data.tokenizer == tokenizer,
        "data.tokenizer",
        config.data.tokenizer,
        f"the words of --train.start-from {uri} are those of {tokenizer}: give that",
    )
    differs = checkpoint.differences(start.model, config.model)
    if differs:
        raise ValueError(
            f"--train.start-from {uri}: its captioner is another one: {differs}; give the settings "
            "of its config.json"
        )
    return start


def _vocabulary(config: DataConfig, dataset: DataSet) -> Vocabulary:
    """The frequent words of the training captions."""
    tokenizer, counts = Tokenizer(config.tokenizer), Counter(dataset.word_counts)
    if tokenizer != PTB:  # which ingest counted; for others the captions are read again
        counts.clear()
        captions = cut = 0
        for caption in dataset.training_captions():
            words = tokenizer(caption)
            counts.update(words)
            captions += 1
            cut += len(words) > config.caption_length - len((START, END))
        if cut > captions * MOST_CUT:
            _say(
                f"warning: {cut} of {captions} training captions are longer than "
                f"--data.caption-length {config.caption_length} allows and are cut: raise it, and "
                "--search.max-length with it"
            )
    elif config.source is not None:  # for shards, ingest said it
        unspaced.warn(dataset.training_captions())
    return Vocabulary.from_counts(counts, config.min_word_count, config.max_words, tokenizer)


def _validation(
    config: Config, claim: Claim, dataset: ray.ObjectRef, gpus: int
) -> ValidationConfig:
    """How checkpoints of the run are validated while training goes on."""
    train = config.train
    num_gpus = train.validation_gpus
    if num_gpus is None:
        num_gpus = 1 if gpus > train.num_workers else 0
    # half of what training leaves; on a laptop nothing of its own, rather than that pictures wait
    free = cluster.num_cpus() - train.num_workers * train.cpus_per_worker
    cpus = max(0, int(free / 2))
    return ValidationConfig(
        fn=validation.validate,
        task_config=ValidationTaskConfig(
            fn_kwargs={
                "claim": claim,
                "dataset": dataset,
                "limit": train.validation_images,
                "threads": max(1, cpus),
            }
        ),
        ray_remote_kwargs={
            "num_cpus": cpus,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": cluster.WORKER_ENVIRONMENT},
        },
    )


def _with_features(
    config: Config, dataset: DataSet, vocab_size: int, start: Loaded | None
) -> DataSet:
    return feature_cache.with_features(
        dataset,
        initial.initial_captioner(config, vocab_size, start).encoder,
        config.model.encoder,
        limits={"train": config.data.max_images, "val": config.train.validation_images},
    )


def open_data(config: Config) -> DataSet:
    """The data set the configuration names; `shapes` is drawn, and what is to be ingested is, if it
    is not there."""
    data = config.data
    if data.source is not None and not data.ingest:
        return open_source(data.source, seed=config.train.seed, options=data.reading)
    if data.source is not None:
        image_size = max(SHORTER_SIDE, config.model.encoder.image_size)
        uri = ensure_ingested(data.source, config.run.storage, image_size, data.reading)
    else:
        uri = data.shards or ensure_shapes(config.run.storage, data)
    return open_shards(uri)


def _settle(config: Config) -> Config:
    """The configuration with what depends on time and place made explicit: workers run in other
    folders than the driver."""
    name = config.run.name or datetime.now().strftime("run-%Y%m%d-%H%M%S")
    run = replace(
        config.run, name=name, storage=storage.resolve(config.run.storage), take_over=False
    )
    data = replace(
        config.data,
        shards=config.data.shards and storage.resolve(config.data.shards),
        source=config.data.source and storage.resolve(config.data.source),
    )
    encoder = config.model.encoder
    if (
        encoder.weights == "none"
        and encoder.trainable_from != "none"
        and config.train.start_from is None
    ):
        # random stages are not worth freezing, and deep networks explode with batch-norm statistics
        # that were never taken
        encoder = replace(encoder, trainable_from="all", batch_norm="train")
    model = replace(config.model, encoder=initial.settled(encoder))
    return replace(config, run=run, data=data, model=model)


def _shapes(config: Config) -> tuple[int, int, int]:
    data = config.data
    return data.shapes_train, data.shapes_val, data.shapes_seed


def _settle_run(config: Config, run: str, dataset: DataSet, vocabulary: Vocabulary) -> bool:
    """Write configuration, vocabulary and the data set's digest into the run's folder, or check
    that those which are there fit; returns whether the run had begun before."""
    resumed = run_folder.has_begun(run)
    if resumed:
        old = run_folder.read_config(run)
        differs = [
            name
            for name, same in {
                "model": old.model == config.model,
                f"train.ema-decay, which was {old.train.ema_decay}": bool(old.train.ema_decay)
                == bool(config.train.ema_decay),
                f"data.tokenizer, which was {old.data.tokenizer}": old.data.tokenizer
                == config.data.tokenizer,
                "data.shards": old.data.shards == config.data.shards,
                "data.source": old.data.source == config.data.source,
                "data.shapes-*": _shapes(old) == _shapes(config),
                "the data set, which changed since": run_folder.read_data(run)["digest"]
                == dataset.digest,
                "the vocabulary": run_folder.read_vocabulary(run) == vocabulary,
            }.items()
            if not same
        ]
        if differs:
            raise ValueError(
                f"--run.name {config.run.name}: the run in {run} differs in {', '.join(differs)}; "
                "give another --run.name to start anew, or the settings of its config.json"
            )
    known = {"uri": dataset.uri, "digest": dataset.digest}
    run_folder.begin(run, config, vocabulary, known)
    return resumed
