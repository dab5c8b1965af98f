"""Rows of an HDF5 dataset, read in contiguous blocks and past the HDF5 lock.

h5py serialises all reads of a process behind one lock and inflates in the calling thread. A feature
file is read only, so its bytes can be fetched where HDF5 says they are: contiguous storage by one
`pread`, chunks (gzip and byte shuffle included) by `pread` and zlib in several threads, which both
release the interpreter lock. Every other storage goes through h5py.

M rows, D width; a row is one index of the first axis, whatever the other axes are.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.spec import UserError

DEFLATE, SHUFFLE = 1, 2  # HDF5's numbers of the filters that are read here
NEAR = 64  # rows closer than this are read in one go, with what lies between them


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where the bytes of a chunk are and which filters were left out for it."""

    offset: int
    size: int
    skipped: int  # bit mask over the filters


class Rows:
    """Random access to the rows of one dataset, by contiguous ranges; safe to use from threads.

    Raises:
        UserError: the file is not HDF5, is truncated, or has no such dataset.
    """

    def __init__(self, path: str | Path, key: str, *, threads: int) -> None:
        self.path, self.key, self.threads = str(path), key, threads
        with open_hdf5(self.path) as file:
            if key not in file:
                raise UserError(
                    f"{path}: no dataset {key!r}; the file has {', '.join(sorted(file)) or 'none'}"
                )
            dataset = file[key]
            if not hasattr(dataset, "shape") or dataset.shape in ((), None):
                raise UserError(
                    f"{path}: {key!r} is no array; say with data.features_key which one is"
                )
            self.shape: tuple[int, ...] = dataset.shape
            self.dtype: np.dtype = readable_type(dataset.dtype)
            self.chunk_rows = dataset.chunks[0] if dataset.chunks else None
            self.offset = contiguous_offset(dataset)
            self.filters = readable_filters(dataset)
            self.chunks = {} if self.filters is None else chunk_table(dataset)
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if self.offset is not None:
            self.check_length(self.offset + self.row_bytes * len(self))
        for chunk in self.chunks.values():
            self.check_length(chunk.offset + chunk.size)
        self._file: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._owner = 0  # process whose threads the pool has

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of all rows when decoded, bytes."""
        return self.row_bytes * len(self)

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
        out = self.empty(stop - start) if out is None else out
        if stop <= start:
            return out
        if self.offset is not None:
            self.pread(out, self.offset + start * self.row_bytes)
        elif self.filters is not None:
            self.read_chunks([(start, stop)], out)
        else:
            with open_hdf5(self.path) as file:
                file[self.key].read_direct(out, np.s_[start:stop])
        return out

    def read_ranges(self, ranges: list[tuple[int, int]], out: np.ndarray) -> None:
        """Several ranges one after another into `out`; chunks are inflated in parallel."""
        if self.filters is not None:
            self.read_chunks(ranges, out)
            return
        place, jobs = 0, []
        for start, stop in ranges:
            jobs.append((start, stop, out[place : place + stop - start]))
            place += stop - start
        if self.offset is None or len(jobs) == 1:
            for job in jobs:
                self.read(*job)
        else:
            list(self.pool.map(lambda job: self.read(*job), jobs))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The given rows in the given order, (len(rows), ...); near ones are read together."""
        ranges, places = locate(rows)
        buffer = self.empty(sum(stop - start for start, stop in ranges))
        self.read_ranges(ranges, buffer)
        return buffer[places]

    # ------------------------------------------------------------------ bytes

    @property
    def file(self) -> int:
        """Descriptor of the open file, opened by the process that first reads."""
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        return self._file

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Threads of this process that read and inflate; a forked process has none of those of the
        process it was forked from, and would wait for them for ever."""
        if self._pool is None or self._owner != os.getpid():
            self._pool = ThreadPoolExecutor(self.threads, "feature-reader")
            self._owner = os.getpid()
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_pool": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)

    def pread(self, out: np.ndarray, offset: int) -> None:
        """Fill `out` (C-contiguous) with the file's bytes from offset on."""
        view, done = memoryview(out).cast("B"), 0
        while done < len(view):
            got = os.preadv(self.file, [view[done:]], offset + done)
            if not got:
                raise UserError(f"{self.path}: became shorter while it was read")
            done += got

    def read_chunks(self, ranges: list[tuple[int, int]], out: np.ndarray) -> None:
        """All chunks that the ranges touch, in parallel, each piece to its place in `out`."""
        jobs, place = [], 0
        for start, stop in ranges:
            for index in range(start // self.chunk_rows, (stop - 1) // self.chunk_rows + 1):
                first = index * self.chunk_rows
                lo, hi = max(start, first), min(stop, first + self.chunk_rows)
                target = out[place + lo - start : place + hi - start]
                jobs.append((index, lo - first, hi - first, target))
            place += stop - start
        # a task of several chunks, or small ones would cost more to hand over than to inflate
        size = max(1, min(len(jobs) // (4 * self.threads), 64))
        tasks = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        if self.threads == 1 or len(tasks) == 1:
            for task in tasks:
                self.fill(task)
        else:
            list(self.pool.map(self.fill, tasks))

    def fill(self, jobs: list[tuple[int, int, int, np.ndarray]]) -> None:
        """Rows lo..hi of each chunk into its target."""
        for index, lo, hi, target in jobs:
            target[...] = self.chunk(index)[lo:hi]

    def chunk(self, index: int) -> np.ndarray:
        """A whole chunk (chunk_rows, ...); one that was never written holds zeros."""
        where = self.chunks.get(index)
        if where is None:
            return np.zeros((self.chunk_rows, *self.shape[1:]), self.dtype)
        data = os.pread(self.file, where.size, where.offset)
        for number in reversed(range(len(self.filters))):
            if where.skipped >> number & 1:
                continue
            data = inflate(data, self) if self.filters[number] == DEFLATE else unshuffle(data, self)
        return np.frombuffer(data, self.dtype).reshape(self.chunk_rows, *self.shape[1:])


def inflate(data: bytes, rows: Rows) -> bytes:
    """Undo gzip."""
    try:
        return zlib.decompress(data, bufsize=rows.chunk_rows * rows.row_bytes)
    except zlib.error as error:
        raise UserError(f"{rows.path}: damaged chunk in {rows.key!r} ({error})") from None


def unshuffle(data: bytes, rows: Rows) -> np.ndarray:
    """Undo HDF5's byte shuffle: all first bytes, then all second bytes ... -> whole values."""
    planes = np.frombuffer(data, np.uint8).reshape(rows.dtype.itemsize, -1)
    values = planes[-1].astype(f"u{rows.dtype.itemsize}")
    for plane in planes[-2::-1]:  # shifts are several times faster than a transposed copy
        values <<= 8
        values |= plane
    return values


def locate(rows: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Ranges that cover the rows, in the order of the file, and where each row lies in what is read
    of them one after another (len(rows),)."""
    ranges = merged_ranges(np.sort(rows))
    starts = np.array([start for start, _ in ranges], np.int64)
    sizes = np.array([stop - start for start, stop in ranges], np.int64)
    before = np.cumsum(sizes) - sizes
    which = np.searchsorted(starts, rows, side="right") - 1
    return ranges, before[which] + rows - starts[which]


def merged_ranges(rows: np.ndarray) -> list[tuple[int, int]]:
    """Sorted rows -> ranges that cover them, joined where at most NEAR rows lie between."""
    cuts = np.flatnonzero(np.diff(rows) > NEAR) + 1
    firsts, lasts = np.append(rows[:1], rows[cuts]), np.append(rows[cuts - 1], rows[-1:])
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


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


def readable_filters(dataset: Any) -> tuple[int, ...] | None:
    """Filters of a chunked dataset in the order of writing; None unless all can be undone here."""
    whole_rows = dataset.chunks and dataset.chunks[1:] == dataset.shape[1:]
    if not whole_rows or dataset.is_virtual or converts(dataset):
        return None
    plist = dataset.id.get_create_plist()
    filters = tuple(plist.get_filter(i)[0] for i in range(plist.get_nfilters()))
    return filters if set(filters) <= {DEFLATE, SHUFFLE} else None


def chunk_table(dataset: Any) -> dict[int, Chunk]:
    """Chunk number along the first axis -> its place."""
    table = {}

    def note(info: Any) -> None:
        number = info.chunk_offset[0] // dataset.chunks[0]
        table[number] = Chunk(info.byte_offset, info.size, info.filter_mask)

    dataset.id.chunk_iter(note)
    return table
