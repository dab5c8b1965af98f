"""RandAugment: a few operations from one list, applied one after another (Cubuk et al. 2020).

The list, its ranges and the chance to skip an operation are those of the AutoAugment search space
(Cubuk et al. 2019): strength 1 is its upper end. Samples that drew the same operation in a step go
through it together. Images are float32 in 0..1; B batch, C channels, H W pixels, S side.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from glovita_lib.augment2d import (
    brightness,
    colours,
    contrast,
    filtered,
    on_rows,
    painted,
    per_sample,
    rotation,
    saturation,
    to,
    uniform,
    warp,
)

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


def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    count: int,
    magnitude: tuple[float, float],
    probability: float,
    fill: Tensor,
) -> Tensor:
    """RandAugment of a batch; x may be changed.

    Args:
        x: (B, C, S, S).
        generator: CPU generator of the parameters.
        count: operations drawn per sample, with replacement.
        magnitude: lowest and highest strength, 0 to 10, drawn per operation.
        probability: of applying a drawn operation.
        fill: (C,) colour of the cutout operation, on the device of x.
    """
    batch, side = len(x), x.shape[2]
    for _ in range(count):
        choice = torch.randint(len(NAMES), (batch,), generator=generator)
        strength = uniform(batch, *magnitude, generator) / 10
        sign = torch.randint(2, (batch,), generator=generator) * 2.0 - 1
        place = torch.rand(batch, 1, 2, generator=generator)
        applied = torch.rand(batch, generator=generator) < probability
        choice = torch.where(applied, choice, -1)
        rows = ((choice >= 0) & (choice < len(GEOMETRIC))).nonzero()[:, 0]
        if len(rows):
            matrices = moves(choice[rows], (sign * strength)[rows])
            x = on_rows(x, rows, bound_warp(matrices))
        for index, operation in enumerate(COLOUR.values(), start=len(GEOMETRIC)):
            rows = (choice == index).nonzero()[:, 0]
            if len(rows):
                x = on_rows(x, rows, bound(operation, *to(x.device, strength[rows], sign[rows])))
        rows = (choice == len(NAMES) - 1).nonzero()[:, 0]
        if len(rows):
            edge = (strength[rows] * min(MAX_CUTOUT[0], MAX_CUTOUT[1] * side)).round()
            start = (place[rows] * side).floor() - (edge / 2).floor()[:, None, None]
            x = on_rows(x, rows, bound_paint(start, start + edge[:, None, None], fill))
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


def bound_warp(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """The warp of some rows, grey outside."""
    return lambda part: warp(part, matrices, padding="zeros", fill=FILL)


def bound(
    operation: Callable[..., Tensor], strength: Tensor, sign: Tensor
) -> Callable[[Tensor], Tensor]:
    """A colour operation with its parameters."""
    return lambda part: colours(part, lambda rgb: operation(rgb, strength, sign))


def bound_paint(start: Tensor, stop: Tensor, fill: Tensor) -> Callable[[Tensor], Tensor]:
    """The cutout of some rows."""
    return lambda part: painted(part, start, stop, fill)
