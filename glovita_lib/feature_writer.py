"""Writing a feature file block by block, so that a kill loses the running block only.

Finished blocks lie as files of their own in `<file>.parts/`, beside a recipe that says what they
are blocks of. When all are there they are put together, under a temporary name, in the order of the
data set. Ranks write different blocks; the first one puts them together.

N samples, D width, M instances.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib import files
from glovita_lib.extraction import Readout
from glovita_lib.spec import UserError

CHUNK_BYTES = 256 * 2**10  # of a compressed chunk: large enough to inflate fast


@dataclass(frozen=True)
class Parts:
    """The finished blocks of one feature file."""

    target: Path
    recipe: dict[str, Any]
    blocks: int

    @property
    def folder(self) -> Path:
        """Where the blocks are."""
        return self.target.with_name(f"{self.target.name}.parts")

    def path(self, block: int) -> Path:
        """File of a block."""
        return self.folder / f"{block:06d}.npz"

    def open(self) -> None:
        """Make the folder; blocks of another recipe are removed."""
        recipe = self.folder / "recipe.json"
        if recipe.is_file() and files.read_json(recipe) != files.plain(self.recipe):
            shutil.rmtree(self.folder)
        files.make_folder(self.folder)
        files.remove_leftovers(self.folder)
        files.write_json(recipe, self.recipe)

    def pending(self) -> list[int]:
        """Blocks that are not finished."""
        return [block for block in range(self.blocks) if not self.path(block).is_file()]

    def write(self, block: int, rows: np.ndarray, readouts: list[Readout]) -> None:
        """Write a finished block: rows of the split, and what was read out of them."""
        arrays = {"rows": rows, "features": np.concatenate([r.features for r in readouts])}
        if readouts[0].lengths is not None:
            arrays["lengths"] = np.concatenate([r.lengths for r in readouts])
            arrays["coords"] = np.concatenate([r.coords for r in readouts])
        with files.atomic_path(self.path(block)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """The blocks in order."""
        for block in range(self.blocks):
            with np.load(self.path(block)) as arrays:
                yield dict(arrays)

    def remove(self) -> None:
        """Remove the blocks."""
        shutil.rmtree(self.folder)


def put_together(
    parts: Parts,
    *,
    tables: dict[str, np.ndarray],
    compression: str,
    keep: np.ndarray,
    notes: dict[str, Any],
) -> tuple[int, ...]:
    """Put the blocks together: the feature file appears whole, the blocks go.

    Returns the shape of the features.

    Args:
        tables: datasets beside the features, e.g. labels, ids; one row a sample or bag.
        compression: none, lzf or gzip.
        keep: (N,) whether each sample, in the order of the blocks, is written.
        notes: further attributes, beside those of the recipe.

    Raises:
        UserError: disk full ...; the blocks stay.
    """
    import h5py

    with files.atomic_path(parts.target) as temporary, h5py.File(temporary, "w") as file:
        place, done, lengths = 0, 0, []
        for block in parts.read():
            kept = keep[done : done + len(block["rows"])]
            done += len(kept)
            instances = np.repeat(kept, block["lengths"]) if "lengths" in block else kept
            features = block["features"][instances]
            if not place and "features" not in file:
                create(file, "features", features, compression, total_rows(parts, keep))
                if "coords" in block:
                    create(file, "coords", block["coords"], "none", total_rows(parts, keep))
            file["features"][place : place + len(features)] = features
            if "lengths" in block:
                file["coords"][place : place + len(features)] = block["coords"][instances]
                lengths.append(block["lengths"][kept])
            place += len(features)
        if lengths:
            file["bag_ptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        for name, values in tables.items():
            file[name] = as_stored(values)
        for name, value in {**parts.recipe, **notes}.items():
            file.attrs[name] = value
        shape = file["features"].shape
    parts.remove()
    return shape


def total_rows(parts: Parts, keep: np.ndarray) -> int:
    """Rows of the assembled features."""
    total, done = 0, 0
    for block in range(parts.blocks):
        with np.load(parts.path(block)) as arrays:
            kept = keep[done : done + len(arrays["rows"])]
            done += len(kept)
            total += int(arrays["lengths"][kept].sum() if "lengths" in arrays else kept.sum())
    return total


def create(file: Any, name: str, example: np.ndarray, compression: str, rows: int) -> None:
    """An empty dataset for `rows` rows like those of the example."""
    shape, options = (rows, *example.shape[1:]), {}
    if compression != "none":
        row = max(1, int(np.prod(shape[1:])) * example.dtype.itemsize)
        chunk = max(1, min(rows, CHUNK_BYTES // row))
        options = {"chunks": (chunk, *shape[1:]), "shuffle": True, "compression": compression}
        if compression == "gzip":
            options["compression_opts"] = 1  # more costs time and gains next to nothing on floats
    file.create_dataset(name, shape, example.dtype, **options)


def as_stored(values: np.ndarray) -> Any:
    """Text as HDF5's variable-length UTF-8, numbers as they are."""
    import h5py

    if values.dtype.kind in "UO":
        return values.astype(h5py.string_dtype())
    return values


def refuse_other(target: Path, recipe: dict[str, Any]) -> bool:
    """Whether the file is there already, made by the same recipe.

    Raises:
        UserError: it was made in another way.
    """
    import h5py

    if not target.exists():
        return False
    try:
        with h5py.File(target, "r") as file:
            known = {name: file.attrs.get(name) for name in recipe}
    except OSError:
        known = {}
    differing = [
        name for name, value in recipe.items() if files.plain(known.get(name)) != files.plain(value)
    ]
    if differing:
        raise UserError(
            f"{target} exists and was made otherwise ({', '.join(differing)}); set"
            " extract.output_filename or extract.output_dir, or remove it"
        )
    return True


def size_text(path: Path) -> str:
    """Size of a file in MiB."""
    return f"{os.path.getsize(path) / 2**20:,.1f} MiB"
