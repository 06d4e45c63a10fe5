import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from caption_ray import config
from caption_ray.model.captioner import DECODERS, build_captioner
from caption_ray.model.encoder import to_tensor
from caption_ray.model.search import generate
from caption_ray.training import loop

VOCABULARY, SIZE = 30, 32
CPU = torch.device("cpu")


def _model(name="soft"):
    preset = config.shapes().model
    # batch statistics differ between one worker and two
    encoder = dataclasses.replace(preset.encoder, image_size=SIZE, batch_norm="frozen")
    decoder = dataclasses.replace(
        preset.decoder, name=name, embedding_dim=8, hidden_dim=16, attention_dim=8, dropout=0.0
    )
    torch.manual_seed(0)
    model = dataclasses.replace(preset, encoder=encoder, decoder=decoder)
    return build_captioner(model, VOCABULARY, None, pretrained=True)


def _settings(**changes):
    defaults = {"attention_regularization": 1.0, "warmup_steps": 0, "learning_rate": 1e-3}
    return config.TrainConfig(**{**defaults, **changes})


def _data(count, seed=0):
    """Pictures with captions of very different lengths, some of them missing."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    tokens = np.zeros((count, 3, 14), np.int32)
    for row in tokens.reshape(-1, 14):
        words = int(rng.integers(0, 12))
        if words:
            row[0], row[1 + words] = loop.START, loop.END
            row[1 : 1 + words] = rng.integers(4, VOCABULARY, words)
    return images, tokens


def _steps(model, data, steps, settings, autocast=None, adam=False):
    # plain gradient descent by default: Adam would blow up differences of rounding
    kind = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=settings.learning_rate)
    for _ in range(steps):
        loop.train_step(model, loop.to_device(*data, SIZE, CPU), optimizer, settings, autocast)


def _worker(rank, world_size, file, data, accumulation, results):
    dist.init_process_group("gloo", f"file://{file}", world_size=world_size, rank=rank)
    torch.set_num_threads(1)
    model = DistributedDataParallel(_model())
    share = [part for part in zip(*data, strict=True)][rank::world_size]
    # the first rank has fewer pictures and stands idle in the second step
    batches = [share[: 2 + rank], None if rank == 0 else share[2 + rank :]]
    settings = _settings(accumulation=accumulation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        arrays = [np.stack(column) for column in zip(*batch, strict=True)] if batch else [None] * 2
        example = loop.to_device(*arrays, SIZE, CPU)
        sums, norm = loop.train_step(model, example, optimizer, settings)
        results.put((rank, float(sums.reduced().words), float(norm)))
    results.put((rank, {k: v.numpy() for k, v in model.module.state_dict().items()}, None))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_workers_step_like_one_with_their_pictures_together(tmp_path, accumulation):
    data = _data(9)
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(
            target=_worker, args=(r, 2, tmp_path / "rendezvous", data, accumulation, results)
        )
        for r in range(2)
    ]
    for worker in workers:
        worker.start()
    seen = [results.get(timeout=120) for _ in range(6)]
    for worker in workers:
        worker.join()

    alone = _model()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    shares = [list(range(9))[rank::2] for rank in range(2)]
    words = []
    for numbers in (shares[0][:2] + shares[1][:3], shares[1][3:]):
        batch = data[0][numbers], data[1][numbers]
        sums, _ = loop.train_step(alone, loop.to_device(*batch, SIZE, CPU), optimizer, _settings())
        words.append(float(sums.words))
    for rank in range(2):
        assert [count for r, count, norm in seen if r == rank and norm is not None] == words
        weights = next(w for r, w, norm in seen if r == rank and norm is None)
        for name, expected in alone.state_dict().items():
            np.testing.assert_allclose(weights[name], expected, atol=2e-6, err_msg=name)


def test_accumulation_changes_memory_and_not_the_step():
    whole, parts = _model(), _model()
    _steps(whole, _data(6), 3, _settings(learning_rate=0.1))
    _steps(parts, _data(6), 3, _settings(learning_rate=0.1, accumulation=3))
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], expected, atol=2e-6, rtol=0)


def test_a_worker_without_pictures_does_not_move_the_weights():
    model = _model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    example = loop.to_device(None, None, SIZE, CPU)
    sums, norm = loop.train_step(model, example, optimizer, _settings())
    assert float(norm) == 0 and float(sums.words) == 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_unreadable_pictures_add_nothing_to_the_loss():
    images, tokens = _data(5)
    with_blank = np.concatenate([images, images[:1] * 0]), np.concatenate([tokens, tokens[:1] * 0])
    sums = [
        loop.validate(_model(), [loop.to_device(*data, SIZE, CPU)])
        for data in ((images, tokens), with_blank)
    ]
    assert float(sums[0].words) == float(sums[1].words) > 0
    assert float(sums[0].nll) == pytest.approx(float(sums[1].nll), rel=1e-5)


def test_losses_are_the_mean_over_words_and_the_originals_padded_sum():
    images, tokens = _data(4, seed=1)
    tokens[:, 1:] = 0
    model = _model().eval()
    sums = loop.validate(model, [loop.to_device(images, tokens, SIZE, CPU)])
    losses = sums.losses(padded_length=14)
    # straight from the definition, caption by caption
    nll, words, captions = 0.0, 0, 0
    for image, lines in zip(images, tokens, strict=True):
        line = lines[0][lines[0] != loop.PAD]
        if len(line):
            captions += 1
            output = model.eval()(to_tensor(image[None]), torch.tensor(line).long()[None, None])
            picked = output.logits.log_softmax(-1)[range(len(line) - 1), line[1:]]
            nll, words = nll - float(picked.detach().sum()), words + len(line) - 1
    assert losses["loss"] == pytest.approx(nll / words, rel=1e-5)
    assert losses["loss_padded"] == pytest.approx(nll / captions / 14, rel=1e-5)


def test_an_untrained_model_has_the_loss_of_guessing():
    sums = loop.validate(_model(), [loop.to_device(*_data(8), SIZE, CPU)])
    assert sums.losses(14)["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.05)


def test_training_learns_a_few_pictures_by_heart():
    model, data = _model(), _data(4)
    example = loop.to_device(*data, SIZE, CPU)
    before = loop.validate(model, [example]).losses(14)["loss"]
    settings = _settings(attention_regularization=0.0, learning_rate=1e-2)
    _steps(model, data, 150, settings, adam=True)
    assert loop.validate(model, [example]).losses(14)["loss"] < 0.1 * before


def test_bfloat16_autocast_comes_close_to_float32():
    data, settings = _data(4), _settings(attention_regularization=0.0)
    losses = []
    for autocast in (None, torch.bfloat16):
        model = _model()
        _steps(model, data, 20, settings, autocast, adam=True)
        losses.append(loop.validate(model, [loop.to_device(*data, SIZE, CPU)]).losses(14)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def _works_in_bfloat16(_rank):
    images, tokens = _data(2)
    example = loop.to_device(images, tokens, SIZE, CPU)
    search = config.SearchConfig(beam_size=2, max_length=4)
    for name in DECODERS:
        model = _model(name)
        _steps(model, (images, tokens), 1, _settings(), torch.bfloat16)
        loss = loop.validate(model, [example], torch.bfloat16).losses(14)["loss"]
        assert loss == pytest.approx(math.log(VOCABULARY), rel=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            found = generate(model.eval(), to_tensor(images), search, num_return=1)
        assert found.log_probs.isfinite().all()


def test_every_decoder_works_in_bfloat16_on_cpus_without_avx512(monkeypatch):
    # oneDNN has fewer kernels there; it reads this when torch is loaded, hence another process
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    mp.spawn(_works_in_bfloat16, nprocs=1)


@pytest.mark.parametrize("has_amx", [False, True])
def test_auto_is_bfloat16_only_where_matrix_products_gain_by_it(monkeypatch, has_amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert loop.autocast_dtype("auto", CPU) is (torch.bfloat16 if has_amx else None)
    assert loop.autocast_dtype("float32", CPU) is None
    assert loop.autocast_dtype("bfloat16", CPU) is torch.bfloat16


def test_the_learning_rate_warms_up_and_falls_to_zero():
    settings = _settings(warmup_steps=10, schedule="cosine")
    factors = [loop.learning_rate_factor(step, settings, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1
    assert all(a >= b for a, b in zip(factors[9:], factors[10:], strict=False))
    assert factors[60] == pytest.approx(0.5) and factors[110] == pytest.approx(0)
    constant = _settings(warmup_steps=0, schedule="constant")
    assert {loop.learning_rate_factor(step, constant, 10) for step in range(20)} == {1.0}


def test_another_number_of_workers_leaves_the_learning_rate_where_it_was():
    settings = _settings(warmup_steps=4)
    # half of 8 epochs of 10 steps is also half of 8 epochs of 5
    before = loop.learning_rate_factor(42, settings, 80 + 4, place=44)
    after = loop.learning_rate_factor(42, settings, 40 + 4, place=24)
    assert before == after == pytest.approx(0.5)
    # a place before the end of warm-up is its end: the rate never rises again
    assert loop.learning_rate_factor(4, settings, 100, place=2) == 1
    for step in range(80):
        assert loop.learning_rate_factor(step, settings, 80, step) == loop.learning_rate_factor(
            step, settings, 80
        )


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    losses = [torch.tensor(value) for value in (1.0, 2.0, math.nan, math.inf)]
    loop.require_finite(losses[:2], 40, epoch=3)
    with pytest.raises(loop.NonFiniteLoss, match=r"at step 42 \(epoch 3\): lower --train.learning"):
        loop.require_finite(losses, 40, epoch=3)


def test_tokens_are_cut_at_the_longest_caption():
    images, tokens = _data(4)
    longest = int((tokens != loop.PAD).sum(-1).max())
    assert loop.to_device(images, tokens, SIZE, CPU).tokens.shape[-1] == longest < 14


def test_the_average_is_the_exponential_moving_average():
    captioner = _model()
    average = loop.averaged(captioner, 0.6)
    name = "decoder.output_bias"
    expected = None
    for step in range(8):
        with torch.no_grad():
            captioner.decoder.output_bias += step + 1.0
        average.update_parameters(captioner)
        weights = captioner.state_dict()[name].clone()
        share = min(0.6, (1 + step) / (10 + step))
        expected = weights if expected is None else share * expected + (1 - share) * weights
        torch.testing.assert_close(average.module.state_dict()[name], expected)
    assert loop.averaged(captioner, 0.0) is None


def test_an_average_that_was_saved_goes_on_as_it_would_have():
    captioner = _model()
    whole, half = loop.averaged(captioner, 0.9), loop.averaged(captioner, 0.9)

    def learn(average):
        with torch.no_grad():
            for parameter in captioner.parameters():
                parameter.add_(0.1)
        average.update_parameters(captioner)

    before = copy.deepcopy(captioner.state_dict())
    for _ in range(6):
        learn(whole)
    captioner.load_state_dict(before)
    for _ in range(3):
        learn(half)
    resumed = loop.averaged(_model(), 0.9)
    resumed.load_state_dict(loop.as_average(half.module, int(half.n_averaged)))
    for _ in range(3):
        learn(resumed)
    for name, value in whole.module.state_dict().items():
        torch.testing.assert_close(resumed.module.state_dict()[name], value, msg=name)


def test_own_words_rise_by_the_epoch_to_their_largest_share():
    settings = _settings(scheduled_sampling=0.5, scheduled_sampling_epochs=5)
    shares = [loop.own_words(settings, epoch) for epoch in range(8)]
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])
    assert loop.own_words(_settings(), 9) == 0


def test_label_smoothing_and_own_words_keep_the_reported_loss_a_likelihood():
    example = loop.to_device(*_data(4), SIZE, CPU)
    reported = []
    for smoothing in (0.0, 0.2):
        model = _model().eval()  # batch norms as they are
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sums, _ = loop.train_step(model, example, optimizer, _settings(label_smoothing=smoothing))
        reported.append(sums.losses(14)["loss"])
    assert reported[0] == pytest.approx(reported[1], rel=1e-5)
