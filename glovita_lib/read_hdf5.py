"""Rows of an HDF5 dataset, read in long pieces and past the HDF5 lock.

h5py serialises all reads of a process behind one lock and inflates in the calling thread. A feature
file is read only, so its bytes can be fetched where HDF5 says they are: contiguous storage by
`pread`, chunks (gzip and byte shuffle included) by `pread` and zlib in several threads, which both
release the interpreter lock. Every other storage goes through h5py.

M rows, D width; a row is one index of the first axis, whatever the other axes are.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.errors import UserError, listed

DEFLATE, SHUFFLE = 1, 2  # HDF5's numbers of the filters that are read here
# What is read at a time: long enough to be worth a task of its own, and, as rows between those that
# are wanted are read into a buffer of this size, small enough that a sparse choice stays cheap.
PIECE_BYTES = 4 * 2**20
GAP_BYTES = 64 * 2**10  # an SSD reads about as much in the time in which it finds another place


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where the bytes of a chunk are and which filters were left out for it."""

    offset: int
    size: int
    skipped: int  # bit mask over the filters


@dataclass(frozen=True, slots=True)
class ChunkedStorage:
    """Chunks of whole rows whose filters can all be undone here."""

    filters: tuple[int, ...]  # in the order of writing
    chunks: dict[int, Chunk]  # by their number along the first axis
    fill_value: Any  # of a chunk that was never written


class DatasetRows:
    """Random access to the rows of one dataset; safe to use from threads and after a fork.

    Raises:
        UserError: the file is not HDF5, is truncated, or has no such dataset.
    """

    def __init__(self, path: str | Path, key: str, *, threads: int) -> None:
        self.path, self.key, self.threads = str(path), key, threads
        with open_hdf5(self.path) as file:
            if key not in file:
                raise UserError(
                    f"{path}: no dataset {key!r}; the file has {listed(sorted(file), 20)}"
                )
            dataset = file[key]
            if not hasattr(dataset, "shape") or dataset.shape in ((), None):
                raise UserError(
                    f"{path}: {key!r} is no array; say with data.features_key which one is"
                )
            self.shape: tuple[int, ...] = dataset.shape
            self.dtype: np.dtype = readable_type(dataset.dtype)
            self.chunk_rows: int = dataset.chunks[0] if dataset.chunks else 1
            self.offset = contiguous_offset(dataset)
            self.storage = chunked_storage(dataset)
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if self.offset is not None:
            self.check_length(self.offset + self.row_bytes * len(self))
        for chunk in self.storage.chunks.values() if self.storage is not None else ():
            self.check_length(chunk.offset + chunk.size)
        self.file = os.open(self.path, os.O_RDONLY)
        self._pools: dict[int, ThreadPoolExecutor] = {}  # by process

    def __len__(self) -> int:
        return self.shape[0]

    def check_length(self, end: int) -> None:
        """Refuse a file that is shorter than what its own tables say."""
        length = os.path.getsize(self.path)
        if end > length:
            raise UserError(
                f"{self.path}: truncated, dataset {self.key!r} ends at byte {end:,} but the file"
                f" has {length:,}; write or copy it again"
            )

    # ------------------------------------------------------------------ reading

    def empty(self, rows: int) -> np.ndarray:
        """Uninitialised room for so many rows."""
        return np.empty((rows, *self.shape[1:]), self.dtype)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows start..stop (exclusive) -> (stop - start, ...), into `out` where given."""
        return self.read_rows(np.arange(start, stop), out)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The given rows in the given order, (len(rows), ...); a row may be asked for twice."""
        if (np.diff(rows) > 0).all():
            return self.read_rows(rows)
        distinct, places = np.unique(rows, return_inverse=True)
        return self.read_rows(distinct)[places]

    def read_rows(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Distinct rows in ascending order -> (len(rows), ...), into `out` where given.

        Every chunk is decoded once, and no more memory is taken than that of the rows and, for each
        thread, that of a piece or a chunk.
        """
        out = self.empty(len(rows)) if out is None else out
        pieces = self.pieces(rows)
        if self.offset is None and self.storage is None:
            with open_hdf5(self.path) as file:
                self.fill(pieces, rows, out, file[self.key])
            return out
        # a task of several pieces, or small ones would cost more to hand over than to read
        size = max(1, min(len(pieces) // (4 * self.threads), 64))
        tasks = [pieces[i : i + size] for i in range(0, len(pieces), size)]
        if self.threads == 1 or len(tasks) <= 1:
            self.fill(pieces, rows, out)
        else:
            list(self.pool.map(lambda task: self.fill(task, rows, out), tasks))
        return out

    def pieces(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """Ranges of `rows` that are read in one go: those of a chunk, or near ones of several MiB
        that end at the end of a chunk."""
        chunk, row = self.chunk_rows, max(1, self.row_bytes)
        if self.storage is not None:
            return cut_ranges(rows, length=chunk, gap=chunk)
        length = max(1, PIECE_BYTES // (row * chunk)) * chunk
        return cut_ranges(rows, length=length, gap=max(GAP_BYTES // row, chunk - 1))

    def fill(
        self, pieces: list[tuple[int, int]], rows: np.ndarray, out: np.ndarray, dataset: Any = None
    ) -> None:
        """Read pieces of `rows` to their places in `out`.

        Args:
            dataset: the open dataset, for storage that only h5py reads.
        """
        between = self.empty(0)
        for first, end in pieces:
            wanted, target = rows[first:end], out[first:end]
            start, stop = int(wanted[0]), int(wanted[-1]) + 1
            if self.storage is not None:
                index = start // self.chunk_rows
                pick(self.chunk(self.storage, index), wanted - index * self.chunk_rows, target)
            elif stop - start == len(wanted):
                self.load(start, stop, target, dataset)
            else:
                if len(between) < stop - start:
                    between = self.empty(stop - start)
                self.load(start, stop, between[: stop - start], dataset)
                pick(between, wanted - start, target)

    def load(self, start: int, stop: int, out: np.ndarray, dataset: Any) -> None:
        """Rows start..stop of a storage without chunks, or of one that h5py reads, into `out`."""
        if self.offset is None:
            dataset.read_direct(out, np.s_[start:stop])
        else:
            self.pread(out.data, self.offset + start * self.row_bytes)

    # ------------------------------------------------------------------ bytes

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Threads of this process that read and inflate; a forked process has none of those of the
        process it was forked from, and would wait for them for ever."""
        # No lock, which a fork could leave closed: setdefault is atomic, and a pool that comes too
        # late is dropped before it has a thread.
        process = os.getpid()
        if process not in self._pools:
            self._pools.setdefault(process, ThreadPoolExecutor(self.threads, "feature-reader"))
        return self._pools[process]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"file": None, "_pools": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.file = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if getattr(self, "file", None) is not None:
            os.close(self.file)

    def pread(self, out: memoryview, offset: int) -> None:
        """Fill `out` (C-contiguous) with the file's bytes from offset on."""
        view, done = out.cast("B"), 0
        while done < len(view):
            got = self.pread_some(view[done:], offset + done)
            if not got:
                raise UserError(f"{self.path}: became shorter while it was read")
            done += got

    def pread_some(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view with bytes of the file -> how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file, [view], offset)
        # Not on this platform: a file of this read's own, as threads share the place in theirs.
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.readinto(view)

    def chunk(self, storage: ChunkedStorage, index: int) -> np.ndarray:
        """A whole chunk (chunk_rows, ...); one that was never written holds the fill value."""
        shape, where = (self.chunk_rows, *self.shape[1:]), storage.chunks.get(index)
        if where is None:
            return np.full(shape, storage.fill_value, self.dtype)
        stored = np.empty(where.size, np.uint8).data
        self.pread(stored, where.offset)
        data: bytes | memoryview = stored
        for number, kind in reversed(list(enumerate(storage.filters))):
            if not where.skipped >> number & 1:
                data = inflate(data, self) if kind == DEFLATE else unshuffle(data, self)
        return np.frombuffer(data, self.dtype).reshape(shape)


def inflate(data: bytes | memoryview, rows: DatasetRows) -> bytes:
    """Undo gzip."""
    try:
        return zlib.decompress(data, bufsize=rows.chunk_rows * rows.row_bytes)
    except zlib.error as error:
        raise UserError(f"{rows.path}: damaged chunk in {rows.key!r} ({error})") from None


def unshuffle(data: bytes | memoryview, rows: DatasetRows) -> memoryview:
    """Undo HDF5's byte shuffle: all first bytes, then all second bytes ... -> whole values."""
    planes = np.frombuffer(data, np.uint8).reshape(rows.dtype.itemsize, -1)
    values = planes[-1].astype(f"u{rows.dtype.itemsize}")
    for plane in planes[-2::-1]:  # shifts are several times faster than a transposed copy
        values <<= 8
        values |= plane
    return values.data


def cut_ranges(rows: np.ndarray, *, length: int, gap: int) -> list[tuple[int, int]]:
    """Cut ascending rows -> ranges of `rows` (first, end) of which none reaches over a multiple of
    `length` rows or over more than `gap` rows that are not wanted."""
    if not len(rows):
        return []
    ends = (np.diff(rows) - 1 > gap) | (np.diff(rows // length) > 0)
    return list(pairwise([0, *(np.flatnonzero(ends) + 1).tolist(), len(rows)]))


def pick(values: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
    """Ascending places of values, into `out`."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places):
        out[...] = values[first : last + 1]
    else:
        np.take(values, places, axis=0, out=out, mode="clip")  # mode raise would copy once more


# ---------------------------------------------------------------------- what HDF5 says


def open_hdf5(path: str) -> Any:
    """An open h5py file.

    Raises:
        UserError: missing, truncated, or not HDF5.
    """
    import h5py

    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else "not an HDF5 file, or a damaged one"
        raise UserError(f"{path}: {reason} ({error})") from None


def readable_type(dtype: np.dtype) -> np.dtype:
    """The type that rows are given in: native, as torch knows no other, and of at most 64 bits."""
    wide = dtype.kind == "f" and dtype.itemsize > 8
    return np.dtype(np.float64) if wide else dtype.newbyteorder("=")


def contiguous_offset(dataset: Any) -> int | None:
    """Where a contiguous dataset of native numbers begins in its file; None if it is not that."""
    if dataset.chunks or dataset.external or dataset.is_virtual or converts(dataset):
        return None
    return dataset.id.get_offset()


def converts(dataset: Any) -> bool:
    """Whether its numbers are given in another type than they are stored in."""
    return readable_type(dataset.dtype) != dataset.dtype


def chunked_storage(dataset: Any) -> ChunkedStorage | None:
    """Where the chunks of a dataset are; None unless all their filters can be undone here."""
    whole_rows = dataset.chunks and dataset.chunks[1:] == dataset.shape[1:]
    if not whole_rows or dataset.is_virtual or converts(dataset):
        return None
    plist = dataset.id.get_create_plist()
    filters = tuple(plist.get_filter(i)[0] for i in range(plist.get_nfilters()))
    if not set(filters) <= {DEFLATE, SHUFFLE}:
        return None
    chunks: dict[int, Chunk] = {}

    def note(info: Any) -> None:
        number = info.chunk_offset[0] // dataset.chunks[0]
        chunks[number] = Chunk(info.byte_offset, info.size, info.filter_mask)

    dataset.id.chunk_iter(note)
    return ChunkedStorage(filters, chunks, dataset.fillvalue)
