"""Folders of images with labels from folder names, JSON or CSV, and new images without."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from glovita_lib.data import Data, ImageSamples, Outputs, Split, read_data_set
from glovita_lib.data_labels import LabelRules, Labels, encode, is_missing, untrained
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
from glovita_lib.dist import hash_seed
from glovita_lib.errors import UserError, composed, listed, meant, nearest_word
from glovita_lib.files import FILE_THREADS, on_disk, read_csv, read_json_table
from glovita_lib.read_image import FileSource, Header, read_headers
from glovita_lib.spec_data import GenericImageData

# ------------------------------------------------------------------------------------ tables
#
# Folders, CSV and JSON files as rows: which images there are, their labels, groups and splits.
#
# An image is known by its id, its path below the images folder with forward slashes.


def walk(folder: Path, exts: Sequence[str], *, report: list[str] | None = None) -> list[str]:
    """Ids of all images below a folder, sorted; hidden files and folders are left out, links
    followed.

    Args:
        report: gets a line about folders that cannot be listed; none: they are an error.

    Raises:
        UserError: no such folder, or one that cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    endings = tuple("." + ext.lower().lstrip(".") for ext in exts)
    found: list[str] = []
    unlisted: list[str] = []
    for parent, names in walk_folders(str(folder), unlisted):
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        start = "" if inside == "." else f"{inside}/"
        found += [start + name for name in names if name.lower().endswith(endings)]
    if unlisted:
        line = f"folders that cannot be listed: {listed(unlisted, 5)}"
        if report is None:
            raise UserError(f"{line}; what is in them would be missing")
        report.append(f"{line}: left out")
    return sorted(found)


def walk_folders(
    folder: str, unlisted: list[str], above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it, each with the names of its files; links are followed under each of
    their names, but not back to a folder that they are in. What cannot be listed is noted."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = {entry.name: entry.is_dir() for entry in found if entry.name[0] != "."}
    except OSError as error:
        unlisted.append(f"{folder} ({error.strerror})")
        return
    yield folder, [name for name, is_folder in entries.items() if not is_folder]
    for name in sorted(name for name, is_folder in entries.items() if is_folder):
        yield from walk_folders(os.path.join(folder, name), unlisted, above | {real})


@dataclass(slots=True)
class ImageFolder:
    """The images below a folder."""

    folder: Path
    ids: list[str]
    known: dict[str, list[str]] = field(init=False)
    """Composed id -> ids, two where the disk has a name in both Unicode forms."""

    def __post_init__(self) -> None:
        self.known = {}
        for identity in self.ids:
            self.known.setdefault(composed(identity), []).append(identity)

    def path(self, identity: str) -> str:
        """Path of an image."""
        return str(self.folder / identity)

    def find(self, name: str) -> str | None:
        """Id of the image at a path below the folder, which may hold "./" and "//" and be in either
        Unicode form; None if there is none. Which sample it is, is never guessed."""
        identity = str(PurePosixPath(name))
        found = self.known.get(composed(identity), [])
        return identity if identity in found else found[0] if len(found) == 1 else None

    def hint(self, name: str) -> str:
        """What may be wrong with a path that is no image: the image that was probably meant, or why
        a file there does not count; empty if nothing is near."""
        if near := near_path(name, self.ids):
            return f'; did you mean "{near}"?'
        if name and (self.folder / name).is_file():
            return (
                f"; the file is there, but no image below {self.folder} with a suffix of"
                " data.allowed_exts"
            )
        return ""


def near_path(name: str, paths: Sequence[str]) -> str | None:
    """The path that was probably meant: one with the same file name, else with the same one but for
    its suffix, where several have it in the folders most alike; else one spelled nearly so and with
    the same numbers, as 2.png is no misspelt 1.png.

    >>> near_path("images/cat/1", ["cat/1.png", "dog/1.png"]), near_path("ct1.png", ["ct2.png"])
    ('cat/1.png', None)
    """
    wanted = PurePosixPath(name.replace("\\", "/").strip())
    files = {path: path.rpartition("/")[2] for path in paths}
    alike = [path for path in paths if files[path] == wanted.name] or [
        path for path in paths if files[path].rpartition(".")[0] in (wanted.name, wanted.stem)
    ]
    if alike:
        folders = wanted.parts[-2::-1]
        return max(
            alike, key=lambda path: len(commonprefix([folders, PurePosixPath(path).parts[-2::-1]]))
        )
    numbers = re.findall(r"\d+", str(wanted))
    return nearest_word(
        str(wanted), (path for path in paths if re.findall(r"\d+", path) == numbers)
    )


@dataclass(slots=True)
class Problems:
    """Images that cannot be used: an error if the spec is strict, else lines of the report."""

    strict: bool
    lines: dict[str, str] = field(default_factory=dict)  # image -> why, in the order found
    most: ClassVar[int] = 20  # that a message lists

    def add(self, name: str, why: str, hint: Callable[[str], str] | None = None) -> None:
        """Note an image; what was found first counts. The hint, which takes time, is asked only for
        images that a message lists."""
        if name not in self.lines:
            self.lines[name] = why + (hint(name) if hint and len(self.lines) < self.most else "")

    def settle(self, report: list[str]) -> None:
        """Raise or report what was found.

        Raises:
            UserError: all images that cannot be used, with their paths.
        """
        if self.lines and self.strict:
            raise UserError(self.text("cannot be used; mend them or set data.strict = false:"))
        if self.lines:
            report.append(self.text("left out:"))

    def text(self, head: str) -> str:
        """How many images, and the first of them with their reasons, one a line."""
        lines = [f"{name}: {why}" for name, why in self.lines.items()]
        count = f"{len(lines)} image{'s' * (len(lines) > 1)}"
        return f"{count} {head}\n  " + listed(lines, self.most, "\n  ")


# ---------------------------------------------------------------------- labels and splits


@dataclass(slots=True)
class LabelTable:
    """What a label file says, by the id of the image."""

    labels: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    split_names: set[str] = field(default_factory=set)  # also those of images that are not there
    missing: list[str] = field(default_factory=list)  # names for which there is no image

    def hint(self, identity: str) -> str:
        """The line that was probably meant for an image without label; empty if none is near."""
        near = near_path(identity, self.missing)
        return f'; the label file has "{near}", and there is no such image' if near else ""


def json_labels(path: Path, images: ImageFolder) -> LabelTable:
    """Labels of a JSON object {path: label}.

    Raises:
        UserError: not such an object, or two labels for one image.
    """
    content = read_json_table(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, expected an object {{path: label}}"
        )
    table = LabelTable()
    for name, label in content.items():
        enter(table, path, images.find(name), name, label)
    return table


def csv_labels(
    path: Path,
    images: ImageFolder,
    *,
    path_column: str,
    label_column: str | tuple[str, ...],
    group_column: str | None,
    split_column: str | None,
) -> LabelTable:
    """Labels of a CSV file: a string, or a tuple of strings for several label columns.

    Raises:
        UserError: a missing column, or two rows that differ for one image.
    """
    columns = [label_column] if isinstance(label_column, str) else label_column
    wanted = [path_column, *columns]
    wanted += [column for column in (group_column, split_column) if column]
    table = LabelTable()
    for row in read_csv(path, wanted):
        name = row[path_column]
        if split_column:
            table.split_names.add(row[split_column])
        cells = tuple(row[column] for column in columns)
        label = cells[0] if isinstance(label_column, str) else cells
        identity = images.find(name)
        enter(table, path, identity, name, label)
        for column, store in ((group_column, table.groups), (split_column, table.splits)):
            if column and identity is not None:
                agree(path, name, column, store.setdefault(identity, row[column]), row[column])
    return table


def enter(table: LabelTable, path: Path, identity: str | None, name: str, label: Any) -> None:
    """Note the label of an image, or that there is no such image."""
    if identity is None:
        table.missing.append(name)
    else:
        agree(path, name, "label", table.labels.setdefault(identity, label), label)


def agree(path: Path, name: str, what: str, first: Any, second: Any) -> None:
    """Refuse two different values for one image."""
    if isinstance(first, str) and isinstance(second, str):
        first, second = composed(first), composed(second)
    if first != second:
        raise UserError(
            f"{path}: {name} has two values of {what}: {first!r} and {second!r}; keep one"
        )


# ------------------------------------------------------------------------------ the data set
#
# N samples, K classes or targets.

ALL = "all"  # the one split of a data set that folds are drawn from


@read_data_set.register
def _(spec: GenericImageData, *, seed: int, trained: Outputs | None = None) -> Data:
    """A folder of images."""
    subtask = spec.stated_subtask()
    folder = on_disk(Path(spec.data_root_dir) / spec.images_dir)
    report: list[str] = []
    problems = Problems(spec.strict)
    found = walk(folder, spec.allowed_exts, report=None if spec.strict else report)
    images = ImageFolder(folder, found)
    table = label_table(spec, images)
    members = images_of(spec, images, table, problems, report)
    kept = usable_labels(spec, images, table, members, subtask, problems)
    problems.settle(report)
    refuse_emptied(members, kept, problems)
    if table is None:
        refuse_split_folders(spec, kept)
    every = dict.fromkeys(identity for found in members.values() for identity in found)
    ids = [identity for identity in every if identity in kept]
    labels = Labels([kept[i].label for i in ids], ids)
    columns = None if isinstance(spec.label_column, str) else spec.label_column
    rules = LabelRules(
        subtask, spec.class_names, spec.num_classes, columns, spec.label_separator, trained
    )
    _, class_names, (targets,) = encode([labels], rules)
    groups = None
    if table is not None and spec.group_column:
        groups = in_one_form(table.groups[i] for i in ids)
    samples = ImageTable(ids, targets, [kept[i].header for i in ids], groups)
    rows = table_rows(spec, members, samples, subtask, seed)
    if samples.groups is not None:
        refuse_shared_groups(ids, samples.groups, rows)
    report += duplicate_notes([images.path(i) for i in ids], ids, targets, rows)
    stacks = [i for i in ids if kept[i].header.pages > 1]
    if stacks:
        report.append(
            f"{len(stacks)} TIFF files have several pages, the first is read: {listed(stacks)}"
        )
    report += untrained(targets[rows["train"]], class_names, subtask)
    return Data(
        name="generic_image_dataset",
        splits={name: images_split(spec, images, samples, rows[name]) for name in rows},
        subtask=subtask,
        class_names=class_names,
        ordered=spec.class_names is not None,
        samples=ImageSamples(channels=spec.channels, bit_depth=spec.bit_depth),
        report=report,
    )


@dataclass(frozen=True, slots=True)
class Kept:
    """An image that can be used."""

    label: Any
    header: Header


@dataclass(frozen=True, slots=True)
class ImageTable:
    """All images of a data set, in order, before they are split."""

    ids: list[str]
    targets: np.ndarray
    headers: list[Header]
    groups: list[str] | None


# ---------------------------------------------------------------------- labels and members


def label_table(spec: GenericImageData, images: ImageFolder) -> LabelTable | None:
    """What the label file says; None where the folders are the labels."""
    base = Path(spec.data_root_dir)
    if spec.label_source == "folder":
        return None
    path = on_disk(base / (spec.labels_file or f"labels.{spec.label_source}"))
    if spec.label_source == "json":
        return json_labels(path, images)
    return csv_labels(
        path,
        images,
        path_column=spec.path_column,
        label_column=spec.label_column,
        group_column=spec.group_column,
        split_column=spec.split_column if spec.split_source == "csv" else None,
    )


def images_of(
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
    if spec.split_source in ("kfold", "csv") and table is not None:
        for name in table.missing:
            problems.add(name, "no such file", images.hint)
        unused = len(set(images.ids) - set(table.labels))
        if unused:
            report.append(f"{unused} images of {images.folder} are not in the label file: not used")
    if spec.split_source == "kfold":
        return {ALL: images.ids if table is None else list(table.labels)}
    if spec.split_source == "splits_json":
        path = on_disk(Path(spec.data_root_dir) / spec.split_file)
        entries = read_splits(path, spec.fold)
        where = str(path)
    elif spec.split_source == "csv":
        assert table is not None  # these splits with other labels are refused
        entries, where = {name: [] for name in table.split_names}, f"column {spec.split_column}"
        for identity, name in table.splits.items():
            entries[name].append(identity)
    else:
        entries, where = by_first_folder(images), str(images.folder)
    members, parts = {}, entries
    entries = {}
    for name, part in parts.items():
        entries.setdefault(composed(name), []).extend(part)
    for split, name in split_names(spec, entries, where).items():
        found = {entry: images.find(entry) for entry in entries[name]}
        for entry in [entry for entry, identity in found.items() if identity is None]:
            problems.add(entry, f"no such file (in split {name})", images.hint)
        members[split] = [identity for identity in found.values() if identity is not None]
        again = len(entries[name]) - len(set(members[split])) - list(found.values()).count(None)
        if again > 0:
            report.append(f"{again} entries of split {name} name an image again: used once")
        members[split] = list(dict.fromkeys(members[split]))
    refuse_shared_images(spec, members)
    return members


def by_first_folder(images: ImageFolder) -> dict[str, list[str]]:
    """Ids by the first folder of their path."""
    entries: dict[str, list[str]] = {}
    for identity in images.ids:
        first, _, rest = identity.partition("/")
        if rest:
            entries.setdefault(first, []).append(identity)
    return entries


def split_names(spec: GenericImageData, entries: Iterable[str], where: str) -> dict[str, str]:
    """What the data set calls each split that is there.

    Raises:
        UserError: a split that must be there is not.
    """
    names = {
        "train": spec.train_split_name,
        "val": spec.val_split_name,
        "test": spec.test_split_name,
    }
    names = {split: composed(name) for split, name in names.items()}
    default_test = type(spec)().test_split_name
    for split, name in list(names.items()):
        if name in entries:
            continue
        if split == "test" and name == default_test:
            del names[split]
            continue
        known = listed(entries)
        raise UserError(
            f'{where}: no split "{name}"{meant(name, list(entries))}; splits there: {known};'
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
                    f" {listed(shared, 5)}; keep each in one"
                )


def usable_labels(
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
    headers, broken = read_headers(
        [images.path(i) for i in ids], threads=FILE_THREADS, max_megapixels=spec.max_megapixels
    )
    kept = {}
    for number, (identity, header) in enumerate(zip(ids, headers, strict=True)):
        if table is None:
            label = class_folder(identity, split_of_id[identity], spec)
        else:
            label = table.labels.get(identity)
        if number in broken:
            problems.add(identity, broken[number].removeprefix(f"{images.path(identity)}: "))
        elif is_missing(label, subtask):
            why = "no label" if table else "in no class folder"
            problems.add(identity, why, table.hint if table else None)
        elif table is not None and spec.group_column and not table.groups.get(identity):
            problems.add(identity, f"no group in column {spec.group_column}")
        else:
            kept[identity] = Kept(label, header)
    return kept


def class_folder(identity: str, split: str, spec: GenericImageData) -> str | None:
    """Class of an image by its folder: the first one of its path, after that of its split."""
    folders = PurePosixPath(identity).parts[:-1]
    skips = spec.split_source == "subdirs" or len(folders) > 1
    if folders and composed(folders[0]) == composed(split) and skips:
        folders = folders[1:]
    return folders[0] if folders else None


def refuse_emptied(
    members: dict[str, list[str]], kept: dict[str, Kept], problems: Problems
) -> None:
    """Refuse a split that has no image left, where images were left out: first say why.

    Raises:
        UserError: the images and what is wrong with them.
    """
    empty = [split for split, ids in members.items() if not any(i in kept for i in ids)]
    if empty and problems.lines:
        of = "" if empty == [ALL] else f" for {' and '.join(empty)}"
        raise UserError(problems.text(f"cannot be used, which leaves none{of}:"))


SPLIT_FOLDERS = frozenset(
    ["train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "holdout"]
)
"""What people call the folders of splits."""


def refuse_split_folders(spec: GenericImageData, kept: dict[str, Kept]) -> None:
    """Refuse the folders of splits as classes: where the splits come from elsewhere, the first
    folder of a path is the class.

    Raises:
        UserError: all classes, or one where a split file names such splits, are called like splits
            and have all their images in sub-folders.
    """
    deeper: dict[str, bool] = {}
    for identity, image in kept.items():
        folders = PurePosixPath(identity).parts[:-1]
        deeper[image.label] = deeper.get(image.label, True) and folders[-1] != image.label
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
    spec: GenericImageData,
    members: dict[str, list[str]],
    samples: ImageTable,
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
    fold_of = folds(labels, spec.n_folds, seed=hash_seed(seed, FOLDS), groups=groups)
    return fold_splits(fold_of, spec.fold, spec.n_folds)


def images_split(
    spec: GenericImageData, images: ImageFolder, samples: ImageTable, rows: np.ndarray
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
            max_megapixels=spec.max_megapixels,
        ),
        groups=None if samples.groups is None else [samples.groups[row] for row in rows],
    )


# -------------------------------------------------------------------------------- new images


def build_unlabelled(path: str, *, channels: int, bit_depth: int, files: GenericImageData) -> Split:
    """New images without labels: of a folder and all below it in sorted order, of a CSV file with a
    column `path` (relative to the CSV file's folder) in its order, or a single image.

    Args:
        files: says which files are images, and how large they may be.

    Raises:
        UserError: nothing there, no image, or images that are missing or broken, all together.
    """
    where = on_disk(Path(path))
    if where.is_dir():
        ids = walk(where, files.allowed_exts)
        paths = [str(where / name) for name in ids]
    elif where.suffix.lower() == ".csv":
        ids = [row["path"] for row in read_csv(where, ["path"])]
        paths = [str(on_disk(where.parent / name)) for name in ids]
    elif where.exists():
        ids, paths = [where.name], [str(where)]
    else:
        raise UserError(f"{path}: no such file or folder, expected images, or a CSV of their paths")
    if not ids:
        raise UserError(f"{path}: no image with a suffix of {', '.join(files.allowed_exts)}")
    headers, broken = read_headers(paths, threads=FILE_THREADS, max_megapixels=files.max_megapixels)
    problems = Problems(strict=True)
    for number, line in broken.items():
        problems.add(paths[number], line.removeprefix(f"{paths[number]}: "))
    if problems.lines:
        raise UserError(problems.text(f"of {len(ids)} cannot be read:"))
    source = FileSource(
        paths,
        headers,
        channels=channels,
        bit_depth=bit_depth,
        max_megapixels=files.max_megapixels,
    )
    return Split(ids=ids, targets=None, source=source)
