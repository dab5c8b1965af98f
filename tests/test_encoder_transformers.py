"""Encoders of Hugging Face against transformers itself: hidden states, files, sizes, channels, what
preprocessor_config.json says; through the model: PEFT, a strict reload; and a run on videos."""

import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
import torch
from small_runs import EPOCH
from test_encoder_hub import CLIP_FILE
from torch import Tensor, nn
from torch.nn import functional as F
from video_files import write_frames

from glovita_lib.encoder import Encoder, build_encoder, file_facts, preprocess_of
from glovita_lib.encoder import with_facts as with_facts_of
from glovita_lib.encoder_aggregation import Layers, aggregate
from glovita_lib.encoder_torchvision import IMAGENET
from glovita_lib.encoder_transformers_config import CLIPS, IMAGES
from glovita_lib.encoder_video import fit_rgb
from glovita_lib.errors import UserError
from glovita_lib.model import build_model
from glovita_lib.network import layers
from glovita_lib.spec_encoders import TransformerEncoder
from glovita_lib.spec_lift import Slices
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import (
    Convpass,
    FullFinetuning,
    Lora,
    Peft,
    VisualPromptTuning,
)

transformers = pytest.importorskip("transformers")

VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
    "image_size": 32,
}
SWIN = {
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 4,
    "image_size": 32,
}
CONVNEXT = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "image_size": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
CLIP = {**VIT, "num_frames": 4, "tubelet_size": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(IMAGES, VIT),
    "dinov2_with_registers": {**VIT, "num_register_tokens": 3},
    "dinov3_vit": {**VIT, "num_register_tokens": 3},
    **dict.fromkeys(["swin", "swinv2"], SWIN),
    **dict.fromkeys(["convnext", "convnextv2", "dinov3_convnext"], CONVNEXT),
    "resnet": {**RESNET, "layer_type": "basic"},
    "regnet": {**RESNET, "groups_width": 4},
    "videomae": CLIP,
    "timesformer": {**VIT, "num_frames": 4},
    "vivit": {**VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]},
    "vjepa2": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "crop_size": 32,
        "patch_size": 8,
        "frames_per_clip": 4,
        "tubelet_size": 2,
        "pred_hidden_size": 12,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    },
}
for name in ("vivit",):
    CONFIGS[name] = {key: value for key, value in CONFIGS[name].items() if key != "patch_size"}
for name in ("dinov2", "dinov2_with_registers"):
    kept = {key: value for key, value in CONFIGS[name].items() if key != "intermediate_size"}
    CONFIGS[name] = {**kept, "mlp_ratio": 2}
GRIDS = {
    "swin": (8, 8), "swinv2": (8, 8), "convnext": (1, 1), "convnextv2": (1, 1),
    "dinov3_convnext": (1, 1), "videomae": (2, 4, 4), "timesformer": (4, 4, 4), "vivit": (2, 4, 4),
    "vjepa2": (2, 4, 4),
}  # fmt: skip
PREFIXES = {
    "deit": ("cls", "distillation"), "ijepa": (), "siglip_vision_model": (), "swin": (),
    "swinv2": (), "convnext": (), "convnextv2": (), "resnet": (), "regnet": (), "videomae": (),
    "vjepa2": (), "dinov2_with_registers": ("cls", *["register"] * 3),
    "dinov3_vit": ("cls", *["register"] * 3),
}  # fmt: skip


def size_of(kind: str, side: int = 32, frames: int = 4) -> tuple[int, ...]:
    return (frames, side, side) if kind in CLIPS else (side, side)


def inputs(size: tuple[int, ...], channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def saved(kind: str, folder: Path, model: Any = None, **changes: Any) -> Any:
    """A model of transformers, its positions and tokens drawn wide, saved in a folder."""
    config = transformers.CONFIG_MAPPING[kind](**{**CONFIGS[kind], **changes})
    torch.manual_seed(0)
    net = (model or transformers.MODEL_MAPPING[type(config)])(config).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "pos" in name or "token" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    net.save_pretrained(folder)
    return net


def section(kind: str, **fields: Any) -> TransformerEncoder:
    """A kind of model, small, from its configuration."""
    given = {k: v for k, v in CONFIGS[kind].items() if k not in TransformerEncoder.set_elsewhere}
    kwargs = {**given, **fields.pop("model_kwargs", {})}
    return TransformerEncoder(
        **{"type": kind, "pretrained": False, "model_kwargs": kwargs} | fields
    )


def make(spec: TransformerEncoder, size: tuple[int, ...], channels: int = 3) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(spec, channels=channels, size=size, load_weights=True).eval()


def hidden_states(net: Any, kind: str, x: Tensor, **options: Any) -> Any:
    """transformers' own forward pass; of ViTMAE over all patches in order."""
    if kind == "vit_mae":
        net.config.mask_ratio = 0.0
        options["noise"] = torch.arange(16).expand(len(x), -1)
    if kind == "vjepa2":
        options["skip_predictor"] = True
    with torch.no_grad():
        return net(x.transpose(1, 2) if kind in CLIPS else x, **options)


# ------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("kind", [*IMAGES, *CLIPS])
def test_outputs_are_the_librarys(kind: str, tmp_path: Path) -> None:
    """A folder gives its hidden states to the bit, and its own pooled vector where it has one that
    is no untrained layer; the grid, the tokens before it, blocks and depths are read off it."""
    net = saved(kind, tmp_path)
    size = size_of(kind)
    encoder, x = make(TransformerEncoder(type=str(tmp_path)), size), inputs(size)
    expected = hidden_states(net, kind, x)
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(x), expected.last_hidden_state)
        features = encoder(x)
    assert features.grid == GRIDS.get(kind, (4, 4))
    assert encoder.prefix == PREFIXES.get(kind, ("cls",))
    assert features.tokens.shape[1] == np.prod(features.grid) + len(encoder.prefix)
    own = getattr(expected, "pooler_output", None)
    if own is not None and kind not in ("vit", "deit", "vivit", "vit_msn"):
        assert torch.equal(features.pooled, own.flatten(1))
    elif features.has_cls and encoder.end_norm is None:
        assert torch.equal(features.pooled, expected.last_hidden_state[:, 0])
    depths = encoder.depths().of
    first = next(name for name, _ in encoder.named_parameters())
    assert depths[first] == 0 and len(encoder.blocks()) == encoder.depths().layers >= 2
    layer = Layers(encoder, (0,), norm=False)(x)[0]
    assert layer.tokens.isfinite().all()


def test_tokens_of_timesformer_are_in_the_order_of_time(tmp_path: Path) -> None:
    """It has all frames of a place behind one another."""
    net = saved("timesformer", tmp_path)
    encoder, x = make(TransformerEncoder(type=str(tmp_path)), (4, 32, 32)), inputs((4, 32, 32))
    states = hidden_states(net, "timesformer", x).last_hidden_state
    with torch.no_grad():
        tokens = encoder(x).patches.unflatten(1, (4, 4, 4))
    for t, row, column in [(0, 0, 0), (3, 0, 1), (1, 2, 3)]:
        assert torch.equal(tokens[:, t, row, column], states[:, 1 + (4 * row + column) * 4 + t])
    # a change of the last frame changes its own tokens most
    changed = x.clone()
    changed[:, :, 3] += 3
    with torch.no_grad():
        moved = (encoder(changed).patches.unflatten(1, (4, 16)) - tokens.flatten(2, 3)).abs()
    assert moved.mean((0, 2, 3)).argmax() == 3


def read(kind: str, encoder: Encoder, net: Any, x: Tensor, vector: str) -> Tensor:
    """What docs/images.md says that the classifier of transformers reads."""
    features = encoder(x)
    if vector == "token 0":
        return features.tokens[:, 0]
    if vector == "pooler of its own":
        return net.pooler(features.tokens)
    if vector == "unnormed mean":
        return encoder.forward_features(x)[:, 1:].mean(1)
    return aggregate(features, vector)


READ = [
    ("vit", "ViTForImageClassification", {}, "pooled"),
    ("deit", "DeiTForImageClassification", {}, "pooled"),
    ("vit_msn", "ViTMSNForImageClassification", {}, "pooled"),
    ("ijepa", "IJepaForImageClassification", {}, "pooled"),
    ("beit", "BeitForImageClassification", {}, "pooled"),
    ("beit", "BeitForImageClassification", {"use_mean_pooling": False}, "pooled"),
    ("data2vec-vision", "Data2VecVisionForImageClassification", {}, "pooled"),
    ("dinov2", "Dinov2ForImageClassification", {}, "joint"),
    ("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", {}, "joint"),
    ("clip_vision_model", "CLIPForImageClassification", {}, "unnormed mean"),
    ("siglip_vision_model", "SiglipForImageClassification", {}, "avg"),
    ("swin", "SwinForImageClassification", {}, "pooled"),
    ("swinv2", "Swinv2ForImageClassification", {}, "pooled"),
    ("convnext", "ConvNextForImageClassification", {}, "pooled"),
    ("convnextv2", "ConvNextV2ForImageClassification", {}, "pooled"),
    ("resnet", "ResNetForImageClassification", {}, "pooled"),
    ("regnet", "RegNetForImageClassification", {}, "pooled"),
    ("videomae", "VideoMAEForVideoClassification", {}, "pooled"),
    ("videomae", "VideoMAEForVideoClassification", {"use_mean_pooling": False}, "token 0"),
    ("timesformer", "TimesformerForVideoClassification", {}, "pooled"),
    ("vivit", "VivitForVideoClassification", {}, "pooled"),
    ("vjepa2", "VJEPA2ForVideoClassification", {}, "pooler of its own"),
]
WITHOUT_CLASSIFIER = {"vit_mae", "dinov3_vit", "dinov3_convnext"}


def test_every_kind_is_compared_with_its_classifier() -> None:
    """Those without one have none in transformers."""
    assert {kind for kind, *_ in READ} | WITHOUT_CLASSIFIER == {*IMAGES, *CLIPS}
    known = {config.model_type for config in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING}
    assert not WITHOUT_CLASSIFIER & known


@pytest.mark.parametrize(("kind", "model", "changes", "vector"), READ)
@pytest.mark.parametrize("file", [False, True])
def test_classifiers_read_what_is_told(
    kind: str, model: str, changes: dict[str, Any], vector: str, file: bool, tmp_path: Path
) -> None:
    """The logits of a whole model follow from `pooled`, or from what docs/images.md names: of its
    folder, whose tensors have the names of older versions, and of a state dict of its own under a
    prefix."""
    name = kind.removesuffix("_vision_model")
    if name != kind:
        net = of_texts(name, getattr(transformers, model), tmp_path)
    else:
        net = saved(kind, tmp_path, getattr(transformers, model), num_labels=5, **changes)
    fields = {}
    if file:
        wrapped = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "k.pth")
        fields["weights"] = str(tmp_path / "k.pth")
    encoder = make(TransformerEncoder(type=str(tmp_path), **fields), size_of(kind))
    x = inputs(size_of(kind))
    head = (
        net.cls_classifier if hasattr(net, "cls_classifier") else getattr(net, "classifier", None)
    )
    head = net.head if head is None else head
    logits = hidden_states(net, "" if kind == "vjepa2" else kind, videos(kind, x)).logits
    with torch.no_grad():
        assert torch.equal(head(read(kind, encoder, net, x, vector)), logits)
        if vector != "pooled":
            other = encoder(x).pooled
            assert other.shape[1] != head.in_features or not torch.equal(head(other), logits)


def videos(kind: str, x: Tensor) -> Tensor:
    """Clips as V-JEPA 2's classifier takes them, whose pass has no predictor to skip."""
    return x.transpose(1, 2) if kind == "vjepa2" else x


def of_texts(name: str, model: Any, folder: Path) -> Any:
    """A model of text and images, saved in a folder."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    kind = transformers.CONFIG_MAPPING[name]
    config = kind(vision_config=VIT, text_config={**text, **ends}, num_labels=5)
    torch.manual_seed(0)
    net = model(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_images_half_of_a_model_of_texts(name: str, tmp_path: Path) -> None:
    net = of_texts(name.lower(), getattr(transformers, f"{name}Model"), tmp_path)
    encoder, x = make(TransformerEncoder(type=str(tmp_path)), (32, 32)), inputs((32, 32))
    with torch.no_grad():
        expected = net.vision_model(x)
        assert torch.equal(encoder.forward_features(x), expected.last_hidden_state)
        assert torch.equal(encoder(x).pooled, expected.pooler_output)
    torch.save(net.state_dict(), tmp_path / "k.pth")  # positions of texts tell no size of images
    whole = section(f"{name.lower()}_vision_model", weights=str(tmp_path / "k.pth"))
    with torch.no_grad():
        assert torch.equal(make(whole, (32, 32))(x).pooled, expected.pooler_output)


def test_a_file_of_torch_and_a_kept_configuration(tmp_path: Path) -> None:
    """pytorch_model.bin is read; what a run keeps builds the network without the folder."""
    net = saved("vit", tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    os.remove(tmp_path / "model.safetensors")
    spec = TransformerEncoder(type=str(tmp_path))
    encoder = make(spec, (32, 32))
    facts = json.loads(json.dumps(file_facts(spec)))
    os.remove(tmp_path / "config.json")
    kept = with_facts_of(spec, facts)
    again = build_encoder(kept, channels=3, size=(32, 32), load_weights=False).eval()
    again.load_state_dict(encoder.state_dict(), strict=True)
    x = inputs((32, 32))
    with torch.no_grad():
        assert torch.equal(again(x).tokens, encoder(x).tokens)
        assert torch.equal(encoder(x).tokens, net(x).last_hidden_state)


# ------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("kind", [*IMAGES, *CLIPS])
def test_networks_without_weights_take_any_size(kind: str) -> None:
    """Of whole patches, of other channels; tokens stand over the grid."""
    size = (6, 48, 48) if kind in CLIPS else (48, 64)
    encoder = make(section(kind), size, channels=2)
    features = encoder(inputs(size, 2))
    assert features.tokens.shape[1] == np.prod(features.grid) + features.n_prefix
    assert features.tokens.isfinite().all() and features.pooled.isfinite().all()
    rows, columns = features.grid[-2:]
    assert kind in CLIPS or rows * 64 == columns * 48 or rows == 1
    features.tokens.sum().backward()
    read = [n for n, p in encoder.net.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name in encoder.pooling_parameters for name in read)


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model", "siglip_vision_model", "swin"])
def test_weights_of_another_size_are_interpolated_by_the_library(kind: str, tmp_path: Path) -> None:
    net = saved(kind, tmp_path)
    encoder, x = make(TransformerEncoder(type=str(tmp_path)), (48, 64)), inputs((48, 64))
    expected = hidden_states(net, kind, x, interpolate_pos_encoding=True).last_hidden_state
    with torch.no_grad():
        assert torch.equal(encoder.forward_features(x), expected)


@pytest.mark.parametrize("kind", ["timesformer", "vjepa2"])
def test_weights_of_clips_of_another_size(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    net = transformers.AutoModel.from_pretrained(tmp_path).eval()
    sizes = {"num_frames": 6, "image_size": 48, "frames_per_clip": 6, "crop_size": 48}
    net.config.update({key: value for key, value in sizes.items() if hasattr(config, key)})
    if kind == "vjepa2":  # which reads them when it is built
        state = net.state_dict()
        net = type(net)(net.config).eval()
        net.load_state_dict(state)
    encoder, x = make(TransformerEncoder(type=str(tmp_path)), (6, 48, 48)), inputs((6, 48, 48))
    with torch.no_grad():
        assert torch.equal(
            encoder.forward_features(x), hidden_states(net, kind, x).last_hidden_state
        )


@pytest.mark.parametrize("kind", ["vit", "resnet", "dinov3_vit", "videomae", "timesformer"])
def test_kernels_of_colours_are_fitted_to_one_channel(kind: str, tmp_path: Path) -> None:
    net, size = saved(kind, tmp_path), size_of(kind)
    x = inputs(size, 1)
    encoder = make(TransformerEncoder(type=str(tmp_path)), size, channels=1)
    expected = hidden_states(net, kind, x.expand(-1, 3, *size)).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(x), expected, rtol=1e-4, atol=1e-4)
    five = make(TransformerEncoder(type=str(tmp_path)), size, channels=5)
    kernel = next(p for n, p in five.net.named_parameters() if p.ndim > 3)
    own = next(p for n, p in net.named_parameters() if p.ndim > 3)
    assert torch.equal(kernel, fit_rgb(own, 5))


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"type": "vit"}, (32, 32), "is a kind of model without published weights"),
        ({"type": "vitt"}, (32, 32), 'no such folder, and no repository .*; did you mean "vit"'),
        ({"type": "bert"}, (32, 32), "no such folder, and no repository of the hub"),
        ({"type": "EMPTY"}, (32, 32), "holds no config.json"),
        ({"type": "FOLDER", "pretrained": True}, (32, 32), "weights of .* cannot be read"),
        ({"model_kwargs": {"hiden_size": 3}}, (32, 32), 'such value; did you mean "hidden_size"'),
        ({"model_kwargs": {"hidden_size": "a"}}, (32, 32), "cannot configure vit: .*hidden_size"),
        (
            {"model_kwargs": {"hidden_act": "gelo"}},
            (32, 32),
            'vit has hidden_act = "gelo", which transformers lacks; did you mean "gelu".; valid:',
        ),
        ({"model_kwargs": {"num_attention_heads": 0}}, (32, 32), "cannot build vit"),
        ({"model_kwargs": {"image_size": 3}}, (32, 32), "comes from data.augmentation.image_size"),
        ({}, (4, 32, 32), 'vit takes images, and the samples are clips: set .*lift = "slices"'),
        ({"type": "videomae"}, (32, 32), "videomae takes clips, and the samples are images"),
        ({}, (36, 36), "no whole number of its tokens of 8 x 8 pixels; set .*image_size = 32"),
        ({"type": "videomae"}, (5, 32, 32), "tokens of 2 x 16 x 16 frames.*frames = 4 and"),
        ({"type": "vjepa2"}, (4, 32, 48), "takes square frames, not 4 x 32 x 48"),
        (
            {"type": "timesformer", "model_kwargs": {"attention_type": "space_only"}},
            (4, 32, 32),
            '"space_only" reads every frame by itself',
        ),
        ({"input_channels": 1}, (32, 32), "input_channels: 1, but the samples have 3"),
    ],
)
def test_what_does_not_fit_is_one_line(
    fields: dict[str, Any], size: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    config = json.dumps({"model_type": "vit", **VIT})
    (tmp_path / "model" / "config.json").write_text(config)
    places = {"FOLDER": str(tmp_path / "model"), "EMPTY": str(tmp_path / "empty")}
    fields = {"type": "FOLDER", "pretrained": fields.get("type") in ("vit", "vitt"), **fields}
    fields["type"] = places.get(fields["type"], fields["type"])
    with pytest.raises(UserError, match=message) as caught:
        make(TransformerEncoder(**fields), size)
    assert "\n" not in str(caught.value)


def test_weights_that_lack_something_are_told(tmp_path: Path) -> None:
    saved("videomae", tmp_path)
    spec = TransformerEncoder(type=str(tmp_path))
    with pytest.raises(UserError, match="of clips of 4 x 32 x 32 .*set data.sampling.frames = 4"):
        make(spec, (6, 32, 32))
    deeper = TransformerEncoder(type=str(tmp_path), model_kwargs={"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"lack, or have in another shape, encoder.layer.2"):
        make(deeper, (4, 32, 32))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match='model_type = "bert"; valid: vit, deit'):
        make(spec, (4, 32, 32))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="its config.json is no JSON"):
        make(spec, (4, 32, 32))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", None),
        ("pytorch_model.bin", b"abcdef"),
        ("pytorch_model.bin", b"\x80\x02"),
        ("model.safetensors.index.json", b"{"),
    ],
)
def test_broken_weights_of_a_folder_are_one_line(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    """Cut off (none), empty, or of another kind."""
    saved("vit", tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="the weights of .* cannot be read") as caught:
        make(TransformerEncoder(type=str(tmp_path)), (32, 32))
    assert "\n" not in str(caught.value)
    if name == "pytorch_model.bin":
        file = TransformerEncoder(type=str(tmp_path), weights=str(tmp_path / name))
        with pytest.raises(UserError, match="not a .*torch file"):
            make(file, (32, 32))


@pytest.mark.parametrize("kind", ["vit", "timesformer", "deit", "swin"])
def test_more_layers_than_the_network_has_are_told(kind: str, tmp_path: Path) -> None:
    """Of a folder whose configuration has fewer, and of a file; not what stands beside it."""
    key = {"swin": "depths"}.get(kind, "num_hidden_layers")
    deeper = [2, 3] if key == "depths" else 3
    net = saved(kind, tmp_path, **{key: deeper})
    torch.save(net.state_dict(), tmp_path / "k.pth")
    fewer = {key: CONFIGS[kind][key]}
    folder = TransformerEncoder(type=str(tmp_path), model_kwargs=fewer)
    with pytest.raises(
        UserError, match=r"hold more than the network, .*layers?\.[12].*change"
    ) as e:
        make(folder, size_of(kind))
    assert "\n" not in str(e.value)
    file = section(kind, weights=str(tmp_path / "k.pth"))
    with pytest.raises(UserError, match=r"not in the network +.*layers?\.[12]\."):
        make(file, size_of(kind))
    make(section(kind, weights=str(tmp_path / "k.pth"), model_kwargs={key: deeper}), size_of(kind))


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("beit", "BeitForMaskedImageModeling"),
        ("swin", "SwinForMaskedImageModeling"),
        ("vit_mae", "ViTMAEForPreTraining"),
        ("videomae", "VideoMAEForPreTraining"),
        ("vjepa2", "VJEPA2ForVideoClassification"),
        ("deit", "DeiTForImageClassificationWithTeacher"),
    ],
)
def test_what_stands_beside_the_network_is_left_out(kind: str, model: str, tmp_path: Path) -> None:
    """Decoders, classifiers and norms in front of them, in the model's own file."""
    net = saved(kind, tmp_path, getattr(transformers, model))
    encoder, x = make(TransformerEncoder(type=str(tmp_path)), size_of(kind)), inputs(size_of(kind))
    inner = getattr(net, net.base_model_prefix)
    with torch.no_grad():
        expected = hidden_states(inner, kind, x).last_hidden_state
        assert torch.equal(encoder.forward_features(x), expected)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in ("vit", "deit", "ijepa", "dinov2_with_registers")),
        *((kind, {}) for kind in ("clip_vision_model", "siglip_vision_model")),
        ("beit", {"use_relative_position_bias": True}),
        ("beit", {"use_absolute_position_embeddings": True}),
        *((kind, {}) for kind in ("swin", "resnet", *CLIPS)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [3, 1])
def test_files_of_a_network_without_published_weights(
    kind: str, changes: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    """The same section loads them at the same size and channels: of the size of their positions,
    not of the defaults of the kind; what a run keeps builds the network without the file."""
    size, x = size_of(kind), inputs(size_of(kind), channels)
    trained = make(section(kind, model_kwargs=changes), size, channels)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.save({"model": {f"context_encoder.{k}": v for k, v in trained.state_dict().items()}},
               tmp_path / "best.pt")  # fmt: skip
    spec = section(kind, weights=str(tmp_path / "best.pt"), model_kwargs=changes)
    again = make(spec, size, channels)
    told = [note for note in again.notes if "does not say of clips of which size it is" in note]
    assert len(told) == (kind == "videomae")
    facts = json.loads(json.dumps(file_facts(spec)))
    os.remove(tmp_path / "best.pt")
    kept = build_encoder(with_facts_of(spec, facts), channels=channels, size=size,
                         load_weights=False).eval()  # fmt: skip
    kept.load_state_dict(trained.state_dict(), strict=True)
    with torch.no_grad():
        expected = trained(x)
        for each in (again, kept):
            assert torch.equal(each(x).tokens, expected.tokens)
            assert torch.equal(each(x).pooled, expected.pooled)


@pytest.mark.parametrize("kind", ["vit", "timesformer"])
def test_files_of_another_size_are_interpolated_by_the_library(kind: str, tmp_path: Path) -> None:
    """From the size that their positions have, also where config.json states another."""
    net = saved(kind, tmp_path / "a")
    torch.save(net.state_dict(), tmp_path / "k.pth")
    saved(kind, tmp_path / "b", image_size=64)
    size = (6, 48, 48) if kind in CLIPS else (48, 48)
    published, x = make(TransformerEncoder(type=str(tmp_path / "a")), size), inputs(size)
    with torch.no_grad():
        expected = published.forward_features(x)
        for spec in (
            section(kind, weights=str(tmp_path / "k.pth")),
            TransformerEncoder(type=str(tmp_path / "b"), weights=str(tmp_path / "k.pth")),
        ):
            assert torch.equal(make(spec, size).forward_features(x), expected)


def test_a_missing_package_and_a_missing_network_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec = TransformerEncoder(type="owner/no-such-model@main")
    for ask in (lambda: make(spec, (32, 32)), lambda: preprocess_of(spec, channels=3)):
        with pytest.raises(UserError, match="config.json cannot be fetched from the hub") as caught:
            ask()
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'package is missing .*pip install "glovita\[transf'):
        make(section("vit"), (32, 32))


def test_sections_know_their_samples() -> None:
    spec = TransformerEncoder()
    assert spec.reads("images") and spec.reads("videos")
    assert not spec.reads("volumes") and not spec.reads("features") and not spec.reads("series")
    slices = TransformerEncoder(lift="slices")
    assert slices.reads("volumes") and slices.reads("videos") and not slices.reads("images")
    (problem,) = TransformerEncoder(lift="inflate").problems()
    assert problem[0] == "lift"
    assert [key for key, _ in spec.patch_problems(16, 32)] == ["patch_size"]
    scratch = section("vit")
    assert not list(scratch.patch_problems(4, 32)) and list(scratch.patch_problems(5, 32))
    encoder = make(scratch.with_patch_size(4), (32, 32))
    assert encoder.patch == (4.0, 4.0) and encoder(inputs((32, 32))).grid == (8, 8)


# ------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit", "beit"])
def test_fewer_layers_of_a_configuration_that_names_its_stages(kind: str, tmp_path: Path) -> None:
    """As save_pretrained writes it."""
    saved(kind, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"out_features": ["stage2"], "out_indices": [2], "stage_names": ["stem", "stage1"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    fewer = {"num_hidden_layers": 1}
    spec = TransformerEncoder(type=str(tmp_path), pretrained=False, model_kwargs=fewer)
    assert make(spec, (32, 32)).net.config.num_hidden_layers == 1


def test_the_input_is_that_of_the_files(tmp_path: Path) -> None:
    saved("videomae", tmp_path)
    spec = TransformerEncoder(type=str(tmp_path))
    bare = preprocess_of(spec, channels=3)
    assert bare.image_size == 32 and bare.fixed_size and bare.mean == IMAGENET[0]
    norm, none = make(spec, (4, 32, 32)).notes
    assert "lack the norm behind the pooling" in norm and "no preprocessor_config.json" in none
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_FILE))
    found = preprocess_of(spec, channels=1)
    assert (found.image_size, found.interpolation, found.crop_mode) == (32, "bicubic", "center")
    assert found.mean == pytest.approx((0.5,)) and len(make(spec, (4, 32, 32)).notes) == 1
    scratch = preprocess_of(TransformerEncoder(type=str(tmp_path), pretrained=False), channels=3)
    assert scratch.image_size is None


# --------------------------------------------------------------------------- through the model

METHODS = [each for each in get_args(Peft) if each.__struct_config__.tag != "custom"]
ADAPTED = ("vit", "videomae", "timesformer", "vjepa2")
QUICK = {"lora", "bitfit", "visual_prompt_tuning", "adapt_former", "partial_finetuning"}
REFUSED = {
    "videomae": {"adapt_former", "convpass"},
    "timesformer": {"adapt_former", "convpass", "visual_prompt_tuning"},
    "vjepa2": {"visual_prompt_tuning"},
}
PAIRS = [
    pytest.param(
        kind,
        method,
        marks=() if method.__struct_config__.tag in QUICK else pytest.mark.slow,
        id=f"{kind}-{method.__struct_config__.tag}",
    )
    for kind in ADAPTED
    for method in METHODS
]


PAIRS += [
    pytest.param(kind, method, id=f"{kind}-{method.__struct_config__.tag}")
    for kind, method in (
        ("swinv2", Lora),  # an activation in place behind an adapted layer
        ("data2vec-vision", VisualPromptTuning),  # whose blocks give tuples
        ("clip_vision_model", Convpass),  # whose attention gets its input by name
    )
]


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_methods_adapt_models_by_their_structure(kind: str, method: type, tmp_path: Path) -> None:
    """A step changes what the method trains and nothing else, and the model reloads strictly; a
    method of other structures says what it misses."""
    tag = method.__struct_config__.tag
    settings: dict[str, Any] = {"num_frozen_layers": 1} if tag == "partial_finetuning" else {}
    if tag == "convpass" and kind == "clip_vision_model":
        settings["places"] = ("attn", "mlp")
    arguments = {"outputs": 3, "channels": 3, "size": size_of(kind), "load_weights": False}

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build_model(ModelSpec(encoder=section(kind)), method(**settings), **arguments)

    if tag in REFUSED.get(kind, ()):
        with pytest.raises(UserError, match="lora"):
            fresh()
        return
    model = fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = inputs(size_of(kind))
    F.cross_entropy(model.train()(x), torch.tensor([0, 2])).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved <= trained and any(key.startswith("head.") for key in moved)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = fresh()
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("key", ["", "_shared"])
def test_prompts_are_refused_where_pairs_of_places_have_biases(key: str) -> None:
    """Of each block's, or of those that all blocks share."""
    spec = section("beit", model_kwargs={f"use{key}_relative_position_bias": True})
    arguments = {"outputs": 3, "channels": 3, "size": (32, 32), "load_weights": False}
    with pytest.raises(UserError, match="needs blocks on one sequence of tokens"):
        build_model(ModelSpec(encoder=spec), VisualPromptTuning(), **arguments)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vit", "q k v proj fc1 fc2"),
        ("videomae", "q k v proj fc1 fc2"),
        ("timesformer", "qkv proj fc1 fc2 qkv proj linear"),
        ("vivit", "q k v proj fc1 fc2"),
        ("vjepa2", "q k v proj fc1 fc2"),
        ("dinov3_vit", "k v q proj fc1 fc2"),
        ("swin", "q k v proj fc1 fc2"),
        ("clip_vision_model", "k v q proj fc1 fc2"),
        ("beit", "q k v proj fc1 fc2"),
    ],
)
def test_projections_have_their_roles(kind: str, expected: str) -> None:
    """LoRA changes all of them, by default."""
    encoder = make(section(kind), size_of(kind))
    inside = set(encoder.blocks()[-1].modules())
    roles = [layer.role for layer in layers(encoder) if layer.module in inside]
    assert [role for role in roles if role != "norm"] == expected.split()
    arguments = {"outputs": 3, "channels": 3, "size": size_of(kind), "load_weights": False}
    model = build_model(ModelSpec(encoder=section(kind)), Lora(), **arguments)
    adapted = [n for n, m in model.named_modules() if n.endswith(".adapter")]
    blocks = len(encoder.blocks())
    assert len(adapted) >= blocks * len([r for r in expected.split() if r != "linear"])


@pytest.mark.parametrize(("kind", "method"), [("vit", "cls_token"), ("convnext", "pooled")])
def test_frames_pass_a_model_of_images_one_by_one(kind: str, method: str) -> None:
    spec = section(kind, lift="slices", slices=Slices(axis="t", aggregation=method))
    arguments = {"outputs": 3, "channels": 3, "size": (3, 32, 32), "load_weights": False}
    model = build_model(ModelSpec(encoder=spec), FullFinetuning(), **arguments).eval()
    x = inputs((3, 32, 32))
    with torch.no_grad():
        tokens = model.features(x).tokens
        frame = aggregate(model.encoder.of_parts(x[:, :, 1]), method)
    assert tokens.shape[:2] == (2, 3)
    torch.testing.assert_close(tokens[:, 1], frame)


# ------------------------------------------------------------------------------------ a run

SPEC = f"""
[data]
dataset = "generic_video_dataset"
data_root_dir = "ROOT"
label_source = "csv"
split_source = "csv"
[data.sampling]
frames = 4
[data.augmentation]
image_size = 32
[model.encoder]
encoder_type = "transformer"
type = "MODEL"
pretrained = false
{EPOCH}"""


def write_set(folder: Path) -> None:
    """Nine videos of two classes."""
    rows = ["path,label,split"]
    for i in range(9):
        rng = np.random.default_rng(i)
        frames = rng.integers(0, 120, (6, 40, 36, 3), np.uint8) + np.uint8(100 * (i % 2))
        write_frames(folder / "videos" / f"{i}", frames)
        rows.append(f"{i},{'dark' if i % 2 else 'light'},{('train', 'val', 'test')[i // 4]}")
    (folder / "labels.csv").write_text("\n".join(rows))


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["videomae", "timesformer"])
def test_a_run_on_videos(kind: str, command, tmp_path: Path) -> None:
    """Train, then without the folder of the model: infer gives the same metrics, with heat maps;
    extract a vector a video."""
    pytest.importorskip("decord")
    write_set(tmp_path / "set")
    model = tmp_path / "model"
    model.mkdir()
    config = json.dumps({"model_type": kind, **CONFIGS[kind]})
    (model / "config.json").write_text(config)
    spec = SPEC.replace("ROOT", str(tmp_path / "set")).replace("MODEL", str(model))
    command(spec=spec)
    os.rename(model, tmp_path / "elsewhere")
    command("mode=infer", "infer.heat_maps=1", spec=spec)
    assert [*tmp_path.glob("runs/**/*.gif")]
    asked = [f"extract.output_dir={tmp_path}", "extract.split=test", "extract.output_filename=f.h5"]
    command("mode=extract", *asked, spec=spec)
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features"].shape[1] == 24 and np.isfinite(file["features"][:]).all()


@pytest.mark.runs
def test_a_run_begins_with_the_network_of_another(command, tmp_path: Path) -> None:
    """Positions of VideoMAE stand in no file: its clips are of the size of those of the run that
    wrote the checkpoint, or the export."""
    pytest.importorskip("decord")
    write_set(tmp_path / "set")
    spec = SPEC.replace("ROOT", str(tmp_path / "set")).replace("MODEL", "videomae")
    kwargs = section("videomae").model_kwargs
    table = ", ".join(f"{key} = {value}" for key, value in kwargs.items())
    of = f"model.encoder.model_kwargs={{{table}}}"
    first = command(of, "name=first", spec=spec).path
    export = tmp_path / "k.safetensors"
    command(of, "name=first", "mode=infer", f"infer.export={export}", spec=spec)
    for number, file in enumerate([first / "checkpoints" / "best.pt", export]):
        begun = [of, f"model.encoder.weights={file}", f"name=second{number}"]
        assert "which size it is" not in command(*begun, spec=spec).out
        again = command(*begun, "data.sampling.frames=6", "name=third", spec=spec, code=2)
        assert "its weights are of clips of 4 x 32 x 32 frames, rows and columns" in again.err
