"""Where vectors and bags of features come from: one file, or a folder with one file a bag.

N samples, B bags, M instances, D width.
"""

import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from glovita_lib.bags import Bags
from glovita_lib.blocks import Rows, open_hdf5
from glovita_lib.hdf5 import FeatureFile, Keys, check_coords, is_finite
from glovita_lib.spec import UserError

MOMENT_ROWS = 4096  # vectors, or instances of a bag, that are looked at together
BAG_SUFFIXES = (".h5", ".hdf5", ".pt")


@dataclass(frozen=True)
class VectorSource:
    """Vectors of some rows of a file."""

    vectors: Rows  # (M, D)
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

    lengths: np.ndarray
    """Instances per bag (B,)."""
    width: int
    item_bytes: int
    """Bytes of a stored number."""

    def read(self, bag: int) -> np.ndarray:
        """Features (n, D) of a bag."""

    def coords(self, bag: int) -> np.ndarray | None:
        """Coordinates (n, 2 or more) of its instances, where there are some."""


@dataclass(frozen=True)
class FileBags:
    """Bags of one file."""

    file: FeatureFile
    keys: Keys

    @property
    def lengths(self) -> np.ndarray:
        return self.file.lengths

    @property
    def width(self) -> int:
        return self.file.width

    @property
    def item_bytes(self) -> int:
        return self.file.rows.dtype.itemsize

    def read(self, bag: int) -> np.ndarray:
        return self.file.read_bag(bag)

    @cached_property
    def all_coords(self) -> np.ndarray | None:
        """Coordinates of all instances (M, 2 or more)."""
        return self.file.coords(self.keys.coords)

    def coords(self, bag: int) -> np.ndarray | None:
        if self.all_coords is None:
            return None
        return self.all_coords[self.file.ptr[bag] : self.file.ptr[bag + 1]]

    def instance_ids(self, bag: int) -> np.ndarray | None:
        """Names of its instances (n,), where the file has some, as those of mode extract do."""
        with open_hdf5(self.file.path) as file:
            if "instance_ids" not in file:
                return None
            names = file["instance_ids"].asstr()
            return names[int(self.file.ptr[bag]) : int(self.file.ptr[bag + 1])]


@dataclass(frozen=True)
class FolderBags:
    """One bag a file, as CLAM and TRIDENT write them: HDF5 with features (n, D) or (1, n, D) and
    coords, or a tensor of such a shape saved by torch."""

    paths: tuple[Path, ...]
    keys: Keys
    lengths: np.ndarray
    width: int
    item_bytes: int

    def read(self, bag: int) -> np.ndarray:
        path = self.paths[bag]
        if path.suffix == ".pt":
            tensor = load_tensor(path).reshape(-1, self.width)
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        rows = Rows(path, self.keys.features, threads=1)
        return rows.read(0, len(rows)).reshape(-1, self.width)

    def coords(self, bag: int) -> np.ndarray | None:
        if self.paths[bag].suffix == ".pt":
            return None
        with open_hdf5(str(self.paths[bag])) as file:
            if self.keys.coords not in file:
                return None
            return file[self.keys.coords][()].reshape(self.lengths[bag], -1)


def open_folder(folder: Path, keys: Keys) -> FolderBags:
    """The bags of a folder in the order of their names; only headers are read.

    Raises:
        UserError: no bag, or bags that are empty, damaged, or of different widths, listed together.
    """
    paths = tuple(sorted(path for path in folder.iterdir() if path.suffix in BAG_SUFFIXES))
    if not paths:
        raise UserError(f"{folder}: no file with suffix {', '.join(BAG_SUFFIXES)}, one a bag")
    shapes, errors = [], []
    for path in paths:
        try:
            shapes.append(bag_shape(path, keys))
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors[:20]))
    width, most = Counter(shape[1] for shape in shapes).most_common(1)[0]
    if most < len(shapes):
        others = [
            f"{path.name} {shape[1]}"
            for path, shape in zip(paths, shapes, strict=True)
            if shape[1] != width
        ]
        raise UserError(
            f"{folder}: bags of different widths: most have {width}, but {', '.join(others[:10])}"
            f"{' ...' if len(others) > 10 else ''}; one encoder makes one width"
        )
    lengths = np.array([shape[0] for shape in shapes], np.int64)
    return FolderBags(paths, keys, lengths, width, max(shape[2] for shape in shapes))


def bag_shape(path: Path, keys: Keys) -> tuple[int, int, int]:
    """Instances, width and bytes a number of a one-bag file.

    Raises:
        UserError: it is damaged, empty or holds something else.
    """
    if path.suffix == ".pt":
        tensor = load_tensor(path)
        kind, size = str(tensor.dtype).removeprefix("torch."), tensor.element_size()
        shape, floating = tuple(tensor.shape), tensor.is_floating_point()
    else:
        rows = Rows(path, keys.features, threads=1)
        shape, kind, size = rows.shape, rows.dtype.name, rows.dtype.itemsize
        floating = rows.dtype.kind == "f"
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(shape) != 2 or not floating:
        raise UserError(
            f"{path}: features of shape {shape} and type {kind}; a bag is floats of shape (n, D)"
        )
    if not shape[0]:
        raise UserError(f"{path}: the bag has no instance; remove the file")
    if path.suffix != ".pt":
        with open_hdf5(str(path)) as file:
            check_coords(str(path), file, keys.coords, shape[0])
    return shape[0], shape[1], size


def load_tensor(path: Path) -> torch.Tensor:
    """The tensor of a pt file, mapped, not read.

    Raises:
        UserError: it holds something else.
    """
    try:
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: such a file can only be read
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds other objects than tensors, which only running their code could read;"
            " write the features alone: torch.save(features, path)"
        ) from None
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: not a tensor saved by torch ({error})".splitlines()[0]) from None
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a tensor (n, D)")
    return value.detach()


@dataclass(frozen=True)
class BagSource:
    """Some bags of a reader."""

    reader: BagReader
    index: np.ndarray  # (N,) bags of the reader
    uniform: None = None

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
        named = getattr(self.reader, "instance_ids", None)
        return None if named is None else named(int(self.index[row]))

    def nbytes(self) -> int:
        """Size of the split, bytes."""
        return int(self.lengths().sum()) * self.reader.width * self.reader.item_bytes


def check_bags(folder: FolderBags, *, threads: int) -> None:
    """Look at every feature of a folder once, so many files at a time.

    Raises:
        UserError: NaN or infinity, with the files that have them.
    """
    with ThreadPoolExecutor(threads) as pool:
        sound = pool.map(lambda bag: is_finite(folder.read(bag)), range(len(folder.paths)))
        bad = [path.name for path, fine in zip(folder.paths, sound, strict=True) if not fine]
    if bad:
        shown = ", ".join(bad[:10]) + (" ..." if len(bad) > 10 else "")
        raise UserError(
            f"{folder.paths[0].parent}: NaN or infinite features in {len(bad)} bags ({shown});"
            " extract them again or remove the files"
        )


def feature_moments(source: VectorSource | BagSource) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) over all vectors, or instances of all bags, in float64; the
    deviation of a constant feature is 1. Two passes, so that large values keep their digits; one
    bag at a time is in memory."""
    count, size = len(source.index), 1 if isinstance(source, BagSource) else MOMENT_ROWS

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, count, size):
            part = source.fetch(np.arange(start, min(start + size, count)))
            rows = part[0] if isinstance(part, list) else part
            for first in range(0, len(rows), MOMENT_ROWS):
                yield rows[first : first + MOMENT_ROWS]

    total, number = 0.0, 0
    for block in blocks():
        total, number = total + block.sum(0, dtype=np.float64), number + len(block)
    mean = total / number
    squares = sum(np.square(block - mean).sum(0) for block in blocks())
    std = np.sqrt(squares / number)
    return mean, np.where(std > 0, std, 1.0)
