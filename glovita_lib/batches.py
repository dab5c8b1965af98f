"""A batch, and how it is made of rows of a split.

B batch, C channels, H W pixels, S side of the encoder's input, K classes or targets.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from glovita_lib.dist import mix
from glovita_lib.held import HeldSource, gather
from glovita_lib.samples import Source

Task = tuple[int, int, np.ndarray]  # epoch, batch, rows


class Fit(Protocol):
    """Crop and resize of single images to the encoder's input, see policies.Fit."""

    def boxes(self, sizes: np.ndarray, generator: torch.Generator) -> Tensor: ...

    def one(self, image: np.ndarray, box: Tensor) -> Tensor: ...


@dataclass(slots=True)
class Batch:
    """Samples as they come from disk or memory; augmentation follows on the training device."""

    inputs: Any
    """(B, C, H, W) uint8, or int32 for 16-bit images; what Source.collate makes for other data."""
    targets: Tensor | None
    """(B,) int64 or (B, K) float32."""
    rows: Tensor
    """(B,) int64, rows of the split."""
    fitted: bool
    """Whether the images are cropped and resized already, because their sizes differ."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; the copy overlaps with computation if it is pinned."""
        return self.moved(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        return self.moved(lambda part: part.pin_memory())

    def moved(self, move: Callable[[Any], Any]) -> "Batch":
        """The batch with every tensor moved."""
        targets = None if self.targets is None else move(self.targets)
        return Batch(move(self.inputs), targets, move(self.rows), self.fitted)


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes batches of rows; runs in this process, in threads or in worker processes."""

    source: Source | HeldSource
    first: int  # row of the split that is row 0 of the source
    targets: np.ndarray | None
    fit: Fit
    seed: int
    rank: int
    fitted: bool  # whether the source's samples are fitted already

    def __call__(self, task: Task, *, pinned: bool = False) -> Batch:
        """Batch of a task.

        Args:
            pinned: whether what needs only a copy is copied into page-locked memory.

        Raises:
            UserError: a sample cannot be read.
        """
        epoch, batch, rows = task
        if (samples := self.ready) is not None:
            inputs, fitted = gather(samples, rows - self.first, pinned=pinned), self.fitted
        else:
            fetched = self.source.fetch(rows - self.first)
            inputs, fitted = self.inputs(fetched, mix(self.seed, epoch, batch, self.rank))
        targets = None if self.targets is None else torch.from_numpy(self.targets[rows])
        return Batch(inputs, targets, torch.from_numpy(rows), fitted)

    @property
    def ready(self) -> Tensor | None:
        """All samples (N, ...) where they are in memory as torch calculates with them."""
        if not isinstance(self.source, HeldSource) or self.source.uniform is None:
            return None
        samples = self.source.samples
        return None if samples.dtype == np.uint16 else torch.from_numpy(samples)

    def inputs(self, samples: Any, seed: int) -> tuple[Any, bool]:
        """Inputs of a batch, and whether they are fitted."""
        if collate := getattr(self.source, "collate", None):
            return collate(samples), False
        if isinstance(samples, np.ndarray):
            return to_tensor(samples), self.fitted
        return fit_all(samples, self.fit, seed), True


def fit_all(samples: list[np.ndarray], fit: Fit, seed: int) -> Tensor:
    """Images (C, H, W) of any sizes as one batch (B, C, S, S), each with its own window."""
    sizes = np.array([sample.shape[1:] for sample in samples])  # (B, 2)
    boxes = fit.boxes(sizes, torch.Generator().manual_seed(seed))
    with one_core():
        return torch.stack([fit.one(*pair) for pair in zip(samples, boxes, strict=True)])


@contextmanager
def one_core() -> Iterator[None]:
    """Operations on single images in the main thread on one core: to share them between cores takes
    longer than they do, ten times as long on a busy machine (measured). The setting is the main
    thread's; threads and workers that fit images are many already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def to_tensor(samples: np.ndarray) -> Tensor:
    """Samples as they are, uint16 as int32, which torch can calculate with."""
    return torch.from_numpy(samples.astype(np.int32) if samples.dtype == np.uint16 else samples)
