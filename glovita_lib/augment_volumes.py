"""Augmentations of a batch of volumes in which every sample has its own parameters.

B batch, C channels, X Y Z voxels, N voxels along one axis, n channels that drew an operation.

The geometry is that of augment_patch; formulas of the intensities are those of batchgeneratorsv2.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.augment_images import Operations, coin, to, uniform
from glovita_lib.augment_patch import (
    Grid,
    PatchCut,
    Patches,
    Placement,
    Volumes,
    WholeVolumes,
    WindowedVolumes,
    WindowGrid,
    interpolated,
    moved,
    picked,
)
from glovita_lib.dist import hash_seed
from glovita_lib.spec_volumes import (
    ResolvedVolumeAugmentation,
    VolumeOps,
)

VOLUME_OPERATIONS = Operations()
operation = VOLUME_OPERATIONS.register
AXES = ("x", "y", "z")
IN_MM = ("rotate_p", "rot90_p", "transpose_p")  # switches of what depends on the spacing
INTERPOLATED = ("rotate_p", "scale_p", "elastic_p")  # switches of what shows more than the patch
WINDOWS = 2**25  # values of median windows at a time
PIECE = 2**17  # values that are summed at a time on a CPU: what stays in its cache
TINY = 1e-7  # smallest range and deviation that a gamma curve divides by
SMALLEST = 2.0**-126  # of normal float32 numbers


# --------------------------------------------------------------------------------------- geometry
#
# A registered function draws parameters on the CPU and changes where the voxels of each patch come
# from.


@operation("crop", stage="geometry")
def random_place(place: Placement, ops: VolumeOps, generator: torch.Generator) -> None:
    """A random part of volumes that no reader has cut; their foreground is unknown."""
    cut = PatchCut(ops.crop, ops.foreground_share, place.grid.size)
    sizes = place.room + np.array(place.grid.size)
    place.start = cut.boxes(sizes, generator)[:, :3].long()


@operation("rotate_p", stage="geometry")
def random_rotation(place: Placement, ops: VolumeOps, generator: torch.Generator) -> None:
    """A rotation about each axis, in mm of each volume; none that moves an axis across which
    nothing is turned: about the thick axis alone where there is one."""
    count = len(place.turns)
    chosen = coin(count, ops.rotate_p, generator)
    angles = uniform(count, -ops.rotate_radians, ops.rotate_radians, generator, 3).double()
    angles *= torch.rand(count, 3, generator=generator) < ops.rotate_axis_p
    if not chosen.any():
        return
    for axis in place.grid.held:
        angles *= torch.arange(3) == axis
    across, down = place.spacing[:, None, :], place.spacing[:, :, None]
    turned = rotation(angles * chosen[:, None]) * across / down  # mm -> voxels
    place.matrices = place.matrices @ turned


@operation("scale_p", stage="geometry")
def random_scale(place: Placement, ops: VolumeOps, generator: torch.Generator) -> None:
    """A factor for all axes or each; none across thick slices and a single one."""
    count = len(place.turns)
    chosen = coin(count, ops.scale_p, generator)
    factors = of_axes(count, ops.scale, ops.scale_same_p, generator).double()
    if not chosen.any():
        return
    factors = torch.where(chosen[:, None], factors, 1.0)
    factors[:, place.grid.held] = 1.0
    place.matrices = place.matrices @ torch.diag_embed(factors)


@operation("elastic_p", stage="geometry")
def random_elastic(place: Placement, ops: VolumeOps, generator: torch.Generator) -> None:
    """Random shifts of control points; the same in all slices where they are thick."""
    count, points = len(place.turns), ops.elastic_points
    chosen = coin(count, ops.elastic_p, generator)
    share = uniform(count, *ops.elastic_strength, generator) * chosen  # of the distance of points
    shifts = uniform(count, -1, 1, generator, 3, *(points + 3,) * 3)
    shifts[:, place.grid.held] = 0
    if (thick := place.grid.thick) is not None:
        shifts = shifts.narrow(thick + 2, 0, 1).expand_as(shifts)
    distance = torch.tensor([max(side - 1, 1) / points for side in place.grid.size])
    place.control = shifts * (share[:, None] * distance)[:, :, None, None, None]


@operation("rot90_p", stage="geometry")
def random_rot90(place: Placement, ops: VolumeOps, generator: torch.Generator) -> None:
    """Quarter turns in the plane of two axes of one length."""
    count = len(place.turns)
    chosen = coin(count, ops.rot90_p, generator)
    planes = torch.rand(count, 3, generator=generator)
    quarters = torch.randint(1, 4, (count,), generator=generator)
    for row in chosen.nonzero()[:, 0].tolist():
        axes = place.equal(row)
        if len(axes) < 2:
            continue
        first, second = (axes[i] for i in sorted(planes[row, : len(axes)].argsort()[:2].tolist()))
        turn = torch.eye(3, dtype=torch.float64)
        turn[first, first] = turn[second, second] = 0
        turn[first, second], turn[second, first] = 1, -1  # torch.rot90 in this plane
        place.turns[row] @= torch.linalg.matrix_power(turn, int(quarters[row]))


@operation("transpose_p", stage="geometry")
def random_transpose(place: Placement, ops: VolumeOps, generator: torch.Generator) -> None:
    """Axes of one length in a random order, which may be their own."""
    count = len(place.turns)
    chosen = coin(count, ops.transpose_p, generator)
    orders = torch.rand(count, 3, generator=generator)
    for row in chosen.nonzero()[:, 0].tolist():
        axes, order = place.equal(row), list(range(3))
        for axis, drawn in zip(axes, orders[row, : len(axes)].argsort().tolist(), strict=True):
            order[axis] = axes[drawn]
        place.turns[row] @= torch.eye(3, dtype=torch.float64)[order]


@operation("mirror_p", stage="geometry")
def random_mirror(place: Placement, ops: VolumeOps, generator: torch.Generator) -> None:
    """Each of the permitted axes backwards."""
    flipped = torch.rand(len(place.turns), 3, generator=generator) < ops.mirror_p
    flipped &= torch.tensor([axis in place.grid.mirrors for axis in range(3)])
    place.turns = place.turns @ torch.diag_embed(1 - 2 * flipped.double())


def keep_sides(place: Placement, ops: VolumeOps) -> None:
    """Make no mirror image that is not asked for: none where nothing may be mirrored, as two axes
    exchanged are one, and none in which a rotation reverses an axis that may not be, which with a
    mirrored one makes a mirror image along it. Of these samples a permitted axis is reversed, which
    makes them rotations."""
    fixed = [axis for axis in range(3) if axis not in place.grid.mirrors]
    if not fixed and ops.mirror_p:
        return
    is_image = torch.linalg.det(place.turns) < 0
    reverses = (place.matrices.diagonal(dim1=1, dim2=2)[:, fixed] <= 0).any(1)
    rows = is_image & (reverses | (ops.mirror_p == 0))
    for row in rows.nonzero()[:, 0].tolist():
        place.turns[row, :, (*place.equal(row), *place.grid.mirrors)[0]] *= -1


def of_axes(
    count: int, limits: tuple[float, float], same_p: float, generator: torch.Generator
) -> Tensor:
    """(count, 3) numbers between limits, with a probability one for all axes."""
    each = uniform(count, *limits, generator, 3)
    return torch.where(coin(count, same_p, generator)[:, None], each[:, :1], each)


def rotation(angles: Tensor) -> Tensor:
    """Rotations Rz Ry Rx about the axes: (B, 3) radians -> (B, 3, 3) float64."""
    cx, cy, cz = angles.double().cos().unbind(1)
    sx, sy, sz = angles.double().sin().unbind(1)
    rows = [
        *(cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        *(sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        *(-sy, cy * sx, cy * cx),
    ]
    return torch.stack(rows, 1).view(-1, 3, 3)


# ------------------------------------------------------------------------------------ intensities
#
# The functions take channels (n, X, Y, Z) float32 and parameters (n,) or (n, ...), may change the
# channels in place, and return them. A registered function draws parameters on the CPU and applies
# an operation to the channels that drew it.


def of_channels(
    x: Tensor, probability: float, channel_p: float, generator: torch.Generator
) -> Tensor:
    """Which of the channels of x (B, C, ...) are chosen: their numbers in (B C), sorted."""
    samples = coin(len(x), probability, generator)
    channels = torch.rand(x.shape[:2], generator=generator) < channel_p
    return (samples[:, None] & channels).view(-1).nonzero().view(-1)


def on_channels(
    x: Tensor, rows: Tensor, function: Callable[..., Tensor], *parameters: Tensor
) -> Tensor:
    """A function on some of the channels of x (B, C, X, Y, Z), which is changed.

    Args:
        rows: (n,) numbers in (B C), without repeats.
        parameters: (n, ...) each.
    """
    flat = x.flatten(0, 1)
    if x.device.type == "cpu":  # one after the other, in place: the cache holds one
        for i, row in enumerate(rows.tolist()):
            part = flat[row : row + 1]
            result = function(part, *(each[i : i + 1] for each in parameters))
            if result.data_ptr() != part.data_ptr():
                part.copy_(result)
    elif len(rows):
        there, *moved_parameters = to(x.device, rows, *parameters)
        flat.index_copy_(0, there, function(flat.index_select(0, there), *moved_parameters))
    return x


def per(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1)."""
    return values[:, None, None, None]


def around_one(count: int, limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    """(count,) factors, half of them below 1 and half above where the limits are on both sides of
    it (batchgenerators' rule)."""
    low, high = limits
    if low >= 1 or high <= 1 or not count:
        return uniform(count, low, high, generator)
    below = coin(count, 0.5, generator)
    drawn = torch.rand(count, generator=generator)
    return torch.where(below, low + (1 - low) * drawn, 1 + (high - 1) * drawn)


@operation("noise_p")
def random_noise(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """Gaussian noise, independent per voxel, of one strength in all channels of a sample."""
    rows = of_channels(x, ops.noise_p, 1.0, generator)
    std = uniform(len(x), *ops.noise_std, generator)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    field = torch.Generator(x.device).manual_seed(seed)
    return on_channels(x, rows, lambda part, std: noisy(part, std, field), std[rows // x.shape[1]])


def noisy(x: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """x plus normal noise; the generator is on the device of x."""
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return x.addcmul_(noise, per(std))


@operation("blur_p")
def random_blur(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """Gaussian blur, or a median filter for a share of the samples."""
    rows = of_channels(x, ops.blur_p, ops.blur_channel_p, generator)
    is_median = coin(len(x), ops.median_share, generator)[rows // x.shape[1]]
    sigma = of_axes(len(rows), ops.blur_sigma, ops.blur_same_p, generator)
    low, high = ops.median_size
    sides = torch.randint(low, high + 1, (len(rows),), generator=generator)
    if not len(rows):
        return x
    columns = sigma[~is_median].unbind(1)
    taps = [gaussian_taps(each, side) for each, side in zip(columns, x.shape[2:], strict=True)]
    x = on_channels(x, rows[~is_median], blurred, *taps)
    for row, side in zip(rows[is_median].tolist(), sides[is_median].tolist(), strict=True):
        channel = x.flatten(0, 1)[row]
        channel.copy_(median(channel, side))
    return x


def blurred(x: Tensor, *taps: Tensor) -> Tensor:
    """Gaussian filters along the axes, three of (n, half + 1) taps; borders reflected."""
    for axis, each in enumerate(taps, 1):
        x = filtered(x, each, axis)
    return x


def gaussian_taps(sigma: Tensor, side: int) -> Tensor:
    """Taps (n, half + 1) of Gaussian filters from their middle on, both sides of one add up to 1.

    A filter has the odd number of taps that is nearest to 6 sigma + 1/2 (batchgeneratorsv2), and no
    more than an axis of `side` voxels can reflect.
    """
    reach = ((sigma * 6 + 0.5) / 2).floor().clamp(max=side - 1)
    offset = torch.arange(int(reach.max()) + 1 if len(sigma) else 1)
    taps = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2) * (offset <= reach[:, None])
    return taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])


def filtered(x: Tensor, taps: Tensor, axis: int) -> Tensor:
    """x (n, X, Y, Z) under symmetric filters (n, half + 1) along one axis, borders reflected."""
    half, side = taps.shape[1] - 1, x.shape[axis]
    ends = x.narrow(axis, 1, half), x.narrow(axis, side - 1 - half, half)
    padded = torch.cat([ends[0].flip(axis), x, ends[1].flip(axis)], axis)
    out = padded.narrow(axis, half, side) * per(taps[:, 0])
    for i in range(1, half + 1):
        for first in (half - i, half + i):
            out.addcmul_(padded.narrow(axis, first, side), per(taps[:, i]))
    return out


def median(x: Tensor, side: int) -> Tensor:
    """The median of the cube around each voxel, of an even number the upper one; borders mirrored
    with the border voxel twice (scipy.ndimage.median_filter). (X, Y, Z) -> (X, Y, Z)."""
    if x.device.type == "cpu":
        from scipy import ndimage

        return torch.from_numpy(ndimage.median_filter(x.numpy(), side))
    return window_median(x, side)


def window_median(x: Tensor, side: int) -> Tensor:
    """The same on any device."""
    for axis in range(3):
        count = x.shape[axis]
        places = torch.arange(-(side // 2), count + (side - 1) // 2) % (2 * count)
        x = picked(x, torch.minimum(places, 2 * count - 1 - places), axis)
    windows = x.unfold(0, side, 1).unfold(1, side, 1).unfold(2, side, 1)
    step = max(1, WINDOWS // (windows[0].numel()))
    parts = [part.flatten(3).kthvalue(side**3 // 2 + 1).values for part in windows.split(step)]
    return torch.cat(parts)


@operation("brightness_p")
def random_brightness(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """Values times a factor."""
    rows = of_channels(x, ops.brightness_p, ops.brightness_channel_p, generator)
    factor = around_one(len(rows), ops.brightness, generator)
    return on_channels(x, rows, lambda part, factor: part.mul_(per(factor)), factor)


@operation("shift_p")
def random_shift(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """Values plus a normal number."""
    rows = of_channels(x, ops.shift_p, ops.shift_channel_p, generator)
    shift = torch.randn(len(rows), generator=generator) * ops.shift_std
    return on_channels(x, rows, lambda part, shift: part.add_(per(shift)), shift)


@operation("contrast_p")
def random_contrast(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """Distance to the mean times a factor, for a share of the samples within the old range."""
    rows = of_channels(x, ops.contrast_p, ops.contrast_channel_p, generator)
    clipped = coin(len(x), ops.contrast_clip_share, generator)[rows // x.shape[1]]
    factor = around_one(len(rows), ops.contrast, generator)
    return on_channels(x, rows, contrasted, factor, clipped)


def contrasted(x: Tensor, factor: Tensor, clipped: Tensor) -> Tensor:
    """mean + factor (x - mean), between minimum and maximum where clipped (n,) says so."""
    low, high = extremes(x)
    shift = x.mean((1, 2, 3)) * (1 - factor)
    low = torch.where(clipped, low, -math.inf)
    high = torch.where(clipped, high, math.inf)
    x = x.mul_(per(factor)).add_(per(shift))
    x = torch.maximum(x, per(low), out=x)  # with bounds that are tensors faster than a clamp
    return torch.minimum(x, per(high), out=x)


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum (n,) of channels."""
    return x.amin((1, 2, 3)), x.amax((1, 2, 3))


@operation("low_resolution_p")
def random_low_resolution(
    x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid
) -> Tensor:
    """Fewer voxels along each axis but thick and flat ones, the same share along all."""
    rows = of_channels(x, ops.low_resolution_p, ops.low_resolution_channel_p, generator)
    share = uniform(len(rows), *ops.low_resolution, generator)
    for row, part in zip(rows.tolist(), share.tolist(), strict=True):
        channel = x.flatten(0, 1)[row]
        size = [
            side if axis in (grid.thick, grid.flat) else max(1, round(side * part))
            for axis, side in enumerate(channel.shape)
        ]
        channel.copy_(coarse(channel, size))
    return x


def coarse(x: Tensor, size: Sequence[int]) -> Tensor:
    """A channel (X, Y, Z) at fewer voxels, the nearest, and linear again at its own."""
    shape = x.shape
    for axis, few in enumerate(size):
        x = picked(x, ((torch.arange(few) + 0.5) * (shape[axis] / few)).floor(), axis)
    for axis in (2, 1, 0):  # the last one, which costs most, while there are few
        places = (torch.arange(shape[axis]) + 0.5) * (size[axis] / shape[axis]) - 0.5
        x = interpolated(x, places, axis)
    return x


@operation("gamma_inverted_p")
def random_gamma_inverted(
    x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid
) -> Tensor:
    """A gamma curve on the values times -1."""
    rows = of_channels(x, ops.gamma_inverted_p, 1.0, generator)
    exponent = around_one(len(rows), ops.gamma_inverted, generator)
    return on_channels(x, rows, lambda part, g: curved(part.neg_(), g).neg_(), exponent)


@operation("gamma_p")
def random_gamma(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """A gamma curve."""
    rows = of_channels(x, ops.gamma_p, 1.0, generator)
    return on_channels(x, rows, curved, around_one(len(rows), ops.gamma, generator))


def curved(x: Tensor, exponent: Tensor) -> Tensor:
    """((x - min) / range)^exponent range + min, brought to the mean and deviation of x."""
    low, high = extremes(x)
    spread = (high - low).clamp_(min=TINY)
    x = x.sub_(per(low)).mul_(per(1 / spread))
    mean, deviation = mean_and_norm(x)
    x = powered(x, exponent)
    new_mean, new_deviation = mean_and_norm(x)
    size = x[0].numel() ** 0.5
    gain = spread * deviation / (new_deviation * spread).clamp(min=TINY * size) * spread
    return x.mul_(per(gain)).add_(per(low + spread * mean - gain * new_mean))


def powered(x: Tensor, exponent: Tensor) -> Tensor:
    """x^exponent of values 0 to 1, in place, as 2^(exponent log2 x): faster than a power, but for
    0, whose logarithm takes a CPU ten times as long and is set instead."""
    x = x.clamp_(min=SMALLEST).log2_()
    x = F.threshold(x, math.log2(SMALLEST) + 0.5, -math.inf, inplace=True)
    return x.mul_(per(exponent)).exp2_()


def mean_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n,), and root of the sum of squared distances to it."""
    mean = x.mean((1, 2, 3))
    if len(x) == 1:  # scalar products in the cache: many times as fast as torch's variance
        distances = (part - mean for part in x.reshape(-1).split(PIECE))
        squares = [torch.dot(part, part) for part in distances]
        return mean, torch.stack(squares).sum().sqrt()[None]
    return mean, torch.linalg.vector_norm(x - per(mean), dim=(1, 2, 3))


@operation("rectangles_p")
def random_rectangles(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """Cuboids wholly inside, one after the other."""
    rows = of_channels(x, ops.rectangles_p, ops.rectangles_channel_p, generator)
    low, high = ops.rectangles
    counts = torch.randint(low, high + 1, (len(rows),), generator=generator)
    side = torch.tensor(x.shape[2:])
    share = uniform(len(rows), *ops.rectangles_size, generator, high, 3)  # (n, M, 3)
    extent = (share * side).floor().clamp(min=1)
    start = (torch.rand(share.shape, generator=generator) * (side - extent + 1)).floor()
    boxes = torch.stack([start, start + extent], 3).long()
    for row, count, drawn in zip(rows.tolist(), counts.tolist(), boxes.tolist(), strict=True):
        channel = x.flatten(0, 1)[row]
        for box in drawn[:count]:
            part = channel[tuple(slice(*ends) for ends in box)]
            part.copy_(part.mean().expand_as(part))
    return x


@operation("gradient_p")
def random_gradient(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """A Gaussian between 0 and 1 times a height of either sign, added."""
    rows = of_channels(x, ops.gradient_p, ops.gradient_channel_p, generator)
    bumps = profiles(len(rows), x.shape[2:], ops.gradient_scale, ops.gradient_place, generator)
    height = uniform(len(rows), *ops.gradient_strength, generator)
    height *= 1 - 2 * coin(len(rows), 0.5, generator).float()
    return on_channels(
        x, rows, lambda part, h, *parts: part.addcmul_(bump(*parts), per(h)), height, *bumps
    )


@operation("local_gamma_p")
def random_local_gamma(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """A gamma curve, mixed in by a Gaussian between 0 and 1."""
    rows = of_channels(x, ops.local_gamma_p, ops.local_gamma_channel_p, generator)
    scale, place = ops.local_gamma_scale, ops.local_gamma_place
    bumps = profiles(len(rows), x.shape[2:], scale, place, generator)
    low, high = (
        uniform(len(rows), *limits, generator)
        for limits in (ops.local_gamma_low, ops.local_gamma_high)
    )
    exponent = torch.where(coin(len(rows), 0.5, generator), low, high)
    return on_channels(x, rows, locally_curved, exponent, *bumps)


def locally_curved(x: Tensor, exponent: Tensor, *parts: Tensor) -> Tensor:
    """The share of the way to ((x - min) / range)^exponent range + min that a bump tells."""
    low, high = extremes(x)
    spread = (high - low).clamp_(min=TINY)
    x = x.sub_(per(low)).mul_(per(1 / spread))
    x = torch.lerp(x, powered(x.clone(), exponent), bump(*parts))
    return x.mul_(per(spread)).add_(per(low))


def profiles(
    count: int,
    size: Sequence[int],
    scale: tuple[float, float],
    place: tuple[float, float],
    generator: torch.Generator,
) -> list[Tensor]:
    """Gaussians along each axis with their mass in each voxel, largest 1: three of (count, N)."""
    found = []
    for side in size:
        log_sigma = uniform(count, math.log(scale[0]), math.log(scale[1]), generator).double()
        sigma = log_sigma.exp()[:, None] * side
        centre = uniform(count, *place, generator).double()[:, None] * side
        edges = torch.arange(side + 1, dtype=torch.float64) - 0.5
        mass = torch.special.ndtr((edges - centre) / sigma).diff(dim=1)
        found.append((mass / mass.amax(1, keepdim=True).clamp(min=1e-300)).float())
    return found


def bump(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The product (n, X, Y, Z) of profiles (n, N), stretched to 0..1."""
    low = x.amin(1) * y.amin(1) * z.amin(1)
    spread = (1 - low).clamp(min=TINY)
    product = x[:, :, None, None] * (y[:, :, None] * z[:, None, :])[:, None]
    return product.sub_(per(low)).mul_(per(1 / spread))


@operation("sharpen_p")
def random_sharpen(x: Tensor, ops: VolumeOps, generator: torch.Generator, grid: Grid) -> Tensor:
    """The Laplacian subtracted with a factor."""
    rows = of_channels(x, ops.sharpen_p, ops.sharpen_channel_p, generator)
    return on_channels(x, rows, sharpened, uniform(len(rows), *ops.sharpen, generator))


def sharpened(x: Tensor, factor: Tensor) -> Tensor:
    """x + factor (6 x - the sum of the six neighbours), border voxels repeated."""
    change = torch.zeros_like(x)
    for axis in (1, 2, 3):
        steps = x.diff(dim=axis)
        side = steps.shape[axis]
        change.narrow(axis, 0, side).sub_(steps)
        change.narrow(axis, 1, side).add_(steps)
    return x.addcmul_(change, per(factor))


# ------------------------------------------------------------------------------------ application


class VolumeAugmenter:
    """Turns a batch of volumes as they are read into the encoder's input under one policy.

    Every sample has its own parameters. They are drawn on the CPU from the seed, so they are the
    same on every device and nothing waits for the device; only noise fields are drawn there.
    """

    fit: PatchCut | WholeVolumes
    told: Callable[[list[Tensor], list[np.ndarray]], None] | None = None
    """Hears the answers of all windows, see WindowedVolumes."""

    def __init__(self, resolved: ResolvedVolumeAugmentation, *, train: bool) -> None:
        self.ops = resolved.train if train else resolved.test
        mirrors = tuple(AXES.index(name) for name in resolved.mirror_axes)
        self.grid = Grid(
            resolved.patch_size,
            resolved.spacing,
            resolved.thick_axis,
            mirrors,
            resolved.flat_axis,
        )
        self.windows: WindowGrid | None = None
        if resolved.evaluation == "windows" and not train:
            self.windows = WindowGrid.overlapping(resolved.patch_size, resolved.window_overlap)
        self.how, self.chunk = resolved.window_reduce, resolved.window_chunk
        spaced = any(map(self.ops.draws, IN_MM))
        if resolved.whole or self.windows is not None:
            self.fit = WholeVolumes(spaced)
            return
        ops = self.ops
        margin = resolved.margin if any(map(ops.draws, INTERPOLATED)) else (0, 0, 0)
        self.fit = PatchCut(ops.crop, ops.foreground_share, resolved.patch_size, margin, spaced)

    def __call__(
        self, inputs: Tensor | Patches | Volumes, fitted: bool, seed: int
    ) -> Tensor | Volumes | WindowedVolumes:
        """Augmented batch.

        Args:
            inputs: (B, C, X, Y, Z) of any number type, with spacings or without, or volumes each
                of its own size.
            fitted: whether `fit` has cut them; else they are whole volumes.
            seed: of the random parameters; unused in evaluation.

        Returns:
            (B, C, *patch_size) float32 on the device of the inputs, or whole volumes, or their
            windows.
        """
        whole = isinstance(self.fit, WholeVolumes)
        with torch.autocast(device_of(inputs).type, enabled=False):
            if isinstance(inputs, Patches):
                return self.transformed(inputs.voxels, self.grid, fitted, seed, inputs.spacing)
            if not whole and isinstance(inputs, Tensor):
                return self.transformed(inputs, self.grid, fitted, seed)
            each = [
                self.transformed(
                    volume[None], self.of_size(volume), True, hash_seed(seed, number), spacing
                )
                for number, (volume, spacing) in enumerate(with_spacings(inputs))
            ]
        volumes = Volumes(tuple(volume[0] for volume in each))
        if self.windows is None:
            return volumes
        return WindowedVolumes(volumes, self.windows, self.how, self.chunk, self.told)

    def of_size(self, volume: Tensor) -> Grid:
        """The patch that a volume (C, X, Y, Z) is itself."""
        x, y, z = volume.shape[1:]
        return replace(self.grid, size=(x, y, z))

    def transformed(
        self, inputs: Tensor, grid: Grid, fitted: bool, seed: int, spacing: Tensor | None = None
    ) -> Tensor:
        """The same of volumes of one size, to patches of a grid, in the precision of the caller;
        their spacing (B, 3), where it is known, is that of the grid else."""
        batch, channels, *have = inputs.shape
        if not batch:
            return torch.empty(0, channels, *grid.size, device=inputs.device)
        generator = torch.Generator().manual_seed(seed)
        geometry = VOLUME_OPERATIONS.active(self.ops, "geometry")
        if fitted:
            geometry = [each for each in geometry if each.switches != ("crop",)]
        changing = VOLUME_OPERATIONS.active(self.ops, "values")
        if self.ops.blur_first:
            changing.sort(key=lambda each: each.switches != ("blur_p",))  # the others as they were
        place = Placement.centred(grid, batch, have, spacing)
        for each in geometry:
            each.function(place, self.ops, generator)
        keep_sides(place, self.ops)
        if not geometry and not changing and tuple(have) == grid.size:
            return inputs.float()
        x = moved(inputs, place)
        for each in changing:
            x = each.function(x, self.ops, generator, grid)
        return x


def with_spacings(volumes: Tensor | Volumes) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each volume of a batch with its spacing (1, 3), where it is known."""
    known = volumes.spacing if isinstance(volumes, Volumes) else None
    for number, volume in enumerate(volumes):
        yield volume, None if known is None else known[number : number + 1]


def device_of(inputs: Tensor | Patches | Volumes) -> torch.device:
    """Where a batch is."""
    if isinstance(inputs, Patches):
        return inputs.voxels.device
    return inputs.device if isinstance(inputs, Tensor) else inputs.each[0].device
