"""Metrics of predictions: numbers for the epoch line, and the report with intervals per split.

Which metrics exist and what they are called: metric_names. Formulas and what happens to absent
classes: classification, regression. An empty split, and scores that are not finite, make every
metric NaN (null in JSON). N samples, K classes or targets, R sets of weights.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from glovita_lib.bootstrap import intervals
from glovita_lib.classification import Drawn, Multiclass, Multilabel
from glovita_lib.files import plain
from glovita_lib.metric_names import LOGGED_NAMES, logged_names
from glovita_lib.regression import FUNCTIONS, Regression
from glovita_lib.weighted import Array

LEVEL = 0.95  # of the intervals
LARGEST_CONFUSION = 200  # classes; a larger matrix is left out of the report

Samples = Multiclass | Multilabel | Regression
Measure = Callable[[Array], dict[str, Array]]


def compute(
    names: tuple[str, ...],
    *,
    subtask: str,
    targets: Array,
    scores: Array,
    class_names: tuple[str, ...],
) -> dict[str, float]:
    """Metrics by logged name, in the order of `names`; NaN where undefined.

    Args:
        names: names as in task.metrics, valid for the subtask.
        subtask: multiclass, multilabel or regression.
        targets: (N,) class indices; (N, K) 0 or 1; (N, K) values.
        scores: (N, K) probabilities; regression: outputs in target units.
        class_names: K names.
    """
    logged = logged_names(names, class_names)
    if not usable(scores):
        return dict.fromkeys(logged, math.nan)
    measure = measure_of(names, samples_of(subtask, targets, scores, class_names))
    values = measure(np.ones((len(scores), 1)))
    return {name: float(values[name][0]) for name in logged}


def report(
    names: tuple[str, ...],
    *,
    subtask: str,
    targets: Array,
    scores: Array,
    class_names: tuple[str, ...],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Everything about the predictions of a split, ready for JSON: arguments as of `compute`.

    Args:
        bootstrap: resamples behind the intervals; 0 leaves them out.
        seed: of the resamples.

    Returns:
        n: samples. metrics: name -> value. ci95: name -> [low, high] of the percentile bootstrap.
        per_class: class or target -> name -> value; n counts its samples, predicted how often it
        was predicted. confusion: K rows of true and columns of predicted classes; null unless
        multiclass of at most 200 classes. Undefined numbers are null.
    """
    data = {"subtask": subtask, "targets": targets, "scores": scores, "class_names": class_names}
    result: dict[str, Any] = {"n": len(scores), "metrics": compute(names, **data), "ci95": {}}
    result |= {"per_class": {}, "confusion": None}
    if usable(scores):
        samples = samples_of(subtask, targets, scores, class_names)
        measure = measure_of(names, samples)
        ends = intervals(measure, len(scores), resamples=bootstrap, seed=seed, level=LEVEL)
        result["ci95"] = {name: ends[name] for name in result["metrics"] if name in ends}
        result["per_class"] = per_class(samples, class_names)
        if subtask == "multiclass" and len(class_names) <= LARGEST_CONFUSION:
            result["confusion"] = confusion(targets, samples.predictions, len(class_names))
    return plain(result)


def usable(scores: Array) -> bool:
    """Whether there are scores and all of them are finite."""
    return scores.size > 0 and bool(np.isfinite(scores.min()) and np.isfinite(scores.max()))


def samples_of(
    subtask: str, targets: Array, scores: Array, class_names: tuple[str, ...]
) -> Samples:
    """Targets and scores as the kind of samples that the subtask measures."""
    assert scores.shape == (len(targets), len(class_names)), (scores.shape, targets.shape)
    if subtask == "multiclass":
        assert targets.ndim == 1
        return Multiclass(targets, scores, class_names)
    assert targets.shape == scores.shape
    if subtask == "multilabel":
        return Multilabel(targets, scores, class_names)
    return Regression(targets, scores)


def measure_of(names: tuple[str, ...], samples: Samples) -> Measure:
    """Function from weights (N, R) to the values (R,) of each metric by logged name."""
    if isinstance(samples, Regression):
        return lambda weights: {
            logged: samples.mean(logged, weights) for name in names for logged in LOGGED_NAMES[name]
        }

    def measure(weights: Array) -> dict[str, Array]:
        drawn = Drawn(samples, weights)
        values: dict[str, Array] = {}
        for name in names:
            values |= samples.functions[name](drawn)
        return values

    return measure


def per_class(samples: Samples, class_names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Values of each class or target by name."""
    ones = np.ones((len(samples.targets), 1))
    columns: dict[str, Array] = {}  # name -> (K, 1)
    if isinstance(samples, Regression):
        columns = {name: samples.each(name, ones) for name in FUNCTIONS}
    else:
        drawn = Drawn(samples, ones)
        counts = drawn.counts
        columns = {"n": counts.actual.astype(int), "predicted": counts.predicted.astype(int)}
        columns["Precision"] = counts.of_occurring(counts.predicted)
        columns["Recall"] = counts.of_occurring(counts.actual)
        columns["F1"] = counts.f1
        columns["AUROC"], columns["AP"] = drawn.ranking
    return {
        name: {key: values[k, 0].item() for key, values in columns.items()}
        for k, name in enumerate(class_names)
    }


def confusion(targets: Array, predictions: Array, classes: int) -> Array:
    """Counts (K, K): rows are true classes, columns predicted ones."""
    pairs = targets.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
