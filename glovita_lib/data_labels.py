"""Labels as people write them, to targets.

N samples, K classes or targets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glovita_lib.errors import UserError, meant

SHOWN = 10  # offending samples that a message lists


@dataclass(frozen=True, slots=True)
class LabelRules:
    """The fields of a data set that say how its labels are meant."""

    subtask: str
    class_names: tuple[str, ...] | None
    num_classes: int | None
    columns: tuple[str, ...] | None  # names of several label columns
    separator: str  # between several labels in one cell


def is_missing(label: Any, subtask: str) -> bool:
    """Whether there is no label; an empty cell of a multilabel column means "none of the
    classes", which is one."""
    if isinstance(label, tuple):
        return any(is_missing(part, "multiclass") for part in label)
    if isinstance(label, str):
        return subtask != "multilabel" and not label.strip()
    return label is None or (isinstance(label, float) and math.isnan(label))


def encode(
    labels: Sequence[Any], ids: Sequence[str], rules: LabelRules
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Targets and names of the classes, or of the targets of a regression.

    Args:
        labels: strings, numbers or booleans; lists from JSON; tuples of strings from several CSV
            columns. None is missing.

    Returns:
        (N,) int64 for multiclass, else (N, K) float32, and K names.

    Raises:
        UserError: a label that is not in class_names or of the wrong kind, with its samples; a
            num_classes that is not the number of classes.
    """
    kinds = {"multiclass": multiclass, "multilabel": multilabel, "regression": regression}
    targets, names = kinds[rules.subtask](labels, ids, rules)
    if rules.num_classes not in (None, len(names)):
        what = "targets" if rules.subtask == "regression" else "classes"
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        cure = "" if rules.class_names else ", or name all of them in data.class_names"
        raise UserError(
            f"data.num_classes = {rules.num_classes}, but the data have {len(names)} {what}"
            f" ({shown}): mend the number{cure}"
        )
    return targets, names


def word(label: Any) -> str:
    """A label as a class name: 3, 3.0, "3" and "3.0" are all "3"."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, str):
        label = label.strip()
        try:
            number = float(label)
        except ValueError:
            return label
        # "007" and "1e3" are names, not numbers
        return str(int(number)) if label == f"{number:.1f}" and number.is_integer() else label
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def in_order(words: set[str]) -> tuple[str, ...]:
    """Class names in order: numbers by value, others by the alphabet."""
    if all(is_whole(name) for name in words):
        return tuple(sorted(words, key=int))
    return tuple(sorted(words))


def is_whole(name: str) -> bool:
    """Whether a class name is a whole number."""
    return name.removeprefix("-").isdecimal()


def indices(
    words: Sequence[str], ids: Sequence[str], class_names: tuple[str, ...] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Index of each word among the class names.

    Without names the classes are the words that occur, sorted. With names, words that all are whole
    numbers and none of them a name are indices.

    Raises:
        UserError: words that are no class, each with a sample.
    """
    if class_names is None:
        class_names = in_order(set(words))
    place = {name: index for index, name in enumerate(class_names)}
    if len(place) < len(class_names):
        raise UserError(f"data.class_names: a name occurs twice in {', '.join(class_names)}")
    if words and all(is_whole(name) and name not in place for name in set(words)):
        place = {str(index): index for index in range(len(class_names))}
    unknown: dict[str, str] = {}
    for name, identity in zip(words, ids, strict=True):
        if name not in place:
            unknown.setdefault(name, identity)
    if unknown:
        first = list(unknown.items())[:SHOWN]
        shown = [f'"{name}" ({identity}){meant(name, list(place))}' for name, identity in first]
        more = f" and {len(unknown) - SHOWN} more" * (len(unknown) > SHOWN)
        raise UserError(
            f"label not in class list: {', '.join(shown)}{more}; data.class_names:"
            f" {', '.join(class_names)}"
        )
    return [place[name] for name in words], class_names


def multiclass(
    labels: Sequence[Any], ids: Sequence[str], rules: LabelRules
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One class a sample."""
    refuse(
        (isinstance(label, list | tuple | dict) for label in labels),
        ids,
        'several labels for one image: set data.subtask = "multilabel" or "regression"',
    )
    found, names = indices([word(label) for label in labels], ids, rules.class_names)
    return np.array(found, np.int64), names


def multilabel(
    labels: Sequence[Any], ids: Sequence[str], rules: LabelRules
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Any number of classes a sample: 0 or 1 in each of several columns, names in one cell, a JSON
    list of names, or one of 0 and 1 for each class."""
    if rules.columns is not None:
        return hot_columns(labels, ids, rules)
    if are_hot(labels, rules):
        width = len(labels[0])
        names = rules.class_names or tuple(map(str, range(width)))
        return np.array(labels, np.float32).reshape(-1, width), names
    refuse(
        (isinstance(label, list) and any(isinstance(v, list | dict) for v in label)
         or isinstance(label, dict) for label in labels),
        ids,
        "expected a list of class names, or of a 0 or 1 for each class",
    )  # fmt: skip
    lists = [named(label, rules.separator) for label in labels]
    words = [name for names in lists for name in names]
    owners = [identity for identity, names in zip(ids, lists, strict=True) for _ in names]
    found, names = indices(words, owners, rules.class_names)
    if not names:
        raise UserError("no image has a label: give data.class_names")
    targets = np.zeros((len(labels), len(names)), np.float32)
    rows = np.repeat(np.arange(len(labels)), [len(names) for names in lists])
    targets[rows, found] = 1
    return targets, names


def named(label: Any, separator: str) -> list[str]:
    """Class names of one sample."""
    if isinstance(label, str):
        label = [part for part in label.split(separator) if part.strip()]
    elif not isinstance(label, list):
        label = [label]
    return [word(part) for part in label]


def are_hot(labels: Sequence[Any], rules: LabelRules) -> bool:
    """Whether the labels are lists of a 0 or 1 for each class: of one length, that of the class
    list where there is one, and of nothing else."""
    if not labels or not all(isinstance(label, list) for label in labels):
        return False
    lengths = {len(label) for label in labels}
    classes = len(rules.class_names) if rules.class_names else rules.num_classes
    return (
        len(lengths) == 1
        and lengths != {0}
        and lengths <= {classes or max(lengths)}
        and all(value in (0, 1) for label in labels for value in label)
    )


def hot_columns(
    labels: Sequence[tuple[str, ...]], ids: Sequence[str], rules: LabelRules
) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column for each class."""
    names = columns_of(rules)
    marks = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
    refuse(
        (any(cell.lower() not in marks for cell in label) for label in labels),
        ids,
        f"every cell of {', '.join(rules.columns)} must be 0 or 1",
    )
    values = [[marks[cell.lower()] for cell in label] for label in labels]
    targets = np.array(values, np.float32).reshape(-1, len(rules.columns))
    return targets[:, [rules.columns.index(name) for name in names]], names


def columns_of(rules: LabelRules) -> tuple[str, ...]:
    """Label columns in the order of the class names.

    Raises:
        UserError: class_names that are not the columns.
    """
    if rules.class_names is None:
        return rules.columns
    if sorted(rules.class_names) != sorted(rules.columns):
        raise UserError(
            f"data.class_names ({', '.join(rules.class_names)}) and data.label_column"
            f" ({', '.join(rules.columns)}) must hold the same names"
        )
    return rules.class_names


def regression(
    labels: Sequence[Any], ids: Sequence[str], rules: LabelRules
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One number or more a sample."""
    rows = [label_numbers(label) for label in labels]
    refuse(
        (row is None or not all(map(math.isfinite, row)) for row in rows),
        ids,
        "the label of a regression must be a finite number, or a list of them",
    )
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise UserError(
            f"images have {' or '.join(map(str, sorted(widths)))} regression targets: give every"
            " image the same number"
        )
    targets = np.array(rows, np.float32)
    if rules.columns is not None:
        names = columns_of(rules)
        return targets[:, [rules.columns.index(name) for name in names]], names
    width = targets.shape[1]
    names = rules.class_names or (
        ("target",) if width == 1 else tuple(f"target_{number}" for number in range(width))
    )
    if len(names) != width:
        raise UserError(
            f"data.class_names has {len(names)} names ({', '.join(names)}), the labels {width}"
            " numbers an image"
        )
    return targets, names


def label_numbers(label: Any) -> list[float] | None:
    """Numbers of a label; None if it is something else."""
    parts = label if isinstance(label, list | tuple) else [label]
    try:
        return [float(part) for part in parts] or None
    except (TypeError, ValueError):
        return None


def refuse(wrong: Any, ids: Sequence[str], why: str) -> None:
    """Raise an error that names the samples that are wrong."""
    bad = [identity for identity, is_wrong in zip(ids, wrong, strict=True) if is_wrong]
    if bad:
        more = f" and {len(bad) - SHOWN} more" * (len(bad) > SHOWN)
        raise UserError(f"{why}; wrong: {', '.join(bad[:SHOWN])}{more}")
