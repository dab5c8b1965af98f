"""Augmentations of a batch of time series in which every sample has its own parameters.

B batch, C channels, T time points, n samples that drew an operation.

A sample whose length differs from others', or that lacks values, has a last row that is 1 where a
time point counts and 0 where not; it goes along with what moves time points. Lengths are those of
the samples, up to their last time point that counts.
"""

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from glovita_lib.augment_images import Operations, coin, to, uniform
from glovita_lib.errors import refuse
from glovita_lib.spec_series import (
    SERIES_TEST,
    SERIES_TRAIN,
    ResolvedSeriesAugmentation,
    SeriesAugmentation,
    SeriesOps,
)

SLOWEST = 0.1  # of the drawn speeds of time, so that it never stands still or runs backwards
SERIES_OPERATIONS = Operations()
operation = SERIES_OPERATIONS.register


def resolve_series_augmentation(
    aug: SeriesAugmentation, *, default_policies: tuple[str, str], length: int
) -> ResolvedSeriesAugmentation:
    """The augmentation of a run.

    Args:
        aug: the section of the spec.
        default_policies: train and test policy of the data set.
        length: time points of the longest series.

    Raises:
        UserError: parameters that nothing reads.
    """
    refuse("data.augmentation", list(aug.unread_kwargs(default_policies)))
    names = aug.train_policy or default_policies[0], aug.test_policy or default_policies[1]
    return ResolvedSeriesAugmentation(
        train_policy=names[0],
        test_policy=names[1],
        length=length,
        train=msgspec.structs.replace(SERIES_TRAIN[names[0]], **aug.train_kwargs.given()),
        test=SERIES_TEST[names[1]],
    )


# ----------------------------------------------------------------------------------- time points
#
# A registered function changes the places (B, T), in time points of the source, of the rows that
# drew it: it maps places of its result to places of its source. Parameters are drawn on the CPU.


@dataclass(slots=True)
class Places:
    """Where the time points of a batch come from."""

    where: Tensor  # (B, T) time points of the source, with fractions
    last: Tensor  # (B, 1) the last time point of each sample


def between_knots(values: Tensor, share: Tensor, *, smooth: bool) -> Tensor:
    """Values (..., K) at evenly spaced knots from 0 to 1, at shares (..., T) of the way: linear
    between knots, or by a Catmull-Rom spline whose ends go on evenly."""
    count = values.shape[-1]
    place = share.clamp(0, 1) * (count - 1)
    left = place.floor().clamp(max=count - 2).long()
    t = place - left
    if not smooth:
        return torch.lerp(values.gather(-1, left), values.gather(-1, left + 1), t)
    first = 2 * values[..., :1] - values[..., 1:2]
    end = 2 * values[..., -1:] - values[..., -2:-1]
    more = torch.cat([first, values, end], -1)
    p0, p1, p2, p3 = (more.gather(-1, left + i) for i in range(4))
    return p1 + t / 2 * (
        p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0))
    )


@operation("time_warp_p", stage="geometry")
def random_time_warp(place: Places, ops: SeriesOps, generator: torch.Generator) -> None:
    """Time at speeds 1 + normal, linear between knots; the ends stay where they are."""
    rows = coin(len(place.where), ops.time_warp_p, generator).nonzero()[:, 0]
    noise = torch.randn(len(rows), ops.time_warp_knots, generator=generator)
    speed = (1 + ops.time_warp_std * noise).clamp(min=SLOWEST)
    rows, speed = to(place.where.device, rows, speed)
    last = place.last[rows].clamp(min=1)  # (n, 1)
    share = place.where[rows] / last
    place.where[rows] = warped(speed, share) * last


def warped(speed: Tensor, share: Tensor) -> Tensor:
    """Share (n, T) of the way after a share of the time, at speeds (n, K) linear between knots: the
    integral of the speed over that of the whole."""
    count = speed.shape[1]
    pieces = (speed[:, 1:] + speed[:, :-1]) / 2  # the way in each piece
    before = torch.nn.functional.pad(pieces.cumsum(1), (1, 0))  # (n, K)
    place = share.clamp(0, 1) * (count - 1)
    left = place.floor().clamp(max=count - 2).long()
    t = place - left
    first, second = speed.gather(1, left), speed.gather(1, left + 1)
    way = before.gather(1, left) + t * first + t * t / 2 * (second - first)
    return way / before[:, -1:]


@operation("permute_p", stage="geometry")
def random_permutation(place: Places, ops: SeriesOps, generator: torch.Generator) -> None:
    """Segments of one length in another order."""
    rows = coin(len(place.where), ops.permute_p, generator).nonzero()[:, 0]
    low, high = ops.permute_segments
    counts = torch.randint(low, high + 1, (len(rows), 1), generator=generator)
    keys = torch.rand(len(rows), high, generator=generator)
    rows, counts, keys = to(place.where.device, rows, counts, keys)
    length = place.last[rows] + 1  # (n, 1)
    counts = torch.minimum(counts, length.long())
    number = torch.arange(high, device=keys.device)
    order = keys.masked_fill(number >= counts, 2.0).argsort(1)  # segments that are not there last
    edges = (torch.arange(high + 1, device=keys.device) * length / counts).round()  # (n, K + 1)
    sizes = edges.diff(dim=1).gather(1, order) * (number < counts)
    ends = sizes.cumsum(1)  # of the segments in their new order
    own = place.where[rows]
    segment = torch.searchsorted(ends, own.contiguous(), right=True).clamp(max=high - 1)
    segment = torch.minimum(segment, counts - 1)
    start = (ends - sizes).gather(1, segment)
    there = edges.gather(1, order.gather(1, segment))
    place.where[rows] = (there + own - start).clamp(min=0).minimum(place.last[rows])


@operation("slice_p", stage="geometry")
def random_slice(place: Places, ops: SeriesOps, generator: torch.Generator) -> None:
    """A window at a random place, stretched to the whole length (Le Guennec et al. 2016)."""
    rows = coin(len(place.where), ops.slice_p, generator).nonzero()[:, 0]
    share = uniform(len(rows), *ops.slice_share, generator, 1)
    start = torch.rand(len(rows), 1, generator=generator) * (1 - share)
    rows, share, start = to(place.where.device, rows, share, start)
    place.where[rows] = place.where[rows] * share + start * place.last[rows]


# ---------------------------------------------------------------------------------------- values
#
# A registered function changes the channels (B, C, T) of the samples that drew it, in place.


def smooth_curves(x: Tensor, rows: Tensor, knots: Tensor, last: Tensor) -> Tensor:
    """Splines through values (n, C, K) at evenly spaced time points of samples rows, (n, C, T)."""
    share = torch.arange(x.shape[2], device=x.device) / last[rows].clamp(min=1)  # (n, T)
    return between_knots(knots, share[:, None].expand(-1, x.shape[1], -1), smooth=True)


@operation("magnitude_warp_p")
def random_magnitude_warp(
    x: Tensor, ops: SeriesOps, generator: torch.Generator, last: Tensor
) -> Tensor:
    """Times a smooth curve around 1, of each channel."""
    rows = coin(len(x), ops.magnitude_warp_p, generator).nonzero()[:, 0]
    noise = torch.randn(len(rows), x.shape[1], ops.magnitude_warp_knots, generator=generator)
    rows, knots = to(x.device, rows, 1 + ops.magnitude_warp_std * noise)
    x[rows] *= smooth_curves(x, rows, knots, last)
    return x


@operation("scale_p")
def random_scale(x: Tensor, ops: SeriesOps, generator: torch.Generator, last: Tensor) -> Tensor:
    """Times a factor around 1, of each channel."""
    rows = coin(len(x), ops.scale_p, generator).nonzero()[:, 0]
    factor = 1 + ops.scale_std * torch.randn(len(rows), x.shape[1], 1, generator=generator)
    rows, factor = to(x.device, rows, factor)
    x[rows] *= factor
    return x


@operation("jitter_p")
def random_jitter(x: Tensor, ops: SeriesOps, generator: torch.Generator, last: Tensor) -> Tensor:
    """Gaussian noise, independent per value, of one strength in all channels of a sample."""
    rows = coin(len(x), ops.jitter_p, generator).nonzero()[:, 0]
    std = uniform(len(rows), *ops.jitter_std, generator, 1, 1)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    field = torch.Generator(x.device).manual_seed(seed)
    rows, std = to(x.device, rows, std)
    noise = torch.randn(len(rows), *x.shape[1:], generator=field, device=x.device)
    x[rows] += std * noise
    return x


# ------------------------------------------------------------------------------------ application


class SeriesAugmenter:
    """Turns a batch of series into the encoder's input under one policy.

    Every sample has its own parameters. They are drawn on the CPU from the seed, so they are the
    same on every device and nothing waits for the device; only noise fields are drawn there.
    """

    fit = None  # series of any length are padded, none is cut

    def __init__(
        self, resolved: ResolvedSeriesAugmentation, channels: int, *, train: bool, masks: int = 0
    ) -> None:
        """
        Args:
            channels: C.
            masks: how many of them, the last ones, are 1 where a value is there and 0 where not.
        """
        self.ops = resolved.train if train else resolved.test
        self.channels, self.measured = channels, channels - masks

    def __call__(self, inputs: Tensor, fitted: bool, seed: int) -> Tensor:
        """Augmented batch.

        Args:
            inputs: (B, C, T), or (B, C + 1, T) with the row that says what counts.
            fitted: unused, as series are not cropped.
            seed: of the random parameters; unused in evaluation.

        Returns:
            The same shape, float32, on the device of the inputs; 0 where nothing counts behind
            the end of a series.
        """
        inputs = inputs.float()
        moving = SERIES_OPERATIONS.active(self.ops, "geometry")
        changing = SERIES_OPERATIONS.active(self.ops, "values")
        if not len(inputs) or not (moving or changing):
            return inputs
        with torch.autocast(inputs.device.type, enabled=False):
            generator = torch.Generator().manual_seed(seed)
            last = self.last(inputs)
            if moving:
                steps = torch.arange(inputs.shape[2], device=inputs.device, dtype=torch.float32)
                place = Places(steps.expand(len(inputs), -1).minimum(last).clone(), last)
                for each in moving:
                    each.function(place, self.ops, generator)
                inputs = self.moved(inputs, place)
            else:
                inputs = inputs.clone()
            values = inputs[:, : self.measured]
            for each in changing:
                values = each.function(values, self.ops, generator, last)
            inside = torch.arange(inputs.shape[2], device=inputs.device) <= last  # (B, T)
            inputs *= inside[:, None]
        return inputs

    def last(self, inputs: Tensor) -> Tensor:
        """The last time point of each sample that counts, (B, 1) float32."""
        length = inputs.shape[2]
        if inputs.shape[1] == self.channels:
            return torch.full((len(inputs), 1), length - 1.0, device=inputs.device)
        steps = torch.arange(length, device=inputs.device)
        return (steps * (inputs[:, -1] > 0)).amax(1, keepdim=True).float()

    def moved(self, inputs: Tensor, place: Places) -> Tensor:
        """Inputs at other time points, linear between two; what is there as at the nearer one."""
        left = place.where.floor().clamp(min=0).minimum(place.last).long()  # (B, T)
        right = (left + 1).minimum(place.last.long())
        t = (place.where - left).clamp(0, 1)
        first, second = (
            inputs.gather(2, at[:, None].expand(-1, inputs.shape[1], -1)) for at in (left, right)
        )
        found = torch.lerp(first, second, t[:, None])
        masks = slice(self.measured, None)
        found[:, masks] = torch.where(t[:, None] < 0.5, first[:, masks], second[:, masks])
        return found
