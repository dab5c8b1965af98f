"""Metrics of a split, their formulas for regression, and their intervals."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from glovita_lib.errors import listed
from glovita_lib.files import as_json
from glovita_lib.metric_names import METRICS, logged_names, metric_name, metrics_of
from glovita_lib.metrics_classification import (
    FORMULAS,
    Array,
    EvaluatedSamples,
    Multiclass,
    Multilabel,
    Resampled,
    Scores,
    Tell,
    formula,
    mean_defined,
    ratio,
    silent,
    weighted_mean,
)

if TYPE_CHECKING:
    from glovita_lib.metrics_segments import Videos  # who has whole samples does without

# --------------------------------------------------------------------------------- bootstrap
#
# Percentile bootstrap of metrics.
#
# Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. A resample is not a list
# of samples but how often each was drawn, so that one pass over the samples serves many resamples.
# N samples, R resamples.

ELEMENTS_AT_ONCE = 4_000_000  # weights held at a time: 32 MB
WHOLE = 15  # samples of a split, see `without_interval`
LEAST = 5  # samples of each class or label of a mean over them, likewise
BEHIND = 40  # samples that such a mean, or the value of one class, rests on


def counts_of(samples: "Samples") -> Array:
    """Samples of each class, of labels those of the rarer kind, of frames videos with the class:
    (K,); 0 where nothing is to be counted: absent classes, labels of one kind, regressions."""
    if isinstance(samples, Multiclass):
        return np.bincount(samples.targets, minlength=len(samples.class_names))
    if isinstance(samples, Multilabel):
        counts = samples.targets.sum(0)
        return np.minimum(counts, len(samples) - counts)
    if isinstance(samples, Regression):
        return np.zeros(0, np.int64)
    return (samples.per_video[2] > 0).sum(0)


def samples_behind(counts: Array) -> float:
    """Samples whose mean would be as skewed as a mean over classes with m_k samples each.

    (sum 1 / m_k)^3 / (sum 1 / m_k^2)^2: N of K classes with N / K each, about m of one class with m
    beside a common one. Samples of a class have the variance v and the third central moment u in
    all classes alike, so the mean over K of their means has v sum(1 / m_k) / K^2 and
    u sum(1 / m_k^2) / K^3; the skewness of a mean of n is u / v^1.5 / sqrt(n).
    """
    inverse = 1 / counts[counts > 0].astype(np.float64)
    return float(inverse.sum() ** 3 / (inverse**2).sum() ** 2)


def without_interval(names: tuple[str, ...], samples: "Samples") -> dict[str, str]:
    """Logged names of the metrics that have too few samples for a bootstrap interval -> the reason.

    Of fewer than 15 samples, and where a class has fewer than 5, or the mean over classes or the
    value of a class rests on fewer than 40, intervals at 95 % cover less than 90 %
    (docs/training.md has what was measured).
    """
    counts, class_names = counts_of(samples), samples.class_names
    over = [name for name in names if samples.subtask in METRICS[name].over_classes]
    if len(samples) < WHOLE:
        unit = "videos" if samples.subtask == "framewise" else "samples"
        lack = f"the split has {len(samples)} of the {WHOLE} {unit} that it takes"
        return dict.fromkeys(logged_names(names, class_names), lack)
    if not over or not (counts > 0).any():
        return {}
    kind = "label" if samples.subtask == "multilabel" else "class"
    noun = {"multilabel": "samples of either kind", "framewise": "videos"}
    what = noun.get(samples.subtask, "samples")

    def lack_of(k: int, least: int) -> str:
        return f'{kind} "{class_names[k]}" has {counts[k]} of the {least} {what} that it takes'

    few = np.flatnonzero((counts > 0) & (counts < LEAST)).tolist()
    reason = lack_of(few[0], LEAST) if few else ""
    if len(few) > 1:
        reason += f", and {len(few) - 1} more have too few"
    behind = samples_behind(counts)
    if not few and behind < BEHIND:
        reason = f"a mean over these classes rests on {behind:.0f} of the {BEHIND} {what} it takes"
    lost: dict[str, str] = {}
    for name in over:
        logged = logged_names([name], class_names)
        if METRICS[name].per_class:
            rare = np.flatnonzero((counts > 0) & (counts < BEHIND)).tolist()
            lost |= {logged[k]: lack_of(k, BEHIND) for k in rare}
        elif reason:
            lost |= dict.fromkeys(logged, reason)
    return lost


def draws(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Weights (N, r) of the resamples, in blocks that fit the memory; their sum r is `resamples`.

    Resample i is the i-th draw of N rows of N from the stream of the seed, whatever the blocks.
    """
    stream = np.random.default_rng(seed)
    block = max(1, ELEMENTS_AT_ONCE // max(n, 1))
    for start in range(0, resamples, block):
        counts = [
            np.bincount(stream.integers(0, n, n), minlength=n).astype(np.float64)
            for _ in range(start, min(start + block, resamples))
        ]
        yield np.ascontiguousarray(np.stack(counts, 1))


def intervals(
    measure: Callable[[Array], dict[str, Array]],
    blocks: Iterator[Array],
    *,
    values: dict[str, float],
    level: float,
) -> dict[str, tuple[float, float]]:
    """Lower and upper end of the percentile interval of each metric.

    Resamples repeat samples, which shifts some metrics (`Metric.shifts`) by more than they spread:
    a positive of average precision is ranked among its copies, and bins of a calibration error hold
    fewer samples. The mean shift is taken off (the bootstrap's estimate of bias; Efron and
    Tibshirani, chapter 10), within 0 and 1, where these metrics lie. Resamples in which a metric is
    undefined (no sample of a class was drawn) are left out of its interval. It is (NaN, NaN) where
    none is left, where fewer than two samples say nothing about the spread, and where it does not
    hold the value itself.

    Args:
        measure: weights (N, r) -> name -> values (r,).
        blocks: weights (N, r) of the resamples.
        values: of all samples, each once.
        level: share of the resamples inside, e.g. 0.95.
    """
    found = [(len(weights), measure(weights)) for weights in blocks]
    tail = 100 * (1 - level) / 2
    ends: dict[str, tuple[float, float]] = {}
    for name in found[0][1] if found else ():
        drawn = np.concatenate([block[name] for _, block in found])
        defined, value = drawn[~np.isnan(drawn)], values[name]
        ends[name] = (math.nan, math.nan)
        if found[0][0] < 2 or not len(defined):
            continue
        low, high = map(float, np.percentile(defined, (tail, 100 - tail)))
        if (metric := METRICS.get(metric_name(name))) is not None and metric.shifts:
            shift = float(defined.mean()) - value
            low, high = max(0.0, low - shift), min(1.0, high - shift)
        rounding = 1e-9 * max(1.0, abs(value))
        if low - rounding <= value <= high + rounding:
            ends[name] = (min(low, value), max(high, value))
    return ends


def intervals_of(
    names: tuple[str, ...],
    samples: "Samples",
    values: dict[str, float],
    resamples: int,
    seed: int,
    tell: Tell = silent,
) -> dict[str, tuple[float, float]]:
    """Intervals of the metrics of samples by logged name.

    Where classes have too few samples there are none, see `without_interval`.
    """
    measure, done = measure_of(names, samples), 0

    def measured(weights: Array) -> dict[str, Array]:
        nonlocal done
        count, before = weights.shape[1], done / resamples
        found = measure(weights, lambda share: tell(before + share * count / resamples))
        done += count
        return found

    blocks = draws(len(samples), resamples, seed)
    ends = intervals(measured, blocks, values=values, level=LEVEL)
    if not ends:
        return ends
    return ends | dict.fromkeys(without_interval(names, samples), (math.nan, math.nan))


# -------------------------------------------------------------------------------- regression
#
# Regression metrics under weights, each the mean over the targets for which it is defined.
#
# R2, Pearson and Spearman are NaN for a target that does not vary (so for a single sample); Pearson
# and Spearman are 0 where the target varies and the predictions do not. N samples, K targets, R
# sets of weights.


class Regression(EvaluatedSamples):
    """Outputs and targets (N, K) in target units, computed with in float64."""

    subtask = "regression"

    def __init__(self, targets: Array, scores: Scores, class_names: tuple[str, ...]) -> None:
        self.targets = targets.astype(np.float64)
        self.scores = scores.values.astype(np.float64)
        self.class_names = class_names

    def each(self, name: str, weights: Array, tell: Tell = silent) -> Array:
        """A metric of each target: (K, R)."""
        function, drawn, found = FORMULAS[name, self.subtask], Drawn(weights), []
        for x, y in zip(self.scores.T, self.targets.T, strict=True):
            found.append(function(x[:, None], y[:, None], drawn))
            tell(len(found) / len(self.class_names))
        return np.stack(found)


RESAMPLES_AT_ONCE = 16  # of ranks: what is computed of them stays in the cache


class Drawn:
    """Weights (N, R) of the resamples of all targets, with what ranks need of them once."""

    def __init__(self, weights: Array) -> None:
        self.weights = weights
        self.n = weights.sum(0)  # (R,)

    @cached_property
    def whole(self) -> Array:
        """The weights as whole numbers (R, N), in which a sum of twice all ranks has room."""
        largest = 2 * self.weights.max(initial=0.0) * self.n.max(initial=0.0)
        kind = np.int32 if largest < 2**31 else np.int64
        return np.ascontiguousarray(self.weights.astype(kind).T)

    @cached_property
    def cubes(self) -> Array:
        """Sum of the cubes of the weights (R,)."""
        return cubes_of(self.whole)


def cubes_of(sizes: Array) -> Array:
    """Sum of the cubes of whole numbers (R, G), (R,)."""
    return np.einsum("rg,rg,rg->r", sizes, sizes, sizes, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Ascending:
    """N values in ascending order, of which G differ."""

    order: Array  # (N,) rows of the values
    group: Array | None  # (N,) which value stands at each place, 0 to G - 1; None: all differ
    starts: Array  # (G,) first place of each value

    @classmethod
    def of(cls, values: Array) -> "Ascending":
        """Of values (N,)."""
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        is_first = np.append(True, ordered[1:] != ordered[:-1])
        group = None if is_first.all() else np.cumsum(is_first) - 1
        return cls(order, group, np.flatnonzero(is_first))

    def doubled_ranks(self, drawn: Array) -> tuple[Array, Array | None]:
        """Twice the rank less 1 (R, N) of the value at each place in resamples whose weights there
        are `drawn` (R, N), and the sum of the cubes of how often each value is there (R,); None
        where all differ, of which it is that of the weights.

        Equal values share their mean rank: with c up to theirs and s of them, c - s + (s + 1) / 2.
        """
        sizes = drawn if self.group is None else np.add.reduceat(drawn, self.starts, axis=1)
        ranks = np.cumsum(sizes, 1, dtype=sizes.dtype)
        ranks += ranks
        ranks -= sizes
        if self.group is None:
            return ranks, None
        return np.take(ranks, self.group, 1), cubes_of(sizes)


def rank_correlation(x: Array, y: Array, drawn: Drawn) -> Array:
    """Spearman correlation (R,) of predictions x and targets y, both (N,): that of their ranks,
    whole and half numbers, of which sums are exact.

    t equal values have the ranks of t that differ less (t^3 - t) / 12 of their squared deviations
    (Kendall, Rank correlation methods, 1948), so n values keep (n^3 - sum t^3) / 12; a value is
    there as often as it is drawn.
    """
    one, other = Ascending.of(x), Ascending.of(y)
    place = np.empty(len(x), np.int64)
    place[other.order] = np.arange(len(x))
    place = place[one.order]  # in the order of y, of what stands at each place in that of x
    xx, xy, yy = (np.empty(len(drawn.n)) for _ in range(3))
    for start in range(0, len(drawn.n), RESAMPLES_AT_ONCE):
        part = slice(start, start + RESAMPLES_AT_ONCE)
        product = np.take(drawn.whole[part], one.order, 1)
        of_x, cubes_x = one.doubled_ranks(product)
        of_y, cubes_y = other.doubled_ranks(np.take(drawn.whole[part], other.order, 1))
        product *= of_x
        of_y = np.take(of_y, place, 1)
        xy[part] = np.einsum("rn,rn->r", product, of_y, dtype=np.float64)
        xx[part] = drawn.cubes[part] if cubes_x is None else cubes_x
        yy[part] = drawn.cubes[part] if cubes_y is None else cubes_y
    cubed = drawn.n**3
    return quotient_of_deviations((cubed - xx) / 12, (xy - cubed) / 4, (cubed - yy) / 12)


def correlation(x: Array, y: Array, weights: Array) -> Array:
    """Pearson correlation (R,) of predictions x and targets y, both (N, 1).

    0 where the predictions do not vary, NaN where the targets do not.
    """
    return quotient_of_deviations(*codeviations(x, y, weights))


def quotient_of_deviations(xx: Array, xy: Array, yy: Array) -> Array:
    """Correlation (R,) of predictions x and targets y from their sums of products."""
    r = np.divide(xy, np.sqrt(xx) * np.sqrt(yy), out=np.zeros_like(xy), where=(xx > 0) & (yy > 0))
    return np.where(yy > 0, np.clip(r, -1.0, 1.0), np.nan)


def squared_deviations(values: Array, weights: Array) -> Array:
    """Sum of squared deviations from the mean (R,) of values (N, 1); exactly 0 where all
    drawn values are equal, which rounding would hide."""
    return codeviations(values, values, weights)[0]


def codeviations(x: Array, y: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Sums of the products xx, xy, yy of deviations from the mean of each resample, (R,) each, of x
    and y, both (N, 1).

    By sums of products, less those of the means, which is fast; resamples in which little is left
    of such a difference (those without a far outlier) are computed from the deviations themselves.
    """
    pair = x[:, 0], y[:, 0]
    x, y = (values - np.median(values) for values in pair)
    n = weights.sum(0)
    sum_x, sum_y, squares_x, squares_y = (v @ weights for v in (x, y, x**2, y**2))
    xx, yy = squares_x - sum_x**2 / n, squares_y - sum_y**2 / n
    xy = (x * y) @ weights - sum_x * sum_y / n
    for r in np.flatnonzero((xx < 1e-6 * squares_x) | (yy < 1e-6 * squares_y)):
        rows = np.flatnonzero(weights[:, r])
        counts = weights[rows, r]
        dx, dy = (deviations(values[rows], counts) for values in pair)
        xx[r], xy[r], yy[r] = counts @ dx**2, counts @ (dx * dy), counts @ dy**2
    return xx, xy, yy


def deviations(values: Array, counts: Array) -> Array:
    """Deviations from the mean of values (N,) that occur so often; exactly 0 of equal ones."""
    values = values - values[0]
    return values - (counts @ values) / counts.sum()


@formula("mse", "regression")
def mse(predictions: Array, targets: Array, drawn: Drawn) -> Array:
    """Mean of (x - y)^2."""
    return weighted_mean((predictions - targets)[:, 0] ** 2, drawn.weights)


@formula("mae", "regression")
def mae(predictions: Array, targets: Array, drawn: Drawn) -> Array:
    """Mean of |x - y|."""
    return weighted_mean(np.abs(predictions - targets)[:, 0], drawn.weights)


@formula("r2", "regression")
def r2(predictions: Array, targets: Array, drawn: Drawn) -> Array:
    """1 - sum (x - y)^2 / sum (y - mean y)^2, the coefficient of determination."""
    residual = (predictions - targets)[:, 0] ** 2 @ drawn.weights
    return 1 - ratio(residual, squared_deviations(targets, drawn.weights))


@formula("pearson", "regression")
def pearson(predictions: Array, targets: Array, drawn: Drawn) -> Array:
    """Linear correlation."""
    return correlation(predictions, targets, drawn.weights)


@formula("spearman", "regression")
def spearman(predictions: Array, targets: Array, drawn: Drawn) -> Array:
    """Linear correlation of the ranks; equal values share their mean rank."""
    return rank_correlation(predictions[:, 0], targets[:, 0], drawn)


# ------------------------------------------------------------------------ metrics of a split
#
# Which metrics exist and what they are called: metric_names. Formulas and what happens to absent
# classes: metrics_classification, and above. An empty split, and scores that are not finite, make
# every metric NaN (null in JSON). N samples, K classes or targets, R sets of weights.

LEVEL = 0.95  # of the intervals
LARGEST_CONFUSION = 200  # classes; a larger matrix is left out of the report
Samples: TypeAlias = "Multiclass | Multilabel | Regression | Videos"
Measure = Callable[..., dict[str, Array]]  # of weights (N, R), and a Tell


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
    tell: Tell = silent,
) -> dict[str, Any]:
    """Everything about the predictions of a split, ready for JSON, see `report_of`; arguments as of
    `compute`."""
    samples = samples_of(subtask, targets, scores, class_names)
    return report_of(names, samples, bootstrap=bootstrap, seed=seed, tell=tell)


def report_of(
    names: tuple[str, ...], samples: Samples, *, bootstrap: int, seed: int, tell: Tell = silent
) -> dict[str, Any]:
    """Everything about the predictions of samples, ready for JSON.

    Args:
        bootstrap: resamples behind the intervals; 0 leaves them out.
        seed: of the resamples.
        tell: is told which share of the resamples is done.

    Returns:
        n: samples. class_names: in the order of the outputs. metrics: name -> value. ci95: name ->
        [low, high] of the percentile bootstrap. no_ci95: name -> why there is none, of few samples.
        per_class: class or target -> name -> value; n counts its samples, predicted how often it
        was predicted. confusion: K rows of true and columns of predicted classes; null unless
        samples have one of at most 200 classes. Of
        videos both are about their frames, and the bootstrap draws videos. Undefined numbers are
        null.
    """
    class_names, metrics = samples.class_names, values_of(names, samples)
    result: dict[str, Any] = {"n": len(samples), "class_names": class_names}
    result |= {"metrics": metrics, "ci95": {}}
    result |= {"no_ci95": {}, "per_class": {}, "confusion": None}
    if samples.is_finite:
        ends = intervals_of(names, samples, metrics, bootstrap, seed, tell)
        result["ci95"] = {name: ends[name] for name in metrics if name in ends}
        result["no_ci95"] = without_interval(names, samples) if ends else {}
        result["per_class"] = per_class(samples, class_names)
        few = len(class_names) <= LARGEST_CONFUSION
        if few and not isinstance(samples, Multilabel | Regression):
            targets, predictions = samples.pairs
            result["confusion"] = confusion(targets, predictions, len(class_names))
    return as_json(result)


def undefined(
    names: tuple[str, ...], *, subtask: str, targets: Array, class_names: tuple[str, ...]
) -> list[str]:
    """Logged names of the metrics that no prediction defines on some targets, as the AUROC of one
    class: arguments as of `compute`, whose values for random scores tell."""
    rows = targets.shape if subtask == "framewise" else targets.shape[:1]
    scores = np.random.default_rng(0).random((*rows, len(class_names)))
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
    """Targets and scores as the kind of samples that the subtask measures; of frames those of
    clips (N, T) and (N, T, K)."""
    if subtask == "framewise":
        from glovita_lib.metrics_segments import Videos

        return Videos(list(targets), list(map(Scores, scores.values)), class_names)
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

    def measure(weights: Array, tell: Tell = silent) -> dict[str, Array]:
        drawn = None if isinstance(samples, Regression) else Resampled(samples, weights)
        values: dict[str, Array] = {}
        for place, name in enumerate(names):

            def inner(share: float, place: int = place) -> None:
                tell((place + share) / len(names))

            if isinstance(samples, Regression):
                each = samples.each(name, weights, inner)  # (K, R)
                found = each if METRICS[name].per_class else mean_defined(each)
            else:
                assert drawn is not None
                drawn.tell = inner
                found = FORMULAS[name, samples.subtask](drawn)
            inner(1.0)
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
        if isinstance(samples, Multiclass | Multilabel):
            columns["auroc"], columns["ap"] = drawn.ranking
    return {
        name: {key: values[k, 0].item() for key, values in columns.items()}
        for k, name in enumerate(class_names)
    }


def confusion(targets: Array, predictions: Array, classes: int) -> Array:
    """Counts (K, K): rows are true classes, columns predicted ones."""
    pairs = targets.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
