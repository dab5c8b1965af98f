"""Labels to targets, for images and features: what the labels are is decided once over all files.

A cell of a table is a name, compared in Unicode's composed form (NFC). Whole numbers are indices
only of a list of names that has no numbers in it, or where a feature file states its names; else
they are names too. Nothing depends on which of the classes a split happens to hold.

N samples of a file, K classes or targets, W distinct words of M.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from glovita_lib.data import INNER, NUMBER
from glovita_lib.data_subtask import (
    LARGEST,
    MARKS,
    NO_LABEL,
    WHOLE,
    LabelRules,
    Labels,
    found_subtask,
    stated_names,
)
from glovita_lib.errors import UserError, composed, ended, listed, meant, with_all
from glovita_lib.spec_samples import Subtask

MOST_INDICES = 100_000  # classes that numbers may be indices of, where nothing states how many


class Encoded(NamedTuple):
    """Targets and what they mean."""

    subtask: Subtask
    class_names: tuple[str, ...]
    """Names of the classes, or of the targets of a regression."""
    targets: list[np.ndarray]
    """Of each file: (N,) int64 for multiclass, (N, K) float32 for multilabel, (N, K) float64 for
    regression."""
    number_names: dict[str, str] | None = None
    """See `Outputs`."""


Targets = tuple[list[np.ndarray], tuple[str, ...], dict[str, str] | None]
"""Targets of each file, the names, and what numbers mean, see `Encoded`."""


def is_missing(label: Any, subtask: str) -> bool:
    """Whether there is no label; an empty cell of a multilabel column means "none of the
    classes", which is one."""
    if isinstance(label, tuple):
        return any(is_missing(part, "multiclass") for part in label)
    if isinstance(label, str):
        return subtask != "multilabel" and not label.strip()
    return label is None or (isinstance(label, float | np.floating) and math.isnan(label))


def missing_words(label: Any, classes: Sequence[str] | None) -> list[str]:
    """Words in a cell, or the cells, of a label that say that there is none, unless a class is
    named so; "none" in small letters is a grade as mild is."""
    cells = label if isinstance(label, tuple | list | np.ndarray) else (label,)
    words = [cell.strip() for cell in cells if isinstance(cell, str)]
    named = {"none", *(classes or ())}
    return [text for text in words if text.lower() in NO_LABEL and text not in named]


def encode(files: Sequence[Labels], rules: LabelRules) -> Encoded:
    """Targets of all files, by one kind of target and one list of names, those of the trained model
    where there is one.

    Raises:
        UserError: a label that is no class or of the wrong kind, with its samples; files that
            contradict each other; a num_classes that is not the number of classes.
    """
    subtask, trained = rules.subtask or found_subtask(files, rules), rules.trained
    if trained is not None and trained.subtask != subtask:
        raise UserError(
            f"the labels are {subtask}, the checkpoint was trained for {trained.subtask} of"
            f" {listed(trained.class_names, 8)}; set data.subtask to that, or use infer.input to"
            " predict without labels"
        )
    kinds = {"multiclass": multiclass, "multilabel": multilabel, "regression": regression}
    targets, names, number_names = kinds[subtask](files, rules)
    if rules.num_classes not in (None, len(names)):
        what = "targets" if subtask == "regression" else "classes"
        cure = "" if rules.class_names else ", or name all of them in data.class_names"
        if subtask == "multiclass" and are_indices_from_one(files, rules):
            cure += "; whole numbers of a file count from 0, and these begin at 1"
        raise UserError(
            f"data.num_classes = {rules.num_classes}, but the data have {len(names)} {what}"
            f" ({listed(names)}): mend the number{cure}"
        )
    return Encoded(subtask, names, targets, number_names)


def are_indices_from_one(files: Sequence[Labels], rules: LabelRules) -> bool:
    """Whether labels are arrays of whole numbers, the classes of which are counted, without 0."""
    wholes = [file.whole for file in files]
    named = rules.class_names or any(file.class_names for file in files)
    return not named and all(whole is not None and whole.min(initial=1) > 0 for whole in wholes)


def learnt(rules: LabelRules) -> dict[str, str] | None:
    """What numbers meant to the trained model, where the spec says nothing else of it now."""
    if rules.trained is None or rules.class_names not in (None, rules.trained.class_names):
        return None
    return rules.trained.number_names


def are_new(given: tuple[str, ...], stated: tuple[str, ...]) -> bool:
    """Whether the names of a spec are new ones for those that the files state, each in its place;
    else the files' names are among them, in whatever order.

    Raises:
        UserError: neither.
    """
    known, own = set(map(composed, given)), set(map(composed, stated))
    if own <= known:
        return False
    if own.isdisjoint(known) and len(given) == len(stated):
        return True
    raise UserError(
        f"data.class_names ({listed(given)}) do not hold the class_names of the feature files"
        f" ({listed(stated)}): name all of these, or as many new ones in their order"
    )


# ---------------------------------------------------------------------- names and numbers


def word(label: Any) -> str:
    """A label as a class name: text but for the spaces around it as it is, numbers and booleans of
    a JSON file as they are printed there, 3.0 as 3."""
    if isinstance(label, bool | np.bool_):
        return str(label).lower()
    if isinstance(label, float | np.floating) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def order_key(name: str) -> tuple[list[tuple[int, Decimal, str]], str]:
    """What class names are sorted by: numbers, also those inside names, by value, text by the
    alphabet.

    >>> sorted(["grade 10", "grade 9", "10", "-1", "9.5"], key=order_key)
    ['-1', '9.5', '10', 'grade 9', 'grade 10']
    """
    if NUMBER.fullmatch(name):
        return [(0, Decimal(name), "")], name
    parts = [part for part in INNER.split(name) if part]
    return [
        (0, Decimal(part), "") if INNER.fullmatch(part) else (1, Decimal(0), part) for part in parts
    ], name


# ---------------------------------------------------------------------- classes


OF_CHECKPOINT = "classes of the checkpoint"


@dataclass(frozen=True, slots=True)
class Words:
    """The class names of all samples of a file."""

    distinct: list[str]  # (W,) composed
    codes: np.ndarray  # (M,) which of them
    samples: np.ndarray  # (M,) which sample has it

    @classmethod
    def of(cls, names: Sequence[str], samples: np.ndarray) -> "Words":
        """Names (M,) of samples (M,)."""
        place: dict[str, int] = {}
        codes = [place.setdefault(composed(name), len(place)) for name in names]
        return cls(list(place), np.array(codes, np.int64), samples)

    @classmethod
    def of_numbers(cls, numbers: np.ndarray) -> "Words":
        """Whole numbers (N,), as they are printed."""
        values, codes = np.unique(numbers, return_inverse=True)
        return cls([str(value) for value in values], codes, np.arange(len(numbers)))


@dataclass(slots=True)
class ClassWords:
    """The class names of all files."""

    files: Sequence[Labels]
    words: list[Words] = field(default_factory=list)
    """Of each file."""
    forms: dict[str, str] = field(default_factory=dict)
    """Composed name -> as it is written where it stands first."""
    number_names: dict[str, str] | None = None
    """Of an HDF5 enum, or as `meanings` finds."""

    def add(self, names: Sequence[str], samples: np.ndarray) -> None:
        """The names (M,) of samples (M,) of the next file."""
        for name in names:
            self.forms.setdefault(composed(name), name)
        self.words.append(Words.of(names, samples))

    def targets(self, rules: LabelRules) -> Targets:
        """Class (M,) of each word of each file, and the class names.

        Raises:
            UserError: a word that is no class, of the data or of the trained model.
        """
        names, meanings = self.meanings(rules)
        key = "data.class_names" if rules.class_names else "classes"
        lists = [] if names is None else [(names, key)]
        if rules.trained is not None:
            lists.append((rules.trained.class_names, OF_CHECKPOINT))
        lists = lists or [(self.found_names(rules), key)]
        for known, key in lists:
            place: dict[str | None, int] = {composed(name): i for i, name in enumerate(known)}
            if len(place) < len(known):
                raise UserError(f"data.class_names: a name occurs twice in {', '.join(known)}")
            for file, words, means in zip(self.files, self.words, meanings, strict=True):
                refuse_unknown(file, words, means, known, key)
        tables = [np.array([place[name] for name in means], np.int64) for means in meanings]
        found = zip(self.words, tables, strict=True)
        return [table[words.codes] for words, table in found], known, self.number_names

    def meanings(self, rules: LabelRules) -> tuple[tuple[str, ...] | None, list[list[str | None]]]:
        """The names that the spec or the files state, and the composed name that each distinct word
        (W,) of each file means, None where it is the index of none.

        Where files state names, arrays of whole numbers are indices of these, and where these files
        state none, as they were to the trained model. Else they are indices where no name that is
        stated is a number; and other words, where all of these are whole numbers, too.
        """
        stated = stated_names(self.files)
        names = rules.class_names or stated
        listing = stated
        if rules.class_names and stated and are_new(rules.class_names, stated):
            listing = rules.class_names
        whole = [file.whole is not None for file in self.files]
        rest = (w.distinct for w, is_whole in zip(self.words, whole, strict=True) if not is_whole)
        numbers = all(WHOLE.fullmatch(name) for distinct in rest for name in distinct)
        of_names = names if names and not any(map(WHOLE.fullmatch, names)) else None
        by_place = None if of_names is None else numbered(of_names)
        if stated is not None and listing is not None:
            of_array: dict[str, str] | None = numbered(listing)
        else:
            of_array = learnt(rules) or by_place
        self.number_names = self.number_names or of_array
        return names, [
            words_of_numbers(
                words.distinct, of_array if is_whole else by_place if numbers else None
            )
            for words, is_whole in zip(self.words, whole, strict=True)
        ]

    def found_names(self, rules: LabelRules) -> tuple[str, ...]:
        """Names where nothing states them: the words that occur, in order; of arrays of whole
        numbers all numbers from 0 to the largest. Of num_classes classes that are whole numbers
        below it the others exist too, whatever holds the labels.

        Raises:
            UserError: numbers that would make more classes than anybody means, or that may be
                indices of the names of other files.
        """
        self.refuse_mixed()
        distinct = {name for words in self.words for name in words.distinct}
        stated = rules.num_classes or 0
        indices = len(distinct) < stated and all(
            WHOLE.fullmatch(name) and 0 <= int(name) < stated for name in distinct
        )
        if not indices and not all(file.whole is not None for file in self.files):
            return tuple(self.forms.get(name, name) for name in sorted(distinct, key=order_key))
        largest = max(map(int, distinct), default=-1)
        count = max(largest + 1, stated)
        if count > max(MOST_INDICES, stated):
            raise UserError(
                f"the label {largest} as the index of a class makes {count:,} classes: set"
                ' data.subtask = "regression" where the labels are values, else data.num_classes,'
                " or store names"
            )
        return tuple(map(str, range(count)))

    def refuse_mixed(self) -> None:
        """Raise an error where some files hold names and others numbers that are none of these: an
        array of numbers one of which no text is, or text that is numbers beside text without any.
        The rows of one table are names however they are divided."""
        stored = [
            (file, words.distinct, file.values.dtype.kind in "iubf")
            for file, words in zip(self.files, self.words, strict=True)
            if isinstance(file.values, np.ndarray)
        ]
        texts = [(file, distinct) for file, distinct, is_array in stored if not is_array]
        named = [pair for pair in texts if not all(map(NUMBER.fullmatch, pair[1]))]
        known = {name for _, distinct in texts for name in distinct}
        without = named and not any(NUMBER.fullmatch(n) for _, names in named for n in names)
        for file, distinct, is_array in stored:
            if is_array:
                is_mixed, others = bool(texts) and not known.issuperset(distinct), named or texts
            else:
                is_mixed, others = bool(without and all(map(NUMBER.fullmatch, distinct))), named
            if is_mixed:
                cure = ", or list the names by number in data.class_names" if is_array else ""
                raise UserError(
                    f"{others[0][0].where} has names for labels ({listed(others[0][1], 4)}),"
                    f" {file.where} numbers ({listed(distinct, 4)}): store the same names in both"
                    f"{cure}"
                )


def numbered(names: Sequence[str]) -> dict[str, str]:
    """Names by their place, as it is printed."""
    return {str(place): name for place, name in enumerate(names)}


def words_of_numbers(words: list[str], names: dict[str, str] | None) -> list[str | None]:
    """The composed name that each word means, where it is a number that has one, None where it has
    none; the word itself without names."""
    if names is None:
        return list(words)
    return [composed(names[number]) if number in names else None for number in words]


def refuse_unknown(
    file: Labels, words: Words, means: list[str | None], names: Sequence[str], key: str
) -> None:
    """Raise an error that names the words whose meanings (W,) are no class, each with a sample that
    has it."""
    known = set(map(composed, names))
    codes = [code for code, name in enumerate(means) if name not in known]
    if not codes:
        return
    labels = [means[code] or words.distinct[code] for code in codes]
    shown = []
    for number, (code, label) in enumerate(zip(codes, labels, strict=True)):
        owner = file.ids[words.samples[np.flatnonzero(words.codes == code)[0]]]
        asks = number < 10 and not WHOLE.fullmatch(label)  # which takes time
        shown.append(f'"{label}" ({owner})' + (meant(label, list(names)) if asks else ""))
    text = f"label not in class list: {listed(shown)}; {key}: {listed(names)}"
    if key == "classes" and all(map(WHOLE.fullmatch, labels)):
        text += "; if the numbers are names, list them in data.class_names"
    if key == OF_CHECKPOINT and all(map(WHOLE.fullmatch, labels)):
        text += "; if the numbers are indices, name their classes in order in data.class_names"
    if key == OF_CHECKPOINT:
        text += "; infer.input predicts without labels"
    raise file.error(ended(with_all(text, shown)))


def in_places(files: Sequence[Labels]) -> Sequence[Labels]:
    """Files whose labels are numbers of an HDF5 enum, as places among its names in the order of
    their numbers in the first file that has these names, or among the file's class_names where
    these hold them all; numbers of files that state no names mean what they mean in the others.

    Raises:
        UserError: a number that the enum has no name for.
    """
    enums = [enum_of(file) for file in files]
    shared = {tuple(enum.items()) for enum in enums if enum}
    order: dict[frozenset[str], tuple[str, ...]] = {}
    for enum in enums:
        order.setdefault(frozenset(enum), tuple(enum))
    found = []
    for file, own in zip(files, enums, strict=True):
        numbers, enum = file.whole, own
        if not own and len(shared) == 1 and file.class_names is None:
            enum = dict(*shared)
        known = file.class_names or order[frozenset(enum)]
        if numbers is None or not enum or not set(enum) <= set(known):
            found.append(file)
            continue
        table = {number: known.index(name) for name, number in enum.items()}
        named = listed((f"{number} {name}" for name, number in enum.items()), 8)
        wrong = ~np.isin(numbers, list(table))
        file.refuse(wrong, f"the label is no number of the HDF5 enum ({named})")
        places = np.array([table[number] for number in numbers.tolist()], np.int64)
        found.append(replace(file, values=places, class_names=known))
    return found


def enum_of(file: Labels) -> dict[str, int]:
    """Names and numbers of the HDF5 enum that labels (N,) are stored as, by number; none where they
    are stored otherwise."""
    if file.whole is None or not isinstance(file.values, np.ndarray):
        return {}
    notes: Mapping[str, Any] = file.values.dtype.metadata or {}
    enum: dict[str, int] = notes.get("enum", {})  # where h5py puts it
    return dict(sorted(enum.items(), key=lambda entry: entry[1]))


def multiclass(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """One class a sample."""
    enums = {tuple(enum.items()) for file in files if (enum := enum_of(file))}
    shared: dict[str, int] = dict(*enums) if len(enums) == 1 else {}
    files = in_places(files)
    by_number = {str(number): name for name, number in shared.items()}
    classes = ClassWords(files, number_names=by_number or None)
    for file in files:
        if (numbers := file.whole) is not None:
            classes.words.append(Words.of_numbers(numbers))
            continue
        if isinstance(file.values, np.ndarray) and file.values.dtype.kind == "f":
            huge = np.abs(file.values.reshape(len(file.values), -1)).max(1) >= LARGEST
            file.refuse(huge, "the label is infinite, or too large for the number of a class")
        if isinstance(file.values, np.ndarray) and file.values.shape[1:] == (1,):
            raise file.error(f"labels of shape {file.values.shape}: store classes as (N,)")
        cells = file.cells()
        file.refuse(
            (isinstance(label, list | tuple | dict) for label in cells),
            'several labels for one sample: set data.subtask = "multilabel" or "regression"',
        )
        file.refuse((is_missing(label, "multiclass") for label in cells), "there is no label")
        classes.add([word(label) for label in cells], np.arange(len(cells)))
    return classes.targets(rules)


def class_sets(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """Any number of class names a sample: in one cell, or as a list."""
    classes = ClassWords(files)
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
        lists = [named(label, rules.separator) for label in cells]
        owners = np.repeat(np.arange(len(lists)), [len(labels) for labels in lists])
        classes.add([name for labels in lists for name in labels], owners)
    if not (classes.forms or rules.class_names or rules.trained):
        raise UserError("no sample has a label: give data.class_names")
    found, names, _ = classes.targets(rules)
    targets = []
    for file, words, places in zip(files, classes.words, found, strict=True):
        hot = np.zeros((len(file.ids), len(names)), np.float32)
        hot[words.samples, places] = 1
        targets.append(hot)
    return targets, names, None


def named(label: Any, separator: str) -> list[str]:
    """Class names of one sample."""
    if isinstance(label, str):
        label = [part for part in label.split(separator) if part.strip()]
    elif not isinstance(label, list):
        label = [label]
    return [word(part) for part in label]


# ---------------------------------------------------------------------- numbers


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
    targets, names, number_names = in_columns(files, found, rules)
    return [values.astype(np.float32) for values in targets], names, number_names


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
    names = rules.class_names or (rules.trained and rules.trained.class_names)
    classes = len(names) if names else rules.num_classes
    lengths = {len(label) for label in labels}
    return (
        len(lengths) == 1
        and lengths != {0}
        and lengths <= {classes or max(lengths)}
        and all(value in (0, 1) for label in labels for value in label)
    )


def regression(files: Sequence[Labels], rules: LabelRules) -> Targets:
    """One number or more a sample."""
    said = rules.subtask or rules.predicts  # else the numbers alone have told what they are
    what = "label" if said == "classes" else "label of a regression"
    why = f"the {what} must be a finite number, or a list of them"
    return in_columns(files, [matrix(file, why) for file in files], rules)


def matrix(file: Labels, why: str) -> np.ndarray:
    """Labels of a file as numbers (N, K) float64; `why` is the error about one that is none."""
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
    values = numbers.astype(np.float64)
    file.refuse(np.any(~np.isfinite(values), axis=1), why)
    return values


def label_numbers(label: Any) -> list[float]:
    """Numbers of a label; none if it is something else."""
    parts = label if isinstance(label, list | tuple) else [label]
    if any(isinstance(part, str) and not NUMBER.fullmatch(part.strip()) for part in parts):
        return []
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        return []


def in_columns(files: Sequence[Labels], found: list[np.ndarray], rules: LabelRules) -> Targets:
    """Numbers (N, K) of each file and the names of their columns, in the order of the trained model
    or else of class_names.

    Raises:
        UserError: there are other names than columns.
    """
    if not sum(map(len, found)):
        raise UserError("no sample has a label")
    given, stated, width = rules.class_names, stated_names(files), found[0].shape[1]
    unnamed = ("target",) if width == 1 else tuple(f"target_{number}" for number in range(width))
    known = learnt(rules)
    before = None if known is None or len(known) != width else tuple(known.values())
    names = rules.columns or stated or before or given or unnamed
    numbers = None if rules.columns or names is unnamed else numbered(names)
    for file, values in zip(files, found, strict=True):
        if values.shape[1] != len(names):
            raise file.error(
                f"the labels have {values.shape[1]} columns, but there are {len(names)} names"
                f" ({listed(names)})"
            )
    if names is before and names is not None:
        pass  # the columns of the files that the model was trained on, in their order
    elif given and rules.columns:
        found, names = reordered(found, names, given, "data.class_names", "data.label_column")
    elif given and stated and not are_new(given, stated):
        where = "the class_names of the feature files"
        found, names = reordered(found, names, given, "data.class_names", where)
    else:
        names = given or names
    if rules.trained is None:
        return found, names, numbers
    trained = rules.trained.class_names
    if width == len(trained) == 1 and unnamed in (names, trained):  # one has no name
        return found, trained, numbers
    return *reordered(found, names, trained, "the checkpoint's", "the data's"), numbers


def reordered(
    found: list[np.ndarray], names: Sequence[str], wanted: tuple[str, ...], whose: str, own: str
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Columns (N, K) of each file in the order in which their names are wanted.

    Raises:
        UserError: the names are not the same.
    """
    place = {composed(name): column for column, name in enumerate(names)}
    if sorted(place) != sorted(map(composed, wanted)):
        raise UserError(
            f"{whose} ({', '.join(wanted)}) and {own} ({', '.join(names)}) must hold the same names"
        )
    order = [place[composed(name)] for name in wanted]
    return [values[:, order] for values in found], wanted


# ---------------------------------------------------------------------- what is worth saying


def untrained(targets: np.ndarray, names: tuple[str, ...], subtask: str) -> list[str]:
    """A line about the classes without a training sample; `targets` are those of train."""
    if subtask == "regression":
        return []
    counts = np.bincount(targets, minlength=len(names)) if targets.ndim == 1 else targets.sum(0)
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    return [f"classes without a training sample: {listed(absent)}"] if absent else []
