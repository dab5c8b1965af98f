"""Metrics of a split, their formulas for regression, and their intervals."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from glovita_lib.errors import listed
from glovita_lib.files import as_json
from glovita_lib.metric_names import METRICS, logged_names, metrics_of
from glovita_lib.metrics_classification import (
    FORMULAS,
    Array,
    Multiclass,
    Multilabel,
    Resampled,
    Scored,
    Scores,
    correlation,
    formula,
    mean_defined,
    mid_ranks,
    ratio,
    squared_deviations,
    weighted_mean,
)
from glovita_lib.metrics_segments import Videos

# --------------------------------------------------------------------------------- bootstrap
#
# Percentile bootstrap of metrics.
#
# Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. A resample is not a list
# of samples but how often each was drawn, so that one pass over the samples serves many resamples.
# N samples, R resamples.

ELEMENTS_AT_ONCE = 4_000_000  # weights held at a time: 32 MB


def draws(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Weights (N, r) of the resamples, in blocks that fit the memory; their sum r is `resamples`.

    Resample i is the i-th draw of n row numbers from the stream of the seed, whatever the blocks.
    """
    stream = np.random.default_rng(seed)
    block = max(1, ELEMENTS_AT_ONCE // max(n, 1))
    for start in range(0, resamples, block):
        rows = range(start, min(start + block, resamples))
        counts = [np.bincount(stream.integers(0, n, n), minlength=n) for _ in rows]
        yield np.ascontiguousarray(np.stack(counts, 1), np.float64)


def intervals(
    measure: Callable[[Array], dict[str, Array]],
    n: int,
    *,
    resamples: int,
    seed: int,
    level: float,
) -> dict[str, tuple[float, float]]:
    """Lower and upper end of the percentile interval of each metric.

    Resamples in which a metric is undefined (no sample of a class was drawn) are left out of its
    interval; it is (NaN, NaN) where none is left, and where fewer than two samples say nothing
    about the spread.

    Args:
        measure: weights (N, r) -> name -> values (r,).
        n: N.
        level: share of the resamples inside, e.g. 0.95.
    """
    blocks = [measure(weights) for weights in draws(n, resamples, seed)]
    tail = 100 * (1 - level) / 2
    found: dict[str, tuple[float, float]] = {}
    for name in blocks[0] if blocks else ():
        values = np.concatenate([block[name] for block in blocks])
        defined = values[~np.isnan(values)]
        if n < 2 or not len(defined):
            found[name] = (float("nan"), float("nan"))
            continue
        low, high = np.percentile(defined, (tail, 100 - tail))
        found[name] = (float(low), float(high))
    return found


# -------------------------------------------------------------------------------- regression
#
# Regression metrics under weights, each the mean over the targets for which it is defined.
#
# R2, Pearson and Spearman are NaN for a target that does not vary (so for a single sample); Pearson
# and Spearman are 0 where the target varies and the predictions do not. N samples, K targets, R
# sets of weights.


class Regression(Scored):
    """Outputs and targets (N, K) in target units, computed with in float64."""

    subtask = "regression"

    def __init__(self, targets: Array, scores: Scores, class_names: tuple[str, ...]) -> None:
        self.targets = targets.astype(np.float64)
        self.scores = scores.values.astype(np.float64)
        self.class_names = class_names

    def each(self, name: str, weights: Array) -> Array:
        """A metric of each target: (K, R)."""
        function = FORMULAS[name, self.subtask]
        pairs = zip(self.scores.T, self.targets.T, strict=True)
        return np.stack([function(x[:, None], y[:, None], weights) for x, y in pairs])


@formula("mse", "regression")
def mse(predictions: Array, targets: Array, weights: Array) -> Array:
    """Mean of (x - y)^2."""
    return weighted_mean((predictions - targets)[:, 0] ** 2, weights)


@formula("mae", "regression")
def mae(predictions: Array, targets: Array, weights: Array) -> Array:
    """Mean of |x - y|."""
    return weighted_mean(np.abs(predictions - targets)[:, 0], weights)


@formula("r2", "regression")
def r2(predictions: Array, targets: Array, weights: Array) -> Array:
    """1 - sum (x - y)^2 / sum (y - mean y)^2, the coefficient of determination."""
    residual = (predictions - targets)[:, 0] ** 2 @ weights
    return 1 - ratio(residual, squared_deviations(targets - targets.mean(0), weights))


@formula("pearson", "regression")
def pearson(predictions: Array, targets: Array, weights: Array) -> Array:
    """Linear correlation."""
    return correlation(predictions, targets, weights)


@formula("spearman", "regression")
def spearman(predictions: Array, targets: Array, weights: Array) -> Array:
    """Linear correlation of the ranks; equal values share their mean rank."""
    x, y = (mid_ranks(values[:, 0], weights) for values in (predictions, targets))
    return correlation(x, y, weights)


# ------------------------------------------------------------------------ metrics of a split
#
# Which metrics exist and what they are called: metric_names. Formulas and what happens to absent
# classes: metrics_classification, and above. An empty split, and scores that are not finite, make
# every metric NaN (null in JSON). N samples, K classes or targets, R sets of weights.

LEVEL = 0.95  # of the intervals
LARGEST_CONFUSION = 200  # classes; a larger matrix is left out of the report
Samples = Multiclass | Multilabel | Regression | Videos
Measure = Callable[[Array], dict[str, Array]]


def compute(
    names: tuple[str, ...],
    *,
    subtask: str,
    targets: Array,
    scores: Scores,
    class_names: tuple[str, ...],
) -> dict[str, float]:
    """Metrics by name, a per-class one by <name>_<class>, in the order of `names`; NaN where
    undefined.

    Args:
        names: names as in task.metrics, valid for the subtask.
        subtask: multiclass, multilabel or regression.
        targets: (N,) class indices; (N, K) 0 or 1; (N, K) values.
        scores: (N, K).
        class_names: K names.
    """
    return values_of(names, samples_of(subtask, targets, scores, class_names))


def values_of(names: tuple[str, ...], samples: Samples) -> dict[str, float]:
    """Metrics of samples by name, see `compute`."""
    logged = logged_names(names, samples.class_names)
    if not samples.is_finite:
        return dict.fromkeys(logged, math.nan)
    values = measure_of(names, samples)(np.ones((len(samples), 1)))
    return {name: float(values[name][0]) for name in logged}


def metrics_report(
    names: tuple[str, ...],
    *,
    subtask: str,
    targets: Array,
    scores: Scores,
    class_names: tuple[str, ...],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Everything about the predictions of a split, ready for JSON, see `report_of`; arguments as of
    `compute`."""
    samples = samples_of(subtask, targets, scores, class_names)
    return report_of(names, samples, bootstrap=bootstrap, seed=seed)


def report_of(
    names: tuple[str, ...], samples: Samples, *, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Everything about the predictions of samples, ready for JSON.

    Args:
        bootstrap: resamples behind the intervals; 0 leaves them out.
        seed: of the resamples.

    Returns:
        n: samples. class_names: in the order of the outputs. metrics: name -> value. ci95: name ->
        [low, high] of the percentile bootstrap. per_class: class or target -> name -> value; n
        counts its samples, predicted how often it was predicted. confusion: K rows of true and
        columns of predicted classes; null unless samples have one of at most 200 classes. Of
        videos both are about their frames, and the bootstrap draws videos. Undefined numbers are
        null.
    """
    class_names, metrics = samples.class_names, values_of(names, samples)
    result: dict[str, Any] = {"n": len(samples), "class_names": class_names}
    result |= {"metrics": metrics, "ci95": {}}
    result |= {"per_class": {}, "confusion": None}
    if samples.is_finite:
        measure = measure_of(names, samples)
        ends = intervals(measure, len(samples), resamples=bootstrap, seed=seed, level=LEVEL)
        result["ci95"] = {name: ends[name] for name in metrics if name in ends}
        result["per_class"] = per_class(samples, class_names)
        if isinstance(samples, Multiclass | Videos) and len(class_names) <= LARGEST_CONFUSION:
            result["confusion"] = confusion(*samples.pairs, len(class_names))
    return as_json(result)


def undefined(
    names: tuple[str, ...], *, subtask: str, targets: Array, class_names: tuple[str, ...]
) -> list[str]:
    """Logged names of the metrics that no prediction defines on some targets, as the AUROC of one
    class: arguments as of `compute`, whose values for random scores tell."""
    scores = np.random.default_rng(0).random((len(targets), len(class_names)))
    if subtask == "multiclass":
        scores /= scores.sum(1, keepdims=True)
    values = compute(
        names, subtask=subtask, targets=targets, scores=Scores(scores), class_names=class_names
    )
    return [name for name, value in values.items() if math.isnan(value)]


def undefined_line(names: list[str]) -> str:
    """The line that says which logged names no prediction defines on val."""
    return f"the labels of val define no {listed(names)}, whatever the model predicts"


def samples_of(
    subtask: str, targets: Array, scores: Scores, class_names: tuple[str, ...]
) -> Samples:
    """Targets and scores as the kind of samples that the subtask measures."""
    shape = scores.values.shape
    assert shape == (len(targets), len(class_names)), (shape, targets.shape)
    if subtask == "multiclass":
        assert targets.ndim == 1
        return Multiclass(targets, scores, class_names)
    assert targets.shape == shape
    if subtask == "multilabel":
        return Multilabel(targets, scores, class_names)
    return Regression(targets, scores, class_names)


def measure_of(names: tuple[str, ...], samples: Samples) -> Measure:
    """Function from weights (N, R) to the values (R,) of each metric by logged name."""

    def measure(weights: Array) -> dict[str, Array]:
        drawn = None if isinstance(samples, Regression) else Resampled(samples, weights)
        values: dict[str, Array] = {}
        for name in names:
            if isinstance(samples, Regression):
                each = samples.each(name, weights)  # (K, R)
                found = each if METRICS[name].per_class else mean_defined(each)
            else:
                found = FORMULAS[name, samples.subtask](drawn)
            rows = found if METRICS[name].per_class else [found]
            values |= zip(logged_names([name], samples.class_names), rows, strict=True)
        return values

    return measure


def per_class(samples: Samples, class_names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Values of each class or target by name."""
    ones = np.ones((len(samples), 1))
    columns: dict[str, Array] = {}  # name -> (K, 1)
    if isinstance(samples, Regression):
        columns = {name: samples.each(name, ones) for name in metrics_of("regression")}
    else:
        drawn = Resampled(samples, ones)
        counts = drawn.counts
        columns = {"n": counts.actual.astype(int), "predicted": counts.predicted.astype(int)}
        columns["precision"] = counts.of_occurring(counts.predicted)
        columns["recall"] = counts.of_occurring(counts.actual)
        columns["f1"] = counts.f1
        if not isinstance(samples, Videos):
            columns["auroc"], columns["ap"] = drawn.ranking
    return {
        name: {key: values[k, 0].item() for key, values in columns.items()}
        for k, name in enumerate(class_names)
    }


def confusion(targets: Array, predictions: Array, classes: int) -> Array:
    """Counts (K, K): rows are true classes, columns predicted ones."""
    pairs = targets.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
