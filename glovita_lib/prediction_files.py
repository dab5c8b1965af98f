"""Files of predictions: a CSV table of a row a sample and, of many classes, an HDF5 file beside it.

N samples, K classes or targets, M frames of all videos.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from glovita_lib.errors import UserError
from glovita_lib.files import as_json, atomic_path, sync, write_csv_to
from glovita_lib.metrics_classification import THRESHOLD, Scores, blocks_of

MOST_COLUMNS = 100  # classes of which the table holds every score; of more an HDF5 file does
MOST_NAMED = 100  # labels of a sample in the table where it does not hold all
TOP = 5  # classes in the table where it does not hold all
TINY = 1e-300  # probabilities below it have few digits, or none
DIGEST = "csv_sha256"  # attribute of an HDF5 file: of the table that it belongs to


@dataclass(frozen=True)
class Table:
    """Predictions as read from a file; of frames ids are those of videos, with an array each."""

    ids: list[str]
    targets: np.ndarray | None  # (N,) int64 | (N, K)
    scores: Scores  # (N, K), of videos of all their frames
    starts: np.ndarray | None = None  # (N + 1,) first frame of each video, and all frames


def is_wide(subtask: str, outputs: Sequence[Any]) -> bool:
    """Whether outputs of a subtask are too many classes for a table."""
    return subtask != "regression" and len(outputs) > MOST_COLUMNS


def all_scores(path: Path) -> Path:
    """The HDF5 file beside a table of predictions."""
    return path.with_suffix(".h5")


def prediction_paths(path: Path) -> list[Path]:
    """A table of predictions and the HDF5 file beside it, where there is one."""
    return [path, *([all_scores(path)] if is_ours(all_scores(path)) else [])]


# ------------------------------------------------------------------------------------- columns


def write_prediction_files(
    path: Path | str,
    *,
    ids: Sequence[str],
    targets: np.ndarray | None,
    scores: Scores,
    subtask: str,
    class_names: Sequence[str],
) -> None:
    """CSV of predictions: id, the truth unless unlabelled, the prediction, the probabilities; of
    more than 100 classes the best five, and an HDF5 file beside it with all scores.

    multiclass: label, prediction (names), p_<class>; regression of one target: label, prediction;
    multilabel and several targets: label_<name> ..., prediction_<name> ..., and p_<class> for
    multilabel, where a probability of at least 0.5 predicts 1, and logit_<class>, which tell apart
    what the probabilities round to 1; of multiclass these are there where probabilities round to 0,
    and log_odds_<class> where those of an ensemble say too little. Numbers read back equal.

    More than 100 classes: label, prediction, probability, top1, p_top1 ... p_top5. Of multilabel
    label lists the first 100 that are set, prediction those of the best five that are predicted,
    and probability theirs, all as JSON; label_count and prediction_count are how many there are.
    HDF5: `ids` (N,), `labels` (N,) class indices, of multilabel
    (N, K) 0 or 1, `class_names` (K,), and `logits` (N, K) float32 of a network, of which softmax,
    or sigmoid of multilabel, gives the probabilities. Where there are none (votes of neighbours,
    means of ensembles) `probabilities` (N, K) float64, and `log_odds` (N, K) float64 where those of
    an ensemble say too little.

    Args:
        ids: N ids.
        targets: (N,) class indices; (N, K) labels or values; None: unlabelled.
        scores: (N, K).
        subtask: multiclass, multilabel or regression.
        class_names: K names.

    Raises:
        UserError: disk full, read-only ...
    """
    shape = scores.values.shape
    assert shape == (len(ids), len(class_names)), (shape, len(ids), len(class_names))
    columns: dict[str, Iterable[Any]] = {"id": ids}
    if not is_wide(subtask, class_names):
        columns |= score_columns(targets, scores, subtask, class_names)
        write_table(Path(path), columns, None)
        return
    columns |= wide_columns(targets, scores, subtask, class_names)

    def fill(file: h5py.File) -> None:
        file.attrs["subtask"] = subtask
        write_texts(file, "class_names", class_names)
        write_texts(file, "ids", ids)
        if targets is not None:
            file["labels"] = targets.astype(np.uint8 if subtask == "multilabel" else np.int64)
        if scores.given is not None:
            file["logits"] = scores.given
            return
        file["probabilities"] = scores.values
        if not is_told(scores, subtask):
            file["log_odds"] = scores.ranked

    write_table(Path(path), columns, fill)


def score_columns(
    targets: np.ndarray | None, scores: Scores, subtask: str, class_names: Sequence[str]
) -> dict[str, Iterable[Any]]:
    """Truth, prediction and all scores by column."""
    predicted, names = scores.predicted(subtask), np.array(class_names, dtype=object)
    columns: dict[str, Iterable[Any]] = {}
    if subtask == "multiclass":
        if targets is not None:
            columns["label"] = names[targets].tolist()
        columns["prediction"] = names[predicted].tolist()
    else:
        labels, predictions = value_columns(subtask, class_names)
        if targets is not None:
            whole = targets.astype(np.int64) if subtask == "multilabel" else targets
            columns |= dict(zip(labels, whole.T, strict=True))
        shown = predicted.astype(np.int64) if subtask == "multilabel" else predicted
        columns |= dict(zip(predictions, shown.T, strict=True))
    return columns if subtask == "regression" else columns | class_columns(scores, subtask, names)


def class_columns(
    scores: Scores, subtask: str, class_names: Iterable[str]
) -> dict[str, Iterable[Any]]:
    """Probabilities by column, and beside these what they do not say: logits, or log-odds where
    there are none."""
    names = tuple(class_names)
    columns = {f"p_{name}": column for name, column in zip(names, scores.values.T, strict=True)}
    if subtask == "multilabel":
        kind, kept = "logit", scores.ranked
    elif is_told(scores, subtask):
        return columns
    elif scores.given is not None:
        kind, kept = "logit", scores.given.astype(np.float64)
    else:
        kind, kept = "log_odds", scores.ranked
    return columns | {f"{kind}_{name}": each for name, each in zip(names, kept.T, strict=True)}


def is_told(scores: Scores, subtask: str) -> bool:
    """Whether probabilities say what ranks samples and what is predicted."""
    if scores.log_odds is None:
        return True
    return all(is_part_told(scores.of(part), subtask) for part in blocks_of(len(scores.values)))


def is_part_told(scores: Scores, subtask: str) -> bool:
    """As `is_told`, of some samples."""
    told = Scores.of_probabilities(scores.values, subtask)
    if scores.given is not None and (np.isfinite(scores.ranked) & (scores.values < TINY)).any():
        return False  # they have few digits, or none
    if scores.given is None and not np.allclose(told.ranked, scores.ranked, 1e-9, 0, True):
        return False
    return np.array_equal(told.predicted(subtask), scores.predicted(subtask))


def kept_scores(scores: Scores, subtask: str) -> Scores:
    """Scores as a file has them that holds probabilities, and what these do not say."""
    return Scores.of_probabilities(scores.values, subtask) if is_told(scores, subtask) else scores


def value_columns(subtask: str, class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Columns of the truth and of the prediction, one a class or target."""
    if subtask == "regression" and len(class_names) == 1:
        return ["label"], ["prediction"]
    return [f"label_{name}" for name in class_names], [f"prediction_{name}" for name in class_names]


def wide_columns(
    targets: np.ndarray | None, scores: Scores, subtask: str, class_names: Sequence[str]
) -> dict[str, Iterable[Any]]:
    """Truth, prediction and its probability, and the best five classes, by column; see
    `write_prediction_files`."""
    names, values = np.array(class_names, dtype=object), scores.values
    columns: dict[str, Iterable[Any]] = {}
    best, said = best_classes(scores), scores.predicted(subtask)
    rows = np.arange(len(best))
    if subtask == "multilabel":
        if targets is not None:
            there = [np.flatnonzero(row > THRESHOLD) for row in targets]
            columns["label"] = [as_list(names[own[:MOST_NAMED]]) for own in there]
            columns["label_count"] = list(map(len, there))
        predicted = [own[row[own]] for own, row in zip(best, said, strict=True)]
        columns["prediction"] = [as_list(names[own]) for own in predicted]
        columns["prediction_count"] = said.sum(1)
        pairs = zip(predicted, values, strict=True)
        columns["probability"] = [as_list(row[own]) for own, row in pairs]
    else:
        if targets is not None:
            columns["label"] = names[targets].tolist()
        columns["prediction"] = names[said].tolist()
        columns["probability"] = values[rows, said]
    for place in range(TOP):
        columns[f"top{place + 1}"] = names[best[:, place]].tolist()
        columns[f"p_top{place + 1}"] = values[rows, best[:, place]]
    return columns


def as_list(values: np.ndarray) -> str:
    """Names or numbers as a JSON list."""
    return json.dumps(as_json(values), ensure_ascii=False)


def best_classes(scores: Scores) -> np.ndarray:
    """The five best classes (N, 5), the best first, of equal ones the first."""
    best, largest = np.empty((len(scores.values), TOP), np.int64), sys.float_info.max
    for part in blocks_of(len(best)):
        left = np.nan_to_num(scores.ranked[part], nan=np.inf, posinf=largest, neginf=-largest)
        rows = np.arange(len(left))
        for place in range(TOP):
            found = left.argmax(1)
            best[part, place] = found
            left[rows, found] = -np.inf
    return best


# ------------------------------------------------------------------------------------- writing


def write_table(
    path: Path, columns: dict[str, Iterable[Any]], fill: Callable[[h5py.File], None] | None
) -> None:
    """A table and, if `fill` writes one, the HDF5 file beside it, whole or not at all; neither
    stands beside one of an earlier writing: a kill between the two leaves no table.

    Raises:
        UserError: disk full, read-only ...
    """
    arrays_path = all_scores(path)
    with atomic_path(path) as table:
        with open(table, "wb") as file:
            write_csv_to(file, columns, zip(*columns.values(), strict=True))
        sync(table)
        if fill is None:
            if is_ours(arrays_path):
                arrays_path.unlink()
            return
        with atomic_path(arrays_path) as arrays:
            with h5py.File(arrays, "w") as content:
                fill(content)
                content.attrs[DIGEST] = digest(table)
            sync(arrays)
            path.unlink(missing_ok=True)


def write_texts(file: h5py.File, name: str, values: Sequence[str]) -> None:
    """A dataset of UTF-8 strings."""
    file.create_dataset(name, data=np.array(values, object), dtype=h5py.string_dtype())


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_ours(path: Path) -> bool:
    """Whether an HDF5 file was written beside a table."""
    with suppress(OSError), h5py.File(path) as file:
        return DIGEST in file.attrs
    return False


# ------------------------------------------------------------------------------------- reading


def read_predictions(path: Path | str, *, subtask: str, class_names: Sequence[str]) -> Table:
    """What `write_prediction_files` wrote.

    Raises:
        UserError: missing, damaged, of other classes, or files of two writings.
    """
    if is_wide(subtask, class_names):
        return read_wide(Path(path), subtask, class_names)
    columns = read_columns(path)
    labels, predictions = value_columns(subtask, class_names)
    truth = ["label"] if subtask == "multiclass" else labels
    if "id" not in columns:
        raise UserError(f"{path} is of other classes: it has no column id")
    if subtask == "regression":
        scores = Scores(numbers_in(columns, path, predictions))
    else:
        scores = scores_in(columns, path, subtask, class_names)
    index = {name: i for i, name in enumerate(class_names)}
    try:
        targets: np.ndarray | None = None
        if truth[0] in columns and subtask == "multiclass":
            targets = np.array([index[name] for name in columns["label"]], dtype=np.int64)
        elif truth[0] in columns:
            targets = np.array([columns[name] for name in truth], dtype=np.float64).T
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is of other classes: {error}") from None
    return Table(list(columns["id"]), targets, scores)


def scores_in(
    columns: dict[str, Sequence[str]], path: Path | str, subtask: str, class_names: Sequence[str]
) -> Scores:
    """What `class_columns` wrote.

    Raises:
        UserError: of other classes.
    """
    values = numbers_in(columns, path, [f"p_{name}" for name in class_names])
    kinds = [kind for kind in ("logit", "log_odds") if f"{kind}_{class_names[0]}" in columns]
    if not kinds:
        return Scores.of_probabilities(values, subtask)
    kept = numbers_in(columns, path, [f"{kinds[0]}_{name}" for name in class_names])
    if kinds == ["logit"] and subtask == "multiclass":
        return with_logits(values, kept.astype(np.float32))
    return Scores(values, kept)


def numbers_in(
    columns: dict[str, Sequence[str]], path: Path | str, names: Sequence[str]
) -> np.ndarray:
    """Numbers (N, K) of columns.

    Raises:
        UserError: a column is missing, or holds others.
    """
    missing = [name for name in names if name not in columns]
    if missing:
        raise UserError(f"{path} is of other classes: it has no column {missing[0]}")
    try:
        return np.array([columns[name] for name in names], dtype=np.float64).T
    except ValueError as error:
        raise UserError(f"{path} is of other classes: {error}") from None


def as_read(ids: list[str], targets: np.ndarray | None, scores: Scores, subtask: str) -> Table:
    """Predictions that were written, as `read_predictions` gives them."""
    if targets is not None and subtask != "multiclass":
        targets = targets.astype(np.float64)
    wide = is_wide(subtask, range(scores.values.shape[1]))
    if scores.given is None if wide else subtask == "multiclass":
        scores = kept_scores(scores, subtask)
    return Table(ids, targets, scores)


def with_logits(values: np.ndarray, logits: np.ndarray) -> Scores:
    """Scores of classes whose probabilities (N, K) do not say what the logits are."""
    return replace(Scores.of_logits(logits, "multiclass"), values=values)


def read_columns(path: Path | str) -> dict[str, Sequence[str]]:
    """Cells of a table by column.

    Raises:
        UserError: missing, empty or no table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        cells = zip(*rows, strict=True) if rows else [()] * len(header)
        return dict(zip(header, cells, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_wide(path: Path, subtask: str, class_names: Sequence[str]) -> Table:
    """What the HDF5 file beside a table holds, see `read_predictions`."""
    with beside(path) as file:
        stored = read_texts(file, "class_names")
        place = {name: number for number, name in enumerate(stored)}
        missing = [name for name in class_names if name not in place]
        if missing or len(stored) != len(class_names):
            what = f"no class {missing[0]}" if missing else f"{len(stored)} classes"
            raise UserError(f"{file.filename} is of other classes: it has {what}")
        kinds = [kind for kind in ("logits", "probabilities", "log_odds") if kind in file]
        parts = [file[kind][:] for kind in kinds]
        targets = file["labels"][:] if "labels" in file else None
        ids = read_texts(file, "ids")
    order = np.array([place[name] for name in class_names])
    if not np.array_equal(order, np.arange(len(order))):
        parts = [part[:, order] for part in parts]
        if targets is not None:
            targets = targets[:, order] if targets.ndim == 2 else np.argsort(order)[targets]
    if targets is not None and subtask == "multilabel":
        targets = targets.astype(np.float64)
    if kinds == ["logits"]:
        scores = Scores.of_logits(parts[0], subtask)
    else:
        values, *odds = parts
        scores = Scores(values, *odds) if odds else Scores.of_probabilities(values, subtask)
    return Table(ids, targets, scores)


@contextmanager
def beside(path: Path) -> Iterator[h5py.File]:
    """The HDF5 file that was written with a table, open.

    Raises:
        UserError: either is missing or damaged, or they are of two writings.
    """
    name = all_scores(path)
    try:
        written = digest(path)
        with h5py.File(name) as file:
            if file.attrs.get(DIGEST) != written:
                raise UserError(
                    f"{path} is not the table that {name.name} was written with: put back the one"
                    " that was, or predict again"
                )
            yield file
    except (OSError, KeyError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        at = path if getattr(error, "filename", None) == str(path) else name
        raise UserError(f"cannot read {at}: {reason}; predict again") from None


def read_texts(file: h5py.File, name: str) -> list[str]:
    """A dataset of UTF-8 strings."""
    return file[name].asstr()[:].tolist()
