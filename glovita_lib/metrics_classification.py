"""Classification metrics, for many sets of weights at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np

# -------------------------------------------------------------------------- weighted samples
#
# A weight is how often a sample was drawn: all ones give the metric itself, the counts of a
# bootstrap resample the metric of that resample. Weights are floats that hold whole numbers, so
# sums of them are exact. N samples, G groups, K classes, R sets of weights.

Array = np.ndarray
Tell = Callable[[float], None]
"""Is told which share of a long computation is done."""


def silent(share: float) -> None:
    """Nobody is told."""


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


ROWS_AT_ONCE = 4096  # bounds the memory of float64 copies of scores
THRESHOLD = 0.5  # probability from which on a label is predicted
NEAR = 2.0**-10  # of a probability to 1, where it is known by those of the other classes


@dataclass(frozen=True, slots=True)
class Scores:
    """What is predicted of samples, in float64. Probabilities near 1 are equal long before the
    logits behind them are, so what ranks samples goes by log-odds; equal logits, or probabilities
    where these alone are known, have equal ones."""

    values: Array  # (N, K) probabilities, or outputs of a regression in target units
    log_odds: Array | None = None  # (N, K) log p / (1 - p); None: samples rank by the values
    given: Array | None = None  # (N, K) float32 logits that a network gave

    @property
    def ranked(self) -> Array:
        """What samples are ranked by (N, K)."""
        return self.values if self.log_odds is None else self.log_odds

    def predicted(self, subtask: str) -> Array:
        """What is predicted, everywhere by this rule: the class (N,) of the largest log-odds, the
        first of equal ones; of multilabel (N, K) bool, labels of log-odds of at least 0. Where
        probabilities alone are known it is the largest, and 0.5. Of a regression the values."""
        if subtask == "regression":
            return self.values
        if subtask == "multilabel":
            return self.ranked >= (THRESHOLD if self.log_odds is None else 0.0)
        return self.ranked.argmax(1)

    def of(self, rows: Array | slice) -> "Scores":
        """Those of some samples."""
        parts = (self.log_odds, self.given)
        return Scores(self.values[rows], *(None if part is None else part[rows] for part in parts))

    @classmethod
    def of_logits(cls, logits: Array, subtask: str) -> "Scores":
        """Of what a network gives, (N, K); outputs of a regression stay as they are."""
        if subtask == "regression":
            return cls(logits.astype(np.float64))
        given = logits if logits.dtype == np.float32 else None
        if subtask == "multilabel":
            odds = logits.astype(np.float64)
            return cls(np.exp(-np.logaddexp(0.0, -odds)), odds, given)
        values, log_odds = np.empty(logits.shape), np.empty(logits.shape)
        for part in blocks_of(len(logits)):
            doubles = np.ascontiguousarray(logits[part], np.float64)
            values[part], log_odds[part] = softmax_and_log_odds(doubles)
        return cls(values, log_odds, given)

    @classmethod
    def of_probabilities(cls, values: Array, subtask: str) -> "Scores":
        """Of probabilities (N, K); outputs of a regression stay as they are. Equal ones stay equal;
        near 1 the small ones of the other classes say more than the large one."""
        values = np.ascontiguousarray(values, np.float64)  # the order of sums goes by the layout
        if subtask == "regression":
            return cls(values)
        others = np.maximum(1 - values, 0.0)
        if subtask == "multiclass" and values.size:
            best = values.argmax(1)
            rows = np.flatnonzero(values.max(1) > 1 - NEAR)
            rest = np.sort(values[rows], 1)[:, :-1].sum(1)  # in whatever order the classes stand
            others[rows, best[rows]] = np.minimum(rest, NEAR)
        with np.errstate(divide="ignore"):
            return cls(values, np.log(values) - np.log(others))

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Those of several sets of samples as of one."""
        if len(parts) == 1:
            return parts[0]
        odds = [part.log_odds for part in parts if part.log_odds is not None]
        values = np.concatenate([part.values for part in parts])
        return cls(values, np.concatenate(odds) if odds else None)

    @classmethod
    def mean(cls, members: Sequence["Scores"]) -> "Scores":
        """Mean probabilities, or outputs, of several models, and the log-odds of those."""
        values = np.mean([member.values for member in members], axis=0)
        found = [member.log_odds for member in members if member.log_odds is not None]
        if not found:
            return cls(values)
        log_odds = np.empty(values.shape)
        for part in blocks_of(len(values)):
            exact = log_odds_of_mean([x[part] for x in found])
            with np.errstate(divide="ignore", invalid="ignore"):  # means that are equal rank equal
                told = np.log(values[part]) - np.log(np.maximum(1 - values[part], 0.0))
                near = np.abs(told - exact) <= 4e-13 * np.abs(exact)
            log_odds[part] = np.where(near, told, exact)
        return cls(values, log_odds)


def blocks_of(count: int) -> Iterator[slice]:
    """Rows of so many, in blocks."""
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, count, ROWS_AT_ONCE))


def log_odds_of_mean(members: Sequence[Array]) -> Array:
    """Log-odds (N, K) of the mean probability of M members of log-odds (N, K) each.

    log sum p - log sum (1 - p), with log p = -log(1 + exp(-x)) and log(1 - p) = -log(1 + exp(x)).
    Near 0 it is 2 artanh(d / M) with d = sum p - sum (1 - p) = sum s (1 - 2 q), s the sign of x and
    q the smaller of p and 1 - p: where sure members disagree the signs cancel and the q are left.
    """
    parts = ([-np.logaddexp(0.0, sign * x) for x in members] for sign in (-1, 1))
    true, false = map(np.logaddexp.reduce, parts)
    signs = [np.sign(x) for x in members]
    smaller = [np.exp(-np.logaddexp(0.0, np.abs(x))) for x in members]
    left = sum(s * q for s, q in zip(signs, smaller, strict=True))
    excess = sum(signs) - 2 * left
    excess[np.abs(excess) <= 8 * np.finfo(np.float64).eps * sum(smaller)] = 0.0  # what rounding is
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.abs(excess) < len(members) / 2
        return np.where(near, 2 * np.arctanh(excess / len(members)), true - false)


def softmax_and_log_odds(logits: Array) -> tuple[Array, Array]:
    """Probabilities and their log-odds of logits (N, K), both (N, K) float64: those of the best
    class by the others alone, so that neither rounding nor the range of exp ends them. Equal logits
    have equal ones, in whatever order those of the other classes stand."""
    ordered = np.sort(logits, 1)  # sums do not depend on the order of the classes
    with np.errstate(divide="ignore", invalid="ignore"):  # classes ruled out: -inf
        largest = ordered[:, -1:]
        odds = np.exp(logits - largest)
        total = np.exp(ordered - largest).sum(1, keepdims=True)
        log_odds = logits - largest - np.log(total - odds)
        if logits.shape[1] > 1:
            second = ordered[:, -2:-1]
            rest = np.log(np.exp(ordered[:, :-1] - second).sum(1, keepdims=True))
            rest[np.isneginf(second)] = 0.0
            rows = np.flatnonzero(largest > second)
            best = logits[rows].argmax(1)
            log_odds[rows, best] = -np.inf
            of_best = (largest - second - rest)[rows, 0]
            log_odds[rows, best] = np.maximum(of_best, log_odds[rows].max(1))  # whatever rounding
        odds /= total
    return odds, log_odds


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The distinct scores of a class's positives in ascending order, M of them: its thresholds.

    AUROC and average precision need to know of every sample only where it stands between them.
    """

    bin: Array  # (N,) 2j + 1: at threshold j; 2j: between the thresholds j - 1 and j
    positives: Array  # (P,) samples of the class
    count: int  # M

    @classmethod
    def of(cls, scores: Array, positive: Array) -> "Thresholds":
        """Of scores (N,) and membership (N,)."""
        positives = np.flatnonzero(positive)
        thresholds = np.unique(scores[positives])
        left = np.searchsorted(thresholds, scores, "left")
        at = np.append(thresholds, np.nan)[left] == scores  # NaN: above all of them
        return cls((2 * left + at).astype(np.int32), positives, len(thresholds))


def auroc_and_ap(thresholds: Thresholds, weights: Array) -> tuple[Array, Array]:
    """AUROC and average precision (R,) of one class against the rest, under weights (N, R).

    AUROC = P(score of a positive > score of a negative) + P(equal) / 2 (Hanley and McNeil, 1982).
    AP = sum over thresholds t of (recall_t - recall_{t-1}) precision_t, where equal scores share a
    threshold, without interpolation. Both NaN unless there are positives and negatives.
    """
    steps = sum_by(thresholds.bin, 2 * thresholds.count + 1, weights)  # (2M + 1, R)
    positives = thresholds.positives
    gained = sum_by(thresholds.bin[positives] // 2, thresholds.count, weights[positives])  # (M, R)
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


# ------------------------------------------------------------------------------- the metrics
#
# tp, predicted and actual are the counts of a class: hits, predictions, samples. A metric that is a
# mean over classes leaves out the classes for which it is undefined, and is NaN where none is left:
#
# - f1, precision, recall: classes that occur neither in the targets nor in the predictions are left
#   out; otherwise 0 / 0 counts as 0 (as in scikit-learn). A class that is only ever predicted
#   lowers all three.
# - balanced_acc: multiclass, recall over the classes that occur in the targets; multilabel,
#   (sensitivity + specificity) / 2 over the labels that have positives and negatives.
# - auroc, ap: one against the rest, classes that have positives and negatives.
# - mcc, kappa, quadratic_kappa: NaN where the targets are all of one class (multilabel: such a
#   label is left out); 0 where they vary and the predictions do not.
#
# What is predicted: `Scores.predicted`. N samples, K classes, R sets of weights.

BINS = 15  # of ECE, as in Guo et al.
CLASSES_AT_ONCE = 64  # bounds the memory of multilabel counts

Formula = Callable[..., Array]
FORMULAS: dict[tuple[str, str], Formula] = {}
"""Metric and subtask, as in the table metric_names.METRICS -> its formula.

Of classes: `Resampled` -> (R,), or (K, R) where the metric is per class. Of a regression:
predictions (N, 1), targets (N, 1) and `metrics.Drawn` of a target -> (R,).
"""


def formula(metric: str, *subtasks: str) -> Callable[[Formula], Formula]:
    """Decorator: the function computes the metric for the subtasks."""

    def register(function: Formula) -> Formula:
        for subtask in subtasks:
            assert (metric, subtask) not in FORMULAS, (metric, subtask)
            FORMULAS[metric, subtask] = function
        return function

    return register


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How often each class was hit, predicted and there."""

    tp: Array  # (K, R)
    predicted: Array  # (K, R)
    actual: Array  # (K, R)
    n: Array  # (R,) samples

    @property
    def f1(self) -> Array:
        """2 tp / (predicted + actual), (K, R)."""
        return ratio(2 * self.tp, self.predicted + self.actual)

    def of_occurring(self, denominator: Array) -> Array:
        """tp / denominator (K, R): 0 / 0 is 0, but NaN where the class does not occur at all."""
        values = np.divide(self.tp, denominator, out=np.zeros_like(self.tp), where=denominator > 0)
        return np.where(self.predicted + self.actual > 0, values, np.nan)


class EvaluatedSamples:
    """Samples with targets and scores (N, ...)."""

    targets: Array
    scores: Array

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def is_finite(self) -> bool:
        """Whether there are scores and all of them are finite."""
        return all_finite(self.scores)


def all_finite(scores: Array) -> bool:
    """Whether there are scores and all of them are finite."""
    return scores.size > 0 and bool(np.isfinite(scores.min()) and np.isfinite(scores.max()))


class Multiclass(EvaluatedSamples):
    """Samples of exactly one class each; per-sample values that no weight changes are kept."""

    subtask = "multiclass"

    def __init__(self, targets: Array, scores: Scores, class_names: tuple[str, ...]) -> None:
        self.targets = targets  # (N,)
        self.scores, self.ranked = scores.values, scores.ranked  # (N, K)
        self.predictions = scores.predicted(self.subtask)  # (N,)
        self.class_names = class_names

    @property
    def pairs(self) -> tuple[Array, Array]:
        """True and predicted class, both (N,)."""
        return self.targets, self.predictions

    @cached_property
    def correct(self) -> Array:
        """Whether the prediction is right (N,)."""
        return self.predictions == self.targets

    @cached_property
    def target_scores(self) -> Array:
        """Probability of the true class (N,)."""
        return self.scores[np.arange(len(self.targets)), self.targets]

    @cached_property
    def in_top5(self) -> Array:
        """Whether the true class is among the five best (N,); of equal scores the first count."""
        own = self.ranked[np.arange(len(self.targets)), self.targets][:, None]
        places = np.arange(self.ranked.shape[1])
        tied_before = (self.ranked == own) & (places < self.targets[:, None])
        return ((self.ranked > own) | tied_before).sum(1) < 5

    @cached_property
    def confidence(self) -> Array:
        """Probability of the predicted class (N,)."""
        return self.scores[np.arange(len(self.targets)), self.predictions].astype(np.float64)

    @cached_property
    def brier(self) -> Array:
        """sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_target + 1 of each sample (N,)."""
        blocks = np.array_split(self.scores, len(self.scores) // ROWS_AT_ONCE + 1)
        squares = np.concatenate([(b.astype(np.float64) ** 2).sum(1) for b in blocks])
        own = self.target_scores.astype(np.float64)
        return np.maximum(squares - 2 * own + 1, 0.0)

    @cached_property
    def ladders(self) -> list[Thresholds]:
        """Thresholds of each class."""
        columns = np.ascontiguousarray(self.ranked.T)
        return [Thresholds.of(column, self.targets == k) for k, column in enumerate(columns)]

    def counts(self, weights: Array) -> ClassCounts:
        """Of all classes; linear in N for any number of classes."""
        classes = len(self.class_names)
        return ClassCounts(
            tp=sum_by(self.targets, classes, weights, self.correct),
            predicted=sum_by(self.predictions, classes, weights),
            actual=sum_by(self.targets, classes, weights),
            n=weights.sum(0),
        )


class Multilabel(EvaluatedSamples):
    """Samples with any number of labels each."""

    subtask = "multilabel"

    def __init__(self, targets: Array, scores: Scores, class_names: tuple[str, ...]) -> None:
        self.targets = targets > 0.5  # (N, K) bool
        self.scores, self.ranked = scores.values, scores.ranked  # (N, K)
        self.predictions = scores.predicted(self.subtask)  # (N, K) bool
        self.class_names = class_names

    @cached_property
    def right(self) -> Array:
        """Share of the labels of a sample that are right (N,)."""
        return (self.predictions == self.targets).mean(1)

    @cached_property
    def brier(self) -> Array:
        """(p - y)^2, mean over the labels of a sample (N,)."""
        return ((self.scores.astype(np.float64) - self.targets) ** 2).mean(1)

    @cached_property
    def ladders(self) -> list[Thresholds]:
        """Thresholds of each label."""
        columns = np.ascontiguousarray(self.ranked.T)
        return [Thresholds.of(column, self.targets[:, k]) for k, column in enumerate(columns)]

    def counts(self, weights: Array) -> ClassCounts:
        """Of all labels."""
        tables = (self.predictions & self.targets, self.predictions, self.targets)
        tp, predicted, actual = (label_sums(table, weights) for table in tables)
        return ClassCounts(tp, predicted, actual, weights.sum(0))


def label_sums(table: Array, weights: Array) -> Array:
    """Sum of weights (N, R) where a label of table (N, K) is set: (K, R)."""
    blocks = range(0, table.shape[1], CLASSES_AT_ONCE)
    parts = [table[:, k : k + CLASSES_AT_ONCE].T.astype(np.float64) @ weights for k in blocks]
    return np.concatenate(parts)


class Counted(Protocol):
    """Samples of which hits, predictions and labels of classes can be counted."""

    def counts(self, weights: Array) -> ClassCounts:
        """Of all classes under weights (N, R)."""


Classes = TypeVar("Classes", bound=Counted)


class Resampled(Generic[Classes]):
    """Samples under weights (N, R), with what several metrics need computed once."""

    def __init__(self, samples: Classes, weights: Array) -> None:
        self.samples, self.weights = samples, weights
        self.tell: Tell = silent

    @cached_property
    def counts(self) -> ClassCounts:
        """Of the classes."""
        return self.samples.counts(self.weights)

    @cached_property
    def ranking(self) -> tuple[Array, Array]:
        """AUROC and AP of each class, both (K, R)."""
        assert isinstance(self.samples, Multiclass | Multilabel), "no others have formulas that ask"
        pairs, ladders = [], self.samples.ladders
        for thresholds in ladders:
            pairs.append(auroc_and_ap(thresholds, self.weights))
            self.tell(len(pairs) / len(ladders))
        return np.stack([auroc for auroc, _ in pairs]), np.stack([ap for _, ap in pairs])


@formula("acc", "multiclass", "framewise")
def accuracy(drawn: Resampled[Counted]) -> Array:
    """Share of the samples that are right."""
    return ratio(drawn.counts.tp.sum(0), drawn.counts.n)


@formula("acc", "multilabel")
def label_accuracy(drawn: Resampled[Multilabel]) -> Array:
    """Share of the labels of all samples that are right."""
    return weighted_mean(drawn.samples.right, drawn.weights)


@formula("balanced_acc", "multiclass", "framewise")
def balanced_accuracy(drawn: Resampled[Counted]) -> Array:
    """Mean recall of the classes that occur."""
    counts = drawn.counts
    return mean_defined(ratio(counts.tp, counts.actual))


@formula("balanced_acc", "multilabel")
def label_balanced_accuracy(drawn: Resampled[Multilabel]) -> Array:
    """Mean over labels of (sensitivity + specificity) / 2."""
    counts = drawn.counts
    negatives = counts.n - counts.actual
    true_negatives = negatives - counts.predicted + counts.tp
    both = (ratio(counts.tp, counts.actual) + ratio(true_negatives, negatives)) / 2
    return mean_defined(both)


@formula("f1", "multiclass", "multilabel", "framewise")
def f1(drawn: Resampled[Counted]) -> Array:
    """Macro mean of 2 tp / (predicted + actual)."""
    return mean_defined(drawn.counts.f1)


@formula("f1_per_class", "multiclass", "multilabel", "framewise")
def f1_per_class(drawn: Resampled[Counted]) -> Array:
    """F1 (K, R) of each class; NaN for one that occurs neither in the targets nor in the
    predictions."""
    return drawn.counts.f1


@formula("precision", "multiclass", "multilabel", "framewise")
def precision(drawn: Resampled[Counted]) -> Array:
    """Macro mean of tp / predicted."""
    return mean_defined(drawn.counts.of_occurring(drawn.counts.predicted))


@formula("recall", "multiclass", "multilabel", "framewise")
def recall(drawn: Resampled[Counted]) -> Array:
    """Macro mean of tp / actual."""
    return mean_defined(drawn.counts.of_occurring(drawn.counts.actual))


@formula("top5acc", "multiclass")
def top5(drawn: Resampled[Multiclass]) -> Array:
    """Share of the samples whose class is among the five best; 1 with five classes or fewer."""
    return weighted_mean(drawn.samples.in_top5, drawn.weights)


@formula("auroc", "multiclass", "multilabel")
def auroc(drawn: Resampled[Multiclass | Multilabel]) -> Array:
    """Macro mean of the area under the ROC curve, one against the rest."""
    return mean_defined(drawn.ranking[0])


@formula("ap", "multiclass", "multilabel")
def average_precision(drawn: Resampled[Multiclass | Multilabel]) -> Array:
    """Macro mean of the average precision, one against the rest."""
    return mean_defined(drawn.ranking[1])


@formula("mcc", "multiclass", "framewise")
def mcc(drawn: Resampled[Counted]) -> Array:
    """R_K = (c n - p.t) / sqrt((n^2 - p.p)(n^2 - t.t)), c hits, p predicted, t actual counts.

    Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.
    """
    counts, n = drawn.counts, drawn.counts.n
    covariance = counts.tp.sum(0) * n - (counts.predicted * counts.actual).sum(0)
    variance_p = n**2 - (counts.predicted**2).sum(0)
    variance_t = n**2 - (counts.actual**2).sum(0)
    return chance_corrected(covariance, np.sqrt(variance_p * variance_t), variance_t)


@formula("mcc", "multilabel")
def label_mcc(drawn: Resampled[Multilabel]) -> Array:
    """Mean over labels of the phi coefficient, i.e. the MCC of two classes."""
    counts, n = drawn.counts, drawn.counts.n
    covariance = counts.tp * n - counts.predicted * counts.actual
    variance_p = counts.predicted * (n - counts.predicted)
    variance_t = counts.actual * (n - counts.actual)
    values = chance_corrected(covariance, np.sqrt(variance_p * variance_t), variance_t)
    return mean_defined(values)


@formula("kappa", "multiclass", "framewise")
def kappa(drawn: Resampled[Counted]) -> Array:
    """(p_o - p_e) / (1 - p_e), with p_o observed and p_e chance agreement (Cohen, 1960)."""
    counts, n = drawn.counts, drawn.counts.n
    by_chance = (counts.predicted * counts.actual).sum(0)
    variance_t = n**2 - (counts.actual**2).sum(0)
    excess = counts.tp.sum(0) * n - by_chance
    return chance_corrected(excess, n**2 - by_chance, variance_t)


@formula("kappa", "multilabel")
def label_kappa(drawn: Resampled[Multilabel]) -> Array:
    """Mean over labels of Cohen's kappa."""
    counts, n = drawn.counts, drawn.counts.n
    by_chance = counts.predicted * counts.actual + (n - counts.predicted) * (n - counts.actual)
    agreed = n - counts.predicted - counts.actual + 2 * counts.tp
    variance_t = counts.actual * (n - counts.actual)
    values = chance_corrected(agreed * n - by_chance, n**2 - by_chance, variance_t)
    return mean_defined(values)


@formula("quadratic_kappa", "multiclass")
def quadratic_kappa(drawn: Resampled[Multiclass]) -> Array:
    """1 - sum (i - j)^2 O_ij / sum (i - j)^2 E_ij; the order of the classes is their scale.

    O are the observed pairs, E those expected from the marginals (Cohen, Weighted kappa, 1968).
    """
    samples, counts, n = drawn.samples, drawn.counts, drawn.counts.n
    observed = (samples.predictions - samples.targets).astype(np.float64) ** 2 @ drawn.weights
    places = np.arange(len(samples.class_names), dtype=np.float64)
    moments = [(places @ c, places**2 @ c) for c in (counts.predicted, counts.actual)]
    (sum_p, square_p), (sum_t, square_t) = moments
    expected = square_p + square_t - 2 * sum_p * sum_t / n
    variance_t = n**2 - (counts.actual**2).sum(0)
    return chance_corrected(expected - observed, expected, variance_t)


def chance_corrected(excess: Array, largest: Array, variance_of_targets: Array) -> Array:
    """excess / largest; 0 where only the targets vary, NaN where they do not."""
    values = np.divide(excess, largest, out=np.zeros_like(excess), where=largest > 0)
    return np.where(variance_of_targets > 0, values, np.nan)


@formula("ece", "multiclass")
def ece(drawn: Resampled[Multiclass]) -> Array:
    """sum_b |right_b - confidence_b| n_b / n over 15 bins of the probability of the prediction.

    Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    samples = drawn.samples
    gap = bin_gaps(samples.confidence, samples.correct, drawn.weights)
    return gap / drawn.counts.n


@formula("ece", "multilabel")
def label_ece(drawn: Resampled[Multilabel]) -> Array:
    """Mean over labels of the calibration error of the probability that the label is set."""
    pairs = zip(drawn.samples.scores.T, drawn.samples.targets.T, strict=True)
    gaps = [bin_gaps(scores.astype(np.float64), true, drawn.weights) for scores, true in pairs]
    return np.mean(gaps, 0) / drawn.weights.sum(0)


def bin_gaps(probability: Array, outcome: Array, weights: Array) -> Array:
    """Sum over bins of |sum over samples of outcome - probability|, (R,)."""
    return np.abs(sum_by(bin_of(probability), BINS, weights, outcome - probability)).sum(0)


def bin_of(probability: Array) -> Array:
    """Bin (N,) of each probability; bin b holds b / 15 < p <= (b + 1) / 15, the first also 0."""
    return np.clip(np.ceil(probability * BINS).astype(np.int32) - 1, 0, BINS - 1)


@formula("brier", "multiclass", "multilabel")
def brier(drawn: Resampled[Multiclass | Multilabel]) -> Array:
    """Mean squared error of the probabilities (Brier, 1950).

    Multiclass: sum over the classes, 0 to 2. Multilabel: mean over the labels, 0 to 1.
    """
    return weighted_mean(drawn.samples.brier, drawn.weights)
