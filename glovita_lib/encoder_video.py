"""Encoders of clips: what they share, and the video models of torchvision.

A clip is (B, C, T, H, W). Of a volume (B, C, X, Y, Z) one axis, usually that of the slices, takes
the place of time. A network keeps the names of its library, so that files from there load.

B batch, C channels, T H W frames, rows and columns, t h w of a map, N tokens, D width.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.encoder import (
    Encoder,
    Preprocess,
    build_encoder,
    check_channels,
    clip_size_of,
    fit_channels,
    preprocess_of,
)
from glovita_lib.encoder_torchvision import (
    construct,
    load_torchvision_file,
    published_torchvision,
    take_off_classifier,
)
from glovita_lib.errors import UserError
from glovita_lib.network import is_conv
from glovita_lib.spec_encoders import ClipEncoder, TorchvisionVideoEncoder
from glovita_lib.spec_lift import AXES
from glovita_lib.weights import LoadTarget

Size = tuple[int, ...]


def part(net: nn.Module, name: str) -> Any:
    """A module of a network, with the attributes that its library gave it."""
    return net.get_submodule(name)


# ------------------------------------------------------------------------------- the encoders


class ClipTrunk(Encoder):
    """A network of clips whose modules, one after another, make a map, and whose head pools it."""

    pathways: ClassVar[str] = "single"
    """Whether clips enter as they are, or as a slow and a fast pathway."""

    def __init__(
        self,
        net: nn.Module,
        *,
        chain: tuple[str, ...],
        tail: tuple[str, ...],
        stages: Mapping[str, str],
        axis: int,
        **facts: Any,
    ) -> None:
        """
        Args:
            chain: names of the modules that make the map, in order.
            tail: of those that make the vector before the classifier of it.
            stages: module of each stage.
            axis: number of the input's axis in the place of time.
            facts: see Encoder.
        """
        self.chain, self.tail, self.modules_of, self.axis = chain, tail, dict(stages), axis
        super().__init__(net, **facts)
        self.stage_names = tuple(stages)

    def forward_features(self, x: Tensor) -> Tensor:
        """Inputs (B, C, *size) -> map (B, D, t, h, w) or (B, t, h, w, D)."""
        return self.run(x.movedim(2 + self.axis, 2))

    def taken(self, size: tuple[int, ...]) -> dict[str, Any]:
        """Beside the rest the axis of time, by its number, and how clips enter."""
        return {**super().taken(size), "time_axis": self.axis, "pathway_mode": self.pathways}

    def run(self, x: Any) -> Any:
        """A clip through the modules of the map."""
        for name in self.chain:
            x = self.net.get_submodule(name)(x)
        return x

    def pool(self, raw: Tensor) -> Tensor:
        """Map -> what the network gives its last layer, the mean where that is a map, (B, D')."""
        x = raw.movedim(4, 1) if self.channels_last else raw
        for name in self.tail:
            x = self.net.get_submodule(name)(x)
        return x.flatten(2).mean(2) if x.ndim > 2 else x

    def to_tokens(self, raw: Tensor) -> Tensor:
        """Map of the network or of a block -> (B, N, D), in the order of the input's axes."""
        return super().to_tokens(self.as_input(raw))

    def grid(self, raw: Tensor, size: torch.Size) -> Size | None:
        """Sides of the map along the input's axes."""
        return super().grid(self.as_input(raw), size)

    def as_input(self, raw: Tensor) -> Tensor:
        """A map whose axes are in the order of the input's."""
        if raw.ndim < 5:
            return raw
        first = 1 if self.channels_last else 2
        return raw.movedim(first, first + self.axis)

    # ---------------------------------------------------------------- stages

    def stage(self, name: str) -> nn.Module:
        """The module that gives the map of a stage; other modules are named by their own names."""
        modules = dict(self.net.named_modules())
        path = self.modules_of.get(name, name)
        inside = any(f"{path}.".startswith(f"{link}.") for link in self.chain)
        if path not in modules or not inside:
            raise UserError(
                f"model.encoder.intermediate_names: {self.name} has no stage or module"
                f" {name!r}; stages: {', '.join(self.stage_names)}"
            )
        return modules[path]

    def stage_map(self, name: str, output: Any) -> Tensor:
        """What the module of a stage gives as a map (B, C, t, h, w), in the order of the input's
        axes.

        Raises:
            UserError: it is no map.
        """
        found = self.map_of(self.stage(name), output)
        if found is None:
            raise UserError(
                f"model.encoder.intermediate_names: {name!r} of {self.name} gives no map (B, C, t,"
                f" h, w); stages: {', '.join(self.stage_names)}"
            )
        if name not in self.modules_of:  # an activation behind it may work in place
            found = found.clone()
        return found.movedim(2, 2 + self.axis)

    def map_of(self, module: nn.Module, output: Any) -> Tensor | None:
        """What a module gives as a map (B, C, t, h, w); None where it is none."""
        if not isinstance(output, Tensor) or output.ndim != 5:
            return None
        return output.movedim(4, 1) if self.channels_last and not is_conv(module) else output


class MvitTrunk(ClipTrunk):
    """A multiscale vision transformer (Fan et al., "Multiscale Vision Transformers", ICCV 2021), of
    either library: a CLS token before the tokens of the clip, which become fewer on the way."""

    def run(self, x: Tensor) -> Tensor:
        """A clip -> final-normed tokens (B, 1 + N, D)."""
        embed, encoding, blocks, norm = (self.net.get_submodule(name) for name in self.chain)
        x = embed(x)  # (B, D, t, h, w)
        sides = tuple(x.shape[2:])
        x = encoding(x.flatten(2).mT)
        for block in blocks.children():
            x, sides = block(x, sides)
        return norm(x)

    def of_block(self, output: Any) -> Any:
        """Tokens of a block that gives their sides too."""
        return output[0] if isinstance(output, tuple) else output

    def pool(self, raw: Tensor) -> Tensor:
        """What the network gives its last layer, of the CLS token (B, D)."""
        x = raw[:, 0]
        for name in self.tail:
            x = self.net.get_submodule(name)(x)
        return x

    def grid(self, raw: Tensor, size: torch.Size) -> Size | None:
        """Sides of the tokens behind the block that has so many."""
        patches = raw.shape[1] - self.n_prefix
        return next((g for g in self.grids(size) if math.prod(g) == patches), None)

    def grids(self, size: torch.Size) -> list[Size]:
        """Sides of the tokens before the first block and behind each one."""
        embed, _, blocks, _ = (part(self.net, name) for name in self.chain)
        sides = tuple(
            (side + 2 * pad - kernel) // step + 1
            for side, kernel, step, pad in zip(
                size, embed.kernel_size, embed.stride, embed.padding, strict=True
            )
        )
        found = [sides]
        for block in blocks.children():
            if (pool := part(block, "attn").pool_q) is not None:
                conv = next(layer for layer in pool.modules() if is_conv(layer))
                # kernels are odd and padded by their half
                sides = tuple(-(-s // step) for s, step in zip(sides, conv.stride, strict=True))
            found.append(sides)
        return found

    def map_of(self, module: nn.Module, output: Any) -> Tensor | None:
        """The map of the tokens of a block without the CLS token, or of a convolution."""
        if isinstance(output, tuple) and len(output) == 2:
            tokens, sides = output
            return tokens[:, self.n_prefix :].mT.unflatten(2, tuple(sides))
        return super().map_of(module, output)


def encoder_arguments(
    spec: ClipEncoder, *, channels: int, size: Size, cls: bool = False, last: bool = False
) -> dict[str, Any]:
    """What every encoder of clips is made with."""
    return {
        "axis": AXES[spec.time_axis],
        "name": spec.type,
        "n_prefix": int(cls),
        "has_cls": cls,
        "channels_last": last,
        "input_shape": (1, channels, *size),
    }


def finished(encoder: ClipTrunk, spec: ClipEncoder) -> Encoder:
    """An encoder that gives the stages that its Struct asks for."""
    if spec.return_intermediates:
        names = spec.intermediate_names or encoder.stage_names
        encoder.return_stages(names)
        if missing := [name for name in names if name not in encoder.stage_shapes()]:
            raise UserError(
                f"model.encoder.intermediate_names: {missing[0]!r} of {spec.type} gives nothing by"
                f" itself; stages: {', '.join(encoder.stage_names)}"
            )
    return encoder


def default_size(spec: ClipEncoder) -> Size:
    """Clip, or volume, that an encoder is built for where nothing says which."""
    frames, *sides = clip_size_of(spec) or (16, 112, 112)
    axis = AXES[spec.time_axis]
    return (*sides[:axis], frames, *sides[axis:])


# --------------------------------------------------------------------------- other sizes
#
# Position embeddings of clips of one size are resampled to those of another: bilinear over rows and
# columns, linear over time. What a library cuts its pooling windows for, clips of the published
# size, is clipped for smaller ones.


class ClippedPool(nn.AvgPool3d):
    """A mean over windows, which are at most as large as the map."""

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.kernel_size
        sides = kernel if isinstance(kernel, tuple) else (kernel,) * 3
        window = [min(pair) for pair in zip(sides, input.shape[2:], strict=True)]
        return F.avg_pool3d(input, window, self.stride)


def fit_layers(module: nn.Module) -> None:
    """Let the poolings below a module take maps that are smaller than their windows, and put
    torch's own in the place of pytorchvideo's Swish, whose backward pass is deprecated."""
    for name, child in module.named_children():
        if isinstance(child, nn.AvgPool3d):
            setattr(module, name, ClippedPool(child.kernel_size, child.stride))
        elif type(child).__name__ == "Swish":
            setattr(module, name, nn.SiLU())
        else:
            fit_layers(child)


def resampled(positions: Tensor, old: Size, new: Size) -> Tensor:
    """Position embedding (..., N, D) of a grid of one or two axes for another one."""
    if old == new:
        return positions
    *before, _, width = positions.shape
    grid = positions.reshape(1, *old, width).movedim(-1, 1).float()  # (1, D, *old)
    mode = "linear" if len(old) == 1 else "bilinear"
    fitted = F.interpolate(grid, new, mode=mode, align_corners=False)
    return fitted.flatten(2).mT.reshape(*before, -1, width).to(positions.dtype)


def grid_of(count: int, like: Size) -> Size:
    """Rows and columns of so many places: a square, or else in the proportion of a grid.

    Raises:
        ValueError: neither comes to so many places.
    """
    rows = math.isqrt(count)
    if rows**2 == count:
        return (rows, rows)
    rows = round(math.sqrt(count * like[0] / like[1]))
    if not rows or count % rows:
        raise ValueError(f"a position embedding of {count} places is no grid like {like}")
    return (rows, count // rows)


def load_clips(
    net: nn.Module, tensors: Mapping[str, Tensor], *, first: tuple[str, ...], grid: Size | None
) -> None:
    """Load tensors under their library's names, kernels fitted to the channels of the input and
    position embeddings to its size.

    Args:
        first: names of the convolutions that see the input.
        grid: sides (t, h, w) of the tokens that have position embeddings.
    """
    own, named = net.state_dict(), dict(tensors)
    for key in (f"{name}.weight" for name in first):
        if key in named and named[key].shape[1] != own[key].shape[1]:
            named[key] = fit_rgb(named[key], own[key].shape[1])
    for key, value in named.items():
        if grid is None or key not in own or value.shape == own[key].shape:
            continue
        if key.endswith(("temporal_pos", "pos_embed_temporal")):
            named[key] = resampled(value, (value.shape[-2],), grid[:1])
        elif key.endswith(("spatial_pos", "pos_embed_spatial")):
            named[key] = resampled(value, grid_of(value.shape[-2], grid[1:]), grid[1:])
    net.load_state_dict(named)


def fit_rgb(kernel: Tensor, channels: int) -> Tensor:
    """A first kernel (D, C, *sides) for other channels, as timm fits those of images: summed for
    one channel, else repeated and scaled by C / channels."""
    taken = kernel.shape[1]
    if channels == 1:
        return kernel.sum(1, keepdim=True)
    repeated = kernel.repeat(1, -(-channels // taken), *(1,) * (kernel.ndim - 2))
    return repeated[:, :channels] * (taken / channels)


# -------------------------------------------------------------------------------- torchvision

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
CHAINS: dict[str, tuple[tuple[str, ...], ...]] = {
    "s3d": (
        ("features",),
        ("avgpool", "classifier"),
        ("features.0", "features.3", "features.6", "features.12", "features.15"),
    ),
    "swin3d": (
        ("patch_embed", "pos_drop", "features", "norm"),
        ("avgpool",),
        ("patch_embed", "features.0", "features.2", "features.4", "features.6"),
    ),
}
"""Modules that make the map, modules that pool it, and modules of the stages; ResNets have those of
their stages."""


def load_target(encoder: ClipTrunk, classifier: str, grid: Size | None = None) -> LoadTarget:
    """How files come into an encoder of clips."""
    first = first_convolutions(encoder.net)
    loading = partial(load_clips, first=first, grid=grid)
    return LoadTarget(encoder.net, loading, (classifier,), first_conv=first)


def first_convolutions(net: nn.Module) -> tuple[str, ...]:
    """Names of the convolutions that see the input: one, or one a pathway."""
    convs = [name for name, module in net.named_modules() if is_conv(module)]
    pathways = [name for name in convs if name.startswith("blocks.0.multipathway_blocks.")]
    return tuple(pathways or convs[:1])


def widen(net: nn.Module, channels: int) -> None:
    """Give the first convolution the input's channels, with new weights."""
    (name,) = first_convolutions(net)
    conv = net.get_submodule(name)
    assert isinstance(conv, nn.Conv3d), "torchvision's networks of clips begin with a convolution"
    if conv.in_channels != channels:
        conv.in_channels = channels
        conv.weight = nn.Parameter(torch.empty(conv.out_channels, channels, *conv.kernel_size))
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def fit_positions(net: nn.Module, size: Size) -> Size:
    """Make the positions of torchvision's MViT those of clips of a size; sides of their grid."""
    conv, encoding = part(net, "conv_proj"), part(net, "pos_encoding")
    with torch.no_grad():
        grid = tuple(conv(torch.zeros(1, conv.in_channels, *size)).shape[2:])
    old = (encoding.temporal_size, *encoding.spatial_size)
    for name, axes in (("temporal_pos", slice(0, 1)), ("spatial_pos", slice(1, 3))):
        if getattr(encoding, name) is not None:
            fitted = resampled(encoding.get_parameter(name).detach(), old[axes], grid[axes])
            setattr(encoding, name, nn.Parameter(fitted))
    encoding.temporal_size, encoding.spatial_size = grid[0], grid[1:]
    return grid


def mvit_stages(blocks: nn.Module, first: str) -> dict[str, str]:
    """The module of each stage: the patch embedding, and the last block of each resolution."""
    steps = [number for number, block in enumerate(blocks.children()) if halves(block)]
    ends = [number - 1 for number in steps] + [len(list(blocks.children())) - 1]
    return {"stem": first} | {f"layer{i}": f"blocks.{end}" for i, end in enumerate(ends, 1)}


def halves(block: nn.Module) -> bool:
    """Whether a block of an MViT makes tokens fewer."""
    pool = part(block, "attn").pool_q
    return pool is not None and any(math.prod(c.stride) > 1 for c in pool.modules() if is_conv(c))


def torchvision_trunk(
    spec: TorchvisionVideoEncoder, net: nn.Module, classifier: str, facts: dict[str, Any]
) -> ClipTrunk:
    """The encoder around a network of torchvision without its classifier."""
    grid = None
    if spec.type.startswith("mvit"):
        grid = fit_positions(net, facts["input_shape"][2:])
        trunk: ClipTrunk = MvitTrunk(
            net,
            chain=("conv_proj", "pos_encoding", "blocks", "norm"),
            tail=("head",),
            stages=mvit_stages(net.get_submodule("blocks"), "conv_proj"),
            **facts,
        )
    else:
        fit_layers(net)
        kind = "swin3d" if spec.type.startswith("swin3d") else spec.type
        chain, tail, paths = CHAINS.get(kind, (STAGES, ("avgpool",), STAGES))
        stages = dict(zip(STAGES, paths, strict=True))
        trunk = ClipTrunk(net, chain=chain, tail=tail, stages=stages, **facts)
    trunk.load_target = load_target(trunk, classifier, grid)
    return trunk


@build_encoder.register
def _(
    spec: TorchvisionVideoEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    import torchvision

    check_channels(spec, channels)
    net = construct(torchvision.models.get_model_builder(spec.type), spec.model_kwargs, spec)
    widen(net, channels)
    classifier = take_off_classifier(net)
    kind = {"cls": spec.type.startswith("mvit"), "last": spec.type.startswith("swin3d")}
    size = size or default_size(spec)
    facts = encoder_arguments(spec, channels=channels, size=size, **kind)
    encoder = torchvision_trunk(spec, net, classifier, facts)
    if load_weights:
        note = load_torchvision_file(encoder.load_target, spec)
        encoder.notes += () if note is None else (note,)
    return finished(encoder, spec)


@preprocess_of.register
def _(spec: TorchvisionVideoEncoder, *, channels: int) -> Preprocess:
    check_channels(spec, channels)
    preset = published_torchvision(spec).transforms()
    return preprocess_of_clips(
        spec,
        side=preset.crop_size[0],
        resize=min(preset.resize_size),
        mean=fit_channels(preset.mean, channels),
        std=fit_channels(preset.std, channels),
    )


def preprocess_of_clips(
    spec: ClipEncoder,
    *,
    side: int,
    resize: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Preprocess:
    """Input convention of published weights; the size only where weights or positions ask for
    one."""
    fixed = spec.type.startswith("mvit")
    sized = fixed or spec.pretrained or spec.weights is not None
    return Preprocess(
        image_size=side if sized else None,
        crop_pct=Fraction(side, resize),
        interpolation="bilinear",
        mean=mean,
        std=std,
        fixed_size=fixed,
    )


@clip_size_of.register
def _(spec: TorchvisionVideoEncoder) -> tuple[int, int, int] | None:
    side = 112 if spec.type.endswith("_18") else 224
    return (16, side, side)
