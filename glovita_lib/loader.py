"""Batches: splits kept in memory, the making of a batch, and loading by worker processes."""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from glovita_lib.data import CachedSource, Source, Split, Standardizer, VideoFrames
from glovita_lib.dist import BatchTask, Ranks, WorkerPool, cores, hash_seed
from glovita_lib.errors import UserError
from glovita_lib.sampler import EvalOrder, TrainOrder
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_train import Dataloading

# -------------------------------------------------------------------------- splits in memory
#
# Decoded splits in memory, of the host or of the GPU.
#
# N samples, C channels, H W pixels, X Y Z voxels.

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 32  # samples a thread decodes at a time
TOLD_FROM = 2000  # samples whose decoding is announced
# Shares of a GPU's free memory that a split may stay in, which saves a copy per batch. An encoder
# of images needs the rest for activations, which come only with the first batch; a head on vectors
# needs next to nothing, and half leaves as much to the next split.
IMAGE_SHARE, VECTOR_SHARE = 0.1, 0.5


def hold(
    source: Source,
    rows: np.ndarray,
    *,
    fit: Callable[[np.ndarray | list[Any]], np.ndarray] | None,
    windows: Callable[[np.ndarray], list[Any]] | None,
    threads: int,
    shown: bool,
) -> CachedSource:
    """Decode rows of a source, in threads.

    Vectors are read all at once instead of a few at a time: their file is read in long pieces by
    threads of its own, and each of its chunks is inflated once.

    Args:
        fit: crops and resizes samples once, where that is the same in every epoch (evaluation).
        windows: what reads samples that are fitted from windows, see Source.windows.
        shown: whether a long decoding is announced.

    Raises:
        UserError: one line for each sample that cannot be read.
    """
    once = fit if windows or (source.collate is None and source.uniform is None) else None
    if shown and len(rows) >= TOLD_FROM and source.nbytes() > 2**28:
        print(f"decoding {len(rows)} samples into memory", file=sys.stderr, flush=True)
    if source.reads_at_once:
        return CachedSource(source.fetch(rows), fitted=False)

    def decode(part: np.ndarray) -> np.ndarray | list[Any]:
        samples = source.fetch(part) if windows is None else windows(part)
        if once is not None:
            return once(samples)
        return samples if windows is None else [sample.loaded() for sample in samples]

    parts = in_threads(decode, np.array_split(rows, -(-len(rows) // CHUNK)), threads)
    if source.collate is not None:
        return CachedSource([sample for part in parts for sample in part], False, source.collate)
    return CachedSource(join_parts(parts, len(rows)), fitted=once is not None)


def join_parts(parts: Iterator[np.ndarray | list[Any]], count: int) -> np.ndarray | list[Any]:
    """Decoded parts as one array if they are arrays, written into it one by one, else a list."""
    array: np.ndarray | None = None
    samples: list[Any] = []
    done = 0
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.empty((count, *part.shape[1:]), part.dtype) if array is None else array
            array[done : done + len(part)] = part
            done += len(part)
        else:
            samples.extend(part)
    return samples if array is None else array


def in_threads(work: Callable[[Item], Result], items: list[Item], threads: int) -> Iterator[Result]:
    """Results in the order of the items; user errors of all items are raised as one.

    Raises:
        UserError: the lines of all errors.
    """
    errors: list[str] = []
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * threads:
                yield from settled(ahead.popleft(), errors)
        while ahead:
            yield from settled(ahead.popleft(), errors)
    if errors:
        raise UserError("\n".join(errors))


def settled(future: Future[Result], errors: list[str]) -> Iterator[Result]:
    """The result, unless it or an earlier one is a user error; its lines are added to `errors`."""
    try:
        result = future.result()
    except UserError as error:
        errors += str(error).splitlines()
        return
    if not errors:
        yield result


def to_device(samples: Any, device: torch.device) -> Tensor | None:
    """Uniform samples in memory on a GPU with room for them; None elsewhere."""
    if device.type != "cuda" or not isinstance(samples, np.ndarray):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    size = samples.nbytes * (2 if samples.dtype == np.uint16 else 1)
    if size > free * (VECTOR_SHARE if samples.ndim == 2 else IMAGE_SHARE):
        return None
    if samples.dtype == np.uint16:
        samples = samples.astype(np.int32)  # torch calculates with few operations on uint16
    return torch.from_numpy(samples).to(device)


def gather_samples(samples: Tensor, rows: np.ndarray, *, pinned: bool) -> Tensor:
    """Rows of samples on the host, copied once, into page-locked memory where that is asked for."""
    out = samples.new_empty((len(rows), *samples.shape[1:]), pin_memory=pinned)
    # NumPy copies in this thread alone: torch's threads take longer to wake up than to copy a
    # batch, and those of the training are busy. Mode raise would copy twice.
    np.take(samples.numpy(), rows, axis=0, out=out.numpy(), mode="clip")
    return out


# ----------------------------------------------------------------------------------- a batch
#
# B batch, C channels, H W pixels, S side of the encoder's input, K classes or targets.

FIT = 3  # number of the random stream


class Resizing(Protocol):
    """Crop and resize of single samples to the encoder's input, see augment_crop.CropResize and
    augment_patch.PatchCut and WholeVolumes, loader_video.ClipCut."""

    @property
    def one_size(self) -> bool: ...

    def boxes(self, sizes: np.ndarray, generator: torch.Generator) -> Tensor: ...

    def one(self, sample: Any, box: Tensor, /) -> Any: ...

    def join(self, parts: list[Any], samples: Sequence[Any], /) -> Any: ...


@dataclass(slots=True)
class Batch:
    """Samples as they come from disk or memory; augmentation follows on the training device."""

    inputs: Any
    """(B, C, H, W) uint8, or int32 for 16-bit images; (B, C, X, Y, Z); or as collated."""
    targets: Tensor | None
    """(B,) int64 or (B, K) float32; of a regression standardised; of frames (B, T) int64,
    UNLABELLED where one has no label or is repeated."""
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


def same_values(one: Resizing | None, other: Resizing | None) -> bool:
    """Whether two ways to fit samples are the same, by their parameters."""
    if one is None or other is None or type(one) is not type(other):
        return one is other
    pairs = ((value, vars(other)[name]) for name, value in vars(one).items())
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@dataclass(frozen=True, slots=True)
class BatchBuilder:
    """Makes batches of rows; runs in this process, in threads or in worker processes."""

    source: Source | CachedSource
    first: int  # row of the split that is row 0 of the source
    targets: np.ndarray | None
    fit: Resizing | None  # for samples of differing sizes that their source does not collate
    seed: int
    scale: Standardizer | None = None  # of the targets of a regression
    frames: VideoFrames | None = None  # of videos with labels of frames

    def __call__(self, task: BatchTask, *, pinned: bool = False) -> Batch:
        """Batch of a task.

        Args:
            pinned: whether what needs only a copy is copied into page-locked memory.

        Raises:
            UserError: a sample cannot be read.
        """
        epoch, place, rows = task
        if (samples := self.ready) is not None:
            inputs, fitted = gather_samples(samples, rows - self.first, pinned=pinned), self.fitted
        else:
            seed = hash_seed(self.seed, epoch, place, FIT)
            read = self.windows or self.source.fetch
            inputs, fitted = self.inputs(read(rows - self.first), seed)
        targets = self.labels(rows)
        if self.frames is not None:
            targets = self.labels_of_frames(self.frames, rows, inputs)
        return Batch(inputs, targets, torch.from_numpy(rows), fitted)

    def labels_of_frames(self, frames: VideoFrames, rows: np.ndarray, clips: Any) -> Tensor | None:
        """Targets (B, T) of the frames of augment.Clips."""
        if frames.labels is None:
            return None
        videos = frames.video_of[rows].tolist()
        each = [frames.labels[v][at] for v, at in zip(videos, clips.frames.numpy(), strict=True)]
        return torch.from_numpy(np.stack(each)).where(clips.real, UNLABELLED)

    def labels(self, rows: np.ndarray) -> Tensor | None:
        """Targets (B,) or (B, K) of rows, as a model learns them."""
        if self.targets is None:
            return None
        targets = self.targets[rows]
        return torch.from_numpy(targets if self.scale is None else self.scale.standardized(targets))

    def makes_same(self, other: "BatchBuilder") -> bool:
        """Whether another one makes the same batches of the same objects."""
        parts = ((b.source, b.targets, b.scale) for b in (self, other))
        numbers = (self.first, self.seed) == (other.first, other.seed)
        same = numbers and all(a is b for a, b in zip(*parts, strict=True))
        return same and same_values(self.fit, other.fit)

    @property
    def fitted(self) -> bool:
        """Whether the source's samples are fitted already."""
        return isinstance(self.source, CachedSource) and self.source.fitted

    @property
    def ready(self) -> Tensor | None:
        """All samples (N, ...) where they are in memory as torch calculates with them."""
        samples = self.source.samples if isinstance(self.source, CachedSource) else None
        if not isinstance(samples, np.ndarray) or samples.dtype == np.uint16:
            return None
        return torch.from_numpy(samples)

    @property
    def windows(self) -> Callable[[np.ndarray], list[Any]] | None:
        """What reads samples that are fitted from windows; None of samples that are read whole."""
        return None if self.fit is None else self.source.windows

    def inputs(self, samples: np.ndarray | list[Any], seed: int) -> tuple[Any, bool]:
        """Inputs of a batch, and whether they are fitted."""
        if self.source.collate is not None:
            return self.source.collate(samples), False
        if isinstance(samples, np.ndarray):
            return to_tensor(samples), self.fitted
        assert self.fit is not None  # for what differs in size and is not collated
        return fit_all(samples, self.fit, seed), True


def fit_all(samples: np.ndarray | list[Any], fit: Resizing, seed: int) -> Any:
    """Samples of any sizes as one batch: (B, C, S, S) or (B, C, X, Y, Z), each with a window, or
    what `fit` makes of samples that keep their size."""
    sizes = np.array([sample.shape[1:] for sample in samples])  # (B, 2 or 3)
    boxes = fit.boxes(sizes, torch.Generator().manual_seed(seed))
    with one_core():
        parts = [fit.one(*pair) for pair in zip(samples, boxes, strict=True)]
        return fit.join(parts, list(samples))


def fit_once(samples: np.ndarray | list[Any], fit: Resizing, seed: int) -> np.ndarray:
    """The same as an array, where all get one size."""
    fitted: Tensor = fit_all(samples, fit, seed)
    return fitted.numpy()


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


# ----------------------------------------------------------------------------------- loaders
#
# Batches of a split: from memory where it fits, else decoded by worker processes.
#
# Small data sets are decoded once and kept; a batch is then one gather. Nothing a loader does
# depends on state: batch b of an epoch is the same however often and from where the iteration is
# started, in memory or not, with any number of workers.
#
# B batch, C channels, H W pixels, S side of the encoder's input, K classes or targets.

MAX_WORKERS = 12


class LoaderOptions(TypedDict):
    """What a loader is built with beside its split and the section dataloading."""

    fit: Resizing | None
    train: bool
    seed: int
    ranks: Ranks
    batch_size: int
    scale: NotRequired[Standardizer | None]
    pool: NotRequired[WorkerPool | None]
    step_size: NotRequired[int | None]
    accumulation: NotRequired[int]


def build_loader(
    split: Split,
    spec: Dataloading,
    *,
    fit: Resizing | None,
    train: bool,
    seed: int,
    ranks: Ranks,
    batch_size: int,
    scale: Standardizer | None = None,
    pool: WorkerPool | None = None,
    step_size: int | None = None,
    accumulation: int = 1,
) -> "Loader":
    """Loader of a split on this rank, with the split decoded in memory if it fits.

    Args:
        batch_size: most samples of a batch.
        scale: what the targets of a regression are standardised by.
        pool: worker processes that it has in common with other loaders; none: it has its own.
        step_size: samples of an optimizer step over all ranks; none: those of `accumulation`
            batches on each.
        accumulation: batches of an optimizer step on each rank that the run was started on.

    Raises:
        UserError: nothing to train on, or (listed together) samples that cannot be read or are
            too small for the crop.
    """
    check_batch_sizes(split, fit)
    order = build_order(
        split,
        spec,
        train=train,
        seed=seed,
        ranks=ranks,
        batch_size=batch_size,
        step_size=step_size,
        accumulation=accumulation,
    )
    first, end = needed(split, train=train, ranks=ranks)
    builder = BatchBuilder(split.source, 0, split.targets, fit, seed, scale, split.frames)
    if end > first and fits_in_memory(split, spec, end - first):
        once = None
        if not train and fit is not None and fit.one_size:
            once = partial(fit_once, fit=fit, seed=seed)
        rows, shown = np.arange(first, end), ranks.is_main
        source = hold(
            split.source, rows, fit=once, windows=builder.windows, threads=cores(), shown=shown
        )
        builder = replace(builder, source=source, first=first)
    return Loader(split, order, builder, spec, device=ranks.device, pool=pool)


def announce(
    split: Split,
    spec: Dataloading,
    *,
    fit: Resizing | None,
    seed: int,
    ranks: Ranks,
    scale: Standardizer | None,
    pool: WorkerPool,
) -> None:
    """Let worker processes know a split that `build_loader` will be asked to evaluate after they
    have started."""
    first, end = needed(split, train=False, ranks=ranks)
    if end > first and not fits_in_memory(split, spec, end - first):
        builder = BatchBuilder(split.source, 0, split.targets, fit, seed, scale, split.frames)
        pool.add(builder)


def needed(split: Split, *, train: bool, ranks: Ranks) -> tuple[int, int]:
    """First row that this rank needs and the first one behind: in training all rows, which every
    epoch shares out anew."""
    if train:
        return 0, len(split)
    return EvalOrder(len(split), 1, ranks.rank, ranks.world).shard


def fits_in_memory(split: Split, spec: Dataloading, count: int) -> bool:
    """Whether so many samples of a split, decoded, fit in memory as the spec limits it."""
    return split.source.nbytes() * count <= spec.in_memory_mb * 2**20 * len(split)


def check_batch_sizes(split: Split, fit: Resizing | None) -> None:
    """Refuse images that are too small for the crop before anything is decoded.

    Raises:
        UserError: the images and why.
    """
    sizes = split.source.sizes
    if sizes is None or fit is None:
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
    raise UserError("\n".join(lines))


def build_order(
    split: Split,
    spec: Dataloading,
    *,
    train: bool,
    seed: int,
    ranks: Ranks,
    batch_size: int,
    step_size: int | None,
    accumulation: int,
) -> TrainOrder | EvalOrder:
    """Which samples make up which batch; arguments as for build_loader.

    Raises:
        UserError: no batch to train on.
    """
    if not train:
        return EvalOrder(len(split), batch_size, ranks.rank, ranks.world)
    step_size = step_size or batch_size * accumulation * ranks.world
    order = TrainOrder(
        count=len(split),
        batch_size=batch_size,
        step_size=step_size,
        shuffle=spec.shuffle_train,
        unit=step_size // accumulation if spec.drop_last_train else 1,
        seed=seed,
        rank=ranks.rank,
        world=ranks.world,
    )
    if len(order) == 0:
        raise UserError(
            f"no training batch: the train split has {len(split)} samples, a batch of"
            f" {batch_size} on each of {ranks.world} ranks needs {order.unit}; lower"
            " dataloading.batch_size or set dataloading.drop_last_train = false"
        )
    return order


class Loader:
    """Batches of a split on this rank."""

    def __init__(
        self,
        split: Split,
        order: TrainOrder | EvalOrder,
        builder: BatchBuilder,
        spec: Dataloading,
        *,
        device: torch.device,
        pool: WorkerPool | None = None,
    ) -> None:
        self.split, self.order, self.builder, self.spec = split, order, builder, spec
        self.held, self.device = isinstance(builder.source, CachedSource), device
        self.pinned = spec.pin_memory and device.type == "cuda"
        self.workers = self.count_workers()
        self.resident: tuple[Tensor, Tensor | None] | None = None
        if isinstance(builder.source, CachedSource):
            samples = to_device(builder.source.samples, device)
            if samples is not None:
                labels = builder.labels(np.arange(len(split)))
                self.resident = samples, None if labels is None else labels.to(device)
        # Samples in memory go with their loader: no workers of others keep them.
        self.owns_pool = pool is None or self.held
        self.pool = WorkerPool(spec, device) if pool is None or self.held else pool
        if self.uses_processes:
            self.pool.add(builder, self.workers)

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self.order)

    def rows(self, epoch: int, batch: int) -> np.ndarray:
        """Rows of the split that a batch is made of."""
        return self.order.rows(epoch, batch)

    def facts(self) -> dict[str, Any]:
        """How batches are made on this rank, as builtin types."""
        spec = self.spec
        return {
            "batches": len(self.order),
            "in_memory": self.held,
            "on_device": self.resident is not None,
            "num_workers": self.workers if self.uses_processes else 0,
            "threads": 0 if self.uses_processes else self.workers,
            "pin_memory": self.pinned,
            "persistent_workers": self.uses_processes and spec.persistent_workers,
            "prefetch_factor": spec.prefetch_factor if self.workers else None,
            "timeout": spec.timeout,
        }

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
        return self.held and self.builder.source.uniform is not None

    @property
    def uses_processes(self) -> bool:
        """Whether batches are made by worker processes."""
        in_threads = self.is_ready or (self.held and self.spec.num_workers is None)
        return self.workers > 0 and not in_threads

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from batch `start` on.

        Raises:
            UserError: a sample cannot be read, a worker died or took longer than the timeout.
        """
        if self.resident is not None:
            return self.gathered(epoch, start, *self.resident)
        place = self.order.place
        tasks = ((epoch, place(b), self.rows(epoch, b)) for b in range(start, len(self)))
        if self.workers == 0:
            return (self.make(task) for task in tasks)
        if not self.uses_processes:
            return self.threaded(tasks)
        return self.pool.batches(self.builder, tasks)

    def gathered(
        self, epoch: int, start: int, samples: Tensor, targets: Tensor | None
    ) -> Iterator[Batch]:
        """Batches of samples that live on the GPU; the order is copied there once an epoch."""
        parts = [self.rows(epoch, b) for b in range(start, len(self))]
        if not parts:
            return
        order = torch.from_numpy(np.concatenate(parts)).to(self.device)
        for rows in order.split([len(part) for part in parts]):
            inputs = samples.index_select(0, rows - self.builder.first)
            labels = None if targets is None else targets.index_select(0, rows)
            yield Batch(inputs, labels, rows, self.builder.fitted)

    def threaded(self, tasks: Iterator[BatchTask]) -> Iterator[Batch]:
        """Batches made ahead by threads; torch's and PIL's work runs outside Python's lock."""
        pool = ThreadPoolExecutor(self.workers)
        ahead: deque[Future[Batch]] = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(self.make, task))
                if len(ahead) > self.workers * self.spec.prefetch_factor:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def make(self, task: BatchTask) -> Batch:
        """Batch of a task, in page-locked memory where that helps; not for worker processes."""
        return self.pin(self.builder(task, pinned=self.pinned))

    def pin(self, batch: Batch) -> Batch:
        """The batch in page-locked memory where that helps."""
        return batch.pin_memory() if self.pinned else batch

    def close(self) -> None:
        """End the worker processes, unless other loaders have them too."""
        if self.owns_pool:
            self.pool.close()
