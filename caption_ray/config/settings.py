"""The settings, section by section: type, bounds, default and meaning of each, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from caption_ray.config.bounds import (
    Count,
    CountOrZero,
    CPUs,
    GPUs,
    Parallel,
    Positive,
    PositiveOrZero,
    Project,
    RunName,
    Section,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Uri,
    check,
    from_environment,
    require,
)
from caption_ray.config.model import ModelConfig
from caption_ray.config.search import SearchConfig, check_lengths
from caption_ray.config.source import SourceConfig

TokenizerName: TypeAlias = Literal["ptb", "whitespace", "characters"]

STORAGE_VARIABLE = "CAPTION_RAY_STORAGE"
"""Environment variable that moves the default run storage, for jobs and serving alike."""


def default_storage() -> str:
    """Where runs are kept unless `--run.storage` says otherwise.

    Raises ValueError if the environment variable is set, but empty.
    """
    return from_environment(STORAGE_VARIABLE) or "./runs"


@dataclass(frozen=True)
class DataConfig(Section):
    """Pictures and captions."""

    shards: Uri | None = None
    """URI of the shards that `jobs/ingest.py` wrote. With neither this nor `source`, the embedded
    data set `shapes` is drawn, and ingested into the run storage once."""

    source: Uri | None = None
    """URI of pictures with captions in any format that `jobs/ingest.py` knows, streamed picture by
    picture without an ingest (slower)."""

    reading: SourceConfig = field(default_factory=SourceConfig)
    """How `source` is read."""

    ingest: bool = False
    """Ingest `source` before training, once, into the run storage, and train on these shards."""

    captions_per_image: Annotated[int, Field(ge=1, le=1000)] = 5
    """Captions of a picture that share one decoding and one encoder pass. Where a picture has more,
    a new choice is drawn for each epoch."""

    caption_length: Annotated[int, Field(ge=3, le=1000)] = 22
    """Tokens of a training caption, including its start and end tokens; longer captions are cut.
    """

    tokenizer: TokenizerName = "ptb"
    """What is a word. `ptb`: what COCO's evaluation takes for one, in lower case and without
    punctuation; `whitespace`: what stands between two spaces, unchanged, for captions that another
    tool has cut into words; `characters`: each character, for languages without spaces between
    words. Vocabulary and checkpoints keep it, and metrics and serving use theirs."""

    min_word_count: Count = 5
    """Words that are rarer than this in the training captions become the unknown word."""

    max_words: Count | None = None
    """Keep only this many of the most frequent words; None keeps all."""

    max_images: Count | None = None
    """Train only on this many images of the (shuffled) training split; None trains on all."""

    min_crop: ShareAboveZero = 0.8
    """Smallest share of a picture's area that a random training crop keeps; 1 turns crops off."""

    flip: bool = True
    """Mirror half of the training pictures, except those whose captions mention left or right."""

    max_bad_images: Share = 0.01
    """Share of an epoch's pictures that may be unreadable before the run stops, naming them."""

    decode: Literal["auto", "near", "far", "device"] = "auto"
    """Where pictures are decoded: `near`, in threads of the training worker, so that decoded
    pictures need not be moved; `far`, in Ray tasks on any node; `device`, training pictures on the
    worker's GPU (nvJPEG), which rounds differently from CPUs and takes time from the model. `auto`
    means near, unless other nodes have more CPUs for it than the worker's own; it never means
    device, whose effect on training has not been measured yet."""

    decode_workers: Parallel | None = None
    """CPUs that each training worker may use for reading and far decoding, and its threads for near
    decoding; None means its share of the CPUs that training leaves free in the cluster, and of the
    cores of its node."""

    features: Literal["auto", "on", "off"] = "auto"
    """Train on the frozen encoder's output, computed once for each picture and kept beside the
    shards (float16), instead of on pictures. `auto` does so where the result is the same and it
    pays: a frozen encoder, no random crops or flips, shards, and more than one epoch."""

    shapes_train: Count = 6000
    """Scenes in the training split of `shapes`."""

    shapes_val: Count = 500
    """Scenes in the validation split of `shapes`."""

    shapes_seed: Seed = 0
    """Seed of the scenes of `shapes`."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    stage: Literal["cross-entropy", "self-critical"] = "cross-entropy"
    """Objective: predict the reference captions word by word, or raise the score of the model's own
    captions (CIDEr-D; self-critical training, Rennie et al. 2017). The second stage begins where
    the first ended: see `start_from`."""

    start_from: Uri | None = None
    """Checkpoint, run (its best checkpoint) or folder of runs whose weights and vocabulary a new
    run starts with."""

    epochs: Count = 20
    """Passes over the training split."""

    batch_size: Count = 64
    """Images per step and worker (each with up to `captions_per_image` captions)."""

    accumulation: Count = 1
    """Split each batch into this many parts and sum their gradients: less memory, same result."""

    learning_rate: Positive = 4e-4
    """Peak learning rate of the decoder."""

    encoder_learning_rate: PositiveOrZero = 1e-4
    """Peak learning rate of the trainable part of the encoder."""

    encoder_layer_decay: ShareAboveZero = 1.0
    """Factor by which that rate falls from each layer of the encoder to the one before it (timm's
    models; 0.65 to 0.9 is usual for vision transformers)."""

    gradient_checkpointing: bool = False
    """Compute the encoder's activations anew in the backward pass instead of keeping them: less
    memory, about a third more time (timm's models)."""

    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay (AdamW), on matrices only."""

    warmup_steps: CountOrZero = 500
    """Steps over which the learning rate rises linearly from zero."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""

    max_grad_norm: Positive = 5.0
    """Clip gradients to this global norm."""

    attention_regularization: PositiveOrZero = 1.0
    """Weight of the doubly stochastic regulariser (Show, Attend and Tell, section 4.2.1)."""

    label_smoothing: ShareBelowOne = 0.0
    """Share of the target probability that is spread over the vocabulary (cross-entropy stage)."""

    scheduled_sampling: Share = 0.0
    """Largest probability with which the model's own word replaces the reference word as input, so
    that it learns to recover from its mistakes (cross-entropy stage; Bengio et al. 2015)."""

    scheduled_sampling_epochs: Count = 25
    """Epochs over which that probability rises linearly from zero."""

    samples_per_image: Annotated[int, Field(ge=2, le=1000)] = 5
    """Captions drawn for each image in the self-critical stage; each is measured against the mean
    score of the others."""

    ema_decay: ShareBelowOne = 0.0
    """Above 0, validate, save and serve an exponential moving average of the weights, of which this
    share is kept at each step (0.999, for example)."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type. `auto` means bfloat16 on GPUs that support it and on CPUs with AMX, float32
    elsewhere (on CPUs with bfloat16 but without AMX, bfloat16 is slower)."""

    compile: bool = True
    """On GPUs, run the decoder's recurrence with kernels compiled for it, launched as CUDA graphs;
    the first steps take longer, and nodes need a C compiler."""

    seed: Seed = 0
    """Seed of the initial weights, of dropout and of the order of pictures in each epoch."""

    deterministic: bool = False
    """Make runs with the same seed give the same weights bit for bit: deterministic kernels and a
    fixed order of blocks."""

    num_workers: Parallel = 1
    """Training workers: one GPU each where the cluster has GPUs."""

    min_workers: Parallel | None = None
    """Train with as few workers as this while nodes are missing, and add workers as nodes come, up
    to `num_workers`; None always trains with `num_workers`."""

    cpus_per_worker: CPUs = 1.0
    """CPUs that Ray reserves for each training worker; the remaining CPUs decode pictures."""

    threads: Parallel | None = None
    """Threads that a training worker computes with on a CPU; None means an even share of the cores
    of its node."""

    use_gpu: bool | None = None
    """Train on GPUs; None does so if the cluster has any."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How workers exchange gradients; `auto` means NCCL between GPUs and gloo between CPUs. With
    gloo, a worker that Ray gave a GPU which torch does not find computes on the CPU: so a cluster
    whose GPU nodes come and go can be tried without GPUs."""

    checkpoint_every: Count | None = None
    """Steps between checkpoints within an epoch; None leaves them to `checkpoint_seconds`."""

    checkpoint_seconds: Positive | None = 600.0
    """Seconds between checkpoints within an epoch, which limit what a failure costs; None saves
    only at the end of each epoch."""

    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, besides the best one and those that wait for their
    validation."""

    validation_images: Count | None = None
    """Validate only on this many images of the validation split; None validates on all."""

    validation_gpus: GPUs | None = None
    """GPUs for captioning the validation split while training goes on; None means 1 where the
    cluster has more GPUs than training workers, else 0, which captions on CPUs."""

    patience: Count | None = None
    """Stop after this many validations in a row without a better CIDEr-D; None never does."""

    sample_captions: CountOrZero = 8
    """Validation pictures whose captions the tracker shows after each epoch."""

    max_failures: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 3
    """How often dead workers are replaced before the run gives up; the count resets after progress;
    -1 means without limit."""

    log_every: Count = 100
    """Steps between progress lines on the console and points in the tracker."""


@dataclass(frozen=True)
class RunConfig(Section):
    """Where a run lives and who follows it."""

    storage: Uri = field(default_factory=default_storage)
    """URI of the folder that holds all runs (default: $CAPTION_RAY_STORAGE, else ./runs)."""

    name: RunName | None = None
    """Name of this run and of its folder. A run that is started again under its name resumes; None
    makes a new name from the time."""

    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Where metrics and pictures are logged besides the console. Weights & Biases works offline
    without a key."""

    project: Project = "caption_ray"
    """Project in Weights & Biases."""

    take_over: bool = False
    """Go on with a run that is still being trained elsewhere; it then stops there."""


@dataclass(frozen=True)
class Config(Section):
    """Everything one training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    """Pictures and captions."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The captioner."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """How captions are searched for."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""

    run: RunConfig = field(default_factory=RunConfig)
    """Storage and tracking."""

    def __post_init__(self) -> None:
        check(self)
        _check_together(self)


# Checks of several settings at once -----------------------------------------------------------


def _check_together(config: Config) -> None:
    """Raise ValueError where settings contradict each other."""
    data, train, decoder = config.data, config.train, config.model.decoder
    check_lengths(config.search)
    require(
        train.min_workers is None or train.min_workers <= train.num_workers,
        "train.min-workers",
        train.min_workers,
        f"give 1 to --train.num-workers ({train.num_workers}), or None",
    )
    require(
        train.stage == "cross-entropy" or train.accumulation == 1,
        "train.accumulation",
        train.accumulation,
        "the self-critical stage does not split batches: give 1 and a smaller --train.batch-size",
    )
    require(
        data.shards is None or data.source is None,
        "data.source",
        data.source,
        f"give it or --data.shards ({data.shards!r}), not both",
    )
    for name, value in vars(data.reading).items():
        require(
            value is None or data.source is not None,
            f"data.reading.{name.replace('_', '-')}",
            value,
            "it says how --data.source is read: give that, or leave it out",
        )
    for option, value, plain in (
        ("model.encoder.drop-path", config.model.encoder.drop_path, 0.0),
        ("train.encoder-layer-decay", train.encoder_layer_decay, 1.0),
        ("train.gradient-checkpointing", train.gradient_checkpointing, False),
    ):
        require(
            value == plain or config.model.encoder.name.startswith("timm/"),
            option,
            value,
            f"it needs a model of timm (--model.encoder.name timm/NAME): give {plain}",
        )
    require(
        not (decoder.tie_embeddings and decoder.output == "mlp"),
        "model.decoder.tie-embeddings",
        decoder.tie_embeddings,
        "it needs --model.decoder.output deep",
    )
