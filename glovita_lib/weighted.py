"""Sums, ranks and ranking metrics of weighted samples, for many sets of weights at once.

A weight is how often a sample was drawn: all ones give the metric itself, the counts of a bootstrap
resample the metric of that resample. Weights are floats that hold whole numbers, so sums of them
are exact. N samples, G groups, K classes, R sets of weights.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def sum_by(groups: Array, count: int, weights: Array, values: Array | None = None) -> Array:
    """Sum of weights (N, R), times values (N,) if given, over the samples of each group: (G, R).

    Args:
        groups: (N,) group of each sample, 0 to count - 1.
        count: G.
    """
    n, resamples = weights.shape
    if resamples == 1:
        scaled = weights[:, 0] if values is None else weights[:, 0] * values
        sums = np.bincount(groups, scaled, minlength=count)[:, None]
        return sums.astype(np.float64)  # of nothing they are integers
    from scipy.sparse import csc_array

    data = np.ones(n) if values is None else values.astype(np.float64)
    members = csc_array((data, groups, np.arange(n + 1)), shape=(count, n))  # one 1 a column
    return members @ weights


def ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient, NaN where the denominator is 0."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def mean_defined(values: Array) -> Array:
    """Mean over axis 0 of what is not NaN: (K, R) -> (R,); NaN where nothing is defined."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(0), defined.sum(0))


def weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of values (N,) or (N, K) under weights (N, R): (R,) or (K, R)."""
    return (values.T.astype(np.float64) @ weights) / weights.sum(0)


@dataclass(frozen=True, slots=True)
class Ladder:
    """The distinct scores of a class's positives in ascending order, M of them: its thresholds.

    AUROC and average precision need to know of every sample only where it stands between them.
    """

    rung: Array  # (N,) 2j + 1: at threshold j; 2j: between the thresholds j - 1 and j
    positives: Array  # (P,) samples of the class
    count: int  # M

    @classmethod
    def of(cls, scores: Array, positive: Array) -> "Ladder":
        """Of scores (N,) and membership (N,)."""
        positives = np.flatnonzero(positive)
        thresholds = np.unique(scores[positives])
        left = np.searchsorted(thresholds, scores, "left")
        nearest = np.append(thresholds, np.inf)[left].astype(scores.dtype)
        at = nearest == scores
        return cls((2 * left + at).astype(np.int32), positives, len(thresholds))


def auroc_and_ap(ladder: Ladder, weights: Array) -> tuple[Array, Array]:
    """AUROC and average precision (R,) of one class against the rest, under weights (N, R).

    AUROC = P(score of a positive > score of a negative) + P(equal) / 2 (Hanley and McNeil, 1982).
    AP = sum over thresholds t of (recall_t - recall_{t-1}) precision_t, where equal scores share a
    threshold, without interpolation. Both NaN unless there are positives and negatives.
    """
    steps = sum_by(ladder.rung, 2 * ladder.count + 1, weights)  # (2M + 1, R)
    positives = ladder.positives
    gained = sum_by(ladder.rung[positives] // 2, ladder.count, weights[positives])  # (M, R)
    all_up_to = np.cumsum(steps, 0)
    total, all_below, all_equal = all_up_to[-1], all_up_to[0:-1:2], steps[1::2]
    positives_up_to = np.cumsum(gained, 0)
    n_positive = gained.sum(0)
    n_negative = total - n_positive
    negatives_below = all_below - (positives_up_to - gained)
    wins = (gained * (negatives_below + (all_equal - gained) / 2)).sum(0)
    auroc = ratio(wins, n_positive * n_negative)
    found = n_positive - positives_up_to + gained  # positives at or above each threshold
    precision = np.divide(found, total - all_below, out=np.zeros_like(found), where=found > 0)
    ap = ratio((gained * precision).sum(0), n_positive)
    return auroc, np.where(n_negative > 0, ap, np.nan)


def mid_ranks(values: Array, weights: Array) -> Array:
    """Rank (N, R) of each value (N,) in each resample; equal values share their mean rank."""
    distinct, groups = np.unique(values, return_inverse=True)
    sizes = sum_by(groups, len(distinct), weights)  # (G, R)
    return (np.cumsum(sizes, 0) - sizes / 2 + 0.5)[groups]


def correlation(x: Array, y: Array, weights: Array) -> Array:
    """Pearson correlation (R,) of predictions x and targets y, both (N, 1) or (N, R).

    0 where the predictions do not vary, NaN where the targets do not.
    """
    x, y = x - x.mean(0), y - y.mean(0)  # less cancellation below
    xx, yy = spread(x, weights), spread(y, weights)
    xy = dot(x * y, weights) - dot(x, weights) * dot(y, weights) / weights.sum(0)
    r = np.divide(xy, np.sqrt(xx * yy), out=np.zeros_like(xy), where=(xx > 0) & (yy > 0))
    return np.where(yy > 0, np.clip(r, -1.0, 1.0), np.nan)


def spread(values: Array, weights: Array) -> Array:
    """Sum of squared deviations from the mean (R,) of values (N, 1) or (N, R); exactly 0 where all
    drawn values are equal, which rounding would hide."""
    squares = dot(values**2, weights)
    deviations = squares - dot(values, weights) ** 2 / weights.sum(0)
    return np.where(deviations > 1e-13 * squares, deviations, 0.0)


def dot(values: Array, weights: Array) -> Array:
    """Weighted sum (R,) of values (N, 1) or (N, R)."""
    if values.shape[1] == 1:
        return values[:, 0] @ weights
    return np.einsum("nr,nr->r", values, weights)
