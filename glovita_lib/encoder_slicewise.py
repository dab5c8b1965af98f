"""Encoders on larger samples than their networks take: of images slice by slice, or frame by frame,
or with kernels inflated to three axes, of volumes window by window.

B batch, C channels, X Y Z voxels, N voxels along the axis of the slices, S slices of a volume, H W
pixels of a slice, D width. A clip (T, H, W) is a volume here whose slices along the first axis are
its frames.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recomputed

from glovita_lib import network
from glovita_lib.augment_patch import Volumes, WindowGrid
from glovita_lib.encoder import (
    Encoder,
    Features,
    build_encoder,
    check_channels,
    evaluating,
    lift_encoder,
    patch_size_of,
)
from glovita_lib.encoder_aggregation import aggregate, output_width, reads_pooled, resolve_method
from glovita_lib.errors import UserError, listed
from glovita_lib.spec_encoders import ImageEncoder, LibraryEncoder
from glovita_lib.spec_lift import AXES, Axis, BaseEncoder, Inflation, Slices, Windows
from glovita_lib.weights import LoadTarget, load_file, read_networks

if TYPE_CHECKING:
    from glovita_lib.bags import Bags  # who reads volumes need not load it

Size = tuple[int, ...]

# ------------------------------------------------------------------------------------- parts
#
# The vectors of the parts of a volume are its tokens, so that heads of bags, extraction and
# attention maps take them for instances.


class PartwiseEncoder(Encoder):
    """An encoder that reads the parts of a volume, each of which becomes a token.

    `net` is the network of the encoder of parts under its own names, so that PEFT methods, weights
    and adapters are those of it.
    """

    at_once: int
    """Parts that pass an encoder that does not train, unless the spec says."""
    inner: tuple[Encoder]
    """The encoder of parts; in a tuple, as a child would double the names of `net`."""

    def __init__(self, inner: Encoder, spec: Slices | Windows, key: str, input_shape: Size) -> None:
        self.inner, self.chunk = (inner,), spec.chunk
        self.method = part_method(spec, inner, key)
        """How the tokens of a part become its vector."""
        super().__init__(
            inner.net,
            name=inner.name,
            n_prefix=0,
            has_cls=False,
            channels_last=False,
            input_shape=input_shape,
        )
        self.load_target, self.notes, self.parts = inner.load_target, inner.notes, key

    @property
    def of_parts(self) -> Encoder:
        return self.inner[0]

    def inspect(self, input_shape: Size) -> None:
        """Facts follow from those of the encoder of parts; layers behind a pooling that its parts
        do not pass are frozen."""
        (inner,) = self.inner
        self.layout, self.has_tokens, self.has_patches = 3, True, True
        self.has_few_tokens, self.patch = True, inner.patch
        self.pooling, self.plain = "avg", True
        self.width = self.pooled_width = output_width(inner, self.method)
        self.adopt_layers(inner)
        if not reads_pooled(self.method, inner):
            for name in inner.pooling_parameters:
                inner.net.get_parameter(name).requires_grad_(False)

    def encoded(self, count: int, cut: Callable[[Tensor], Tensor]) -> Tensor:
        """Vectors (count, D) of parts, a chunk at a time.

        Args:
            cut: numbers (n,) of parts -> inputs (n, C, ...) of the encoder of parts.
        """
        numbers = torch.arange(count)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.net.parameters())
        chunk = self.chunk or (count if trains else self.at_once)
        vectors = []
        for part in numbers.split(chunk):
            inputs = cut(part)
            if trains and chunk < count:
                contexts = partial(recomputing, self.net)
                vectors.append(
                    recomputed(self.vectors, inputs, use_reentrant=False, context_fn=contexts)
                )
            else:
                vectors.append(self.vectors(inputs))
        return torch.cat(vectors)

    def taken(self, size: Size) -> dict[str, Any]:
        """What is taken of the parts, under their key, beside what the encoder of parts takes."""
        (inner,) = self.inner
        chunks = {"training": self.chunk or "all", "evaluation": self.chunk or self.at_once}
        parts = {"aggregation": self.method, "chunk": chunks, **self.parts_of(size)}
        return {**inner.taken(inner.input_shape[2:]), str(self.parts): parts}

    def parts_of(self, size: Size) -> dict[str, Any]:
        """Which parts a sample of this size is read in."""
        raise NotImplementedError

    def vectors(self, inputs: Tensor) -> Tensor:
        """One vector of each part, (n, D)."""
        (inner,) = self.inner
        features = inner(inputs, pooled=reads_pooled(self.method, inner))
        return aggregate(features, self.method)

    def pool(self, raw: Tensor) -> Tensor:
        """Mean of the vectors of the parts, (B, D)."""
        return raw.mean(1)


def part_method(spec: Slices | Windows, inner: Encoder, key: str) -> str:
    """How the tokens of a part become its vector.

    Raises:
        UserError: the encoder of parts cannot serve the method asked for.
    """
    try:
        return resolve_method(spec.aggregation, inner)
    except UserError as error:
        asked = "model.feature_aggregation_method"
        raise UserError(str(error).replace(asked, f"model.encoder.{key}.aggregation")) from None


def recomputing(net: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a chunk's forward pass and of its repetition, in which batch norms in training
    leave their running statistics alone: these have seen the chunk."""
    return nullcontext(), keeping_statistics(net)


@contextmanager
def keeping_statistics(net: nn.Module) -> Iterator[None]:
    """Inside, batch norms update neither running statistics nor their counters."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training]
    was = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, was, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


# ------------------------------------------------------------------------------------ slices

FRAMES = "frames"  # the stage that the vectors of all slices are


class SlicewiseEncoder(PartwiseEncoder):
    """An encoder of images that reads the slices of a volume."""

    at_once = 64

    def __init__(self, inner: Encoder, spec: Slices, input_shape: Size) -> None:
        self.axis = AXES[spec.axis]
        self.spec = spec
        super().__init__(inner, spec, "slices", input_shape)
        self.coords_text = (
            "slice: voxel along the axis that slices lie across, of the encoder's input, from 0"
        )
        if spec.axis == "t":
            self.coords_text = "frame: of the clip, from 0"
        self.stage_names = (FRAMES,)

    def forward(self, x: "Tensor | Bags", *, pooled: bool = True) -> Any:
        """Features of volumes (B, C, X, Y, Z); bags of vectors, encoded before, as they are."""
        return super().forward(x, pooled=pooled) if isinstance(x, Tensor) else x

    def features_of(self, raw: Tensor, size: torch.Size, *, pooled: bool) -> Features:
        """Tokens (B, S, D), the vectors of the slices, at `places`, voxels along the axis."""
        features = super().features_of(raw, size, pooled=pooled)
        features.places = (self.places(size[self.axis]).numpy()[:, None],) * len(raw)
        if self.returned:
            along = raw.mT[..., None, None]  # (B, D, S, 1, 1)
            features.intermediates = {FRAMES: along.movedim(2, 2 + self.axis)}
        return features

    @contextmanager
    def taking_stages(self) -> Iterator[dict[str, Tensor]]:
        """Nothing to take: the stage is the output."""
        yield {}

    def stage(self, name: str) -> nn.Module:
        """The network, whose outputs for all slices are the only stage."""
        if name != FRAMES:
            raise UserError(
                f"{self.name} in slices has no stage {name!r}; its only one is {FRAMES!r}"
            )
        return self.net

    def parts_of(self, size: Size) -> dict[str, Any]:
        """Axis and, of this size, places of the slices and their sides."""
        sides = self.spec.size or [s for number, s in enumerate(size) if number != self.axis]
        places = self.places(size[self.axis]).tolist()
        return {"axis": self.spec.axis, "places": places, "size": list(sides)}

    def places(self, voxels: int) -> Tensor:
        """Voxels (S,) along the axis at which the slices of a volume lie."""
        stride, count = self.spec.stride, self.spec.count
        if stride is None:
            count = min(count or voxels, voxels)
            return (2 * torch.arange(count) + 1) * voxels // (2 * count)
        found = 1 + (voxels - 1) // stride
        count = min(count or found, found)
        first = (voxels - 1 - (count - 1) * stride) // 2
        return first + stride * torch.arange(count)

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, C, X, Y, Z) -> vectors of their slices (B, S, D)."""
        volumes = x.movedim(2 + self.axis, 1)  # (B, N, C, H, W)
        places = self.places(volumes.shape[1])  # (S,)

        def cut(part: Tensor) -> Tensor:
            return self.images(volumes, part // len(places), places[part % len(places)])

        vectors = self.encoded(len(x) * len(places), cut)
        return vectors.unflatten(0, (len(x), len(places)))

    def images(self, volumes: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Slices of volumes (B, N, C, H, W) at places (n,) of the volumes rows (n,), as the encoder
        of images takes them, (n, C, H', W') or (n, 3C, H', W')."""
        rows, places = (each.to(volumes.device, non_blocking=True) for each in (rows, places))
        if self.spec.adjacent:
            last = volumes.shape[1] - 1
            near = torch.stack([places - 1, places, places + 1], 1).clamp(0, last)  # (n, 3)
            images = volumes[rows[:, None], near].transpose(1, 2).flatten(1, 2)  # (n, 3C, H, W)
        else:
            images = volumes[rows, places]  # (n, C, H, W)
        if self.spec.size is None or images.shape[2:] == self.spec.size:
            return images
        return F.interpolate(images, self.spec.size, mode="bilinear", antialias=True)

    def grid(self, raw: Tensor, size: torch.Size) -> Size:
        """Number of slices."""
        return (raw.shape[1],)


@lift_encoder.register
def _(
    lift: Slices, spec: ImageEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    taken = 3 * channels if lift.adjacent else channels
    sides = None if size is None else across(size, lift.axis)
    inner = build_encoder(
        of_images(spec), channels=taken, size=lift.size or sides, load_weights=load_weights
    )
    return SlicewiseEncoder(inner, lift, (1, channels, *(size or ())))


def of_images(spec: ImageEncoder) -> ImageEncoder:
    """The section without its lift; its channels are those of a slice."""
    return replace(spec, lift=None, slices=Slices(), inflation=Inflation(), input_channels=None)


def across(size: Size, axis: Axis | None) -> Size:
    """Sides of a volume but that along an axis."""
    return tuple(side for number, side in enumerate(size) if number != AXES[axis])


# ----------------------------------------------------------------------------------- windows


class WindowsEncoder(PartwiseEncoder):
    """An encoder of volumes that reads the windows of larger ones, which may differ in size."""

    at_once = 16

    def __init__(
        self, inner: Encoder, spec: Windows, windows: WindowGrid, input_shape: Size
    ) -> None:
        self.windows, self.skip_below = windows, spec.skip_below
        super().__init__(inner, spec, "windows", input_shape)
        self.coords_text = "window: its first voxel x, y, z of the encoder's input, from 0"

    def forward(self, x: "Tensor | Volumes | Bags", *, pooled: bool = True) -> Any:
        """Features of volumes (B, C, X, Y, Z), or each of its own size: tokens (B, N, D), the
        vectors of the windows, masked where a volume has fewer, at `places`, their first voxels.
        Bags of vectors, encoded before, as they are."""
        if not isinstance(x, Tensor | Volumes):
            return x
        volumes = list(x)
        places = [self.places(volume) for volume in volumes]
        vectors = self.of_windows(volumes, places)  # (M, D)
        counts = torch.tensor([len(part) for part in places])
        most = int(counts.max())
        mask = None
        tokens = vectors
        if (counts < most).any():
            mask = (torch.arange(most) < counts[:, None]).to(vectors.device)  # (B, N)
            tokens = vectors.new_zeros(len(counts) * most, vectors.shape[1])
            tokens = tokens.masked_scatter(mask.flatten()[:, None], vectors)
        tokens = tokens.unflatten(0, (len(counts), most))
        features = Features(tokens, None, 0, False, None, self.pooling, mask, tuple(places))
        # the mean over the real tokens alone
        features.pooled = tokens.mean(1) if mask is None else aggregate(features, "avg")
        return features

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, C, X, Y, Z) -> vectors of all their windows (B, N, D)."""
        places = [self.windows.starts(x.shape[2:])] * len(x)
        return self.of_windows(list(x), places).unflatten(0, (len(x), -1))

    def of_windows(self, volumes: Sequence[Tensor], places: Sequence[np.ndarray]) -> Tensor:
        """Vectors (M, D) of the windows that begin at places (N, 3) of each volume."""
        wanted = [(row, at) for row, starts in enumerate(places) for at in starts.tolist()]

        def cut(part: Tensor) -> Tensor:
            chosen = (wanted[number] for number in part.tolist())
            return torch.stack([self.windows.cut(volumes[row], at) for row, at in chosen])

        return self.encoded(len(wanted), cut)

    def places(self, volume: Tensor) -> np.ndarray:
        """First voxels (N, 3) of the windows of a volume (C, X, Y, Z) that are not empty; of all
        where all are."""
        starts = self.windows.starts(volume.shape[1:])
        if self.skip_below is None:
            return starts
        highest = [self.windows.cut(volume, at).amax() for at in starts.tolist()]
        filled = (torch.stack(highest) > self.skip_below).cpu().numpy()
        return starts[filled] if filled.any() else starts

    def parts_of(self, size: Size) -> dict[str, Any]:
        """Sides and steps of the windows, and how many a volume of this size has."""
        windows = self.windows
        return {
            "size": list(windows.size),
            "stride": list(windows.stride),
            "count": windows.count(size),
        }

    def most_tokens(self, size: Size) -> int | None:
        """Windows of a volume of this size."""
        return self.windows.count(size)

    def grid(self, raw: Tensor, size: torch.Size) -> None:
        """They are no grid, as volumes have sizes of their own."""


@lift_encoder.register
def _(
    lift: Windows, spec: BaseEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    single = replace(spec, lift=None, windows=Windows())
    taken = lift.size or patch_size_of(spec)
    if taken is None:
        raise UserError("model.encoder.windows.size: name the voxels of a window, as [64, 64, 64]")
    inner = build_encoder(single, channels=channels, size=taken, load_weights=load_weights)
    x, y, z = taken
    grid = WindowGrid.overlapping((x, y, z), lift.overlap)
    if lift.stride is not None:
        grid = WindowGrid((x, y, z), lift.stride)
    return WindowsEncoder(inner, lift, grid, (1, channels, *(size or taken)))


# --------------------------------------------------------------------------------- inflation
#
# Layers of a convolutional network get a third, last axis (Carreira, Zisserman, "Quo vadis, action
# recognition?", CVPR 2017). Along it convolutions see the border voxel beyond the border, no zeros,
# so that a volume that is constant along the axis gives what its slice gives as an image, in every
# voxel of every map; that is computed once when the encoder is built.

SMALL = 64  # voxels of a side up to which the check computes
TOLERANCE = 1e-3  # of the check in float32, in proportion to the largest value


class InflatedConv(nn.Conv3d):
    """A convolution that continues its input beyond both ends of the last axis."""

    ends: int

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        reach = self.dilation[2] * (self.kernel_size[2] - 1) + 1
        padded = continued(input, self.ends, reach)
        return F.conv3d(padded, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class InflatedPool(nn.Module):
    """A mean or maximum over windows of images, then over those of the last axis, which is
    continued beyond both ends."""

    def __init__(self, pool: nn.AvgPool2d | nn.MaxPool2d) -> None:
        super().__init__()
        side, step = third(pair(pool.kernel_size)), third(pair(pool.stride))
        rows, columns = pair(pool.padding)
        self.ends = rows if rows == columns and side > 1 else 0
        self.images, self.reach = pool, side
        self.along: nn.Module
        if isinstance(pool, nn.MaxPool2d):
            dilation = third(pair(pool.dilation))
            self.reach = dilation * (side - 1) + 1
            self.along = nn.MaxPool1d(side, step, 0, dilation, ceil_mode=pool.ceil_mode)
        else:
            self.along = nn.AvgPool1d(side, step, 0, pool.ceil_mode, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W, N) -> (B, C, h, w, n)."""
        slices = x.movedim(4, 1)  # (B, N, C, H, W)
        y = self.images(slices.flatten(0, 1)).unflatten(0, slices.shape[:2]).movedim(1, 4)
        y = continued(y, self.ends, self.reach)  # (B, C, h, w, N')
        return self.along(y.flatten(0, 3)).unflatten(0, y.shape[:4])


def continued(x: Tensor, ends: int, least: int) -> Tensor:
    """A map (B, C, H, W, N) with its border voxels again beyond both ends of the last axis, and
    beyond its end until there are `least`."""
    missing = max(0, least - x.shape[4] - 2 * ends)
    return F.pad(x, (ends, ends + missing, 0, 0, 0, 0), mode="replicate")


def lifted(value: Any) -> tuple[int, int, int]:
    """A number for each of three axes."""
    return (*pair(value), third(pair(value)))


def pair(value: Any) -> tuple[int, int]:
    """A number for each of two axes."""
    return tuple(value) if isinstance(value, tuple) else (value, value)


def third(sides: tuple[int, int]) -> int:
    """What the third axis gets: what both others have, else 1."""
    return sides[0] if sides[0] == sides[1] else 1


def inflate_conv(conv: nn.Conv2d, how: str) -> nn.Module:
    """A convolution with kernels of three axes; no such padding as reflection has a third."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise TypeError(f"it has a convolution with padding {conv.padding_mode} {conv.padding}")
    kernel, (rows, columns) = lifted(conv.kernel_size), pair(conv.padding)
    with torch.device("meta"):
        new = InflatedConv(
            conv.in_channels,
            conv.out_channels,
            kernel,
            lifted(conv.stride),
            (rows, columns, 0),
            lifted(conv.dilation),
            conv.groups,
            bias=False,
        )
    new.ends = third((rows, columns)) if kernel[2] > 1 and rows == columns else 0
    weight = inflated(conv.weight.detach(), kernel[2], how)
    new.weight, new.bias = nn.Parameter(weight, conv.weight.requires_grad), conv.bias
    return new


def inflated(kernel: Tensor, depth: int, how: str) -> Tensor:
    """A kernel (D, C, h, w) along a third axis, (D, C, h, w, depth), of the same sum over it."""
    if how == "mean":
        return kernel[..., None].expand(*kernel.shape, depth) / depth
    found = kernel.new_zeros(*kernel.shape, depth)
    found[..., depth // 2] = kernel
    return found


class Unfolded(nn.Module):
    """First base of the class of a layer that works voxel by voxel, or on all of them alike."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W, N) -> the same; the layer sees two axes."""
        y: Tensor = super().forward(x.flatten(3))
        return y.unflatten(3, x.shape[3:])


UNFOLDED: dict[type[nn.Module], type[nn.Module]] = {}
"""Classes of layers with Unfolded before them."""


def unfolded(layer: nn.Module) -> bool:
    """Whether a layer is such a one: a batch or layer norm of maps, with whatever is inside it."""
    of_maps = isinstance(layer, nn.LayerNorm) and type(layer) is not nn.LayerNorm
    return isinstance(layer, nn.BatchNorm2d | nn.Dropout2d) or of_maps


def inflate_layer(layer: nn.Module, how: str) -> nn.Module:
    """A layer for maps of three axes; itself where it has no axes.

    Raises:
        TypeError: the layer cannot be lifted.
    """
    kind = type(layer)
    if unfolded(layer):
        if kind not in UNFOLDED:
            UNFOLDED[kind] = type(kind.__name__, (Unfolded, kind), {})
        layer.__class__ = UNFOLDED[kind]
    elif isinstance(layer, nn.Conv2d) and kind is nn.Conv2d:
        return inflate_conv(layer, how)
    elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) and kind in (nn.MaxPool2d, nn.AvgPool2d):
        return InflatedPool(layer)
    elif isinstance(layer, nn.AdaptiveAvgPool2d) and pair(layer.output_size) == (1, 1):
        return nn.AdaptiveAvgPool3d(1)
    elif isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        raise TypeError(f"it has a layer {layer}")
    return layer


class InflatedEncoder(Encoder):
    """A convolutional encoder of images whose kernels have a third axis.

    Inside, the axis that it lacked is the last; tokens and grid are in the order of the volume's.
    """

    image: tuple[Encoder]
    """The encoder whose network was inflated, in a tuple as above."""

    def __init__(self, inner: Encoder, spec: Inflation, input_shape: Size) -> None:
        self.image, self.spec = (inner,), spec
        self.axis = AXES[spec.axis]
        super().__init__(
            inner.net,
            name=inner.name,
            n_prefix=0,
            has_cls=False,
            channels_last=False,
            input_shape=input_shape,
        )
        how = partial(load_inflated, how=spec.kernel)
        self.load_target = LoadTarget(inner.net, how, taken=inner.load_target.taken)
        self.notes = inner.notes
        if inner.pooling != "avg":
            for name in inner.pooling_parameters:
                inner.net.get_parameter(name).requires_grad_(False)

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, C, X, Y, Z) -> map (B, D, h, w, n), the lifted axis last."""
        (inner,) = self.image
        return inner.forward_features(x.movedim(2 + self.axis, 4))

    def taken(self, size: Size) -> dict[str, Any]:
        """Beside the rest the axis that kernels did not have."""
        return {**super().taken(size), "inflation": {"axis": self.spec.axis}}

    def pool(self, raw: Tensor) -> Tensor:
        """What the library makes of the mean of a map, else the mean, (B, D')."""
        (inner,) = self.image
        mean = raw.flatten(2).mean(2)  # (B, D)
        return inner.pool(mean[..., None, None]) if inner.pooling == "avg" else mean

    def to_tokens(self, raw: Tensor) -> Tensor:
        """Map of the network or of a block -> (B, N, D), in the order of the volume's axes."""
        return super().to_tokens(raw.movedim(4, 2 + self.axis))

    def grid(self, raw: Tensor, size: torch.Size) -> Size:
        """Sides of the map along the volume's axes."""
        return tuple(raw.movedim(4, 2 + self.axis).shape[2:])


def load_inflated(net: nn.Module, tensors: Mapping[str, Tensor], *, how: str) -> None:
    """Load tensors of an inflated network, or of the network of images that it was."""
    own = net.state_dict()
    fitted = {
        name: inflated(tensor, own[name].shape[4], how)
        if name in own and own[name].ndim == 5 and tensor.ndim == 4
        else tensor
        for name, tensor in tensors.items()
    }
    net.load_state_dict(fitted)


def inflate(inner: Encoder, how: str, image: Tensor, depth: int) -> None:
    """Lift what a map passes in the network of an encoder; layers behind it keep two axes.

    Raises:
        UserError: it gives no map, has layers that cannot be lifted, or gives something else for a
            volume (1, C, H, W, depth) that is constant along its last axis than for its slice.
    """
    cannot = f'model.encoder.lift = "inflate": {inner.name} cannot be inflated, '
    passed: dict[str, nn.Module] = {}
    hooks = [
        layer.register_forward_hook(lambda m, i, o, name=name: passed.update({name: m}))
        for name, layer in inner.net.named_modules()
        if unfolded(layer) or not any(True for _ in layer.children())
    ]
    try:
        expected = inner.forward_features(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(expected, Tensor) or expected.ndim != 4 or inner.channels_last:
        raise UserError(f'{cannot}its features are no maps of channels; lift = "slices" can')
    try:
        for name, layer in passed.items():
            parent, _, child = name.rpartition(".")
            setattr(inner.net.get_submodule(parent), child, inflate_layer(layer, how))
    except TypeError as error:
        raise UserError(f'{cannot}{error}; lift = "slices" can') from None
    try:
        found = inner.forward_features(image[..., None].expand(*image.shape, depth))
    except (TypeError, RuntimeError, ValueError, IndexError, AssertionError):
        told = f"between its layers it works on images alone, or {depth} voxels are too few for it"
        raise UserError(f'{cannot}{told}; lift = "slices" can') from None
    same = found.ndim == 5 and found.shape[:4] == expected.shape
    if not same or (found - expected[..., None]).abs().max() > TOLERANCE * expected.abs().max():
        raise UserError(
            f"{cannot}as a volume without change along the axis does not give what its slice gives;"
            ' lift = "slices" can'
        )


@lift_encoder.register
def _(
    lift: Inflation, spec: ImageEncoder, *, channels: int, size: Size | None, load_weights: bool
) -> Encoder:
    check_channels(spec, channels)
    size = size or (SMALL,) * 3
    sides = across(size, lift.axis)
    file, key = None, None
    if load_weights and isinstance(spec, LibraryEncoder) and are_inflated(spec.weights):
        file, key = spec.weights, spec.weights_key
    reads = load_weights and file is None
    inner = build_encoder(of_images(spec), channels=channels, size=sides, load_weights=reads)
    if network.attentions(inner.net):
        names = listed([name for name, _, _ in network.attentions(inner.net)], 1)
        raise UserError(
            f'model.encoder.lift = "inflate": {inner.name} has attention ({names}), only'
            ' convolutional networks can be inflated; lift = "slices" can'
        )
    shape = (1, channels, *(min(side, SMALL) for side in sides))
    depth = min(size[AXES[lift.axis]], SMALL)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), evaluating(inner):
        inflate(inner, lift.kernel, image, depth)
    encoder = InflatedEncoder(inner, lift, (1, channels, *size))
    if file is not None:
        note = load_file(encoder.load_target, file, key=key)
        encoder.notes += () if note is None else (note,)
    return encoder


def are_inflated(path: str | None) -> bool:
    """Whether a file of weights has kernels of three axes, as that of a run with this lift."""
    if path is None:
        return False
    tensors = (t for network in read_networks(path) for t in network.tensors.values())
    return any(tensor.ndim == 5 for tensor in tensors)
