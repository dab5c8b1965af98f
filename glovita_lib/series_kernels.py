"""Features of time series by random convolutional kernels, and a ridge whose strength is chosen by
closed-form leave-one-out.

- MiniRocket: Dempster, Schmidt, Webb, KDD 2021 (arXiv 2012.08791)
- MultiRocket: Tan, Dempster, Bergmeir, Webb, DMKD 2022 (arXiv 2102.00457)
- Hydra: Dempster, Schmidt, Webb, DMKD 2023 (arXiv 2203.13652)

Of series of one length and for the same seed, kernels, draws and features are those of aeon 1.6.
Of series of several lengths kernels are made for the longest one, beyond its end a series is 0, and
features are taken over its own time points; where a kernel that is to stay inside is longer than
the series, over all of them.

N series, C channels, T time points, K kernels of one dilation and padding, F biases of a kernel,
D features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from glovita_lib.data import is_constant
from glovita_lib.probe_models import FEATURES_AT_ONCE, Ridge, few, fit_ridge

TAPS = 9  # of a kernel
HALF = TAPS // 2
TRIPLES = torch.tensor(list(combinations(range(TAPS), 3)))  # (84, 3): taps of weight 2, others -1
KERNELS = len(TRIPLES)
EVEN_ODD = torch.arange(KERNELS).view(-1, 2).T.flatten()  # kernels of even numbers before others
MOST_CHANNELS = 9  # that a kernel of MiniRocket reads
MINI_FEATURES, MULTI_FEATURES, MOST_DILATIONS = 10_000, 6_250, 32
SERIES_AT_ONCE = 192  # that go through a transform
POINTS_AT_ONCE = 1_200  # time points of series that go through Hydra
VALUES_AT_ONCE = 100_000  # biases of kernels and series that are compared at a time


@dataclass(frozen=True, slots=True)
class SeriesBlock:
    """Series of any lengths, zeros behind the shorter ones."""

    values: Tensor  # (N, C, T) float32
    lengths: Tensor  # (N,) int64, on the CPU

    @classmethod
    def of(cls, series: Sequence[np.ndarray], length: int) -> "SeriesBlock":
        """Series (C, T_i), filled up to `length` time points, longer ones to the longest."""
        lengths = [one.shape[-1] for one in series]
        values = torch.zeros(len(series), len(series[0]), max(length, *lengths))
        for row, one in zip(values, series, strict=True):
            row[:, : one.shape[-1]] = torch.from_numpy(one)
        return cls(values, torch.tensor(lengths))

    def differences(self) -> "SeriesBlock":
        """First differences, 0 behind the end of a series."""
        diff = self.values.diff(dim=2)
        lengths = (self.lengths - 1).clamp(min=1)
        outside = torch.arange(diff.shape[2]) >= lengths[:, None]
        return SeriesBlock(diff.masked_fill(outside[:, None].to(diff.device), 0), lengths)

    def parts(self, device: torch.device, most: int) -> Iterator[tuple[Tensor, "SeriesBlock"]]:
        """Series of similar lengths, the longest first, on a device, and which ones they are."""
        order = self.lengths.argsort(descending=True, stable=True)
        for rows in order.tensor_split(-(-len(order) // most)):
            lengths = self.lengths[rows]
            values = self.values[rows, :, : max(2, int(lengths[0]))]  # 2 have a difference
            yield rows, SeriesBlock(values.to(device), lengths)


class Transform(Protocol):
    """Kernels that are fitted to series, and give their features."""

    def __call__(self, block: SeriesBlock) -> Tensor:
        """Features (N, D) float32, on the device of the series."""


# ----------------------------------------------------------------------- MiniRocket's kernels


def spread_dilations(length: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Dilations for series of a length, and the number of biases of each kernel for each."""
    each = features // KERNELS
    most = min(each, MOST_DILATIONS)
    largest = np.log2((length - 1) / (TAPS - 1))
    exponents = np.logspace(0, largest, most, base=2).astype(np.int32)
    dilations, counts = np.unique(exponents, return_counts=True)
    counts = (counts * (each / most)).astype(np.int32)
    for i in range(each - counts.sum()):
        counts[i % len(counts)] += 1
    return dilations, counts


@dataclass(frozen=True, slots=True)
class Kernels:
    """The 84 kernels with their dilations, biases and channels, fitted to series."""

    dilations: list[int]
    counts: list[int]  # biases of a kernel for each dilation
    biases: Tensor  # (D,) float32, dilation by dilation, kernel by kernel
    channels: Tensor | None  # (dilations 84, C) 1 where a kernel reads a channel; None: one channel

    @classmethod
    def fit(
        cls, block: SeriesBlock, features: int, seed: int, drawn: np.random.RandomState
    ) -> "Kernels":
        """Kernels whose biases are quantiles of what they give for series drawn at random.

        Args:
            features: D at most.
            seed: of the series that are drawn.
            drawn: gives the channels.
        """
        _, channels, length = block.values.shape
        dilations, counts = (each.tolist() for each in spread_dilations(length, features))
        golden = (np.sqrt(5) + 1) / 2
        places = [(i * golden) % 1 for i in range(1, KERNELS * sum(counts) + 1)]
        quantiles = np.array(places, np.float32).astype(np.float64)
        chosen = draw_channels(channels, KERNELS * len(dilations), drawn)
        series = np.random.RandomState(seed)
        biases, start = [], 0
        for number, (dilation, count) in enumerate(zip(dilations, counts, strict=True)):
            rows = torch.from_numpy(series.randint(len(block.values), size=KERNELS))
            own = chosen[KERNELS * number : KERNELS * (number + 1)]
            x = torch.einsum("kct,kc->tk", block.values[rows], own)
            out = convolved(x[..., None], TRIPLES, dilation, fitting=True)[..., 0]  # (T, 84)
            end = start + KERNELS * count
            wanted = quantiles[start:end].reshape(KERNELS, count)
            biases.append(quantiles_of(out.T.numpy(), block.lengths[rows].numpy(), wanted))
            start = end
        found = torch.from_numpy(np.concatenate(biases).astype(np.float32))
        return cls(dilations, counts, found, chosen if channels > 1 else None)


def draw_channels(channels: int, combos: int, drawn: np.random.RandomState) -> Tensor:
    """Which channels each of `combos` kernels reads, (combos, C) 0 or 1."""
    if channels == 1:
        return torch.ones(combos, 1)
    most = np.log2(min(channels, MOST_CHANNELS) + 1)
    counts = (2 ** drawn.uniform(0, most, combos)).astype(np.int32)
    chosen = torch.zeros(combos, channels)
    for row, count in zip(chosen, counts.tolist(), strict=True):
        row[torch.from_numpy(drawn.choice(channels, count, replace=False))] = 1
    return chosen


def quantiles_of(values: np.ndarray, lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Quantiles (K, F) of rows (K, T) over their first `lengths` (K,) values, linear between them:
    (K F,) float64."""
    inside = np.arange(values.shape[1]) < lengths[:, None]
    ordered = np.sort(np.where(inside, values, np.inf), axis=1).astype(np.float64)
    rank = (lengths[:, None] - 1) * wanted
    low = np.floor(rank).astype(np.int64)
    high = np.minimum(low + 1, lengths[:, None] - 1)
    lower, upper = (np.take_along_axis(ordered, at, 1) for at in (low, high))
    share = rank - low
    return (lower * (1 - share) + upper * share).ravel()


def convolved(
    x: Tensor, triples: Tensor, dilation: int, early: int = 0, *, fitting: bool = False
) -> Tensor:
    """Outputs (T, K, N) of kernels with weight 2 at three taps and -1 at the others, zeros beyond
    the ends.

    The order of the sums is that of aeon's compiled code, whose rounding decides ties.

    Args:
        x: (T, K, N), what each kernel reads, or (T, 1, N), what all do.
        triples: (K, 3); the last taps of neighbours whose other two are the same are equally far
            from each other.
        early: time points by which the taps before the middle come too late (see MultiRocket).
        fitting: whether biases are drawn from them.
    """
    steps, reach = len(x), HALF * dilation
    padded = x.new_zeros(steps + 2 * reach, *x.shape[1:])
    padded[reach : reach + steps] = x
    begins = [tap * dilation + (early if tap < HALF else 0) for tap in range(TAPS)]
    total = -x
    for tap in range(TAPS):
        if tap != HALF:
            total -= padded[begins[tap] : begins[tap] + steps]
    padded *= 3
    if x.shape[1] > 1:
        return gathered(padded, total, triples, begins, fitting=fitting)
    taps = torch.stack([padded[begin : begin + steps, 0] for begin in begins], 1)  # (T, 9, N)
    out = x.new_empty(steps, len(triples), x.shape[2])
    firsts = total + taps  # (T, 9, N)
    pairs: dict[tuple[int, int], Tensor] = {}
    kernel = 0
    for (a, b), group in groupby(triples.tolist(), lambda triple: (triple[0], triple[1])):
        if (a, b) not in pairs:
            pairs[a, b] = firsts[:, a : a + 1] + taps[:, b : b + 1]
        last = [c for _, _, c in group]
        step = last[1] - last[0] if len(last) > 1 else 1
        own = taps[:, last[0] : last[-1] + 1 : step]
        torch.add(pairs[a, b], own, out=out[:, kernel : kernel + len(last)])
        kernel += len(last)
    return out


def gathered(
    padded: Tensor, total: Tensor, triples: Tensor, begins: list[int], *, fitting: bool
) -> Tensor:
    """The same, where each kernel reads a series of its own.

    Args:
        padded: (T + 2 reach, K, N), three times what they read.
        total: (T, K, N), what all taps add up to with weight -1.
        begins: place in `padded` that each tap reads first.
    """
    steps, kernels = total.shape[:2]
    first = torch.tensor(begins)[triples] * kernels + torch.arange(kernels)[:, None]  # (K, 3)
    place = torch.arange(steps)[:, None] * kernels  # (T, 1)
    rows = padded.flatten(0, 1)
    a, b, c = (
        rows[(place + first[:, i]).flatten().to(rows.device)].view_as(total) for i in range(3)
    )
    return total + (a + b + c) if fitting else total.add_(a).add_(b).add_(c)


# ------------------------------------------------------------------------ features of kernels
#
# Time comes first and series last, so that every operation works on long rows.

Pool = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""Outputs (T, K, N) of kernels, biases (F, K), lengths (N,) in falling order -> features, each
(F, K, N); outputs behind the end of a series are -inf."""


def kernel_features(
    kernels: Kernels, block: SeriesBlock, pool: Pool, found: Tensor, early: int = 0
) -> None:
    """Features of kernels.

    Args:
        found: (features of a bias, D, N), where they go.
        early: see `convolved`.
    """
    device = block.values.device
    order = block.lengths.argsort(descending=True, stable=True)
    lengths = block.lengths[order]
    x = block.values[order.to(device), :, : int(lengths[0])]
    x = x.permute(2, 1, 0).contiguous()  # (T, C, N)
    start = 0
    for number, (dilation, count) in enumerate(zip(kernels.dilations, kernels.counts, strict=True)):
        end = start + KERNELS * count
        biases = kernels.biases[start:end].view(KERNELS, count).T.to(device)  # (F, 84)
        rows = found[:, start:end].unflatten(1, (KERNELS, count))
        given = x
        if kernels.channels is not None:
            channels = kernels.channels[KERNELS * number :][EVEN_ODD].to(device)
            given = torch.einsum("tcn,kc->tkn", x, channels)
        outs = convolved(given, TRIPLES[EVEN_ODD], dilation, early)  # (T, 84, N)
        for parity, out in enumerate(outs.split(KERNELS // 2, 1)):
            own = slice(parity, KERNELS, 2)
            # every second kernel stays inside the series
            margin = HALF * dilation * ((number + parity) % 2)
            inside = int((lengths > 2 * margin).sum())
            for part, cut in ((slice(0, inside), margin), (slice(inside, None), 0)):
                own_lengths = lengths[part] - 2 * cut
                if not len(own_lengths):
                    continue
                piece = ended(out[cut : len(out) - cut, :, part], own_lengths)
                values = pool(piece, biases[:, own].contiguous(), own_lengths)
                for row, value in zip(rows, values, strict=True):
                    row[own, :, part] = value.transpose(0, 1)
        start = end
    if not torch.equal(order, torch.arange(len(order))):
        found.copy_(found[..., order.argsort().to(device)])


def ended(out: Tensor, lengths: Tensor) -> Tensor:
    """Outputs (T, K, N) without those behind all series, and -inf behind the end of each."""
    out = out[: int(lengths[0])]
    if int(lengths[-1]) == len(out):
        return out
    outside = torch.arange(len(out))[:, None] >= lengths  # (T, N)
    return out.masked_fill(outside[:, None].to(out.device), -torch.inf)


def positive_share(out: Tensor, biases: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """The share of time points above the bias (PPV)."""
    if out.device.type == "cpu":
        (count,) = on_cpu(out, biases, lengths, count_above)
    else:
        count = (out[:, None] > biases[:, :, None]).sum(0)
    return (count / lengths.to(out.device),)


def four_features(out: Tensor, biases: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """MultiRocket's features of the time points above the bias: their share, the longest stretch
    without one below, the mean of value and bias, and the mean place."""
    count, places, total, stretch = (
        on_device(out, biases, lengths)
        if out.device.type != "cpu"
        else on_cpu(out, biases, lengths, describe_above)
    )
    limits, here = biases[:, :, None], lengths.to(out.device)
    mean = total / count + 2 * limits
    stretch = torch.where(here > 1, stretch + 1, 0)
    some = count > 0
    return count / here, stretch, mean.where(some, 0), (places / count).where(some, -1)


def on_device(out: Tensor, biases: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Of the time points above the bias: their number, the sum of their places, the sum of
    value - bias, and the longest stretch but for the last time point, (F, K, N)."""
    limits, last = biases[:, :, None], lengths.to(out.device)
    shape = (*biases.shape, out.shape[2])
    count, places, total, run, longest = (out.new_zeros(shape) for _ in range(5))
    for t, row in enumerate(out):
        above = (row > limits).float()
        count += above
        places += t * above
        total += (row - limits).clamp(min=0)
        longest = torch.where(last > t, torch.maximum(longest, run), longest)
        if t:
            run = (run + 1) * (row >= limits)
    return count, places, total, longest


Count = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, ...]]
"""Values (T, M), limits (G, M), last time points (M,) -> what is counted, each (G, M) float32."""


def on_cpu(out: Tensor, biases: Tensor, lengths: Tensor, count: Count) -> tuple[Tensor, ...]:
    """The same by NumPy, whose comparisons give bytes at the speed of the cache; for so many biases
    at a time as fit into it."""
    steps, kernels, series = out.shape
    values = out.flatten(1).numpy()
    last = np.broadcast_to(lengths.numpy() - 1, (kernels, series)).ravel()
    parts = []
    for own in biases.split(max(1, VALUES_AT_ONCE // len(last))):
        parts.append(count(values, own.numpy().repeat(series, axis=1), last))
    return tuple(
        torch.from_numpy(np.concatenate(part)).view(-1, kernels, series)
        for part in zip(*parts, strict=True)
    )


def count_above(values: np.ndarray, limits: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, ...]:
    """How many values are above each limit."""
    found = np.zeros(limits.shape, np.float32)
    most = max(1, VALUES_AT_ONCE // limits.size)  # time points at once
    above = np.empty((most, *limits.shape), np.uint8)
    for start in range(0, len(values), 255):  # whose number fits into a byte
        rows, number = values[start : start + 255, None], np.zeros(limits.shape, np.uint8)
        for first in range(0, len(rows), most):
            some = rows[first : first + most]  # (t, 1, M)
            here = above[: len(some)]
            np.greater(some, limits, out=here.view(bool))
            for each in here:
                np.add(number, each, out=number)
        found += number
    return (found,)


def describe_above(
    values: np.ndarray, limits: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What `on_device` finds."""
    count, places, total = (np.zeros(limits.shape, np.float32) for _ in range(3))
    most = min(22, max(1, VALUES_AT_ONCE // limits.size))  # time points at once
    above, kept = (np.empty((most, *limits.shape), np.uint8) for _ in range(2))
    larger = np.empty(above.shape, np.float32)
    kind = np.uint8 if len(values) < 255 else np.uint16 if len(values) < 65_000 else np.uint32
    run, longest = (np.zeros(limits.shape, kind) for _ in range(2))
    ends = {0, *last[last < len(values) - 1].tolist()}
    t = 0
    for start in range(0, len(values), 22):  # 1 + ... + 22 fits into a byte
        rows = values[start : start + 22, None]
        number, later = (np.zeros(limits.shape, np.uint8) for _ in range(2))
        for first in range(0, len(rows), most):
            some = rows[first : first + most]  # (t, 1, M)
            here = len(some)
            np.greater(some, limits, out=above[:here].view(bool))
            np.greater_equal(some, limits, out=kept[:here].view(bool))
            np.subtract(some, limits, out=larger[:here])
            torch.from_numpy(larger[:here]).relu_()  # in the same memory
            for is_above, is_kept, by in zip(above[:here], kept, larger, strict=False):
                np.add(number, is_above, out=number)
                np.add(later, number, out=later)  # each once for every time point up to the 22nd
                np.add(total, by, out=total)
                np.maximum(longest, run, out=longest)
                np.add(run, 1, out=run)
                np.multiply(run, is_kept, out=run)
                if t in ends:  # neither the first nor the last time point counts
                    run[:, (last == t) | (t == 0)] = 0
                t += 1
        count += number
        places += t * number.astype(np.float32) - later
    return count, places, total, longest.astype(np.float32)


# ----------------------------------------------------------------------------------- transforms


class MiniRocket:
    """About 10,000 shares of positive values."""

    def __init__(self, block: SeriesBlock, *, seed: int) -> None:
        drawn = np.random.RandomState(seed)
        self.kernels = Kernels.fit(block, MINI_FEATURES, seed, drawn)

    def __call__(self, block: SeriesBlock) -> Tensor:
        """Features (N, 9,996)."""
        found = block.values.new_empty(1, len(self.kernels.biases), len(block.values))
        kernel_features(self.kernels, block, positive_share, found)
        return found[0].T


class MultiRocket:
    """Four features of about 6,250 biases, of the series and of their first differences.

    In aeon, as in the published code, the taps before the middle of a kernel come one time point
    too late in the transform of the differences, and its channels are those of the series; features
    are to be the published ones.
    """

    def __init__(self, block: SeriesBlock, *, seed: int) -> None:
        drawn = np.random.RandomState(seed)
        self.kernels = Kernels.fit(block, MULTI_FEATURES, seed, drawn)
        changes = Kernels.fit(block.differences(), MULTI_FEATURES, seed, drawn)
        channels = self.kernels.channels
        self.changes = Kernels(changes.dilations, changes.counts, changes.biases, channels)

    def __call__(self, block: SeriesBlock) -> Tensor:
        """Features (N, 49,728)."""
        widths = [len(kernels.biases) for kernels in (self.kernels, self.changes)]
        found = block.values.new_empty(4 * sum(widths), len(block.values))  # (D, N)
        own, changes = found.split([4 * width for width in widths])
        kernel_features(self.kernels, block, four_features, own.unflatten(0, (4, -1)))
        changed, own = block.differences(), changes.unflatten(0, (4, -1))
        kernel_features(self.changes, changed, four_features, own, early=1)
        return found.T


class Hydra:
    """Competing kernels: of each group the one that matches best at a time point counts, those of
    the series weighted by how well, and the one that matches worst."""

    groups, of_group, most_channels = 64, 8, 8

    def __init__(self, block: SeriesBlock, *, seed: int) -> None:
        _, channels, length = block.values.shape
        generator = torch.Generator().manual_seed(seed)
        self.dilations = [2**i for i in range(int(np.log2((length - 1) / (TAPS - 1))) + 1)]
        half = self.groups // 2
        shape = (len(self.dilations), 2, self.of_group * half, 1, TAPS)
        weights = torch.randn(shape, generator=generator)
        weights -= weights.mean(-1, keepdim=True)
        weights /= weights.abs().sum(-1, keepdim=True)
        # (dilations, 2, 8, 9, 32): group g has the kernels 8 g to 8 g + 7
        weights = weights[..., 0, :].unflatten(2, (half, self.of_group))
        self.weights = weights.permute(0, 1, 3, 4, 2).contiguous()
        most = int(np.clip(channels // 2, 2, self.most_channels))
        draws = [
            torch.randint(0, channels, (2, half, most), generator=generator) for _ in self.dilations
        ]
        self.channels = draws if channels > 1 else None

    def __call__(self, block: SeriesBlock) -> Tensor:
        """Features (N, 1,024 dilations)."""
        width = 2 * self.groups * self.of_group * len(self.dilations)
        found = block.values.new_empty(width, len(block.values))
        most = max(1, POINTS_AT_ONCE // block.values.shape[2])
        for rows, part in block.parts(block.values.device, most):
            found[:, rows.to(found.device)] = self.features(part).T
        return found.T

    def features(self, block: SeriesBlock) -> Tensor:
        """The same of few series."""
        parts = []
        blocks = block, block.differences()
        for number, dilation in enumerate(self.dilations):
            for which, own in enumerate(blocks):
                weights = self.weights[number, which].to(own.values.device)  # (8, 9, 32)
                x = own.values
                if self.channels is None:
                    seen = windows(x[:, 0], dilation).flatten(0, 1)  # (N T, 9)
                    out = seen @ weights  # (8, N T, 32)
                else:
                    x = x[:, self.channels[number][which].to(x.device)].sum(2)  # (N, 32, T)
                    seen = windows(x, dilation)  # (N, 32, T, 9)
                    out = torch.einsum("ngtj,kjg->kntg", seen, weights)
                parts += matches(out.view(len(out), *x.shape[::2], -1), own.lengths)
        return torch.cat(parts, dim=1)


def windows(x: Tensor, dilation: int) -> Tensor:
    """x (..., T) as each tap of a kernel sees it, (..., T, 9)."""
    reach = HALF * dilation
    padded = torch.nn.functional.pad(x, (reach, reach))
    taps = [padded[..., tap * dilation : tap * dilation + x.shape[-1]] for tap in range(TAPS)]
    return torch.stack(taps, -1)


def matches(out: Tensor, lengths: Tensor) -> list[Tensor]:
    """How often each kernel is the best of its group, times its output, and how often the worst:
    two of (N, 8 G), group by group.

    Args:
        out: outputs (8, N, T, G).
    """
    best, worst = out[0], out[0]
    for kernel in out[1:]:
        best, worst = torch.maximum(best, kernel), torch.minimum(worst, kernel)
    ones = torch.ones_like(best)
    outside = (torch.arange(out.shape[2]) >= lengths[:, None]).to(out.device)  # (N, T)
    if outside.any():
        ones = ones.masked_fill_(outside[..., None], 0)
    found, own = [], torch.empty_like(best)
    for extreme, free in ((best, best * ones), (worst, ones)):
        counts = []
        for kernel in out:  # of equal ones the first gets what is free
            torch.eq(kernel, extreme, out=own)
            own *= free
            free -= own
            counts.append(own.sum(1))  # (N, G)
        found.append(torch.stack(counts, 2).flatten(1))
    return found


# --------------------------------------------------------------------------------------- scaling


class Deviations:
    """Features over their standard deviation in the train split; constant ones as they are."""

    def __init__(self, features: Tensor) -> None:
        mean = torch.cat([part.mean(1) for part in few([features])])
        rows = zip(few([features]), mean.split(FEATURES_AT_ONCE), strict=True)
        variance = torch.cat([part.sub_(own[:, None]).square_().mean(1) for part, own in rows])
        constant = is_constant(mean, variance, len(features))
        self.mean, self.std = mean.float(), torch.where(constant, 1.0, variance.sqrt()).float()

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D) in their place."""
        return features.sub_(self.mean).div_(self.std)


class SparseScale:
    """Hydra's scaling: roots of counts, (r - mean) / (std + share of zeros^4), 0 where r is 0."""

    def __init__(self, features: Tensor) -> None:
        roots = features.clamp(min=0).sqrt()
        rare = (roots == 0).float().mean(0) ** 4 + 1e-8
        self.mean = roots.mean(0)
        self.std = (roots.std(0) if len(roots) > 1 else torch.zeros_like(rare)) + rare

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        roots = features.clamp(min=0).sqrt()
        return (roots - self.mean) * (roots != 0) / self.std


PARTS: dict[str, tuple[tuple[type, type], ...]] = {
    "minirocket": ((MiniRocket, Deviations),),
    "multirocket": ((MultiRocket, Deviations),),
    "hydra": ((Hydra, SparseScale),),
    "hydra_multirocket": ((Hydra, SparseScale), (MultiRocket, Deviations)),
}
"""Transforms of a method, each with the scaling of its features."""


class KernelFeatures:
    """Scaled features of a method, fitted to the series of a train split."""

    def __init__(
        self, method: str, series: Sequence[np.ndarray], *, seed: int, device: torch.device
    ) -> None:
        self.device = device
        block = SeriesBlock.of(series, TAPS + 1)
        self.length = block.values.shape[2]
        self.parts: list[tuple[Transform, Callable[[Tensor], Tensor]]] = []
        rows, blocks = zip(*block.parts(device, SERIES_AT_ONCE), strict=True)
        self.rows = torch.cat(rows)
        """Series of the train split in the order of their features."""
        self.train: list[Tensor] = []
        """Their features [(N, D_i), ...], of one transform after another."""
        for transform, scale in PARTS[method]:
            fitted = transform(block, seed=seed)
            raw = torch.cat([fitted(part).T for part in blocks], dim=1).T
            scaled = scale(raw)
            self.parts.append((fitted, scaled))
            self.train.append(scaled(raw))

    def blocks(self, series: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Some of the series after others: which ones, and their features [(n, D_i), ...]."""
        for rows, part in SeriesBlock.of(series, self.length).parts(self.device, SERIES_AT_ONCE):
            yield rows, [scale(transform(part)) for transform, scale in self.parts]


def judge(
    method: str,
    series: dict[str, list[np.ndarray]],
    targets: Tensor,
    subtask: str,
    alphas: Sequence[float],
    *,
    outputs: int,
    seed: int,
    device: torch.device,
) -> tuple[Ridge, dict[str, Tensor]]:
    """A ridge on features of random kernels of the series of train, and its logits (N, K) of the
    other splits: its outputs, of two classes with their negative beside them.

    Classes are -1 and 1, two of them one output.

    Args:
        series: of each split.
        targets: of train: (N,) classes, (N, K) 0 or 1, or (N, K) numbers.
        outputs: K.
    """
    kernels = KernelFeatures(method, series["train"], seed=seed, device=device)
    wanted = targets
    if subtask == "multiclass":
        hot = torch.nn.functional.one_hot(targets, outputs)
        wanted = hot[:, 1:] if outputs == 2 else hot
    if subtask != "regression":
        wanted = 2.0 * wanted - 1
    ridge = fit_ridge(kernels.train, wanted[kernels.rows], alphas)
    found = {}
    for name, own in series.items():
        if name == "train":
            continue
        logits = torch.empty(len(own), wanted.shape[1], dtype=torch.float64, device=device)
        for rows, features in kernels.blocks(own):
            logits[rows.to(device)] = ridge(features)
        two = subtask == "multiclass" and outputs == 2
        found[name] = torch.cat([-logits, logits], 1) if two else logits
    return ridge, found
