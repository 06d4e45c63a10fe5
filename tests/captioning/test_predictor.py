"""The predictor, against the captioner it wraps."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vocabularies import vocabulary_of

from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.checkpoint import CheckpointError, Loaded, State
from caption_ray.captioning.predictor import Images, Predictor, prepare
from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig
from caption_ray.data.ledger import Ledger
from caption_ray.data.transforms import ImageError
from caption_ray.data.vocabulary import END, START, Vocabulary
from caption_ray.model.captioner import build_captioner
from caption_ray.model.encoder import to_tensor
from caption_ray.model.ensemble import Ensemble

CPU = torch.device("cpu")
SIZE = 48


def make_loaded(seed: int = 0, decoder: str = "soft") -> Loaded:
    """A captioner with random weights, large enough for captions that depend on the picture."""
    torch.manual_seed(seed)
    model = ModelConfig(
        EncoderConfig(
            name="small", weights="none", trainable_from="all", image_size=SIZE, grid=None
        ),
        DecoderConfig(name=decoder, embedding_dim=16, hidden_dim=16, attention_dim=16, num_heads=2),
    )
    vocabulary = vocabulary_of(["a red circle is above the blue square"], 1, None)
    captioner = build_captioner(model, len(vocabulary), None, pretrained=False)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(1.9)
    search = SearchConfig(beam_size=2, max_length=6, length_penalty=0.7)
    state = State(step=1, epoch=0, epoch_step=0, metrics={}, tracker_id=None)
    return Loaded(
        uri="memory", captioner=captioner.eval(), vocabulary=vocabulary, model=model,
        search=search, state=state,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and lose much where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(make_loaded(), CPU)


@pytest.fixture(scope="module")
def images() -> Images:
    """Random pictures of different brightness, uint8 (8, S, S, 3)."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 100, (8, SIZE, SIZE, 3))
    return (noise + rng.integers(0, 155, (8, 1, 1, 3))).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def test_pictures_get_different_captions(predictor: Predictor, images: Images) -> None:
    """Else the tests below could not fail."""
    assert len({caption.text for (caption,) in predictor.predict(images)}) > 2


def test_a_caption_does_not_depend_on_its_batch(predictor: Predictor, images: Images) -> None:
    together = [caption for (caption,) in predictor.predict(images)]
    for image, caption in zip(images, together, strict=True):
        ((alone,),) = predictor.predict(image[None])
        assert alone.text == caption.text
        assert alone.log_prob == pytest.approx(caption.log_prob, abs=1e-4)


def test_log_prob_is_that_of_teacher_forcing(predictor: Predictor, images: Images) -> None:
    for image, (caption,) in zip(images, predictor.predict(images), strict=True):
        ids = [predictor.vocabulary.words.index(word) for word in caption.words]
        ended = len(ids) < predictor.search.max_length
        tokens = torch.tensor([[[START, *ids] + [END] * ended]])
        with torch.no_grad():
            logits = predictor.captioner(to_tensor(image[None]), tokens).logits
        expected = -torch.nn.functional.cross_entropy(logits, tokens[0, 0, 1:], reduction="sum")
        assert caption.log_prob == pytest.approx(float(expected), abs=1e-4)


def test_every_word_has_its_attention(predictor: Predictor, images: Images) -> None:
    rows, columns = predictor.captioner.encoder.grid
    for (caption,) in predictor.predict(images):
        assert caption.text == " ".join(caption.words)
        assert caption.attention is not None
        assert caption.attention.dtype == np.float32
        assert caption.attention.shape == (len(caption.words), rows, columns)
        np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, atol=1e-5)


def test_search_is_the_checkpoints_unless_another_is_given(images: Images) -> None:
    loaded = make_loaded()
    assert Predictor(loaded, CPU).search == loaded.search
    short = Predictor(loaded, CPU, dataclasses.replace(loaded.search, max_length=2))
    assert all(len(caption.words) <= 2 for (caption,) in short.predict(images))


def make_ensemble() -> Loaded:
    """Two that were trained apart."""
    members = (make_loaded(), make_loaded(seed=1))
    together = Ensemble([make_loaded(seed).captioner for seed in (0, 1)]).eval()
    return dataclasses.replace(members[0], uri="both", captioner=together, members=members)


def test_an_ensemble_captions_otherwise_than_its_members(
    predictor: Predictor, images: Images
) -> None:
    both = Predictor(make_ensemble(), CPU)
    both.warm_up(4)
    said = [
        [caption.text for (caption,) in one.predict(images)]
        for one in (both, predictor, Predictor(make_loaded(seed=1), CPU))
    ]
    assert said[0] not in said[1:] and [member.uri for member in both.members] == ["memory"] * 2
    rows, columns = predictor.captioner.grid
    for (caption,) in both.predict(images):
        assert caption.attention is not None
        assert caption.attention.shape == (len(caption.words), rows, columns)
        np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, atol=1e-5)


def test_no_pictures_no_captions(predictor: Predictor, images: Images) -> None:
    assert predictor.predict(images[:0]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((SIZE, SIZE, 3), np.uint8),
        np.zeros((1, SIZE, SIZE + 1, 3), np.uint8),
        np.zeros((1, 3, SIZE, SIZE), np.uint8),
        np.zeros((1, SIZE, SIZE, 3), np.float32),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_refused(predictor: Predictor, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"give uint8 \(B, 48, 48, 3\)"):
        predictor.predict(wrong)


@pytest.mark.parametrize("shape", [(30, 90, 3), (90, 30, 3), (7, 5), (SIZE, SIZE, 4)], ids=str)
def test_prepare_makes_what_predict_takes(predictor: Predictor, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    prepared = predictor.prepare(encode(pixels))
    assert prepared.flags.c_contiguous
    assert len(predictor.predict(prepared[None])) == 1


def test_prepare_fits_as_the_checkpoint_was_trained(predictor: Predictor) -> None:
    """Left third black, rest white: a centre cut of this wide picture sees no black."""
    pixels = np.full((30, 90, 3), 255, np.uint8)
    pixels[:, :30] = 0
    encoder = predictor.encoder_config
    assert encoder.image_fit == "stretch"
    assert predictor.prepare(encode(pixels)).min() == 0
    crop = dataclasses.replace(encoder, image_fit="crop")
    assert prepare(encode(pixels), crop).min() == 255


@pytest.mark.parametrize("data", [b"", b"no picture", encode(np.eye(40, dtype=np.uint8))[:60]])
def test_unreadable_bytes_are_an_image_error(predictor: Predictor, data: bytes) -> None:
    with pytest.raises(ImageError):
        predictor.prepare(data)


def test_warm_up_refuses_weights_that_are_not_finite() -> None:
    loaded = make_loaded()
    Predictor(loaded, CPU).warm_up()
    with torch.no_grad():
        next(loaded.captioner.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="memory: cannot caption .* not finite"):
        Predictor(loaded, CPU).warm_up()


def test_warm_up_refuses_a_vocabulary_of_another_model() -> None:
    loaded = dataclasses.replace(make_loaded(), vocabulary=Vocabulary([]))
    with pytest.raises(CheckpointError, match="cannot caption"):
        Predictor(loaded, CPU).warm_up()


def test_a_saved_checkpoint_captions_alike(
    tmp_path: Path, predictor: Predictor, images: Images
) -> None:
    loaded = make_loaded()
    run = tmp_path / "runs" / "first"
    folder = tmp_path / "local"
    checkpoint.save(
        folder, loaded.captioner, loaded.vocabulary, loaded.model, loaded.search, loaded.state,
        optimizer={}, ledger=Ledger([1]),
    )  # fmt: skip
    uri = run_folder.commit(folder, str(run), loaded.state, keep=1, is_best=True)
    for place in (uri, str(run), str(run.parent)):
        again = Predictor.from_uri(place, CPU)
        assert again.uri == uri
        assert [caption.text for (caption,) in again.predict(images)] == [
            caption.text for (caption,) in predictor.predict(images)
        ]


def test_no_checkpoint_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}.*train one"):
        Predictor.from_uri(str(tmp_path), CPU)


def test_prediction_needs_no_ray() -> None:
    code = "import sys, caption_ray.captioning.predictor; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("make", [make_loaded, make_ensemble])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_gpu_captions_nearly_alike(
    images: Images, make: Callable[[], Loaded], cuda_graphs: bool
) -> None:
    on_gpu, on_cpu = Predictor(make(), GPU, None, cuda_graphs), Predictor(make(), CPU)
    on_gpu.warm_up(8)
    same = 0
    for (ours,), (theirs,) in zip(on_gpu.predict(images), on_cpu.predict(images), strict=True):
        if ours.words == theirs.words:
            same += 1
            assert ours.log_prob == pytest.approx(theirs.log_prob, abs=0.3)
    assert same >= len(images) // 2, "bfloat16 may tip a word here and there, not most captions"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("decoder", ["soft", "adaptive", "updown", "transformer"])
def test_graphs_find_what_single_kernels_find(images: Images, beam_size: int, decoder: str) -> None:
    loaded = make_loaded(decoder=decoder)
    search = dataclasses.replace(
        loaded.search, beam_size=beam_size, min_length=2, no_repeat_ngram_size=2, max_length=11
    )
    plain, graphed = Predictor(loaded, GPU, search), Predictor(loaded, GPU, search, True)
    for count in (1, 3, len(images), 2, 3):  # each size again after another one
        told: list[tuple[int, list[str]]] = []
        found = graphed.predict(images[:count], on_words=lambda *new: told.append(new))  # noqa: B023
        for number, (ours, theirs) in enumerate(
            zip(found, plain.predict(images[:count]), strict=True)
        ):
            assert ours[0].words == theirs[0].words
            assert ours[0].log_prob == pytest.approx(theirs[0].log_prob, abs=0.05)
            np.testing.assert_allclose(ours[0].attention, theirs[0].attention, atol=0.02)
            words = [word for image, new in told for word in new if image == number]
            assert words == ours[0].words
    several = graphed.predict(images[:3], num_return=beam_size)
    assert [len(captions) for captions in several] == [beam_size] * 3
