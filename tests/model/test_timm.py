"""timm's models as encoders: every family, weights from files and the Hub, fine-tuning."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from activations import kept_by
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from caption_ray.captioning import checkpoint
from caption_ray.config import DecoderConfig, EncoderConfig, ModelConfig, SearchConfig, shapes
from caption_ray.data.ledger import Ledger
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.model.captioner import Captioner, build_captioner
from caption_ray.model.decoder import END, START
from caption_ray.model.encoder import Encoder, build_encoder
from caption_ray.training import initial
from caption_ray.training.feature_cache import _Encode

SMALLEST = {
    "beit": "beit_base_patch16_224", "byoanet": "halonet_h1", "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224", "coat": "coat_tiny", "convit": "convit_tiny",
    "convmixer": "convmixer_768_32", "convnext": "test_convnext", "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla46x_c", "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1", "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0", "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny", "gemma4_vit": "gemma4_vit_167m", "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s", "lowformer": "lowformer_b0", "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet", "metaformer": "poolformerv2_s12", "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050", "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap", "nasnet": "nasnetalarge",
    "nest": "nest_tiny", "nextvit": "nextvit_small", "nfnet": "test_nfnet", "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large", "pvt_v2": "pvt_v2_b0", "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny", "regnet": "regnetx_002", "repghost": "repghostnet_050",
    "repvit": "repvit_m1", "res2net": "res2next50", "resnest": "resnest14d",
    "resnet": "test_resnet", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100",
    "selecsls": "selecsls42", "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1", "sknet": "skresnet18", "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs", "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224", "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m", "twins": "twins_svt_small",
    "vgg": "vgg11", "visformer": "visformer_tiny", "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224", "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224", "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception",
    "xception_aligned": "xception41p", "xcit": "xcit_nano_12_p8_224",
}  # fmt: skip
"""The smallest model of each family, by number of parameters (timm 1.0.31)."""

FAST = {
    "resnet",  # channels first
    "mambaout",  # channels last
    "vision_transformer",  # a class token
    "eva",  # a class token and registers
    "vision_transformer_relpos",  # patches only
    "pit",  # forward_features gives a class token alone
    "efficientnet",  # a convolution after the last stage
}
QUICK = frozenset(
    (
        "byobnet cait convit convnext cpubone cspnet cspnext deit densenet dla dpn edgenext "
        "efficientformer_v2 efficientvim efficientvit_mit efficientvit_msra fasternet ghostnet "
        "hardcorenas hgnet iformer inception_next levit maxxvit mlp_mixer mobilenetv3 mobilevit "
        "nfnet pvt_v2 qwen3_vit regnet resnest resnetv2 rexnet shvit starnet swiftformer "
        "vision_transformer_hybrid vision_transformer_sam vovnet xception_aligned xcit "
    ).split()
)
"""More families, of about a second each: so nine tests of ten stay fast."""
SHALLOW = {
    "beit": {"depth": 2}, "deepseek_vit": {"depth": 1}, "gemma4_vit": {"depth": 1},
    "qwen3_vit": {"depth": 1}, "naflexvit": {"depth": 2}, "vision_transformer_sam": {"depth": 2},
}  # fmt: skip
"""What keeps large models of equal layers small."""
MORE_THAN_STAGES = {"nfnet", "xception_aligned"}
"""Families with layers after the last stage that keep the number of channels: a convolution, and
an activation."""
VOCABULARY = Vocabulary("a red circle above blue".split())


def families() -> list[Any]:
    slow = pytest.mark.slow
    return [
        pytest.param(family, marks=() if family in FAST | QUICK else slow)
        for family in timm.list_modules()
        if timm.list_models(module=family)
    ]


def smallest(family: str) -> str:
    if family in SMALLEST:
        return SMALLEST[family]
    sizes = {}
    for name in timm.list_models(module=family):  # of a family that is younger than this test
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: sizes[name])


def build(name: str, size: int | None = None, **options: Any) -> Encoder:
    torch.manual_seed(0)
    native: int = timm.get_pretrained_cfg(name).input_size[-1]
    config = EncoderConfig(
        name=f"timm/{name}", weights="none", image_size=size or native, **options
    )
    return build_encoder(config, None)


def at_a_small_size(name: str) -> int:
    """The smallest image size, of some that are fast to compute, of which a model makes several
    regions."""
    for size in (64, 96, 112, 128, 168):
        try:
            if build(name, size).grid != (1, 1):
                return size
        except ValueError as error:
            assert f"--model.encoder.image-size is {size}: timm/{name} takes other" in str(error)
    return int(timm.get_pretrained_cfg(name).input_size[-1])


def pictures(size: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def words() -> Tensor:
    return torch.tensor([[[START, 4, 5, 6, END]], [[START, 5, 8, 7, END]]])


@pytest.mark.parametrize("family", families())
def test_every_family_encodes_freezes_trains_and_comes_back_from_a_checkpoint(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = smallest(family)
    if family in SHALLOW:
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **SHALLOW[family]))
    size = at_a_small_size(name)
    images = pictures(size)

    whole = build(name, size, trainable_from="all").eval()
    rows, columns = whole.grid
    with torch.no_grad():
        regions = whole(images)
    assert regions.shape == (2, rows * columns, whole.region_dim)
    assert rows * columns > 1 and regions.std() > 0
    pixels = (images - whole.mean) / whole.std
    with torch.no_grad():
        last = last_stage(whole.backbone, pixels)
    if last.shape[1] == whole.region_dim and family not in MORE_THAN_STAGES:
        difference = (regions - last.flatten(2).transpose(1, 2)).abs().max()
        assert difference < 1e-3 * last.abs().max()
    else:
        assert whole.region_dim == whole.backbone.num_features

    stages = offered_stages(name, size)
    stage = stages[len(stages) // 2]
    config = ModelConfig(
        EncoderConfig(name=f"timm/{name}", weights="none", image_size=size, trainable_from=stage),
        DecoderConfig(embedding_dim=4, hidden_dim=8, attention_dim=4, region_dim=6, dropout=0.0),
    )
    torch.manual_seed(0)
    captioner = build_captioner(config, len(VOCABULARY), None, pretrained=True).train()
    frozen_before = prefix_of(captioner.encoder, stage)
    captioner(images, words()).logits.square().sum().backward()
    for key, parameter in captioner.encoder.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert not (parameter.requires_grad and key in frozen_before), key
    trained = [
        key
        for key, parameter in captioner.encoder.backbone.named_parameters()
        if key.startswith(f"{stage}.") and parameter.requires_grad
    ]
    assert trained, "the gradient reaches the named stage"

    captioner.eval()
    encode = _Encode((config.encoder, captioner.encoder.state_dict()), str(tmp_path), {})
    with torch.no_grad():
        expected = captioner.encoder(images).half().numpy()
    if np.isfinite(expected).all():
        cached = encode._regions(images.permute(0, 2, 3, 1).numpy())
        np.testing.assert_allclose(cached, expected, rtol=2e-3, atol=2e-3)
    else:  # random weights without statistics
        with pytest.raises(ValueError, match="not finite in float16"):
            encode._regions(images.permute(0, 2, 3, 1).numpy())

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = saved_and_loaded(captioner, config, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images, words()).logits, captioner(images, words()).logits
        )


def last_stage(module: Any, pixels: Tensor) -> Tensor:
    options = {"indices": 1, "output_fmt": "NCHW", "intermediates_only": True}
    try:
        last: Tensor = module.forward_intermediates(pixels, norm=True, **options)[-1]
    except AssertionError:  # it has no norm for this
        last = module.forward_intermediates(pixels, **options)[-1]
    return last


def offered_stages(name: str, size: int) -> list[str]:
    with pytest.raises(ValueError, match="--model.encoder.trainable-from is '[?]'") as refused:
        build(name, size, trainable_from="?")
    return str(refused.value).split("or a stage: ")[1].split(", ")


def prefix_of(encoder: Encoder, stage: str) -> set[str]:
    modules = list(dict(encoder.backbone.named_modules()))
    before = set(modules[: modules.index(stage)])
    return {
        key for key, _ in encoder.backbone.named_parameters() if key.rpartition(".")[0] in before
    }


def saved_and_loaded(captioner: Captioner, config: ModelConfig, folder: Path) -> Captioner:
    checkpoint.save(
        folder / "checkpoint", captioner, VOCABULARY, config, SearchConfig(),
        checkpoint.State(1, 1, 0, {}, None), {}, Ledger([1]),
    )  # fmt: skip
    loaded: Any = checkpoint.load(str(folder / "checkpoint")).captioner
    return loaded


# Freezing and fine-tuning ---------------------------------------------------------------------


def test_a_frozen_prefix_keeps_no_activations() -> None:
    def kept(stage: str) -> int:
        encoder = build("test_vit", trainable_from=stage).train()
        return kept_by(lambda: encoder(pictures(160)))[1]

    assert kept("none") == 0
    assert kept("blocks.5") < 0.3 * kept("all")


def test_layers_learn_the_slower_the_deeper_they_lie() -> None:
    model = dataclasses.replace(
        shapes().model,
        encoder=EncoderConfig(
            name="timm/test_vit", weights="none", image_size=64, trainable_from="all"
        ),
    )
    captioner = build_captioner(model, 12, None, pretrained=False)
    groups = captioner.parameter_groups(4e-4, 1e-4, 0.1, encoder_layer_decay=0.5)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sorted(of) == sorted(id(p) for p in captioner.parameters() if p.requires_grad)
    rates = {}
    for key, parameter in captioner.named_parameters():
        rate, decay = of[id(parameter)]
        assert decay == (
            0.0 if parameter.ndim == 1 or "pos_embed" in key or "token" in key else 0.1
        )
        rates[key] = rate
    for key, rate in rates.items():
        if not key.startswith("encoder."):
            assert rate == 4e-4
    blocks = [rates[f"encoder.backbone.blocks.{i}.attn.qkv.weight"] for i in range(6)]
    assert blocks == pytest.approx([1e-4 * 0.5 ** (5 - i) for i in range(6)])
    assert rates["encoder.backbone.patch_embed.proj.weight"] == pytest.approx(1e-4 * 0.5**6)
    assert rates["encoder.backbone.norm.weight"] == pytest.approx(1e-4)


def test_paths_are_dropped_in_training_only_and_the_more_the_deeper() -> None:
    encoder = build("test_vit", drop_path=0.5, trainable_from="all")
    shares = [block.drop_path1.drop_prob for block in encoder.backbone.blocks[1:]]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    images = pictures(160)
    assert not torch.equal(encoder.train()(images), encoder(images))
    assert torch.equal(encoder.eval()(images), encoder(images))
    frozen = build("test_vit", drop_path=0.5).train()
    assert torch.equal(frozen(images), frozen(images)), "nothing is dropped in frozen stages"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("stage", ["all", "last"])
def test_gradients_are_the_same_when_activations_are_not_kept(name: str, stage: str) -> None:
    if stage == "last":
        stage = offered_stages(name, 160)[-2]
    kept = build(name, trainable_from=stage).train()
    again = copy.deepcopy(kept)
    again.checkpoint_gradients()
    for encoder in (kept, again):
        encoder(pictures(160)).square().sum().backward()
    for (key, one), (_, other) in zip(
        kept.named_parameters(), again.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_path": 0.1}, "model.encoder.drop-path is 0.1: it needs a model of timm"),
        ({}, "train.encoder-layer-decay is 0.5: it needs a model of timm"),
    ],
)
def test_what_only_timms_models_can_is_refused_for_others(
    changes: dict[str, Any], message: str
) -> None:
    config = shapes()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model, encoder=dataclasses.replace(config.model.encoder, **changes)
            ),
            train=dataclasses.replace(config.train, encoder_layer_decay=1.0 if changes else 0.5),
        )


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "test_resnet"])
def test_a_second_stage_may_have_another_image_size(name: str, tmp_path: Path) -> None:
    small, large = (160, 224) if name != "swin_tiny_patch4_window7_224" else (224, 448)
    model = ModelConfig(
        EncoderConfig(name=f"timm/{name}", weights="none", image_size=small),
        DecoderConfig(embedding_dim=4, hidden_dim=8, attention_dim=4, region_positions=True),
    )
    torch.manual_seed(0)
    captioner = build_captioner(model, len(VOCABULARY), None, pretrained=False)
    checkpoint.save(
        tmp_path / "first", captioner, VOCABULARY, model, SearchConfig(),
        checkpoint.State(1, 1, 0, {}, None), {}, Ledger([1]),
    )  # fmt: skip
    start = checkpoint.load(str(tmp_path / "first"))
    second = dataclasses.replace(
        shapes(),
        model=dataclasses.replace(
            model, encoder=dataclasses.replace(model.encoder, image_size=large)
        ),
    )
    assert checkpoint.differences(start.model, second.model) == ""
    grown = initial.initial_captioner(second, len(VOCABULARY), start).eval()
    assert grown.grid[0] == round(start.captioner.grid[0] * large / small)
    for key, tensor in start.captioner.state_dict().items():
        if "pos_embed" not in key:
            assert torch.equal(grown.state_dict()[key], tensor), key
    # of a picture of one colour, regions differ by their place alone: about the same at any size
    blank = [torch.full((1, 3, size, size), 90, dtype=torch.uint8) for size in (small, large)]
    with torch.no_grad():
        before, after = (
            model.encoder(image)
            for model, image in zip((start.captioner, grown), blank, strict=True)
        )
    assert torch.nn.functional.cosine_similarity(before.mean(1), after.mean(1)).item() > 0.98


# Weights --------------------------------------------------------------------------------------


def saved(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "visual.", "module.visual.trunk."])
@pytest.mark.parametrize("with_head", [True, False])
def test_weights_come_from_a_file_in_any_wrapping(
    tmp_path: Path, ending: str, prefix: str, with_head: bool
) -> None:
    torch.manual_seed(7)
    theirs = timm.create_model("test_vit", num_classes=10 if with_head else 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    state = {prefix + key: tensor for key, tensor in theirs.state_dict().items()}
    if "visual" in prefix:
        state |= {"text.embedding": torch.zeros(3), "logit_scale": torch.zeros(1)}
    path = saved(state, tmp_path / f"weights.{ending}")
    config = EncoderConfig(name="timm/test_vit", weights=path, image_size=160)
    encoder = build_encoder(config, path).eval()
    for key, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key]), key
    assert not isinstance(encoder.backbone.norm, nn.Identity)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema"])
def test_weights_come_from_a_training_scripts_checkpoint(tmp_path: Path, wrapper: str) -> None:
    theirs = timm.create_model("test_resnet").state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, wrapper: theirs, "optimizer": {"lr": 0.1}}, path)
    config = EncoderConfig(name="timm/test_resnet", weights=str(path), image_size=160)
    encoder = build_encoder(config, str(path))
    assert all(torch.equal(t, theirs[k]) for k, t in encoder.backbone.state_dict().items())


def test_positions_are_interpolated_to_the_image_size(tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit")
    with torch.no_grad():
        theirs.pos_embed.normal_()
    path = saved(theirs.state_dict(), tmp_path / "weights.safetensors")
    config = EncoderConfig(name="timm/test_vit", weights=path, image_size=240)
    encoder = build_encoder(config, path)
    assert encoder.grid == (15, 15)
    positions = encoder.backbone.pos_embed
    assert positions.shape[1] == theirs.pos_embed.shape[1] + 15 * 15 - 10 * 10
    torch.testing.assert_close(positions[:, 0], theirs.pos_embed[:, 0])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {k: v for k, v in state.items() if "blocks.3.attn.qkv" not in k},
        lambda state: {k: v for k, v in state.items() if k != "norm.weight"},
        lambda state: {**state, "blocks.0.mlp.fc1.weight": torch.zeros(3, 3)},
        lambda state: timm.create_model("test_resnet").state_dict(),
        lambda state: {"a": torch.zeros(2)},
    ],
    ids=["a layer is missing", "a norm is missing", "a shape", "another model", "nothing of it"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, spoil: Any) -> None:
    state = spoil(timm.create_model("test_vit").state_dict())
    path = saved(state, tmp_path / "weights.pth")
    config = EncoderConfig(name="timm/test_vit", weights=path, image_size=160)
    with pytest.raises(ValueError, match=r"weights is .*: these are not the weights of timm/test_"):
        build_encoder(config, path)


def test_a_missing_batch_norm_statistic_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    del state["layer1.0.bn1.running_var"]
    path = saved(state, tmp_path / "weights.pth")
    config = EncoderConfig(name="timm/test_resnet", weights=path, image_size=160)
    with pytest.raises(ValueError, match=r"they lack layer1.0.bn1.running_var \(1 in all\)"):
        build_encoder(config, path)


class _Pickled:
    def __reduce__(self) -> Any:
        return (Path("/tmp/pwned").touch, ())


def test_no_code_in_a_file_of_weights_is_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": _Pickled(), "a": torch.zeros(1)}, path)
    config = EncoderConfig(name="timm/test_vit", weights=str(path), image_size=160)
    with pytest.raises(ValueError, match="no state dict in"):
        build_encoder(config, str(path))
    assert not Path("/tmp/pwned").exists()


# The Hub --------------------------------------------------------------------------------------

BUILD = """
import sys
from caption_ray.config import EncoderConfig
from caption_ray.model.encoder import build_encoder

config = EncoderConfig(name=sys.argv[1], weights=sys.argv[2], image_size=160)
try:
    encoder = build_encoder(config, None)
except ConnectionError as error:
    print("refused:", error)
else:
    print("sum:", sum(tensor.double().sum().item() for tensor in encoder.backbone.parameters()))
"""


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hub that a download needs: a file, its hash and its commit."""

    content = b""
    asked: list[str] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        if self.path != "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)


@pytest.mark.slow
def test_weights_by_tag_come_from_a_mirror_once_and_then_without_a_network(tmp_path: Path) -> None:
    torch.manual_seed(7)
    theirs = timm.create_model("test_resnet")
    _Hub.content = safetensors_bytes(theirs.state_dict())
    expected = sum(
        tensor.double().sum().item()
        for key, tensor in theirs.named_parameters()
        if not key.startswith("fc.")
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mirror = f"http://127.0.0.1:{server.server_port}"

    def built(name: str, weights: str = "DEFAULT", **environment: str) -> str:
        environment = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": mirror, **environment}
        ended = subprocess.run(
            [sys.executable, "-c", BUILD, name, weights],
            env={**os.environ, **environment}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return ended.stdout.strip()

    for name, weights, environment in (
        ("timm/test_resnet", "DEFAULT", {}),
        ("timm/test_resnet.r160_in1k", "DEFAULT", {"HF_HUB_OFFLINE": "1"}),
        ("timm/test_resnet", "r160_in1k", {"HF_HUB_OFFLINE": "1"}),
    ):
        assert float(built(name, weights, **environment).removeprefix("sum: ")) == pytest.approx(
            expected
        )
    assert any(path.endswith("model.safetensors") for path in _Hub.asked)
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        refused = built("timm/test_vit", **environment)
        assert refused.count("\n") == 0
        assert re.match(
            r"refused: --model.encoder.weights is 'DEFAULT': cannot download timm/test_vit "
            r"\(timm/test_vit.r160_in1k\).* give the path or URI of a state dict, or none",
            refused,
        ), refused
    server.shutdown()


# What the weights expect ----------------------------------------------------------------------


def test_pixels_are_normalised_and_resized_as_the_weights_were_made() -> None:
    encoder = build("tf_efficientnet_lite0", 64)
    torch.testing.assert_close(encoder.mean.flatten(), torch.full((3,), 127.5))
    torch.testing.assert_close(encoder.std.flatten(), torch.full((3,), 127.5))
    for name, how in (
        ("timm/tf_efficientnet_lite0", "bicubic"),
        ("timm/resnet18.tv_in1k", "bilinear"),
        ("resnet18", "auto"),
    ):
        assert initial.settled(EncoderConfig(name=name)).interpolation == how
    asked = EncoderConfig(name="timm/tf_efficientnet_lite0", interpolation="bilinear")
    assert initial.settled(asked).interpolation == "bilinear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "timm/resnet51"}, "timm .* has no such model; did you mean .*resnet50"),
        ({"name": "timm/resnet50.a9"}, r"give timm/resnet50, or one of .*timm/resnet50.a1_in1k"),
        ({"name": "timm/test_vit", "weights": "x"}, "weights is 'x': for timm/test_vit give none"),
        ({"name": "timm/test_vit", "image_size": 8}, "image-size is 8: .* such as 160"),
        ({"name": "timm/test_vit", "trainable_from": "blocks.9"}, "blocks.4, blocks.5"),
        ({"name": "timm/vgg11", "drop_path": 0.1}, "drop-path is 0.1: timm/vgg11 has no such"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    config = EncoderConfig(**{"weights": "none", "image_size": 160, **changes})
    with pytest.raises(ValueError, match=message):
        build_encoder(config, None)
