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
from itertools import combinations
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from glovita_lib.data import is_constant

TAPS = 9  # of a kernel
HALF = TAPS // 2
TRIPLES = torch.tensor(list(combinations(range(TAPS), 3)))  # (84, 3): taps of weight 2, others -1
KERNELS = len(TRIPLES)
MOST_CHANNELS = 9  # that a kernel of MiniRocket reads
MINI_FEATURES, MULTI_FEATURES, MOST_DILATIONS = 10_000, 6_250, 32
SERIES_AT_ONCE, AT_ONCE = 128, 8  # that go through MultiRocket, through Hydra
ROWS_AT_ONCE = 16  # of features that are float64 at a time
VALUES_AT_ONCE = 2**20  # comparisons of values and biases that exist at a time


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

    def parts(self, device: torch.device, count: int) -> Iterator["SeriesBlock"]:
        """So many of the series after others, on a device."""
        for start in range(0, len(self.values), count):
            part = slice(start, start + count)
            yield SeriesBlock(self.values[part].to(device), self.lengths[part])


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

    Args:
        x: (T, K, N), what each kernel reads, or (T, 1, N), what all do.
        triples: (K, 3).
        early: time points by which the taps before the middle come too late (see MultiRocket).
        fitting: whether biases are drawn from them.
    """
    taps = x.new_zeros(x.shape[0], TAPS, *x.shape[1:])  # (T, 9, K or 1, N)
    for tap in range(TAPS):
        by = (tap - HALF) * dilation
        if by < 0:
            by += early
        if by < 0:
            taps[-by:, tap] = x[:by]
        elif by > 0:
            taps[:-by, tap] = x[by:]
        else:
            taps[:, tap] = x
    total = -taps[:, HALF]
    for tap in range(TAPS):
        if tap != HALF:
            total -= taps[:, tap]
    taps *= 3
    # the order of the sums is that of aeon's compiled code, whose rounding decides ties
    if x.shape[1] > 1:
        which = torch.arange(len(triples))
        a, b, c = (taps[:, triples[:, i], which] for i in range(3))
        return total + (a + b + c) if fitting else total + a + b + c
    out = torch.empty(x.shape[0], len(triples), x.shape[2], device=x.device)
    for kernel, (a, b, c) in enumerate(triples.tolist()):
        row = out[:, kernel]
        torch.add(total[:, 0], taps[:, a, 0], out=row)
        row += taps[:, b, 0]
        row += taps[:, c, 0]
    return out


# ------------------------------------------------------------------------ features of kernels
#
# Time comes first and series last, so that every operation works on long rows.

Pool = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
"""Outputs (T, K, N) of kernels, biases (F, K), lengths (N,) in falling order -> features, each
(F, K, N); outputs behind the end of a series are -inf."""


def kernel_features(
    kernels: Kernels, block: SeriesBlock, pool: Pool, outputs: int, early: int = 0
) -> Tensor:
    """Features (N, outputs D) of kernels, the first one of every bias first.

    Args:
        outputs: features of a bias.
        early: see `convolved`.
    """
    device = block.values.device
    order = block.lengths.argsort(descending=True, stable=True)
    lengths = block.lengths[order]
    x = block.values[order.to(device), :, : int(lengths[0])]
    x = x.permute(2, 1, 0).contiguous()  # (T, C, N)
    found = torch.empty(outputs, len(kernels.biases), len(lengths), device=device)
    start = 0
    for number, (dilation, count) in enumerate(zip(kernels.dilations, kernels.counts, strict=True)):
        end = start + KERNELS * count
        biases = kernels.biases[start:end].view(KERNELS, count).T.to(device)  # (F, 84)
        rows = found[:, start:end].view(outputs, KERNELS, count, -1)
        for parity in range(2):  # every second kernel stays inside the series
            own = torch.arange((number + parity) % 2, KERNELS, 2)
            given = x
            if kernels.channels is not None:
                channels = kernels.channels[KERNELS * number + own].to(device)
                given = torch.einsum("tcn,kc->tkn", x, channels)
            out = convolved(given, TRIPLES[own], dilation, early)  # (T, 42, N)
            margin = parity * HALF * dilation
            inside = int((lengths > 2 * margin).sum())
            for part, cut in ((slice(0, inside), margin), (slice(inside, None), 0)):
                own_lengths = lengths[part] - 2 * cut
                if not len(own_lengths):
                    continue
                piece = out[cut : len(out) - cut, :, part]
                values = pool(ended(piece, own_lengths), biases[:, own].contiguous(), own_lengths)
                for row, value in zip(rows, values, strict=True):
                    row[own, :, part] = value.transpose(0, 1)
        start = end
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return found.flatten(0, 1).T[back.to(device)]


def ended(out: Tensor, lengths: Tensor) -> Tensor:
    """Outputs (T, K, N) without those behind all series, and -inf behind the end of each."""
    out = out[: int(lengths[0])]
    if int(lengths[-1]) == len(out):
        return out
    outside = torch.arange(len(out))[:, None] >= lengths  # (T, N)
    return out.masked_fill(outside[:, None].to(out.device), -torch.inf)


def steps_at_once(biases: Tensor, out: Tensor) -> int:
    """Time points whose comparisons exist at a time, a power of two and at most 128: their number
    fits into a byte."""
    most = max(1, VALUES_AT_ONCE // (biases.numel() * out.shape[2]))
    return min(128, 2 ** (most.bit_length() - 1))


def positive_share(out: Tensor, biases: Tensor, lengths: Tensor) -> list[Tensor]:
    """The share of time points above the bias (PPV)."""
    if out.device.type != "cpu":
        return [(out[:, None] > biases[:, :, None]).sum(0) / lengths.to(out.device)]
    values, limits = out.numpy(), biases.numpy()[:, :, None]
    count = np.zeros((*biases.shape, out.shape[2]), np.float32)
    step = steps_at_once(biases, out)
    above = np.empty((step, *count.shape), bool)
    for first in range(0, len(values), step):
        rows = values[first : first + step, None]
        here = np.greater(rows, limits, out=above[: len(rows)]).view(np.uint8)
        count += np.add.reduce(here, axis=0, dtype=np.uint8)
    return [torch.from_numpy(count) / lengths]


def four_features(out: Tensor, biases: Tensor, lengths: Tensor) -> list[Tensor]:
    """MultiRocket's features of the time points above the bias: their share, the longest stretch
    without one below, the mean of value and bias, and the mean place."""
    count, places, total, stretch = (
        on_device(out, biases, lengths)
        if out.device.type != "cpu"
        else on_cpu(out, biases, lengths)
    )
    limits, here = biases[:, :, None], lengths.to(out.device)
    mean = total / count + 2 * limits
    stretch = torch.where(here > 1, stretch + 1, 0)
    some = count > 0
    return [count / here, stretch, mean.where(some, 0), (places / count).where(some, -1)]


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


def on_cpu(out: Tensor, biases: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """The same by NumPy, whose comparisons give bytes at the speed of the memory."""
    values, limits = out.numpy(), biases.numpy()[:, :, None]
    shape = (*biases.shape, out.shape[2])
    count, places, total = (np.zeros(shape, np.float32) for _ in range(3))
    kind = np.uint8 if len(values) < 255 else np.uint16 if len(values) < 65_000 else np.uint32
    run, longest = np.zeros(shape, kind), np.zeros(shape, kind)
    active = (np.arange(len(values))[:, None] < lengths.numpy()).sum(1)  # series at each time
    step = steps_at_once(biases, out)
    bounds, larger = biases[:, :, None], torch.empty(step, *shape)
    above, kept = (np.zeros((step, *shape), bool) for _ in range(2))  # fresh memory is slow
    for first in range(0, len(values), step):
        rows = values[first : first + step, None]
        here = len(rows)
        np.greater(rows, limits, out=above[:here])
        above[here:] = False
        number, place = count_and_place(above.view(np.uint8))
        count += number
        places += first * number + place
        torch.sub(out[first : first + step, None], bounds, out=larger[:here]).clamp_(min=0)
        total += larger[:here].sum(0).numpy()
        np.greater_equal(rows, limits, out=kept[:here])
        for t, own in enumerate(kept[:here].view(np.uint8), first):
            some = active[t]
            if some == shape[2]:
                np.maximum(longest, run, out=longest)
            else:
                np.maximum(longest[..., :some], run[..., :some], out=longest[..., :some])
            if t:
                np.add(run, 1, out=run)
                np.multiply(run, own, out=run)
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in (count, places, total, longest))


def count_and_place(above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number and sum of the places of the ones among bytes (t, ...), t a power of two up to 128:
    neighbours are added again and again, and of the sums the ones in odd places are counted."""
    place = np.zeros(above.shape[1:], np.float32)
    weight = 1
    while len(above) > 1:
        odd = above[1::2]
        place += weight * np.add.reduce(odd, axis=0, dtype=np.uint8).astype(np.float32)
        above = above[::2] + odd
        weight *= 2
    return above[0].astype(np.float32), place


# ----------------------------------------------------------------------------------- transforms


class MiniRocket:
    """About 10,000 shares of positive values."""

    def __init__(self, block: SeriesBlock, *, seed: int) -> None:
        drawn = np.random.RandomState(seed)
        self.kernels = Kernels.fit(block, MINI_FEATURES, seed, drawn)

    def __call__(self, block: SeriesBlock) -> Tensor:
        """Features (N, 9,996)."""
        return kernel_features(self.kernels, block, positive_share, 1)


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
        changes = block.differences()
        return torch.cat(
            [
                kernel_features(self.kernels, block, four_features, 4),
                kernel_features(self.changes, changes, four_features, 4, early=1),
            ],
            dim=1,
        )


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
        few = [self.features(part) for part in block.parts(block.values.device, AT_ONCE)]
        return torch.cat(few)

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


# ---------------------------------------------------------------------------------------- ridge


@dataclass(frozen=True, slots=True)
class Ridge:
    """outputs = W x + b, fitted to targets by |W x + b - t|^2 summed over samples + alpha |W|^2,
    the bias free, with the strength that has the smallest squared error of leave-one-out."""

    weight: Tensor  # (D, K) float64
    bias: Tensor  # (K,)
    alpha: float
    candidates: list[dict[str, float]]
    """Strengths with the mean squared error of leave-one-out."""
    error: float
    """The smallest one."""

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K) float64; few rows at a time, as memory that is used again is faster."""
        parts = [part.double() @ self.weight for part in features.split(ROWS_AT_ONCE)]
        return torch.cat(parts) + self.bias


def fit_ridge(features: Tensor, targets: Tensor, alphas: Sequence[float]) -> Ridge:
    """A ridge with the best of some strengths, as scikit-learn's RidgeCV and RidgeClassifierCV
    choose it: e_i = (y - H y)_i / (1 - H_ii) with the hat matrix H, the first of equal ones.

    Args:
        features: (N, D) of any float type.
        targets: (N, K); classes are -1 and 1.
    """
    x, y = features.double(), targets.double().to(features.device)
    center, level = x.mean(0), y.mean(0)
    x, y = x - center, y - level
    count = len(x)
    wide = count <= x.shape[1]
    values, basis = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values = values.clamp(min=0)
    # directions of the samples: eigenvectors of x x^T, without those that x does not reach
    limit = values.max() * max(x.shape) * torch.finfo(torch.float64).eps
    values, basis = values[values > limit], basis[:, values > limit]
    left = basis if wide else x @ basis / values.sqrt()  # (N, R), orthonormal
    inside = left.T @ y  # (R, K)
    errors = []
    for alpha in alphas:
        share = values / (values + alpha)
        left_out = 1 - 1 / count - left.square() @ share  # 1 - H_ii
        residual = y - left @ (share[:, None] * inside)
        tiny = torch.finfo(torch.float64).eps
        errors.append(float((residual / left_out.clamp(min=tiny)[:, None]).square().mean()))
    best = int(np.argmin(errors))
    alpha = alphas[best]
    scaled = inside / (values + alpha)[:, None]
    # W = x^T (x x^T + alpha)^-1 y, or (x^T x + alpha)^-1 x^T y
    weight = x.T @ (basis @ scaled) if wide else basis @ (values.sqrt()[:, None] * scaled)
    tried = zip(alphas, errors, strict=True)
    candidates = [{"alpha": one, "squared_error": error} for one, error in tried]
    return Ridge(weight, level - center @ weight, alpha, candidates, errors[best])


# --------------------------------------------------------------------------------------- scaling


class Deviations:
    """Features over their standard deviation in the train split; constant ones as they are."""

    def __init__(self, features: Tensor) -> None:
        mean = features.double().mean(0)
        variance = (features.double() - mean).square().mean(0)
        constant = is_constant(mean, variance, len(features))
        self.mean, self.std = mean.float(), torch.where(constant, 1.0, variance.sqrt()).float()

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return (features - self.mean) / self.std


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
        found = []
        for transform, scale in PARTS[method]:
            fitted = transform(block, seed=seed)
            raw = self.transformed(fitted, block)
            scaled = scale(raw)
            self.parts.append((fitted, scaled))
            found.append(scaled(raw))
        self.train = torch.cat(found, dim=1)
        """Features (N, D) of the train split."""

    def transformed(self, transform: Transform, block: SeriesBlock) -> Tensor:
        """Features of all series, as many at a time as memory holds."""
        return torch.cat([transform(part) for part in block.parts(self.device, SERIES_AT_ONCE)])

    def blocks(self, series: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Features (n, D) of a few series after others."""
        for part in SeriesBlock.of(series, self.length).parts(self.device, SERIES_AT_ONCE):
            yield torch.cat([scale(transform(part)) for transform, scale in self.parts], dim=1)

    def __call__(self, series: Sequence[np.ndarray]) -> Tensor:
        """Features (N, D)."""
        return torch.cat(list(self.blocks(series)))


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
    ridge = fit_ridge(kernels.train, wanted, alphas)
    found = {}
    for name, own in series.items():
        if name == "train":
            continue
        logits = torch.cat([ridge(features) for features in kernels.blocks(own)])
        two = subtask == "multiclass" and outputs == 2
        found[name] = torch.cat([-logits, logits], 1) if two else logits
    return ridge, found
