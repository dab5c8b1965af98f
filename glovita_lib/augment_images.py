"""Augmentations of a batch of images in which every sample has its own parameters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.augment_crop import CropResize
from glovita_lib.spec_augment import BaseOps, ImageOps

# ------------------------------------------------------------------- the table of operations
#
# Every operation of a modality, in the order in which they are applied: that of their functions in
# this file, which is also that of their switches in the Struct of the parameters.

Function = TypeVar("Function", bound=Callable[..., Any])
Stage = Literal["geometry", "values", "normalised"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One augmentation: its function, and the fields that turn it on."""

    switches: tuple[str, ...]
    stage: Stage
    function: Callable[..., Any]

    def on(self, ops: BaseOps) -> bool:
        """Whether the operation draws anything under given parameters."""
        return any(map(ops.draws, self.switches))


@dataclass(slots=True)
class Operations:
    """The operations of a modality; each is registered at its function."""

    table: list[Operation] = field(default_factory=list)

    def register(self, *switches: str, stage: Stage = "values") -> Callable[[Function], Function]:
        """Decorator of the function of an operation.

        Args:
            switches: fields that turn it on, each its probability where it has one.
            stage: what it changes. "geometry": `function(placement, ops, generator)` draws where
                pixels come from. "values": `function(x, ops, generator, mean)` changes images
                (B, C, S, S) float32 in 0..1, which may be changed in place, and mean (C,) is the
                mean colour; of volumes (B, C, X, Y, Z), which are normalised, it gets their grid
                instead. "normalised": the same after the normalisation, where it is 0.
        """

        def registered(function: Function) -> Function:
            self.table.append(Operation(switches, stage, function))
            return function

        return registered

    def active(self, ops: BaseOps, stage: Stage) -> list[Operation]:
        """Operations of a stage that draw something, in their order."""
        return [each for each in self.table if each.stage == stage and each.on(ops)]


OPERATIONS = Operations()
operation = OPERATIONS.register

# ------------------------------------------------------------------------- single operations
#
# The operations take images (B, C, H, W) float32 in 0..1, which they may change, and parameters
# (B,) on their device, and return images. A registered function draws the parameters on the CPU and
# applies an operation only to the samples that drew it. Colour operations leave a fourth channel
# (alpha) alone and do without saturation and hue on grey images. B batch, C channels, H W pixels.

GREY = (0.2989, 0.587, 0.114)  # luma of R, G, B, ITU-R BT.601 as in torchvision
MAX_SHEAR_DEGREES = 89.0  # degrees


class ClipGenerator(torch.Generator):
    """A generator whose draws for each image of a batch serve that many images that follow one
    another: the frames of clips, (B, T) as (B T). Its stream is that of B images."""

    frames = 1


def shared(draw: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws (count, ...) for the images of a batch, by `draw(shape, generator=generator)`."""
    if not isinstance(generator, ClipGenerator) or generator.frames == 1:
        return draw(tuple(shape), generator=generator)
    drawn = draw((shape[0] // generator.frames, *shape[1:]), generator=generator)
    return drawn.repeat_interleave(generator.frames, 0)


def rand(*shape: int, generator: torch.Generator) -> Tensor:
    """(count, ...) float32 numbers from 0 to 1, on the CPU."""
    return shared(torch.rand, shape, generator)


def randint(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(count, ...) whole numbers from low to below high, on the CPU."""
    return shared(partial(torch.randint, low, high), shape, generator)


def coin(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """Which of count samples are chosen, (count,) bool on the CPU; nothing is drawn for 0."""
    if not probability:
        return torch.zeros(count, dtype=torch.bool)
    return rand(count, generator=generator) < probability


def uniform(count: int, low: float, high: float, generator: torch.Generator, *more: int) -> Tensor:
    """(count, *more) float32 numbers between low and high, on the CPU."""
    return low + (high - low) * rand(count, *more, generator=generator)


def to(device: torch.device, *values: Tensor) -> list[Tensor]:
    """Parameters moved to the device of the images without waiting for it."""
    return [value.to(device, non_blocking=True) for value in values]


@dataclass(frozen=True, slots=True)
class Change:
    """An operation on some samples of a batch."""

    rows: Tensor  # (n,) int64 on the CPU, ascending
    operation: Callable[..., Tensor]  # images (n, C, S, S) and parameters (n, ...) -> images
    parameters: tuple[Tensor, ...]  # each (n, ...), on the CPU

    def of(self, x: Tensor, first: int = 0, part: slice = slice(None)) -> Tensor:
        """Images changed, which may happen in place.

        Args:
            x: (B, C, S, S), the samples of the batch from `first` on.
            part: which of the rows are among them.
        """
        parameters, rows = [each[part] for each in self.parameters], self.rows[part]
        if len(rows) == len(x):
            return self.operation(x, *parameters)
        there = (rows - first).to(x.device, non_blocking=True)
        return x.index_copy_(0, there, self.operation(x.index_select(0, there), *parameters))


@dataclass(slots=True)
class Planned:
    """In the place of images: what is to be changed of them is noted, to be done block by block."""

    shape: torch.Size  # (B, C, S, S)
    device: torch.device
    changes: list[Change] = field(default_factory=list)

    def __len__(self) -> int:
        return self.shape[0]

    def parts(self, edges: list[int]) -> list[list[tuple[Change, slice]]]:
        """What is to be changed of the samples from each edge to the next, in its order: the
        changes and which of their rows these samples are."""
        bounds = [
            torch.searchsorted(each.rows, torch.tensor(edges)).tolist() for each in self.changes
        ]
        return [
            [
                (change, slice(bound[block], bound[block + 1]))
                for change, bound in zip(self.changes, bounds, strict=True)
                if bound[block] < bound[block + 1]
            ]
            for block in range(len(edges) - 1)
        ]


Images = TypeVar("Images", Tensor, Planned)


def on_rows(
    x: Images, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor
) -> Images:
    """The operation on the chosen rows of x only; x itself may be changed.

    Args:
        x: images, or what stands for them.
        chosen: row numbers (n,), int64 on the CPU, ascending.
        operation: images (n, C, S, S) and the parameters -> images; it sees them in parts, if x is
            planned.
        parameters: of the chosen rows, (n, ...) on the CPU.
    """
    if not len(chosen):
        return x
    change = Change(chosen, operation, parameters)
    if isinstance(x, Planned):
        x.changes.append(change)
        return x
    return change.of(x)


# --- geometry ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Placement:
    """Where the pixels of each sample on the canvas come from."""

    crop: CropResize
    sizes: np.ndarray  # (B, 2) height and width of the images
    boxes: Tensor | None = None  # (B, 2, 4) windows, see CropResize; none: not drawn yet
    hflip: Tensor | None = None  # (B,) bool
    vflip: Tensor | None = None  # (B,) bool


@operation("crop", stage="geometry")
def random_window(place: Placement, ops: ImageOps, generator: torch.Generator) -> None:
    """A window of the image, unless it is cut already."""
    if place.boxes is None:
        place.boxes = place.crop.boxes(place.sizes, generator)


@operation("hflip_p", stage="geometry")
def random_hflip(place: Placement, ops: ImageOps, generator: torch.Generator) -> None:
    """Left and right exchanged."""
    place.hflip = coin(len(place.sizes), ops.hflip_p, generator)


@operation("vflip_p", stage="geometry")
def random_vflip(place: Placement, ops: ImageOps, generator: torch.Generator) -> None:
    """Top and bottom exchanged."""
    place.vflip = coin(len(place.sizes), ops.vflip_p, generator)


@operation("rotate_p", "affine_p")
def random_warp(x: Images, ops: ImageOps, generator: torch.Generator, mean: Tensor) -> Images:
    """Rotation, then affine warp, as one resampling with reflected borders."""
    count = len(x)
    rotated = coin(count, ops.rotate_p, generator)
    warped = coin(count, ops.affine_p, generator)
    angle = uniform(count, -ops.rotate_degrees, ops.rotate_degrees, generator)
    zoom = uniform(count, *ops.affine_scale, generator)
    shift = uniform(count, -ops.affine_translate, ops.affine_translate, generator, 2)
    shear = uniform(count, -ops.affine_shear, ops.affine_shear, generator, 2)
    matrices = affine(
        torch.where(warped, zoom, 1.0), shift * warped[:, None], shear * warped[:, None]
    ) @ rotation(angle * rotated)
    rows = (rotated | warped).nonzero()[:, 0]
    return on_rows(x, rows, partial(warp, padding="reflection"), matrices[rows])


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
    tangent = shear.double().clamp(-MAX_SHEAR_DEGREES, MAX_SHEAR_DEGREES).deg2rad().tan()
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
    (back,) = to(x.device, back)
    grid = F.affine_grid(back, list(x.shape), align_corners=False)
    if not fill:
        return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)
    return F.grid_sample(x - fill, grid, padding_mode=padding, align_corners=False).add_(fill)


# --- colour -----------------------------------------------------------------------------------


@operation("jitter_p")
def random_colour(x: Images, ops: ImageOps, generator: torch.Generator, mean: Tensor) -> Images:
    """Colour jitter with its four steps in a random order per sample, or for half of the chosen
    samples a brightness and contrast change where the policy has one."""
    chosen = coin(len(x), ops.jitter_p, generator)
    simple = rand(len(x), generator=generator) < (0.5 if ops.brightness_contrast else 0.0)
    x = jittered(x, (chosen & ~simple).nonzero()[:, 0], ops, generator)
    rows = (chosen & simple).nonzero()[:, 0]
    amount = uniform(
        len(rows), -ops.brightness_contrast, ops.brightness_contrast, generator, 2
    ).unbind(1)
    return on_rows(x, rows, of_colours(brightness_contrast), *amount)


def jittered(x: Images, rows: Tensor, ops: ImageOps, generator: torch.Generator) -> Images:
    """Colour jitter of some rows; the samples at the same step in their own order go together."""
    count = len(rows)
    factors = [
        uniform(count, max(0.0, 1 - strength), 1 + strength, generator)
        for strength in ops.jitter[:3]
    ]
    factors.append(uniform(count, -ops.jitter[3], ops.jitter[3], generator))
    steps = [brightness, contrast, saturation, hue][: 2 if x.shape[1] == 1 else 4]
    order = rand(count, 4, generator=generator).argsort(1)  # (n, 4)
    for turn in range(4):
        for step, operation in enumerate(steps):
            here = (order[:, turn] == step).nonzero()[:, 0]
            if ops.jitter[step]:
                x = on_rows(x, rows[here], of_colours(operation), factors[step][here])
    return x


def of_colours(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation on grey or RGB, a fourth channel untouched; its parameters come on the CPU."""

    def applied(x: Tensor, *parameters: Tensor) -> Tensor:
        there = to(x.device, *parameters)
        if x.shape[1] != 4:
            return operation(x, *there)
        return torch.cat([operation(x[:, :3], *there), x[:, 3:]], 1)

    return applied


def per_sample(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]


def grey(x: Tensor) -> Tensor:
    """Luma of RGB (B, 3, H, W), (B, 1, H, W)."""
    red, green, blue = x.split(1, 1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """factor x, clipped."""
    return x.mul_(per_sample(factor)).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Distance to the mean luma of the image times factor, clipped."""
    means = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    luma = means if x.shape[1] == 1 else grey(means)
    return x.mul_(per_sample(factor)).add_(luma.mul_(1 - per_sample(factor))).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Distance to the luma of each pixel times factor, clipped; grey images stay."""
    if x.shape[1] == 1:
        return x
    factor = per_sample(factor)
    luma = grey(x).mul_(1 - factor)
    return x.mul_(factor).add_(luma).clamp_(0, 1)


def brightness_contrast(x: Tensor, bright: Tensor, contrasted: Tensor) -> Tensor:
    """(1 + contrasted) x + bright, clipped (albumentations' RandomBrightnessContrast)."""
    return x.mul_(per_sample(1 + contrasted)).add_(per_sample(bright)).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """RGB with the HSV hue turned by a share of the circle, saturation and value kept.

    Channel c of a colour with hue h (sextants), value v, least channel m and chroma d = v - m is
    v - d max(0, min(1, 2 - r)), r the distance of h + s_c from 0 on the circle of 6, s = 3, 1, -1
    for R, G, B (the closed form of the HSV cone). Of t from -6 to 6 that distance is
    3 - ||t| - 3|, and d h is sign(G - B) (v - 2 m + G + B - R), from -3 d to 3 d: nothing has to be
    divided.
    """
    red, green, blue = x.unbind(1)  # (B, H, W)
    value = torch.maximum(red, green).clamp_(min=blue)
    least = torch.minimum(red, green).clamp_(max=blue)
    chroma = value - least
    angle = torch.sub(value, least, alpha=2).add_(green).add_(blue).sub_(red)
    angle.copysign_(green - blue)
    starts = torch.tensor([3.0, 1.0, -1.0]).to(x.device, non_blocking=True)
    shift = (6 * turn[:, None] + (starts + 3)).remainder_(6).sub_(3)  # (B, 3) from -3 to below 3
    value, chroma = value[:, None], chroma[:, None]
    out = torch.addcmul(angle[:, None], chroma, shift[:, :, None, None], out=x)  # (B, 3, H, W)
    out.abs_().sub_(chroma, alpha=3).abs_().clamp_(chroma, 2 * chroma)
    return torch.sub(value + chroma, out, out=out)


# --- blur, noise, dropout ---------------------------------------------------------------------


@operation("blur_p")
def random_blur(x: Images, ops: ImageOps, generator: torch.Generator, mean: Tensor) -> Images:
    """Gaussian blur, or motion blur for half of the chosen samples where the policy has it."""
    chosen = coin(len(x), ops.blur_p, generator)
    motion = rand(len(x), generator=generator) < (0.5 if ops.motion_blur else 0.0)
    largest = 2 * min(x.shape[2:]) - 1  # a border cannot be reflected further
    odd = [side for side in range(ops.blur_kernel[0], ops.blur_kernel[1] + 1) if side % 2]
    sides = torch.tensor(odd)[randint(0, len(odd), (len(x),), generator)]
    sides = sides.clamp(max=largest)
    angle = uniform(len(x), 0, math.pi, generator)
    if len(rows := (chosen & ~motion).nonzero()[:, 0]):
        x = on_rows(x, rows, separable, gaussian_taps(sides[rows]))
    if len(rows := (chosen & motion).nonzero()[:, 0]):
        x = on_rows(x, rows, filtered, motion_taps(sides[rows], angle[rows]))
    return x


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


@operation("noise_p")
def random_noise(x: Images, ops: ImageOps, generator: torch.Generator, mean: Tensor) -> Images:
    """Gaussian noise, independent per pixel and channel."""
    chosen = coin(len(x), ops.noise_p, generator)
    rows = chosen.nonzero()[:, 0]
    std = uniform(len(rows), *ops.noise_std, generator)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    field = torch.Generator(x.device).manual_seed(seed)
    return on_rows(x, rows, of_colours(partial(noisy, generator=field)), std)


def noisy(x: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """x plus normal noise of standard deviation std (B,), clipped; the generator is on the device
    of x."""
    field = torch.randn(x.shape, generator=generator, device=x.device)
    return torch.addcmul(x, field, per_sample(std)).clamp_(0, 1)


@operation("dropout_p")
def random_dropout(x: Images, ops: ImageOps, generator: torch.Generator, mean: Tensor) -> Images:
    """Black rectangles at random places, wholly inside the image."""
    chosen = coin(len(x), ops.dropout_p, generator)
    rows = chosen.nonzero()[:, 0]
    low, high = ops.dropout_holes
    holes = randint(low, high + 1, (len(rows), 1), generator)
    side = torch.tensor(x.shape[2:])
    share = uniform(len(rows), *ops.dropout_size, generator, high, 2)  # (n, M, 2) of y, x
    extent = (share * side).round().clamp(min=1)
    start = (rand(*share.shape, generator=generator) * (side - extent + 1)).floor()
    extent *= (torch.arange(high) < holes)[:, :, None]  # no more than drawn
    return on_rows(x, rows, painted, start, start + extent)


def painted(x: Tensor, start: Tensor, stop: Tensor, fill: float | Tensor = 0.0) -> Tensor:
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


# ------------------------------------------------------------------------------- RandAugment
#
# RandAugment: a few operations from one list, applied one after another (Cubuk et al. 2020).
#
# The list, its ranges and the chance to skip an operation are those of the AutoAugment search space
# (Cubuk et al. 2019): strength 1 is its upper end. Samples that drew the same operation in a step
# go through it together. Images are float32 in 0..1; B batch, C channels, H W pixels, S side.

MAX_SHEAR = 0.3  # slope
MAX_TRANSLATE = 150 / 331  # share of the image side
MAX_ROTATE = 30.0  # degrees
MAX_ENHANCE = 0.9  # factors of colour, contrast, brightness and sharpness are 1 +- this
MAX_CUTOUT = 20, 0.625  # pixels, but at most this share of the side (20 of CIFAR's 32)
FILL = 128 / 255  # of what a geometric operation moves in from outside
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def invert(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """1 - x."""
    return 1 - x


def auto_contrast(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Each channel stretched to 0..1; a constant channel stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (x - low) / torch.where(spread > 0, spread, 1.0), x)


def equalize(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Histogram of each channel flattened, in 256 levels (the integer arithmetic of PIL)."""
    batch, channels = x.shape[:2]
    levels = (x * 255).round_().long().view(batch * channels, -1)  # (B C, H W)
    counts = torch.zeros(batch * channels, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    last = counts.gather(1, levels.amax(1, keepdim=True))  # pixels of the highest level
    step = (counts.sum(1, keepdim=True) - last) // 255
    below = counts.cumsum(1) - counts  # (B C, 256)
    table = (below + step // 2) // step.clamp(min=1)
    new = table.clamp_(max=255).gather(1, levels).view_as(x).float() / 255
    return torch.where((step > 0).view(batch, channels, 1, 1), new, x)


def posterize(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """8 to 4 bits of 8 kept."""
    width = per_sample(2.0 ** (4 * strength).round())  # levels that become one
    return ((x * 255).round() / width).floor() * width / 255


def solarize(x: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Values from a threshold on inverted; the threshold goes from 256 down to 0 of 255."""
    return torch.where(x >= per_sample((1 - strength) * 256 / 255), 1 - x, x)


def enhance(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operation with a factor where 1 changes nothing."""
    return lambda x, strength, sign: operation(x, 1 + sign * MAX_ENHANCE * strength)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Distance to the image smoothed by (1 1 1; 1 5 1; 1 1 1) / 13 times factor; the border pixels
    stay (PIL)."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = torch.ones(3, 3, device=x.device) / 13
    kernel[1, 1] = 5 / 13
    smooth = filtered(x, kernel.expand(len(x), 3, 3))[:, :, 1:-1, 1:-1]
    out = x.clone()
    inner = x[:, :, 1:-1, 1:-1]
    out[:, :, 1:-1, 1:-1] = torch.lerp(smooth, inner, per_sample(factor)).clamp_(0, 1)
    return out


COLOUR: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "invert": invert,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "posterize": posterize,
    "solarize": solarize,
    "brightness": enhance(brightness),
    "contrast": enhance(contrast),
    "saturation": enhance(saturation),
    "sharpness": enhance(sharpness),
}
NAMES = (*GEOMETRIC, *COLOUR, "cutout")


@operation("randaugment_ops")
def randaugment(x: Images, ops: ImageOps, generator: torch.Generator, mean: Tensor) -> Images:
    """RandAugment: operations drawn per sample, with replacement, and their strengths per
    operation; the cutout among them paints with the mean colour."""
    batch, side = len(x), x.shape[2]
    for _ in range(ops.randaugment_ops):
        choice = randint(0, len(NAMES), (batch,), generator)
        strength = uniform(batch, *ops.randaugment_magnitude, generator) / 10
        sign = randint(0, 2, (batch,), generator) * 2.0 - 1
        place = rand(batch, 1, 2, generator=generator)
        applied = rand(batch, generator=generator) < ops.randaugment_p
        choice = torch.where(applied, choice, -1)
        rows = ((choice >= 0) & (choice < len(GEOMETRIC))).nonzero()[:, 0]
        x = on_rows(
            x,
            rows,
            partial(warp, padding="zeros", fill=FILL),
            moves(choice[rows], (sign * strength)[rows]),
        )
        for index, operation in enumerate(COLOUR.values(), start=len(GEOMETRIC)):
            rows = (choice == index).nonzero()[:, 0]
            x = on_rows(x, rows, of_colours(operation), strength[rows], sign[rows])
        rows = (choice == len(NAMES) - 1).nonzero()[:, 0]
        edge = (strength[rows] * min(MAX_CUTOUT[0], MAX_CUTOUT[1] * side)).round()
        start = (place[rows] * side).floor() - (edge / 2).floor()[:, None, None]
        x = on_rows(x, rows, partial(painted, fill=mean), start, start + edge[:, None, None])
    return x


def moves(choice: Tensor, amount: Tensor) -> Tensor:
    """Affine maps of the geometric operations: choice (B,) into GEOMETRIC, amount (B,) in -1..1
    -> (B, 3, 3), see `warp`. Shears keep the upper left corner."""
    matrices = torch.eye(3, dtype=torch.float64).repeat(len(choice), 1, 1)
    slope = (amount * MAX_SHEAR).double()
    shift = (2 * amount * MAX_TRANSLATE).double()  # the side is 2 long
    for axis in (0, 1):
        sheared, shifted = choice == axis, choice == 2 + axis
        matrices[sheared, axis, 1 - axis] = slope[sheared]
        matrices[sheared, axis, 2] = slope[sheared]
        matrices[shifted, axis, 2] = shift[shifted]
    turned = choice == 4
    matrices[turned] = rotation(amount[turned] * MAX_ROTATE)
    return matrices


# ------------------------------------------------------------------------------------ cutout


@operation("cutout_size", stage="normalised")
def cutout(x: Images, ops: ImageOps, generator: torch.Generator, mean: Tensor) -> Images:
    """A square of the mean colour around a random pixel, cut at the border (DeVries and Taylor
    2017)."""
    centre = rand(len(x), 1, 2, generator=generator) * torch.tensor(x.shape[2:])
    start = centre.floor() - ops.cutout_size // 2  # (B, 1, 2)
    return on_rows(x, torch.arange(len(x)), painted, start, start + ops.cutout_size)
