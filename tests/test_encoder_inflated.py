"""Encoders of images whose kernels have a third axis: against the slice of a volume without change,
against kernels and pools of three axes by hand, formulas of global pools, PEFT, what is refused."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.encoder import any_encoder
from glovita_lib.errors import UserError
from glovita_lib.model import build_model
from glovita_lib.spec_encoders import CustomEncoder, TimmEncoder, TorchvisionEncoder
from glovita_lib.spec_lift import Inflation
from glovita_lib.spec_model import ModelSpec
from glovita_lib.spec_peft import FullFinetuning, Peft

VIT = {
    "type": "test_vit",
    "pretrained": False,
    "model_kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
RESNET = {"type": "test_resnet", "pretrained": False}


def section(network, kind=TimmEncoder, **fields):
    return msgspec.convert({**network, "lift": "inflate", **fields}, kind)


def make(spec, size, channels=2):
    torch.manual_seed(0)
    return any_encoder(spec, channels=channels, size=size, load_weights=True).eval()


def volumes(size, channels=2, count=2) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def model_of(spec, peft=None, size=None):
    torch.manual_seed(0)
    return build_model(
        ModelSpec(encoder=spec),
        peft or FullFinetuning(),
        outputs=3,
        channels=2,
        size=size,
        load_weights=True,
    )


INFLATED = [
    (TimmEncoder, "resnet18"),
    (TimmEncoder, "efficientnet_lite0"),
    (TimmEncoder, "resnet26d"),
    (TimmEncoder, "regnety_002"),
    (TorchvisionEncoder, "densenet121"),
    (TorchvisionEncoder, "mobilenet_v3_small"),
    (TorchvisionEncoder, "vgg11_bn"),
]


def inflated() -> Iterator[Any]:
    """The encoders with both kernels; of the mean a few unless slow tests are asked for."""
    for kernel in ("mean", "center"):
        for kind, name in INFLATED:
            slow = name == "vgg11_bn" or (kernel == "mean" and name != "resnet18")
            marks = [pytest.mark.slow] * slow
            yield pytest.param(kernel, kind, name, marks=marks, id=f"{kernel}-{name}")


@pytest.mark.parametrize(("kernel", "kind", "name"), [*inflated()])
@torch.no_grad()
def test_a_volume_without_change_gives_what_its_slice_gives(kind, name, kernel):
    """In every place and in the vector, with statistics of batch norm that mean something."""
    axis = {"mean": 2, "center": 0}[kernel]
    fields = {"type": name, "pretrained": False}
    plain = make(kind(**fields), (32, 40))
    generator = torch.Generator().manual_seed(0)
    for part in plain.net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(0.1 * torch.randn(part.running_mean.shape, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    size = (32, 40, 33) if axis == 2 else (33, 32, 40)
    spec = section(fields, kind, inflation={"axis": "xyz"[axis], "kernel": kernel})
    encoder = make(spec, size)
    encoder.load_target.loading(encoder.net, plain.net.state_dict())  # weights of images
    images = volumes((32, 40), count=1)
    x = images.unsqueeze(2 + axis).expand(1, 2, *size)
    found, expected = encoder(x), plain(images)
    maps = found.tokens.mT.unflatten(2, found.grid).movedim(2 + axis, -1)
    wanted = expected.tokens.mT.unflatten(2, expected.grid)[..., None].expand(maps.shape)
    torch.testing.assert_close(maps, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    if plain.pooling == "avg":
        torch.testing.assert_close(
            found.pooled, expected.pooled, rtol=1e-3, atol=1e-4 * float(expected.pooled.abs().max())
        )


# ---------------------------------------------------------- kernels and pools along the axis


def layers(input_channels: int, *, pools: bool) -> nn.Module:
    """Kernels, steps, dilations and paddings, with pools between them or without."""
    between = [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1)] if pools else []
    last = nn.Conv2d(4, 3, 3, padding=2, dilation=2)
    return nn.Sequential(
        nn.Conv2d(input_channels, 4, 3, padding=1), *between, nn.Conv2d(4, 4, 5, 2, 2), last
    )


def custom(target: str, **options: Any) -> CustomEncoder:
    return msgspec.convert(
        {"target": f"test_encoder_inflated:{target}", "options": options}, CustomEncoder
    )


def inflated_and_plain(target: str, size, kernel="mean", **options):
    """An encoder of volumes whose last axis is lifted, and the network of images."""
    spec = msgspec.structs.replace(
        custom(target, **options), lift="inflate", inflation=Inflation(kernel=kernel)
    )
    return make(spec, size), make(custom(target, **options), size[:2]).net


def by_hand(layer: nn.Module, x: Tensor, kernel: str) -> Tensor:
    """A layer with three axes, of a volume whose border continues along the last one."""
    side, ends = (v[0] if isinstance(v, tuple) else v for v in (layer.kernel_size, layer.padding))
    x = F.pad(x, (ends, ends, 0, 0, 0, 0), mode="replicate")
    padding = (ends, ends, 0)
    if isinstance(layer, nn.MaxPool2d):
        return F.max_pool3d(x, side, layer.stride, padding)
    if isinstance(layer, nn.AvgPool2d):
        return F.avg_pool3d(x, side, layer.stride, padding)
    share = torch.full((side,), 1 / side) if kernel == "mean" else torch.eye(side)[side // 2]
    weight = layer.weight[..., None] * share
    step, apart = layer.stride[0], layer.dilation[0]
    return F.conv3d(x, weight, layer.bias, step, padding, apart)


@pytest.mark.parametrize("kernel", ["mean", "center"])
@torch.no_grad()
def test_kernels_and_pools_lie_where_those_of_three_axes_do(kernel):
    """Of a volume that changes along the axis, in every voxel."""
    size = (13, 11, 17)
    encoder, net = inflated_and_plain("layers", size, kernel, pools=True)
    x = expected = volumes(size)
    for layer in net:
        expected = by_hand(layer, expected, kernel)
    features = encoder(x)
    assert features.grid == tuple(expected.shape[2:])
    torch.testing.assert_close(features.tokens.mT.unflatten(2, features.grid), expected)


@torch.no_grad()
def test_kernels_in_the_middle_give_what_the_network_gives_of_each_slice():
    size = (9, 8, 7)
    encoder, net = inflated_and_plain("layers", size, "center", pools=False)
    x = volumes(size)
    maps = encoder.forward_features(x)  # (B, D, h, w, n), at every second slice
    expected = torch.stack([net(x[..., place]) for place in range(0, 7, 2)], -1)
    torch.testing.assert_close(maps, expected)


# ---------------------------------------------------------------------------- global pools

GATES = {
    "SEModule": (timm.layers.SEModule, {}),
    "SEModule with a maximum": (timm.layers.SEModule, {"add_maxpool": True}),
    "SqueezeExcite": (timm.models._efficientnet_blocks.SqueezeExcite, {"rd_ratio": 0.5}),
    "SEModule of SENet": (timm.models.senet.SEModule, {"reduction": 2}),
    "EffectiveSEModule": (timm.layers.EffectiveSEModule, {}),
    "EcaModule": (timm.layers.EcaModule, {}),
    "GatherExcite": (
        timm.layers.GatherExcite,
        {"extra_params": False, "extent": 0, "use_mlp": False},
    ),
    "SqueezeExcitation": (torchvision.ops.SqueezeExcitation, {"squeeze_channels": 4}),
}


def gated(input_channels: int, *, gate: str) -> nn.Module:
    kind, options = GATES[gate]
    return nn.Sequential(nn.Conv2d(input_channels, 8, 3, 1, 1), kind(8, **options))


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_gates_are_those_of_the_means_over_three_axes(gate):
    """With the library's parameters, and what it makes of a map whose mean that is."""
    size = (6, 5, 7)
    encoder, net = inflated_and_plain("gated", size, gate=gate)
    for own in (encoder.net[1], net[1]):  # gates that differ from voxel to voxel would be seen
        for number, value in enumerate(own.parameters()):
            generator = torch.Generator().manual_seed(number)
            value.copy_(torch.randn(value.numel(), generator=generator).view(value.shape))
    x = volumes(size)
    maps = by_hand(net[0], x, "mean")  # (B, C, X, Y, Z)
    flat = maps.flatten(3)  # (B, C, X, Y Z): all voxels of a volume, in an image
    expected = net[1](flat).unflatten(3, maps.shape[3:])
    torch.testing.assert_close(encoder.forward_features(x), expected)
    gates = (expected / maps).flatten(2)
    assert gates.std(2).max() < 1e-3 < gates[:, :, 0].std()
    assert sum(p.numel() for p in encoder.net[1].parameters()) == sum(
        p.numel() for p in net[1].parameters()
    )


@pytest.mark.parametrize("size", [(6, 5, 7), (1, 1, 7)])
@torch.no_grad()
def test_global_context_is_of_three_axes(size):
    """Attention over all voxels (Cao et al., GCNet, 2019)."""
    encoder, net = inflated_and_plain("in_context", size)
    x = volumes(size)
    maps = by_hand(net[0], x, "mean")
    context, voxels = net[1], maps.flatten(2)  # (B, C, N)
    weights = F.conv1d(voxels, context.conv_attn.weight[..., 0], context.conv_attn.bias).softmax(2)
    mean = (voxels * weights).sum(2)[..., None, None]  # (B, C, 1, 1)
    gate = context.gate(context.mlp_scale(mean))[..., None]
    torch.testing.assert_close(encoder.forward_features(x), maps * gate)


def in_context(input_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(input_channels, 8, 3, 1, 1), timm.layers.GlobalContext(8))


@torch.no_grad()
def test_response_norms_are_over_three_axes():
    """y = x + beta + gamma x |x| / mean of |x| over channels (Woo et al., ConvNeXt V2, 2023)."""
    size = (6, 5, 7)
    encoder, net = inflated_and_plain("response_normed", size)
    for own in (encoder.net[1], net[1]):
        own.weight.fill_(0.7)
        own.bias.fill_(0.3)
    x = volumes(size)
    maps = by_hand(net[0], x, "mean")
    norm = maps.square().sum((2, 3, 4), keepdim=True).sqrt()
    expected = maps + 0.3 + 0.7 * maps * norm / (norm.mean(1, keepdim=True) + net[1].eps)
    torch.testing.assert_close(encoder.forward_features(x), expected)


def response_normed(input_channels: int) -> nn.Module:
    norm = timm.layers.grn.GlobalResponseNorm(8, channels_last=False)
    return nn.Sequential(nn.Conv2d(input_channels, 8, 3, 1, 1), norm)


POOLED = [
    (TimmEncoder, "regnety_002", "SEModule"),
    (TimmEncoder, "efficientnet_b0", "SqueezeExcite"),
    (TimmEncoder, "mobilenetv3_small_050", "SqueezeExcite"),
    (TimmEncoder, "legacy_seresnet18", "SEModule"),
    (TimmEncoder, "ecaresnet26t", "EcaModule"),
    (TimmEncoder, "skresnet18", "SelectiveKernelAttn"),
    (TimmEncoder, "convnextv2_atto", "GlobalResponseNorm"),
    (TorchvisionEncoder, "efficientnet_b0", "SqueezeExcitation"),
    (TorchvisionEncoder, "mobilenet_v3_small", "SqueezeExcitation"),
]


@pytest.mark.parametrize(
    ("kind", "name", "module"),
    [pytest.param(*p, marks=[pytest.mark.slow] * (number > 0)) for number, p in enumerate(POOLED)],
)
@torch.no_grad()
def test_a_voxel_reaches_all_slices_through_global_pools(kind, name, module):
    size = (32, 32, 8)
    encoder = make(section({"type": name, "pretrained": False}, kind), size)
    found, inputs = [m for m in encoder.net.modules() if type(m).__name__ == module], {}
    hooks = [m.register_forward_pre_hook(lambda m, i: inputs.update({m: i[0]})) for m in found]
    encoder(volumes(size, count=1))
    for hook in hooks:
        hook.remove()
    tried = [(m, x) for m, x in inputs.items() if x.shape[-1] > 1]
    assert tried
    for part, x in tried:
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        part.train(False)
        for value in part.parameters():  # some begin as nothing
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(3)) / 10)
        other = x.clone()
        other[..., 0] += 3
        change = (part(other) - part(x)).flatten(2).abs()
        assert change.amax((0, 1)).min() > 0


# ----------------------------------------------------------------------- weights and training


@pytest.mark.parametrize("method", ["full_finetuning", "lora", "ssf"])
def test_inflated_encoders_train_and_are_read_strictly(method, tmp_path):
    peft = msgspec.convert({"method": method}, Peft)
    spec, size = section(RESNET), (16, 16, 8)
    model, x = model_of(spec, peft, size=size), volumes(size)
    model.train()(x).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    again = model_of(spec, peft, size=size)
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("kernel", ["mean", "center"])
def test_own_weights_of_inflated_encoders_are_weights_of_the_same(kernel, tmp_path):
    """Of a whole model as of its encoder; files of the network of images are inflated as before."""
    fields = {"inflation": {"kernel": kernel}}
    spec, size = section(RESNET, **fields), (16, 16, 8)
    model, path = model_of(spec, size=size).eval(), tmp_path / "m.pt"
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) / 20)
    x = volumes(size)
    for state in (model.state_dict(), model.encoder.state_dict(), model.encoder.net.state_dict()):
        torch.save({"model": state}, path)
        again = make(section(RESNET, weights=str(path), **fields), size)
        with torch.no_grad():
            assert torch.equal(again(x).tokens, model.encoder(x).tokens)


@pytest.mark.parametrize(
    ("network", "kind", "said"),
    [
        (VIT, TimmEncoder, r"has attention \(blocks.0.attn and 1 more\), only convolutional"),
        (
            {"type": "convnext_atto", "pretrained": False},
            TimmEncoder,
            r"works on images alone, in stages.0.blocks.0 \(ConvNeXtBlock\), or 32 voxels",
        ),
        ({"type": "tf_efficientnet_lite0", "pretrained": False}, TimmEncoder, "layer Conv2dSame"),
        (
            {**RESNET, "model_kwargs": {"drop_block_rate": 0.2}},
            TimmEncoder,
            r"in training between its layers it works on images alone, in .* \(DropBlock2d\); lift",
        ),
        *(
            ({"target": "test_encoder_inflated:pooled", "options": options}, CustomEncoder, said)
            for options, said in (
                ({}, "it pools over some of three axes alone, in its own forward pass; lift"),
                (
                    {"nested": True},
                    r"it pools over some of three axes alone, in 0 \(Pooled\); lift",
                ),
                (
                    {"nested": True, "over": [2]},
                    r"it pools over some of three axes alone, in 0 \(Pooled\); lift",
                ),
                (
                    {"flat": True},
                    "it pools over some of three axes alone, in its own forward pass; lift",
                ),
                ({"always": False}, "in training it pools over some of three axes alone, in its"),
            )
        ),
    ],
)
def test_what_cannot_be_inflated_is_told(network, kind, said):
    with pytest.raises(UserError, match=said):
        make(section(network, kind), (32, 32, 32))


class Pooled(nn.Module):
    """Kernels and a mean over axes in one module, always or in training."""

    def __init__(self, channels: int, over: list[int], always: bool, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.over, self.always = over, always

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.flat:
            return x * x.flatten(2, 3).amax(2)[:, :, None, None]
        return x * x.mean(self.over, keepdim=True) if self.always or self.training else x


def pooled(input_channels: int, *, over=(2, 3), always=True, flat=False, nested=False) -> nn.Module:
    module = Pooled(input_channels, list(over), always, flat)
    return nn.Sequential(module) if nested else module


def test_networks_of_large_images_are_checked_with_larger_ones():
    with torch.no_grad():
        grid = make(section({"target": "test_encoder_inflated:tall"}, CustomEncoder), (80, 8, 8))(
            volumes((80, 8, 8))
        ).grid
    assert grid == (11, 8, 8)


def tall(input_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(input_channels, 3, (70, 1)))


def test_the_checks_draw_no_number_and_leave_statistics_alone():
    """Though they see layers in training: a run draws what it would draw without them."""
    states = []
    for lift in (None, "inflate"):
        spec = msgspec.structs.replace(custom("dropping"), lift=lift)
        encoder = make(spec, (8, 8, 8) if lift else (8, 8))
        states.append(torch.random.get_rng_state())
        assert not encoder.net[1].num_batches_tracked and encoder.net[2].training is False
    assert torch.equal(*states)


def dropping(input_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(input_channels, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.5))
