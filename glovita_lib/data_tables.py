"""Folders, CSV and JSON files as rows: which samples there are, their labels, groups and splits.

A sample is known by its id, its path below the images folder with forward slashes.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path, PurePosixPath
from stat import S_ISDIR
from typing import Any, ClassVar

from glovita_lib.errors import (
    SHOWN_LINES,
    UserError,
    composed,
    ended,
    itemized,
    nearest_word,
    refuse_controls,
)
from glovita_lib.files import read_csv, read_json_table


def walk(folder: Path, exts: Sequence[str], *, report: list[str] | None = None) -> list[str]:
    """Ids of all images below a folder, sorted; hidden files and folders are left out, links
    followed.

    Args:
        report: gets a line about folders that cannot be listed, and links that may be such folders;
            none: they are an error.

    Raises:
        UserError: no such folder, or one that cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    endings = tuple("." + ext.lower().lstrip(".") for ext in exts)
    found: list[str] = []
    unlisted: list[str] = []
    for parent, names in walk_folders(str(folder), unlisted, endings):
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        start = "" if inside == "." else f"{inside}/"
        found += [start + name for name in names if name.lower().endswith(endings)]
    note_unlisted(unlisted, report)
    return sorted(found)


def note_unlisted(unlisted: Sequence[str], report: list[str] | None) -> None:
    """Report folders that cannot be listed.

    Raises:
        UserError: there are some, and no report.
    """
    if not unlisted:
        return
    count = f"{len(unlisted)} folder{'s' * (len(unlisted) > 1)} that cannot be listed"
    if report is None:
        mend = "what is in them would be missing: mend or remove them"
        raise UserError(itemized(f"{count}; {mend}:", unlisted))
    report.append(itemized(f"{count} left out:", unlisted))


def walk_folders(
    folder: str,
    unlisted: list[str],
    endings: tuple[str, ...] = (),
    above: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it, each with the names of its files; links are followed under each of
    their names, but not back to a folder that they are in. What cannot be listed is noted, also a
    link to what is not there: it may be a folder of a disk that is not mounted, unless its name
    ends as a file's, which whoever reads it will miss."""
    real = os.path.realpath(folder)
    if real in above:
        return
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.name[0] != "."]
    except OSError as error:
        unlisted.append(f"{folder} ({error.strerror})")
        return
    for entry in entries:
        try:
            (folders if is_folder(entry) else files).append(entry.name)
        except OSError as error:
            if entry.name.lower().endswith(endings):
                files.append(entry.name)
            else:
                target = os.readlink(entry.path)
                unlisted.append(f"{entry.path} (a link to {target}: {error.strerror})")
    yield folder, files
    for name in sorted(folders):
        yield from walk_folders(os.path.join(folder, name), unlisted, endings, above | {real})


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one.

    Raises:
        OSError: a link to what is not there, to itself or to where one may not look.
    """
    return S_ISDIR(entry.stat().st_mode) if entry.is_symlink() else entry.is_dir()


@dataclass(slots=True)
class SampleFolder:
    """The samples below a folder; of images each is a file."""

    noun: ClassVar[str] = "image"
    """What a sample is called."""

    folder: Path
    ids: list[str]
    known: dict[str, list[str]] = field(init=False)
    """Composed id -> ids, two where the disk has a name in both Unicode forms."""
    named: set[str] = field(init=False, default_factory=set)
    """Ids of all files that the rows of a table name."""

    def __post_init__(self) -> None:
        refuse_controls(f"names of {self.noun} files", self.ids)
        self.known = {}
        for identity in self.ids:
            self.known.setdefault(composed(identity), []).append(identity)

    def path(self, identity: str) -> str:
        """File of a sample, the first of several."""
        return str(self.folder / identity)

    def find(self, name: str) -> str | None:
        """Id of the image at a path below the folder, which may hold "./" and "//" and be in either
        Unicode form; None if there is none. Which sample it is, is never guessed."""
        identity = str(PurePosixPath(name))
        found = self.known.get(composed(identity), [])
        return identity if identity in found else found[0] if len(found) == 1 else None

    def unused(self) -> list[str]:
        """Ids that no row of a table names."""
        return [identity for identity in self.ids if identity not in self.named]

    def find_row(self, names: tuple[str, ...]) -> tuple[str | None, str]:
        """Id of the sample of these files, see `find`, and the name to say where there is none."""
        found = self.find(names[0])
        self.named |= set() if found is None else {found}
        return found, names[0]

    def hint(self, name: str) -> str:
        """What may be wrong with a path that is no sample: the one that was probably meant, or why
        a file there does not count; empty if nothing is near."""
        if near := near_path(name, self.ids):
            return f'; did you mean "{near}"?'
        if name and (self.folder / name).is_file():
            return (
                f"; the file is there, but no {self.noun} below {self.folder} with a suffix of"
                " data.allowed_exts"
            )
        return ""


def near_path(name: str, paths: Sequence[str]) -> str | None:
    """The path that was probably meant: one with the same file name, else with the same one but for
    its suffix, where several have it in the folders most alike; else one spelled nearly so and with
    the same numbers, as 2.png is no misspelt 1.png.

    >>> near_path("images/cat/1", ["cat/1.png", "dog/1.png"]), near_path("ct1.png", ["ct2.png"])
    ('cat/1.png', None)
    >>> near_path("ct1", ["ct1.nii.gz"]), near_path("ct1.npy", ["ct1.nii.gz"])
    ('ct1.nii.gz', 'ct1.nii.gz')
    """
    wanted = PurePosixPath(name.replace("\\", "/").strip())
    files = {path: path.rpartition("/")[2] for path in paths}
    alike = [path for path in paths if files[path] == wanted.name] or [
        path
        for path in paths
        if without_suffix(files[path]) in (wanted.name, without_suffix(wanted.name))
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


def without_suffix(name: str) -> str:
    """Name of a file without its suffix, of which .gz is but a part."""
    name = name.removesuffix(".gz")
    return name.rpartition(".")[0] or name


@dataclass(slots=True)
class Problems:
    """Samples that cannot be used, all of them: an error if the spec is strict, else lines of the
    report."""

    strict: bool
    noun: str = "image"
    lines: dict[str, str] = field(default_factory=dict)  # sample -> why, in the order found

    def add(self, name: str, why: str, hint: Callable[[str], str] | None = None) -> None:
        """Note a sample; what was found first counts. The hint, which takes time, is asked only for
        the first."""
        if name not in self.lines:
            self.lines[name] = why + (hint(name) if hint and len(self.lines) < SHOWN_LINES else "")

    def add_missing(self, name: str, path: str, hint: Callable[[str], str]) -> None:
        """Note a sample of which there is no file at a path, its first or one beside it."""
        what = "no such file" if path == name else f"no such file beside it: {path}"
        self.add(name, what, lambda _: hint(path))

    def settle(self, report: list[str]) -> None:
        """Raise or report what was found.

        Raises:
            UserError: all samples that cannot be used, with their paths.
        """
        if self.lines and self.strict:
            raise self.error("cannot be used; mend them or set data.strict = false:")
        if self.lines:
            report.append(self.text("left out:"))

    def of_new(self, count: int) -> list[str]:
        """A line about those of so many new samples that are left out.

        Raises:
            UserError: all of them that cannot be read, unless they may be left out; none is left.
        """
        if not self.lines:
            return []
        if self.strict or len(self.lines) == count:
            mend = "; mend them or set data.strict = false:" if self.strict else ":"
            raise self.error(f"of {count} cannot be read{mend}")
        return [self.text("left out:")]

    def error(self, head: str) -> UserError:
        """The samples as an error."""
        return UserError(ended(self.text(head)))

    def text(self, head: str) -> str:
        """How many samples, and all of them with their reasons, one a line."""
        count = f"{len(self.lines)} {self.noun}{'s' * (len(self.lines) > 1)}"
        return itemized(f"{count} {head}", (f"{name}: {why}" for name, why in self.lines.items()))


# ---------------------------------------------------------------------- labels and splits


@dataclass(slots=True)
class LabelTable:
    """What a label file says, by the id of the sample."""

    labels: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    split_names: set[str] = field(default_factory=set)  # also those of images that are not there
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)
    """First path of samples that lack a file -> path of that file, and split where it is known."""
    source: str = "the label file"
    """What names the samples, in a line about those that it does not."""

    def hint(self, identity: str) -> str:
        """The line that was probably meant for an image without label; empty if none is near."""
        near = near_path(identity, [path for path, _ in self.missing.values()])
        return f'; the label file has "{near}", and there is no such image' if near else ""


def json_labels(path: Path, images: SampleFolder) -> LabelTable:
    """Labels of a JSON object {path: label}.

    Raises:
        UserError: not such an object, or two labels for one image.
    """
    content = read_json_table(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, expected an object {{path: label}}"
        )
    refuse_controls(f"{path}: paths", content)
    table = LabelTable()
    for name, label in content.items():
        enter(table, path, images.find_row((name,)), name, label, "")
    return table


def csv_labels(
    path: Path,
    images: SampleFolder,
    *,
    path_columns: tuple[str, ...],
    label_column: str | tuple[str, ...],
    group_column: str | None,
    split_column: str | None,
) -> LabelTable:
    """Labels of a CSV file: a string, or a tuple of strings for several label columns.

    Raises:
        UserError: a missing column, or two rows that differ for one image.
    """
    columns = [label_column] if isinstance(label_column, str) else label_column
    wanted = [*path_columns, *columns]
    wanted += [column for column in (group_column, split_column) if column]
    table = LabelTable()
    rows = read_csv(path, wanted)
    for row, paths in zip(rows, paths_of(rows, path_columns), strict=True):
        identity, lacking = images.find_row(paths)
        name = paths[0]
        if split_column:
            table.split_names.add(row[split_column])
        cells = tuple(row[column] for column in columns)
        label = cells[0] if isinstance(label_column, str) else cells
        split = row[split_column] if split_column else ""
        enter(table, path, (identity, lacking), name, label, split)
        for column, store in ((group_column, table.groups), (split_column, table.splits)):
            if column and identity is not None:
                agree(path, name, column, store.setdefault(identity, row[column]), row[column])
    return table


def datalist_labels(path: Path, images: SampleFolder, *, labelled: bool = True) -> LabelTable:
    """Labels and splits of a JSON object {split: [{"image": path, "label": label}, ...]}, as the
    Medical Segmentation Decathlon and MONAI write it; image may be a list of paths. Other keys
    are not used, nor entries without a label, which may be a path alone, where samples are
    `labelled`.

    Raises:
        UserError: no such object, or two labels for one sample.
    """
    content = read_json_table(path)
    lists = content if isinstance(content, dict) else {}
    table = LabelTable()
    refuse_controls(f"{path}: names of splits", lists)
    for split, entries in lists.items():
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, str) and not labelled:
                entry = {"image": entry}
            needed = {"image", "label"} if labelled else {"image"}
            if not isinstance(entry, dict) or not needed <= entry.keys():
                continue
            paths = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
            refuse_controls(f'{path}: paths of "{split}"', map(str, paths))
            identity, lacking = images.find_row(tuple(map(str, paths)))
            name = str(paths[0])
            table.split_names.add(split)
            enter(table, path, (identity, lacking), name, entry["label"] if labelled else "", split)
            if identity is not None:
                agree(path, name, "split", table.splits.setdefault(identity, split), split)
    if not table.split_names:
        raise UserError(f'{path}: expected {{split: [{{"image": path, "label": label}}, ...]}}')
    return table


def paths_of(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Paths in some columns of each row; in the place of an empty cell, which row it is in."""
    return [
        tuple(row[column] or f"(no {column} in row {number})" for column in columns)
        for number, row in enumerate(rows, 1)
    ]


def enter(
    table: LabelTable, path: Path, found: tuple[str | None, str], name: str, label: Any, split: str
) -> None:
    """Note the label of a sample, or that it lacks a file.

    Args:
        found: see `SampleFolder.find_row`.
        name: its first path.
    """
    identity, lacking = found
    if identity is None:
        if table.missing.get(name, (lacking, split))[0] != lacking:
            name = f"{name} beside {lacking}"  # two rows with one first path
        table.missing.setdefault(name, (lacking, split))
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
