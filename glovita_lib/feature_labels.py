"""Labels of precomputed features: from the feature file or a CSV table, as targets.

N samples, K classes or targets, D width.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from glovita_lib.feature_sources import BagSource, FileBags, FolderBags, VectorSource
from glovita_lib.hdf5 import FeatureFile
from glovita_lib.samples import Source
from glovita_lib.spec import UserError
from glovita_lib.spec_features import PrecomputedData
from glovita_lib.tables import read_csv


@dataclass(slots=True)
class Collection:
    """The samples of one file or folder, before splits."""

    where: str
    ids: list[str]
    rows: np.ndarray  # (N,) where they are in the file or folder
    named: bool  # whether the ids are names, that mean the same in other files
    labels: np.ndarray | None  # as stored: numbers or names, (N,) or (N, K)
    groups: list[str] | None
    class_names: tuple[str, ...] | None
    subtask: str | None  # where the file says so
    split_of: list[str] | None  # from the column split of labels_file
    vectors: FeatureFile | None
    bags: FileBags | FolderBags | None

    @property
    def width(self) -> int:
        """D."""
        return self.vectors.width if self.bags is None else self.bags.width

    @property
    def stored(self) -> int:
        """Samples of the file or folder, also those that no table lists."""
        return len(self.bags.lengths) if self.vectors is None else len(self.vectors)

    def source(self, rows: np.ndarray) -> Source:
        """Source of some of the samples."""
        if self.bags is not None:
            return BagSource(self.bags, self.rows[rows])
        return VectorSource(self.vectors.rows, self.rows[rows])


def read_table(spec: PrecomputedData) -> dict[str, dict[str, str]]:
    """Rows of labels_file by id.

    Raises:
        UserError: no such file or column, or an id twice.
    """
    path = Path(spec.data_root_dir) / spec.labels_file
    wanted = [spec.id_column, *label_columns(spec)]
    wanted += [spec.group_column] if spec.group_column else []
    wanted += ["split"] if spec.split_source == "csv" else []
    rows = read_csv(path, wanted)
    table = {row[spec.id_column]: row for row in rows}
    if len(table) < len(rows):
        counts = Counter(row[spec.id_column] for row in rows)
        twice = counts.most_common(1)[0][0]
        raise UserError(f"{path}: id {twice!r} occurs twice; give each sample one row")
    return table


def label_columns(spec: PrecomputedData) -> tuple[str, ...]:
    """Label columns as a tuple."""
    return (spec.label_column,) if isinstance(spec.label_column, str) else spec.label_column


def with_table(
    spec: PrecomputedData, collection: Collection, table: dict[str, dict[str, str]] | None
) -> Collection:
    """The samples that the CSV lists, with its labels, groups and splits, where there is one.

    Raises:
        UserError: it lists none of them, or an empty label or group.
    """
    if table is None:
        return collection
    kept = [place for place, name in enumerate(collection.ids) if name in table]
    if not kept:
        raise UserError(
            f"{spec.labels_file}: no row for any sample of {collection.where}; its ids are"
            f" {', '.join(collection.ids[:3])} ..., in column {spec.id_column} stand"
            f" {', '.join(list(table)[:3]) or 'none'} ..."
        )
    ids = [collection.ids[place] for place in kept]
    rows = [table[name] for name in ids]
    columns = label_columns(spec)
    for column in (*columns, *([spec.group_column] if spec.group_column else [])):
        blank = [row[spec.id_column] for row in rows if not row[column]]
        if blank:
            raise UserError(
                f"{spec.labels_file}: column {column} is empty for {len(blank)} samples"
                f" ({', '.join(blank[:10])}); fill it in, or remove these samples"
            )
    labels = np.array([[row[column] for column in columns] for row in rows])
    numeric = as_numbers(labels)
    labels = labels if numeric is None else numeric
    group = spec.group_column
    groups = collection.groups and [collection.groups[place] for place in kept]
    return replace(
        collection,
        ids=ids,
        rows=collection.rows[kept],
        labels=labels[:, 0] if len(columns) == 1 else labels,
        class_names=columns if len(columns) > 1 else None,
        groups=[row[group] for row in rows] if group else groups,
        split_of=[row["split"] for row in rows] if spec.split_source == "csv" else None,
    )


def as_numbers(labels: np.ndarray) -> np.ndarray | None:
    """Cells as whole numbers or floats; None where one is something else."""
    for kind in (np.int64, np.float64):
        try:
            return labels.astype(kind)
        except (ValueError, OverflowError):
            continue
    return None


def resolve_subtask(spec: PrecomputedData, collections: list[Collection]) -> str:
    """Kind of target: as given, as the file says, or as the labels look.

    Raises:
        UserError: files that contradict each other, or whole numbers in columns, which may be
        classes or targets.
    """
    if spec.subtask is not None:
        return spec.subtask
    said = {c.subtask: c.where for c in collections if c.subtask is not None}
    if len(said) > 1:
        listed = ", ".join(f"{where} {subtask}" for subtask, where in said.items())
        raise UserError(f"feature files of different subtasks: {listed}; set data.subtask")
    if said:
        return next(iter(said))
    labels = [c.labels for c in collections]
    if all(label.ndim == 1 and label.dtype.kind in "iuUOb" for label in labels):
        return "multiclass"
    if all(label.ndim == 2 and np.isin(label, (0, 1)).all() for label in labels):
        return "multilabel"
    for c in collections:
        if c.labels.ndim == 2 and c.labels.dtype.kind in "iu":
            raise UserError(
                f"{c.where}: labels of shape {c.labels.shape} are whole numbers; store classes as"
                ' (N,), or set data.subtask = "regression"'
            )
    return "regression"


def resolve_names(
    spec: PrecomputedData, collections: list[Collection], subtask: str
) -> tuple[str, ...]:
    """Names of the classes or targets; a given number is checked.

    Raises:
        UserError: data.num_classes does not fit, or the files name different classes.
    """
    stored = {c.class_names: c.where for c in collections if c.class_names}
    if len(stored) > 1:
        listed = "; ".join(f"{where}: {', '.join(names[:20])}" for names, where in stored.items())
        raise UserError(
            f"feature files of different class_names ({listed}), so that a number would"
            " mean two classes; write the same list and labels to all of them"
        )
    names = spec.class_names or next(iter(stored), None)
    labels = [c.labels for c in collections]
    if names is None and subtask != "multiclass":
        count = 1 if labels[0].ndim == 1 else labels[0].shape[1]
        names = ("target",) if count == 1 else tuple(f"target_{i}" for i in range(count))
    elif names is None and labels[0].dtype.kind in "iub":
        largest = max(int(label.max()) for label in labels)
        names = tuple(str(i) for i in range(max(largest + 1, spec.num_classes or 0)))
    elif names is None:
        names = tuple(sorted({str(entry) for label in labels for entry in label}))
    if spec.num_classes is not None and spec.num_classes != len(names):
        raise UserError(
            f"data.num_classes = {spec.num_classes}, but the labels of {collections[0].where} have"
            f" {len(names)} classes ({', '.join(names[:20])}); set num_classes = {len(names)} or"
            " leave it out"
        )
    return names


def encode(collection: Collection, subtask: str, names: tuple[str, ...]) -> np.ndarray:
    """Labels as targets: (N,) int64, or (N, K) float32.

    Raises:
        UserError: a label that is no class, a number that is none.
    """
    labels, where = collection.labels, collection.where
    if subtask != "multiclass":
        return encode_numbers(collection, subtask, names)
    if labels.ndim != 1:
        raise UserError(f"{where}: labels of shape {labels.shape} are not one class a sample")
    if labels.dtype.kind in "iub":
        values = labels.astype(np.int64)
        bad = np.flatnonzero((values < 0) | (values >= len(names)))
        known = f"0 to {len(names) - 1}"
    else:
        index = {name: i for i, name in enumerate(names)}
        values = np.array([index.get(str(entry), -1) for entry in labels], np.int64)
        bad = np.flatnonzero(values < 0)
        known = ", ".join(names[:20])
    if len(bad):
        raise UserError(
            f"{where}: label {labels[bad[0]]!s} of sample {collection.ids[bad[0]]} is no class"
            f" ({len(bad)} samples); classes are {known}"
        )
    return values


def encode_numbers(collection: Collection, subtask: str, names: tuple[str, ...]) -> np.ndarray:
    """Multilabel or regression targets (N, K) float32."""
    labels, where = collection.labels, collection.where
    if labels.dtype.kind not in "iubf":
        raise UserError(f"{where}: labels of a {subtask} must be numbers, found {labels.flat[0]!s}")
    with np.errstate(over="ignore"):  # becomes infinity, which is refused
        values = labels.reshape(len(labels), -1).astype(np.float32)
    if values.shape[1] != len(names):
        raise UserError(
            f"{where}: labels have {values.shape[1]} columns, but {len(names)} names"
            f" ({', '.join(names[:20])})"
        )
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        raise UserError(
            f"{where}: labels of {len(bad)} samples are NaN or beyond float32 (first sample"
            f" {collection.ids[bad[0]]}); correct them or leave the samples out"
        )
    if subtask == "multilabel" and not np.isin(values, (0, 1)).all():
        raise UserError(f"{where}: multilabel labels are 0 or 1")
    return values
