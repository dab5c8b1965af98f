"""Augmentation of a run: named policies, what a spec makes of them, their application, and the
mixing of samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.augment_crop import CropResize
from glovita_lib.augment_images import (
    OPERATIONS,
    Change,
    ClipGenerator,
    Placement,
    Planned,
    Stage,
)
from glovita_lib.encoder import Preprocess
from glovita_lib.errors import UserError, refuse
from glovita_lib.spec import Spec
from glovita_lib.spec_augment import (
    TEST,
    TRAIN,
    CropMode,
    ImageAugmentation,
    ImageKwargs,
    ImageOps,
)

# ------------------------------------------------------------------------------- application
#
# The augmentation that follows from spec, encoder and policy, and its application to a batch.
#
# B batch, C channels, H W source pixels, S side of the canvas.

CPU = torch.device("cpu")
BLOCK = 1 << 19  # values that a core augments at once


class ResolvedImageAugmentation(Spec):
    """What augmentation and preprocessing of images a run uses, complete; saved with its
    checkpoints."""

    train_policy: str
    """Policy of the training split."""
    test_policy: str
    """Policy of evaluation, inference and extraction."""
    image_size: int
    """Side of the square that the encoder receives, pixels."""
    resize_size: int
    """Length of the shortest side before the crop, pixels; read by policies with resize
    resize_size."""
    crop_mode: CropMode
    """What is resized before a centre crop: the shortest side, both sides, or the longest."""
    interpolation: str
    """Resampling: nearest, bilinear, bicubic or lanczos."""
    mean: tuple[float, ...]
    """Mean per channel, values in 0..1."""
    std: tuple[float, ...]
    """Standard deviation per channel, values in 0..1."""
    train: ImageOps
    """Every parameter of the train policy."""
    test: ImageOps
    """Every parameter of the test policy."""
    crop_size: int | None = None
    """Side of centre and random crops in the resized image, pixels; none is image_size."""
    patch_size: int | tuple[int, ...] | None = None
    """Side of the encoder's patches, or height and width, pixels; none is the encoder's own."""


def resolve_augmentation(
    aug: ImageAugmentation,
    *,
    default_policies: tuple[str, str],
    encoder: Preprocess,
    channels: int,
    native_size: tuple[int, int] | None,
) -> ResolvedImageAugmentation:
    """The augmentation of a run: spec before encoder before policy and data.

    Args:
        aug: the section of the spec.
        default_policies: train and test policy of the data set.
        encoder: input convention of the encoder.
        channels: channels of the data. Where the encoder's mean and std are for another number, 1
            channel gets their average and further channels (alpha) get the average too.
        native_size: height and width of the images where all have the same, else none.

    Raises:
        UserError: no size known, an image smaller than the crop, mean or std of another number of
            channels.
    """
    names = (
        aug.train_policy or default_policies[0],
        aug.test_policy or default_policies[1],
    )
    size = image_size(aug, encoder, native_size, names[1])
    unread = aug.unread_kwargs(default_policies)
    problems = [*aug.crop_problems(size), *aug.channel_problems(channels), *unread]
    refuse("data.augmentation", problems)
    train = completed(TRAIN[names[0]], aug.train_kwargs, "train_kwargs", size)
    test = completed(TEST[names[1]], aug.test_kwargs, "test_kwargs", size)
    resolved = ResolvedImageAugmentation(
        train_policy=names[0],
        test_policy=names[1],
        image_size=size,
        resize_size=resize_size(aug, encoder, native_size, aug.crop_size or size),
        crop_size=aug.crop_size,
        patch_size=aug.patch_size,
        crop_mode=aug.crop_mode or ("center" if aug.crop_size else encoder.crop_mode),
        interpolation=aug.interpolation or encoder.interpolation,
        mean=per_channel(aug.mean, encoder.mean, channels),
        std=per_channel(aug.std, encoder.std, channels),
        train=train,
        test=test,
    )
    check_image_sizes(resolved, native_size)
    return resolved


def image_size(
    aug: ImageAugmentation, encoder: Preprocess, native: tuple[int, int] | None, test_policy: str
) -> int:
    """Side of the canvas: the spec's, the encoder's, else the shortest side of the images.

    The policy "native" keeps the size of the images where the encoder accepts any.
    """
    if aug.image_size is not None:
        return aug.image_size
    keeps = test_policy == "native" and native is not None and not encoder.fixed_size
    if encoder.image_size is not None and not keeps:
        return encoder.image_size
    if native is None:
        raise UserError(
            "data.augmentation.image_size: none given, the encoder asks for none and the images"
            " differ in size: set it, e.g. image_size = 224"
        )
    return min(native)


def resize_size(
    aug: ImageAugmentation, encoder: Preprocess, native: tuple[int, int] | None, size: int
) -> int:
    """Shortest side before the crop: the spec's; else that of the images, where they are taken at
    their own size; else that of which image_size is the encoder's share (timm's rule)."""
    if aug.resize_size is not None:
        return aug.resize_size
    if native is not None and min(native) == size != encoder.image_size:
        return size
    return math.floor(size / encoder.crop_pct)


def completed(preset: ImageOps, asked: ImageKwargs, where: str, size: int) -> ImageOps:
    """A policy with the asked parameters in the place of its own."""
    changes = asked.given()
    if "cutout_size" not in changes:  # half of a small image, as 16 is of CIFAR's 32
        changes["cutout_size"] = min(preset.cutout_size, size // 2)
    ops = msgspec.structs.replace(preset, **changes)
    if ops.cutout_size >= size:
        raise UserError(
            f"data.augmentation.{where}.cutout_size: a square of {ops.cutout_size} pixels covers"
            f" the whole {size}x{size} image; take at most {size // 2}"
        )
    return ops


def check_image_sizes(resolved: ResolvedImageAugmentation, native: tuple[int, int] | None) -> None:
    """A crop fits into the resized image and, where their size is known, into the images."""
    for policy_ops in (resolved.train, resolved.test):
        if policy_ops.crop not in ("none", "resized") and native is not None:
            fit = build_fit(resolved, policy_ops, bit_depth=8)
            fit.boxes(np.array([native]), torch.Generator())


def per_channel(
    asked: tuple[float, ...] | None, own: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """Mean or std for the channels of the data.

    A 1-channel or 4-channel encoder made from RGB weights has its input layer averaged or repeated,
    so the average of the RGB values is its natural unit.
    """
    if asked is not None:
        return asked
    if len(own) == channels:
        return tuple(own)
    average = math.fsum(own) / len(own)
    return (average,) if channels == 1 else (*own, *(average,) * channels)[:channels]


def build_fit(resolved: ResolvedImageAugmentation, ops: ImageOps, *, bit_depth: int) -> CropResize:
    """The geometry of one policy."""
    return CropResize(
        ops,
        image_size=resolved.image_size,
        resize_size=resolved.resize_size,
        interpolation=resolved.interpolation,
        bit_depth=bit_depth,
        crop_mode=resolved.crop_mode,
        crop_size=resolved.crop_size,
        mean=resolved.mean,
    )


class Augmenter:
    """Turns a batch as it lies in memory into the encoder's input under one policy.

    Every sample has its own parameters. They are drawn on the CPU from the seed, so they are the
    same on every device and nothing waits for the device; only noise fields are drawn there.
    """

    def __init__(self, resolved: ResolvedImageAugmentation, *, train: bool, bit_depth: int) -> None:
        self.ops = resolved.train if train else resolved.test
        self.fit = build_fit(resolved, self.ops, bit_depth=bit_depth)
        self.size = resolved.image_size
        self.peak = self.fit.peak
        self.mean, self.std = torch.tensor(resolved.mean), torch.tensor(resolved.std)  # (C,)
        self.placed_constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, inputs: Tensor, fitted: bool, seed: int) -> Tensor:
        """Augmented and normalised batch.

        Args:
            inputs: (B, C, H, W) uint8, or int32 for 16-bit images.
            fitted: whether the crop and resize already happened, H = W = S.
            seed: of the random parameters; unused in evaluation.

        Returns:
            (B, C, S, S) float32 on the device of the inputs.
        """
        out = empty(*inputs.shape[:2], self.size, self.size, device=inputs.device)
        with torch.autocast(inputs.device.type, enabled=False):  # 8 bits of bf16 move pixels
            self.write(inputs, fitted, seed, out[None])
        return out

    def write(self, inputs: Tensor, fitted: bool, seed: int, out: Tensor, frames: int = 1) -> None:
        """Write the augmented and normalised images of a batch, in the precision of the caller.

        Everything is drawn first. A CPU then takes the images in blocks that stay in its cache.

        Args:
            inputs: (G N, C, H, W), G groups of images, as in a call.
            fitted, seed: as in a call.
            out: (G, N, C, S, S) float32, of any strides.
            frames: images that follow one another and share what is drawn, see ClipAugmenter.
        """
        if not len(inputs):
            return
        generator = ClipGenerator()
        generator.manual_seed(seed)
        x, flips = self.placed(inputs, fitted, generator, frames)
        generator.frames = frames
        values, normalised = (self.planned(x, each, generator) for each in ("values", "normalised"))
        edges, targets = blocks_of(x, out)
        parts = zip(values.parts(edges), normalised.parts(edges), targets, strict=True)
        for first, last, (before, after, target) in zip(edges, edges[1:], parts, strict=False):
            block = x[first:last]
            for axis, flip in flips.items():
                block = flipped(block, flip[first:last], axis)
            self.normalise(self.changed(block, first, before), first, after, target)

    def placed(
        self, inputs: Tensor, fitted: bool, generator: torch.Generator, frames: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Images (B, C, H, W) cropped and resized to (B, C, S, S), the inputs themselves where they
        are already, and the flips (B,) bool that are left to do, by their axis."""
        batch, _, height, width = inputs.shape
        place = Placement(self.fit, np.tile([height, width], (batch // frames, 1)))
        if fitted:
            place.boxes = torch.tensor([0, self.size, self.size, 0]).expand(batch // frames, 2, -1)
        for each in OPERATIONS.active(self.ops, "geometry"):
            each.function(place, self.ops, generator)
        if place.boxes is None:  # the same for every draw
            place.boxes = self.fit.boxes(place.sizes, None)
        boxes, *flips = (
            part if part is None else part.repeat_interleave(frames, 0)
            for part in (place.boxes, place.hflip, place.vflip)
        )
        assert boxes is not None
        if not fitted:
            return self.fit.canvas(inputs, boxes, hflip=flips[0], vflip=flips[1]), {}
        drawn = zip((3, 2), flips, strict=True)
        return inputs, {axis: flip for axis, flip in drawn if flip is not None}

    def planned(self, x: Tensor, stage: Stage, generator: torch.Generator) -> Planned:
        """What the operations of a stage change of images."""
        plan, mean = Planned(x.shape, x.device), self.constants(x.device)[2]
        for each in OPERATIONS.active(self.ops, stage):
            plan = each.function(plan, self.ops, generator, mean)
        return plan

    def changed(self, x: Tensor, first: int, changes: list[tuple[Change, slice]]) -> Tensor:
        """Images in 0..1 after what is to be changed of them; whole levels where no policy changes
        values.

        Args:
            x: (n, C, S, S) in 0..peak, from this one of the batch on.
            changes: see Planned.parts.
        """
        if not OPERATIONS.active(self.ops, "values"):
            return x
        x = x / self.peak
        for change, part in changes:
            x = change.of(x, first, part)
        return x

    def normalise(
        self, x: Tensor, first: int, changes: list[tuple[Change, slice]], out: Tensor
    ) -> None:
        """Write images, normalised, after what is to be changed of them then, to `out`."""
        levels = not x.is_floating_point()
        scale, shift, _ = self.constants(x.device)
        scale = scale if levels else scale * self.peak
        if not changes:
            torch.mul(x.view(out.shape), scale, out=out).sub_(shift)
            return
        x = x.mul(scale).sub_(shift)
        for change, part in changes:
            x = change.of(x, first, part)
        out.copy_(x.view(out.shape))

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Factor and shift (C, 1, 1) of the normalisation of values 0..peak, and the mean (C,)."""
        if device not in self.placed_constants:
            mean, std = self.mean.to(device), self.std.to(device)
            self.placed_constants[device] = (
                (1 / (self.peak * std))[:, None, None],
                (mean / std)[:, None, None],
                mean,
            )
        return self.placed_constants[device]


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """A tensor to be filled; on a CPU in memory of numpy, which asks the system for huge pages: a
    batch is filled for the first time in a fourth of the time then."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))


def blocks_of(x: Tensor, out: Tensor) -> tuple[list[int], list[Tensor]]:
    """Images that are augmented together: all of them, but on a CPU as many of a group as its cache
    holds.

    Args:
        x: (G N, C, S, S).
        out: (G, N, C, S, S).

    Returns:
        The first image of each block, with the number of all images at the end; and the parts of
        `out` that are theirs.
    """
    if x.device.type != "cpu":
        return [0, len(x)], [out]
    length = out.shape[1]
    blocks = math.ceil(length * x[0].numel() / (BLOCK * torch.get_num_threads()))
    size = math.ceil(length / blocks)
    edges = [
        start + first for start in range(0, len(x), length) for first in range(0, length, size)
    ]
    return [*edges, len(x)], [part for group in out for part in group.split(size)]


def flipped(x: Tensor, flip: Tensor, axis: int) -> Tensor:
    """Images (n, C, S, S), those of flip (n,) bool mirrored along an axis."""
    if not bool(flip.any()):
        return x
    if bool(flip.all()):
        return x.flip(axis)
    rows = flip.nonzero()[:, 0].to(x.device, non_blocking=True)
    return x.index_copy(0, rows, x.index_select(0, rows).flip(axis))


# ------------------------------------------------------------------------------------- clips
#
# Frames of clips are images that share what is drawn of their clip.
#
# B batch, V clips of a video, T frames of a clip, C channels, S side of a frame, K outputs.


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips of a batch of videos, cropped and resized where they were decoded."""

    pixels: Tensor  # (B, T, C, S, S) uint8; (B, V, T, C, S, S) of several clips of each video
    frames: Tensor  # (B, T) or (B, V, T) int64, numbers of the frames in their videos
    real: Tensor  # the same shape, bool: False where the last frame of a short video is repeated
    times: Tensor  # the same shape, float64: seconds from the start of the video

    def __len__(self) -> int:
        return len(self.pixels)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Clips":
        """The clips with every tensor moved."""
        return Clips(*map(move, (self.pixels, self.frames, self.real, self.times)))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Clips":
        """The same clips on a device."""
        if torch.device(device).type == "mps":  # it has no float64
            return replace(self, times=self.times.float()).moved(lambda part: part.to(device))
        return self.moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Clips":
        """The same clips in page-locked memory."""
        return self.moved(lambda part: part.pin_memory())


@dataclass(frozen=True, eq=False)
class ManyClips:
    """Several clips of each video that reach a network one by one: `reduced` is asked instead of
    the network."""

    clips: Tensor  # (B, V, C, T, S, S) float32
    combine: str  # what becomes of their logits: mean, softmax or sigmoid
    chunk: int  # clips that are asked at once

    def __len__(self) -> int:
        return len(self.clips)

    def each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function, clips (m, C, T, S, S) -> (m, K), gives for every clip, (B, V, K)."""
        whole = self.clips.flatten(0, 1)
        answers = [function(part).float() for part in whole.split(self.chunk)]
        return torch.cat(answers).unflatten(0, self.clips.shape[:2])

    def reduced(self, function: Callable[[Tensor], Tensor], how: str | None = None) -> Tensor:
        """Mean over the clips of each video of what a function gives, (B, K).

        Args:
            function: clips (m, C, T, S, S) -> (m, K).
            how: "mean"; none: what logits are to be combined by, whose mean probability is given
                as a logit again.
        """
        each = self.each(function)  # (B, V, K)
        how = how or self.combine
        if how == "softmax":
            return each.log_softmax(2).logsumexp(1) - math.log(each.shape[1])
        if how == "sigmoid":  # of p the mean probability, log p - log(1 - p)
            return F.logsigmoid(each).logsumexp(1) - F.logsigmoid(-each).logsumexp(1)
        return each.mean(1)


class ClipAugmenter:
    """Turns clips of a batch into the encoder's input under one policy of images.

    What is drawn of a clip serves all its frames, but for the noise of pixels: frame t of the clips
    of a batch is what the same seed makes of a batch of images that are frame t.
    """

    def __init__(
        self,
        resolved: ResolvedImageAugmentation,
        *,
        train: bool,
        fit: Any,
        combine: str,
        chunk: int,
    ) -> None:
        """Args: fit cuts clips out of videos; combine and chunk as in ManyClips, and combine "bag"
        for clips of a video as one input."""
        self.images = Augmenter(resolved, train=train, bit_depth=8)
        self.fit, self.combine, self.chunk = fit, combine, chunk

    def __call__(self, clips: Clips, fitted: bool, seed: int) -> "Tensor | ManyClips":
        """(B, C, T, S, S) float32 on the device of the clips; (B, C, V T, S, S) of bags; or many
        clips of each video.

        Args:
            fitted: True: clips come fitted.
            seed: of the random parameters; unused in evaluation.
        """
        pixels = clips.pixels if clips.pixels.ndim == 6 else clips.pixels[:, None]
        batch, each, frames, channels = pixels.shape[:4]
        views = () if each == 1 or self.combine == "bag" else (each,)
        length = frames if views else each * frames
        side = self.images.size
        x = empty(batch, *views, channels, length, side, side, device=pixels.device)
        with torch.autocast(pixels.device.type, enabled=False):
            out = x.transpose(-4, -3).flatten(0, -5)  # (groups, length, C, S, S)
            self.images.write(pixels.flatten(0, 2), fitted, seed, out, frames)
        return ManyClips(x, self.combine, self.chunk) if views else x


# -------------------------------------------------------------------------- mixup and cutmix
#
# Mixup and CutMix of a batch with soft targets, every sample with its own share and partner.
#
# Mixup (Zhang et al. 2018): x = l x_i + (1 - l) x_j, l from Beta(alpha, alpha). CutMix (Yun et al.
# 2019): a rectangle of x_j pasted into x_i, l the share of x_i that remains visible. Targets are
# mixed with the same l. B batch, C channels, H W pixels, K classes or targets.


def mixup_cutmix(
    inputs: Tensor,
    targets: Tensor,
    *,
    outputs: int,
    mixup: bool,
    mixup_alpha: float,
    cutmix: bool,
    cutmix_alpha: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Mixed inputs and soft targets; where both are on, each sample draws one of them.

    Args:
        inputs: (B, C, H, W) float; or series (B, C, T) of one length or vectors (B, D), of which
            cutmix is refused.
        targets: (B,) int64 class numbers, or (B, K) multilabel or regression targets.
        outputs: K.
        mixup, cutmix: which of the two are on; with neither only the targets change their form.
        mixup_alpha, cutmix_alpha: of the Beta distribution that l is drawn from.
        seed: of the parameters, which are drawn on the CPU.

    Returns:
        Inputs of the same shape and targets (B, K) float32.
    """
    soft = F.one_hot(targets, outputs).float() if targets.dim() == 1 else targets.float()
    count = len(inputs)
    if not count or not (mixup or cutmix):
        return inputs, soft
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(count, generator=generator)
    pasted = torch.full((count,), cutmix)
    if mixup and cutmix:
        pasted = torch.rand(count, generator=generator) < 0.5
    kept = torch.ones(count)  # l, the share of the sample itself
    boxes = torch.zeros(count, 4, dtype=torch.int64)
    if mixup:
        kept = torch.where(pasted, kept, beta(count, mixup_alpha, generator))
    if cutmix:
        height, width = inputs.shape[2:]
        drawn = rectangles(beta(count, cutmix_alpha, generator), height, width, generator)
        boxes = torch.where(pasted[:, None], drawn, boxes)
    moved = [t.to(inputs.device, non_blocking=True) for t in (partner, kept, boxes, pasted)]
    if inputs.ndim < 4:  # of height 1, vectors of width 1 too
        found, soft = mixed(inputs[(..., *(None,) * (4 - inputs.ndim))], soft, *moved)
        return found.view(inputs.shape), soft
    return mixed(inputs, soft, *moved)


def mixup_draws(
    targets: Tensor, *, outputs: int, alpha: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Partner (B,) and share l (B,) of each sample, and the soft targets (B, K) that go with them,
    on the device of the targets; what `mixup_cutmix` draws from the seed."""
    soft = F.one_hot(targets, outputs).float() if targets.dim() == 1 else targets.float()
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(len(targets), generator=generator).to(targets.device)
    kept = beta(len(targets), alpha, generator).to(targets.device)
    return partner, kept, torch.lerp(soft[partner], soft, kept[:, None])


def mixed(
    inputs: Tensor, soft: Tensor, partner: Tensor, kept: Tensor, boxes: Tensor, pasted: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix with given parameters: partner (B,), kept (B,), boxes (B, 4) y0 y1 x0 x1 (empty for
    mixup), pasted (B,) bool, all on the device of the inputs."""
    height, width = inputs.shape[2:]
    y0, y1, x0, x1 = boxes[:, :, None].unbind(1)  # (B, 1) each
    rows, columns = (torch.arange(side, device=inputs.device) for side in (height, width))
    tall, wide = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    inside = tall[:, :, None] & wide[:, None, :]  # (B, H, W)
    share = torch.where(inside, 0.0, kept[:, None, None])[:, None]  # (B, 1, H, W) of the own pixel
    area = (y1 - y0) * (x1 - x0) / (height * width)  # (B, 1), what was really pasted
    kept = torch.where(pasted[:, None], 1 - area, kept[:, None])  # (B, 1)
    mixed_inputs = torch.lerp(inputs[partner], inputs, share.to(inputs.dtype))
    return mixed_inputs, torch.lerp(soft[partner], soft, kept)


def mixed_series(inputs: Tensor, partner: Tensor, kept: Tensor) -> Tensor:
    """Series (B, C + 1, T), whose last row is 1 where a time point counts, blended with partner
    (B,), kept (B,) the share of the sample itself. A blend has the time points of the one with the
    larger share; where the other has none, that one's values are as they are."""
    other, share = inputs[partner], kept.to(inputs.dtype)[:, None, None]
    larger = torch.where(share >= 0.5, inputs, other)
    both = (inputs[:, -1:] > 0) & (other[:, -1:] > 0)  # (B, 1, T)
    found = torch.where(both, torch.lerp(other, inputs, share), larger)
    return torch.cat([found[:, :-1], larger[:, -1:]], dim=1)


def rectangles(kept: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Rectangles of share 1 - kept (B,) around random pixels, cut at the border: (B, 4) int64 y0 y1
    x0 x1."""
    side = (1 - kept).sqrt()  # of the image side
    pairs = []
    for extent in (height, width):
        length = (side * extent).round().long()
        centre = torch.randint(extent, (len(kept),), generator=generator)
        start = centre - length // 2
        pairs += [start.clamp(0, extent), (start + length).clamp(0, extent)]
    return torch.stack(pairs, 1)


def beta(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """(count,) draws of Beta(alpha, alpha), float32; torch has no seeded ones."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    draws = np.random.default_rng(seed).beta(alpha, alpha, count)
    return torch.from_numpy(draws).float()
