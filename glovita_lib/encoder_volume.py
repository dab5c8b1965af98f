"""The encoder of volumes by convolutions: nnU-Net's residual encoder, also of images.

Modules of the residual encoder have the names of dynamic-network-architectures, so that weights
trained there load. B batch, C channels, X Y Z voxels, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glovita_lib.encoder import (
    Encoder,
    Preprocess,
    build_encoder,
    check_channels,
    fit_channels,
    preprocess_of,
)
from glovita_lib.encoder_torchvision import IMAGENET
from glovita_lib.errors import UserError
from glovita_lib.spec_encoders import ArrayEncoder, ArrayOrder, ResidualEncoder
from glovita_lib.weights import LoadTarget, beside_tensors, load_file

Size = tuple[int, ...]
Tensors = dict[str, Tensor]

# ------------------------------------------------------------------------- residual encoder
#
# A stem and stages of residual blocks as in ResNet-D (He et al., CVPR 2019): a block's skip is
# averaged over its step, then projected.

Layers = dict[Any, Callable[..., nn.Module]]
CONVOLUTIONS: Layers = {2: nn.Conv2d, 3: nn.Conv3d}
DROPOUTS: Layers = {2: nn.Dropout2d, 3: nn.Dropout3d}
POOLS: Layers = {
    ("avg", 2): nn.AvgPool2d,
    ("avg", 3): nn.AvgPool3d,
    ("max", 2): nn.MaxPool2d,
    ("max", 3): nn.MaxPool3d,
}
NORMS: Layers = {
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
}
ACTIVATIONS: Layers = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, inplace=True),
    "gelu": nn.GELU,
}
SLOPE = 0.01  # of the leaky activation, which the initial weights allow for


class ConvNorm(nn.Module):
    """Convolution, dropout of channels, norm, activation; the size is divided by the stride."""

    def __init__(
        self,
        spec: ResidualEncoder,
        channels: tuple[int, int],
        kernel: Size,
        stride: Size,
        *,
        bias: bool = True,
        dropout: bool = False,
        activation: bool = True,
    ) -> None:
        super().__init__()
        axes, (taken, given) = spec.spatial_dim, channels
        padding = tuple((side - 1) // 2 for side in kernel)
        bias = bias and spec.conv_bias
        self.conv = CONVOLUTIONS[axes](taken, given, kernel, stride, padding, bias=bias)
        dropped = dropout and spec.dropout_p > 0
        self.dropout = DROPOUTS[axes](spec.dropout_p) if dropped else nn.Identity()
        self.norm = NORMS[spec.norm, axes](given, affine=True)
        self.nonlin = ACTIVATIONS[spec.nonlinearity]() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C', *size / stride)."""
        return self.nonlin(self.norm(self.dropout(self.conv(x))))


class Block(nn.Module):
    """y = act(skip(x) + f(x)) with f two convolutions, or three of which the outer ones see one
    voxel; the first of a stage may change channels and size."""

    def __init__(
        self, spec: ResidualEncoder, channels: tuple[int, int, int], kernel: Size, stride: Size
    ) -> None:
        super().__init__()
        taken, inside, given = channels
        one = (1,) * spec.spatial_dim
        if spec.block_type == "basic":
            self.conv1 = ConvNorm(spec, (taken, given), kernel, stride, dropout=True)
            self.conv2 = ConvNorm(spec, (given, given), kernel, one, activation=False)
        else:
            self.conv1 = ConvNorm(spec, (taken, inside), one, one)
            self.conv2 = ConvNorm(spec, (inside, inside), kernel, stride, dropout=True)
            self.conv3 = ConvNorm(spec, (inside, given), one, one, activation=False)
        self.drop_path = drop_path(spec.stochastic_depth_p)
        if spec.squeeze_excitation:
            self.squeeze_excitation = SqueezeExcitation(spec, given)
        skip: list[nn.Module] = []
        if math.prod(stride) > 1:
            skip.append(POOLS["avg", spec.spatial_dim](stride, stride))
        if taken != given:
            skip.append(ConvNorm(spec, (taken, given), one, one, bias=False, activation=False))
        self.skip = nn.Sequential(*skip)
        self.nonlin = ACTIVATIONS[spec.nonlinearity]()

    @property
    def last(self) -> ConvNorm:
        """The convolution before the sum."""
        return self.conv3 if hasattr(self, "conv3") else self.conv2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C', *size / stride)."""
        y = self.conv2(self.conv1(x))
        if hasattr(self, "conv3"):
            y = self.conv3(y)
        y = self.drop_path(y)
        if hasattr(self, "squeeze_excitation"):
            y = self.squeeze_excitation(y)
        return self.nonlin(y + self.skip(x))


def drop_path(probability: float) -> nn.Module:
    """What leaves a sample's change out in training."""
    if not probability:
        return nn.Identity()
    from timm.layers import DropPath

    return DropPath(probability)


class SqueezeExcitation(nn.Module):
    """Channels scaled by sigmoid(W2 relu(W1 mean(x))).

    The mean is over the first two axes, as in dynamic-network-architectures: of volumes every plane
    along Z has scales of its own, which is what weights from there expect.
    """

    def __init__(self, spec: ResidualEncoder, channels: int) -> None:
        super().__init__()
        from timm.layers import make_divisible

        ratio = spec.squeeze_excitation_reduction_ratio
        hidden = make_divisible(channels * ratio, 8, round_limit=0.0)
        conv = CONVOLUTIONS[spec.spatial_dim]
        self.fc1, self.fc2 = conv(channels, hidden, 1), conv(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> the same."""
        mean = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1, Z)
        return x * self.fc2(self.fc1(mean).relu()).sigmoid()


class Stage(nn.Module):
    """A row of blocks, the first of which makes the step."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C', *size / stride)."""
        return self.blocks(x)


class Stem(nn.Module):
    """The convolution that sees the input."""

    def __init__(self, conv: ConvNorm) -> None:
        super().__init__()
        self.convs = nn.Sequential(conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C', *size)."""
        return self.convs(x)


class ResidualNetwork(nn.Module):
    """Stem and stages: inputs (B, C, *size) -> map (B, D, *size / product of the strides)."""

    def __init__(self, spec: ResidualEncoder, channels: int) -> None:
        super().__init__()
        axes, features = spec.spatial_dim, spec.features_per_stage
        kernels, strides = stage_kernels(spec), stage_strides(spec)
        counts = per_stage(spec, spec.n_blocks_per_stage)
        inside = per_stage(spec, spec.bottleneck_channels)
        given, one = spec.stem_channels or features[0], (1,) * axes
        self.stem = Stem(ConvNorm(spec, (channels, given), kernels[0], one, dropout=True))
        stages: list[nn.Module] = []
        for count, kernel, stride, narrow, width in zip(
            counts, kernels, strides, inside, features, strict=True
        ):
            step = stride if spec.pool_type == "conv" else one
            blocks = [
                Block(
                    spec,
                    (width if i else given, narrow or width, width),
                    kernel,
                    one if i else step,
                )
                for i in range(count)
            ]
            stage: nn.Module = Stage(blocks)
            if spec.pool_type != "conv":
                stage = nn.Sequential(POOLS[spec.pool_type, axes](stride, stride), stage)
            stages.append(stage)
            given = width
        self.stages = nn.Sequential(*stages)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """The map of the last stage."""
        return self.stages(self.stem(x))


def initialise(module: nn.Module) -> None:
    """nnU-Net's initial weights: He's for a leaky activation, and blocks that begin as their
    skip."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Block):
        for parameter in module.last.norm.parameters():
            nn.init.zeros_(parameter)


def per_stage(spec: ResidualEncoder, value: Any) -> tuple[Any, ...]:
    """A value for every stage."""
    return value if isinstance(value, tuple) else (value,) * len(spec.features_per_stage)


def stage_kernels(spec: ResidualEncoder) -> list[Size]:
    """Sides of the kernel in every stage."""
    return [per_axis(spec, side) for side in per_stage(spec, spec.kernel_sizes)]


def stage_strides(spec: ResidualEncoder) -> list[Size]:
    """Step along every axis in every stage."""
    return [per_axis(spec, step) for step in spec.strides]


def per_axis(spec: ResidualEncoder, value: int | Size) -> Size:
    """A number for every axis."""
    return value if isinstance(value, tuple) else (value,) * spec.spatial_dim


def check_residual_size(spec: ResidualEncoder, size: Size) -> None:
    """The steps of convolutions divide the size, as their skips are averaged over whole steps, and
    instance normalisation has something to normalise over.

    Raises:
        UserError: they do not; names sizes that fit.
    """
    if len(size) != spec.spatial_dim:
        raise UserError(
            f"model.encoder.spatial_dim = {spec.spatial_dim}: the inputs have {len(size)} axes"
        )
    steps = spec.turned(tuple(map(math.prod, zip(*stage_strides(spec), strict=True))))
    key = f"data.augmentation.{'patch_size' if spec.spatial_dim == 3 else 'image_size'}"
    sides = list(zip(size, steps, strict=True))
    if spec.pool_type == "conv" and any(side % step for side, step in sides):
        fitting = [max(1, round(side / step)) * step for side, step in sides]
        raise UserError(
            f"{key}: {by(size)} is no multiple of {by(steps)}, the product of"
            f" model.encoder.strides; nearest {by(fitting)}"
        )
    if spec.norm == "instance" and math.prod(side // step for side, step in sides) == 1:
        raise UserError(
            f"{key}: of {by(size)} the last stage keeps a single place, over which norm ="
            ' "instance" has nothing to normalise; take larger inputs, fewer stages, or "batch"'
        )


def by(size: Sequence[int]) -> str:
    """Sides in words."""
    return " x ".join(map(str, size))


class VolumeTrunk(Encoder):
    """A network that may see volumes with their axes in reverse, as arrays (Z, Y, X)."""

    def __init__(self, net: nn.Module, *, order: ArrayOrder, **facts: Any) -> None:
        """
        Args:
            order: of the axes of the network.
            facts: see Encoder; sizes are in the order X, Y, Z.
        """
        self.reverses = order == "zyx"
        super().__init__(net, **facts)
        if self.reverses:
            self.raw_call = "encoder(x.transpose(2, 4))"

    def forward_features(self, x: Tensor) -> Tensor:
        """Inputs (B, C, *size) -> map (B, D, *grid) or tokens (B, N, D), in the network's order."""
        return self.net(x.transpose(2, 4) if self.reverses else x)

    def placed(self, raw: Tensor, size: torch.Size) -> tuple[Tensor, Size | None]:
        """Tokens and their grid in the order X, Y, Z; no grid where patches are dropped."""
        if not self.reverses:
            return super().placed(raw, size)
        tokens, grid = super().placed(raw, size[::-1])
        if grid is None:
            return tokens, None
        first = tokens.shape[1] - math.prod(grid)
        patches = tokens[:, first:].unflatten(1, grid).transpose(1, 3).flatten(1, 3)  # (B, N, D)
        return torch.cat([tokens[:, :first], patches], 1) if first else patches, grid[::-1]

    def patch_sides(self, patches: int, sizes: list[Size], image: Size) -> tuple[float, ...]:
        """Sides of a patch along X, Y and Z."""
        if not self.reverses:
            return super().patch_sides(patches, sizes, image)
        return super().patch_sides(patches, sizes, image[::-1])[::-1]

    @property
    def tokens_call(self) -> str:
        if not self.reverses:
            return super().tokens_call
        raw, first = self.raw_call, self.n_prefix
        if self.layout != 3:
            return f"{raw}.transpose(2, 4).flatten(2).transpose(1, 2)"
        grid = tuple(round(s / p) for s, p in zip(self.input_shape[2:], self.patch, strict=True))
        turned = f".unflatten(1, {grid[::-1]}).transpose(1, 3).flatten(1, 3)"
        if not first:
            return f"{raw}{turned}"
        return f"torch.cat([{raw}[:, :{first}], {raw}[:, {first}:]{turned}], 1)"


class MapTrunk(VolumeTrunk):
    """A network whose output is a map (B, D, *grid), averaged over the grid."""

    def pool(self, raw: Tensor) -> Tensor:
        """Map -> its mean over the grid, (B, D)."""
        return raw.flatten(2).mean(2)


def build_residual(
    spec: ResidualEncoder, *, name: str, channels: int, size: Size | None
) -> MapTrunk:
    """The residual encoder of a Struct with initial weights."""
    size = size or (128,) * spec.spatial_dim
    check_residual_size(spec, size)
    encoder = MapTrunk(
        ResidualNetwork(spec, channels),
        order=spec.array_order,
        name=name,
        n_prefix=0,
        has_cls=False,
        channels_last=False,
        input_shape=(1, channels, *size),
    )
    first = "stem.convs.0.conv"
    encoder.load_target = LoadTarget(
        encoder.net, loading=partial(load_residual, first=first), first_conv=(first,)
    )
    return encoder


def load_residual(net: nn.Module, tensors: Mapping[str, Tensor], *, first: str) -> None:
    """Load tensors under the names of dynamic-network-architectures into a residual encoder."""
    named = spread_channels(one_name_each(tensors), net, first)
    net.load_state_dict(named)


def one_name_each(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors without the second names that dynamic-network-architectures gives to those of a
    convolution with its norm: all_modules.0 is the convolution, all_modules.1 or 2 the norm."""
    named = {}
    for name, tensor in tensors.items():
        before, alias, rest = name.partition("all_modules.")
        if alias:
            number, _, parameter = rest.partition(".")
            name = f"{before}{'conv' if number == '0' else 'norm'}.{parameter}"
        if alias and name in tensors:
            continue
        named[name] = tensor
    return named


def spread_channels(tensors: Tensors, net: nn.Module, first: str) -> Tensors:
    """Tensors with the first kernel for the network's channels: those of one channel are repeated
    and divided by the number of channels, so that equal channels give what one gave.

    Raises:
        ValueError: they are of several other channels.
    """
    key = f"{first}.weight"
    weight, channels = tensors.get(key), net.state_dict()[key].shape[1]
    if weight is None or weight.shape[1] == channels:
        return tensors
    if weight.shape[1] != 1:
        raise ValueError(
            f"it takes {weight.shape[1]} channels, the input has {channels}; only weights of one"
            " channel are spread over several"
        )
    repeats = (1, channels, *(1,) * (weight.ndim - 2))
    return {**tensors, key: weight.repeat(repeats) / channels}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a file says of how its network was trained."""

    order: ArrayOrder | None = None
    """Of the axes of its network; None: it does not say."""
    shape: Size | None = None
    """Voxels of its input in that order, likewise."""

    def order_notes(self, path: str, spec: ArrayEncoder) -> tuple[str, ...]:
        """A line where a section lets the network of a file see axes in another order."""
        if self.order in (None, spec.array_order):
            return ()
        return (
            f'weights = "{path}" is of volumes in the order {self.order}: set'
            f' model.encoder.array_order = "{self.order}", unless the network is to see them as'
            f" {spec.array_order}",
        )


def origin_of(path: str) -> Origin:
    """What a file says: a checkpoint of nnU-Net in its plans, one of this program, its exports and
    adapters in what their run resolved; nothing of others."""
    made = beside_tensors(path)
    if "nnssl_adaptation_plan" in made or "init_args" in made:
        return Origin("zyx", planned_patch(made.get("init_args")))
    order = None
    try:
        encoder = made["spec"]["model"]["encoder"]
        order = encoder["array_order"]
        if encoder["lift"] == "windows":
            shape = encoder["windows"]["size"] or encoder["input_shape"]
        else:
            shape = made["resolved"]["inputs"]["augmentation"]["patch_size"]
        x, y, z = map(int, shape)
    except (KeyError, TypeError, ValueError):
        return Origin(order)
    return Origin(order, (z, y, x) if order == "zyx" else (x, y, z))


def planned_patch(arguments: Any) -> Size | None:
    """Voxels of the patch of a configuration of nnU-Net, which may inherit them from another, in
    the arguments of its trainer; None where they do not name three."""
    try:
        configurations = arguments["plans"]["configurations"]
        entry = configurations[arguments["configuration"]]
        for _ in configurations:
            if "patch_size" in entry:
                break
            entry = configurations[entry["inherits_from"]]
        first, second, third = map(int, entry["patch_size"])
    except (KeyError, TypeError, ValueError):
        return None
    return first, second, third


@preprocess_of.register
def _(spec: ResidualEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    means, stds = IMAGENET
    return Preprocess(
        image_size=None,
        crop_pct=0.875,
        interpolation="bilinear",
        mean=fit_channels(means, channels),
        std=fit_channels(stds, channels),
        fixed_size=False,
    )


@build_encoder.register
def _(spec: ResidualEncoder, *, channels: int, size: Size | None, load_weights: bool) -> Encoder:
    check_channels(spec, channels)
    encoder = build_residual(spec, name="residual_encoder", channels=channels, size=size)
    if load_weights and spec.weights is not None:
        note = load_file(encoder.load_target, spec.weights, key=spec.weights_key)
        encoder.notes += () if note is None else (note,)
        encoder.notes += origin_of(spec.weights).order_notes(spec.weights, spec)
    return encoder
