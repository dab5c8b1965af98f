"""What the colours of a plot of samples mean: classes, sets of labels, values, columns of a table.

N samples, K classes or targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glovita_lib.figures import AMBER, BLUE, GREEN, INK, ORANGE, PINK, SKY
from glovita_lib.prediction_csv import THRESHOLD
from glovita_lib.spec import UserError
from glovita_lib.tables import read_csv

PALETTE = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, "#7A2FD0", "#5A2A00", INK, "#CFC76A")
"""Okabe and Ito's colours and four that are as far from them with any colour vision."""
MARKERS = ("circle", "triangle", "square", "diamond", "cross")
"""Shapes that tell classes of one colour apart; the classes go through the colours first."""
STYLES = len(PALETTE) * len(MARKERS)
UNKNOWN = "#C4C4C4"
WHOLE_NUMBERS = 20  # different whole numbers up to which a column holds classes
NO_LABEL = "no label"


@dataclass(frozen=True, slots=True)
class Coloring:
    """One property of the samples, as classes or as numbers."""

    title: str
    names: tuple[str, ...]
    """Of the classes, in the order of the legend; empty for numbers."""
    codes: np.ndarray
    """Class (N,) int64 of each sample, -1 where it is not known; all -1 for numbers."""
    values: np.ndarray | None
    """Number (N,) float64 of each sample, NaN where it is not known; None for classes."""

    def words(self) -> list[str]:
        """The property of each sample as text; empty where it is not known."""
        if self.values is None:
            return [self.names[code] if code >= 0 else "" for code in self.codes]
        return ["" if np.isnan(value) else f"{value:.7g}" for value in self.values]


def style(place: int) -> tuple[str, str]:
    """Colour and marker of a class."""
    return PALETTE[place % len(PALETTE)], MARKERS[place // len(PALETTE) % len(MARKERS)]


# ---------------------------------------------------------------------- what is known of samples


def classes(title: str, codes: np.ndarray, names: Sequence[str]) -> Coloring:
    """One class a sample, out of a list of names; classes without samples are left out."""
    used = np.unique(codes[codes >= 0])
    place = np.full(len(names) + 1, -1)  # the last one is found by -1
    place[used] = np.arange(len(used))
    return Coloring(title, tuple(names[code] for code in used), place[codes], None)


def numbers(title: str, values: np.ndarray) -> Coloring:
    """One number a sample."""
    values = np.asarray(values, np.float64)
    return Coloring(title, (), np.full(len(values), -1), values)


def words(title: str, texts: Sequence[str]) -> Coloring:
    """One word a sample, the most frequent first; an empty one is not known."""
    found, codes, counts = np.unique(
        np.array(texts, dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    order = order[found[order] != ""]
    place = np.full(len(found), -1)
    place[order] = np.arange(len(order))
    return Coloring(title, tuple(found[order].tolist()), place[codes], None)


def label_sets(title: str, labels: np.ndarray, names: Sequence[str]) -> Coloring:
    """Labels (N, K) 0/1: samples with the same set of labels have the same colour."""
    texts = [" + ".join(names[k] for k in np.flatnonzero(row)) or NO_LABEL for row in labels > 0.5]
    return words(title, texts)


def of_targets(
    title: str, targets: np.ndarray, subtask: str, names: Sequence[str]
) -> list[Coloring]:
    """Truth of the samples: their class, their set of labels, or each target of a regression.

    Args:
        targets: (N,) class indices, or (N, K) labels or values.
        names: K names.
    """
    if subtask == "multiclass":
        return [classes(title, targets, names)]
    if subtask == "multilabel":
        return [label_sets(title, targets, names)]
    several = targets.shape[1] > 1
    return [
        numbers(f"{title} {name}" if several else title, column)
        for name, column in zip(names, targets.T, strict=True)
    ]


def of_scores(title: str, scores: np.ndarray, subtask: str, names: Sequence[str]) -> list[Coloring]:
    """What a model predicts from its scores (N, K): as of_targets."""
    if subtask == "multiclass":
        return of_targets(title, scores.argmax(1), subtask, names)
    if subtask == "multilabel":
        return of_targets(title, scores >= THRESHOLD, subtask, names)
    return of_targets(title, scores, subtask, names)


def of_mistakes(truth: Coloring, prediction: Coloring) -> Coloring:
    """Right or wrong; of numbers the absolute error."""
    if truth.values is not None:
        return numbers("absolute error", np.abs(truth.values - prediction.values))
    pairs = zip(truth.words(), prediction.words(), strict=True)
    wrong = np.array([first != second for first, second in pairs], np.int64)
    return classes("mistakes", wrong, ("right", "wrong"))


# ---------------------------------------------------------------------- tables


def of_column(path: Path, column: str, ids: Sequence[Sequence[str]]) -> Coloring:
    """A column of a CSV file with the column id.

    Numbers are a continuous scale, but at most 20 different whole numbers, and words, are classes.

    Args:
        ids: for each sample the ids that it may have in the file, the first one that is there
            counts.

    Raises:
        UserError: no such file or column, an id twice, or a file that has none of the samples.
    """
    rows = read_csv(path, ("id", column))
    table = {row["id"]: row[column] for row in rows}
    if len(table) < len(rows):
        raise UserError(f"{path}: some ids occur twice; give each sample one row")
    texts = [next((table[name] for name in names if name in table), "") for names in ids]
    if not any(any(name in table for name in names) for names in ids) and len(ids):
        raise UserError(
            f"{path} has none of the samples: its ids are like {next(iter(table), 'none')!r}, those"
            f" of the samples like {ids[0][0]!r}; write the latter into the column id"
        )
    values = as_numbers(texts)
    if values is None:
        return words(column, texts)
    known = np.unique(values[~np.isnan(values)])
    if len(known) <= WHOLE_NUMBERS and (known == np.round(known)).all():
        codes = np.where(np.isnan(values), -1, np.searchsorted(known, values))
        return Coloring(column, tuple(f"{value:.0f}" for value in known), codes, None)
    return numbers(column, values)


def as_numbers(texts: Sequence[str]) -> np.ndarray | None:
    """Cells as finite numbers, NaN where empty or not finite; None where one is a word."""
    try:
        values = np.array([float(text) if text else np.nan for text in texts], np.float64)
    except ValueError:
        return None
    return np.where(np.isfinite(values), values, np.nan)
