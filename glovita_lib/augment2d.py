"""Augmentations of a batch of images in which every sample has its own parameters.

The operations take images (B, C, H, W) float32 in 0..1 and parameters (B,) on their device, and
return new images. `augment` draws the parameters on the CPU and applies an operation only to the
samples that drew it. Colour operations leave a fourth channel (alpha) alone and do without
saturation and hue on grey images. B batch, C channels, H W pixels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.spec_augment import Ops

GREY = (0.2989, 0.587, 0.114)  # luma of R, G, B, ITU-R BT.601 as in torchvision
MAX_SHEAR = 89.0  # degrees


def coin(count: int, probability: float, generator: torch.Generator) -> Tensor | None:
    """Which of count samples are chosen, (count,) bool on the CPU; none where nothing can be."""
    return torch.rand(count, generator=generator) < probability if probability else None


def uniform(count: int, low: float, high: float, generator: torch.Generator, *more: int) -> Tensor:
    """(count, *more) float32 numbers between low and high, on the CPU."""
    return low + (high - low) * torch.rand(count, *more, generator=generator)


def to(device: torch.device, *values: Tensor) -> list[Tensor]:
    """Parameters moved to the device of the images without waiting for it."""
    return [value.to(device, non_blocking=True) for value in values]


def on_rows(x: Tensor, chosen: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """The operation on the chosen rows of x only; x itself may be changed.

    chosen: row numbers, int64 on the CPU, without repeats.
    """
    if not len(chosen):
        return x
    if len(chosen) == len(x):  # row order is kept, as coin and grouping give sorted rows
        return operation(x)
    rows = chosen.to(x.device, non_blocking=True)
    return x.index_copy_(0, rows, operation(x.index_select(0, rows)))


def colours(x: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """The operation on grey or RGB, a fourth channel untouched."""
    if x.shape[1] != 4:
        return operation(x)
    return torch.cat([operation(x[:, :3]), x[:, 3:]], 1)


def augment(x: Tensor, ops: Ops, generator: torch.Generator) -> Tensor:
    """Warp, colour, blur, noise and dropout of a policy, in this order; x may be changed."""
    x = random_warp(x, ops, generator)
    x = random_colour(x, ops, generator)
    x = random_blur(x, ops, generator)
    x = random_noise(x, ops, generator)
    return random_dropout(x, ops, generator)


# --- geometry ---------------------------------------------------------------------------------


def random_warp(x: Tensor, ops: Ops, generator: torch.Generator) -> Tensor:
    """Rotation, then affine warp, as one resampling with reflected borders."""
    count = len(x)
    rotated = coin(count, ops.rotate_p, generator)
    warped = coin(count, ops.affine_p, generator)
    if rotated is None and warped is None:
        return x
    never = torch.zeros(count, dtype=torch.bool)
    rotated = never if rotated is None else rotated
    warped = never if warped is None else warped
    angle = uniform(count, -ops.rotate_degrees, ops.rotate_degrees, generator)
    zoom = uniform(count, *ops.affine_scale, generator)
    shift = uniform(count, -ops.affine_translate, ops.affine_translate, generator, 2)
    shear = uniform(count, -ops.affine_shear, ops.affine_shear, generator, 2)
    matrices = affine(
        torch.where(warped, zoom, 1.0), shift * warped[:, None], shear * warped[:, None]
    ) @ rotation(angle * rotated)
    rows = (rotated | warped).nonzero()[:, 0]
    return on_rows(x, rows, lambda part: warp(part, matrices[rows], padding="reflection"))


def rotation(degrees: Tensor) -> Tensor:
    """Counter-clockwise rotations about the centre: (B,) -> (B, 3, 3) float64, see `warp`."""
    angle = degrees.double().deg2rad()
    matrices = torch.eye(3, dtype=torch.float64).repeat(len(degrees), 1, 1)
    matrices[:, 0, 0] = matrices[:, 1, 1] = angle.cos()
    matrices[:, 0, 1], matrices[:, 1, 0] = angle.sin(), -angle.sin()  # y points down
    return matrices


def affine(zoom: Tensor, shift: Tensor, shear: Tensor) -> Tensor:
    """Zoom and shear about the centre, then a shift.

    zoom (B,), shift (B, 2) along x and y as a share of the image side, shear (B, 2) degrees along x
    and y -> (B, 3, 3) float64, see `warp`.
    """
    tangent = shear.double().clamp(-MAX_SHEAR, MAX_SHEAR).deg2rad().tan()
    matrices = torch.eye(3, dtype=torch.float64).repeat(len(zoom), 1, 1)
    matrices[:, 0, 0] = matrices[:, 1, 1] = zoom.double()
    matrices[:, 0, 1], matrices[:, 1, 0] = zoom * tangent[:, 0], zoom * tangent[:, 1]
    matrices[:, :2, 2] = 2 * shift  # the side is 2 long
    return matrices


def warp(x: Tensor, matrices: Tensor, *, padding: str, fill: float = 0.0) -> Tensor:
    """Square images moved by affine maps, bilinear.

    Args:
        x: (B, C, S, S).
        matrices: (B, 3, 3) on the CPU, where a point goes; x to the right and y down, each -1..1
            from edge to edge.
        padding: "reflection" mirrors at the edge of the border pixels, "zeros" shows fill.
        fill: value of what comes from outside with padding "zeros".
    """
    back = torch.linalg.inv(matrices)[:, :2].float()  # output -> input
    grid = F.affine_grid(*to(x.device, back), list(x.shape), align_corners=False)
    if not fill:
        return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)
    return F.grid_sample(x - fill, grid, padding_mode=padding, align_corners=False).add_(fill)


# --- colour -----------------------------------------------------------------------------------


def random_colour(x: Tensor, ops: Ops, generator: torch.Generator) -> Tensor:
    """Colour jitter with its four steps in a random order per sample, or for half of the chosen
    samples a brightness and contrast change where the policy has one."""
    chosen = coin(len(x), ops.jitter_p, generator)
    if chosen is None:
        return x
    simple = torch.rand(len(x), generator=generator) < (0.5 if ops.brightness_contrast else 0.0)
    x = jittered(x, (chosen & ~simple).nonzero()[:, 0], ops, generator)
    rows = (chosen & simple).nonzero()[:, 0]
    amount = uniform(
        len(rows), -ops.brightness_contrast, ops.brightness_contrast, generator, 2
    ).unbind(1)
    change = to(x.device, *amount)
    return on_rows(
        x, rows, lambda part: colours(part, lambda rgb: brightness_contrast(rgb, *change))
    )


def jittered(x: Tensor, rows: Tensor, ops: Ops, generator: torch.Generator) -> Tensor:
    """Colour jitter of some rows; the samples at the same step in their own order go together."""
    count = len(rows)
    factors = [
        uniform(count, max(0.0, 1 - strength), 1 + strength, generator)
        for strength in ops.jitter[:3]
    ]
    factors.append(uniform(count, -ops.jitter[3], ops.jitter[3], generator))
    steps = (brightness, contrast, saturation, hue)
    if x.shape[1] == 1:
        steps = steps[:2]
    order = torch.rand(count, 4, generator=generator).argsort(1)  # (n, 4)
    for turn in range(4):
        for step, operation in enumerate(steps):
            here = (order[:, turn] == step).nonzero()[:, 0]
            if ops.jitter[step] and len(here):
                (factor,) = to(x.device, factors[step][here])
                x = on_rows(x, rows[here], part_of_colours(operation, factor))
    return x


def part_of_colours(
    operation: Callable[[Tensor, Tensor], Tensor], factor: Tensor
) -> Callable[[Tensor], Tensor]:
    """A colour operation with its parameters bound."""
    return lambda part: colours(part, lambda rgb: operation(rgb, factor))


def per_sample(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]


def grey(x: Tensor) -> Tensor:
    """Luma of RGB, (B, 1, H, W); grey images as they are."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """other + factor (x - other), clipped to 0..1."""
    return torch.lerp(other.expand_as(x), x, per_sample(factor)).clamp_(0, 1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """factor x, clipped."""
    return (x * per_sample(factor)).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Distance to the mean luma of the image times factor."""
    return blend(x, grey(x).mean((2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Distance to the luma of each pixel times factor."""
    return blend(x, grey(x), factor)


def brightness_contrast(x: Tensor, bright: Tensor, contrasted: Tensor) -> Tensor:
    """(1 + contrasted) x + bright, clipped (albumentations' RandomBrightnessContrast)."""
    return torch.addcmul(per_sample(bright), x, 1 + per_sample(contrasted)).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """RGB with the HSV hue turned by a share of the circle, saturation and value kept.

    Channel c of a colour with hue h (sextants), value v and chroma d is
    v - d max(0, min(1, k, 4 - k)) with k = (n_c + h) mod 6, n = 5, 3, 1 for R, G, B
    (the closed form of the HSV cone).
    """
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    angle = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    angle = angle + 6 * turn[:, None, None]  # (B, H, W) sextants
    starts = torch.tensor([5.0, 3.0, 1.0]).to(x.device, non_blocking=True)[:, None, None]
    k = (angle[:, None] + starts).remainder_(6)  # (B, 3, H, W)
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value[:, None], chroma[:, None], share, value=-1)


# --- blur, noise, dropout ---------------------------------------------------------------------


def random_blur(x: Tensor, ops: Ops, generator: torch.Generator) -> Tensor:
    """Gaussian blur, or motion blur for half of the chosen samples where the policy has it."""
    chosen = coin(len(x), ops.blur_p, generator)
    if chosen is None:
        return x
    motion = torch.rand(len(x), generator=generator) < (0.5 if ops.motion_blur else 0.0)
    largest = 2 * min(x.shape[2:]) - 1  # a border cannot be reflected further
    odd = [side for side in range(ops.blur_kernel[0], ops.blur_kernel[1] + 1) if side % 2]
    sides = torch.tensor(odd)[torch.randint(len(odd), (len(x),), generator=generator)]
    sides = sides.clamp(max=largest)
    angle = uniform(len(x), 0, math.pi, generator)
    rows = (chosen & ~motion).nonzero()[:, 0]
    x = on_rows(x, rows, lambda part: separable(part, gaussian_taps(sides[rows])))
    lines = (chosen & motion).nonzero()[:, 0]
    return on_rows(x, lines, lambda part: filtered(part, motion_taps(sides[lines], angle[lines])))


def gaussian_taps(sides: Tensor) -> Tensor:
    """Gaussian taps for odd sides (B,), centred in the largest: (B, K), sum 1.

    sigma = 0.3 ((side - 1) / 2 - 1) + 0.8 (OpenCV's rule for a kernel side).
    """
    half = int(sides.max()) // 2
    offset = torch.arange(-half, half + 1)  # (K,)
    sigma = 0.3 * ((sides - 1) * 0.5 - 1) + 0.8
    taps = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    taps *= offset.abs() <= (sides // 2)[:, None]
    return taps / taps.sum(1, keepdim=True)


def motion_taps(sides: Tensor, angle: Tensor) -> Tensor:
    """Straight strokes through the centre: (B, K, K), sum 1.

    A pixel weighs 1 minus its distance from the line, within half a side from the centre along the
    line's longer direction.
    """
    half = int(sides.max()) // 2
    offset = torch.arange(-half, half + 1, dtype=torch.float32)
    down, right = offset[None, :, None], offset[None, None, :]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    distance = (right * sin + down * cos).abs()  # y points down
    reach = (sides // 2)[:, None, None]
    taps = (1 - distance).clamp(min=0) * (torch.maximum(down.abs(), right.abs()) <= reach)
    return taps / taps.sum((1, 2), keepdim=True)


def separable(x: Tensor, taps: Tensor) -> Tensor:
    """Each sample filtered with its own taps (B, K) along both axes, borders reflected."""
    (taps,) = to(x.device, taps)
    across = filtered(x, taps[:, None, :])
    return filtered(across, taps[:, :, None])


def filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """Each sample correlated with its own kernel (B, KH, KW), borders reflected."""
    batch, channels = x.shape[:2]
    (kernels,) = to(x.device, kernels)
    down, right = kernels.shape[1] // 2, kernels.shape[2] // 2
    padded = F.pad(x, (right, right, down, down), mode="reflect")
    grouped = padded.reshape(1, batch * channels, *padded.shape[2:])
    kernels = kernels.repeat_interleave(channels, 0)[:, None]  # (B C, 1, KH, KW)
    return F.conv2d(grouped, kernels, groups=batch * channels).reshape(x.shape)


def random_noise(x: Tensor, ops: Ops, generator: torch.Generator) -> Tensor:
    """Gaussian noise, independent per pixel and channel."""
    chosen = coin(len(x), ops.noise_p, generator)
    if chosen is None:
        return x
    rows = chosen.nonzero()[:, 0]
    (std,) = to(x.device, uniform(len(rows), *ops.noise_std, generator))
    seed = int(torch.randint(2**62, (1,), generator=generator))
    field = torch.Generator(x.device).manual_seed(seed)
    return on_rows(x, rows, lambda part: colours(part, lambda rgb: noisy(rgb, std, field)))


def noisy(x: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """x plus normal noise of standard deviation std (B,), clipped; the generator is on the device
    of x."""
    field = torch.randn(x.shape, generator=generator, device=x.device)
    return torch.addcmul(x, field, per_sample(std)).clamp_(0, 1)


def random_dropout(x: Tensor, ops: Ops, generator: torch.Generator) -> Tensor:
    """Black rectangles at random places, wholly inside the image."""
    chosen = coin(len(x), ops.dropout_p, generator)
    if chosen is None:
        return x
    rows = chosen.nonzero()[:, 0]
    low, high = ops.dropout_holes
    holes = torch.randint(low, high + 1, (len(rows), 1), generator=generator)
    side = torch.tensor(x.shape[2:])
    share = uniform(len(rows), *ops.dropout_size, generator, high, 2)  # (n, M, 2) of y, x
    extent = (share * side).round().clamp(min=1)
    start = (torch.rand(share.shape, generator=generator) * (side - extent + 1)).floor()
    extent *= (torch.arange(high) < holes)[:, :, None]  # no more than drawn
    return on_rows(x, rows, lambda part: painted(part, start, start + extent, 0.0))


def cutout(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of zeros around a random pixel, cut at the border (DeVries and Taylor 2017)."""
    centre = torch.rand(len(x), 1, 2, generator=generator) * torch.tensor(x.shape[2:])
    start = centre.floor() - side // 2  # (B, 1, 2)
    return painted(x, start, start + side, 0.0)


def painted(x: Tensor, start: Tensor, stop: Tensor, fill: float | Tensor) -> Tensor:
    """Rectangles painted over, in place.

    start, stop: (B, M, 2) rows and columns on the CPU, stop excluded. fill: a number or (C,).
    """
    start, stop = to(x.device, start, stop)
    lines = torch.arange(x.shape[2], device=x.device)
    columns = torch.arange(x.shape[3], device=x.device)
    tall = (lines >= start[:, :, :1]) & (lines < stop[:, :, :1])  # (B, M, H)
    wide = (columns >= start[:, :, 1:]) & (columns < stop[:, :, 1:])  # (B, M, W)
    mask = torch.einsum("bmh,bmw->bhw", tall.float(), wide.float()) > 0  # inside any rectangle
    if isinstance(fill, Tensor):
        return torch.where(mask[:, None], fill[:, None, None], x)
    return x.masked_fill_(mask[:, None], fill)
