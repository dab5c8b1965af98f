"""Predictions of a split as CSV, one row a sample. N samples, K classes or targets."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.files import write_csv
from glovita_lib.spec import UserError

THRESHOLD = 0.5  # probability from which a label of multilabel data is predicted


def write_predictions(
    path: Path | str,
    *,
    ids: Sequence[str],
    targets: np.ndarray | None,
    scores: np.ndarray,
    subtask: str,
    class_names: Sequence[str],
) -> None:
    """CSV of predictions: id, the truth unless unlabelled, the prediction, the probabilities.

    multiclass: label, prediction (names), p_<class>; regression of one target: label, prediction;
    multilabel and several targets: label_<name> ..., prediction_<name> ..., and p_<class> for
    multilabel, where a probability of at least 0.5 predicts 1. Numbers read back equal.

    Args:
        ids: N ids.
        targets: (N,) class indices; (N, K) labels or values; None: unlabelled.
        scores: (N, K) probabilities, or outputs in target units.
        subtask: multiclass, multilabel or regression.
        class_names: K names.

    Raises:
        UserError: disk full, read-only ...
    """
    assert scores.shape == (len(ids), len(class_names)), (scores.shape, len(ids), len(class_names))
    columns: dict[str, Sequence[Any]] = {"id": ids}
    names = np.array(class_names, dtype=object)
    if subtask == "multiclass":
        if targets is not None:
            columns["label"] = names[targets]
        columns["prediction"] = names[scores.argmax(1)]
    else:
        labels, predictions = value_columns(subtask, class_names)
        if targets is not None:
            whole = targets.astype(np.int64) if subtask == "multilabel" else targets
            columns |= dict(zip(labels, whole.T, strict=True))
        predicted = (scores >= THRESHOLD).astype(np.int64) if subtask == "multilabel" else scores
        columns |= dict(zip(predictions, predicted.T, strict=True))
    if subtask != "regression":
        columns |= {f"p_{name}": column for name, column in zip(names, scores.T, strict=True)}
    write_csv(path, columns, zip(*columns.values(), strict=True))


def value_columns(subtask: str, class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Columns of the truth and of the prediction, one a class or target."""
    if subtask == "regression" and len(class_names) == 1:
        return ["label"], ["prediction"]
    return [f"label_{name}" for name in class_names], [f"prediction_{name}" for name in class_names]


@dataclass(frozen=True)
class Table:
    """Predictions as read from a file."""

    ids: list[str]
    targets: np.ndarray | None  # (N,) int64 | (N, K) float32
    scores: np.ndarray  # (N, K) float32


def read_predictions(path: Path | str, *, subtask: str, class_names: Sequence[str]) -> Table:
    """What `write_predictions` wrote.

    Raises:
        UserError: missing, or of other classes.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    columns = dict(
        zip(header, zip(*rows, strict=True) if rows else [()] * len(header), strict=True)
    )
    labels, predictions = value_columns(subtask, class_names)
    shown = predictions if subtask == "regression" else [f"p_{name}" for name in class_names]
    truth = ["label"] if subtask == "multiclass" else labels
    missing = [name for name in ("id", *shown) if name not in columns]
    if missing:
        raise UserError(f"{path} is of other classes: it has no column {missing[0]}")
    index = {name: i for i, name in enumerate(class_names)}
    try:
        scores = np.array([columns[name] for name in shown], dtype=np.float32).T
        targets = None
        if truth[0] in columns and subtask == "multiclass":
            targets = np.array([index[name] for name in columns["label"]], dtype=np.int64)
        elif truth[0] in columns:
            targets = np.array([columns[name] for name in truth], dtype=np.float32).T
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is of other classes: {error}") from None
    return Table(list(columns["id"]), targets, scores)
