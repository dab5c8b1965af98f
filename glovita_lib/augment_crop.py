"""Geometry of an image: a source window, resampled to the square canvas that the encoder receives.

Resize and crop are folded into one window (y0, x0, height, width) per sample, in pixels of the
source and possibly between pixels, so that every sample is resampled once. Windows live on the
CPU; pixels on any device. B batch, C channels, H W source pixels, S side of the canvas.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.errors import UserError
from glovita_lib.spec_augment import ImageOps

CHUNK = 1 << 26  # source values resampled at once (256 MiB as float32)
ATTEMPTS = 10  # of a random resized crop before it falls back to a centre crop, as in torchvision


def triangle(t: Tensor) -> Tensor:
    """Bilinear kernel, 1 - |t| for |t| < 1."""
    return (1 - t.abs()).clamp_(min=0)


def cubic(t: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -1/2, for |t| < 2 (that of PIL and of antialiased torch)."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def lanczos(t: Tensor) -> Tensor:
    """Lanczos kernel sinc(t) sinc(t / 3) for |t| < 3."""
    return torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), torch.zeros_like(t))


KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (triangle, 1.0),
    "bicubic": (cubic, 2.0),
    "lanczos": (lanczos, 3.0),
}  # interpolation -> kernel and its radius; nearest is a gather


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


def weights(
    starts: Tensor,
    lengths: Tensor,
    positions: Tensor,
    *,
    extent: int,
    window_only: bool,
    interpolation: str,
    device: torch.device,
) -> Tensor:
    """Antialiased resampling along one axis as matrices: output (S) = matrix (S, extent) @ source.

    Weight of source pixel x for output i: k((x + 1/2 - start - (i + 1/2) scale) / max(scale, 1)),
    scale = length / S, normalised to 1 over the pixels in reach (the convention of PIL and of
    torchvision with antialias=True).

    Args:
        starts, lengths: (B,) float64 on the CPU, the windows along this axis in pixels.
        positions: (B, S) which output each row of the matrix is: 0..S-1, or backwards for a flip.
        extent: source pixels along this axis; reached pixels beyond are black.
        window_only: whether nothing outside the window contributes (crop, then resize), else
            nothing outside the source (resize, then crop).

    Returns:
        (B, S, extent) float32 on the device.
    """
    kernel, radius = KERNELS[interpolation]
    size = positions.shape[1]
    scale = lengths / size  # (B,)
    reach = radius * scale.clamp(min=1)
    base = (starts - reach).floor()  # float32 counts from here, so large images stay exact
    taps = math.ceil(float(2 * reach.max())) + 2
    low, high = starts - base, starts + lengths - base
    if not window_only:
        low, high = -base, extent - base
    resolved = torch.stack([scale, starts - base, reach, low, high, base])
    resolved = resolved.float().to(device, non_blocking=True)[:, :, None]  # (6, B, 1)
    scale, start, reach, low, high, base = resolved
    positions = positions.to(device, non_blocking=True)
    center = start + (positions + 0.5) * scale  # (B, S)
    x = (center - reach).floor()[:, :, None] + torch.arange(taps, device=device)  # (B, S, T)
    weight = kernel((x + 0.5 - center[:, :, None]) / scale.clamp(min=1)[:, :, None])
    weight *= (x >= low[:, :, None]) & (x < high[:, :, None])
    weight /= weight.sum(2, keepdim=True)
    x = (x + base[:, :, None]).long()  # source pixel
    weight *= (x >= 0) & (x < extent)
    matrix = torch.zeros(len(starts), size, extent, device=device)
    return matrix.scatter_add_(2, x.clamp_(0, extent - 1), weight)


def resample_windows(
    images: Tensor,
    boxes: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    window_only: bool,
    interpolation: str,
) -> Tensor:
    """Windows of images resampled by one matrix product per axis.

    images (B, C, H, W) of any type, boxes (B, 4) float64 on the CPU, rows and columns (B, S) output
    positions -> (B, C, S, S) float32 in the units of the images.
    """
    batch, channels, height, width = images.shape
    size, device = rows.shape[1], images.device
    if bool((boxes == boxes[:1]).all() & (rows == rows[:1]).all() & (columns == columns[:1]).all()):
        boxes, rows, columns = boxes[:1], rows[:1], columns[:1]  # one matrix serves the batch
    along = partial(weights, window_only=window_only, interpolation=interpolation, device=device)
    vertical = along(boxes[:, 0], boxes[:, 2], rows, extent=height)  # (B | 1, S, H)
    across = along(boxes[:, 1], boxes[:, 3], columns, extent=width)  # (B | 1, S, W)
    chunk = max(1, CHUNK // (channels * height * width))
    parts = []
    for begin in range(0, batch, chunk):
        part = slice(begin, begin + chunk) if len(boxes) > 1 else slice(None)
        x = images[begin : begin + chunk].permute(0, 2, 1, 3).float()  # (b, H, C, W)
        n = len(x)
        x = torch.matmul(vertical[part], x.reshape(n, height, -1))  # (b, S, C W)
        x = torch.matmul(x.view(n, size * channels, width), across[part].mT)  # (b, S C, S)
        parts.append(x.view(n, size, channels, size).permute(0, 2, 1, 3))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def library_windows(
    images: Tensor, boxes: Tensor, size: int, *, window_only: bool, interpolation: str
) -> Tensor:
    """Windows resampled by torch's 8-bit integer code, on a CPU 10 times as fast as the products.

    images (B, C, H, W) uint8, boxes (B, 4) as drawn by `Fit.boxes` -> (B, C, S, S) uint8, within
    one level of `resample_windows`.
    """

    def resized(part: Tensor, sides: int | tuple[int, int]) -> Tensor:
        return F.interpolate(part, sides, mode=interpolation, antialias=True)

    def window(part: Tensor, box: list[float]) -> Tensor:
        y, x, h, w = box
        if window_only:
            return resized(cut_window(part, round(y), round(x), round(h), round(w)), size)
        height, width = part.shape[2:]
        scaled = round(size * height / h), round(size * width / w)  # undo the folding
        top, left = round(y * scaled[0] / height), round(x * scaled[1] / width)
        return resized(part, scaled)[:, :, top : top + size, left : left + size]

    parts = zip(images.split(1), boxes.tolist(), strict=True)
    return torch.cat([window(part, box) for part, box in parts])


def cut_window(images: Tensor, y: int, x: int, h: int, w: int) -> Tensor:
    """Window at whole pixels; what lies outside is 0."""
    height, width = images.shape[2:]
    inside = images[:, :, max(y, 0) : y + h, max(x, 0) : x + w]
    outside = (max(-x, 0), max(x + w - width, 0), max(-y, 0), max(y + h - height, 0))
    return F.pad(inside, outside) if any(outside) else inside


def mirrored(images: Tensor, hflip: Tensor | None, vflip: Tensor | None) -> Tensor:
    """Chosen rows of images (B, C, H, W) flipped; hflip and vflip (B,) bool on the CPU."""
    for flip, axis in ((hflip, 3), (vflip, 2)):
        if flip is not None and bool(flip.any()):
            rows = flip.nonzero()[:, 0]
            images = images.index_copy(0, rows, images.index_select(0, rows).flip(axis))
    return images


class CropResize:
    """The way from an image to the canvas under one policy: draws windows and resamples them.

    Picklable: workers use it per sample (`one`), the training device per batch (`canvas`).
    """

    def __init__(
        self,
        ops: ImageOps,
        *,
        image_size: int,
        resize_size: int,
        interpolation: str,
        bit_depth: int,
    ) -> None:
        self.ops = ops
        self.size = image_size
        self.shortest = {"none": None, "image_size": image_size, "resize_size": resize_size}[
            ops.resize
        ]
        self.interpolation = interpolation
        self.peak = float(2**bit_depth - 1)
        # A resized or padded crop cuts first and then resizes, so pixels beyond the cut are unseen.
        self.window_only = ops.crop in ("resized", "padded")

    def boxes(self, sizes: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Source windows of a batch.

        Args:
            sizes: (B, 2) height and width of each image, pixels.
            generator: CPU generator of random crops; unused (may be None) for none and center.

        Returns:
            (B, 4) float64 y0, x0, height, width on the CPU, pixels of the source.

        Raises:
            UserError: an image is smaller than a crop that does not resize it.
        """
        whole = torch.as_tensor(np.asarray(sizes).reshape(-1, 2)).double()  # (B, 2)
        if self.ops.crop == "none":
            return torch.cat([torch.zeros_like(whole), whole], 1)
        if self.ops.crop == "resized":
            return self.resized_boxes(whole, generator)
        scaled = self.scaled(whole)  # (B, 2) size after the resize
        if self.ops.crop == "padded":
            return self.padded_boxes(whole, scaled, generator)
        room = scaled - self.size
        if bool((room < 0).any()):
            raise UserError(too_small(whole[(room < 0).any(1).nonzero()[0, 0]], self.size))
        if self.ops.crop == "center":
            offset = (room / 2).round()
        else:
            draws = torch.rand(whole.shape, generator=generator, dtype=torch.float64)
            offset = (draws * (room + 1)).floor()
        step = whole / scaled  # source pixels per resized pixel
        return torch.cat([offset * step, self.size * step], 1)

    def scaled(self, sizes: Tensor) -> Tensor:
        """Size (B, 2) after the shortest side was resized, whole pixels as in torchvision."""
        if self.shortest is None:
            return sizes
        short = sizes.min(1, keepdim=True).values
        return (sizes * self.shortest / short).floor().clamp(min=self.shortest)

    def padded_boxes(
        self, sizes: Tensor, scaled: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Windows at whole source pixels inside the image and its black margin."""
        margin = self.ops.crop_padding
        side = (self.size * (sizes / scaled).min(1, keepdim=True).values).round()  # (B, 1)
        room = sizes + 2 * margin - side
        if bool((room < 0).any()):
            raise UserError(too_small(sizes[(room < 0).any(1).nonzero()[0, 0]], self.size))
        draws = torch.rand(sizes.shape, generator=generator, dtype=torch.float64)
        return torch.cat([(draws * (room + 1)).floor() - margin, side, side], 1)

    def resized_boxes(self, sizes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Random area and aspect ratio: the first of 10 attempts that fits, else the largest centre
        window of a legal ratio (torchvision's RandomResizedCrop)."""
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
        return torch.where(fits.any(1, keepdim=True), drawn, centre)

    def one(self, image: np.ndarray, box: Tensor) -> Tensor:
        """One sample in a worker: image (C, H, W) uint8 or uint16, box (4,) -> (C, S, S) uint8 or
        int32."""
        wide = image.dtype != np.uint8
        if wide or not image.flags.writeable:  # torch has no uint16 and warns of read-only memory
            image = image.astype(np.int32 if wide else np.uint8)
        source = torch.from_numpy(image)
        canvas = self.canvas(source[None], box[None])[0]
        return canvas.round().to(source.dtype) if canvas.is_floating_point() else canvas

    def canvas(
        self,
        images: Tensor,
        boxes: Tensor,
        hflip: Tensor | None = None,
        vflip: Tensor | None = None,
    ) -> Tensor:
        """Windows on the canvas, mirrored where asked, in the units of the images.

        Args:
            images: (B, C, H, W) uint8 or int32 on any device.
            boxes: (B, 4) on the CPU.
            hflip, vflip: (B,) bool on the CPU.

        Returns:
            (B, C, S, S): the type of the images where pixels are only moved, and for uint8 on the
            CPU; else float32.
        """
        boxes = boxes.double()
        rows, columns = self.positions(len(boxes), vflip), self.positions(len(boxes), hflip)
        whole = bool((boxes[:, 2:] == self.size).all()) and bool((boxes == boxes.floor()).all())
        if whole or self.interpolation == "nearest":
            if not whole:  # PIL's nearest: the pixel under the centre of the output pixel
                rows, columns = rows + 0.5, columns + 0.5
            step = boxes[:, 2:] / self.size
            rows = (boxes[:, :1] + rows * step[:, :1]).floor().long()
            columns = (boxes[:, 1:2] + columns * step[:, 1:]).floor().long()
            if whole and images.shape[2:] == (self.size, self.size) and untouched(rows, columns):
                return images
            return gather_pixels(images, rows, columns)
        cut, kernel = self.window_only, self.interpolation
        quick = images.dtype == torch.uint8 and images.device.type == "cpu"
        if quick and kernel in ("bilinear", "bicubic"):
            canvas = library_windows(
                images, boxes, self.size, window_only=cut, interpolation=kernel
            )
            return mirrored(canvas, hflip, vflip)
        canvas = resample_windows(
            images, boxes, rows, columns, window_only=cut, interpolation=kernel
        )
        return canvas if self.interpolation == "bilinear" else canvas.clamp(0, self.peak)

    def positions(self, count: int, flip: Tensor | None) -> Tensor:
        """Output positions 0..S-1 along an axis, backwards where flipped, (B, S) int64."""
        ahead = torch.arange(self.size).expand(count, -1)
        return ahead if flip is None else torch.where(flip[:, None], self.size - 1 - ahead, ahead)


def untouched(rows: Tensor, columns: Tensor) -> bool:
    """Whether every pixel stays where it is."""
    ahead = torch.arange(rows.shape[1])
    return bool((rows == ahead).all()) and bool((columns == ahead).all())


def too_small(size: Tensor, crop: int) -> str:
    """Error line for an image that a crop does not fit into."""
    height, width = (int(side) for side in size)
    return (
        f"image of {height}x{width} pixels is smaller than the {crop}x{crop} crop: lower"
        " data.augmentation.image_size, raise resize_size, or take a policy that resizes"
        " (resize = 'image_size' or 'resize_size')"
    )
