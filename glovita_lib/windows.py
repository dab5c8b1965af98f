"""Training on vectors that do not fit in memory: read in windows, shuffled by blocks and by rows.

The order of an epoch puts blocks of neighbouring rows in random order and shuffles the rows within
windows of many blocks. A window is read in long pieces while the one before it is trained on.

N samples, D width, W ranks.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glovita_lib.dist import Ranks, mix
from glovita_lib.feature_sources import VectorSource
from glovita_lib.held import gather
from glovita_lib.loaders import (
    Batch,
    Fit,
    Loader,
    Maker,
    build_loader,
    build_order,
    fits,
    needed,
)
from glovita_lib.order import ORDER, TrainOrder
from glovita_lib.samples import Split
from glovita_lib.spec_train import Dataloading

BLOCK_BYTES = 256 * 2**10  # neighbouring rows that stay in one window


@dataclass(slots=True)
class WindowOrder(TrainOrder):
    """A random order in which each window of consecutive batches needs few blocks of the file."""

    block: int = 1  # rows
    window: int = 1  # batches

    def permutation(self, epoch: int) -> np.ndarray:
        """Order (N,) of the samples in an epoch."""
        if not self.shuffle:
            return np.arange(self.count)
        if self._permutation is None or self._epoch != epoch:
            draw = np.random.default_rng(mix(self.seed, ORDER, epoch))
            starts = draw.permutation(-(-self.count // self.block)) * self.block
            order = (starts[:, None] + np.arange(self.block)).ravel()
            order = order[order < self.count]
            for first in range(0, self.count, self.window * self.piece):
                draw.shuffle(order[first : first + self.window * self.piece])
            self._permutation, self._epoch = order, epoch
        return self._permutation


class WindowLoader(Loader):
    """Batches of vectors from a file, read window by window.

    Each of two buffers holds a window: one is read while batches are gathered from the other.
    """

    def __init__(self, *args: Any, window: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = window  # batches
        self._buffers: list[Tensor] = []  # of the epoch before, as fresh memory is slow

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from batch `start` on."""
        empty = torch.from_numpy(self.maker.source.vectors.empty(0))
        buffers, self._buffers = self._buffers or [empty, empty], []
        with ThreadPoolExecutor(1) as pool:
            ahead: deque[Future] = deque()
            while start < len(self):
                stop = min(len(self), start - start % self.window + self.window)
                ahead.append(pool.submit(self.read, epoch, start, stop, buffers))
                if len(ahead) > 1:
                    yield from self.cut(*ahead.popleft().result())
                start = stop
            while ahead:
                yield from self.cut(*ahead.popleft().result())
        self._buffers = buffers

    def read(
        self, epoch: int, start: int, stop: int, buffers: list[Tensor]
    ) -> tuple[list[np.ndarray], Tensor, np.ndarray]:
        """Read a window into the buffer that comes next -> the rows of each batch, the buffer, and
        where in it their vectors are."""
        source, parts = self.maker.source, [self.rows(epoch, b) for b in range(start, stop)]
        wanted, places = np.unique(source.index[np.concatenate(parts)], return_inverse=True)
        buffer = buffers.pop(0)
        if len(buffer) < len(wanted):
            buffer = torch.from_numpy(source.vectors.empty(len(wanted)))
        source.vectors.read_rows(wanted, buffer.numpy()[: len(wanted)])
        buffers.append(buffer)
        return parts, buffer, places

    def cut(self, parts: list[np.ndarray], buffer: Tensor, places: np.ndarray) -> Iterator[Batch]:
        """The batches of a window."""
        targets, ends = self.split.targets, np.cumsum([len(rows) for rows in parts])
        for rows, where in zip(parts, np.split(places, ends[:-1]), strict=True):
            inputs = gather(buffer, where, pinned=self.pinned)
            labels = None if targets is None else torch.from_numpy(targets[rows])
            yield self.pin(Batch(inputs, labels, torch.from_numpy(rows), fitted=True))


def build_feature_loader(
    split: Split,
    spec: Dataloading,
    *,
    fit: Fit | None,
    window_mb: int,
    train: bool,
    seed: int,
    ranks: Ranks,
    batch_size: int,
) -> Loader:
    """Loader of vectors or bags on this rank: from memory where they fit, else by windows (vectors)
    or bag by bag.

    Args:
        fit: as for build_loader; vectors and bags have no geometry and ask nothing of it.
        window_mb: size of a window of vectors, MiB.
    """
    source = split.source
    first, end = needed(split, train=train, ranks=ranks)
    if fits(split, spec, end - first) or not isinstance(source, VectorSource):
        return build_loader(
            split, spec, fit=fit, train=train, seed=seed, ranks=ranks, batch_size=batch_size
        )
    order = build_order(split, spec, train=train, seed=seed, ranks=ranks, batch_size=batch_size)
    row = max(1, source.vectors.row_bytes)
    window = max(1, window_mb * 2**20 // (row * batch_size * ranks.world))
    if isinstance(order, TrainOrder):
        chunk = source.vectors.chunk_rows or 1
        block = -(-max(1, BLOCK_BYTES // row) // chunk) * chunk  # whole chunks
        order = WindowOrder(
            count=order.count,
            batch_size=order.batch_size,
            shuffle=order.shuffle,
            drop_last=order.drop_last,
            seed=order.seed,
            rank=order.rank,
            world=order.world,
            block=block,
            window=window,
        )
    maker = Maker(source, 0, split.targets, fit, seed, ranks.rank, True)
    return WindowLoader(split, order, maker, spec, held=False, device=ranks.device, window=window)
