"""Batches of a split: from memory where it fits, else decoded by worker processes.

Small data sets are decoded once and kept; a batch is then one gather. Nothing a loader does depends
on state: batch b of an epoch is the same however often and from where the iteration is started, in
memory or not, with any number of workers.

B batch, C channels, H W pixels, S side of the encoder's input, K classes or targets.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from glovita_lib.batches import Batch, Fit, Maker, Task, fit_all, to_tensor
from glovita_lib.dist import Ranks
from glovita_lib.held import hold, shortened, to_device
from glovita_lib.order import EvalOrder, TrainOrder
from glovita_lib.samples import Split
from glovita_lib.spec import UserError
from glovita_lib.spec_train import Dataloading

__all__ = [
    "Batch",
    "Fit",
    "Loader",
    "Maker",
    "build_loader",
    "build_order",
    "cores",
    "fit_all",
    "to_tensor",
]

MAX_WORKERS = 12


def build_loader(
    split: Split,
    spec: Dataloading,
    *,
    fit: Fit,
    train: bool,
    seed: int,
    ranks: Ranks,
    batch_size: int,
) -> "Loader":
    """Loader of a split on this rank, with the split decoded in memory if it fits.

    Raises:
        UserError: nothing to train on, or (listed together) samples that cannot be read or are
            too small for the crop.
    """
    check_sizes(split, fit)
    order = build_order(split, spec, train=train, seed=seed, ranks=ranks, batch_size=batch_size)
    first, end = needed(split, train=train, ranks=ranks)
    source, fitted = split.source, False
    held = end > first and fits(split, spec, end - first)
    if held:
        once = None if train else lambda samples: fit_all(samples, fit, seed).numpy()
        source = hold(source, np.arange(first, end), fit=once, threads=cores(), shown=ranks.is_main)
        fitted = source.fitted
    maker = Maker(source, first if held else 0, split.targets, fit, seed, ranks.rank, fitted)
    return Loader(split, order, maker, spec, held=held, device=ranks.device)


def needed(split: Split, *, train: bool, ranks: Ranks) -> tuple[int, int]:
    """First row that this rank needs and the first one behind: in training all rows, which every
    epoch shares out anew."""
    if train:
        return 0, len(split)
    return EvalOrder(len(split), 1, ranks.rank, ranks.world).shard


def fits(split: Split, spec: Dataloading, count: int) -> bool:
    """Whether so many samples of a split, decoded, fit in memory as the spec limits it."""
    return split.source.nbytes() * count <= spec.in_memory_mb * 2**20 * len(split)


def check_sizes(split: Split, fit: Fit) -> None:
    """Refuse images that are too small for the crop before anything is decoded.

    Raises:
        UserError: the images and why.
    """
    sizes = getattr(split.source, "sizes", None)
    if sizes is None:
        return
    generator = torch.Generator().manual_seed(0)
    try:
        fit.boxes(sizes, generator)
        return
    except UserError:
        lines = []
    for identity, size in zip(split.ids, sizes, strict=True):
        try:
            fit.boxes(size[None], generator)
        except UserError as error:
            lines.append(f"{identity}: {error}")
    raise UserError(shortened(lines))


def build_order(
    split: Split, spec: Dataloading, *, train: bool, seed: int, ranks: Ranks, batch_size: int
) -> TrainOrder | EvalOrder:
    """Which samples make up which batch.

    Raises:
        UserError: no batch to train on.
    """
    if not train:
        return EvalOrder(len(split), batch_size, ranks.rank, ranks.world)
    order = TrainOrder(
        count=len(split),
        batch_size=batch_size,
        shuffle=spec.shuffle_train,
        drop_last=spec.drop_last_train,
        seed=seed,
        rank=ranks.rank,
        world=ranks.world,
    )
    if len(order) == 0:
        raise UserError(
            f"no training batch: the train split has {len(split)} samples, a batch of"
            f" {batch_size} on each of {ranks.world} ranks needs {order.piece}; lower"
            " dataloading.batch_size or set dataloading.drop_last_train = false"
        )
    return order


def cores() -> int:
    """Cores that this rank may use."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        count = os.cpu_count() or 1
    return max(1, count // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


class Loader:
    """Batches of a split on this rank."""

    def __init__(
        self,
        split: Split,
        order: TrainOrder | EvalOrder,
        maker: Maker,
        spec: Dataloading,
        *,
        held: bool,
        device: torch.device,
    ) -> None:
        self.split, self.order, self.maker, self.spec = split, order, maker, spec
        self.held, self.device = held, device
        self.pinned = spec.pin_memory and device.type == "cuda"
        self.workers = self.count_workers()
        self.resident = to_device(maker.source, split.targets, device) if held else None
        self._tasks: list[Task] | Iterator[Task] = ()
        self._processes: DataLoader | None = None

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self.order)

    def size(self, batch: int) -> int:
        """Samples of a batch on this rank."""
        return self.order.size(batch)

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Rows of the split that a batch is made of."""
        return self.order.rows(epoch, batch)

    def count_workers(self) -> int:
        """Processes that decode, or threads that fit what is in memory; for what only has to be
        copied, one thread if it is copied into page-locked memory, else none."""
        asked = self.spec.num_workers
        if self.is_ready:
            return int(self.pinned)
        return min(len(self.order), min(cores(), MAX_WORKERS) if asked is None else asked)

    @property
    def is_ready(self) -> bool:
        """Whether a batch is a mere gather in memory."""
        return self.held and self.maker.source.uniform is not None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from batch `start` on.

        Raises:
            UserError: a sample cannot be read, a worker died or took longer than the timeout.
        """
        if self.resident is not None:
            return self.gathered(epoch, start)
        tasks = ((epoch, b, self.rows(epoch, b)) for b in range(start, len(self)))
        if self.workers == 0:
            return (self.make(task) for task in tasks)
        if self.is_ready or (self.held and self.spec.num_workers is None):
            return self.threaded(tasks)
        return self.processed(tasks)

    def gathered(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches of samples that live on the GPU; the order is copied there once an epoch."""
        samples, targets = self.resident
        parts = [self.rows(epoch, b) for b in range(start, len(self))]
        if not parts:
            return
        order = torch.from_numpy(np.concatenate(parts)).to(self.device)
        for rows in order.split([len(part) for part in parts]):
            inputs = samples.index_select(0, rows - self.maker.first)
            labels = None if targets is None else targets.index_select(0, rows)
            yield Batch(inputs, labels, rows, self.maker.fitted)

    def threaded(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        """Batches made ahead by threads; torch's and PIL's work runs outside Python's lock."""
        pool = ThreadPoolExecutor(self.workers)
        ahead: deque = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(self.make, task))
                if len(ahead) > self.workers * self.spec.prefetch_factor:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def processed(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        """Batches made ahead by worker processes, pinned by a thread."""
        self._tasks = tasks
        loader = self._processes or self.start_processes()
        try:
            for batch in loader:
                if isinstance(batch, Failure):
                    raise UserError(batch.text)
                yield batch
        except RuntimeError as error:
            raise self.explain(error) from error

    def start_processes(self) -> DataLoader:
        """The worker processes; kept for the next epoch if they are persistent."""
        spec = self.spec
        loader = DataLoader(
            WorkerSamples(self.maker),
            batch_size=None,  # a task is a whole batch
            sampler=Tasks(self),
            collate_fn=as_it_is,
            num_workers=self.workers,
            persistent_workers=spec.persistent_workers,
            prefetch_factor=spec.prefetch_factor,
            pin_memory=self.pinned,
            timeout=spec.timeout,
            worker_init_fn=ignore_interrupt,
            generator=torch.Generator(),  # leaves the global stream alone
        )
        if spec.persistent_workers:
            self._processes = loader
        return loader

    def explain(self, error: RuntimeError) -> Exception:
        """A user error of what DataLoader says about dead or slow workers; else the error."""
        self._processes = None
        text = str(error)
        if "timed out" in text:
            return UserError(
                f"no batch came within {self.spec.timeout:g} s: raise dataloading.timeout (0 waits"
                " for ever) or look for slow files"
            )
        if "exited unexpectedly" in text or "is killed by signal" in text:
            return UserError(
                f"a data worker died ({text.splitlines()[0]}), most often for want of memory or of"
                " shared memory (/dev/shm): lower dataloading.num_workers or prefetch_factor"
            )
        return error

    def make(self, task: Task) -> Batch:
        """Batch of a task, in page-locked memory where that helps; not for worker processes."""
        return self.pin(self.maker(task, pinned=self.pinned))

    def pin(self, batch: Batch) -> Batch:
        """The batch in page-locked memory where that helps."""
        return batch.pin_memory() if self.pinned else batch

    def close(self) -> None:
        """End the worker processes."""
        self._processes = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A user error that travels from a worker process."""

    text: str


@dataclass(frozen=True, slots=True)
class WorkerSamples:
    """What DataLoader indexes with a task, in a worker process."""

    maker: Maker

    def __getitem__(self, task: Task) -> Batch | Failure:
        try:
            return self.maker(task)
        except UserError as error:
            return Failure(str(error))


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of the running epoch, as DataLoader's sampler."""

    loader: Loader

    def __iter__(self) -> Iterator[Task]:
        return iter(self.loader._tasks)

    def __len__(self) -> int:
        return len(self.loader)


def as_it_is(batch: Batch | Failure) -> Batch | Failure:
    """No collation: a task already is a batch."""
    return batch


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the main process, which ends the workers."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
