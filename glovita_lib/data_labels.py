"""Labels to targets, for images and features: what the labels are is decided once over all files.

N samples of a file, K classes or targets.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import numpy as np

from glovita_lib.errors import UserError, listed, meant
from glovita_lib.spec_data import Subtask


@dataclass(frozen=True, slots=True)
class LabelRules:
    """The fields of a data set that say how its labels are meant."""

    subtask: Subtask | None  # None: what the files say, or as their labels look
    class_names: tuple[str, ...] | None
    num_classes: int | None
    columns: tuple[str, ...] | None  # names of several label columns of a table
    separator: str = "|"  # between several labels in one cell


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one file or table, as they stand there."""

    values: Sequence[Any] | np.ndarray
    """N cells: strings, numbers or booleans, lists from JSON, tuples of strings from several CSV
    columns. Or an array (N,) or (N, K), as a feature file holds it: numbers or names, whole numbers
    (N,) are indices of classes."""
    ids: Sequence[str]
    where: str = ""
    """The file, for messages."""
    subtask: str | None = None
    """Kind of target that the file states."""
    class_names: tuple[str, ...] | None = None
    """Names that the file states."""

    def cells(self) -> list[Any]:
        """The label of each sample; several of a sample as a list."""
        if isinstance(self.values, np.ndarray) and self.values.ndim > 1:
            return self.values.tolist()
        return list(self.values)

    def error(self, text: str) -> UserError:
        """An error about these labels."""
        return UserError(f"{self.where}: {text}" if self.where else text)

    def refuse(self, wrong: Iterable[bool] | np.ndarray, why: str) -> None:
        """Raise an error that names the samples that are wrong."""
        bad = [identity for identity, is_wrong in zip(self.ids, wrong, strict=True) if is_wrong]
        if bad:
            raise self.error(f"{why}; wrong: {listed(bad)}")


class Encoded(NamedTuple):
    """Targets and what they mean."""

    subtask: Subtask
    class_names: tuple[str, ...]
    """Names of the classes, or of the targets of a regression."""
    targets: list[np.ndarray]
    """Of each file: (N,) int64 for multiclass, else (N, K) float32."""


Targets = tuple[list[np.ndarray], tuple[str, ...]]
"""Targets of each file and the names, see `Encoded`."""


def is_missing(label: Any, subtask: str) -> bool:
    """Whether there is no label; an empty cell of a multilabel column means "none of the
    classes", which is one."""
    if isinstance(label, tuple):
        return any(is_missing(part, "multiclass") for part in label)
    if isinstance(label, str):
        return subtask != "multilabel" and not label.strip()
    return label is None or (isinstance(label, float) and math.isnan(label))


def encode(files: Sequence[Labels], rules: LabelRules) -> Encoded:
    """Targets of all files, by one kind of target and one list of names.

    Raises:
        UserError: a label that is no class or of the wrong kind, with its samples; files that
            contradict each other; a num_classes that is not the number of classes.
    """
    subtask = rules.subtask or found_subtask(files)
    rules = replace(rules, class_names=stored_names(files, rules))
    kinds = {"multiclass": multiclass, "multilabel": multilabel, "regression": regression}
    targets, names = kinds[subtask](files, rules)
    if rules.num_classes not in (None, len(names)):
        what = "targets" if subtask == "regression" else "classes"
        cure = "" if rules.class_names else ", or name all of them in data.class_names"
        raise UserError(
            f"data.num_classes = {rules.num_classes}, but the data have {len(names)} {what}"
            f" ({listed(names)}): mend the number{cure}"
        )
    return Encoded(subtask, names, targets)


# ---------------------------------------------------------------------- what the files say


def found_subtask(files: Sequence[Labels]) -> Subtask:
    """Kind of target that the files state, else as their arrays look: whole numbers and names are
    multiclass, several columns of 0 and 1 multilabel, other numbers regression.

    Raises:
        UserError: files that state no subtask there is or contradict each other, or whole numbers
            in columns, which may be classes or targets.
    """
    said = {file.subtask: file.where for file in files if file.subtask is not None}
    if len(said) > 1:
        each = listed(f"{where} {subtask}" for subtask, where in said.items())
        raise UserError(f"feature files of different subtasks: {each}; set data.subtask")
    for name, where in said.items():
        known: tuple[Subtask, ...] = get_args(Subtask)
        if name not in known:
            raise UserError(
                f'{where}: its attribute subtask is "{name}"; valid are {", ".join(known)}: correct'
                " it, or set data.subtask"
            )
        return known[known.index(name)]
    arrays = [np.asarray(file.values) for file in files]
    if all(array.ndim == 1 and array.dtype.kind in "iuUOb" for array in arrays):
        return "multiclass"
    if all(array.ndim == 2 and np.isin(array, (0, 1)).all() for array in arrays):
        return "multilabel"
    for file, array in zip(files, arrays, strict=True):
        if array.ndim == 2 and array.dtype.kind in "iu":
            raise file.error(
                f"labels of shape {array.shape} are whole numbers; store classes as (N,), or set"
                ' data.subtask = "regression"'
            )
    return "regression"


def stored_names(files: Sequence[Labels], rules: LabelRules) -> tuple[str, ...] | None:
    """Names that the spec or else the files state.

    Raises:
        UserError: files that state different ones.
    """
    stored = {file.class_names: file.where for file in files if file.class_names}
    if len(stored) > 1:
        each = "; ".join(f"{where}: {listed(names)}" for names, where in stored.items())
        raise UserError(
            f"feature files of different class_names ({each}), so that a number would"
            " mean two classes; write the same list and labels to all of them"
        )
    return rules.class_names or next(iter(stored), None)


def cells_as_stored(tables: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cells (N, K) of a table, divided by files, as feature files hold labels: as whole numbers if
    all of them are some, else as floats, else as they are; (N,) where there is one column."""
    for kind in (np.int64, np.float64):
        try:
            tables = [cells.astype(kind) for cells in tables]
            break
        except (ValueError, OverflowError):
            continue
    return [cells[:, 0] if cells.shape[1] == 1 else cells for cells in tables]


# ---------------------------------------------------------------------- classes


def word(label: Any) -> str:
    """A label as a class name: 3, 3.0, "3" and "3.0" are all "3"."""
    if isinstance(label, bool | np.bool_):
        return str(label).lower()
    if isinstance(label, str):
        label = label.strip()
        try:
            number = float(label)
        except ValueError:
            return label
        # "007" and "1e3" are names, not numbers
        return str(int(number)) if label == f"{number:.1f}" and number.is_integer() else label
    if isinstance(label, float | np.floating) and label.is_integer():
        return str(int(label))
    return str(label)


def is_whole(name: str) -> bool:
    """Whether a class name is a whole number."""
    return name.removeprefix("-").isdecimal()


def class_places(
    words: set[str], class_names: tuple[str, ...] | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Index of the class that each word means, and the class names.

    Without names the classes are the words that occur: numbers by value, others by the alphabet.
    With names, words that all are whole numbers and none of them a name are indices.

    Raises:
        UserError: a name that is given twice.
    """
    whole = all(map(is_whole, words))
    names = tuple(sorted(words, key=int if whole else None)) if class_names is None else class_names
    place = {name: index for index, name in enumerate(names)}
    if len(place) < len(names):
        raise UserError(f"data.class_names: a name occurs twice in {', '.join(names)}")
    if words and whole and place.keys().isdisjoint(words):
        place = {str(index): index for index in range(len(names))}
    return place, names


def refuse_unknown(
    file: Labels, unknown: Iterable[tuple[str, str]], names: tuple[str, ...], rules: LabelRules
) -> None:
    """Raise an error that names the labels that are no class, each with a sample that has it."""
    found: dict[str, str] = {}
    for label, identity in unknown:
        found.setdefault(label, identity)
    if found:
        words = [label for label in list(found)[:10] if not is_whole(label)]
        near = {label: meant(label, list(names)) for label in words}
        shown = (f'"{label}" ({found[label]}){near.get(label, "")}' for label in found)
        key = "data.class_names" if rules.class_names else "classes"
        raise file.error(f"label not in class list: {listed(shown)}; {key}: {listed(names)}")


def multiclass(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """One class a sample."""
    arrays = [file.values for file in files if isinstance(file.values, np.ndarray)]
    if len(arrays) == len(files) and all(a.ndim == 1 and a.dtype.kind in "iub" for a in arrays):
        return class_indices(files, rules)
    words = []
    for file in files:
        cells = file.cells()
        file.refuse(
            (isinstance(label, list | tuple | dict) for label in cells),
            'several labels for one sample: set data.subtask = "multilabel" or "regression"',
        )
        words.append([word(label) for label in cells])
    place, names = class_places(set().union(*words), rules.class_names)
    targets = []
    for file, found in zip(files, words, strict=True):
        pairs = zip(found, file.ids, strict=True)
        refuse_unknown(file, (pair for pair in pairs if pair[0] not in place), names, rules)
        targets.append(np.array([place[name] for name in found], np.int64))
    return targets, names


def class_indices(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """Classes that whole numbers of arrays are indices of; without names there are as many as the
    largest says, or num_classes."""
    targets = [np.asarray(file.values).astype(np.int64) for file in files]
    largest = max(int(values.max(initial=-1)) for values in targets)
    names = rules.class_names or tuple(map(str, range(max(largest + 1, rules.num_classes or 0))))
    for file, values in zip(files, targets, strict=True):
        bad = np.flatnonzero((values < 0) | (values >= len(names)))
        refuse_unknown(file, ((str(values[i]), file.ids[int(i)]) for i in bad), names, rules)
    return targets, names


def class_sets(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """Any number of class names a sample: in one cell, or as a list."""
    lists = []
    for file in files:
        cells = file.cells()
        file.refuse(
            (
                isinstance(label, dict)
                or (isinstance(label, list) and any(isinstance(v, list | dict) for v in label))
                for label in cells
            ),
            "expected a list of class names, or of a 0 or 1 for each class",
        )
        lists.append([named(label, rules.separator) for label in cells])
    words = {name for labels in lists for names in labels for name in names}
    place, names = class_places(words, rules.class_names)
    if not names:
        raise UserError("no sample has a label: give data.class_names")
    targets = []
    for file, labels in zip(files, lists, strict=True):
        pairs = [(w, owner) for owner, found in zip(file.ids, labels, strict=True) for w in found]
        refuse_unknown(file, (pair for pair in pairs if pair[0] not in place), names, rules)
        hot = np.zeros((len(labels), len(names)), np.float32)
        rows = np.repeat(np.arange(len(labels)), [len(found) for found in labels])
        hot[rows, [place[name] for name, _ in pairs]] = 1
        targets.append(hot)
    return targets, names


def named(label: Any, separator: str) -> list[str]:
    """Class names of one sample."""
    if isinstance(label, str):
        label = [part for part in label.split(separator) if part.strip()]
    elif not isinstance(label, list):
        label = [label]
    return [word(part) for part in label]


# ---------------------------------------------------------------------- numbers

MARKS = {"false": "0", "true": "1"}


def multilabel(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """Any number of classes a sample: 0 or 1 in each of several columns, names in one cell, a JSON
    list of names, or one of 0 and 1 for each class."""
    stored = all(isinstance(file.values, np.ndarray) for file in files)
    if rules.columns is None and not stored:
        cells = [label for file in files for label in file.cells()]
        if not are_hot(cells, rules):
            return class_sets(files, rules)
        numbers = tuple(map(str, range(len(cells[0]))))
        rules = replace(rules, class_names=rules.class_names or numbers)
    what = f"cell of {', '.join(rules.columns)}" if rules.columns else "multilabel label"
    why = f"every {what} must be 0 or 1"
    if rules.columns:
        files = [replace(file, values=marked(file)) for file in files]
    found = [matrix(file, why) for file in files]
    for file, values in zip(files, found, strict=True):
        file.refuse(np.any(~np.isin(values, (0, 1)), axis=1), why)
    return in_columns(files, found, rules)


def marked(file: Labels) -> Sequence[Any] | np.ndarray:
    """Labels of several columns with false and true as numbers."""
    if isinstance(file.values, np.ndarray) and file.values.dtype.kind in "iubf":
        return file.values
    return [tuple(MARKS.get(cell.lower(), cell) for cell in label) for label in file.cells()]


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


def regression(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """One number or more a sample."""
    why = "the label of a regression must be a finite number of float32, or a list of them"
    return in_columns(files, [matrix(file, why) for file in files], rules)


def matrix(file: Labels, why: str) -> np.ndarray:
    """Labels of a file as numbers (N, K) float32; `why` is the error about one that is none."""
    if isinstance(file.values, np.ndarray) and file.values.dtype.kind in "iubf":
        numbers = file.values.reshape(len(file.values), -1)
    else:
        rows = [label_numbers(label) for label in file.cells()]
        file.refuse((not row for row in rows), why)
        widths = {len(row) for row in rows}
        if len(widths) > 1:
            raise file.error(
                f"samples have {' or '.join(map(str, sorted(widths)))} regression targets: give"
                " every sample the same number"
            )
        numbers = np.array(rows, np.float64).reshape(len(rows), *widths or (1,))
    with np.errstate(over="ignore"):  # becomes infinity, which is refused
        values = numbers.astype(np.float32)
    file.refuse(np.any(~np.isfinite(values), axis=1), why)
    return values


def label_numbers(label: Any) -> list[float]:
    """Numbers of a label; none if it is something else."""
    parts = label if isinstance(label, list | tuple) else [label]
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        return []


def in_columns(files: Sequence[Labels], found: list[np.ndarray], rules: LabelRules) -> Targets:
    """Numbers (N, K) of each file and the names of their columns, in the order of class_names.

    Raises:
        UserError: there are other names than columns.
    """
    if not sum(map(len, found)):
        raise UserError("no sample has a label")
    width = found[0].shape[1]
    names = (
        rules.class_names
        or rules.columns
        or (("target",) if width == 1 else tuple(f"target_{number}" for number in range(width)))
    )
    for file, values in zip(files, found, strict=True):
        if values.shape[1] != len(names):
            raise file.error(
                f"the labels have {values.shape[1]} columns, but there are {len(names)} names"
                f" ({listed(names)})"
            )
    if rules.columns is None:
        return found, names
    if sorted(names) != sorted(rules.columns):
        raise UserError(
            f"data.class_names ({', '.join(names)}) and data.label_column"
            f" ({', '.join(rules.columns)}) must hold the same names"
        )
    order = [rules.columns.index(name) for name in names]
    return [values[:, order] for values in found], names


# ---------------------------------------------------------------------- what is worth saying


def untrained(targets: np.ndarray, names: tuple[str, ...], subtask: str) -> list[str]:
    """A line about the classes without a training sample; `targets` are those of train."""
    if subtask == "regression":
        return []
    counts = np.bincount(targets, minlength=len(names)) if targets.ndim == 1 else targets.sum(0)
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    return [f"classes without a training sample: {listed(absent)}"] if absent else []
