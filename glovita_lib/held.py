"""Splits held decoded in memory, on the host or on the GPU.

N samples, C channels, H W pixels.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glovita_lib.feature_sources import VectorSource
from glovita_lib.samples import Source
from glovita_lib.spec import UserError

CHUNK = 32  # samples a thread decodes at a time
TOLD_FROM = 2000  # samples whose decoding is announced
ERRORS_SHOWN = 20
# Shares of a GPU's free memory that a split may stay in, which saves a copy per batch. An encoder
# of images needs the rest for activations, which come only with the first batch; a head on vectors
# needs next to nothing, and half leaves as much to the next split.
IMAGE_SHARE, VECTOR_SHARE = 0.1, 0.5


@dataclass(slots=True)
class HeldSource:
    """Decoded samples: one array (N, C, H, W) if they are uniform, else a list of arrays."""

    samples: Any
    fitted: bool  # whether they were cropped and resized when they were decoded

    @property
    def uniform(self) -> tuple[int, ...] | None:
        return self.samples.shape[1:] if isinstance(self.samples, np.ndarray) else None

    def fetch(self, rows: np.ndarray) -> Any:
        if isinstance(self.samples, np.ndarray):
            return self.samples[rows]
        return [self.samples[row] for row in rows]


@dataclass(slots=True)
class CollatingSource(HeldSource):
    """Decoded samples of a source with its own way to make a batch of them."""

    collate: Callable[[list[Any]], Any] = field(kw_only=True)


def hold(
    source: Source,
    rows: np.ndarray,
    *,
    fit: Callable[[list[np.ndarray]], np.ndarray] | None,
    threads: int,
    shown: bool,
) -> HeldSource:
    """Decode rows of a source, in threads.

    Vectors are read all at once instead of a few at a time: their file is read in long pieces by
    threads of its own, and each of its chunks is inflated once.

    Args:
        fit: crops and resizes samples of differing sizes once and for all, where that is the same
            in every epoch (evaluation).
        shown: whether a long decoding is announced.

    Raises:
        UserError: one line for each sample that cannot be read.
    """
    collate = getattr(source, "collate", None)
    fitted = fit is not None and collate is None and source.uniform is None
    if shown and len(rows) >= TOLD_FROM and source.nbytes() > 2**28:
        print(f"decoding {len(rows)} samples into memory", file=sys.stderr, flush=True)
    if isinstance(source, VectorSource):
        return HeldSource(source.fetch(rows), fitted=False)

    def decode(part: np.ndarray) -> Any:
        samples = source.fetch(part)
        return fit(samples) if fitted else samples

    parts = in_threads(decode, np.array_split(rows, -(-len(rows) // CHUNK)), threads)
    if collate is not None:
        samples = [sample for part in parts for sample in part]
        return CollatingSource(samples, False, collate=collate)
    return HeldSource(*joined(parts, len(rows), fitted))


def joined(parts: Iterator[Any], count: int, fitted: bool) -> tuple[Any, bool]:
    """Decoded parts as one array if they are arrays, written into it one by one, else a list."""
    array, samples, done = None, [], 0
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.empty((count, *part.shape[1:]), part.dtype) if array is None else array
            array[done : done + len(part)] = part
            done += len(part)
        else:
            samples.extend(part)
    return (samples if array is None else array), fitted


def in_threads(work: Callable[[Any], Any], items: list[Any], threads: int) -> Iterator[Any]:
    """Results in the order of the items; user errors of all items are raised as one.

    Raises:
        UserError: the lines of all errors, the first of them where they are many.
    """
    errors: list[str] = []
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 4 * threads:
                yield from settled(ahead.popleft(), errors)
        while ahead:
            yield from settled(ahead.popleft(), errors)
    if errors:
        raise UserError(shortened(errors))


def settled(future: Future, errors: list[str]) -> Iterator[Any]:
    """The result, unless it or an earlier one is a user error; its lines are added to `errors`."""
    try:
        result = future.result()
    except UserError as error:
        errors += str(error).splitlines()
        return
    if not errors:
        yield result


def shortened(lines: list[str]) -> str:
    """Lines as one text; after the first ones only how many more there are."""
    more = len(lines) - ERRORS_SHOWN
    return "\n".join(lines[:ERRORS_SHOWN] + [f"... and {more} more"] * (more > 0))


def to_device(
    source: HeldSource, targets: np.ndarray | None, device: torch.device
) -> tuple[Tensor, Tensor | None] | None:
    """Uniform samples and the targets on a GPU with room for them; None elsewhere."""
    if device.type != "cuda" or source.uniform is None or hasattr(source, "collate"):
        return None
    samples, (free, _) = source.samples, torch.cuda.mem_get_info(device)
    size = samples.nbytes * (2 if samples.dtype == np.uint16 else 1)
    if size > free * (VECTOR_SHARE if samples.ndim == 2 else IMAGE_SHARE):
        return None
    if samples.dtype == np.uint16:
        samples = samples.astype(np.int32)  # torch calculates with few operations on uint16
    labels = None if targets is None else torch.from_numpy(targets).to(device)
    return torch.from_numpy(samples).to(device), labels


def gather(samples: Tensor, rows: np.ndarray, *, pinned: bool) -> Tensor:
    """Rows of samples on the host, copied once, into page-locked memory where that is asked for."""
    out = samples.new_empty((len(rows), *samples.shape[1:]), pin_memory=pinned)
    # NumPy copies in this thread alone: torch's threads take longer to wake up than to copy a
    # batch, and those of the training are busy. Mode raise would copy twice.
    np.take(samples.numpy(), rows, axis=0, out=out.numpy(), mode="clip")
    return out
