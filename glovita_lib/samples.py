"""What a data set is made of: splits, and the sources their samples come from.

B batch, C channels, H W pixels, N samples of a split, K classes or targets.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from glovita_lib.spec_data import Subtask


class Source(Protocol):
    """Random access to the decoded samples of one split; picklable, for worker processes.

    A source of samples that are not images (bags of features, volumes) has one more method,
    `collate(samples) -> inputs`: it makes of a list of fetched samples what a batch holds as
    `inputs`, a tensor or an object with `to(device, non_blocking=...)` and `pin_memory()`. Its
    samples may be of any type, reach no image augmentation and are held in memory as they are. Such
    a source also has `select(rows) -> Source`, the source of some of its samples.
    """

    uniform: tuple[int, ...] | None
    """(C, H, W) where all samples have one size, else None."""

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """Samples (C, H, W), uint8 or uint16, of these rows in this order; one (B, C, H, W) array
        where they are uniform.

        Raises:
            UserError: one line for each sample that cannot be read, with its path.
        """

    def nbytes(self) -> int:
        """Size of the whole split, decoded, in bytes."""


@dataclass(slots=True)
class Split:
    """One split of a data set in its stable order."""

    ids: list[str]
    """Stable name of each sample: path below the images folder, or row of the original data."""
    targets: np.ndarray | None
    """(N,) int64 for multiclass, (N, K) float32 for multilabel and regression, None unlabelled."""
    source: Source
    groups: list[str] | None = None
    """What each sample belongs to (patient, slide), if known."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(slots=True)
class Data:
    """A data set, ready to load from."""

    name: str
    """Tag of the data set."""
    splits: dict[str, Split]
    """train, val and test, as far as they exist."""
    subtask: Subtask
    class_names: tuple[str, ...]
    """Names of the classes, or of the targets of a regression, in the order of the outputs."""
    channels: int
    bit_depth: int
    """8 (uint8 samples) or 16 (uint16 samples)."""
    report: list[str] = field(default_factory=list)
    """Lines worth showing: left-out files, duplicates, classes without samples."""

    @property
    def outputs(self) -> int:
        """Number of classes or targets."""
        return len(self.class_names)


@dataclass(frozen=True, slots=True)
class ArraySource:
    """Samples that are in memory already; several splits may share one array."""

    samples: np.ndarray  # (M, C, H, W) uint8 or uint16
    rows: np.ndarray  # (N,) rows of `samples` that make up the split

    @property
    def uniform(self) -> tuple[int, int, int]:
        return self.samples.shape[1:]

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        return self.samples[self.rows[rows]]

    def nbytes(self) -> int:
        size = int(np.prod(self.samples.shape[1:])) * self.samples.itemsize
        return size * len(self.rows)


def subset(split: Split, rows: np.ndarray) -> Split:
    """The split of these rows, in this order."""
    return Split(
        ids=[split.ids[row] for row in rows],
        targets=None if split.targets is None else split.targets[rows],
        source=select(split.source, rows),
        groups=None if split.groups is None else [split.groups[row] for row in rows],
    )


def select(source: Source, rows: np.ndarray) -> Source:
    """Some rows of a source, by its own method `select` where it has one."""
    own = getattr(source, "select", None)
    return RowsSource(source, rows) if own is None else own(rows)


@dataclass(frozen=True, slots=True)
class RowsSource:
    """Some rows of another source."""

    whole: Source
    rows: np.ndarray  # (N,) rows of `whole`

    @property
    def uniform(self) -> tuple[int, ...] | None:
        return self.whole.uniform

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[np.ndarray]:
        return self.whole.fetch(self.rows[rows])

    def nbytes(self) -> int:
        whole = max(len(self.rows), int(self.rows.max(initial=0)) + 1)
        return self.whole.nbytes() * len(self.rows) // whole
