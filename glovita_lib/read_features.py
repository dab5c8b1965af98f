"""Feature files: their layouts and checks, and the sources of vectors and bags."""

import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from glovita_lib.bags import Bags
from glovita_lib.data import Standardizer
from glovita_lib.errors import UserError, composed, ended, listed, with_all
from glovita_lib.read_hdf5 import DatasetRows
from glovita_lib.read_hdf5_file import dataset_of, open_hdf5, read_whole, refuse_torn

# ------------------------------------------------------------------------------------- files
#
# Layouts (N samples, B bags, M instances, D width, L instances of every bag):
#
# - vectors: features (N, D), labels (N,) or (N, K)
# - fixed:   features (B, L, D), labels (B,) or (B, K)
# - ragged:  features (M, D), labels (B,) or (B, K), bag_ptr (B + 1,) or bag_lengths (B,)
#
# Beside them, where there are some: ids, groups, coords (one row an instance, or a sample), and the
# attribute class_names. Files without them are read as well.

SCAN_BYTES = 64 * 2**20  # read at a time when all values are looked at


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the datasets in a file, and how they are looked up."""

    features: str
    labels: str
    bag_ptr: str
    bag_lengths: str
    ids: str
    groups: str
    coords: str
    named: frozenset[str] = frozenset()  # those that a spec names itself: they must be there
    follow_links: bool = False  # whether links may lead out of the folder of a file

    def find(self, file: Any, name: str) -> Any:
        """The dataset of an open file; None where it has none, see read_hdf5.dataset_of."""
        return dataset_of(file, name, follow_links=self.follow_links)


@dataclass(slots=True)
class FeatureFile:
    """The tables of a feature file; the features themselves are read through `rows`."""

    path: str
    rows: DatasetRows  # (N, D), (B, L, D) or (M, D)
    ptr: np.ndarray | None  # (B + 1,) int64: instances ptr[b]..ptr[b + 1] are bag b; None: vectors
    labels: np.ndarray | None  # as stored; strings as str
    ids: list[str]
    named: bool  # whether the file has ids; else they are row numbers
    groups: list[str] | None
    class_names: tuple[str, ...] | None
    has_coords: bool
    attributes: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """D."""
        return self.rows.shape[-1]

    @property
    def layout(self) -> Literal["vectors", "fixed", "ragged"]:
        """How the features lie in the file."""
        if self.ptr is None:
            return "vectors"
        return "ragged" if len(self.rows.shape) == 2 else "fixed"


def open_features(
    path: str | Path,
    keys: Keys,
    *,
    threads: int,
    labelled: bool,
    used: Container[str] | None = None,
) -> FeatureFile:
    """Tables of a feature file, checked; few features are read.

    Args:
        used: composed ids of the samples that will be read, where not all of them.

    Raises:
        UserError: not HDF5, truncated, wrong ranks or lengths, pointers that do not rise from 0 to
        M, an empty bag that will be read, no labels where `labelled` asks for them, no dataset of a
        name in `keys.named`.
    """
    path = str(path)
    rows = DatasetRows(path, keys.features, threads=threads, follow_links=keys.follow_links)
    if len(rows.shape) not in (2, 3) or rows.dtype.kind != "f":
        raise UserError(
            f"{path}: {keys.features!r} has shape {rows.shape} and type {rows.dtype}; features are"
            " floats of shape (N, D) or (B, N, D)"
        )
    with open_hdf5(path) as file:
        refuse_absent(path, file, keys)
        ptr = bag_pointers(path, file, keys, rows.shape)
        count = len(rows) if ptr is None else len(ptr) - 1
        labels = table_of(path, file, keys, keys.labels, count)
        if labels is None and labelled:
            raise UserError(
                f"{path}: no dataset {keys.labels!r}; the file has {', '.join(sorted(file))};"
                " name the labels with data.labels_key or give data.labels_file"
            )
        found = table_of(path, file, keys, keys.ids, count)
        ids = [str(name) for name in (range(count) if found is None else found)]
        refuse_empty(path, ptr, ids, used)
        groups = table_of(path, file, keys, keys.groups, count)
        attributes = attributes_of(path, file)
        names = attributes.get("class_names")
        has_coords = check_coords(path, file, keys, count if ptr is None else int(ptr[-1]))
    return FeatureFile(
        path=path,
        rows=rows,
        ptr=ptr,
        labels=labels,
        ids=ids,
        named=found is not None,
        groups=None if groups is None else [str(group) for group in groups],
        class_names=None if names is None else class_list(names),
        has_coords=has_coords,
        attributes=attributes,
    )


def refuse_absent(path: str, file: Any, keys: Keys) -> None:
    """The datasets that a spec names itself are there: without its groups or pointers a file would
    be read as another one.

    Raises:
        UserError: one is not.
    """
    absent = sorted(name for name in keys.named if keys.find(file, name) is None)
    if absent:
        raise UserError(
            f"{path}: no dataset {absent[0]!r}; the file has {', '.join(sorted(file))}; correct the"
            " name in the section data"
        )


def check_coords(path: str, file: Any, keys: Keys, rows: int) -> bool:
    """Whether there are coordinates: numbers with one row an instance (or sample).

    Raises:
        UserError: they are something else.
    """
    coords = keys.find(file, keys.coords)
    if coords is None:
        return False
    shape, kind = coords.shape, coords.dtype
    if len(shape) < 2 or int(np.prod(shape[:-1])) != rows or kind.kind not in "iuf":
        raise UserError(
            f"{path}: {keys.coords!r} has shape {shape} and type {kind}; coordinates are numbers of"
            f" shape ({rows}, 1 or more), one row an instance"
        )
    return True


def bag_pointers(path: str, file: Any, keys: Keys, shape: tuple[int, ...]) -> np.ndarray | None:
    """Pointers (B + 1,) of either bag layout; None for vectors.

    Raises:
        UserError: they do not fit the features, or two of a file say different bags.
    """
    found: dict[str, np.ndarray] = {}
    if len(shape) == 3:
        found[keys.features] = np.arange(shape[0] + 1, dtype=np.int64) * shape[1]
    if (ptr := integers(path, file, keys, keys.bag_ptr)) is not None:
        found[keys.bag_ptr] = ptr
    if (lengths := integers(path, file, keys, keys.bag_lengths)) is not None:
        found[keys.bag_lengths] = np.concatenate([[0], np.cumsum(lengths)])
    names = list(found)
    for name in names:
        if len(shape) == 2:
            refuse_misfit(path, name, found[name], keys.features, shape[0])
        refuse_contradiction(path, names[0], found[names[0]], name, found[name])
    return found[names[0]] if names else None


def refuse_misfit(path: str, name: str, ptr: np.ndarray, features: str, rows: int) -> None:
    """Pointers rise from 0 to the number of instances.

    Raises:
        UserError: they do not.
    """
    steps = np.diff(ptr)
    if len(ptr) < 1 or ptr[0] != 0 or ptr[-1] != rows or (steps < 0).any():
        falls = np.flatnonzero(steps < 0)
        where = f" and falls after bag {falls[0]}" if len(falls) else ""
        ends = f"begins at {ptr[0]} and ends at {ptr[-1]}" if len(ptr) else "is empty"
        raise UserError(
            f"{path}: {name!r} {ends}{where}; it must rise from 0 to the {rows} instances of"
            f" {features!r}"
        )


def refuse_contradiction(
    path: str, first: str, one: np.ndarray, second: str, other: np.ndarray
) -> None:
    """Two datasets that say what the bags are say the same.

    Raises:
        UserError: they do not.
    """
    if np.array_equal(one, other):
        return
    sizes, others = np.diff(one), np.diff(other)
    if len(sizes) != len(others):
        what = f"{len(sizes)} bags, the second {len(others)}"
    else:
        bag = int(np.flatnonzero(sizes != others)[0])
        what = f"{sizes[bag]} instances in bag {bag}, the second {others[bag]}"
    raise UserError(
        f"{path}: {first!r} and {second!r} contradict each other: the first says {what}; remove the"
        " wrong one (bags that are padded to one length are written as (M, D) without the padding)"
    )


def refuse_empty(
    path: str, ptr: np.ndarray | None, ids: list[str], used: Container[str] | None
) -> None:
    """Bags that will be read have instances.

    Raises:
        UserError: some have none.
    """
    found = [] if ptr is None else np.flatnonzero(np.diff(ptr) == 0).tolist()
    empty = [bag for bag in found if used is None or composed(ids[bag]) in used]
    if empty:
        text = (
            f"{path}: {len(empty)} bags have no instance (bags {listed(empty)}); leave them out of"
            " the file"
        )
        raise UserError(ended(with_all(text, empty)))


def integers(path: str, file: Any, keys: Keys, key: str) -> np.ndarray | None:
    """A 1-D dataset of whole numbers as int64; None where the file has none."""
    dataset = keys.find(file, key)
    if dataset is None:
        return None
    values = read_whole(dataset, key)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {key!r} has shape {values.shape} and type {values.dtype}; it must be a list"
            " of whole numbers"
        )
    return values.astype(np.int64)


def table_of(path: str, file: Any, keys: Keys, key: str, count: int) -> np.ndarray | None:
    """A dataset with one row a sample; None where the file has none."""
    import h5py

    values = keys.find(file, key)
    if values is None:
        return None
    shape, kind = values.shape, values.dtype
    if not shape or shape[0] != count:
        raise UserError(
            f"{path}: {key!r} has {shape[0] if shape else 0} rows, the file has {count} samples;"
            " each sample needs one"
        )
    if h5py.check_string_dtype(kind) is not None:
        return text_of(values, slice(count))
    if kind.kind not in "iufb":
        raise UserError(f"{path}: {key!r} is of type {kind}; it must be numbers or text")
    return read_whole(values, key)


def text_of(values: Any, rows: slice) -> np.ndarray:
    """Rows of a dataset of text, as str; byte strings are UTF-8, whatever the file declares.

    Raises:
        UserError: they are not.
    """
    refuse_torn(values, values.name[1:], *rows.indices(len(values))[:2])
    try:
        return values.asstr("utf-8")[rows]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{values.file.filename}: {values.name[1:]!r} holds {error.object[:40]!r}, which is not"
            " UTF-8: write it as text"
        ) from None


def attributes_of(path: str, file: Any) -> dict[str, Any]:
    """The attributes of a file.

    Raises:
        UserError: text that is not UTF-8.
    """
    found = {}
    for name, value in file.attrs.items():
        try:
            found[name] = as_python(value)
        except UnicodeDecodeError:
            raise UserError(
                f"{path}: its attribute {name} is not UTF-8: write it as text"
            ) from None
    return found


def as_python(value: Any) -> Any:
    """An HDF5 attribute as plain Python."""
    if isinstance(value, np.ndarray):
        return [as_python(entry) for entry in value]
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def class_list(names: Any) -> tuple[str, ...]:
    """Class names from an attribute: a list, or text that holds one as JSON or with commas."""
    if isinstance(names, str):
        try:
            names = json.loads(names)
        except ValueError:
            names = names.split(",")
    return tuple(str(name).strip() for name in names)


def check_finite(file: FeatureFile, samples: np.ndarray) -> None:
    """Look at every feature of some samples once.

    Raises:
        UserError: NaN or infinity, with the first samples that have them.
    """
    rows = file.rows
    used = np.zeros(len(file), bool)
    used[samples] = True
    step = max(1, SCAN_BYTES // max(1, rows.row_bytes))
    step = max(rows.chunk_rows, step // rows.chunk_rows * rows.chunk_rows)
    buffer = rows.empty(min(step, len(rows)))
    bad: list[int] = []  # samples
    wrong: str | None = None
    for start in range(0, len(rows), step):
        places = np.arange(start, min(start + step, len(rows)))
        owner = places  # sample of each row
        if file.ptr is not None and file.layout == "ragged":
            owner = np.searchsorted(file.ptr, places, "right") - 1
        places, owner = places[used[owner]], owner[used[owner]]
        values = rows.read_rows(places, buffer[: len(places)])
        found = flaw(values)
        if found is not None:
            wrong = wrong or found
            bad += owner[~sound_rows(values)].tolist()
    if bad:
        names = [file.ids[sample] for sample in dict.fromkeys(bad)]
        text = (
            f"{file.path}: {wrong} in {len(names)} samples ({listed(names)});"
            " extract them again (extract.precision = 32 if float16 overflowed) or leave them out"
        )
        raise UserError(ended(with_all(text, names)))


LARGEST = np.finfo(np.float32).max  # of a feature: all of them are computed with as float32


def flaw(values: np.ndarray) -> str | None:
    """What is wrong with features, if anything: NaN, infinity or float64 beyond float32; float16 by
    its exponent bits, which is several times faster.

    >>> flaw(np.array([1, 65504], np.float16)), flaw(np.float16([np.inf])), flaw(np.array([1e39]))
    (None, 'NaN or infinite features', 'features beyond 3.4e+38, the largest float32, (scale them)')
    """
    if values.dtype == np.float16:
        fine = not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()
    else:
        fine = bool(np.isfinite(values).all())
    if not fine:
        return "NaN or infinite features"
    if values.dtype.itemsize <= 4 or not values.size or np.abs(values).max() <= LARGEST:
        return None
    return f"features beyond {LARGEST:.2g}, the largest float32, (scale them)"


def sound_rows(values: np.ndarray) -> np.ndarray:
    """Which rows (N,) of values (N, ...) float32 can hold."""
    return (np.abs(values) <= LARGEST).reshape(len(values), -1).all(1)


# ----------------------------------------------------------------------------------- sources
#
# Features come from one file, or from a folder with one file a bag.
#
# N samples, B bags, M instances, D width.

MOMENT_ROWS = 4096  # vectors, or instances of a bag, that are looked at together


@dataclass(frozen=True)
class VectorSource:
    """Vectors of some rows of a file."""

    reads_at_once: ClassVar[bool] = True
    sizes: ClassVar[None] = None
    collate: ClassVar[None] = None
    windows: ClassVar[None] = None

    vectors: DatasetRows  # (M, D)
    index: np.ndarray  # (N,) rows of the file

    @property
    def uniform(self) -> tuple[int, ...]:
        """(D,)."""
        return self.vectors.shape[1:]

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        """Vectors (B, D) in the file's float type."""
        wanted = self.index[rows]
        if (
            len(wanted)
            and wanted[-1] - wanted[0] == len(wanted) - 1
            and (np.diff(wanted) == 1).all()
        ):
            return self.vectors.read(int(wanted[0]), int(wanted[-1]) + 1)
        return self.vectors.take(wanted)

    def select(self, rows: np.ndarray) -> "VectorSource":
        """Some of the samples."""
        return VectorSource(self.vectors, self.index[rows])

    def nbytes(self) -> int:
        """Size of the split, bytes."""
        return self.vectors.row_bytes * len(self.index)


class BagReader(Protocol):
    """Bags by number."""

    @property
    def lengths(self) -> np.ndarray:
        """Instances per bag (B,)."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def item_bytes(self) -> int:
        """Bytes of a stored number."""

    def read(self, bag: int) -> np.ndarray:
        """Features (n, D) of a bag."""

    def coords(self, bag: int) -> np.ndarray | None:
        """Coordinates (n, 2 or more) of its instances, where there are some."""

    def instance_ids(self, bag: int) -> np.ndarray | None:
        """Names of its instances (n,), where there are some."""


@dataclass(frozen=True)
class FileBags:
    """Bags of one file."""

    file: FeatureFile
    ptr: np.ndarray  # (B + 1,) that of the file
    keys: Keys

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ptr)

    @property
    def width(self) -> int:
        return self.file.width

    @property
    def item_bytes(self) -> int:
        return self.file.rows.dtype.itemsize

    def read(self, bag: int) -> np.ndarray:
        if self.file.layout == "fixed":
            return self.file.rows.read(bag, bag + 1)[0]
        return self.file.rows.read(int(self.ptr[bag]), int(self.ptr[bag + 1]))

    @cached_property
    def all_coords(self) -> np.ndarray | None:
        """Coordinates of all instances (M, 2 or more)."""
        if not self.file.has_coords:
            return None
        with open_hdf5(self.file.path) as file:
            coords = self.keys.find(file, self.keys.coords)
            return read_whole(coords, self.keys.coords).reshape(-1, coords.shape[-1])

    def coords(self, bag: int) -> np.ndarray | None:
        if self.all_coords is None:
            return None
        return self.all_coords[self.ptr[bag] : self.ptr[bag + 1]]

    def instance_ids(self, bag: int) -> np.ndarray | None:
        """Names of its instances (n,), where the file has some, as those of mode extract do."""
        with open_hdf5(self.file.path) as file:
            names = self.keys.find(file, "instance_ids")
            if names is None:
                return None
            return text_of(names, slice(int(self.ptr[bag]), int(self.ptr[bag + 1])))


@dataclass(frozen=True)
class BagSource:
    """Some bags of a reader."""

    uniform: ClassVar[None] = None
    sizes: ClassVar[None] = None
    windows: ClassVar[None] = None
    reads_at_once: ClassVar[bool] = False

    reader: BagReader
    index: np.ndarray  # (N,) bags of the reader

    def fetch(self, rows: np.ndarray) -> list[np.ndarray]:
        """Features (n, D) of each bag."""
        return [self.reader.read(int(bag)) for bag in self.index[rows]]

    def collate(self, samples: list[np.ndarray]) -> Bags:
        """Bags, packed."""
        return Bags.from_list([torch.from_numpy(np.ascontiguousarray(bag)) for bag in samples])

    def select(self, rows: np.ndarray) -> "BagSource":
        """Some of the bags."""
        return BagSource(self.reader, self.index[rows])

    def lengths(self) -> np.ndarray:
        """Instances per bag (N,)."""
        return self.reader.lengths[self.index]

    def coords(self, row: int) -> np.ndarray | None:
        """Coordinates (n, 2 or more) of the instances of a bag."""
        return self.reader.coords(int(self.index[row]))

    def instance_ids(self, row: int) -> np.ndarray | None:
        """Names of the instances of a bag (n,)."""
        return self.reader.instance_ids(int(self.index[row]))

    def nbytes(self) -> int:
        """Size of the split, bytes."""
        return int(self.lengths().sum()) * self.reader.width * self.reader.item_bytes


def feature_scale(source: VectorSource | BagSource) -> Standardizer:
    """What standardises all vectors, or instances of all bags; one bag at a time is in memory."""
    count, size = len(source.index), 1 if isinstance(source, BagSource) else MOMENT_ROWS

    def blocks() -> Iterator[torch.Tensor]:
        for start in range(0, count, size):
            part = source.fetch(np.arange(start, min(start + size, count)))
            rows = part[0] if isinstance(part, list) else part
            for first in range(0, len(rows), MOMENT_ROWS):
                yield torch.from_numpy(np.ascontiguousarray(rows[first : first + MOMENT_ROWS]))

    return Standardizer.of(blocks)
