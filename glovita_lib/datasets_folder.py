"""Folders of images with labels from folder names, JSON or CSV, and any way to split them.

N samples, K classes or targets.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from glovita_lib.dist import mix
from glovita_lib.labels import LabelRules, encode, is_missing
from glovita_lib.leakage import duplicate_notes, refuse_shared_groups, some_of
from glovita_lib.readers import FILE_THREADS, FileSource, Header, read_headers
from glovita_lib.samples import Data, Split, read_data, refuse_fold
from glovita_lib.spec import UserError
from glovita_lib.spec_data import GenericImageData
from glovita_lib.spec_errors import meant
from glovita_lib.splits import FOLDS, fold_splits, folds, strata
from glovita_lib.tables import (
    ImageFolder,
    LabelTable,
    Problems,
    csv_labels,
    json_labels,
    read_splits,
    walk,
)

ALL = "all"  # the one split of a data set that folds are drawn from


@read_data.register
def _(spec: GenericImageData, *, seed: int) -> Data:
    """A folder of images."""
    subtask = subtask_of(spec)
    check_fields(spec)
    base = Path(spec.data_root_dir)
    folder = base / spec.images_dir
    images = ImageFolder(folder, base, walk(folder, spec.allowed_exts))
    report: list[str] = []
    problems = Problems(spec.strict)
    table = label_table(spec, images)
    members = members_of(spec, images, table, problems, report)
    kept = usable(spec, images, table, members, subtask, problems)
    problems.settle(report)
    ids = [identity for identity in unique(members) if identity in kept]
    targets, class_names = encode([kept[i].label for i in ids], ids, rules_of(spec, subtask))
    samples = Samples(ids, targets, [kept[i].header for i in ids], groups_of(spec, table, ids))
    rows = rows_of(spec, members, samples, subtask, seed)
    if samples.groups is not None:
        refuse_shared_groups(ids, samples.groups, rows)
    report += duplicate_notes([images.path(i) for i in ids], ids, targets, rows)
    report += notes(samples, rows["train"], subtask, class_names)
    return Data(
        name="generic_image_dataset",
        splits={name: split_of(spec, images, samples, rows[name]) for name in rows},
        subtask=subtask,
        class_names=class_names,
        channels=spec.channels,
        bit_depth=spec.bit_depth,
        report=report,
    )


@dataclass(frozen=True, slots=True)
class Kept:
    """An image that can be used."""

    label: Any
    header: Header


@dataclass(frozen=True, slots=True)
class Samples:
    """All images of a data set, in order, before they are split."""

    ids: list[str]
    targets: np.ndarray
    headers: list[Header]
    groups: list[str] | None


# ---------------------------------------------------------------------- the spec


def subtask_of(spec: GenericImageData) -> str:
    """Kind of target, from subtask, else from task.

    Raises:
        UserError: the two contradict each other.
    """
    if spec.subtask is None:
        return "regression" if spec.task == "Regression" else "multiclass"
    if spec.task is not None and (spec.task == "Regression") != (spec.subtask == "regression"):
        raise UserError(
            f'data.task = "{spec.task}" contradicts data.subtask = "{spec.subtask}": leave task out'
        )
    return spec.subtask


def check_fields(spec: GenericImageData) -> None:
    """Refuse fields that do not go together.

    Raises:
        UserError: which, and what would go.
    """
    several = not isinstance(spec.label_column, str)
    subtask = subtask_of(spec)
    wrong = {
        'data.group_column needs data.label_source = "csv"': spec.group_column is not None
        and spec.label_source != "csv",
        'data.split_source = "column" needs data.label_source = "csv"': spec.split_source
        == "column"
        and spec.label_source != "csv",
        'several data.label_column need data.label_source = "csv"': several
        and spec.label_source != "csv",
        f'data.subtask = "{subtask}" takes one data.label_column': several
        and subtask == "multiclass",
        f'data.label_source = "folder" gives one class an image, not data.subtask = "{subtask}":'
        ' use "json" or "csv"': spec.label_source == "folder" and subtask != "multiclass",
    }
    lines = [text for text, is_wrong in wrong.items() if is_wrong]
    if lines:
        raise UserError("\n".join(lines))
    if spec.split_source in ("subdirs", "column"):
        refuse_fold(spec, f'data.split_source = "{spec.split_source}" has one split')


def rules_of(spec: GenericImageData, subtask: str) -> LabelRules:
    """How the labels are meant."""
    columns = None if isinstance(spec.label_column, str) else tuple(spec.label_column)
    return LabelRules(subtask, spec.class_names, spec.num_classes, columns, spec.label_separator)


# ---------------------------------------------------------------------- labels and members


def label_table(spec: GenericImageData, images: ImageFolder) -> LabelTable | None:
    """What the label file says; None where the folders are the labels."""
    base = Path(spec.data_root_dir)
    if spec.label_source == "folder":
        return None
    path = base / (spec.labels_file or f"labels.{spec.label_source}")
    if spec.label_source == "json":
        return json_labels(path, images)
    return csv_labels(
        path,
        images,
        path_column=spec.path_column,
        label_column=spec.label_column,
        group_column=spec.group_column,
        split_column=spec.split_column if spec.split_source == "column" else None,
    )


def members_of(
    spec: GenericImageData,
    images: ImageFolder,
    table: LabelTable | None,
    problems: Problems,
    report: list[str],
) -> dict[str, list[str]]:
    """Ids of each split; those of ALL where folds are drawn later.

    Raises:
        UserError: a split that does not exist, or an image in two splits.
    """
    if spec.split_source in ("kfold", "column") and table is not None:
        for name in table.missing:
            problems.add(name, "no such file")
        unused = len(set(images.ids) - set(table.labels))
        if unused:
            report.append(f"{unused} images of {images.folder} are not in the label file: not used")
    if spec.split_source == "kfold":
        return {ALL: images.ids if table is None else list(table.labels)}
    if spec.split_source == "splits_json":
        path = Path(spec.data_root_dir) / spec.split_file
        listed = read_splits(path, spec.fold)
        where = str(path)
    elif spec.split_source == "column":
        listed, where = {}, f"column {spec.split_column}"
        for identity, name in table.splits.items():
            listed.setdefault(name, []).append(identity)
    else:
        listed, where = by_first_folder(images), str(images.folder)
    members = {}
    for split, name in split_names(spec, listed, where).items():
        found = {entry: images.find(entry, prefix=name) for entry in listed[name]}
        for entry in [entry for entry, identity in found.items() if identity is None]:
            problems.add(entry, f"no such file (in split {name})")
        members[split] = [identity for identity in found.values() if identity is not None]
        again = len(listed[name]) - len(set(members[split])) - list(found.values()).count(None)
        if again > 0:
            report.append(f"{again} entries of split {name} name an image again: used once")
        members[split] = list(dict.fromkeys(members[split]))
    refuse_shared_images(spec, members)
    return members


def by_first_folder(images: ImageFolder) -> dict[str, list[str]]:
    """Ids by the first folder of their path."""
    listed: dict[str, list[str]] = {}
    for identity in images.ids:
        first, _, rest = identity.partition("/")
        if rest:
            listed.setdefault(first, []).append(identity)
    return listed


def split_names(spec: GenericImageData, listed: Iterable[str], where: str) -> dict[str, str]:
    """What the data set calls each split that is there.

    Raises:
        UserError: a split that must be there is not.
    """
    names = {
        "train": spec.train_split_name,
        "val": spec.val_split_name,
        "test": spec.test_split_name,
    }
    default_test = type(spec)().test_split_name
    for split, name in list(names.items()):
        if name in listed:
            continue
        if split == "test" and name == default_test:
            del names[split]
            continue
        known = ", ".join(listed) or "none"
        raise UserError(
            f'{where}: no split "{name}"{meant(name, list(listed))}; splits there: {known};'
            f" set data.{split}_split_name"
        )
    return names


def refuse_shared_images(spec: GenericImageData, members: dict[str, list[str]]) -> None:
    """Refuse an image in two splits; val and test of the same name are one split, as asked."""
    where: dict[str, str] = {}
    for split, ids in members.items():
        if split == "test" and spec.test_split_name == spec.val_split_name:
            continue
        for identity in ids:
            if where.setdefault(identity, split) != split:
                shared = [i for i in ids if where.get(i, split) != split]
                raise UserError(
                    f"{len(shared)} images are in the splits {where[identity]} and {split}:"
                    f" {', '.join(shared[:5])}{', ...' * (len(shared) > 5)}; keep each in one"
                )


def unique(members: dict[str, list[str]]) -> list[str]:
    """All ids, each once."""
    return list(dict.fromkeys(identity for ids in members.values() for identity in ids))


def usable(
    spec: GenericImageData,
    images: ImageFolder,
    table: LabelTable | None,
    members: dict[str, list[str]],
    subtask: str,
    problems: Problems,
) -> dict[str, Kept]:
    """The images that have a label, a group where groups are asked for, and a readable header."""
    names = {"train": spec.train_split_name, "val": spec.val_split_name}
    names["test"] = spec.test_split_name
    split_of_id = {i: names.get(split, "") for split, ids in members.items() for i in ids}
    ids = list(split_of_id)
    headers, broken = read_headers([images.path(i) for i in ids], threads=FILE_THREADS)
    kept = {}
    for number, (identity, header) in enumerate(zip(ids, headers, strict=True)):
        if table is None:
            label = class_folder(identity, split_of_id[identity], spec)
        else:
            label = table.labels.get(identity)
        if number in broken:
            problems.add(identity, broken[number].removeprefix(f"{images.path(identity)}: "))
        elif is_missing(label, subtask):
            problems.add(identity, "no label" if table else "in no class folder")
        elif spec.group_column and not table.groups.get(identity):
            problems.add(identity, f"no group in column {spec.group_column}")
        else:
            kept[identity] = Kept(label, header)
    return kept


def class_folder(identity: str, split: str, spec: GenericImageData) -> str | None:
    """Class of an image by its folder: the first one of its path, after that of its split."""
    folders = PurePosixPath(identity).parts[:-1]
    skips = spec.split_source == "subdirs" or len(folders) > 1
    if folders and folders[0] == split and skips:
        folders = folders[1:]
    return folders[0] if folders else None


def groups_of(spec: GenericImageData, table: LabelTable | None, ids: list[str]) -> list[str] | None:
    """Group of each image."""
    return [table.groups[i] for i in ids] if spec.group_column and table else None


# ---------------------------------------------------------------------- splits


def rows_of(
    spec: GenericImageData,
    members: dict[str, list[str]],
    samples: Samples,
    subtask: str,
    seed: int,
) -> dict[str, np.ndarray]:
    """Rows of each split among the samples."""
    if ALL not in members:
        place = {identity: row for row, identity in enumerate(samples.ids)}
        return {
            split: np.array([place[i] for i in ids if i in place], np.int64)
            for split, ids in members.items()
        }
    labels = strata(samples.targets, subtask, kept=spec.stratified)
    groups = None if samples.groups is None else np.array(samples.groups)
    fold_of = folds(labels, spec.n_folds, seed=mix(seed, FOLDS), groups=groups)
    return fold_splits(fold_of, spec.fold, spec.n_folds)


def split_of(
    spec: GenericImageData, images: ImageFolder, samples: Samples, rows: np.ndarray
) -> Split:
    """A split of files."""
    ids = [samples.ids[row] for row in rows]
    return Split(
        ids=ids,
        targets=samples.targets[rows],
        source=FileSource(
            [images.path(i) for i in ids],
            [samples.headers[row] for row in rows],
            channels=spec.channels,
            bit_depth=spec.bit_depth,
        ),
        groups=None if samples.groups is None else [samples.groups[row] for row in rows],
    )


def notes(
    samples: Samples, train: np.ndarray, subtask: str, class_names: tuple[str, ...]
) -> list[str]:
    """Lines on stacks and on classes without a training sample."""
    lines = []
    stacks = [i for i, h in zip(samples.ids, samples.headers, strict=True) if h.pages > 1]
    if stacks:
        lines.append(
            f"{len(stacks)} TIFF files have several pages, the first is read: {some_of(stacks)}"
        )
    if subtask != "regression":
        targets = samples.targets[train]
        one_hot = np.eye(len(class_names))[targets] if targets.ndim == 1 else targets
        absent = [n for n, any_ in zip(class_names, one_hot.any(0), strict=True) if not any_]
        if absent:
            lines.append(f"classes without a training sample: {some_of(absent)}")
    return lines
