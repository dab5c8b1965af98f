"""Outputs of layers against timm's own forward_intermediates and against torch.fx."""

import pytest
import torch
from torch import Tensor

from glovita_lib.encoder import build_encoder
from glovita_lib.encoder_aggregation import choose_layers, number_of_layers
from glovita_lib.errors import UserError
from glovita_lib.spec_encoders import CustomEncoder, TimmEncoder, TorchvisionEncoder

ASKED = (-1, 0, 2, -1, 1, -2)  # not sorted, from both ends, one twice
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}

# name, further arguments, size, patch grid of the last layer, prefix tokens in each layer
TIMM = {
    "ViT": ("test_vit", {}, 32, (2, 2), 1),
    "registers": ("vit_small_patch16_dinov3", SMALL, 64, (4, 4), 5),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL, 32, (2, 2), 2),
    "no prefix": ("vit_base_patch16_siglip_224", SMALL, 32, (2, 2), 0),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2},
        64,
        (2, 2),
        0,
    ),
    "ConvNeXt": ("test_convnext", {}, 64, (2, 2), 0),
    "ResNet": ("test_resnet", {}, 64, (2, 2), 0),
    "MLP-Mixer": ("mixer_s32_224", {}, 64, (2, 2), 0),
}
# These norm behind the pooling, where timm's norm=True is no norm at all.
NORM_BEHIND = {
    "ViT, avg": ("test_vit", {"global_pool": "avg"}, 32, (2, 2), 1),
    "BEiT": ("beit_base_patch16_224", SMALL, 32, (2, 2), 1),
    "registers, no CLS": ("test_vit4", {}, 32, (2, 2), 1),
}


def make(spec, size: int):
    torch.manual_seed(0)
    encoder = build_encoder(spec, channels=3, size=(size, size), load_weights=False).eval()
    return jittered(encoder)


@torch.no_grad()
def jittered(encoder):
    """Norms and biases away from 1 and 0, so that leaving one out shows."""
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def timm_encoder(row):
    name, arguments, size, *_ = row
    return make(TimmEncoder(type=name, pretrained=False, model_kwargs=arguments), size)


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(encoder, layers, *, norm: bool, size: int):
    shape = (1, 3, size, size)
    return choose_layers(encoder, layers, norm=norm, input_shape=shape)(images(size))


@torch.no_grad()
def timms_own(encoder, x: Tensor, norm: bool) -> list[Tensor]:
    """All layers as tokens (B, P + N, D), straight from timm."""
    keywords = {"return_prefix_tokens": True} if encoder.n_prefix else {}
    outputs = encoder.net.forward_intermediates(
        x, norm=norm, output_fmt="NCHW", intermediates_only=True, **keywords
    )
    pairs = outputs if encoder.n_prefix else [(output, None) for output in outputs]
    tokens = []
    for patches, prefix in pairs:
        rows = patches.permute(0, 2, 3, 1).reshape(len(x), -1, patches.shape[1])
        tokens.append(rows if prefix is None else torch.cat([prefix, rows], 1))
    return tokens


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("row", TIMM.values(), ids=list(TIMM))
def test_layers_are_those_of_timm(row, norm):
    _, _, size, grid, n_prefix = row
    encoder = timm_encoder(row)
    expected = timms_own(encoder, images(size), norm)
    found = read(encoder, ASKED, norm=norm, size=size)
    assert len(found) == len(ASKED)
    for layer, features in zip(ASKED, found, strict=True):
        torch.testing.assert_close(features.tokens, expected[layer], rtol=0, atol=0)
        assert features.n_prefix == n_prefix
        assert features.patches.shape[1] == features.grid[0] * features.grid[1]
    assert found[0].grid == grid


@pytest.mark.parametrize("row", NORM_BEHIND.values(), ids=list(NORM_BEHIND))
def test_a_norm_behind_the_pooling_norms_layers_too(row):
    encoder, size = timm_encoder(row), row[2]
    raw = timms_own(encoder, images(size), norm=False)
    no_op = timms_own(encoder, images(size), norm=True)
    assert all(torch.equal(a, b) for a, b in zip(raw, no_op, strict=True))  # timm's trap
    with torch.no_grad():
        for layer, features in zip(ASKED, read(encoder, ASKED, norm=True, size=size), strict=True):
            torch.testing.assert_close(features.tokens, encoder.net.fc_norm(raw[layer]))
    for layer, features in zip(ASKED, read(encoder, ASKED, norm=False, size=size), strict=True):
        torch.testing.assert_close(features.tokens, raw[layer], rtol=0, atol=0)


@pytest.mark.parametrize("row", (TIMM | NORM_BEHIND).values(), ids=list(TIMM | NORM_BEHIND))
def test_the_last_layer_with_norm_is_the_encoder_output(row):
    encoder, size = timm_encoder(row), row[2]
    (last,) = read(encoder, (-1,), norm=True, size=size)
    with torch.no_grad():
        output = encoder(images(size), pooled=False)
    torch.testing.assert_close(last.tokens, output.tokens)
    assert (last.grid, last.n_prefix, last.has_cls) == (
        output.grid,
        output.n_prefix,
        output.has_cls,
    )


@pytest.mark.parametrize("name", ["cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_models_whose_layers_lack_prefix_tokens(name):
    """timm's method gives no prefix tokens here, though the output has a CLS token."""
    encoder = make(TimmEncoder(type=name, pretrained=False, model_kwargs=SMALL), 224)
    assert encoder.has_cls
    (features,) = read(encoder, (1,), norm=False, size=224)
    assert (features.n_prefix, features.has_cls, features.grid) == (0, False, (14, 14))
    assert features.tokens.shape == (2, 196, 32)


def test_which_layers_the_norm_changes():
    for row, expected in (
        (TIMM["ViT"], (0, 2, 5)),
        (TIMM["Swin"], (3,)),  # its norm has the width of the last stage
        (TIMM["ResNet"], ()),
    ):
        encoder, shape = timm_encoder(row), (1, 3, row[2], row[2])
        for norm in (True, False):
            layers = choose_layers(encoder, (0, 2, -1), norm=norm, input_shape=shape)
            features, changed = layers.probe(shape)
            assert changed == (expected if norm else ())
            assert len(features) == 3 and features[0].tokens.shape[0] == 1


def test_layers_that_do_not_exist():
    encoder = timm_encoder(TIMM["ViT"])
    assert number_of_layers(encoder, (1, 3, 32, 32)) == 6
    with pytest.raises(UserError, match=r"6 layers, valid are -6 to 5; got 6, -7"):
        read(encoder, (0, 6, -7), norm=True, size=32)


def test_a_model_that_timm_cannot_norm():
    spec = TimmEncoder(
        type="hiera_tiny_224",
        pretrained=False,
        model_kwargs={"embed_dim": 16, "stages": (1, 1, 1, 1)},
    )
    encoder, shape = make(spec, 224), (1, 3, 224, 224)
    with pytest.raises(UserError, match=r"hiera_tiny_224; set extract.norm = false"):
        choose_layers(encoder, (-1,), norm=True, input_shape=shape).probe(shape)
    features, _ = choose_layers(encoder, (-1,), norm=False, input_shape=shape).probe(shape)
    assert features[0].grid == (7, 7)


# ---------------------------------------------------------------------- torchvision

# name, size, the node of torch.fx that each block ends in
TORCHVISION = {
    "resnet18": (64, [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]),
    "swin_t": (
        64,
        [
            f"features.{stage}.{i}"
            for stage, n in ((1, 2), (3, 2), (5, 6), (7, 2))
            for i in range(n)
        ],
    ),
    "vit_b_32": (64, [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_blocks_of_torchvision_against_fx(name):
    from torchvision.models.feature_extraction import create_feature_extractor

    size, nodes = TORCHVISION[name]
    encoder = make(TorchvisionEncoder(type=name, pretrained=False), size)
    with torch.no_grad():
        taken = create_feature_extractor(encoder.net, nodes)(images(size))
    raw = read(encoder, ASKED, norm=False, size=size)
    normed = read(encoder, ASKED, norm=True, size=size)
    for layer, features, after in zip(ASKED, raw, normed, strict=True):
        block = taken[nodes[layer]]
        norm = lambda tokens: tokens  # noqa: E731
        if name == "swin_t":  # (B, H, W, D)
            expected, grid = block.flatten(1, 2), tuple(block.shape[1:3])
            norm = encoder.net.norm if block.shape[3] == encoder.width else norm
        elif name == "resnet18":  # (B, D, H, W)
            expected, grid = block.flatten(2).transpose(1, 2), tuple(block.shape[2:])
        else:
            expected, grid, norm = block, (2, 2), encoder.net.encoder.ln
        torch.testing.assert_close(features.tokens, expected, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(after.tokens, norm(expected))
        assert features.grid == grid and features.n_prefix == (name == "vit_b_32")
    with torch.no_grad():
        output = encoder(images(size), pooled=False)
    torch.testing.assert_close(normed[0].tokens, output.tokens)


def test_an_activation_in_place_leaves_the_layer_as_it_was():
    """The blocks of AlexNet are convolutions with a ReLU in place behind."""
    encoder = make(TorchvisionEncoder(type="alexnet", pretrained=False), 64)
    (features,) = read(encoder, (0,), norm=False, size=64)
    with torch.no_grad():
        expected = encoder.net.features[0](images(64))
    assert (expected < 0).any()
    torch.testing.assert_close(features.tokens, expected.flatten(2).transpose(1, 2))


def test_hooks_are_removed():
    encoder = make(TorchvisionEncoder(type="resnet18", pretrained=False), 32)
    read(encoder, (0, 3), norm=True, size=32)
    assert not any(module._forward_hooks for module in encoder.modules())


class Vectors(torch.nn.Module):
    """A network whose blocks give vectors."""

    def __init__(self, input_channels: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(input_channels, 4), torch.nn.Linear(4, 3))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_that_give_neither_tokens_nor_maps():
    encoder = make(CustomEncoder(target="test_encoder_aggregation_layers:Vectors"), 32)
    with pytest.raises(UserError, match=r"layer 3 of .* gives \(2, 3\), neither a map"):
        read(encoder, (-1,), norm=False, size=32)
