"""Every setting of caption_ray: typed, with one default in one place.

`parse` turns a command line into a `Config`; `from_dict` does the same for a saved JSON file.
Presets hold only what they change. Nothing here imports torch or ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

STORAGE_VARIABLE = "CAPTION_RAY_STORAGE"
"""Environment variable that moves the default run storage, for jobs and serving alike."""

SMALLEST = 1e-6
"""Least temperature and top_p: far below, they are zero in float32 and there is nothing to draw."""

T = TypeVar("T")


def default_storage() -> str:
    """Where runs are kept unless `--run.storage` says otherwise."""
    return os.environ.get(STORAGE_VARIABLE, "./runs")


class _Strict:
    """Base of the sections: a key that is not a field is an error, also when read from JSON."""

    __pydantic_config__ = {"extra": "forbid", "strict": False}


@dataclass(frozen=True)
class DataConfig(_Strict):
    """Pictures and captions."""

    shards: str | None = None
    """URI of the shards that `jobs/ingest.py` wrote. Without this and `source`: the embedded
    `shapes` data set, drawn and ingested into run storage once."""

    source: str | None = None
    """URI of a COCO layout to stream picture by picture, without ingest (slower)."""

    captions_per_image: int = 5
    """Captions that share one decoded image and one encoder pass. Where a picture has more, a
    fresh choice is drawn each epoch."""

    caption_length: int = 22
    """Tokens of a caption, start and end included; longer captions are cut."""

    min_word_count: int = 5
    """Words rarer than this in the training captions become the unknown word."""

    max_words: int | None = None
    """Keep only this many of the most frequent words; None: no limit."""

    max_images: int | None = None
    """Train on the first so many images of the (shuffled) training split; None: on all."""

    min_crop: float = 0.8
    """Smallest share of the picture's area that a random training crop keeps; 1: no crops."""

    flip: bool = True
    """Mirror half of the training pictures, except those whose captions say left or right."""

    max_bad_images: float = 0.01
    """Share of an epoch's pictures that may be unreadable before the run stops, naming them."""

    decode: Literal["auto", "near", "far", "device"] = "auto"
    """Where pictures are decoded: `near`, in threads of the training worker, which spares moving
    them decoded; `far`, in Ray tasks on any node; `device`, training pictures on the worker's GPU
    (nvJPEG), which rounds otherwise than CPUs do and has less time left for the model. `auto`:
    near, unless other nodes have more CPUs for it than the worker's own; never device, which
    nobody has measured beside training yet."""

    decode_workers: int | None = None
    """CPUs that each training worker may use for reading and far decoding, and threads for near
    decoding; None: its share of the cluster's CPUs that training leaves free, and of the cores of
    its node."""

    features: Literal["auto", "on", "off"] = "auto"
    """Whether training reads what the frozen encoder made of each picture, computed once and kept
    beside the shards (float16), instead of pictures. `auto`: where that gives the same and pays: an
    encoder that does not train, no random crops or flips, shards, and more than one epoch."""

    shapes_train: int = 6000
    """Scenes in the training split of `shapes`."""

    shapes_val: int = 500
    """Scenes in the validation split of `shapes`."""

    shapes_seed: int = 0
    """Seed that the scenes of `shapes` are drawn from."""


@dataclass(frozen=True)
class EncoderConfig(_Strict):
    """From pixels to a grid of regions."""

    name: str = "resnet101"
    """Any torchvision classification backbone, or `small`: a compact one to train from scratch."""

    weights: str = "DEFAULT"
    """One of torchvision's names for the backbone's weights (`DEFAULT`, `IMAGENET1K_V1`, ...), the
    URI of a state dict (.pth or .safetensors), or `none` for random ones. A backbone without
    weights that trains at all trains as a whole, batch-norm statistics included."""

    trainable_from: str = "none"
    """Fine-tune from this stage of the backbone on (`layer3`, `features.5`, ...); `none`: frozen,
    `all`: everything trains."""

    batch_norm: Literal["frozen", "train"] = "frozen"
    """Batch-norm statistics of the trainable stages: those of the weights, or learnt here. Frozen
    stages always keep theirs."""

    image_size: int = 256
    """Height and width, in pixels, of what the backbone sees."""

    image_fit: Literal["stretch", "crop"] = "stretch"
    """How a picture becomes square outside training: squeezed whole, or cut to its centre."""

    grid: int | None = None
    """Pool the feature map to grid x grid regions; None: as many as the backbone gives."""


@dataclass(frozen=True)
class DecoderConfig(_Strict):
    """From regions to words."""

    name: str = "soft"
    """Which decoder: `soft` (Show, Attend and Tell), `adaptive` (soft attention that may also rely
    on what was said; Lu et al. 2017) or `transformer`. Not every setting below is for all."""

    cell: Literal["lstm", "gru"] = "lstm"
    """Recurrent cell (soft)."""

    embedding_dim: int = 512
    """Size of a word's embedding (soft, adaptive)."""

    hidden_dim: int = 512
    """Size of the recurrent state, or the transformer's width."""

    attention_dim: int = 512
    """Size in which regions and state are compared (soft, adaptive)."""

    num_layers: int = 3
    """Layers (transformer)."""

    num_heads: int = 8
    """Heads of each attention (transformer)."""

    feedforward_dim: int = 2048
    """Inner size of each layer's feed-forward part (transformer)."""

    region_dim: int | None = None
    """Project regions to this size, with a ReLU, before they are attended to; None: as encoded
    (soft; the others project to `hidden_dim`)."""

    initial_state: Literal["mean", "zeros"] = "mean"
    """First recurrent state: computed from the mean region, or zeros (soft)."""

    gate: bool = True
    """Scale the attended region by a learnt gate (soft; Show, Attend and Tell, section 4.2.1)."""

    output: Literal["deep", "mlp"] = "deep"
    """Logits from embedding, state and region together (deep output), or from the state alone
    through one hidden layer (soft)."""

    dropout: float = 0.5
    """Dropout on embeddings and before the logits."""

    tie_embeddings: bool = False
    """Use the embedding matrix for the logits as well (soft)."""


@dataclass(frozen=True)
class ModelConfig(_Strict):
    """The captioner: all that a checkpoint needs to be rebuilt."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """From pixels to regions."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """From regions to words."""


@dataclass(frozen=True)
class SearchConfig(_Strict):
    """From word probabilities to a caption."""

    beam_size: int = 3
    """Beams per picture; 1 is greedy."""

    max_length: int = 20
    """Most words in a caption."""

    min_length: int = 0
    """Fewest words before a caption may end."""

    no_repeat_ngram_size: int = 0
    """No so many words in a row are said twice in a caption; 0: off, 3: trigram blocking."""

    length_penalty: float = 0.7
    """Beams are ranked by log-probability / length ** length_penalty; 0: by log-probability."""

    temperature: float = 0.0
    """Above 0, words are drawn from softmax(logits / temperature) instead of searched for."""

    top_k: int | None = None
    """Draw among so many of the likeliest words only."""

    top_p: float = 1.0
    """Draw among the fewest words that together have this probability (nucleus sampling)."""


@dataclass(frozen=True)
class SearchOverrides(_Strict):
    """Another way to search than the checkpoint's own; None: as the checkpoint says."""

    beam_size: int | None = None
    """Beams per picture; 1 is greedy."""

    max_length: int | None = None
    """Most words in a caption."""

    min_length: int | None = None
    """Fewest words before a caption may end."""

    no_repeat_ngram_size: int | None = None
    """No so many words in a row are said twice in a caption; 0: off, 3: trigram blocking."""

    length_penalty: float | None = None
    """Beams are ranked by log-probability / length ** length_penalty; 0: by log-probability."""

    temperature: float | None = None
    """Above 0, words are drawn from softmax(logits / temperature) instead of searched for."""

    top_k: int | None = None
    """Draw among so many of the likeliest words only."""

    top_p: float | None = None
    """Draw among the fewest words that together have this probability (nucleus sampling)."""

    def apply(self, default: SearchConfig) -> SearchConfig:
        """`default`, changed as asked for. Of two lengths that contradict each other, the one that
        was not asked for gives way.

        Raises ValueError as `validate_search` does.
        """
        names = [field.name for field in dataclasses.fields(SearchConfig)]
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.min_length is None and self.max_length is not None:
            asked["min_length"] = min(default.min_length, self.max_length)
        if self.max_length is None and self.min_length is not None:
            asked["max_length"] = max(default.max_length, self.min_length)
        search = dataclasses.replace(default, **asked)
        validate_search(search)
        return search


@dataclass(frozen=True)
class TrainConfig(_Strict):
    """The training loop."""

    stage: Literal["cross-entropy", "self-critical"] = "cross-entropy"
    """What is learnt from: the captions people wrote, word by word, or how well the model's own
    captions score (CIDEr-D; self-critical training, Rennie et al. 2017). The second begins where
    the first ended: see `start_from`."""

    start_from: str | None = None
    """Checkpoint, run (its best checkpoint) or folder of runs whose weights and vocabulary a new
    run begins with."""

    epochs: int = 20
    """Passes over the training split."""

    batch_size: int = 64
    """Images per step and worker (each with up to `captions_per_image` captions)."""

    accumulation: int = 1
    """Cut each batch into so many parts whose gradients are summed: less memory, same result."""

    learning_rate: float = 4e-4
    """Peak learning rate of the decoder."""

    encoder_learning_rate: float = 1e-4
    """Peak learning rate of the encoder's trainable part."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only."""

    warmup_steps: int = 500
    """Steps over which the learning rate rises linearly from zero."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after warm-up."""

    max_grad_norm: float = 5.0
    """Gradients are scaled down to this global norm."""

    attention_regularization: float = 1.0
    """Weight of the doubly stochastic regulariser (Show, Attend and Tell, section 4.2.1)."""

    label_smoothing: float = 0.0
    """Share of each word's target that is spread over the vocabulary (cross-entropy stage)."""

    scheduled_sampling: float = 0.0
    """Largest share of the words before that are the model's own instead of the caption's, so that
    it learns to go on from its mistakes (cross-entropy stage; Bengio et al. 2015)."""

    scheduled_sampling_epochs: int = 25
    """Epochs over which that share rises from zero, linearly, epoch by epoch."""

    samples_per_image: int = 5
    """Captions drawn for each image in the self-critical stage; the mean score of the others is
    what each is measured against."""

    ema_decay: float = 0.0
    """Above 0, what is validated, saved and served is the exponential moving average of the
    weights: after each step, this share of it is kept. 0.999, say."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type; auto: bfloat16 on GPUs that have it and on CPUs with AMX, elsewhere float32
    (on CPUs that have bfloat16 but no AMX it is slower)."""

    compile: bool = True
    """On GPUs, run the decoder's recurrence with kernels compiled for it, launched as CUDA graphs;
    its first steps take longer, and nodes need a C compiler."""

    seed: int = 0
    """Seeds initialisation, dropout and the order of each epoch."""

    deterministic: bool = False
    """Same seed, same weights, bit for bit: deterministic kernels and a fixed order of blocks."""

    num_workers: int = 1
    """Training workers: one GPU each where the cluster has GPUs."""

    min_workers: int | None = None
    """Train with as few workers as this while nodes are missing, and take new ones in as they
    come, up to `num_workers`; None: always with `num_workers`."""

    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for each training worker; the rest decode pictures."""

    threads: int | None = None
    """Threads that a training worker computes with on a CPU; None: its even share of the cores of
    its node."""

    use_gpu: bool | None = None
    """Train on GPUs; None: if the cluster has any."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """How workers exchange gradients; auto: NCCL between GPUs, gloo between CPUs. With gloo, a
    worker whose torch finds no GPU although Ray gave it one computes on the CPU: so a GPU
    cluster's coming and going can be tried without any."""

    checkpoint_every: int | None = None
    """Steps between checkpoints inside an epoch; None: only as `checkpoint_seconds` says."""

    checkpoint_seconds: float | None = 600.0
    """Seconds between checkpoints inside an epoch, which bound what a failure costs; None: only
    at each epoch's end."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept, besides the best and those yet to be
    validated."""

    validation_images: int | None = None
    """Validate on the first so many images of the validation split; None: on all."""

    validation_gpus: float | None = None
    """GPUs for captioning the validation split while training goes on; None: 1 where the cluster
    has more GPUs than training workers, else 0, which captions on CPUs."""

    patience: int | None = None
    """Stop after so many validations in a row without a better CIDEr-D; None: never."""

    sample_captions: int = 8
    """Validation pictures that are captioned for the tracker after each epoch."""

    max_failures: int = 3
    """How often dead workers are replaced before the run gives up, counted anew if it got further
    meanwhile; -1: without end."""

    log_every: int = 100
    """Steps between lines on the console and points in the tracker."""


@dataclass(frozen=True)
class RunConfig(_Strict):
    """Where a run lives and who follows it."""

    storage: str = field(default_factory=default_storage)
    """URI of the folder that holds all runs (default: $CAPTION_RAY_STORAGE, else ./runs)."""

    name: str | None = None
    """Folder of this run. A run started again under its name resumes; None: a new name from the
    time."""

    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Where metrics and pictures go besides the console. Weights & Biases works offline without
    a key."""

    project: str = "caption_ray"
    """Project in Weights & Biases."""


@dataclass(frozen=True)
class Config(_Strict):
    """Everything one training run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    """Pictures and captions."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The captioner."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """Decoding."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""

    run: RunConfig = field(default_factory=RunConfig)
    """Storage and tracking."""

    def __post_init__(self) -> None:
        validate(self)


# Presets --------------------------------------------------------------------------------------


def shapes() -> Config:
    """The embedded data set of drawn scenes: a small captioner from scratch, minutes on 2 cores."""
    return Config(
        data=DataConfig(
            captions_per_image=3, caption_length=40, min_word_count=1, min_crop=1.0, flip=False
        ),
        model=ModelConfig(
            encoder=EncoderConfig(
                name="small",
                weights="none",
                trainable_from="all",
                batch_norm="train",
                image_size=96,
            ),
            decoder=DecoderConfig(
                embedding_dim=128, hidden_dim=256, attention_dim=128, dropout=0.1
            ),
        ),
        search=SearchConfig(beam_size=1, max_length=38, length_penalty=0.0),
        train=TrainConfig(
            epochs=8,
            batch_size=32,
            learning_rate=2e-3,
            encoder_learning_rate=2e-3,
            warmup_steps=200,
            attention_regularization=0.0,
            cpus_per_worker=1.0,
        ),
    )


def coco() -> Config:
    """Our recommendation for COCO 2017 on GPUs: soft attention over a fine-tuned ResNet-101.

    `python jobs/train.py coco --data.shards URI`, on shards of the Karpathy split. It follows
    Show, Attend and Tell with what was found since (fine-tuning, scheduled sampling), for which
    33.3 BLEU-4 (beam 5) and, over bottom-up regions, 108.9 CIDEr are published. We have not
    measured it on COCO.
    """
    return Config(
        model=ModelConfig(encoder=EncoderConfig(trainable_from="layer3")),
        search=SearchConfig(beam_size=5),
        train=TrainConfig(epochs=20, scheduled_sampling=0.25, patience=5),
    )


def coco_self_critical() -> Config:
    """Second stage of `coco`: CIDEr-D itself is optimised.

    `python jobs/train.py coco-self-critical --data.shards URI --train.start-from RUN`, with RUN a
    finished `coco` run. The gain published for such a decoder is from 108.9 to 119.5 CIDEr (over
    bottom-up regions). We have not measured it on COCO.
    """
    return _self_critical(coco(), learning_rate=5e-5)


def coco_transformer() -> Config:
    """A transformer decoder of 6 layers over ResNet-101, for COCO 2017 on GPUs.

    `python jobs/train.py coco-transformer --data.shards URI`, on shards of the Karpathy split.
    Published for such a decoder over bottom-up regions: 112.6 CIDEr. We have not measured it on
    COCO.
    """
    return Config(
        model=ModelConfig(
            encoder=EncoderConfig(trainable_from="layer3"),
            decoder=DecoderConfig(name="transformer", num_layers=6, dropout=0.1),
        ),
        search=SearchConfig(beam_size=5),
        train=TrainConfig(
            epochs=15,
            learning_rate=3e-4,
            encoder_learning_rate=3e-5,
            warmup_steps=5000,
            attention_regularization=0.0,
            label_smoothing=0.1,
            ema_decay=0.999,
            patience=5,
        ),
    )


def coco_transformer_self_critical() -> Config:
    """Second stage of `coco-transformer`: CIDEr-D itself is optimised.

    `python jobs/train.py coco-transformer-self-critical --data.shards URI --train.start-from RUN`,
    with RUN a finished `coco-transformer` run. The gain published over bottom-up regions is from
    112.6 to 130.3 CIDEr. We have not measured it on COCO.
    """
    return _self_critical(coco_transformer(), learning_rate=5e-6)


def _self_critical(first: Config, learning_rate: float) -> Config:
    """The stage after `first`: its captioner, without what cross-entropy needed."""
    encoder = dataclasses.replace(first.model.encoder, trainable_from="none")
    return dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, flip=False, min_crop=1.0),
        model=dataclasses.replace(first.model, encoder=encoder),
        train=dataclasses.replace(
            first.train,
            stage="self-critical",
            learning_rate=learning_rate,
            schedule="constant",
            warmup_steps=0,
            attention_regularization=0.0,
            label_smoothing=0.0,
            scheduled_sampling=0.0,
        ),
    )


def seed() -> Config:
    """The original single-GPU system: GRU with Bahdanau attention over frozen InceptionV3."""
    return Config(
        data=DataConfig(
            captions_per_image=1,
            caption_length=49,
            min_word_count=1,
            max_words=5000,
            max_images=30_000,
            min_crop=1.0,
            flip=False,
        ),
        model=ModelConfig(
            encoder=EncoderConfig(name="inception_v3", image_size=299),
            decoder=DecoderConfig(
                cell="gru",
                embedding_dim=256,
                hidden_dim=512,
                attention_dim=512,
                region_dim=256,
                initial_state="zeros",
                gate=False,
                output="mlp",
                dropout=0.0,
            ),
        ),
        search=SearchConfig(beam_size=1, max_length=48),
        train=TrainConfig(
            epochs=40,
            learning_rate=1e-3,
            warmup_steps=0,
            schedule="constant",
            attention_regularization=0.0,
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "shapes": shapes,
    "coco": coco,
    "coco-self-critical": coco_self_critical,
    "coco-transformer": coco_transformer,
    "coco-transformer-self-critical": coco_transformer_self_critical,
    "seed": seed,
}
DEFAULT_PRESET = "shapes"


# Checks ---------------------------------------------------------------------------------------


def require(ok: bool, option: str, value: object, remedy: str) -> None:
    """Raise ValueError naming the option, its value and the remedy unless all is well."""
    if not ok:
        raise ValueError(f"--{option} is {value!r}: {remedy}")


def validate(config: Config) -> None:
    """Raise ValueError naming the option, its value and the remedy where values cannot work."""
    data, encoder, decoder = config.data, config.model.encoder, config.model.decoder
    train = config.train
    validate_search(config.search)

    for option, value in {
        "data.captions-per-image": data.captions_per_image,
        "data.min-word-count": data.min_word_count,
        "data.shapes-train": data.shapes_train,
        "data.shapes-val": data.shapes_val,
        "model.encoder.image-size": encoder.image_size,
        "model.decoder.embedding-dim": decoder.embedding_dim,
        "model.decoder.hidden-dim": decoder.hidden_dim,
        "model.decoder.attention-dim": decoder.attention_dim,
        "model.decoder.num-layers": decoder.num_layers,
        "model.decoder.num-heads": decoder.num_heads,
        "model.decoder.feedforward-dim": decoder.feedforward_dim,
        "train.epochs": train.epochs,
        "train.batch-size": train.batch_size,
        "train.accumulation": train.accumulation,
        "train.num-workers": train.num_workers,
        "train.keep-checkpoints": train.keep_checkpoints,
        "train.log-every": train.log_every,
        "train.scheduled-sampling-epochs": train.scheduled_sampling_epochs,
    }.items():
        require(value >= 1, option, value, "give a whole number of at least 1")
    for option, optional in {
        "data.max-words": data.max_words,
        "data.max-images": data.max_images,
        "data.decode-workers": data.decode_workers,
        "model.encoder.grid": encoder.grid,
        "train.checkpoint-every": train.checkpoint_every,
        "train.threads": train.threads,
        "train.validation-images": train.validation_images,
        "train.patience": train.patience,
    }.items():
        require(optional is None or optional >= 1, option, optional, "give at least 1, or None")
    require(
        train.min_workers is None or 1 <= train.min_workers <= train.num_workers,
        "train.min-workers",
        train.min_workers,
        f"give 1 to --train.num-workers ({train.num_workers}), or None",
    )
    require(
        train.checkpoint_seconds is None or train.checkpoint_seconds > 0,
        "train.checkpoint-seconds",
        train.checkpoint_seconds,
        "give a number above 0, or None",
    )
    for option, number in {
        "train.learning-rate": train.learning_rate,
        "train.max-grad-norm": train.max_grad_norm,
    }.items():
        require(number > 0, option, number, "give a number above 0")
    for option, number in {
        "train.encoder-learning-rate": train.encoder_learning_rate,
        "train.weight-decay": train.weight_decay,
        "train.warmup-steps": train.warmup_steps,
        "train.attention-regularization": train.attention_regularization,
        "train.sample-captions": train.sample_captions,
    }.items():
        require(number >= 0, option, number, "give 0 or more")
    require(
        data.caption_length >= 3,
        "data.caption-length",
        data.caption_length,
        "start, one word and end already need 3 tokens",
    )
    require(0 < data.min_crop <= 1, "data.min-crop", data.min_crop, "give a share in (0, 1]")
    require(
        0 <= data.max_bad_images <= 1, "data.max-bad-images", data.max_bad_images, "give 0 to 1"
    )
    for option, share in {
        "model.decoder.dropout": decoder.dropout,
        "train.label-smoothing": train.label_smoothing,
        "train.ema-decay": train.ema_decay,
    }.items():
        require(0 <= share < 1, option, share, "give [0, 1)")
    require(
        0 <= train.scheduled_sampling <= 1,
        "train.scheduled-sampling",
        train.scheduled_sampling,
        "give a share in [0, 1]",
    )
    require(
        train.validation_gpus is None or train.validation_gpus >= 0,
        "train.validation-gpus",
        train.validation_gpus,
        "give 0 or more, or None",
    )
    require(
        train.samples_per_image >= 2,
        "train.samples-per-image",
        train.samples_per_image,
        "each caption is measured against others: give at least 2",
    )
    require(
        train.stage == "cross-entropy" or train.accumulation == 1,
        "train.accumulation",
        train.accumulation,
        "the self-critical stage does not cut batches: give 1 and a smaller --train.batch-size",
    )
    require(train.max_failures >= -1, "train.max-failures", train.max_failures, "give -1 or more")
    require(
        train.cpus_per_worker > 0,
        "train.cpus-per-worker",
        train.cpus_per_worker,
        "Ray needs a share of a CPU for each worker, 0.5 say",
    )
    require(
        data.shards is None or data.source is None,
        "data.source",
        data.source,
        f"give it or --data.shards ({data.shards!r}), not both",
    )
    require(
        not (decoder.tie_embeddings and decoder.output == "mlp"),
        "model.decoder.tie-embeddings",
        decoder.tie_embeddings,
        "it needs --model.decoder.output deep",
    )
    name = config.run.name
    require(
        name is None or (name not in ("", ".", "..") and not set(name) & set("/\\?#%,")),
        "run.name",
        name,
        "it names a folder: use letters, digits, dots, dashes and underscores",
    )


def validate_search(search: SearchConfig) -> None:
    """The same for a search alone."""
    for option, value in {
        "search.beam-size": search.beam_size,
        "search.max-length": search.max_length,
    }.items():
        require(value >= 1, option, value, "give a whole number of at least 1")
    require(
        0 <= search.min_length <= search.max_length,
        "search.min-length",
        search.min_length,
        f"give 0 to --search.max-length, {search.max_length}",
    )
    require(
        search.no_repeat_ngram_size >= 0,
        "search.no-repeat-ngram-size",
        search.no_repeat_ngram_size,
        "give a number of words, or 0 to let them repeat",
    )
    require(
        search.length_penalty >= 0, "search.length-penalty", search.length_penalty, "give 0 or more"
    )
    require(
        search.temperature == 0 or SMALLEST <= search.temperature < float("inf"),
        "search.temperature",
        search.temperature,
        f"give 0, or {SMALLEST} or more to draw words",
    )
    require(
        search.top_k is None or search.top_k >= 1,
        "search.top-k",
        search.top_k,
        "give at least 1, or None",
    )
    require(
        SMALLEST <= search.top_p <= 1,
        "search.top-p",
        search.top_p,
        f"give a probability from {SMALLEST} to 1",
    )


# Reading and writing --------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> Config:
    """The configuration a command line asks for: `[preset] [--section.field value ...]`.

    Ends the process with a message naming the option, its value and the valid ones if there is
    an unknown or ill-typed one.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, DEFAULT_PRESET)
    presets = {name: ((make.__doc__ or "").strip(), make()) for name, make in PRESETS.items()}
    try:
        return tyro.extras.overridable_config_cli(presets, args=arguments, description=description)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def to_dict(section: Any) -> dict[str, Any]:
    """A configuration (or a section of one) as plain JSON values."""
    return dataclasses.asdict(section)


def from_dict(kind: type[T], values: dict[str, Any], origin: str) -> T:
    """The inverse of `to_dict`, checked.

    Raises ValueError naming `origin`, the key, the value and the valid keys on anything unknown
    or ill-typed.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(str(part) for part in problem["loc"])
        hint = ""
        if problem["type"] == "unexpected_keyword_argument":
            valid = _fields_at(kind, problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(valid)}"
        raise ValueError(
            f"{origin}: {path} = {problem['input']!r}: {problem['msg']}{hint}"
        ) from None


def _fields_at(kind: type, path: Sequence[int | str]) -> list[str]:
    from typing import get_type_hints

    for name in path:
        kind = get_type_hints(kind)[str(name)]
    return [field.name for field in dataclasses.fields(kind)]
