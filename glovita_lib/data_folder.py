"""Folders of samples with labels, splits, folds and groups; data sets of images, and new images
without labels."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from glovita_lib.data import (
    Asked,
    Data,
    ImageSamples,
    Source,
    Split,
    read_data_set,
    splits_needed,
)
from glovita_lib.data_labels import encode, is_missing, missing_words, untrained
from glovita_lib.data_splits import (
    FOLDS,
    duplicate_notes,
    fold_splits,
    folds,
    in_one_form,
    read_splits,
    refuse_shared_groups,
    strata,
)
from glovita_lib.data_subtask import LabelRules, Labels, refuse_values
from glovita_lib.data_tables import (
    LabelTable,
    Problems,
    SampleFolder,
    csv_labels,
    datalist_labels,
    json_labels,
    paths_of,
    walk,
)
from glovita_lib.dist import hash_seed
from glovita_lib.errors import UserError, composed, ended, listed, meant, with_all
from glovita_lib.files import FILE_THREADS, on_disk, read_csv
from glovita_lib.read_image import FileSource, Header, read_headers
from glovita_lib.spec_data import GenericImageData
from glovita_lib.spec_samples import FolderData, Subtask

# ------------------------------------------------------------------------------ the data set
#
# N samples, K classes or targets.

ALL = "all"  # the one split of a data set that folds are drawn from


Part = TypeVar("Part")
Look = Callable[[list[str]], tuple[list[Any], dict[int, str]]]
"""Looks at the files of samples: what is known of each, and of those that are broken, by their
number, why."""


@dataclass(frozen=True, slots=True)
class FolderTable:
    """All samples of a folder that can be used, in order, and what its tables say of them."""

    ids: list[str]
    targets: np.ndarray
    found: list[Any]
    """What `Look` has found of each."""
    groups: list[str] | None
    subtask: Subtask
    class_names: tuple[str, ...]
    rows: dict[str, np.ndarray]
    """Rows of each split."""

    def split(self, name: str, source: Callable[[np.ndarray], Source]) -> Split:
        """A split, with the source of its rows."""
        rows = self.rows[name]
        groups = None if self.groups is None else [self.groups[row] for row in rows]
        return Split([self.ids[row] for row in rows], self.targets[rows], source(rows), groups)

    def untrained(self) -> list[str]:
        """A line about the classes without a training sample."""
        if "train" not in self.rows:
            return []
        return untrained(self.targets[self.rows["train"]], self.class_names, self.subtask)


def read_folder(
    spec: FolderData,
    subtask: Subtask,
    images: SampleFolder,
    look: Look,
    report: list[str],
    *,
    seed: int,
    asked: Asked,
    table: LabelTable | None = None,
) -> FolderTable:
    """Samples, labels, groups and splits of a folder, as a spec describes them. Of splits that are
    not needed only the labels are read, which tell which classes there are.

    Args:
        subtask: kind of target.
        report: takes lines worth showing.
        table: labels, groups and splits that do not stand where the spec says; none: they do.

    Raises:
        UserError: what is missing, broken or contradictory, all of a kind at once.
    """
    wanted, problems = asked.wanted, Problems(spec.strict, images.noun)
    table = label_table(spec, images) if table is None else table
    members = members_of(spec, images, table, problems, report, wanted)
    needed = splits_needed(members, wanted) | {ALL}
    members, others = parted(members, needed)
    labels = usable_labels(spec, table, members, subtask, problems)
    labels |= usable_labels(spec, table, others, subtask, Problems(strict=False))
    if not problems.lines:  # mistakes in labels are said before files are read, which may take long
        folder_targets(spec, subtask, labels, asked)
    read = set().union(*members.values())
    ids = [identity for identity in labels if identity in read]
    found, broken = look(ids)
    for number, line in broken.items():
        problems.add(ids[number], line)
    facts = {i: found[n] for n, i in enumerate(ids) if n not in broken}
    problems.settle(report)
    refuse_emptied(members, facts, problems)
    labels = {i: label for i, label in labels.items() if i in facts or i not in read}
    if table is None:
        refuse_split_folders(spec, labels)
    class_names, targets = folder_targets(spec, subtask, labels, asked)
    targets = targets[[identity in facts for identity in labels]]
    ids = [identity for identity in labels if identity in facts]
    groups = None
    if table is not None and spec.group_column:
        groups = in_one_form(table.groups[i] for i in ids)
    rows = table_rows(spec, members, ids, targets, groups, subtask, seed)
    rows, _ = parted(rows, splits_needed(rows, wanted))
    if groups is not None:
        refuse_shared_groups(ids, groups, rows)
    paths = [images.path(i) for i in ids]
    report += duplicate_notes(paths, ids, targets, rows, noun=images.noun)
    return FolderTable(ids, targets, [facts[i] for i in ids], groups, subtask, class_names, rows)


def folder_targets(
    spec: FolderData, subtask: Subtask, labels: dict[str, Any], asked: Asked
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the classes or targets, and the targets of labels by id.

    Raises:
        UserError: see `encode`.
    """
    values, names = list(labels.values()), spec.class_names
    if subtask == "multiclass" and (single := one_hot_classes(values)) is not None:
        values, count = single
        names = names or tuple(map(str, range(count)))
    columns = None if isinstance(spec.label_column, str) else spec.label_column
    rules = LabelRules(
        subtask,
        names,
        spec.num_classes,
        columns,
        spec.label_separator,
        asked.trained,
        asked.predicts,
    )
    cells = Labels(values, list(labels))
    is_assumed = spec.subtask is None and spec.task is None and spec.reads_label_file
    if is_assumed and rules.class_names is None and asked.trained is None:
        refuse_values(cells, rules)
    _, class_names, (targets,), _ = encode([cells], rules)
    return class_names, targets


def one_hot_classes(labels: Sequence[Any]) -> tuple[list[int], int] | None:
    """The class of each label and their number, where every label is a list of one length, with a
    single 1 among zeros; else None."""
    if not labels or not all(isinstance(label, list) and label for label in labels):
        return None
    hot = all(sorted(label, key=str) == [0] * (len(label) - 1) + [1] for label in labels)
    if not hot or len({len(label) for label in labels}) > 1:
        return None
    return [label.index(1) for label in labels], len(labels[0])


@read_data_set.register
def _(spec: GenericImageData, *, seed: int, asked: Asked) -> Data:
    """A folder of images."""
    folder = on_disk(Path(spec.data_root_dir) / spec.images_dir)
    report: list[str] = []
    found = walk(folder, spec.allowed_exts, report=None if spec.strict else report)
    images = SampleFolder(folder, found)

    def look(ids: list[str]) -> tuple[list[Header], dict[int, str]]:
        paths = [images.path(identity) for identity in ids]
        headers, broken = read_headers(
            paths, threads=FILE_THREADS, max_megapixels=spec.max_megapixels
        )
        return headers, {i: line.removeprefix(f"{paths[i]}: ") for i, line in broken.items()}

    subtask = spec.stated_subtask() or "multiclass"
    table = read_folder(spec, subtask, images, look, report, seed=seed, asked=asked)
    report += table.untrained()
    stacks = [i for i, header in zip(table.ids, table.found, strict=True) if header.pages > 1]
    if stacks:
        line = f"{len(stacks)} TIFF files have several pages, the first is read: {listed(stacks)}"
        report.append(with_all(line, stacks))

    def source(rows: np.ndarray) -> FileSource:
        return FileSource(
            [images.path(table.ids[row]) for row in rows],
            [table.found[row] for row in rows],
            channels=spec.channels,
            bit_depth=spec.bit_depth,
            max_megapixels=spec.max_megapixels,
        )

    return Data(
        name="generic_image_dataset",
        splits={name: table.split(name, source) for name in table.rows},
        subtask=table.subtask,
        class_names=table.class_names,
        ordered=spec.class_names is not None,
        samples=ImageSamples(channels=spec.channels, bit_depth=spec.bit_depth),
        report=report,
    )


# ---------------------------------------------------------------------- labels and members


def label_table(spec: FolderData, images: SampleFolder) -> LabelTable | None:
    """What the label file says; None where the folders are the labels."""
    base = Path(spec.data_root_dir)
    if spec.label_source == "folder":
        return None
    path = on_disk(base / spec.label_path)
    if spec.label_source == "json":
        return json_labels(path, images)
    if spec.label_source == "dataset_json":
        return datalist_labels(path, images)
    return csv_labels(
        path,
        images,
        path_columns=spec.path_columns,
        label_column=spec.label_column,
        group_column=spec.group_column,
        split_column=spec.split_column if spec.split_source == "csv" else None,
    )


def members_of(
    spec: FolderData,
    images: SampleFolder,
    table: LabelTable | None,
    problems: Problems,
    report: list[str],
    wanted: Sequence[str] | None,
) -> dict[str, list[str]]:
    """Ids of each split that is there; those of ALL where folds are drawn later.

    Args:
        wanted: see `build_data`; of splits that are not needed files may be missing.

    Raises:
        UserError: a split that does not exist, or an image in two splits.
    """
    if spec.split_source in ("kfold", "csv", "dataset_json") and table is not None:
        unused = len(images.unused())
        if unused:
            report.append(
                f"{unused} {images.noun}s of {images.folder} are not in {table.source}: not used"
            )
    if spec.split_source == "kfold":
        for name, (path, _) in {} if table is None else table.missing.items():
            problems.add_missing(name, path, images.hint)
        return {ALL: images.ids if table is None else list(table.labels)}
    if spec.split_source == "splits_json":
        file = on_disk(Path(spec.data_root_dir) / spec.split_file)
        entries = read_splits(file, spec.fold, [getattr(spec, key) for key in SPLIT_KEYS])
        where = str(file)
    elif spec.split_source in ("csv", "dataset_json"):
        assert table is not None  # these splits with other labels are refused
        of_csv = spec.split_source == "csv"
        where = f"column {spec.split_column}" if of_csv else "the lists of dataset.json"
        entries = {name: [] for name in sorted(table.split_names)}
        for identity, name in table.splits.items():
            entries[name].append(identity)
    else:
        entries, where = by_first_folder(images), str(images.folder)
    members, parts = {}, entries
    entries = {}
    for name, part in parts.items():
        entries.setdefault(composed(name), []).extend(part)
    report += left_out(spec, entries, where, images.noun)
    names = split_names(spec, entries, where, trains=wanted is None)
    needed = splits_needed(names, wanted)
    for name, path in missing_rows(spec, table, set(names.values()) - {names[s] for s in needed}):
        problems.add_missing(name, path, images.hint)
    for split, name in names.items():
        found = {entry: images.find(entry) for entry in entries[name]}
        missing = [entry for entry, identity in found.items() if identity is None]
        for entry in missing if split in needed else ():
            problems.add(entry, f"no such file (in split {name})", images.hint)
        members[split] = [identity for identity in found.values() if identity is not None]
        again = len(entries[name]) - len(set(members[split])) - list(found.values()).count(None)
        if again > 0:
            what = f"{images.noun}s that the split has already: used once"
            report.append(f"{again} entries of split {name} name {what}")
        members[split] = list(dict.fromkeys(members[split]))
    refuse_shared_samples(spec, members, images.noun)
    return members


def missing_rows(
    spec: FolderData, table: LabelTable | None, others: set[str]
) -> list[tuple[str, str]]:
    """Samples in a table of labels and splits that lack a file, and its path; not those of other
    splits."""
    if table is None or spec.split_source not in ("csv", "dataset_json"):
        return []
    missing = table.missing.items()
    return [(name, path) for name, (path, split) in missing if composed(split) not in others]


def parted(members: dict[str, Part], needed: set[str]) -> tuple[dict[str, Part], dict[str, Part]]:
    """What belongs to the splits that are needed, and to the others."""
    ours = {split: part for split, part in members.items() if split in needed}
    return ours, {split: part for split, part in members.items() if split not in needed}


def by_first_folder(images: SampleFolder) -> dict[str, list[str]]:
    """Ids by the first folder of their path."""
    entries: dict[str, list[str]] = {}
    for identity in images.ids:
        first, _, rest = identity.partition("/")
        if rest:
            entries.setdefault(first, []).append(identity)
    return entries


SPLIT_KEYS = ("train_split_name", "val_split_name", "test_split_name")


def left_out(
    spec: FolderData, entries: dict[str, list[str]], where: str, noun: str
) -> Iterator[str]:
    """Lines about samples in no split, and in splits that the data set does not name.

    Raises:
        UserError: a split differs from one of the data set in case alone; or a table or split file
            has another split than train, val and test, where the spec does not say which it means.
    """
    known = {composed(getattr(spec, key)) for key in SPLIT_KEYS}
    others = {name: len(part) for name, part in entries.items() if name and name not in known}
    again = {name.strip().casefold(): name for name in known}
    stated = any(getattr(spec, key) != getattr(type(spec)(), key) for key in SPLIT_KEYS)
    listing = spec.split_source in ("csv", "splits_json")
    for name, count in others.items():
        offered = f'{where}: "{name}" ({count} {noun}s) is no split'
        mend = "write nothing" if spec.split_source == "csv" else "leave it out"
        if meant := again.get(name.strip().casefold()):
            raise UserError(f'{offered}, but "{meant}" is: name them alike')
        if listing and not stated:
            raise UserError(
                f"{offered}; write {', '.join(sorted(known))}, or {mend} where samples are not to"
                " be used, or set data.train_split_name, data.val_split_name, data.test_split_name"
            )
    if others:
        yield f"{sum(others.values())} {noun}s of {listed(others)} are in no split: not used"
    if unsplit := len(entries.get("", ())):
        yield f"{unsplit} {noun}s of {where} are in no split: not used"


def split_names(
    spec: FolderData, entries: Collection[str], where: str, *, trains: bool
) -> dict[str, str]:
    """What the data set calls each split that is there.

    Args:
        trains: whether a model learns from it: train and val must be there.

    Raises:
        UserError: a split that must be there is not, or none is.
    """
    names = {
        "train": spec.train_split_name,
        "val": spec.val_split_name,
        "test": spec.test_split_name,
    }
    names = {split: composed(name) for split, name in names.items()}
    there = {split: name for split, name in names.items() if name in entries}
    if there and not trains:
        return there
    default_test = type(spec)().test_split_name
    for split, name in names.items():
        if split in there or (trains and split == "test" and name == default_test):
            continue
        taken = set(names.values()) if split == "train" else {names["train"]}
        mend = f"{split} needs samples of its own"  # val and test may be one
        if set(entries) - taken:
            mend = f"set data.{split}_split_name"
        raise UserError(
            f'{where}: no split "{name}"{meant(name, list(entries))}; splits there:'
            f" {listed(entries)}; {mend}"
        )
    return there


def refuse_shared_samples(spec: FolderData, members: dict[str, list[str]], noun: str) -> None:
    """Refuse a sample in two splits; val and test of the same name are one split, as asked."""
    where: dict[str, str] = {}
    for split, ids in members.items():
        if split == "test" and spec.test_split_name == spec.val_split_name:
            continue
        for identity in ids:
            if where.setdefault(identity, split) != split:
                shared = [i for i in ids if where.get(i, split) != split]
                text = (
                    f"{len(shared)} {noun}s are in the splits {where[identity]} and {split}:"
                    f" {listed(shared, 5)}; keep each in one"
                )
                raise UserError(ended(with_all(text, shared, 5)))


def usable_labels(
    spec: FolderData,
    table: LabelTable | None,
    members: dict[str, list[str]],
    subtask: str,
    problems: Problems,
) -> dict[str, Any]:
    """Labels of the samples that have one, and a group where groups are asked for."""
    names = {"train": spec.train_split_name, "val": spec.val_split_name}
    names["test"] = spec.test_split_name
    missing = [] if table is None else list(table.missing)
    meant_by = {name: near for near in missing for name in (near, without_suffix(near))}
    split_of_id = {i: names.get(split, "") for split, ids in members.items() for i in ids}
    labels = {}
    for identity, split in split_of_id.items():
        of_folder = class_folder(identity, split, spec) if table is None else None
        label = of_folder if table is None else table.labels.get(identity)
        if is_missing(label, subtask):
            why = "no label" if table else "in no class folder"
            problems.add(identity, why, table.hint if table else None)
        elif table is not None and (words := missing_words(label, spec.class_names)):
            cure = "name it in data.class_names where it is a class"
            problems.add(identity, f'no label ("{words[0]}"): {cure}')
        elif table is not None and spec.group_column and not table.groups.get(identity):
            near = meant_by.get(identity) or meant_by.get(without_suffix(identity))
            mend = "" if near is None else f'; the table has "{near}": write the names of the files'
            problems.add(identity, f"no group in column {spec.group_column}{mend}")
            problems.lines.pop(near or "", None)  # one sample, not two
        else:
            labels[identity] = label
    return labels


def without_suffix(name: str) -> str:
    """The name of a file without its suffix, which begins with a letter."""
    return re.sub(r"\.[A-Za-z]\w*$", "", composed(name))


def class_folder(identity: str, split: str, spec: FolderData) -> str | None:
    """Class of an image by its folder: the first one of its path, after that of its split."""
    folders = PurePosixPath(identity).parts[:-1]
    skips = spec.split_source == "subdirs" or len(folders) > 1
    if folders and composed(folders[0]) == composed(split) and skips:
        folders = folders[1:]
    return folders[0] if folders else None


def refuse_emptied(members: dict[str, list[str]], kept: dict[str, Any], problems: Problems) -> None:
    """Refuse a split that has no sample left, where samples were left out: first say why.

    Raises:
        UserError: the samples and what is wrong with them.
    """
    empty = [split for split, ids in members.items() if not any(i in kept for i in ids)]
    if empty and problems.lines:
        of = "" if empty == [ALL] else f" for {' and '.join(empty)}"
        raise problems.error(f"cannot be used, which leaves none{of}:")


SPLIT_FOLDERS = frozenset(
    ["train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "holdout"]
)
"""What people call the folders of splits."""


def refuse_split_folders(spec: FolderData, labels: dict[str, str]) -> None:
    """Refuse the folders of splits as classes: where the splits come from elsewhere, the first
    folder of a path is the class.

    Raises:
        UserError: all classes, or one where a split file names such splits, are called like splits
            and have all their images in sub-folders.
    """
    deeper: dict[str, bool] = {}
    for identity, label in labels.items():
        folders = PurePosixPath(identity).parts[:-1]
        deeper[label] = deeper.get(label, True) and folders[-1] != label
    splits = SPLIT_FOLDERS | {spec.train_split_name, spec.val_split_name, spec.test_split_name}
    named = [name for name, is_deeper in deeper.items() if is_deeper and name.lower() in splits]
    is_mistake = named and (len(named) == len(deeper) or spec.split_source != "kfold")
    if is_mistake and spec.class_names is None:
        raise UserError(
            f"the classes are the folders {listed(named)} of {spec.images_dir}, which are called"
            ' like splits and have folders of their own: set data.split_source = "subdirs", put the'
            " class folders directly below data.images_dir, or name the classes in data.class_names"
        )


# ---------------------------------------------------------------------- splits


def table_rows(
    spec: FolderData,
    members: dict[str, list[str]],
    ids: list[str],
    targets: np.ndarray,
    groups: list[str] | None,
    subtask: str,
    seed: int,
) -> dict[str, np.ndarray]:
    """Rows of each split among the samples."""
    if ALL not in members:
        place = {identity: row for row, identity in enumerate(ids)}
        return {
            split: np.array([place[i] for i in found if i in place], np.int64)
            for split, found in members.items()
        }
    labels = strata(targets, subtask, kept=spec.stratified)
    grouped = None if groups is None else np.array(groups)
    fold_of = folds(labels, spec.n_folds, seed=hash_seed(seed, FOLDS), groups=grouped)
    return fold_splits(fold_of, int(spec.fold), spec.n_folds)


# -------------------------------------------------------------------------------- new images


def build_unlabelled(
    path: str, *, channels: int, bit_depth: int, files: GenericImageData
) -> tuple[Split, list[str]]:
    """New images without labels: of a folder and all below it in sorted order, of a CSV file with a
    column `path` (relative to the CSV file's folder) in its order, or a single image.

    Args:
        files: says which files are images, how large they may be, and whether it is strict.

    Returns:
        The images, and a line about those that are left out.

    Raises:
        UserError: nothing there, no image, or, unless data.strict is false, images that are missing
            or broken, all together.
    """
    where, notes = on_disk(Path(path)), list[str]()
    if where.is_dir():
        ids = walk(where, files.allowed_exts, report=None if files.strict else notes)
        paths = [str(where / name) for name in ids]
    elif where.suffix.lower() == ".csv":
        ids = [path for (path,) in paths_of(read_csv(where, ["path"]), ["path"])]
        paths = [str(on_disk(where.parent / name)) for name in ids]
    elif where.exists():
        ids, paths = [where.name], [str(where)]
    else:
        raise UserError(f"{path}: no such file or folder, expected images, or a CSV of their paths")
    if not ids:
        raise UserError(f"{path}: no image with a suffix of {', '.join(files.allowed_exts)}")
    headers, broken = read_headers(paths, threads=FILE_THREADS, max_megapixels=files.max_megapixels)
    problems = Problems(files.strict)
    for number, line in broken.items():
        problems.add(paths[number], line.removeprefix(f"{paths[number]}: "))
    notes += problems.of_new(len(ids))
    kept = [number for number in range(len(ids)) if number not in broken]
    source = FileSource(
        [paths[number] for number in kept],
        [headers[number] for number in kept],
        channels=channels,
        bit_depth=bit_depth,
        max_megapixels=files.max_megapixels,
    )
    return Split(ids=[ids[number] for number in kept], targets=None, source=source), notes
