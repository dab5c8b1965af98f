"""Regression metrics under weights, each the mean over the targets for which it is defined.

R2, Pearson and Spearman are NaN for a target that does not vary (so for a single sample); Pearson
and Spearman are 0 where the target varies and the predictions do not. N samples, K targets, R sets
of weights.
"""

from collections.abc import Callable

import numpy as np

from glovita_lib.weighted import (
    Array,
    correlation,
    mean_defined,
    mid_ranks,
    ratio,
    spread,
    weighted_mean,
)


class Regression:
    """Outputs and targets (N, K) in target units, computed with in float64."""

    def __init__(self, targets: Array, scores: Array) -> None:
        self.targets = targets.astype(np.float64)
        self.scores = scores.astype(np.float64)

    def each(self, name: str, weights: Array) -> Array:
        """A metric, by its logged name, of each target: (K, R)."""
        pairs = zip(self.scores.T, self.targets.T, strict=True)
        return np.stack([FUNCTIONS[name](x[:, None], y[:, None], weights) for x, y in pairs])

    def mean(self, name: str, weights: Array) -> Array:
        """Mean of a metric over the targets, (R,)."""
        return mean_defined(self.each(name, weights))


def mse(predictions: Array, targets: Array, weights: Array) -> Array:
    """Mean of (x - y)^2."""
    return weighted_mean((predictions - targets)[:, 0] ** 2, weights)


def mae(predictions: Array, targets: Array, weights: Array) -> Array:
    """Mean of |x - y|."""
    return weighted_mean(np.abs(predictions - targets)[:, 0], weights)


def r2(predictions: Array, targets: Array, weights: Array) -> Array:
    """1 - sum (x - y)^2 / sum (y - mean y)^2, the coefficient of determination."""
    residual = (predictions - targets)[:, 0] ** 2 @ weights
    return 1 - ratio(residual, spread(targets - targets.mean(0), weights))


def pearson(predictions: Array, targets: Array, weights: Array) -> Array:
    """Linear correlation."""
    return correlation(predictions, targets, weights)


def spearman(predictions: Array, targets: Array, weights: Array) -> Array:
    """Linear correlation of the ranks; equal values share their mean rank."""
    ranks = (mid_ranks(values[:, 0], weights) for values in (predictions, targets))
    return correlation(*ranks, weights)


FUNCTIONS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "MSE": mse,
    "MAE": mae,
    "R2": r2,
    "Pearson": pearson,
    "Spearman": spearman,
}
