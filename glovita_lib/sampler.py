"""The order of samples in an epoch."""

from dataclasses import dataclass, field

import numpy as np
import torch

from glovita_lib.dist import hash_seed
from glovita_lib.errors import UserError, listed

# ----------------------------------------------------------------------- batches of an epoch
#
# N samples, W ranks, G samples of an optimizer step over all ranks, n those of one of the last
# steps of an epoch, which may be fewer.

ORDER = 101  # stream of the seed that orders the samples


@dataclass(slots=True)
class TrainOrder:
    """Batches of training on one rank: steps, batches and random streams do not depend on W.

    The permutation of an epoch is cut into steps of G samples, and each step into batches of at
    most `batch_size`, as equal as they can be. The ranks take the batches of a step in turn, batch
    j goes to rank j % W: two ranks that take a batch each and one that accumulates two do the same.
    No sample is left out or taken twice. Where a step has fewer batches than ranks, the others get
    samples of the step with weight 0, as all must take part in the exchange of gradients.

    Batch norm cannot train on a batch of one sample. A last step of one takes another from the step
    before it (of two, it joins it), and no step is cut into batches of one unless most are.
    """

    count: int  # N
    batch_size: int
    step_size: int  # G, which W divides
    shuffle: bool
    unit: int  # samples that are left out behind the last multiple of it; 1: none
    seed: int
    rank: int
    world: int  # W
    full: int = field(init=False)
    """Steps of G samples, which come first."""
    tail: list[int] = field(init=False)
    """Samples of the steps behind them, at most two."""
    full_rounds: int = field(init=False)
    """Batches that each rank makes in a step of G samples."""
    _epoch: int = -1
    _permutation: np.ndarray | None = None

    def __post_init__(self) -> None:
        size = self.step_size
        self.full, rest = divmod(self.count - self.count % self.unit, size)
        self.tail = [rest] if rest else []
        if rest == 1 and self.full and size > 1:
            self.full -= 1
            self.tail = [size + 1] if size == 2 else [size - 1, 2]
        self.full_rounds = self.rounds(size)

    # ------------------------------------------------------------------ steps

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.full + len(self.tail)

    def edge(self, step: int) -> int:
        """Samples of an epoch before a step; of the step behind the last one all."""
        return min(step, self.full) * self.step_size + sum(self.tail[: max(0, step - self.full)])

    def step_behind(self, samples: int) -> int:
        """The step that begins when so many samples of an epoch are done."""
        step = min(samples // self.step_size, self.full)
        while self.edge(step) < samples:
            step += 1
        assert self.edge(step) == samples, "not between two steps"
        return step

    # ------------------------------------------------------------------ batches

    @property
    def batches(self) -> int:
        """Batches of a step of G samples, over all ranks."""
        return self.world * -(-self.step_size // (self.world * self.batch_size))

    def cuts(self, samples: int) -> int:
        """Batches of a step of so many samples, over all ranks."""
        least = 2 if self.batches < self.step_size else 1
        return max(1, min(-(-samples * self.batches // self.step_size), samples // least))

    def rounds(self, samples: int) -> int:
        """Batches that each rank makes in a step of so many samples."""
        return -(-self.cuts(samples) // self.world)

    def first_batch(self, step: int) -> int:
        """The first batch of a step on this rank; of the step behind the last one their number."""
        behind = self.tail[: max(0, step - self.full)]
        return min(step, self.full) * self.full_rounds + sum(map(self.rounds, behind))

    def __len__(self) -> int:
        return self.first_batch(self.steps)

    def step_of(self, batch: int) -> int:
        """The step that a batch of this rank belongs to."""
        step = min(batch // self.full_rounds, self.full)
        while self.first_batch(step + 1) <= batch:
            step += 1
        return step

    def ends_step(self, batch: int) -> bool:
        """Whether a batch is the last one of its step."""
        return self.first_batch(self.step_of(batch) + 1) == batch + 1

    def span(self, batch: int) -> tuple[int, int]:
        """First place of a batch in the permutation and the first one behind; the same place where
        there is no batch for this rank."""
        step = self.step_of(batch)
        first, behind = self.edge(step), self.edge(step + 1)
        cuts = self.cuts(behind - first)
        number = min((batch - self.first_batch(step)) * self.world + self.rank, cuts)
        start, stop = ((behind - first) * min(cut, cuts) // cuts for cut in (number, number + 1))
        return first + start, first + stop

    def size(self, batch: int) -> int:
        """Samples of a batch that count."""
        start, stop = self.span(batch)
        return stop - start

    def share(self, batch: int) -> float:
        """Weight of the mean loss of a batch, so that the mean over the ranks of the sums over the
        batches of a step is the mean over its samples."""
        step = self.step_of(batch)
        return self.size(batch) * self.world / (self.edge(step + 1) - self.edge(step))

    def place(self, batch: int) -> int:
        """What the random streams of a batch follow from, beside seed and epoch: its first place
        in the permutation, which no other batch of the epoch has on any number of ranks."""
        return self.span(batch)[0]

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Rows of the split that make up a batch."""
        start, stop = self.span(batch)
        if start == stop:  # of weight 0
            step = self.step_of(batch)
            start = self.edge(step)
            stop = min(start + 2, self.edge(step + 1))
        return self.permutation(epoch)[start:stop]

    def permutation(self, epoch: int) -> np.ndarray:
        """Order (N,) of the samples in an epoch."""
        if not self.shuffle:
            return np.arange(self.count)
        if self._permutation is None or self._epoch != epoch:
            self._permutation, self._epoch = self.draw(epoch), epoch
        return self._permutation

    def draw(self, epoch: int) -> np.ndarray:
        """A random order (N,) for an epoch."""
        generator = torch.Generator().manual_seed(hash_seed(self.seed, ORDER, epoch))
        return torch.randperm(self.count, generator=generator).numpy()

    @property
    def drawn_by(self) -> str:
        """What the random order follows from beside N and the seed."""
        return "samples"


def check_ranks(step_size: int, world: int) -> None:
    """Check that the ranks can share the samples of a step.

    Raises:
        UserError: they cannot, with the numbers of ranks that can.
    """
    if step_size % world == 0:
        return
    numbers = [str(ranks) for ranks in range(1, step_size + 1) if step_size % ranks == 0]
    raise UserError(
        f"the run takes {step_size} samples an optimizer step, which {world} ranks cannot share"
        f" equally: continue it on {listed(numbers, 12)} ranks, or set training.on_existing ="
        ' "overwrite" to train again'
    )


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

    def place(self, batch: int) -> int:
        """What the random streams of a batch follow from: its first row."""
        return self.shard[0] + batch * self.batch_size

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Rows of the split that make up a batch, the same in every epoch."""
        first, end = self.shard
        start = first + batch * self.batch_size
        return np.arange(start, min(start + self.batch_size, end))


# ------------------------------------------------------------------------- windows of a file


@dataclass(slots=True)
class WindowOrder(TrainOrder):
    """A random order in which each window of consecutive steps needs few blocks of the file."""

    block: int = 1  # rows
    window: int = 1  # steps

    def draw(self, epoch: int) -> np.ndarray:
        """A random order (N,) for an epoch."""
        draw = np.random.default_rng(hash_seed(self.seed, ORDER, epoch))
        starts = draw.permutation(-(-self.count // self.block)) * self.block
        order = (starts[:, None] + np.arange(self.block)).ravel()
        order = order[order < self.count]
        for first in range(0, self.count, self.window * self.step_size):
            draw.shuffle(order[first : first + self.window * self.step_size])
        return order

    @property
    def drawn_by(self) -> str:
        """What the random order follows from beside N and the seed."""
        return f"blocks of {self.block} in windows of {self.window} steps"
