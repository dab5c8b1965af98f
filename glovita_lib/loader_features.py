"""Precomputed features as the inputs of a run: standardisation, and loaders by windows of a file.

N samples, B batch, D width, W ranks.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from glovita_lib.bags import Bags
from glovita_lib.data import (
    BagSamples,
    BaseSamples,
    Data,
    Source,
    Split,
    Standardizer,
    VectorSamples,
    is_constant,
)
from glovita_lib.experiment import build_split_loader
from glovita_lib.loader import (
    Batch,
    BatchBuilder,
    Loader,
    LoaderOptions,
    Resizing,
    build_loader,
    build_order,
    fits_in_memory,
    gather_samples,
    needed,
)
from glovita_lib.objectives import build_inputs
from glovita_lib.read_features import BagSource, VectorSource, feature_scale
from glovita_lib.resolved import BagInputs, VectorInputs, resolve_inputs
from glovita_lib.sampler import EvalOrder, TrainOrder, WindowOrder
from glovita_lib.spec_data import features_of
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Dataloading

# ---------------------------------------------------------------------------- standardisation


@resolve_inputs.register
def _(samples: VectorSamples, root: Root, data: Data) -> VectorInputs:
    mean, std = moments(samples, root, data)
    return VectorInputs(width=samples.width, mean=mean, std=std)


@resolve_inputs.register
def _(samples: BagSamples, root: Root, data: Data) -> BagInputs:
    mean, std = moments(samples, root, data)
    return BagInputs(width=samples.width, mean=mean, std=std)


def moments(
    samples: BaseSamples, root: Root, data: Data
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation (D,) of the features of the train split, where the spec
    standardises them; where it does not, what float32 rounds away of them is put into the report of
    the data."""
    if not features_of(root.data).standardize:
        if root.mode == "train" and (line := rounding_line(data.splits["train"].source)):
            data.report.append(line)
        return None, None
    source = data.splits["train"].source
    assert isinstance(source, VectorSource | BagSource)  # those of precomputed features
    scale = feature_scale(source)
    return tuple(scale.mean.tolist()), tuple(scale.std.tolist())


ROUNDED = 0.01  # of a column's deviation: steps of float32 that are worth a line


def rounding_line(source: Source) -> str | None:
    """A line about columns of float64 features that vary so little beside their size that the
    float32 of a model keeps few of their digits; all features of the source are looked at."""
    match source:
        case VectorSource():
            size = source.vectors.dtype.itemsize
        case BagSource():
            size = source.reader.item_bytes
        case _:
            return None
    if size <= np.dtype(np.float32).itemsize:
        return None
    scale = feature_scale(source)
    count = int(source.lengths().sum()) if isinstance(source, BagSource) else len(source.index)
    step = np.spacing(np.abs(scale.mean).astype(np.float32))
    varies = (scale.std != 1) & ~is_constant(scale.mean, scale.std**2, count)
    lost = np.flatnonzero(varies & (step > ROUNDED * scale.std))
    if not len(lost):
        return None
    column = lost[np.argmax(step[lost] / scale.std[lost])]
    return (
        f"float32, which a model computes with, keeps few digits of {len(lost)} of"
        f" {len(scale.mean)} columns of the float64 features (column {column}:"
        f" {scale.mean[column]:.10g} with deviation {scale.std[column]:.3g}, in steps of"
        f" {step[column]:.3g}): set data.standardize = true"
    )


class FeatureInputs:
    """Precomputed features as a head takes them, standardised where the spec asks for it."""

    fit: Resizing | None = None

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.scale: Standardizer | None = None
        if mean is not None and std is not None:
            self.scale = Standardizer(np.array(mean), np.array(std))

    def __call__(self, inputs: Tensor | Bags, fitted: bool, seed: int) -> Tensor | Bags:
        """Vectors (B, D) in float32; bags as they are, their heads convert piece by piece. Bags of
        one size that are kept in memory come as (B, N, D)."""
        if not isinstance(inputs, Bags):
            vectors = self.standardized(inputs)
            return vectors if vectors.ndim == 2 else Bags.from_padded(vectors, None)
        if self.scale is None:
            return inputs
        return Bags(self.standardized(inputs.features), inputs.lengths)

    def standardized(self, features: Tensor) -> Tensor:
        """Features (N, D) in float32, of mean 0 and deviation 1 over the train split if asked."""
        return features.float() if self.scale is None else self.scale(features)


@build_inputs.register
def _(inputs: VectorInputs | BagInputs, *, train: bool) -> FeatureInputs:
    return FeatureInputs(inputs.mean, inputs.std)


# ------------------------------------------------------------------------ loaders of windows
#
# Training on vectors that do not fit in memory: read in windows, shuffled by blocks and by rows.
#
# The order of an epoch puts blocks of neighbouring rows in random order and shuffles the rows
# within windows of many blocks. A window is read in long pieces while the one before it is trained
# on.

BLOCK_BYTES = 256 * 2**10  # neighbouring rows that stay in one window


class WindowLoader(Loader):
    """Batches of vectors from a file, read window by window.

    Each of two buffers holds a window: one is read while batches are gathered from the other.
    """

    def __init__(
        self,
        split: Split,
        order: TrainOrder | EvalOrder,
        builder: BatchBuilder,
        spec: Dataloading,
        *,
        device: torch.device,
        source: VectorSource,
        window: int,
    ) -> None:
        super().__init__(split, order, builder, spec, device=device)
        self.source = source
        self.window = window  # batches
        self._buffers: list[Tensor] = []  # of the epoch before, as fresh memory is slow

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from batch `start` on."""
        empty = torch.from_numpy(self.source.vectors.empty(0))
        buffers, self._buffers = self._buffers or [empty, empty], []
        with ThreadPoolExecutor(1) as pool:
            ahead: deque[Future[tuple[list[np.ndarray], Tensor, np.ndarray]]] = deque()
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
        source, parts = self.source, [self.rows(epoch, b) for b in range(start, stop)]
        wanted, places = np.unique(source.index[np.concatenate(parts)], return_inverse=True)
        buffer = buffers.pop(0)
        if len(buffer) < len(wanted):
            buffer = torch.from_numpy(source.vectors.empty(len(wanted)))
        source.vectors.read_rows(wanted, buffer.numpy()[: len(wanted)])
        buffers.append(buffer)
        return parts, buffer, places

    def cut(self, parts: list[np.ndarray], buffer: Tensor, places: np.ndarray) -> Iterator[Batch]:
        """The batches of a window."""
        ends = np.cumsum([len(rows) for rows in parts])
        for rows, where in zip(parts, np.split(places, ends[:-1]), strict=True):
            inputs = gather_samples(buffer, where, pinned=self.pinned)
            labels = self.builder.labels(rows)
            yield self.pin(Batch(inputs, labels, torch.from_numpy(rows), fitted=True))


def build_feature_loader(
    split: Split,
    spec: Dataloading,
    *,
    window_mb: int,
    **options: Unpack[LoaderOptions],
) -> Loader:
    """Loader of vectors or bags on this rank: from memory where they fit, else by windows (vectors)
    or bag by bag.

    Args:
        window_mb: size of a window of vectors, MiB.
        options: as for build_loader; vectors and bags have no geometry and ask nothing of `fit`.
    """
    source = split.source
    train, ranks, batch_size = options["train"], options["ranks"], options["batch_size"]
    first, end = needed(split, train=train, ranks=ranks)
    if fits_in_memory(split, spec, end - first) or not isinstance(source, VectorSource):
        return build_loader(split, spec, **options)
    order = build_order(
        split,
        spec,
        train=train,
        seed=options["seed"],
        ranks=ranks,
        batch_size=batch_size,
        step_size=options.get("step_size"),
        accumulation=options.get("accumulation", 1),
    )
    rows = window_mb * 2**20 // max(1, source.vectors.row_bytes)  # of a window, over all ranks
    if isinstance(order, TrainOrder):
        order = in_windows(order, source, rows)
        window = order.window * order.full_rounds
    else:
        window = max(1, rows // (batch_size * ranks.world))
    fit, scale = options["fit"], options.get("scale")
    builder = BatchBuilder(source, 0, split.targets, fit, options["seed"], scale)
    return WindowLoader(
        split,
        order,
        builder,
        spec,
        device=ranks.device,
        source=source,
        window=window,
    )


def in_windows(order: TrainOrder, source: VectorSource, rows: int) -> WindowOrder:
    """The same steps of samples in another random order, of windows of about so many rows; it does
    not depend on the number of ranks."""
    chunk = source.vectors.chunk_rows
    block = -(-max(1, BLOCK_BYTES // max(1, source.vectors.row_bytes)) // chunk) * chunk
    return WindowOrder(
        count=order.count,
        batch_size=order.batch_size,
        step_size=order.step_size,
        shuffle=order.shuffle,
        unit=order.unit,
        seed=order.seed,
        rank=order.rank,
        world=order.world,
        block=block,  # whole chunks
        window=max(1, rows // order.step_size),
    )


@build_split_loader.register
def _(inputs: VectorInputs, split: Split, root: Root, **options: Unpack[LoaderOptions]) -> Loader:
    window_mb = features_of(root.data).window_mb
    return build_feature_loader(split, root.dataloading, window_mb=window_mb, **options)
