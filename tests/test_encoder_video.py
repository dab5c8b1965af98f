"""Encoders of clips against torchvision and pytorchvideo: outputs, files, other sizes and channels,
stages, blocks, volumes; and through the model: a step of training, a strict reload."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
import torchvision
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.encoder import Encoder, build_encoder, clip_size_of, preprocess_of
from glovita_lib.encoder_aggregation import Layers, aggregate
from glovita_lib.encoder_pytorchvideo import MEAN, hub_builder
from glovita_lib.encoder_video import STAGES, ClippedPool, fit_rgb, resampled
from glovita_lib.errors import UserError
from glovita_lib.model import build_model
from glovita_lib.spec_encoders import PytorchvideoEncoder, TimmEncoder, TorchvisionVideoEncoder
from glovita_lib.spec_lift import Slices
from glovita_lib.spec_model import FramewiseHead, ModelSpec
from glovita_lib.spec_peft import FullFinetuning, Peft

CLASSIFIERS = {"s3d": "classifier.1", "mvit_v1_b": "head.1", "mvit_v2_s": "head.1"}
TORCHVISION = {  # clips that are not those of the published weights
    "r3d_18": (5, 32, 48),
    "mc3_18": (4, 32, 32),
    "r2plus1d_18": (4, 32, 32),
    "s3d": (8, 32, 64),
    "mvit_v1_b": (6, 36, 64),
    "mvit_v2_s": (4, 32, 48),
    "swin3d_t": (3, 30, 48),
}
PYTORCHVIDEO = {
    "x3d_xs": (3, 32, 64),
    "slow_r50": (4, 32, 48),
    "i3d_r50": (4, 32, 32),
    "r2plus1d_r50": (8, 32, 32),
    "slowfast_r50": (8, 32, 48),
    "mvit_base_16x4": (4, 32, 48),
}
FAMILIES = {**TORCHVISION, **PYTORCHVIDEO}
ALIKE = {
    "mvit_v1_b",
    "slow_r50",
    "i3d_r50",
    "r2plus1d_r50",
}  # as others of their family and library
WALKED = [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE), id=n) for n in FAMILIES]


def section(name: str, **fields):
    tag = TorchvisionVideoEncoder if name in TORCHVISION else PytorchvideoEncoder
    if tag is PytorchvideoEncoder:
        pytest.importorskip("pytorchvideo")
    fields = {"type": name, "pretrained": False, "time_axis": "t", **fields}
    return msgspec.convert(fields, tag)


def make(spec, size, channels: int = 3, *, weights: bool = False) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(spec, channels=channels, size=size, load_weights=weights).eval()


def clips(size, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def library_network(name: str, **arguments) -> nn.Module:
    """A library's own network whose weights are drawn wide, so that positions matter."""
    if name in TORCHVISION:
        net = torchvision.models.get_model(name, weights=None, **arguments)
    else:
        net = hub_builder(PytorchvideoEncoder(type=name))(**arguments)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "pos" in key or "token" in key:
                parameter.normal_(std=0.5)
    return net.eval()


# -------------------------------------------------------------------- the libraries


def shrink(net: nn.Module, size) -> nn.Module:
    """A network of torchvision or pytorchvideo for clips smaller than its windows of the last
    pooling, and than those that its positions are of."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.AvgPool3d):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, nn.AdaptiveAvgPool3d(1))
    if hasattr(net, "pos_encoding"):
        own, (t, h, w) = net.pos_encoding, (size[0] // 2, size[1] // 4, size[2] // 4)
        own.temporal_size, own.spatial_size = t, (h, w)
        if own.spatial_pos is not None:
            own.temporal_pos = nn.Parameter(torch.randn(t, own.temporal_pos.shape[1]))
            own.spatial_pos = nn.Parameter(torch.randn(h * w, own.spatial_pos.shape[1]))
    return net


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("r3d_18", (4, 32, 48)),
        ("s3d", (8, 64, 32)),
        pytest.param("mvit_v1_b", (4, 64, 32), marks=pytest.mark.slow),
        ("mvit_v2_s", (4, 64, 64)),
        ("swin3d_t", (5, 36, 64)),
    ],
)
def test_torchvision_files_give_its_outputs(name: str, size, tmp_path: Path) -> None:
    """A file with 5 classes: all but the classifier is loaded, which gives torchvision's logits of
    the library's own vector."""
    net = shrink(library_network(name, num_classes=5), size)
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "k.pth")
    encoder = make(section(name, weights=str(tmp_path / "k.pth")), size, weights=True)
    last = net.get_submodule(CLASSIFIERS.get(name, "fc" if name == "r3d_18" else "head"))
    x = clips(size)[:1]
    with torch.no_grad():
        found = F.linear(encoder(x).pooled, last.weight.flatten(1), last.bias)
        torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [
        ("x3d_xs", (4, 160, 160), "blocks.5"),
        ("slow_r50", (4, 64, 32), "blocks.5"),
        ("slowfast_r50", (16, 64, 32), "blocks.6"),
        ("mvit_base_16x4", (4, 64, 96), "head"),
    ],
)
def test_pytorchvideo_files_give_its_outputs(name: str, size, last: str, tmp_path: Path) -> None:
    pytest.importorskip("pytorchvideo")
    arguments = {"head_num_classes" if name.startswith("mvit") else "model_num_class": 5}
    if name.startswith("mvit"):
        arguments |= {"temporal_size": size[0], "spatial_size": size[1:]}
    net = library_network(name, **arguments)
    torch.save({"model_state": net.state_dict(), "epoch": 3}, tmp_path / "k.pyth")
    encoder = make(section(name, weights=str(tmp_path / "k.pyth")), size, weights=True)
    head, x = net.get_submodule(last), clips(size)[:1]
    entering = x
    if name != "x3d_xs":
        shrink(net, size)
    if name.startswith("slowfast"):  # as its tutorials pack them
        slow = x.index_select(2, torch.linspace(0, size[0] - 1, size[0] // 4).long())
        entering = [slow, x.clone()]
    with torch.no_grad():
        expected, found = net(entering), head.proj(encoder(x).pooled)
        if head.activation is not None:
            found = found.softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(9, 8, 7), (8, 7, 7), (3, 8, 2)])
def test_windows_of_the_last_pooling_are_the_librarys_where_they_fit(size) -> None:
    x = torch.randn(1, 2, *size)
    found = ClippedPool((8, 7, 7), (1, 1, 1))(x)
    window = [min(pair) for pair in zip((8, 7, 7), size, strict=True)]
    torch.testing.assert_close(found, nn.AvgPool3d(window, 1)(x))


def test_the_published_names_are_all_there() -> None:
    """Every type of a Struct is a model of its library, with its weights' facts."""
    pytest.importorskip("pytorchvideo")
    for kind in (TorchvisionVideoEncoder, PytorchvideoEncoder):
        (hints,) = [f.type for f in msgspec.inspect.type_info(kind).fields if f.name == "type"]
        for name in hints.values:
            spec = kind(type=name)
            frames, height, width = clip_size_of(spec)
            assert height == width == preprocess_of(spec, channels=3).image_size
            from_scratch = msgspec.structs.replace(spec, pretrained=False)
            sized = preprocess_of(from_scratch, channels=3).image_size
            assert sized == (height if name.startswith("mvit") else None)
            if kind is TorchvisionVideoEncoder:
                weights = torchvision.models.get_model_weights(name).DEFAULT
                assert weights.meta.get("min_temporal_size", 1) <= frames
                preset = weights.transforms()
                assert list(preprocess_of(spec, channels=3).mean) == preset.mean
                assert preset.crop_size == [height, width]
            else:
                assert callable(hub_builder(spec))
                assert preprocess_of(spec, channels=1).mean == pytest.approx(MEAN[:1])


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorchvideo", "pytorchvideo.models"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UserError, match=r'the package is missing .*pip install "glovita\['):
        make(PytorchvideoEncoder(pretrained=False), (4, 32, 32))


# -------------------------------------------------------------------- sizes and channels


@pytest.mark.parametrize("name", WALKED)
def test_clips_of_other_sizes(name: str) -> None:
    """Tokens over the grid in the order of the axes, the library's vector, every stage's map."""
    size = FAMILIES[name]
    encoder = make(section(name, return_intermediates=True), size, channels=2)
    x = clips(size, channels=2)
    with torch.no_grad():
        features = encoder(x)
        raw = encoder.forward_features(x)
    assert features.tokens.shape == (2, math.prod(features.grid) + encoder.n_prefix, encoder.width)
    assert features.tokens.isfinite().all() and features.pooled.isfinite().all()
    torch.testing.assert_close(features.pooled, encoder.pool(raw))
    if encoder.pooling == "avg":
        torch.testing.assert_close(features.patches.mean(1), features.pooled)
    assert tuple(features.intermediates) == encoder.stage_names == STAGES
    shapes = {stage: tuple(value.shape[1:]) for stage, value in features.intermediates.items()}
    assert shapes == encoder.stage_shapes()
    areas = [shape[2] * shape[3] for shape in shapes.values()]
    assert areas == sorted(areas, reverse=True) and shapes["layer4"][1:] == tuple(
        features.grid if not name.startswith("slowfast") else (size[0], *features.grid[1:])
    )


@pytest.mark.parametrize("name", ["r3d_18", "swin3d_t", "x3d_xs", "slowfast_r50"])
def test_the_last_stage_is_the_map(name: str) -> None:
    encoder = make(section(name, return_intermediates=True), FAMILIES[name])
    features = encoder(clips(FAMILIES[name]))
    last = features.intermediates["layer4"]
    if name.startswith("slowfast"):  # the pathways at the frames of the fast one
        last = last.unflatten(2, (-1, 4)).mean(3)
    if name == "swin3d_t":
        last = encoder.net.norm(last.movedim(1, 4)).movedim(4, 1)
    torch.testing.assert_close(last.flatten(2).mT, features.patches)


def test_stages_of_a_transformer_are_its_tokens() -> None:
    size = FAMILIES["mvit_v2_s"]
    encoder = make(section("mvit_v2_s", return_intermediates=True), size)
    features = encoder(clips(size))
    last = encoder.net.norm(features.intermediates["layer4"].movedim(1, 4))
    torch.testing.assert_close(last.flatten(1, 3), features.patches)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("layer5",), "no stage or module 'layer5'; stages: stem, layer1"),
        (("layer2", "layer1.0.conv1"), None),
        (("avgpool",), "no stage or module 'avgpool'"),
    ],
)
def test_stages_are_named(names, message: str | None) -> None:
    spec = section("r3d_18", return_intermediates=True, intermediate_names=names)
    if message is None:
        features = make(spec, FAMILIES["r3d_18"])(clips(FAMILIES["r3d_18"]))
        assert [value.shape[1] for value in features.intermediates.values()] == [128, 64]
    else:
        with pytest.raises(UserError, match=message):
            make(spec, FAMILIES["r3d_18"])


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("mvit_v2_s", "blocks.0.mlp", "'blocks.0.mlp' of mvit_v2_s gives no map"),
        ("mvit_v2_s", "blocks", "'blocks' of mvit_v2_s gives nothing by itself"),
    ],
)
def test_modules_without_a_map_are_told(name: str, module: str, message: str) -> None:
    spec = section(name, return_intermediates=True, intermediate_names=(module,))
    with pytest.raises(UserError, match=message):
        make(spec, FAMILIES[name])


def test_positions_are_resampled(tmp_path: Path) -> None:
    """A file of the published size into another one and back; a ramp stays a ramp."""
    grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij"), -1)
    found = resampled(grid.reshape(24, 2), (4, 6), (8, 12)).unflatten(0, (8, 12))
    inner = torch.linspace(0.25, 2.75, 6)
    torch.testing.assert_close(found[1:7, 0, 0], inner)
    net = library_network("mvit_v1_b")
    torch.save(net.state_dict(), tmp_path / "k.pth")
    size = FAMILIES["mvit_v1_b"]
    encoder = make(section("mvit_v1_b", weights=str(tmp_path / "k.pth")), size, weights=True)
    own = encoder.net.pos_encoding
    assert own.temporal_pos.shape == (3, 96) and own.spatial_pos.shape == (9 * 16, 96)
    expected = F.interpolate(net.pos_encoding.temporal_pos.T[None], 3, mode="linear")[0].T
    torch.testing.assert_close(own.temporal_pos, expected)
    torch.save(encoder.net.state_dict(), tmp_path / "own.pth")  # of another shape than 224 x 224
    again = make(section("mvit_v1_b", weights=str(tmp_path / "own.pth")), size, weights=True)
    assert torch.equal(again(clips(size)).tokens, encoder(clips(size)).tokens)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_rgb_kernels_are_fitted_as_timm_does(channels: int) -> None:
    kernel = torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(fit_rgb(kernel, channels), adapt_input_conv(channels, kernel))


@pytest.mark.parametrize("name", ["r3d_18", "swin3d_t", "x3d_xs", "slowfast_r50"])
def test_weights_of_rgb_load_into_a_network_of_one_channel(name: str, tmp_path: Path) -> None:
    size = FAMILIES[name]
    colour = make(section(name), size)
    torch.save(colour.net.state_dict(), tmp_path / "k.pt")
    grey = make(section(name, weights=str(tmp_path / "k.pt")), size, channels=1, weights=True)
    x = clips(size, channels=1)
    with torch.no_grad():
        torch.testing.assert_close(
            grey(x).pooled, colour(x.expand(-1, 3, -1, -1, -1)).pooled, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "fields", "size", "message"),
    [
        ("r3d_18", {"model_kwargs": {"zap": 1}}, (4, 32, 32), "model_kwargs.zap: r3d_18 does not"),
        ("x3d_xs", {"model_kwargs": {"zap": 1}}, (4, 32, 32), "model_kwargs.zap: x3d_xs does not"),
        ("slowfast_r50", {}, (9, 32, 32), "slowfast_alpha = 4 frames, not 9; nearest 8 or 12"),
        ("slowfast_r50", {"slowfast_alpha": 3}, (8, 32, 32), "= 3 frames, not 8; nearest 6 or 9"),
        ("r3d_18", {"input_channels": 1}, (4, 32, 32), "input_channels: 1, but the samples have 3"),
    ],
)
def test_what_does_not_fit_is_told(name: str, fields, size, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(section(name, **fields), size)


def test_another_alpha_fuses_at_its_own_step() -> None:
    encoder = make(section("slowfast_r50", slowfast_alpha=2), (6, 32, 32))
    assert encoder(clips((6, 32, 32))).grid == (3, 1, 1)


# -------------------------------------------------------------------- volumes


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "s3d", "swin3d_t", "x3d_xs"])
def test_volumes_have_another_axis_for_time(name: str) -> None:
    """A volume whose slices are the frames of a clip gives the same map, its axes in place."""
    time, *sides = FAMILIES[name]
    encoder = make(section(name, return_intermediates=True), (time, *sides))
    of_volumes = section(name, time_axis="z", return_intermediates=True)
    of_volumes = make(of_volumes, (*sides, time))
    of_volumes.net.load_state_dict(encoder.net.state_dict())
    x = clips((time, *sides))
    with torch.no_grad():
        one, other = encoder(x), of_volumes(x.movedim(2, 4))
    assert other.grid == (*one.grid[1:], one.grid[0])
    torch.testing.assert_close(other.pooled, one.pooled)
    as_clip = other.tokens.unflatten(1, other.grid).movedim(3, 1).flatten(1, 3)
    torch.testing.assert_close(as_clip, one.tokens)
    for stage, value in one.intermediates.items():
        torch.testing.assert_close(other.intermediates[stage].movedim(4, 2), value)
    layers = Layers(of_volumes, (0,), norm=False)(x.movedim(2, 4))[0]
    assert math.prod(layers.grid) == layers.tokens.shape[1]


def test_sections_know_their_samples() -> None:
    """The axis of time follows from the samples; what cannot be is told."""
    video = TorchvisionVideoEncoder()
    assert video.reads("videos") and video.reads("volumes") and not video.reads("images")
    assert video.of_samples("videos").time_axis == "t"
    assert video.of_samples("volumes").time_axis == "z"
    assert not list(video.sample_problems("volumes"))
    mvit = TorchvisionVideoEncoder(type="mvit_v2_s")
    assert mvit.reads("videos") and not mvit.reads("volumes")
    problems = list(TorchvisionVideoEncoder(time_axis="x").sample_problems("videos"))
    assert problems == [
        ("time_axis", '"x" is no axis of videos, which have "t": leave it out'),
    ]
    slices = TimmEncoder(lift="slices")
    assert slices.reads("videos") and slices.reads("volumes")
    assert slices.of_samples("videos").slices.axis == "t"
    assert TimmEncoder(lift="inflate").of_samples("volumes").inflation.axis == "z"
    wrong = TimmEncoder(lift="slices", slices=Slices(axis="t"))
    assert [key for key, _ in wrong.sample_problems("volumes")] == ["slices.axis"]
    single = PytorchvideoEncoder(type="slowfast_r50", pathway_mode="single")
    assert [key for key, _ in single.problems()] == ["pathway_mode"]
    assert not list(PytorchvideoEncoder(type="slowfast_r50", pathway_mode="slowfast").problems())


# -------------------------------------------------------------------- through the model

BLOCKS = {
    "r3d_18": 8, "mc3_18": 8, "r2plus1d_18": 8, "s3d": 9, "mvit_v1_b": 16, "mvit_v2_s": 16,
    "swin3d_t": 12, "x3d_xs": 27, "slow_r50": 16, "i3d_r50": 16,
    "r2plus1d_r50": 16, "slowfast_r50": 5, "mvit_base_16x4": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", WALKED)
def test_trains_a_step_saves_and_reloads_strictly(name: str, tmp_path: Path) -> None:
    spec, size = ModelSpec(encoder=section(name)), FAMILIES[name]

    def fresh():
        torch.manual_seed(0)
        arguments = {"outputs": 3, "channels": 2, "size": size, "load_weights": False}
        return build_model(spec, FullFinetuning(), **arguments)

    model = fresh()
    assert len(model.encoder.blocks()) == BLOCKS[name]  # for learning rates by depth and for PEFT
    depths = list(model.encoder.depths().of.values())
    assert depths[0] <= 1 and {*range(1, BLOCKS[name] + 1)} <= {*depths}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = clips(size, channels=2), torch.tensor([0, 2])
    F.cross_entropy(model.train()(x), y).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = fresh()
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
        features = model.features(x)
        vector = aggregate(features, model.aggregation)
        layers = Layers(model.encoder, (0, -1 % BLOCKS[name]), norm=True)(x)
    assert vector.shape[0] == 2 and vector.isfinite().all()
    assert all(layer.tokens.isfinite().all() and layer.grid for layer in layers)


ADAPTED = ("x3d_xs", "mvit_v2_s", "swin3d_t", "slowfast_r50")
METHODS = [each for each in get_args(Peft) if each.__struct_config__.tag != "custom"]
QUICK = {("swin3d_t", "convpass"), *(("x3d_xs", tag) for tag in ("lora", "ssf", "gps", "bitfit"))}
REFUSED = {  # by encoders without Linear layers, and where layers have odd numbers of inputs
    "slowfast_r50": {"adapt_former", "convpass", "fact", "oft", "boft"},
    "x3d_xs": {"adapt_former", "convpass", "fact", "oft", "boft", "rep_adapter"},
}
SETTINGS = {"rep_adapter": {"groups": 1}, "partial_finetuning": {"num_frozen_layers": 4}}


def adapted() -> Iterator[Any]:
    """Encoders with methods; a few of the pairs unless slow tests are asked for."""
    for name in ADAPTED:
        for method in METHODS:
            tag = method.__struct_config__.tag
            quick = (name, tag) in QUICK or (name == "x3d_xs" and tag in REFUSED[name])
            marks = () if quick else pytest.mark.slow
            yield pytest.param(name, method, marks=marks, id=f"{name}-{tag}")


@pytest.mark.parametrize(("name", "method"), [*adapted()])
def test_methods_adapt_encoders_of_clips(name: str, method: type, tmp_path: Path) -> None:
    """A step changes what the method trains and nothing else, and the model reloads strictly; a
    method of transformers says what it misses."""
    spec, size = ModelSpec(encoder=section(name)), FAMILIES[name]
    tag = method.__struct_config__.tag

    def fresh():
        torch.manual_seed(0)
        arguments = {"outputs": 3, "channels": 3, "size": size, "load_weights": False}
        return build_model(spec, method(**settings), **arguments)

    settings = SETTINGS.get(tag, {}) if name in REFUSED else {}
    if tag == "visual_prompt_tuning" or tag in REFUSED.get(name, ()):
        with pytest.raises(UserError, match="peft|rep_adapter"):
            fresh()
        return
    model = fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = clips(size), torch.tensor([0, 2])
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model.train()(x), y).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved and moved <= trained and any(key.startswith("head.") for key in moved)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = fresh()
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("x3d_xs", None),
        ("slowfast_r50", None),
        pytest.param("mvit_v2_s", None, marks=pytest.mark.slow),
        pytest.param("swin3d_t", ("layer1", "layer3"), marks=pytest.mark.slow),
        pytest.param("s3d", ("layer2",), marks=pytest.mark.slow),
        ("resnet18", None),
        ("test_vit", ()),
    ],
)
def test_a_head_along_time_reads_every_family(name: str, stages: tuple[str, ...] | None) -> None:
    """Logits of each frame of clips, gradients in every stage that it joins, and the same after a
    strict reload; frames of an image encoder are its one stage."""
    size = FAMILIES.get(name, (5, 32, 32))
    if name in FAMILIES:
        encoder = section(name)
    else:
        encoder = TimmEncoder(type=name, pretrained=False, lift="slices", slices=Slices(axis="x"))
    spec = ModelSpec(encoder=encoder, head=FramewiseHead(stages=stages))

    def fresh():
        torch.manual_seed(0)
        arguments = {"outputs": 4, "channels": 3, "size": size, "load_weights": False}
        return build_model(spec, FullFinetuning(), **arguments)

    model, x = fresh().train(), clips(size)
    logits = model(x)
    assert logits.shape == (2, size[0], 4) and bool(logits.isfinite().all())
    F.cross_entropy(logits.flatten(0, 1), torch.arange(2 * size[0]) % 4).backward()
    assert not [k for k, p in model.head.named_parameters() if not p.grad.abs().sum() > 0]
    first = next(p for p in model.encoder.parameters() if p.requires_grad)
    assert first.grad is not None and bool(first.grad.abs().sum() > 0)
    wanted = model.encoder.stage_names[:-1] if stages is None else stages
    assert model.head.stages == wanted and bool(wanted) == (name in FAMILIES)
    again = fresh()
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


def test_importing_the_hub_warns_of_nothing() -> None:
    pytest.importorskip("pytorchvideo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert callable(hub_builder(PytorchvideoEncoder()))


def test_clips_that_are_too_short_are_told_the_keys_of_videos() -> None:
    with pytest.raises(UserError, match=r"clips of 4 x 32 x 32 .*of clips data\.sampling\.frames"):
        make(section("s3d"), (4, 32, 32))
