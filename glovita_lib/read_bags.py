"""Folders with one feature file (h5, pt) a bag."""

import pickle
from collections import Counter
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from glovita_lib.errors import UserError, composed, ended, listed, with_all
from glovita_lib.read_features import Keys, check_coords, flaw
from glovita_lib.read_hdf5 import DatasetRows, readable_type
from glovita_lib.read_hdf5_file import array_of, open_hdf5, read_whole

BAG_SUFFIXES = (".h5", ".hdf5", ".pt")


@dataclass(frozen=True)
class FolderBags:
    """One bag a file, as CLAM and TRIDENT write them: HDF5 with features (n, D) or (1, n, D) and
    coords, or a tensor of such a shape saved by torch."""

    paths: tuple[Path, ...]
    keys: Keys
    lengths: np.ndarray  # 0 of a file that is not read
    width: int
    item_bytes: int

    def read(self, bag: int) -> np.ndarray:
        path = self.paths[bag]
        if path.suffix == ".pt":
            tensor = load_tensor(path).reshape(-1, self.width)
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        rows = DatasetRows(
            path,
            self.keys.features,
            threads=1,
            follow_links=self.keys.follow_links,
            proven=self.proven.get(bag),
        )
        self.proven[bag] = rows.direct
        return rows.read(0, len(rows)).reshape(-1, self.width)

    @cached_property
    def proven(self) -> dict[int, bool]:
        """Whether the files that were read so far are read directly."""
        return {}

    def coords(self, bag: int) -> np.ndarray | None:
        if self.paths[bag].suffix == ".pt":
            return None
        with open_hdf5(str(self.paths[bag])) as file:
            coords = self.keys.find(file, self.keys.coords)
            if coords is None:
                return None
            return read_whole(coords, self.keys.coords).reshape(self.lengths[bag], -1)

    def instance_ids(self, bag: int) -> None:
        """Such files name none."""


def bag_files(folder: Path) -> list[Path]:
    """The bags of a folder in the order of their names.

    Raises:
        UserError: none.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in BAG_SUFFIXES)
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None
    if not paths:
        raise UserError(f"{folder}: no file with suffix {', '.join(BAG_SUFFIXES)}, one a bag")
    return paths


def open_folder(paths: list[Path], keys: Keys, used: Container[str] | None = None) -> FolderBags:
    """The bags of some files of a folder; only headers are read.

    Args:
        used: names without suffix of the files that will be read, where not all of them; the others
            are not opened.

    Raises:
        UserError: bags that are empty, damaged, or of different widths, listed together.
    """
    shapes, errors = {}, []
    for place, path in enumerate(paths):
        if used is None or composed(path.stem) in used:
            try:
                shapes[place] = bag_shape(path, keys)
            except UserError as error:
                errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    widths = Counter(shape[1] for shape in shapes.values())
    width = max(widths, key=widths.__getitem__, default=0)
    if len(widths) > 1:
        others = [
            f"{paths[place].name} {shape[1]}"
            for place, shape in shapes.items()
            if shape[1] != width
        ]
        text = (
            f"{paths[0].parent}: bags of different widths: most have {width}, but {listed(others)};"
            " one encoder makes one width"
        )
        raise UserError(ended(with_all(text, others)))
    lengths = np.zeros(len(paths), np.int64)
    lengths[list(shapes)] = [shape[0] for shape in shapes.values()]
    item_bytes = max((shape[2] for shape in shapes.values()), default=0)
    return FolderBags(tuple(paths), keys, lengths, width, item_bytes)


def bag_shape(path: Path, keys: Keys) -> tuple[int, int, int]:
    """Instances, width and bytes a number of a one-bag file.

    Raises:
        UserError: it is damaged, empty or holds something else.
    """
    if path.suffix == ".pt":
        tensor = load_tensor(path)
        kind = str(tensor.dtype).removeprefix("torch.")
        size = bag_size(path, tuple(tensor.shape), kind, floating=tensor.is_floating_point())
        return *size, tensor.element_size()
    with open_hdf5(str(path)) as file:
        dataset = array_of(file, keys.features, follow_links=keys.follow_links)
        dtype = readable_type(dataset.dtype)
        size = bag_size(path, dataset.shape, dtype.name, floating=dtype.kind == "f")
        check_coords(str(path), file, keys, size[0])
        return *size, dtype.itemsize


def bag_size(path: Path, shape: tuple[int, ...], kind: str, *, floating: bool) -> tuple[int, int]:
    """Instances and width of a bag (n, D) or (1, n, D).

    Raises:
        UserError: it is empty or something else.
    """
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(shape) != 2 or not floating:
        raise UserError(
            f"{path}: features of shape {shape} and type {kind}; a bag is floats of shape (n, D)"
        )
    if not shape[0]:
        raise UserError(f"{path}: the bag has no instance; remove the file")
    return shape


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


def check_bags(folder: FolderBags, bags: np.ndarray, *, threads: int) -> None:
    """Look at every feature of some bags once, so many files at a time.

    Raises:
        UserError: NaN or infinity, with the files that have them.
    """
    with ThreadPoolExecutor(threads) as pool:
        flaws = pool.map(lambda bag: flaw(folder.read(bag)), bags.tolist())
        bad = {folder.paths[bag].name: wrong for bag, wrong in zip(bags, flaws, strict=True)}
    bad = {name: wrong for name, wrong in bad.items() if wrong}
    if bad:
        text = (
            f"{folder.paths[0].parent}: {next(iter(bad.values()))} in {len(bad)} bags"
            f" ({listed(bad)}); extract them again or remove the files"
        )
        raise UserError(ended(with_all(text, bad)))
