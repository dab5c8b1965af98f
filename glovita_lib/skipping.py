"""Some samples of a source that stay what they are among all: read in the same way whichever others
are read with them, and, where that is asked, left out with a note if they cannot be read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib import files
from glovita_lib.samples import Source
from glovita_lib.spec import UserError


@dataclass(frozen=True)
class PartSource:
    """Some samples of a source.

    Whether they are of one size is said of the whole source: images of one size are resized as a
    batch on the training device, others one by one where they are decoded. So a sample takes the
    same way in a whole run, in one that was continued, and on any number of ranks.
    """

    whole: Source
    rows: np.ndarray  # (N,) rows of `whole`

    @property
    def uniform(self) -> tuple[int, ...] | None:
        """(C, H, W) where all samples of the whole source have one size."""
        return self.whole.uniform

    @property
    def sizes(self) -> np.ndarray | None:
        """Height and width (N, 2), where they are known."""
        sizes = getattr(self.whole, "sizes", None)
        return None if sizes is None else sizes[self.rows]

    def fetch(self, rows: np.ndarray) -> Any:
        """Samples of these rows."""
        return self.whole.fetch(self.rows[rows])

    def nbytes(self) -> int:
        """Size of all samples of the whole source, decoded, bytes."""
        return self.whole.nbytes()

    def select(self, rows: np.ndarray) -> "PartSource":
        """Some of the samples."""
        return PartSource(self.whole, self.rows[rows])


@dataclass(frozen=True)
class SkippingSource(PartSource):
    """Gives a black image in the place of one that cannot be read and leaves a note about it in a
    folder, where every process finds it, named by the row of the whole source."""

    notes: Path
    blank: tuple[int, int, int]  # (C, H, W) of a black image whose own size is unknown
    bit_depth: int

    def fetch(self, rows: np.ndarray) -> Any:
        """Samples, read one by one where one of them fails."""
        wanted = self.rows[rows]
        try:
            return self.whole.fetch(wanted)
        except UserError:
            images = [self.one(int(row)) for row in wanted]
            return np.stack(images) if self.uniform is not None else images

    def one(self, row: int) -> np.ndarray:
        """A sample, or a black one."""
        try:
            return self.whole.fetch(np.array([row]))[0]
        except UserError as error:
            files.write_text(self.notes / f"{row}.txt", str(error))
            return np.zeros(self.shape(row), np.uint8 if self.bit_depth == 8 else np.uint16)

    def shape(self, row: int) -> tuple[int, ...]:
        """(C, H, W) of a sample that cannot be read."""
        if self.uniform is not None:
            return self.uniform
        sizes = getattr(self.whole, "sizes", None)
        return self.blank if sizes is None else (self.blank[0], *map(int, sizes[row]))

    def select(self, rows: np.ndarray) -> "SkippingSource":
        """Some of the samples."""
        return SkippingSource(self.whole, self.rows[rows], self.notes, self.blank, self.bit_depth)


def skipped(notes: Path) -> dict[int, str]:
    """Rows that could not be read, in order, and why."""
    paths = sorted(notes.glob("[0-9]*.txt"), key=lambda path: int(path.stem))
    return {int(path.stem): path.read_text() for path in paths}
