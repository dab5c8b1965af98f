"""Folders, CSV and JSON files as rows: which images there are, their labels, groups and splits.

An image is known by its id, its path below the images folder with forward slashes.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from glovita_lib.spec import UserError
from glovita_lib.spec_errors import meant

SHOWN = 20  # images that a message lists


def suffixes(exts: Sequence[str]) -> tuple[str, ...]:
    """File suffixes in lower case, each with its dot."""
    return tuple("." + ext.lower().lstrip(".") for ext in exts)


def walk(folder: Path, exts: Sequence[str]) -> list[str]:
    """Ids of all images below a folder, sorted; hidden files and folders are left out, links
    followed.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    endings = suffixes(exts)
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above itself
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(parent).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in files
            if name.lower().endswith(endings) and not name.startswith(".")
        ]
    return sorted(found)


@dataclass(slots=True)
class ImageFolder:
    """The images below a folder, found by the many ways tables spell their paths."""

    folder: Path
    base: Path  # folder of the data set; tables may give paths relative to it too
    ids: list[str]
    _known: set[str] = field(init=False)
    _by_stem: dict[str, list[str]] = field(init=False)  # id without suffix -> ids
    _by_name: dict[str, list[str]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._known = set(self.ids)
        self._by_stem = {}
        for identity in self.ids:
            self._by_stem.setdefault(str(PurePosixPath(identity).with_suffix("")), []).append(
                identity
            )

    def path(self, identity: str) -> str:
        """Path of an image."""
        return str(self.folder / identity)

    def find(self, name: str, prefix: str = "") -> str | None:
        """Id of the image that a table calls `name`: its path below the images folder, below
        `prefix` in it, or below the data set's folder; with or without suffix; at last the end of
        that path, or a longer path that ends with it. None if there is no such image.

        Raises:
            UserError: several images fit.
        """
        name = name.strip().replace("\\", "/")
        for spelled in self.spellings(name, prefix):
            if spelled in self._known:
                return spelled
        for spelled in self.spellings(name, prefix):
            if found := self._by_stem.get(spelled):
                return self.only(name, found)
        for path in (self.folder / name, self.base / name):
            if path.is_file():  # outside of the images folder, or of another suffix
                return Path(os.path.relpath(path, self.folder)).as_posix()
        found = [i for i in self.by_name().get(PurePosixPath(name).name, []) if alike(name, i)]
        return self.only(name, found) if found else None

    def spellings(self, name: str, prefix: str) -> Iterator[str]:
        """Ids that a name may stand for."""
        if os.path.isabs(name):
            name = os.path.relpath(name, self.folder)
        yield os.path.normpath(name)
        if prefix:
            yield os.path.normpath(f"{prefix}/{name}")
        below = os.path.relpath(self.base / name, self.folder)
        if not below.startswith(".."):
            yield below

    def by_name(self) -> dict[str, list[str]]:
        """Ids by file name and by file name without suffix."""
        if self._by_name is None:
            self._by_name = {}
            for identity in self.ids:
                name = PurePosixPath(identity)
                for spelled in {name.name, name.stem}:
                    self._by_name.setdefault(spelled, []).append(identity)
        return self._by_name

    def only(self, name: str, found: list[str]) -> str:
        """The one image that fits a name."""
        if len(found) > 1:
            raise UserError(
                f"{name}: {len(found)} images below {self.folder} fit: {', '.join(found[:5])};"
                " write the path below the images folder"
            )
        return found[0]


def alike(name: str, identity: str) -> bool:
    """Whether a name is the end of an id, or a path from elsewhere that ends with it, suffixes
    apart. The mere file name of an id is the end of too many paths, so that counts for absolute
    ones alone: images of one name in the folders of several slides are different images.

    >>> alike("x.png", "b/x.png"), alike("old/b/x", "b/x.png"), alike("/old/x.png", "x.png")
    (True, True, True)
    >>> alike("a/x.png", "b/x.png"), alike("a/x.png", "x.png")
    (False, False)
    """
    named, known = (PurePosixPath(path) for path in (name, identity))
    ours, theirs = [*known.parts[:-1], known.stem], [*named.parts[:-1], named.stem]
    if named.suffix != known.suffix:  # a name without suffix, that may hold a dot
        theirs[-1] = named.name
    shorter = min(len(ours), len(theirs))
    inside = shorter == len(theirs) or len(ours) > 1 or named.is_absolute()
    return inside and ours[-shorter:] == theirs[-shorter:]


# ---------------------------------------------------------------------- files


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: missing or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None


def read_text(path: Path) -> str:
    """Content of a UTF-8 file, without a byte-order mark.

    Raises:
        UserError: missing, a folder or not UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, separated by comma, semicolon or tab.

    Args:
        columns: those that must be there.

    Raises:
        UserError: missing, empty, without one of the columns, or with a row of another length.
    """
    text = read_text(path)
    first, *_ = text.splitlines() or [""]
    if not first:
        raise UserError(f"{path}: no header; the first line must hold the column names")
    separator = max(",;\t", key=lambda mark: (first.count(mark), mark == ","))
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error})") from None
    header = [name.strip() for name in header]
    for column in columns:
        if column not in header:
            raise UserError(
                f'{path}: no column "{column}"{meant(column, header)}; columns are'
                f" {', '.join(header)}"
            )
        if header.count(column) > 1:
            raise UserError(f'{path}: several columns are named "{column}"; rename all but one')
    for number, row in enumerate(rows, 2):
        if row and len(row) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(row)} cells, the header has {len(header)}"
            )
    return [
        {name: cell.strip() for name, cell in zip(header, row, strict=True)} for row in rows if row
    ]


@dataclass(slots=True)
class Problems:
    """Images that cannot be used: an error if the spec is strict, else lines of the report."""

    strict: bool
    lines: dict[str, str] = field(default_factory=dict)  # image -> why, in the order found

    def add(self, name: str, why: str) -> None:
        """Note an image; what was found first counts."""
        self.lines.setdefault(name, why)

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
        lines = [f"  {name}: {why}" for name, why in list(self.lines.items())[:SHOWN]]
        if len(self.lines) > SHOWN:
            lines.append(f"  ... and {len(self.lines) - SHOWN} more")
        count = f"{len(self.lines)} image{'s' * (len(self.lines) > 1)}"
        return "\n".join([f"{count} {head}", *lines])


# ---------------------------------------------------------------------- labels and splits


@dataclass(slots=True)
class LabelTable:
    """What a label file says, by the id of the image."""

    labels: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # names for which there is no image


def json_labels(path: Path, images: ImageFolder) -> LabelTable:
    """Labels of a JSON object {path: label}.

    Raises:
        UserError: not such an object, or two labels for one image.
    """
    content = read_json(path)
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
    several = not isinstance(label_column, str)
    wanted = [path_column, *(label_column if several else [label_column])]
    wanted += [column for column in (group_column, split_column) if column]
    table = LabelTable()
    for row in read_csv(path, wanted):
        name = row[path_column]
        label = tuple(row[column] for column in label_column) if several else row[label_column]
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
    if first != second:
        raise UserError(
            f"{path}: {name} has two values of {what}: {first!r} and {second!r}; keep one"
        )


def read_splits(path: Path, fold: int) -> dict[str, list[str]]:
    """Splits of a JSON file: {split: [path or id, ...]}, or a list or {"0": ...} of these, one a
    fold.

    Raises:
        UserError: another form, or no such fold.
    """
    content = read_json(path)
    form = f"{path}: expected {{split: [path or id, ...]}}, or a list of such objects, one a fold"
    if isinstance(content, dict) and content and all(isinstance(v, dict) for v in content.values()):
        if sorted(content) != sorted(map(str, range(len(content)))):
            raise UserError(f'{form}; folds in an object are named "0", "1", ...')
        content = [content[str(number)] for number in range(len(content))]
    if isinstance(content, list):
        if fold >= len(content):
            raise UserError(f"data.fold = {fold}, but {path} has folds 0 to {len(content) - 1}")
        content = content[fold]
    elif fold:
        raise UserError(f"data.fold = {fold}, but {path} has one split, no folds: only 0 exists")
    if not isinstance(content, dict):
        raise UserError(form)
    for name, paths in content.items():
        if not isinstance(paths, list) or not all(isinstance(entry, str | int) for entry in paths):
            raise UserError(f'{form}; "{name}" is no list of paths or ids')
    return {name: [str(entry) for entry in paths] for name, paths in content.items()}
