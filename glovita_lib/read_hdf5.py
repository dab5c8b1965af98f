"""Rows of an HDF5 dataset, read in long pieces and past the HDF5 lock.

h5py serialises all reads of a process behind one lock and inflates in the calling thread. A feature
file is read only, so its bytes can be fetched where HDF5 says they are: contiguous storage by
`pread`, chunks (gzip and byte shuffle included) by `pread` and zlib in several threads, which both
release the interpreter lock. Every other storage goes through h5py, and so does a dataset of which
a few blocks, read both ways when it is opened, differ: the library's answer is the right one.

M rows, D width; a row is one index of the first axis, whatever the other axes are.
"""

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.errors import UserError
from glovita_lib.read_hdf5_file import (
    DEFLATE,
    SHUFFLE,
    array_of,
    filter_numbers,
    open_hdf5,
    refuse_torn,
)

# What is read at a time: long enough to be worth a task of its own, and, as rows between those that
# are wanted are read into a buffer of this size, small enough that a sparse choice stays cheap.
PIECE_BYTES = 4 * 2**20
GAP_BYTES = 64 * 2**10  # an SSD reads about as much in the time in which it finds another place
PROOF_BYTES = 64 * 2**10  # a block of contiguous rows that is read both ways


class UndecodableChunk(Exception):
    """Bytes of a chunk that the direct reader cannot decode."""


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

    Args:
        follow_links: whether links may lead out of the folder of the file, see `dataset_of`.
        proven: what an earlier object of the same dataset has found of the direct way (`direct`),
            which is then not proved again.

    Raises:
        UserError: the file is not HDF5, is truncated, or has no such dataset.
    """

    def __init__(
        self,
        path: str | Path,
        key: str,
        *,
        threads: int,
        follow_links: bool = False,
        proven: bool | None = None,
    ) -> None:
        self.path, self.key, self.threads = str(path), key, threads
        with open_hdf5(self.path) as file:
            dataset = array_of(file, key, follow_links=follow_links)
            self.shape: tuple[int, ...] = dataset.shape
            self.dtype: np.dtype = readable_type(dataset.dtype)
            self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
            self.chunk_rows: int = dataset.chunks[0] if dataset.chunks else 1
            self.stored_in: str = dataset.file.filename  # another file where a link leads there
            self.leaves_room = leaves_room(dataset)
            self.offset = contiguous_offset(dataset)
            self.storage = chunked_storage(dataset)
            self._pools: dict[int, ThreadPoolExecutor] = {}  # by process
            self.file = os.open(self.stored_in, os.O_RDONLY)
            self.stamp = stamp_of(self.file)
            self.is_other = False  # whether the file was replaced since then
            self.whole_chunks: set[tuple[int, ...]] = set()  # those that the library may read
            self.check_length()
            self.direct = self.is_proven(dataset) if proven is None else proven
            if not self.direct:
                self.offset = self.storage = None

    def __len__(self) -> int:
        return self.shape[0]

    def check_length(self) -> None:
        """Refuse a file that is shorter than what its own tables say."""
        end, length = 0, os.fstat(self.file).st_size
        if self.offset is not None:
            end = self.offset + self.row_bytes * len(self)
        elif self.storage is not None:
            end = max((at.offset + at.size for at in self.storage.chunks.values()), default=0)
        if end > length:
            raise UserError(
                f"{self.stored_in}: truncated, dataset {self.key!r} ends at byte {end:,} but the"
                f" file has {length:,}; write or copy it again"
            )

    # ------------------------------------------------------------------ proof

    def is_proven(self, dataset: Any) -> bool:
        """Whether the first, the last and one drawn block of each kind hold the same rows when they
        are read directly as when the library reads them."""
        if self.offset is None and self.storage is None:
            return True
        return all(self.is_same(start, stop, dataset) for start, stop in self.blocks_of_each_kind())

    def is_same(self, start: int, stop: int, dataset: Any) -> bool:
        """Whether rows start..stop are the library's; also if neither way can read them."""
        own, decoded = self.empty(stop - start), True
        try:
            self.load(start, stop, own)
        except UndecodableChunk:
            decoded = False
        except UserError:  # of another length than it must have; said when these rows are read
            return True
        try:
            expected = dataset[start:stop]
        except OSError:
            return not decoded
        return decoded and np.array_equal(own, expected, equal_nan=self.dtype.kind == "f")

    def blocks_of_each_kind(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows: the first, the last and one drawn block of each kind. Kinds of chunks are
        whole ones and the one that reaches past the last row, those that were written and those
        that were not, and those of which the same filters were left out."""
        draw = np.random.default_rng(len(self))
        if self.storage is None:
            block = max(1, PROOF_BYTES // max(1, self.row_bytes))
            kinds = np.zeros(-(-len(self) // block), np.int64)
        else:
            block = self.chunk_rows
            kinds = np.full(-(-len(self) // block), -1)
            for number, chunk in self.storage.chunks.items():
                kinds[number] = chunk.skipped
            if len(self) % block:
                kinds[-1] = -2
        for kind in np.unique(kinds):
            places = np.flatnonzero(kinds == kind)
            for place in sorted({places[0], draw.choice(places), places[-1]}):
                yield int(place) * block, min((int(place) + 1) * block, len(self))

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
            self.is_other = self.is_other or stamp_of(self.stored_in) != self.stamp
        if self.is_other:
            raise UserError(f"{self.stored_in}: changed while the program ran; start it again")
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
                self.decode(self.storage, wanted, target)
            elif stop - start == len(wanted):
                self.load(start, stop, target, dataset)
            else:
                if len(between) < stop - start:
                    between = self.empty(stop - start)
                self.load(start, stop, between[: stop - start], dataset)
                pick(between, wanted - start, target)

    def decode(self, storage: ChunkedStorage, wanted: np.ndarray, out: np.ndarray) -> None:
        """Rows of one chunk, into `out`; the library decides what is damaged."""
        index = int(wanted[0]) // self.chunk_rows
        first = index * self.chunk_rows
        try:
            values = self.chunk(storage, index)
        except UndecodableChunk:
            stop = min(first + self.chunk_rows, len(self))
            values = self.empty(stop - first)
            with open_hdf5(self.path) as file:
                self.ask_library(file[self.key], first, stop, values)
        pick(values, wanted - first, out)

    def load(self, start: int, stop: int, out: np.ndarray, dataset: Any = None) -> None:
        """Rows start..stop of a chunk, of a storage without chunks, or of one that h5py reads, into
        `out`."""
        if self.storage is not None:
            out[...] = self.chunk(self.storage, start // self.chunk_rows)[: stop - start]
        elif self.offset is not None:
            self.pread(out.data, self.offset + start * self.row_bytes)
        else:
            self.ask_library(dataset, start, stop, out)

    def ask_library(self, dataset: Any, start: int, stop: int, out: np.ndarray) -> None:
        """Rows start..stop by h5py, into `out`."""
        if self.leaves_room:
            out[...] = 0
        try:
            if out.size:
                refuse_torn(dataset, self.key, start, stop, self.whole_chunks)
                dataset.read_direct(out, np.s_[start:stop])
        except OSError as error:
            raise UserError(
                f"{self.stored_in}: rows {start} to {stop - 1} of {self.key!r} are damaged"
                f" ({error}); write or copy it again"
            ) from None

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
        return self.__dict__ | {"file": -1, "_pools": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with suppress(OSError):
            self.file = os.open(self.stored_in, os.O_RDONLY)
        # said when it is read, not while a worker process starts
        self.is_other = self.file < 0 or stamp_of(self.file) != self.stamp

    def __del__(self) -> None:
        if getattr(self, "file", -1) >= 0:
            os.close(self.file)

    def pread(self, out: memoryview, offset: int) -> None:
        """Fill `out` (C-contiguous) with the file's bytes from offset on."""
        view, done = out.cast("B"), 0
        while done < len(view):
            got = self.pread_some(view[done:], offset + done)
            if not got:
                raise UserError(f"{self.stored_in}: became shorter while it was read")
            done += got

    def pread_some(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view with bytes of the file -> how many."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file, [view], offset)
        # Not on this platform: a file of this read's own, as threads share the place in theirs.
        with open(self.stored_in, "rb", buffering=0) as file:
            file.seek(offset)
            return file.readinto(view)

    def chunk(self, storage: ChunkedStorage, index: int) -> np.ndarray:
        """A whole chunk (chunk_rows, ...); one that was never written holds the fill value.

        Raises:
            UndecodableChunk: its bytes cannot be decoded here.
            UserError: they give more or fewer values, of which the library says nothing: what it
                gives in place of those that lack is whatever stood in memory.
        """
        shape, where = (self.chunk_rows, *self.shape[1:]), storage.chunks.get(index)
        if where is None:
            return np.full(shape, storage.fill_value, self.dtype)
        stored = np.empty(where.size, np.uint8).data
        self.pread(stored, where.offset)
        data: bytes | memoryview = stored
        try:
            for number, kind in reversed(list(enumerate(storage.filters))):
                if not where.skipped >> number & 1:
                    data = inflate(data, self) if kind == DEFLATE else unshuffle(data, self)
        except zlib.error as error:
            raise UndecodableChunk from error
        size, first = self.chunk_rows * self.row_bytes, index * self.chunk_rows
        if len(data) != size:
            last = min(first + self.chunk_rows, len(self)) - 1
            raise UserError(
                f"{self.stored_in}: rows {first} to {last} of {self.key!r} are damaged (their chunk"
                f" holds {len(data):,} bytes, not {size:,}); write or copy it again"
            )
        return np.frombuffer(data, self.dtype).reshape(shape)


def inflate(data: bytes | memoryview, rows: DatasetRows) -> bytes:
    """Undo gzip."""
    return zlib.decompress(data, bufsize=rows.chunk_rows * rows.row_bytes)


def unshuffle(data: bytes | memoryview, rows: DatasetRows) -> bytes | memoryview:
    """Undo HDF5's byte shuffle: all first bytes, then all second bytes ... -> whole values; bytes
    at the end that make no value (compressed data may have such) stay as they are."""
    if over := len(data) % rows.dtype.itemsize:
        return b"".join((unshuffle(data[:-over], rows), data[-over:]))
    planes = np.frombuffer(data, np.uint8).reshape(rows.dtype.itemsize, -1)
    values = planes[-1].astype(f"u{rows.dtype.itemsize}")
    for plane in planes[-2::-1]:  # shifts are several times faster than a transposed copy
        values <<= 8
        values |= plane
    return values.view(np.uint8).data


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


def stamp_of(file: str | int) -> tuple[int, int] | None:
    """What tells a file, of a name or a descriptor, from another one under the same name: size and
    time of change; None where there is none."""
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def readable_type(dtype: np.dtype) -> np.dtype:
    """The type that rows are given in: native, as torch knows no other, and of at most 64 bits."""
    wide = dtype.kind == "f" and dtype.itemsize > 8
    return np.dtype(np.float64) if wide else dtype.newbyteorder("=")


def contiguous_offset(dataset: Any) -> int | None:
    """Where a contiguous dataset of native numbers begins in its file; None if it is not that, or
    was never written: the library then says the end of the user block less 1, where there is one.
    """
    if dataset.chunks or dataset.is_virtual or converts(dataset):
        return None
    if not dataset.id.get_storage_size():
        return None
    return dataset.id.get_offset()


def converts(dataset: Any) -> bool:
    """Whether its numbers are given in another type than they are stored in: h5py gives bfloat16,
    which numpy lacks, as float32."""
    from h5py import h5t

    if dataset.dtype.kind not in "iuf" or readable_type(dataset.dtype) != dataset.dtype:
        return True
    return not dataset.id.get_type().equal(h5t.py_create(dataset.dtype))


def leaves_room(dataset: Any) -> bool:
    """Whether the library leaves places of a buffer as they are, where nothing was written and no
    fill value is to be used; h5py's own buffers hold zeros there."""
    from h5py import h5d

    plist = dataset.id.get_create_plist()
    never = plist.get_fill_time() == h5d.FILL_TIME_NEVER
    return dataset.is_virtual or never or not plist.fill_value_defined()


def chunked_storage(dataset: Any) -> ChunkedStorage | None:
    """Where the chunks of a dataset are; None unless all their filters can be undone here, and the
    library says of each another place, as it does not where the second axis alone may grow."""
    whole_rows = dataset.chunks and dataset.chunks[1:] == dataset.shape[1:]
    if not whole_rows or dataset.is_virtual or converts(dataset):
        return None
    filters = tuple(filter_numbers(dataset))
    if not set(filters) <= {DEFLATE, SHUFFLE}:
        return None
    chunks: dict[tuple[int, ...], Chunk] = {}

    def note(info: Any) -> None:
        chunks[info.chunk_offset] = Chunk(info.byte_offset, info.size, info.filter_mask)

    try:
        dataset.id.chunk_iter(note)
        count = dataset.id.get_num_chunks()
    except (OSError, RuntimeError):
        return None
    rows, side = len(dataset), dataset.chunks[0]
    sound = all(at < rows and not (at % side or any(rest)) for at, *rest in chunks)
    if not sound or len(chunks) != count:
        return None
    numbered = {place[0] // side: chunk for place, chunk in chunks.items()}
    return ChunkedStorage(filters, numbered, 0 if leaves_room(dataset) else dataset.fillvalue)
