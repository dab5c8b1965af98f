"""Convolutional encoders of images whose kernels get a third axis, so that they read volumes.

B batch, C channels, X Y Z voxels of a volume, H W rows and columns of an image, N voxels along the
axis that kernels did not have, D width.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from glovita_lib import network
from glovita_lib.encoder import (
    Encoder,
    build_encoder,
    check_channels,
    evaluating,
    lift_encoder,
)
from glovita_lib.encoder_slicewise import across, of_images
from glovita_lib.errors import UserError, listed
from glovita_lib.spec_encoders import ImageEncoder, LibraryEncoder
from glovita_lib.spec_lift import AXES, Inflation
from glovita_lib.weights import LoadTarget, load_file, read_networks

Size = tuple[int, ...]

# Layers of a convolutional network get a third, last axis (Carreira, Zisserman, "Quo vadis, action
# recognition?", CVPR 2017). Along it convolutions see the border voxel beyond the border, no zeros,
# so that a volume that is constant along the axis gives what its slice gives as an image, in every
# voxel of every map; that is computed once when the encoder is built. What is over all places of a
# map, as the mean of squeeze-and-excitation, is over those of all three axes.

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
            sides, steps, apart = (1, 1, side), (1, 1, step), (1, 1, dilation)
            self.along = nn.MaxPool3d(sides, steps, 0, apart, ceil_mode=pool.ceil_mode)
        else:
            self.along = nn.AvgPool3d((1, 1, side), (1, 1, step), 0, pool.ceil_mode, False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W, N) -> (B, C, h, w, n)."""
        slices = x.movedim(4, 1)  # (B, N, C, H, W)
        y = self.images(slices.flatten(0, 1)).unflatten(0, slices.shape[:2]).movedim(1, 4)
        return self.along(continued(y, self.ends, self.reach))


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
    """First base of the class of a layer that works voxel by voxel, or on all of them alike: of one
    map, or of several in a stack."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H, W, N) -> the same; the layer sees two axes. A vector stays one."""
        y: Tensor = super().forward(x.flatten(-2))
        if y.ndim < 4:
            return y
        return y.unsqueeze(-1) if y.shape[-2:] == (1, 1) else y.unflatten(-1, x.shape[-2:])


UNFOLDED: dict[type[nn.Module], type[nn.Module]] = {}
"""Classes of layers with Unfolded before them."""


def unfold(layer: nn.Module) -> None:
    """Give a layer the class with Unfolded before its own."""
    kind = type(layer)
    if kind not in UNFOLDED:
        UNFOLDED[kind] = type(kind.__name__, (Unfolded, kind), {})
    layer.__class__ = UNFOLDED[kind]


def unfolded(layer: nn.Module) -> bool:
    """Whether a layer is such a one: a batch or layer norm of maps, with whatever is inside it."""
    of_maps = isinstance(layer, nn.LayerNorm) and type(layer) is not nn.LayerNorm
    return isinstance(layer, nn.BatchNorm2d | nn.Dropout2d) or of_maps


OF_IMAGES = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
"""Layers with two axes, which are lifted or cannot be."""


def inflate_layer(layer: nn.Module, how: str) -> nn.Module:
    """A layer for maps of three axes; itself where it has no axes.

    Raises:
        TypeError: the layer cannot be lifted.
    """
    kind = type(layer)
    if unfolded(layer):
        unfold(layer)
    elif isinstance(layer, nn.Conv2d) and kind is nn.Conv2d:
        return inflate_conv(layer, how)
    elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) and kind in (nn.MaxPool2d, nn.AvgPool2d):
        return InflatedPool(layer)
    elif isinstance(layer, nn.AdaptiveAvgPool2d) and pair(layer.output_size) == (1, 1):
        return nn.AdaptiveAvgPool3d(1)
    elif isinstance(layer, OF_IMAGES):
        raise TypeError(f"it has a layer {layer}")
    return layer


def treats_alike(layer: nn.Module, shape: torch.Size) -> bool:
    """Whether a layer gives the same for the pixels of maps in another order, in that order: it
    works pixel by pixel, or on all of them, as squeeze-and-excitation does.

    Args:
        shape: of maps that it takes, (..., H, W).
    """
    generator, sides = torch.Generator().manual_seed(0), (5, 7)  # longer than most kernels
    x = torch.randn(*shape[:-2], *sides, generator=generator)
    order = torch.randperm(sides[0] * sides[1], generator=generator)

    def mixed(maps: Tensor) -> Tensor:
        return maps.flatten(-2)[..., order].unflatten(-1, sides)

    try:
        found, expected = layer(mixed(x)), layer(x.clone())
    except (TypeError, RuntimeError, ValueError, IndexError, AssertionError):
        return False
    if not isinstance(expected, Tensor):
        return False
    if expected.shape[-2:] == sides:
        expected = mixed(expected)
    elif expected.ndim >= 4 and expected.shape[-2:] != (1, 1):
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


# ----------------------------------------------------------------------------- the network


class Watch(TorchDispatchMode):
    """Inside, notes the modules that run, and along which of the last axes of maps (B, C, *size)
    the operations of each work, as a mean over rows and columns does, or which they make one."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.running: list[str] = []
        """Names of modules, the innermost last; behind a pass that failed, those it failed in."""
        self.passed: dict[str, torch.Size | None] = {}
        """Shape of what each module was given last; None: of several tensors."""
        self.along: dict[str, set[frozenset[int]]] = {}
        """Of each module the axes of its operations, by their distance from the first of them."""
        self.unfolded: set[str] = set()
        """Names of modules that are."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The operation's own result."""
        kwargs = kwargs or {}
        names = (argument.name for argument in function._schema.arguments)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, dim, result = given.get("self"), given.get("dim"), function(*args, **kwargs)
        if isinstance(x, Tensor) and x.ndim >= self.axes + 2:
            wanted = [] if dim is None else dim if isinstance(dim, list | tuple) else [dim]
            first = x.ndim - self.axes
            along = {axis % x.ndim - first for axis in wanted if axis % x.ndim >= first}
            if function in VIEWS:
                along = joined(x.shape, result.shape, self.axes)
            elif function.is_view:
                along = set()
            if along:
                self.note(along)
        return result

    def note(self, along: set[int]) -> None:
        """Note axes of the module that runs; such as are unfolded join two by themselves."""
        name = self.running[-1] if self.running else ""
        if name not in self.unfolded:
            self.along.setdefault(name, set()).add(frozenset(along))


VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def joined(old: torch.Size, new: torch.Size, axes: int) -> set[int]:
    """Which of the last axes of a shape one axis of another shape has together, by themselves."""
    first = len(old) - axes
    if old[:first] == new[:first] and len(new) == first + 1:
        return set(range(axes))  # also of sides of 1, which have no values between their borders
    ends = {math.prod(new[place:]) for place in range(len(new) + 1)}  # values behind each border
    borders = [axis for axis in range(axes + 1) if math.prod(old[first + axis :]) in ends]
    for begin, end in itertools.pairwise(borders):
        if end - begin > 1:
            return set(range(begin, end))
    return set()


@contextmanager
def watching(net: nn.Module, axes: int) -> Iterator[Watch]:
    """Inside, forward passes of a network are watched."""
    watch, hooks = Watch(axes), []

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        watch.running.pop()

    for name, part in net.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue  # it takes no such hooks
        if isinstance(part, Unfolded):
            watch.unfolded.add(name)

        def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
            watch.running.append(name)
            alone = len(inputs) == 1 and isinstance(inputs[0], Tensor)
            watch.passed[name] = inputs[0].shape if alone else None

        hooks.append(part.register_forward_pre_hook(enter))
        hooks.append(part.register_forward_hook(leave))
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def training_without_statistics(net: nn.Module) -> Iterator[None]:
    """Inside, all modules but batch norms are in training; random numbers drawn are not missed."""
    with evaluating(net), torch.random.fork_rng(devices=[]):
        for part in net.modules():
            part.training = not isinstance(part, _BatchNorm)
        yield


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
        UserError: it gives no map, has layers that cannot be lifted, also in training alone, or
            gives something else for a volume (1, C, H, W, depth) that is constant along its last
            axis than for its slice.
    """
    cannot = f'model.encoder.lift = "inflate": {inner.name} cannot be inflated, '
    with watching(inner.net, 2) as watch:
        expected = inner.forward_features(image)
    if not isinstance(expected, Tensor) or expected.ndim != 4 or inner.channels_last:
        raise UserError(f'{cannot}its features are no maps of channels; lift = "slices" can')
    volume = image[..., None].expand(*image.shape, depth)
    try:
        lift_layers(inner.net, watch, how)
        found = volume_features(inner, volume)
        with training_without_statistics(inner):
            volume_features(inner, volume, "in training ")
    except TypeError as error:
        raise UserError(f'{cannot}{error}; lift = "slices" can') from None
    same = found.ndim == 5 and found.shape[:4] == expected.shape
    if not same or (found - expected[..., None]).abs().max() > TOLERANCE * expected.abs().max():
        raise UserError(
            f"{cannot}as a volume without change along the axis does not give what its slice gives;"
            ' lift = "slices" can'
        )


def lift_layers(net: nn.Module, watch: Watch, how: str) -> None:
    """Lift the layers that a pass of an image has seen: what pools whole maps by itself as one, the
    others each. A module with kernels beside its pool is told by a pass of a volume.

    Raises:
        TypeError: one cannot be lifted.
    """
    whole: list[str] = []
    for name in filter(None, watch.passed):
        layer = net.get_submodule(name)
        if any(name.startswith(f"{outer}.") for outer in whole) or unfolded(layer):
            continue
        if {0, 1} in watch.along.get(name, ()) and not isinstance(layer, OF_IMAGES):
            shape = watch.passed[name]
            if shape is not None and treats_alike(layer, shape):
                unfold(layer)
                whole.append(name)
    for name in filter(None, watch.passed):
        layer = net.get_submodule(name)
        if any(name == outer or name.startswith(f"{outer}.") for outer in whole):
            continue
        if unfolded(layer) or not any(True for _ in layer.children()):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, inflate_layer(layer, how))


def volume_features(inner: Encoder, volume: Tensor, when: str = "") -> Tensor:
    """Raw features of a volume whose last axis is that of no kernel of the library.

    Raises:
        TypeError: what is between the layers works on images, or on some of the axes alone.
    """
    failed = False
    with watching(inner.net, 3) as watch:
        try:
            found: Tensor = inner.forward_features(volume)
        except (TypeError, RuntimeError, ValueError, IndexError, AssertionError):
            failed = True
    for name, along in watch.along.items():
        if any(len(axes) < 3 for axes in along):
            raise TypeError(
                f"{when}it pools over some of three axes alone, in {described(inner.net, name)}"
            )
    if failed:
        where = described(inner.net, next(reversed(watch.running), ""))
        raise TypeError(
            f"{when}between its layers it works on images alone, in {where}"
            + f", or {volume.shape[4]} voxels are too few for it" * (not when)
        )
    return found


def described(net: nn.Module, name: str) -> str:
    """A module of a network in words."""
    return f"{name} ({type(net.get_submodule(name)).__name__})" if name else "its own forward pass"


def small_image(inner: Encoder) -> Tensor:
    """A random image (1, C, H, W) as small as the check may have it and the network takes it."""
    batch, channels, *sides = inner.input_shape
    for most in (SMALL, 2 * SMALL):
        shape = (batch, channels, *(min(side, most) for side in sides))
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            inner.forward_features(image)
        except (RuntimeError, ValueError, AssertionError):
            continue  # Inception needs 75 pixels
        return image
    return torch.randn(inner.input_shape, generator=torch.Generator().manual_seed(0))


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
    depth = min(size[AXES[lift.axis]], SMALL)
    with torch.no_grad(), evaluating(inner):
        inflate(inner, lift.kernel, small_image(inner), depth)
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
