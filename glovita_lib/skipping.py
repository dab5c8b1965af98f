"""A source that goes on after samples that cannot be read, and remembers them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib import files
from glovita_lib.samples import Source
from glovita_lib.spec import UserError


@dataclass(frozen=True)
class SkippingSource:
    """Gives a black image in the place of one that cannot be read and leaves a note about it in a
    folder, where every process finds it."""

    whole: Source
    rows: np.ndarray  # (N,) rows of `whole`, which the notes are named by
    notes: Path

    @property
    def uniform(self) -> tuple[int, ...] | None:
        """(C, H, W) where all samples have one size."""
        return self.whole.uniform

    @property
    def sizes(self) -> np.ndarray:
        """Height and width (N, 2)."""
        return self.whole.sizes[self.rows]

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
            dtype = np.uint8 if self.whole.bit_depth == 8 else np.uint16
            return np.zeros((self.whole.channels, *map(int, self.whole.sizes[row])), dtype)

    def nbytes(self) -> int:
        """Size of all samples, decoded, bytes."""
        return self.whole.nbytes()

    def select(self, rows: np.ndarray) -> "SkippingSource":
        """Some of the samples."""
        return SkippingSource(self.whole, self.rows[rows], self.notes)


def skipped(notes: Path) -> dict[int, str]:
    """Rows that could not be read, and why."""
    return {int(path.stem): path.read_text() for path in sorted(notes.glob("*.txt"))}
