import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interleaving import cut_off_at
from ledgers import ledger_of, mask_of

from caption_ray import config, storage
from caption_ray.captioning import checkpoint, run_folder
from caption_ray.captioning.checkpoint import CheckpointError, State
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import build_captioner

VOCABULARY = Vocabulary(["a", "red", "circle"])
SIZES = np.array([1, 2])


def _config(**decoder):
    preset = config.shapes()
    small = {"embedding_dim": 8, "hidden_dim": 16, "attention_dim": 8}
    return dataclasses.replace(
        preset.model,
        encoder=dataclasses.replace(preset.model.encoder, image_size=32),
        decoder=dataclasses.replace(preset.model.decoder, **{**small, **decoder}),
    )


def _commit(tmp_path, run, step, *, model=None, keep=2, **options):
    model = model or _config()
    torch.manual_seed(step)
    captioner = build_captioner(model, len(VOCABULARY), None, pretrained=True)
    state = State(step, 1, 0, {"val/loss": 1.5}, "abc")
    folder = tmp_path / f"local-{step}"
    optimizer = torch.optim.AdamW(captioner.parameters())
    checkpoint.save(
        folder,
        captioner,
        VOCABULARY,
        model,
        config.SearchConfig(),
        state,
        optimizer.state_dict(),
        ledger_of(SIZES, [True, False, True]),
    )
    uri = run_folder.commit(folder, str(run), state, keep=keep, **options)
    return captioner, uri


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_captioner_is_the_saved_one(tmp_path, tied):
    model = _config(tie_embeddings=tied)
    captioner, uri = _commit(tmp_path, tmp_path / "run", 7, model=model)
    loaded = checkpoint.load(uri)
    assert loaded.model == model and loaded.state.step == 7 and not loaded.captioner.training
    assert loaded.vocabulary.words == VOCABULARY.words
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[[1, 4, 5, 6, 2]]] * 2)
    expected = captioner.eval()(images, tokens).logits
    assert torch.equal(loaded.captioner(images, tokens).logits, expected)


def test_serving_files_need_no_pickle(tmp_path, monkeypatch):
    _, uri = _commit(tmp_path, tmp_path / "run", 1)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled something"))
    (tmp_path / "run" / run_folder.folder_name(1) / checkpoint.OPTIMIZER).unlink()
    checkpoint.load(uri)


def test_resuming_brings_back_state_optimizer_and_ledger(tmp_path):
    captioner, uri = _commit(tmp_path, tmp_path / "run", 3)
    other = build_captioner(_config(), len(VOCABULARY), None, pretrained=True)
    state, optimizer, ledger = checkpoint.load_for_resume(uri, other, torch.device("cpu"), SIZES)
    assert (state.step, state.tracker_id) == (3, "abc")
    assert mask_of(ledger).tolist() == [True, False, True]
    assert "param_groups" in optimizer
    for name, weight in captioner.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight)


def _as_written_before(uri, seen):
    """Give a checkpoint the ledger of earlier versions, a bool for each picture."""
    folder = Path(uri)
    (folder / checkpoint.LEDGER).unlink()
    np.save(folder / checkpoint.EARLIER_LEDGER, np.array(seen))
    data = (folder / checkpoint.EARLIER_LEDGER).read_bytes()
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    del manifest[checkpoint.LEDGER]
    manifest[checkpoint.EARLIER_LEDGER] = {"bytes": len(data), "digest": storage.checksum(data)}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_with_a_bool_for_each_picture_still_resumes(tmp_path):
    _, uri = _commit(tmp_path, tmp_path / "run", 3)
    _as_written_before(uri, [True, False, True])
    captioner = build_captioner(_config(), len(VOCABULARY), None, pretrained=True)
    *_, ledger = checkpoint.load_for_resume(uri, captioner, torch.device("cpu"), SIZES)
    assert mask_of(ledger).tolist() == [True, False, True]
    assert ledger.left().tolist() == [0, 1]


@pytest.mark.parametrize("written_before", [False, True])
def test_a_ledger_of_other_pictures_is_refused(tmp_path, written_before):
    _, uri = _commit(tmp_path, tmp_path / "run", 3)
    if written_before:
        _as_written_before(uri, [True, False, True])
    captioner = build_captioner(_config(), len(VOCABULARY), None, pretrained=True)
    with pytest.raises(CheckpointError, match=r"of 3 pictures.*has 4 pictures in 2 shards"):
        checkpoint.load_for_resume(uri, captioner, torch.device("cpu"), np.array([2, 2]))


def test_earlier_versions_refuse_a_checkpoint_without_their_ledger(tmp_path):
    _, uri = _commit(tmp_path, tmp_path / "run", 3)
    with pytest.raises(CheckpointError, match="which has no ledger.npy"):
        checkpoint._read(uri, [checkpoint.EARLIER_LEDGER])


def test_an_unfinished_checkpoint_is_never_found(tmp_path, monkeypatch):
    run = tmp_path / "run"
    _, good = _commit(tmp_path, run, 1)
    cut_off_at(checkpoint.MANIFEST, monkeypatch)
    with pytest.raises(storage.StorageError):
        _commit(tmp_path, run, 2)
    monkeypatch.undo()
    assert run_folder.find(str(run), "latest") == good
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        checkpoint.load(str(run / run_folder.folder_name(2)))
    checkpoint.load(good)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.VOCABULARY, checkpoint.STATE])
def test_a_damaged_file_is_named(tmp_path, name):
    _, uri = _commit(tmp_path, tmp_path / "run", 1)
    path = tmp_path / "run" / run_folder.folder_name(1) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=rf"{name}: .*not what the manifest names"):
        checkpoint.load(uri)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"not a whole checkpoint.*{name}"):
        checkpoint.load(uri)


def test_weights_of_another_model_are_refused(tmp_path):
    _, uri = _commit(tmp_path, tmp_path / "run", 1)
    folder = tmp_path / "run" / run_folder.folder_name(1)
    values = json.loads((folder / checkpoint.CONFIG).read_text())
    values["model"]["decoder"]["hidden_dim"] = 32
    changed = json.dumps(values).encode()
    (folder / checkpoint.CONFIG).write_bytes(changed)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest[checkpoint.CONFIG] = {"bytes": len(changed), "digest": storage.digest(changed)}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"cannot be rebuilt: weights of another model: \S+ is \(.*\), not"
    ):
        checkpoint.load(uri)


def test_captioners_that_cannot_share_weights_are_told_apart():
    one = _config()
    assert checkpoint.differences(one, _config(dropout=0.9)) == ""
    encoder = dataclasses.replace(one.encoder, trainable_from="none", weights="DEFAULT")
    assert checkpoint.differences(one, dataclasses.replace(one, encoder=encoder)) == ""
    assert checkpoint.differences(one, _config(cell="gru")) == "decoder.cell 'lstm' != 'gru'"


# Ensembles ------------------------------------------------------------------------------------


def test_several_uris_mean_an_ensemble_each_found_by_itself(tmp_path, monkeypatch):
    first, best = _commit(tmp_path, tmp_path / "runs/one", 1, is_best=True)
    second, latest = _commit(tmp_path, tmp_path / "runs/one", 2)
    _, other = _commit(tmp_path, tmp_path / "two", 3, is_best=True)
    monkeypatch.chdir(tmp_path)
    assert run_folder.find("runs,two", "best") == f"{best},{other}"
    assert run_folder.find(f"runs/one , {best}", "latest") == f"{latest},{best}"
    found = run_folder.find("runs,two", "best")
    assert run_folder.find(found) == found, "they are their own names"

    loaded = checkpoint.load(f"{best},{latest}")
    assert [member.uri for member in loaded.members] == [best, latest]
    assert loaded.uri == f"{best},{latest}" and not loaded.captioner.training
    for member, captioner in zip(loaded.captioner.members, (first, second), strict=True):
        for name, tensor in captioner.state_dict().items():
            assert torch.equal(member.state_dict()[name], tensor)
    assert checkpoint.load(best).members == ()


def test_a_local_path_may_have_commas(tmp_path):
    _, uri = _commit(tmp_path, tmp_path / "Runs, all of them/one", 1, is_best=True)
    for place in (uri, uri.rpartition("/")[0], str(tmp_path / "Runs, all of them")):
        assert run_folder.find(place) == uri
    assert checkpoint.load(uri).uri == uri


def test_a_member_that_is_not_there_is_named(tmp_path):
    _, uri = _commit(tmp_path, tmp_path / "one", 1)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/none: neither"):
        run_folder.find(f"{uri},{tmp_path}/none")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/none: not a whole"):
        checkpoint.load(f"{uri},{tmp_path}/none")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 48}, r"image_size \(32 and 48\);"),
        ({"image_fit": "crop"}, r"image_fit \(stretch and crop\);"),
        ({"image_size": 48, "image_fit": "crop"}, r"image_size \(32 and 48\), image_fit "),
    ],
)
def test_members_that_see_other_pictures_are_refused_naming_the_difference(tmp_path, change, named):
    _, one = _commit(tmp_path, tmp_path / "one", 1)
    model = _config()
    other = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, **change))
    _, two = _commit(tmp_path, tmp_path / "two", 2, model=other)
    with pytest.raises(CheckpointError, match=f"{one} and {two} cannot .* they differ in {named}"):
        checkpoint.load(f"{one},{two}")


def test_members_that_know_other_words_are_refused(tmp_path, monkeypatch):
    _, one = _commit(tmp_path, tmp_path / "one", 1)
    monkeypatch.setitem(globals(), "VOCABULARY", Vocabulary(["a", "circle", "red"]))
    _, two = _commit(tmp_path, tmp_path / "two", 2)
    with pytest.raises(CheckpointError, match="they differ in the vocabulary;"):
        checkpoint.load(f"{one},{two}")


def test_members_may_differ_in_their_decoders(tmp_path):
    _, one = _commit(tmp_path, tmp_path / "one", 1)
    small = {"name": "transformer", "num_heads": 2, "num_layers": 1, "feedforward_dim": 8}
    _, two = _commit(tmp_path, tmp_path / "two", 2, model=_config(**small))
    assert len(checkpoint.load(f"{one},{two}").members) == 2
