"""The labels of files, and the kind of target that they are where nothing states it.

N samples of a file, K classes or targets.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from glovita_lib.data import NUMBER, Outputs
from glovita_lib.errors import UserError, ended, listed, with_all
from glovita_lib.spec_samples import OnlyPrediction, Subtask, WholeSubtask

LARGEST = 2.0**53  # up to which float64 tells whole numbers apart


@dataclass(frozen=True, slots=True)
class LabelRules:
    """What says how the labels of a data set are meant: its fields, and the model that is asked."""

    subtask: Subtask | None  # None: what the files say, or as their labels look
    class_names: tuple[str, ...] | None
    num_classes: int | None
    columns: tuple[str, ...] | None  # names of several label columns of a table
    separator: str = "|"  # between several labels in one cell
    trained: Outputs | None = None  # outputs of a trained model, which the targets shall be of
    predicts: OnlyPrediction | None = None  # what alone the model that learns from them predicts


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one file or table, as they stand there."""

    values: Sequence[Any] | np.ndarray
    """N cells: strings, numbers or booleans, lists from JSON, tuples of strings from several CSV
    columns. Or an array (N,) or (N, K), as a feature file holds it: numbers or names."""
    ids: Sequence[str]
    where: str = ""
    """The file, for messages."""
    subtask: str | None = None
    """Kind of target that the file states."""
    class_names: tuple[str, ...] | None = None
    """Names that the file states: its whole numbers are indices of them."""

    def cells(self) -> list[Any]:
        """The label of each sample; several of a sample as a list."""
        if isinstance(self.values, np.ndarray) and self.values.ndim > 1:
            return self.values.tolist()
        return [
            cell[0] if isinstance(cell, tuple) and len(cell) == 1 else cell for cell in self.values
        ]

    @property
    def whole(self) -> np.ndarray | None:
        """The labels (N,) where they are an array of whole numbers."""
        values = self.values
        if not isinstance(values, np.ndarray) or values.ndim != 1:
            return None
        if values.dtype.kind == "f" and not np.all(np.floor(values) == values):  # or NaN
            return None
        if values.dtype.kind == "f" and np.any(abs(values.astype(float)) >= LARGEST):
            return None
        if values.dtype.kind in "bf":
            return values.astype(np.int64)
        return values if values.dtype.kind in "iu" else None

    def error(self, text: str) -> UserError:
        """An error about these labels."""
        return UserError(f"{self.where}: {text}" if self.where else text)

    def refuse(self, wrong: Iterable[bool] | np.ndarray, why: str) -> None:
        """Raise an error that names the samples that are wrong, and what text they have."""
        bad = [
            f'{identity} ("{cell}")' if isinstance(cell, str) and cell.strip() else identity
            for identity, cell, is_wrong in zip(self.ids, self.values, wrong, strict=True)
            if is_wrong
        ]
        if bad:
            raise self.error(ended(with_all(f"{why}; wrong: {listed(bad)}", bad)))


def stated_names(files: Sequence[Labels]) -> tuple[str, ...] | None:
    """Names that the files state.

    Raises:
        UserError: files that state different ones.
    """
    stated = {file.class_names: file.where for file in files if file.class_names}
    if len(stated) > 1:
        each = "; ".join(f"{where}: {listed(names)}" for names, where in stated.items())
        raise UserError(
            f"feature files of different class_names ({each}), so that a number would"
            " mean two classes; write the same list and labels to all of them"
        )
    return next(iter(stated), None)


# ---------------------------------------------------------------------- the kind of target


def found_subtask(files: Sequence[Labels], rules: LabelRules) -> Subtask:
    """Kind of target that the files state, else that of the trained model, else as the labels of
    all files look: whole numbers and names are multiclass, several columns of 0 and 1 multilabel,
    other numbers regression.

    Raises:
        UserError: files that state no subtask there is or contradict each other, or whole numbers
            in columns or with decimals, which may be classes or targets.
    """
    said = {file.subtask: file.where for file in files if file.subtask is not None}
    if len(said) > 1:
        each = listed(f"{where} {subtask}" for subtask, where in said.items())
        raise UserError(f"feature files of different subtasks: {each}; set data.subtask")
    for name, where in said.items():
        known: tuple[WholeSubtask, ...] = get_args(WholeSubtask)
        if name not in known:
            raise UserError(
                f'{where}: its attribute subtask is "{name}"; valid are {", ".join(known)}: correct'
                " it, or set data.subtask"
            )
        return known[known.index(name)]
    if rules.trained is not None:
        return rules.trained.subtask
    looks = [looks_of(file) for file in files]
    found = set().union(*looks)
    if found <= set(ONE_COLUMN):
        return subtask_of_column(files, found, rules)
    if found == {"hot"} and rules.predicts != "numbers":
        return "multilabel"
    for columns, what in (("text columns", "names"), ("whole columns", "whole numbers")):
        if columns in found and "columns" not in found and rules.predicts != "numbers":
            file = files[looks.index({columns})]
            cure = "" if what == "names" else ', or set data.subtask = "regression"'
            raise file.error(
                f"labels of shape {np.shape(file.values)} are {what}; store classes as (N,){cure}"
            )
    return "regression"


WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)
"""A whole number as it is printed; int() reads more, such as 1_0, 007 and +7, which are names."""
CODE = re.compile(r"[+-]?0\d|\+\d+$|-0$", re.ASCII)
"""How a number begins that is not printed so."""
MARKS = {"false": "0", "true": "1"}
NO_LABEL = {"nan", "na", "n/a", "<na>", "#n/a", "null", "none", "?"}
"""How programs write that there is no label, in small letters."""
MISSING = {*NO_LABEL, "nil", "-", "."}
"""How programs write that a number is missing; beside words it may well be a class."""
COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
"""A number as it is written where the decimal point is a comma."""

Look = Literal[
    "whole", "codes", "decimals", "numbers", "text", "hot", "whole columns",
    "text columns", "columns",
]  # fmt: skip
ONE_COLUMN: tuple[Look, ...] = ("whole", "codes", "decimals", "numbers", "text")


def looks_of(file: Labels) -> set[Look]:
    """What the labels of a file look like: see `look` for those of one column; several columns are
    of 0 and 1, of whole numbers, of text or of other numbers."""
    values = file.values
    if isinstance(values, np.ndarray):
        kind = values.dtype.kind
        if values.ndim == 1:
            if kind in "iub":
                return {"whole"}
            return {float_look(values)} if kind == "f" else looks_of_cells(values)
        if kind not in "iubf":
            return {look_of_columns(map(str, values.flat), text="text columns")}
        is_hot, is_whole = bool(np.isin(values, (0, 1)).all()), kind in "iub"
        if kind == "f":
            is_whole = float_look(values) == "decimals"
        return {"hot" if is_hot else "whole columns" if is_whole else "columns"}
    if not any(isinstance(cell, tuple) for cell in values):
        return looks_of_cells(values)
    return {look_of_columns((cell for row in values for cell in row), text="columns")}


def look_of_columns(cells: Iterable[str], *, text: Look) -> Look:
    """What the cells of several columns look like; `text` is what those with words are called."""
    marks = [MARKS.get(cell.strip().lower(), cell.strip()) for cell in cells]
    looks = set(map(look, marks))
    if all(NUMBER.fullmatch(cell) and float(cell) in (0, 1) for cell in marks):
        return "hot"
    if looks <= {"whole", "decimals"}:
        return "whole columns"
    return text if "text" in looks and "numbers" not in looks else "columns"


def looks_of_cells(cells: Iterable[Any]) -> set[Look]:
    """What the cells of one column look like."""
    return {look(cell) for cell in {str(cell).strip() for cell in cells}}


def float_look(values: np.ndarray) -> Look:
    """Whether numbers (N, ...) are whole ones but for what is missing, which a library may have
    made of integers."""
    there = values[~np.isnan(values)]
    return (
        "decimals" if np.all(np.floor(there) == there) and np.isfinite(there).all() else "numbers"
    )


def look(cell: str) -> Look:
    """What one label is: a whole number as it is printed; whole with a sign or zeros in front,
    which no number is printed with; whole with decimals or an exponent; another number; text.

    >>> [look(cell) for cell in ("1", "01", "1.0", "1.5", "one")]
    ['whole', 'codes', 'decimals', 'numbers', 'text']
    """
    if WHOLE.fullmatch(cell):
        return "whole"
    if not NUMBER.fullmatch(cell):
        return "text"
    if CODE.match(cell):
        return "codes"
    return "decimals" if float(cell).is_integer() else "numbers"


def subtask_of_column(files: Sequence[Labels], found: set[Look], rules: LabelRules) -> Subtask:
    """Kind of target of one column with these looks.

    Raises:
        UserError: it may be classes or values, and nothing says which.
    """
    names = rules.class_names or stated_names(files)
    count = rules.num_classes if names is None else len(names)
    if rules.predicts == "numbers" and "text" not in found:
        return "regression"
    if (count or 0) > 1:
        return "multiclass"
    if "text" in found:
        for file in files:
            refuse_strays(file)
        return "multiclass"
    if found <= {"whole", "codes"}:
        return "multiclass"
    if count == 1 or ("numbers" in found and "codes" not in found):
        return "regression"
    if rules.predicts == "classes" and "numbers" not in found:
        return "multiclass"
    cells = dict.fromkeys(str(cell).strip() for file in files for cell in file.cells())
    raise UserError(
        f"the labels ({listed(list(cells), 4)}) may be classes or values: set data.subtask ="
        ' "multiclass" or "regression", or model.head.head_type to "classification" or "regression"'
    )


def refuse_strays(file: Labels) -> None:
    """Text in a column of classes that was meant as a number: with a decimal comma, or beside
    numbers where these are no whole ones or where all of it says that there is none.

    Raises:
        UserError: the cells, with their samples.
    """
    cells = [(identity, str(cell)) for identity, cell in zip(file.ids, file.cells(), strict=True)]
    texts = {identity: cell for identity, cell in cells if look(cell.strip()) == "text"}
    words, rest = {cell.strip().lower() for cell in texts.values()}, len(cells) - len(texts)
    each = [f'"{cell}" of {identity}' for identity, cell in texts.items()]
    shown = listed(each, 5)
    cure = 'or, where each is a class, set data.subtask = "multiclass"'
    if texts and all(map(COMMA.fullmatch, words)):
        text = f"labels with a decimal comma ({shown}): write a point; {cure}"
        raise file.error(ended(with_all(text, each, 5)))
    if texts and rest and (words <= MISSING or looks_of(file) & {"numbers", "decimals"}):
        text = (
            f"labels that are no number ({shown}) beside {rest} that are: correct them, leave these"
            f" samples out, {cure}"
        )
        raise file.error(ended(with_all(text, each, 5)))


def refuse_values(file: Labels, rules: LabelRules) -> None:
    """Labels that nothing states the kind of, and that are taken for classes, look like classes.

    Raises:
        UserError: they look like values, or may be either.
    """
    found = looks_of(file)
    if not found or not found <= set(ONE_COLUMN):
        return
    if subtask_of_column([file], found, rules) == "regression":
        cells = list(dict.fromkeys(str(cell).strip() for cell in file.cells()))
        raise file.error(
            f"the labels are numbers ({listed(cells, 4)}): set data.subtask = "
            '"regression", or "multiclass" where each number is a class'
        )
