"""What is written beside the features: ids, labels, groups, and for bags made of samples where each
begins and where its instances lie.

N samples, B bags, K classes or targets.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glovita_lib.samples import Split
from glovita_lib.spec import UserError
from glovita_lib.tables import read_csv

AXES = ("x", "y", "z")


def group_order(split: Split) -> np.ndarray:
    """Rows (N,) with the samples of a group together: groups by their first sample, samples in the
    split's order.

    Raises:
        UserError: the data set knows no groups.
    """
    if split.groups is None:
        raise UserError(
            'extract.bag_by = "group": the data set has no groups; name their column with'
            " data.group_column"
        )
    first: dict[str, int] = {}
    for group in split.groups:
        first.setdefault(group, len(first))
    return np.argsort([first[group] for group in split.groups], kind="stable")


def sample_tables(split: Split, rows: np.ndarray) -> dict[str, np.ndarray]:
    """ids, labels and groups of some rows, one row a sample."""
    tables = {"ids": np.array([split.ids[row] for row in rows], object)}
    if split.targets is not None:
        tables["labels"] = split.targets[rows]
    if split.groups is not None:
        tables["groups"] = np.array([split.groups[row] for row in rows], object)
    return tables


def bag_tables(split: Split, rows: np.ndarray, coords_file: str | None) -> dict[str, np.ndarray]:
    """ids, labels and bag_ptr of the groups, one row a bag; instance_ids and coords, one row a
    sample.

    Args:
        rows: of the split, the samples of a group together.

    Raises:
        UserError: a group whose samples have different labels, a sample without coordinates.
    """
    groups = [split.groups[row] for row in rows]
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    ptr = np.array([*starts, len(rows)], np.int64)
    tables = {
        "ids": np.array([groups[start] for start in starts], object),
        "bag_ptr": ptr,
        "instance_ids": np.array([split.ids[row] for row in rows], object),
    }
    if split.targets is not None:
        targets = split.targets[rows]
        own = np.repeat(targets[starts], np.diff(ptr), axis=0)
        differs = (targets != own).reshape(len(rows), -1).any(1)
        if differs.any():
            group = groups[int(np.flatnonzero(differs)[0])]
            raise UserError(
                f"group {group!r} has samples of different labels; a bag has one label: correct the"
                " labels, or leave extract.bag_by out"
            )
        tables["labels"] = targets[starts]
    if coords_file is not None:
        tables["coords"] = read_coords(coords_file, tables["instance_ids"])
    return tables


def read_coords(path: str, ids: np.ndarray) -> np.ndarray:
    """Coordinates (N, 2 or 3) of samples, from a CSV with the columns id, x, y and perhaps z.

    Raises:
        UserError: no such file or column, a sample without a row or with two, a cell that is no
        number.
    """
    table: dict[str, list[float]] = {}
    for row in read_csv(Path(path), ("id", *AXES[:2])):
        name, cells = row["id"], [row[axis] for axis in AXES if axis in row]
        if name in table:
            raise UserError(f"{path}: id {name!r} occurs twice; give it one row")
        try:
            table[name] = [float(cell) for cell in cells]
        except ValueError:
            table[name] = [math.nan]
        if not all(map(math.isfinite, table[name])):
            raise UserError(
                f"{path}: coordinates of {name!r} are {', '.join(map(repr, cells))}; write numbers"
            )
    absent = [name for name in ids if name not in table]
    if absent:
        example = f"; the file has e.g. {next(iter(table))}" if table else ""
        raise UserError(
            f"{path}: no row for {len(absent)} samples ({', '.join(absent[:10])}){example}"
        )
    return np.array([table[name] for name in ids])


@dataclass(frozen=True, slots=True)
class Plan:
    """Which samples are read in which order, and how they make blocks."""

    rows: np.ndarray  # (N,) rows of the split in the order of the file
    block: int  # samples of a block

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-len(self.rows) // self.block)

    @property
    def block_of(self) -> np.ndarray:
        """Block (N,) of each of `rows`."""
        return np.arange(len(self.rows)) // self.block

    def rows_of(self, block: int) -> np.ndarray:
        """Rows of the split in a block."""
        return self.rows[block * self.block : (block + 1) * self.block]
