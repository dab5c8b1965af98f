"""Features of timm's and torchvision's models against the libraries' own pooled forward pass."""

import importlib
import inspect
import re
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from timm.data import resolve_data_config
from torch import Tensor, nn

from glovita_lib.encoder import Encoder, build_encoder, preprocess_of
from glovita_lib.encoder_aggregation import aggregate, output_width, resolve_method, served
from glovita_lib.encoder_timm import prefix_tokens
from glovita_lib.errors import UserError
from glovita_lib.network import block_names
from glovita_lib.spec_encoders import CustomEncoder, TimmEncoder, TorchvisionEncoder


def make(spec, size: int, channels: int = 3):
    torch.manual_seed(0)
    return build_encoder(spec, channels=channels, size=(size, size), load_weights=False).eval()


def timm_spec(name: str, **kwargs) -> TimmEncoder:
    return TimmEncoder(type=name, pretrained=False, **kwargs)


def tv_spec(name: str, **kwargs) -> TorchvisionEncoder:
    return TorchvisionEncoder(type=name, pretrained=False, **kwargs)


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


SHALLOW = {"model_kwargs": {"depth": 2}}
# name, further fields, size, default aggregation, patch grid, prefix tokens, CLS, width of avg
TIMM = [
    ("vit_tiny_patch16_224", SHALLOW, 64, "cls_token", (4, 4), 1, True, 192),
    ("vit_small_patch16_dinov3", SHALLOW, 64, "cls_token", (4, 4), 5, True, 384),
    ("vit_base_patch16_siglip_224", SHALLOW, 64, "pooled", (4, 4), 0, False, 768),
    ("vit_base_patch16_siglip_gap_224", SHALLOW, 64, "avg", (4, 4), 0, False, 768),
    ("beit_base_patch16_224", SHALLOW, 64, "avg", (4, 4), 1, True, 768),
    ("deit_tiny_distilled_patch16_224", SHALLOW, 64, "pooled", (4, 4), 2, True, 192),
    ("swin_tiny_patch4_window7_224", {}, 96, "avg", (3, 3), 0, False, 768),
    ("convnext_atto", {}, 64, "avg", (2, 2), 0, False, 320),
    ("resnet18", {}, 64, "avg", (2, 2), 0, False, 512),
    ("mobilenetv3_small_100", {}, 64, "avg", (2, 2), 0, False, 1024),
    ("efficientnet_lite0", {}, 64, "avg", (2, 2), 0, False, 1280),
    ("pit_ti_224", {}, 224, "cls_token", None, 1, True, 256),
    ("pit_ti_distilled_224", {}, 224, "pooled", None, 2, True, 256),
    ("crossvit_tiny_240", {}, 240, "pooled", None, 0, False, 288),
]


@pytest.mark.parametrize("row", TIMM, ids=lambda row: row[0])
def test_timm_pools_as_timm_does(row) -> None:
    name, fields, size, default, grid, n_prefix, has_cls, width = row
    encoder, x = make(timm_spec(name, **fields), size), images(size)
    arguments = dict(fields.get("model_kwargs", {}))
    if preprocess_of(timm_spec(name), channels=3).fixed_size:
        arguments["img_size"] = size
    reference = timm.create_model(name, num_classes=7, **arguments).eval()  # timm's own, whole
    missing = reference.load_state_dict(encoder.net.state_dict(), strict=False).missing_keys
    assert all(key.startswith(("head", "classifier", "fc")) for key in missing)
    with torch.no_grad():
        features, raw = encoder(x), reference.forward_features(x)
        own = reference.forward_head(raw, pre_logits=True)
        torch.testing.assert_close(features.pooled, own)
        if encoder.pooling in served(encoder):
            torch.testing.assert_close(aggregate(features, encoder.pooling), own)
    if name == "pit_ti_distilled_224" and torch.equal(own, raw[:, 0]):
        default = "cls_token"  # an older timm takes no mean where the classifier is gone
    assert resolve_method(None, encoder) == default
    assert (features.grid, features.n_prefix, features.has_cls) == (grid, n_prefix, has_cls)
    for method in served(encoder):
        assert aggregate(features, method).shape == (2, output_width(encoder, method))
    if "avg" in served(encoder):
        assert output_width(encoder, "avg") == width


CLS, REGISTERS = ("cls",), ("register",) * 4
PREFIXES = [  # of each module of timm with several prefix tokens, one model of each kind
    ("deit_tiny_distilled_patch16_224", SHALLOW, 64, (*CLS, "distillation")),
    ("deit3_small_patch16_224", SHALLOW, 64, CLS),
    ("pit_ti_distilled_224", {}, 224, (*CLS, "distillation")),
    ("vit_small_patch14_reg4_dinov2", SHALLOW, 56, CLS + REGISTERS),
    ("vit_mediumd_patch16_reg4_gap_256", SHALLOW, 64, REGISTERS),
    ("vit_betwixt_patch16_reg1_gap_256", SHALLOW, 64, REGISTERS[:1]),
    ("vit_small_patch16_dinov3", SHALLOW, 64, CLS + REGISTERS),
    ("naflexvit_base_patch16_gap", SHALLOW, 64, REGISTERS),
    ("coat_lite_tiny", {}, 224, CLS),
    ("levit_128s", {}, 224, ()),
    ("efficientformer_l1", {}, 224, ()),
]


@pytest.mark.parametrize("row", PREFIXES, ids=lambda row: row[0])
def test_prefix_tokens_are_what_they_are_called(row) -> None:
    """cls_token is the first token as timm gives it, alone and in joint; means are of patches."""
    name, fields, size, prefix = row
    encoder, x = make(timm_spec(name, **fields), size), images(size)
    assert encoder.prefix == prefix
    with torch.no_grad():
        features, tokens = encoder(x), encoder.net.forward_features(x)
    if encoder.has_cls:
        torch.testing.assert_close(aggregate(features, "cls_token"), tokens[:, 0])
    if prefix and encoder.has_patches and encoder.pooling != "avg":
        mean = tokens[:, len(prefix) :].mean(1)
        torch.testing.assert_close(aggregate(features, "avg"), mean)
        joint = torch.cat([tokens[:, 0], mean], 1)
        torch.testing.assert_close(aggregate(features, "joint"), joint)
    assert encoder.has_patches == (not name.startswith("pit"))


TOKENS = {"cls_token": "cls", "dist_token": "distillation", "reg_token": "register"}


def small_model(name: str) -> nn.Module | None:
    """A model of timm with one narrow block, or as it is; None where it has fewer than two prefix
    tokens, by the parameters that hold them."""
    small = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    for arguments in (small, {**small, "num_kv_heads": 2}, {"depth": 1}, {}):
        try:
            with torch.device("meta"):
                net = timm.create_model(name, num_classes=0, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError):
            continue
        held = [p for key, p in net.named_parameters() if key.rpartition(".")[2] in TOKENS]
        if sum(p.shape[1] for p in held if p.ndim == 3) < 2:
            return None
        assert sum(p.numel() for p in net.parameters()) < 1e8, f"{name} takes too much memory"
        return timm.create_model(name, num_classes=0, **arguments).eval()
    return None


def kinds_of_tokens(net: nn.Module, x: Tensor) -> list[str]:
    """What each token before the patches comes from: by which parameter has a gradient in it where
    tokens enter the first block."""
    entering: list[Tensor] = []

    class Entered(Exception):
        pass

    def stop(module, inputs):
        entering.append(inputs[0])
        raise Entered

    hook = net.blocks[0].register_forward_pre_hook(stop)
    with pytest.raises(Entered):
        net.forward_features(x)
    hook.remove()
    held = {k: p for k, p in net.named_parameters() if k.rpartition(".")[2] in TOKENS}
    kinds = []
    for token in entering[0][0]:
        grads = torch.autograd.grad(
            token.square().sum(), list(held.values()), retain_graph=True, allow_unused=True
        )
        own = [key for key, g in zip(held, grads, strict=True) if g is not None and g.any()]
        if not own:
            break
        kinds += [TOKENS[key.rpartition(".")[2]] for key in own]
    return kinds


def kinds_by_head(net: nn.Module, x: Tensor) -> list[str]:
    """The same of PiT, whose two tokens are one parameter: by the classifier that takes them."""
    net.reset_classifier(5)
    with torch.no_grad():
        raw = net.forward_features(x)
        taken = {}
        for name, head in (("cls", net.head), ("distillation", net.head_dist)):
            head.register_forward_pre_hook(lambda m, i, n=name: taken.update({n: i[0]}))
        net.forward_head(raw)
    of = [[n for n, value in taken.items() if torch.equal(value, token)] for token in raw.unbind(1)]
    net.reset_classifier(0)
    return [name for (name,) in of]


@pytest.mark.slow
def test_every_prefix_token_of_timm_is_what_it_is_called() -> None:
    """All models of timm with more than one, found by their parameters: the modules that name such
    tokens, and of these the models that have several."""
    words = re.compile(r"cls_token|dist_token|reg_token")
    modules = {
        module: importlib.import_module(f"timm.models.{module}") for module in timm.list_modules()
    }
    named = [m for m, code in modules.items() if words.search(inspect.getsource(code))]
    found = 0
    for name in (name for module in named for name in timm.list_models(module=module)):
        net = small_model(name)
        if net is None:
            continue
        size = timm.get_pretrained_cfg(name).input_size[-1]
        x = torch.randn(1, 3, size, size)
        kinds = kinds_by_head(net, x) if hasattr(net, "transformers") else kinds_of_tokens(net, x)
        assert prefix_tokens(net) == tuple(kinds), name
        found += 1
    assert found >= 60


def test_registers_and_cls_are_no_patches() -> None:
    encoder, x = make(timm_spec("vit_small_patch16_dinov3", **SHALLOW), 64), images(64)
    with torch.no_grad():
        features, raw = encoder(x), encoder.net.forward_features(x)
    assert raw.shape == (2, 21, 384)  # CLS, 4 registers, 4 x 4 patches
    torch.testing.assert_close(aggregate(features, "avg"), raw[:, 5:].mean(1))
    torch.testing.assert_close(aggregate(features, "sum"), raw[:, 5:].sum(1))
    torch.testing.assert_close(aggregate(features, "cls_token"), raw[:, 0])
    patches_and_cls = torch.cat([raw[:, :1], raw[:, 5:]], 1)
    torch.testing.assert_close(aggregate(features, "mean_all"), patches_and_cls.mean(1))
    joint = torch.cat([raw[:, 0], raw[:, 5:].mean(1)], 1)
    torch.testing.assert_close(aggregate(features, "joint"), joint)


def test_a_norm_behind_the_pooling_norms_tokens_too() -> None:
    encoder, x = make(timm_spec("beit_base_patch16_224", **SHALLOW), 64), images(64)
    with torch.no_grad():
        features, raw = encoder(x), encoder.net.forward_features(x)
        torch.testing.assert_close(features.tokens, encoder.net.fc_norm(raw))
        mean = encoder.net.fc_norm(raw[:, 1:].mean(1))
        torch.testing.assert_close(aggregate(features, "avg"), mean)
        torch.testing.assert_close(aggregate(features, "joint")[:, 768:], mean)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_maps_become_tokens_row_by_row(name: str) -> None:
    """Swin's maps are channels-last, ResNet's are not; a wrong axis would mix the patches."""
    encoder, x = make(timm_spec(name), 96), images(96)
    with torch.no_grad():
        features, raw = encoder(x), encoder.net.forward_features(x)
    row, column = 1, 2
    patch = raw[:, row, column] if name.startswith("swin") else raw[:, :, row, column]
    torch.testing.assert_close(features.tokens[:, row * features.grid[1] + column], patch)


# name, size, default aggregation, width of it, width of tokens, number of blocks
TORCHVISION = [
    ("convnext_tiny", 64, "avg", 768, 768, 18),
    ("vgg11", 64, "pooled", 4096, 512, 8),
    ("mobilenet_v3_small", 64, "avg", 1024, 576, 11),
    ("resnet18", 64, "avg", 512, 512, 8),
    ("vit_b_16", 64, "cls_token", 768, 768, 12),
    ("swin_t", 64, "avg", 768, 768, 12),
    ("efficientnet_b0", 64, "avg", 1280, 1280, 16),
    ("densenet121", 64, "avg", 1024, 1024, 58),
    ("regnet_y_400mf", 64, "avg", 440, 440, 16),
    ("shufflenet_v2_x0_5", 64, "avg", 1024, 1024, 16),
    ("squeezenet1_1", 64, "avg", 512, 512, 8),
    ("mnasnet0_5", 64, "avg", 1280, 1280, 16),
    ("googlenet", 64, "avg", 1024, 1024, 9),
]


@pytest.mark.parametrize("row", TORCHVISION, ids=lambda row: row[0])
def test_torchvision_pools_as_torchvision_does(row) -> None:
    """The library's own forward pass, its last layer an identity, is the reference."""
    name, size, default, width, token_width, blocks = row
    quick = {"model_kwargs": {"init_weights": False}} if name == "vgg11" else {}
    encoder, x = make(tv_spec(name, **quick), size), images(size)
    with torch.no_grad():
        features, own = encoder(x), encoder.net(x).flatten(1)
    method = resolve_method(None, encoder)
    assert method == default
    torch.testing.assert_close(aggregate(features, method), own)
    assert own.shape[1] == output_width(encoder, method) == width
    assert features.tokens.shape[2] == encoder.width == token_width
    assert len(encoder.blocks()) == blocks
    if name == "vit_b_16":
        assert encoder.net.encoder.pos_embedding.shape[1] == 1 + 4 * 4


def test_every_other_torchvision_family_builds_without_data() -> None:
    """maxvit and inception need large images: shapes alone are computed."""
    for name, size, width in (("maxvit_t", 224, 512), ("inception_v3", 96, 2048)):
        encoder = make(tv_spec(name), size)
        assert output_width(encoder, resolve_method(None, encoder)) == width


@pytest.mark.parametrize(
    ("spec", "first", "stem"),
    [
        (timm_spec("resnet18"), "net.layer1.0.conv1.weight", "net.conv1.weight"),
        (timm_spec("vit_tiny_patch16_224"), "net.blocks.0.attn.qkv.weight", "net.pos_embed"),
        (timm_spec("convnext_atto"), "net.stages.0.blocks.0.conv_dw.weight", "net.stem.0.weight"),
        (
            timm_spec("swin_tiny_patch4_window7_224"),
            "net.layers.0.blocks.0.attn.qkv.weight",
            "net.patch_embed.proj.weight",
        ),
        (tv_spec("resnet18"), "net.layer1.0.conv1.weight", "net.conv1.weight"),
    ],
    ids=lambda value: getattr(value, "type", None),
)
def test_layers_count_from_the_stem(spec, first: str, stem: str) -> None:
    encoder = make(spec, preprocess_of(spec, channels=3).image_size or 64)
    depths, blocks = encoder.depths(), encoder.blocks()
    assert set(depths.of) == {name for name, _ in encoder.named_parameters()}
    assert (depths.of[stem], depths.of[first]) == (0, 1)
    last = {id(p) for p in blocks[-1].parameters()}
    numbers = {depths.of[name] for name, p in encoder.named_parameters() if id(p) in last}
    assert numbers == {depths.layers} == {len(blocks)} == {depths.head - 1}
    behind = {"net.norm": len(blocks), "net.head": len(blocks) + 1}  # the norm of a pooled vector
    for name, depth in depths.of.items():
        assert depth == behind.get(".".join(name.split(".")[:2]), depth)


def test_blocks_are_in_the_order_of_use_and_none_runs_in_another() -> None:
    """CoaT registers all of its position encodings before the blocks that share them."""
    names = make(timm_spec("coat_tiny"), 64).block_names
    assert names[:4] == tuple(f"serial_blocks{s}.{i}" for s in (1, 2) for i in (0, 1))
    assert len(names) == 8 + 6 and not any("pe" in name for name in names)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("mixer_s32_224", 8),
        ("regnetx_002", 1 + 1 + 4 + 7),
        ("maxvit_rmlp_pico_rw_256", 2 + 2 + 5 + 2),
        ("nest_tiny", 2 + 2 + 8),
        ("tiny_vit_5m_224", 2 + 2 + 6 + 2 + 3),  # and three downsamplings of three convolutions
        ("mobilevit_xxs", 1 + 3 + 2 + 2 + 2),
    ],
)
def test_blocks_are_neither_stages_nor_their_parts(name: str, blocks: int) -> None:
    """Numbers of the papers."""
    net = timm.create_model(name, num_classes=0)
    found = block_names(net)
    assert len(found) == blocks
    wrapped = nn.ModuleDict({"backbone": net})
    assert block_names(wrapped) == tuple(f"backbone.{name}" for name in found)


def test_attention_that_pools_is_no_block() -> None:
    encoder = make(timm_spec("vit_base_patch16_siglip_224", **SHALLOW), 64)
    assert encoder.pooling == "pooled"
    assert block_names(encoder) == ("net.blocks.0", "net.blocks.1")


def test_input_convention_is_that_of_the_weights() -> None:
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("resnet18").to_dict())
    found = preprocess_of(TimmEncoder(type="resnet18"), channels=3)
    assert (found.image_size, found.crop_pct) == (224, config["crop_pct"])
    assert (found.mean, found.std) == (config["mean"], config["std"])
    assert found.interpolation == config["interpolation"] and not found.fixed_size
    lite = preprocess_of(TimmEncoder(type="tf_efficientnet_lite0"), channels=3)
    assert lite.mean == lite.std == (0.5, 0.5, 0.5)
    weights = torchvision.models.get_model_weights("convnext_tiny").DEFAULT.transforms()
    found = preprocess_of(TorchvisionEncoder(type="convnext_tiny"), channels=3)
    assert found.image_size == weights.crop_size[0]
    assert found.image_size / found.crop_pct == weights.resize_size[0] == 236


def test_untrained_models_ask_for_a_size_only_if_built_for_one() -> None:
    assert preprocess_of(timm_spec("resnet18", small_images=True), channels=3).image_size is None
    assert preprocess_of(tv_spec("convnext_tiny"), channels=3).image_size is None
    for spec in (timm_spec("vit_tiny_patch16_224"), tv_spec("vit_b_16")):
        found = preprocess_of(spec, channels=3)
        assert found.image_size == 224 and found.fixed_size


def test_statistics_follow_the_channels() -> None:
    grey = preprocess_of(timm_spec("resnet18"), channels=1)
    assert grey.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert preprocess_of(timm_spec("resnet18"), channels=4).std == (0.229, 0.224, 0.225, 0.229)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("spec", [timm_spec("resnet18"), tv_spec("mobilenet_v3_small")])
def test_other_channels(spec, channels: int) -> None:
    encoder = make(spec, 32, channels)
    assert encoder(images(32, channels)).pooled.shape[0] == 2


def test_small_images_keep_their_resolution() -> None:
    """On 8 x 8 digits the stem keeps 8 x 8, and the four stages end at 1 x 1."""
    encoder = make(timm_spec("resnet18", small_images=True), 8, channels=1)
    shapes = []
    encoder.net.layer1.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    assert encoder(images(8, 1)).grid == (1, 1)
    assert shapes == [(2, 64, 8, 8)]
    assert encoder.net.conv1.weight.shape == (64, 1, 3, 3)
    deep = make(timm_spec("resnet10t", small_images=True), 32)
    assert deep(images(32)).grid == (4, 4)


def test_position_embeddings_of_fixed_sizes_follow_the_image() -> None:
    assert make(timm_spec("vit_tiny_patch16_224", **SHALLOW), 96).net.pos_embed.shape[1] == 37


def test_dropout_of_the_library_is_kept() -> None:
    encoder = make(tv_spec("mobilenet_v3_small", dropout=0.9), 32).train()
    assert encoder.net.classifier[2].p == 0.9
    zeros = (encoder(images(32)).pooled == 0).float().mean()
    assert zeros > 0.5
    vit = make(timm_spec("vit_tiny_patch16_224", model_kwargs={"depth": 1, "drop_rate": 0.9}), 32)
    assert (aggregate(vit.train()(images(32)), "cls_token") == 0).float().mean() > 0.5


# -------------------------------------------------------------------- the user's own


class Patches(nn.Module):
    has_cls, n_prefix = True, 2

    def __init__(self, input_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(input_channels, width, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).mT
        return torch.cat([self.prefix.expand(len(x), -1, -1), tokens], 1)


def patches(*, input_channels: int, width: int) -> nn.Module:
    return Patches(input_channels, width)


def vector(*, input_channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * input_channels, 5))


def number(*, input_channels: int) -> int:
    return input_channels


def test_custom_tokens_and_vectors() -> None:
    encoder = make(CustomEncoder(target="tests.test_encoder:patches", options={"width": 6}), 16)
    features = encoder(images(16))
    assert (features.grid, encoder.width) == ((2, 2), 6)
    assert resolve_method(None, encoder) == "cls_token"
    torch.testing.assert_close(aggregate(features, "avg"), features.tokens[:, 2:].mean(1))
    encoder = make(CustomEncoder(target="tests.test_encoder:vector"), 16)
    assert resolve_method(None, encoder) == "pooled" and output_width(encoder, "pooled") == 5
    with pytest.raises(UserError, match="gives one vector per sample"):
        resolve_method("avg", encoder)


class Cubes(nn.Module):
    """Patches of 4 voxels a side, as a map or as tokens in the order of the axes."""

    def __init__(self, channels: int, as_tokens: bool) -> None:
        super().__init__()
        self.proj, self.as_tokens = nn.Conv3d(channels, 6, 4, 4), as_tokens

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)  # (B, D, X / 4, Y / 4, Z / 4)
        return y.flatten(2).mT if self.as_tokens else y


def cubes(*, input_channels: int, as_tokens: bool) -> nn.Module:
    return Cubes(input_channels, as_tokens)


def test_maps_and_tokens_of_volumes() -> None:
    volumes, found = torch.randn(2, 2, 8, 12, 20), []
    for as_tokens in (False, True):
        spec = CustomEncoder(target="tests.test_encoder:cubes", options={"as_tokens": as_tokens})
        torch.manual_seed(0)
        encoder = build_encoder(spec, channels=2, size=(8, 12, 20), load_weights=False).eval()
        features = encoder(volumes)
        assert (features.grid, features.tokens.shape) == ((2, 3, 5), (2, 30, 6))
        place = features.tokens.unflatten(1, features.grid)[:, 1, 2, 4]  # the last patch
        patch = encoder.net(volumes[:, :, 4:8, 8:12, 16:20]).reshape(2, 6)
        torch.testing.assert_close(place, patch)
        found.append(aggregate(features, "avg"))
    torch.testing.assert_close(*found)
    assert encoder.grid(torch.zeros(1, 29, 6), volumes.shape[2:]) is None
    with pytest.raises(UserError, match="volumes or clips of 8 x 3 x 8 with 2 .*patch_size"):
        build_encoder(spec, channels=2, size=(8, 3, 8), load_weights=False)


def test_images_that_are_not_square() -> None:
    vit = timm_spec("vit_tiny_patch16_224", **SHALLOW)
    encoder = build_encoder(vit, channels=3, size=(32, 64), load_weights=False)
    assert encoder(torch.randn(2, 3, 32, 64)).grid == (2, 4)
    with pytest.raises(UserError, match="vit_b_16 takes square inputs, not 32 x 64"):
        build_encoder(tv_spec("vit_b_16"), channels=3, size=(32, 64), load_weights=False)


class Gives(nn.Module):
    """Features of a map, in a wrapping."""

    def __init__(self, channels: int, wrapping) -> None:
        super().__init__()
        self.conv, self.wrapping = nn.Conv2d(channels, 4, 4, 4), wrapping

    def forward(self, x: Tensor):
        return self.wrapping(self.conv(x))


WRAPPINGS = {
    "dict": (lambda x: {"last": x, "all": [x]}, "gives a dict of last, all"),
    "list": (lambda x: [x, x], "gives a list of 2"),
    "tuple": (lambda x: (x, None), "gives a tuple of 2"),
    "none": (lambda x: None, "gives a NoneType"),
    "volume": (lambda x: x[..., None], r"a tensor of shape \(1, 4, 4, 4, 1\)"),
    "flat": (lambda x: x.sum((1, 2, 3)), r"a tensor of shape \(1,\)"),
}


def gives(*, input_channels: int, kind: str) -> nn.Module:
    return Gives(input_channels, WRAPPINGS[kind][0])


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_a_custom_encoder_that_gives_no_tensor_of_ours_is_one_line(kind: str) -> None:
    spec = CustomEncoder(target="tests.test_encoder:gives", options={"kind": kind})
    with pytest.raises(UserError, match=WRAPPINGS[kind][1] + "; valid: one tensor") as caught:
        make(spec, 16)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------- patches that are no squares


class Stripes(nn.Module):
    """Tokens of patches of any shape, after a convolution that keeps the size."""

    def __init__(self, channels: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.before = nn.Conv2d(channels, 3, 3, padding=1)
        self.patches = nn.Conv2d(3, 6, patch, patch)
        self.after = nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.patches(self.before(x)).flatten(2)).transpose(1, 2)


def striped(name: str, patch: tuple[int, int]) -> TimmEncoder:
    return timm_spec(name, model_kwargs={"depth": 1, "patch_size": patch})


def stripes(*, input_channels: int, patch: tuple[int, int]) -> nn.Module:
    return Stripes(input_channels, tuple(patch))


@pytest.mark.parametrize(
    ("spec", "grid"),
    [
        (
            timm_spec("vit_tiny_patch16_224", model_kwargs={"depth": 1, "patch_size": (8, 32)}),
            (8, 2),
        ),
        (
            timm_spec("deit_tiny_patch16_224", model_kwargs={"depth": 1, "patch_size": (32, 8)}),
            (2, 8),
        ),
        (timm_spec("cait_xxs24_224", model_kwargs={"depth": 1, "patch_size": (16, 32)}), (4, 2)),
        (CustomEncoder(target="tests.test_encoder:stripes", options={"patch": [8, 32]}), (8, 2)),
        (CustomEncoder(target="tests.test_encoder:stripes", options={"patch": [64, 4]}), (1, 16)),
        (CustomEncoder(target="tests.test_encoder:stripes", options={"patch": [16, 16]}), (4, 4)),
    ],
    ids=str,
)
def test_patches_that_are_no_squares(spec, grid: tuple[int, int]) -> None:
    """A patch of the image that changes changes the token at its row and column, most of all."""
    encoder = make(spec, 64)
    features = encoder(images(64))
    assert features.grid == grid
    high, wide = 64 // grid[0], 64 // grid[1]
    row, column = grid[0] - 1, grid[1] // 2
    changed = images(64)
    changed[:, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 3
    difference = (encoder(changed).patches - features.patches).abs().sum((0, 2))  # (N,)
    assert int(difference.argmax()) == row * grid[1] + column


# -------------------------------------------------------------------- crop of published weights


def test_the_crop_mode_is_that_of_the_published_weights() -> None:
    """All weights of timm that ask for another one than the centre, and some that do not."""
    asked = {"center": 0, "squash": 0, "border": 0}
    for name in timm.list_models(pretrained=True):
        mode = timm.models.get_pretrained_cfg(name).crop_mode
        if mode != "center" or name.startswith("resnet18"):
            assert preprocess_of(TimmEncoder(type=name), channels=3).crop_mode == mode, name
            asked[mode] += 1
    assert asked["center"] and asked["squash"]  # timm 1.0.20 has no border
    assert preprocess_of(TorchvisionEncoder(type="resnet18"), channels=3).crop_mode == "center"


# -------------------------------------------------------------------- mistakes


def vit(**kwargs) -> TimmEncoder:
    return timm_spec("vit_tiny_patch16_224", model_kwargs=kwargs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (timm_spec("resnet81"), "nearest: resnet"),
        (timm_spec("resnet18.nonsense"), "valid: resnet18.a1_in1k"),
        (tv_spec("convnext_tniy"), "nearest: convnext_tiny"),
        (timm_spec("resnet18", model_kwargs={"depht": 3}), "model_kwargs.depht: resnet18 has no"),
        (timm_spec("resnet18", model_kwargs={"num_classes": 3}), "it comes from the data"),
        (timm_spec("vit_tiny_patch16_224", small_images=True), "no ResNet stem"),
        (timm_spec("resnet18", model_kwargs={"output_stride": 7}), "output_stride = 7"),
        (
            vit(num_heads=5),
            "^model.encoder.model_kwargs: .* with .*num_heads = 5 for images of 3 chan.*: dim sh",
        ),
        (vit(depth="x"), "model.encoder.model_kwargs.depth = x for images of .*: TypeError"),
        (vit(norm_layer="n"), "norm_layer = n for images of .*: KeyError: 'n'"),
        (vit(patch_size=0), "patch_size = 0 for images of .*by zero"),
        (tv_spec("swin_t", model_kwargs={"num_heads": [3]}), "model_kwargs"),
        (tv_spec("resnet18", model_kwargs={"groups": 3}), "only supports groups=1"),
        (timm_spec("resnet18", input_channels=1), "the samples have 3"),
        (tv_spec("resnet18", dropout=0.1), "model.encoder.dropout: resnet18 has no such argument"),
        (tv_spec("convnext_tiny", model_kwargs={"foo": 1}), "model_kwargs.foo: convnext_tiny has"),
        (tv_spec("vit_b_16", model_kwargs={"image_size": 2}), "data.augmentation.image_size"),
        (CustomEncoder(target="tests.test_encoder"), 'write it as "package.module:function"'),
        (CustomEncoder(target="nowhere:f"), "no module nowhere"),
        (CustomEncoder(target="tests.test_encoder:nothing"), "has no function nothing"),
        (CustomEncoder(target="tests.test_encoder:patches"), "missing a required"),
        (CustomEncoder(target="tests.test_encoder:number"), "must return a torch.nn.Module"),
    ],
)
def test_mistakes_are_named(spec, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make(spec, 64)


class Scales(Encoder):
    """Maps of two scales, and a pooling that is switched off."""

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return [self.net(x), x]

    def pool(self, raw: list[Tensor]) -> Tensor:
        return raw[0]


def test_an_encoder_without_any_vector_is_named() -> None:
    facts = {"n_prefix": 0, "has_cls": False, "channels_last": False, "input_shape": (1, 3, 8, 8)}
    with pytest.raises(UserError, match="encoder scales gives neither tokens, nor a map"):
        Scales(nn.Conv2d(3, 4, 2), name="scales", **facts)


def test_too_small_images_are_told_at_once() -> None:
    with pytest.raises(UserError, match="does not take images of 8 x 8 with 3 channels"):
        make(tv_spec("squeezenet1_1"), 8)


def test_offline_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    for spec in (TimmEncoder(type="resnet18"), TorchvisionEncoder(type="resnet18")):
        with pytest.raises(UserError, match=r'weights = "<file>"') as caught:
            build_encoder(spec, channels=3, size=(32, 32), load_weights=True)
        assert "\n" not in str(caught.value)
        build_encoder(spec, channels=3, size=(32, 32), load_weights=False)  # nothing is fetched


def test_without_an_address_the_hub_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own retries would take 45 s; the cache is still looked into."""

    def no_address(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    monkeypatch.setattr("glovita_lib.encoder_hub.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    spec = TimmEncoder(type="test_vit3")
    with pytest.raises(UserError, match=r'cannot be downloaded .*weights = "<file>"'):
        build_encoder(spec, channels=3, size=(160, 160), load_weights=True)
    assert time.monotonic() - start < 10
    assert not constants.HF_HUB_OFFLINE


def test_published_weights_do_not_fit_a_small_stem() -> None:
    with pytest.raises(UserError, match="small_images"):
        build_encoder(
            TimmEncoder(type="resnet18", small_images=True),
            channels=3,
            size=(32, 32),
            load_weights=True,
        )
