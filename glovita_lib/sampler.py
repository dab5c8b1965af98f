"""The order of samples in an epoch."""

from dataclasses import dataclass

import numpy as np
import torch

from glovita_lib.dist import hash_seed

# ----------------------------------------------------------------------- batches of an epoch
#
# The samples of a batch are a function of (seed, epoch, batch, rank) and nothing else.
#
# N samples, W ranks.

ORDER = 101  # stream of the seed that orders the samples


@dataclass(slots=True)
class TrainOrder:
    """Batches of training: every rank has the same number, of the same sizes.

    The permutation of an epoch is cut into pieces of W * batch_size samples, one piece for the
    batches of one index, so that the ranks together see what a single rank with the batch size
    W * batch_size sees. The last piece may be smaller: each rank takes an equal share of it,
    filled up from the start of the permutation with at most W - 1 samples. A share of a single
    sample is filled up to two, as batch norm cannot train on one.
    """

    count: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    rank: int
    world: int
    _epoch: int = -1
    _permutation: np.ndarray | None = None

    @property
    def piece(self) -> int:
        """Samples of one batch index over all ranks."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        return self.count // self.piece if self.drop_last else -(-self.count // self.piece)

    def size(self, batch: int) -> int:
        """Samples of a batch on this rank, the same on every rank."""
        share = -(-min(self.piece, self.count - batch * self.piece) // self.world)
        return max(share, min(2, self.batch_size, self.count))

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Rows of the split that make up a batch."""
        size = self.size(batch)
        start = batch * self.piece + self.rank * size
        return self.permutation(epoch)[np.arange(start, start + size) % self.count]

    def permutation(self, epoch: int) -> np.ndarray:
        """Order (N,) of the samples in an epoch."""
        if not self.shuffle:
            return np.arange(self.count)
        if self._permutation is None or self._epoch != epoch:
            generator = torch.Generator().manual_seed(hash_seed(self.seed, ORDER, epoch))
            self._permutation = torch.randperm(self.count, generator=generator).numpy()
            self._epoch = epoch
        return self._permutation


@dataclass(frozen=True, slots=True)
class EvalOrder:
    """Batches of evaluation: every sample once, in order, in one contiguous shard a rank. Shards
    differ by at most one sample and may be empty."""

    count: int
    batch_size: int
    rank: int
    world: int

    @property
    def shard(self) -> tuple[int, int]:
        """First row of this rank, and the first one of the next."""
        first, end = (self.count * rank // self.world for rank in (self.rank, self.rank + 1))
        return first, end

    def __len__(self) -> int:
        first, end = self.shard
        return -(-(end - first) // self.batch_size)

    def size(self, batch: int) -> int:
        """Samples of a batch."""
        return len(self.rows(0, batch))

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Rows of the split that make up a batch, the same in every epoch."""
        first, end = self.shard
        start = first + batch * self.batch_size
        return np.arange(start, min(start + self.batch_size, end))


# ------------------------------------------------------------------------- windows of a file


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
            draw = np.random.default_rng(hash_seed(self.seed, ORDER, epoch))
            starts = draw.permutation(-(-self.count // self.block)) * self.block
            order = (starts[:, None] + np.arange(self.block)).ravel()
            order = order[order < self.count]
            for first in range(0, self.count, self.window * self.piece):
                draw.shuffle(order[first : first + self.window * self.piece])
            self._permutation, self._epoch = order, epoch
        return self._permutation
