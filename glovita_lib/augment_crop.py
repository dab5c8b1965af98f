"""Geometry of an image: a source window, resampled to the square canvas that the encoder receives.

A window is cut out of the source, the cut is resized, and the canvas is a part of what comes out;
every sample is resampled once, or twice where a crop of another size than the encoder's input is
resized to that. Resampling is Pillow's bit by bit on every device: weights in fixed
point, along the rows first, whole levels after each axis. Windows live on the CPU; pixels on any
device. B batch, C channels, H W source pixels, S side of the canvas, T source pixels that make one
of the canvas.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from PIL import Image
from torch import Tensor

from glovita_lib.errors import UserError
from glovita_lib.spec_augment import ImageOps

CHUNK = 1 << 26  # source values resampled at once (256 MiB as float32)
ATTEMPTS = 10  # of a random resized crop before it falls back to a centre crop, as in torchvision
START, LENGTH, RESIZED, OFFSET = range(4)  # numbers of a box along an axis, see CropResize.boxes
BITS = {8: 22, 16: 34}  # bit depth -> bits of a weight behind the point; Pillow's are 22
LOW_BITS = 8  # of these in the lower of the two parts that float32 can multiply exactly
MOST_TAPS = 500  # products with a lower part that float32 adds exactly
WASTE = 4  # times the canvas that a resized cut may be large before only what is shown is computed


def triangle(t: Tensor) -> Tensor:
    """Bilinear kernel, 1 - |t| for |t| < 1."""
    return (1 - t.abs()).clamp_(min=0)


def cubic(t: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -1/2, for |t| < 2, in Pillow's order of operations."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = (((t - 5) * t + 8) * t - 4) * -0.5
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def lanczos(t: Tensor) -> Tensor:
    """Lanczos kernel sinc(t) sinc(t / 3) for |t| < 3."""
    return torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), torch.zeros_like(t))


KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float, Image.Resampling]] = {
    "bilinear": (triangle, 1.0, Image.Resampling.BILINEAR),
    "bicubic": (cubic, 2.0, Image.Resampling.BICUBIC),
    "lanczos": (lanczos, 3.0, Image.Resampling.LANCZOS),
}  # interpolation -> kernel, its radius, Pillow's name; nearest is a gather


def gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[b, :, rows[b, i], columns[b, j]]; what lies outside is 0.

    images (B, C, H, W) of any type, rows (B, S) and columns (B, T) int64 on the CPU
    -> (B, C, S, T), same type and device.
    """
    batch, channels, height, width = images.shape
    top, left = (max(0, -int(index.min())) for index in (rows, columns))
    bottom = max(0, int(rows.max()) + 1 - height)
    right = max(0, int(columns.max()) + 1 - width)
    if top or left or bottom or right:
        images = F.pad(images, (left, right, top, bottom))
    stride = images.shape[3]
    starts = ((rows + top) * stride + left).to(images.device, non_blocking=True)
    steps = columns.to(images.device, non_blocking=True)
    flat = (starts[:, :, None] + steps[:, None, :]).view(batch, 1, -1)  # (B, 1, S T)
    picked = images.reshape(batch, channels, -1).gather(2, flat.expand(-1, channels, -1))
    return picked.view(batch, channels, rows.shape[1], columns.shape[1])


# ------------------------------------------------------------------- resampling, on any device


def centres(boxes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where pixels of the canvas lie in the cut along an axis, and how many pixels of it the unit
    of the kernel is.

    boxes (B, 4) of the axis, positions (B, S) on the canvas -> (B, S) and (B, 1) float64, in pixels
    of the cut from its edge.
    """
    scale = boxes[:, LENGTH, None].double() / boxes[:, RESIZED, None]  # (B, 1)
    return (boxes[:, OFFSET, None] + positions + 0.5) * scale, scale.clamp(min=1)


def reached(boxes: Tensor, size: int, interpolation: str) -> tuple[Tensor, int]:
    """Source pixels that the canvas depends on along an axis, boxes (B, 4): the first one of each
    sample (B,), and how many from there on are all of every sample."""
    middle, unit = centres(boxes, torch.tensor([[0, size - 1]]).expand(len(boxes), -1))
    support = KERNELS[interpolation][1] * unit[:, 0]
    first = (middle[:, 0] - support + 0.5).floor().long().clamp(min=0)
    end = torch.minimum((middle[:, 1] + support + 0.5).floor().long(), boxes[:, LENGTH])
    return boxes[:, START] + first, int((end - first).max())


def cut_reached(
    images: Tensor, boxes: Tensor, size: int, interpolation: str
) -> tuple[Tensor, list[Tensor]]:
    """The part of images (B, C, H, W) that the canvas depends on, and the source row and column
    (B,) that it begins with; the whole images where that saves little."""
    axes = [reached(boxes[:, axis], size, interpolation) for axis in (0, 1)]
    sides = images.shape[2:]
    if len(boxes) == 1:
        # a pixel at least, where the window lies beside the image
        begins = [
            min(max(0, int(first)), side - 1) for (first, _), side in zip(axes, sides, strict=True)
        ]
        ends = [max(1, int(first) + count) for first, count in axes]
        part = images[:, :, begins[0] : ends[0], begins[1] : ends[1]]
        return part, [torch.tensor([begin]) for begin in begins]
    if 2 * math.prod(count for _, count in axes) > math.prod(sides):
        return images, [torch.zeros(len(boxes), dtype=torch.int64)] * 2
    rows, columns = (first[:, None] + torch.arange(count) for first, count in axes)
    return gather_pixels(images, rows, columns), [first for first, _ in axes]


def matrices(
    boxes: Tensor,
    positions: Tensor,
    origins: Tensor,
    extent: int,
    *,
    interpolation: str,
    bits: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Antialiased resampling along an axis: canvas (S) = matrix (S, extent) @ source / 2^bits.

    Weight of pixel x of the cut for the one of the canvas with centre c: k((x + 1/2 - c) / unit),
    normalised to 1 over the pixels of the cut in reach, then rounded (Pillow's precompute_coeffs).

    Args:
        boxes: (B, 4) of the axis, on the CPU.
        positions: (B, S) which pixel of the canvas each row is: 0..S-1, or backwards for a flip.
        origins: (B,) source pixel of the first column.
        extent: source pixels; what the cut has beyond them is black, as is what the canvas has
            beyond what the cut is resized to.

    Returns:
        (B, S, extent) float64 of whole numbers on the device, and the most source pixels T of a
        row.
    """
    kernel, radius, _ = KERNELS[interpolation]
    longest = float((boxes[:, LENGTH] / boxes[:, RESIZED]).max())
    taps = math.ceil(2 * radius * max(1.0, longest)) + 2
    shift = boxes[:, START] - origins
    boxes, positions, shift = (
        part.to(device, non_blocking=True) for part in (boxes, positions, shift)
    )
    middle, unit = centres(boxes, positions)  # (B, S), (B, 1)
    low = (middle - radius * unit + 0.5).floor().clamp_(min=0)
    high = torch.minimum((middle + radius * unit + 0.5).floor(), boxes[:, LENGTH, None])
    x = low[:, :, None] + torch.arange(taps, device=low.device)  # (B, S, T)
    weight = kernel((x - middle[:, :, None] + 0.5) * (1 / unit)[:, :, None])
    weight *= x < high[:, :, None]
    total = weight.sum(2, keepdim=True)
    weight /= torch.where(total == 0, 1, total)
    place = boxes[:, OFFSET, None] + positions
    weight *= ((place >= 0) & (place < boxes[:, RESIZED, None]))[:, :, None]
    weight = (weight * 2.0**bits + weight.sign() / 2).trunc_()
    x = x.long() + shift[:, None, None]  # column
    weight *= (x >= 0) & (x < extent)
    matrix = weight.new_zeros(*positions.shape, extent)
    return matrix.scatter_add_(2, x.clamp_(0, extent - 1), weight), taps


class AxisResize:
    """Resampling along one axis in whole numbers, the same on every device."""

    def __init__(self, matrix: Tensor, taps: int, *, bit_depth: int) -> None:
        """matrix (B, S, extent) of `matrices` and its T."""
        self.bits, self.peak = BITS[bit_depth], 2**bit_depth - 1
        # float32 has 24 bits: enough for 8 of a pixel and a part of the weight
        self.in_parts = (
            bit_depth == 8
            and taps <= MOST_TAPS
            and torch.get_float32_matmul_precision() == "highest"  # else a GPU reads 11 bits
        )
        if self.in_parts:
            high = ((matrix + 2.0 ** (LOW_BITS - 1)) / 2.0**LOW_BITS).floor()
            low = matrix - high * 2.0**LOW_BITS
            matrix = torch.cat([high, low], 1).float()  # (B, 2 S, extent)
        self.matrix = matrix

    def along_last(self, x: Tensor, part: slice) -> Tensor:
        """x (b, N, extent) of the samples of a part -> (b, N, S) of the type of the matrix."""
        return self.levels(*self.split(torch.matmul(x, self.matrix[part].mT), 2))

    def along_rows(self, x: Tensor, part: slice) -> Tensor:
        """x (b, extent, N) of the samples of a part -> (b, S, N) of the type of the matrix."""
        return self.levels(*self.split(torch.matmul(self.matrix[part], x), 1))

    def split(self, sums: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The sums of both parts, or of the one."""
        return sums.chunk(2, axis) if self.in_parts else (sums,)

    def levels(self, high: Tensor, low: Tensor | None = None) -> Tensor:
        """Sums of whole numbers as whole levels: floor(sum / 2^bits + 1/2), clipped."""
        if low is None:
            return (high / 2.0**self.bits + 0.5).floor_().clamp_(0, self.peak)
        sums = (high.int() << LOW_BITS) + (low.int() + (1 << (self.bits - 1)))
        return (sums >> self.bits).clamp_(0, self.peak).float()


def rows_first(boxes: Tensor) -> Tensor:
    """Which windows (B, 2, 4) are resampled along their height before their width, (B,) bool: those
    that lose more than twice as many pixels of it, the rule of Pillow since version 13."""
    lost = boxes[:, :, LENGTH] - boxes[:, :, RESIZED]
    return (lost[:, 0] > 0) & (lost[:, 0] > 2 * lost[:, 1])


def resample(
    images: Tensor,
    boxes: Tensor,
    positions: tuple[Tensor, Tensor],
    *,
    interpolation: str,
    bit_depth: int,
) -> Tensor:
    """Windows of images resampled by matrix products.

    images (B, C, H, W) uint8 or int32, boxes (B, 2, 4), positions which rows and columns (B, S) of
    the canvas are made -> (B, C, S, S), same type.
    """
    along_axes = partial(resample_axes, interpolation=interpolation, bit_depth=bit_depth)
    first = rows_first(boxes)
    if bool(first.all()):
        return along_axes(images.mT, boxes.flip(1), (positions[1], positions[0])).mT
    if not bool(first.any()):
        return along_axes(images, boxes, positions)
    size = positions[0].shape[1]
    canvas = images.new_empty(*images.shape[:2], size, size)
    for group in (first, ~first):
        rows = group.nonzero()[:, 0]
        there = rows.to(images.device, non_blocking=True)
        part = resample(
            images.index_select(0, there),
            boxes[rows],
            (positions[0][rows], positions[1][rows]),
            interpolation=interpolation,
            bit_depth=bit_depth,
        )
        canvas.index_copy_(0, there, part)
    return canvas


def resample_axes(
    images: Tensor,
    boxes: Tensor,
    positions: tuple[Tensor, Tensor],
    *,
    interpolation: str,
    bit_depth: int,
) -> Tensor:
    """The same, along the width and then along the height."""
    batch, channels = images.shape[:2]
    kind, size = images.dtype, positions[0].shape[1]
    if all(bool((part == part[:1]).all()) for part in (boxes, *positions)):
        boxes, positions = boxes[:1], (positions[0][:1], positions[1][:1])  # one matrix serves all
    images, origins = cut_reached(images, boxes, size, interpolation)
    height, width = images.shape[2:]
    vertical, across = (
        AxisResize(
            *matrices(
                boxes[:, axis],
                positions[axis],
                origins[axis],
                images.shape[2 + axis],
                interpolation=interpolation,
                bits=BITS[bit_depth],
                device=images.device,
            ),
            bit_depth=bit_depth,
        )
        for axis in (0, 1)
    )
    chunk = max(1, CHUNK // (channels * height * width))
    parts = []
    for begin in range(0, batch, chunk):
        part = slice(begin, begin + chunk) if len(boxes) > 1 else slice(None)
        x = images[begin : begin + chunk].permute(0, 2, 1, 3).to(across.matrix.dtype)
        n = len(x)
        x = across.along_last(x.reshape(n, -1, width), part)  # (b, H C, S)
        x = x.to(vertical.matrix.dtype).view(n, height, -1)
        x = vertical.along_rows(x, part).view(n, size, channels, size)
        parts.append(x.permute(0, 2, 1, 3).to(kind))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# ------------------------------------------------------------------------ resampling by Pillow


def resample_by_pillow(
    images: np.ndarray, box: Tensor, size: int, interpolation: str
) -> np.ndarray:
    """A window of images resampled by Pillow itself, on a CPU several times as fast as the
    products.

    images (N, C, H, W) uint8, box (2, 4) -> (N, C, S, S), the same as `resample` gives.
    """
    (y, h, tall, top), (x, w, wide, left) = box.tolist()
    method = KERNELS[interpolation][2]
    first = bool(rows_first(box[None]))

    def resized(pixels: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        for down in (first, not first):  # one a call: which goes first depends on Pillow's version
            width, height = picture.size
            if down:
                picture = picture.resize((width, tall), method)
                shown = (0, top, width, top + size)
            else:
                picture = picture.resize((wide, height), method)
                shown = (left, 0, left + size, height)
            if shown != (0, 0, *picture.size):
                picture = picture.crop(shown)
        return np.asarray(picture)

    canvas = np.empty((*images.shape[:2], size, size), np.uint8)
    for image, target in zip(images, canvas, strict=True):
        cut = cut_window(image, y, x, h, w)
        if len(cut) == 3:
            target[:] = resized(cut.transpose(1, 2, 0)).transpose(2, 0, 1)
        else:
            target[:] = [resized(band) for band in cut]
    return canvas


def cut_window(image: np.ndarray, y: int, x: int, h: int, w: int) -> np.ndarray:
    """Window of an image (C, H, W) at whole pixels; what lies outside is 0."""
    top, left = max(y, 0), max(x, 0)
    bottom, right = max(top, min(y + h, image.shape[1])), max(left, min(x + w, image.shape[2]))
    inside = image[:, top:bottom, left:right]
    if inside.shape[1:] == (h, w):
        return inside
    window = np.zeros((len(image), h, w), image.dtype)
    window[:, top - y : bottom - y, left - x : right - x] = inside
    return window


class CropResize:
    """The way from an image to the canvas under one policy: draws windows and resamples them.

    Picklable: workers use it per sample (`one`), the training device per batch (`canvas`).
    """

    one_size = True

    def __init__(
        self,
        ops: ImageOps,
        *,
        image_size: int,
        resize_size: int,
        interpolation: str,
        bit_depth: int,
        crop_mode: str,
        mean: Sequence[float],
        crop_size: int | None = None,
    ) -> None:
        """Args as in `ResolvedImageAugmentation`; mean is the colour of borders."""
        self.ops = ops
        self.behind: CropResize | None = None
        """What resizes the crop, where it has another size."""
        if crop_size not in (None, image_size) and ops.crop in ("center", "random"):
            self.behind = CropResize(
                replace(ops, crop="none"),
                image_size=image_size,
                resize_size=image_size,
                interpolation=interpolation,
                bit_depth=bit_depth,
                crop_mode="center",
                mean=mean,
            )
        crop = image_size if self.behind is None or crop_size is None else crop_size
        self.size, self.crop_key = crop, "image_size" if self.behind is None else "crop_size"
        # smaller than the canvas only where a model's authors put a black margin around the image
        large = resize_size if ops.crop == "center" else max(crop, resize_size)
        self.side = {"none": None, "image_size": crop, "resize_size": large}[ops.resize]
        self.interpolation = interpolation
        self.bit_depth, self.peak = bit_depth, float(2**bit_depth - 1)
        centred = ops.crop == "center" and self.side is not None
        self.crop_mode = crop_mode if centred else "center"
        self.border = torch.tensor([round(self.peak * value) for value in mean])  # (C,)

    def join(self, parts: list[Tensor], samples: Sequence[Any]) -> Tensor:
        """The images of a batch, (B, C, S, S)."""
        return torch.stack(parts)

    def boxes(self, sizes: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Windows of a batch.

        Args:
            sizes: (B, 2) height and width of each image, pixels.
            generator: CPU generator of random crops; unused (may be None) for none and center.

        Returns:
            (B, 2, 4) int64 on the CPU; for the rows, then for the columns, in this order: first
            pixel of the cut in the source, its pixels, what they are resized to, and the first
            pixel of the canvas in that.

        Raises:
            UserError: an image is smaller than a crop that does not resize it.
        """
        whole = torch.as_tensor(np.asarray(sizes).reshape(-1, 2)).double()  # (B, 2)
        start = torch.zeros_like(whole)
        length, resized, offset = whole, torch.full_like(whole, self.size), torch.zeros_like(whole)
        if self.ops.crop == "resized":
            start, length = self.random_cut(whole, generator)
        elif self.ops.crop == "padded":
            start, length = self.padded_cut(whole, generator)
        elif self.ops.crop != "none":
            resized = self.scaled(whole)
            room = resized - self.size
            if self.crop_mode != "border" and (self.side is None or self.side >= self.size):
                self.refuse_small(whole, room)
            if self.ops.crop == "center":  # of an odd margin the smaller half is before the image
                offset = torch.where(room < 0, (room / 2).ceil(), (room / 2).round())
            else:
                draws = torch.rand(whole.shape, generator=generator, dtype=torch.float64)
                offset = (draws * (room + 1)).floor()
        return torch.stack([start, length, resized, offset], 2).long()

    def refuse_small(self, sizes: Tensor, room: Tensor) -> None:
        """Refuse the first image that has no room for the crop."""
        if bool((room < 0).any()):
            small = sizes[(room < 0).any(1).nonzero()[0, 0]]
            raise UserError(too_small(small, self.size, self.crop_key))

    def scaled(self, sizes: Tensor) -> Tensor:
        """Size (B, 2) after the resize: of the shortest side, whole pixels as in torchvision; of
        both sides (squash) or the longest (border), as in timm."""
        if self.side is None:
            return sizes
        if self.crop_mode == "squash":
            return torch.full_like(sizes, self.side)
        if self.crop_mode == "border":
            longest = sizes.max(1, keepdim=True).values
            return (sizes / (longest / self.side)).round().clamp(min=1)
        short = sizes.min(1, keepdim=True).values
        return (sizes * self.side / short).floor().clamp(min=self.side)

    def padded_cut(self, sizes: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """First pixels and sides (B, 2) of squares inside the images and their black margin."""
        margin = self.ops.crop_padding
        scale = (sizes / self.scaled(sizes)).min(1, keepdim=True).values
        side = (self.size * scale).round()  # (B, 1)
        room = sizes + 2 * margin - side
        self.refuse_small(sizes, room)
        draws = torch.rand(sizes.shape, generator=generator, dtype=torch.float64)
        return (draws * (room + 1)).floor() - margin, side.expand(-1, 2)

    def random_cut(self, sizes: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """First pixels and sides (B, 2) of random area and aspect ratio: the first of 10 attempts
        that fits, else the largest centre window of a legal ratio (torchvision's
        RandomResizedCrop)."""
        (low, high), ratio = self.ops.scale, self.ops.ratio
        count = len(sizes)
        draws = torch.rand(4, count, ATTEMPTS, generator=generator, dtype=torch.float64)
        height, width = sizes[:, :1], sizes[:, 1:]  # (B, 1)
        area = height * width * (low + (high - low) * draws[0])  # (B, attempts)
        log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
        aspect = (log_low + (log_high - log_low) * draws[1]).exp()
        w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        y, x = (draws[2] * (height - h + 1)).floor(), (draws[3] * (width - w + 1)).floor()
        first = fits.int().argmax(1, keepdim=True)  # (B, 1)
        drawn = torch.stack([y, x, h, w], 2).gather(1, first[:, :, None].expand(-1, -1, 4))[:, 0]
        w = torch.minimum(width, (height * ratio[1]).round().clamp(min=1))
        h = torch.minimum(height, (width / ratio[0]).round().clamp(min=1))
        centre = torch.cat([((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w], 1)
        found = torch.where(fits.any(1, keepdim=True), drawn, centre)
        return found[:, :2], found[:, 2:]

    def one(self, image: np.ndarray, box: Tensor) -> Tensor:
        """One sample in a worker: image (C, H, W) uint8 or uint16, box (2, 4) -> (C, S, S) uint8 or
        int32."""
        wide = image.dtype != np.uint8
        if wide or not image.flags.writeable:  # torch has no uint16 and warns of read-only memory
            image = image.astype(np.int32 if wide else np.uint8)
        return self.canvas(torch.from_numpy(image)[None], box[None])[0]

    def canvas(
        self,
        images: Tensor,
        boxes: Tensor,
        hflip: Tensor | None = None,
        vflip: Tensor | None = None,
    ) -> Tensor:
        """Windows on the canvas, mirrored where asked: the same levels on every device.

        Args:
            images: (B, C, H, W) uint8 or int32 on any device.
            boxes: (B, 2, 4) on the CPU.
            hflip, vflip: (B,) bool on the CPU.

        Returns:
            (B, C, S, S), the type of the images, which are returned where nothing changes.
        """
        canvas = self.resampled(images, boxes, hflip, vflip)
        if self.behind is not None:
            whole = self.behind.boxes(np.array([[self.size, self.size]]), None)
            return self.behind.canvas(canvas, whole.expand(len(canvas), -1, -1))
        if self.crop_mode != "border":
            return canvas
        positions = self.positions(len(boxes), vflip), self.positions(len(boxes), hflip)
        inside = []
        for axis in (0, 1):
            place = boxes[:, axis, OFFSET, None] + positions[axis]  # (B, S)
            inside.append((place >= 0) & (place < boxes[:, axis, RESIZED, None]))
        shown = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(canvas.device)
        return torch.where(shown, canvas, self.border.to(canvas)[:, None, None])

    def resampled(
        self, images: Tensor, boxes: Tensor, hflip: Tensor | None, vflip: Tensor | None
    ) -> Tensor:
        """The canvas, black where it lies beyond the image."""
        rows, columns = self.positions(len(boxes), vflip), self.positions(len(boxes), hflip)
        moved = bool((boxes[:, :, LENGTH] == boxes[:, :, RESIZED]).all())
        if moved or self.interpolation == "nearest":
            rows, columns = source_pixels(boxes[:, 0], rows), source_pixels(boxes[:, 1], columns)
            if images.shape[2:] == (self.size, self.size) and untouched(rows, columns):
                return images
            return gather_pixels(images, rows, columns)
        if images.device.type == "mps":  # it has no float64
            return self.resampled(images.cpu(), boxes, hflip, vflip).to(images.device)
        if images.dtype != torch.uint8 or images.device.type != "cpu":
            return self.by_products(images, boxes, (rows, columns))
        canvas = images.new_empty(*images.shape[:2], self.size, self.size)
        moving = hflip is not None or vflip is not None
        count = len(images) if boxes.stride(0) == 0 and not moving else 1  # of a clip all frames
        for part in (slice(first, first + count) for first in range(0, len(images), count)):
            box = boxes[part.start]
            if int(box[:, RESIZED].prod()) > WASTE * self.size**2:
                positions = rows[part], columns[part]
                canvas[part] = self.by_products(images[part], boxes[part], positions)
                continue
            found = resample_by_pillow(images[part].numpy(), box, self.size, self.interpolation)
            flips = (flip is not None and bool(flip[part.start]) for flip in (vflip, hflip))
            mirrored = (slice(None, None, -1 if flip else 1) for flip in flips)
            canvas[part].numpy()[:] = found[(slice(None), slice(None), *mirrored)]
        return canvas

    def by_products(
        self, images: Tensor, boxes: Tensor, positions: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The canvas by matrix products, see `resample`."""
        return resample(
            images,
            boxes,
            positions,
            interpolation=self.interpolation,
            bit_depth=self.bit_depth,
        )

    def positions(self, count: int, flip: Tensor | None) -> Tensor:
        """Output positions 0..S-1 along an axis, backwards where flipped, (B, S) int64."""
        ahead = torch.arange(self.size).expand(count, -1)
        return ahead if flip is None else torch.where(flip[:, None], self.size - 1 - ahead, ahead)


def source_pixels(boxes: Tensor, positions: Tensor) -> Tensor:
    """The source pixel under the centre of each pixel of the canvas along an axis: boxes (B, 4),
    positions (B, S) -> (B, S) int64."""
    start, length, resized, offset = boxes[:, :, None].unbind(1)  # (B, 1)
    middle = (2 * (offset + positions) + 1) * length  # in halves of 1 / resized pixels
    return start + middle.div(2 * resized, rounding_mode="floor")


def untouched(rows: Tensor, columns: Tensor) -> bool:
    """Whether every pixel stays where it is."""
    ahead = torch.arange(rows.shape[1])
    return bool((rows == ahead).all()) and bool((columns == ahead).all())


def too_small(size: Tensor, crop: int, key: str) -> str:
    """Error line for an image that a crop does not fit into."""
    height, width = (int(side) for side in size)
    return (
        f"image of {height}x{width} pixels is smaller than the {crop}x{crop} crop: lower"
        f" data.augmentation.{key}, raise resize_size, or take a policy that resizes"
        " (resize = 'image_size' or 'resize_size')"
    )
