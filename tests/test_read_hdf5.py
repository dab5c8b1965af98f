"""Rows read past h5py equal rows read through it, whatever the storage."""

import multiprocessing
import os
import pickle
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from glovita_lib import read_hdf5
from glovita_lib.errors import UserError
from glovita_lib.read_hdf5 import DatasetRows, cut_ranges

DIGITS = load_digits().data
STORAGE = {
    "contiguous": {},
    "chunks": {"chunks": (100, 64)},
    "one row a chunk": {"chunks": (1, 64), "compression": "gzip"},
    "gzip": {"chunks": (128, 64), "compression": "gzip"},
    "gzip and shuffle": {"chunks": (128, 64), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (128, 64), "compression": "lzf", "shuffle": True},
    "checksum": {"chunks": (128, 64), "fletcher32": True},
    "narrow chunks": {"chunks": (64, 16), "compression": "gzip"},
}


@pytest.fixture(params=STORAGE)
def storage(request):
    return STORAGE[request.param]


@pytest.mark.parametrize("platform", ["POSIX", "Windows"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_any_storage_and_type(tmp_path, monkeypatch, storage, dtype, platform):
    if platform == "Windows":
        monkeypatch.delattr(os, "preadv", raising=False)
    values = (DIGITS / 7).astype(dtype)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("features", data=values, **storage)
    rows = DatasetRows(tmp_path / "f.h5", "features", threads=2)
    np.testing.assert_array_equal(rows.read(0, len(rows)), values)
    np.testing.assert_array_equal(rows.read(90, 1111), values[90:1111])
    wanted = np.random.default_rng(0).permutation(len(rows))[:400]
    wanted = np.concatenate([wanted, wanted[:3], [0, len(rows) - 1]])  # also twice and the ends
    np.testing.assert_array_equal(rows.take(wanted), values[wanted])
    assert rows.take(np.array([], np.int64)).shape == (0, 64)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows)).read(5, 9), values[5:9])


def test_three_axes_and_chunks_that_were_never_written(tmp_path, storage):
    values = DIGITS.reshape(-1, 8, 8)[:300].astype(np.float32)
    chunks = {"chunks": (64, 8, 8)} if "chunks" in storage else {}
    with h5py.File(tmp_path / "f.h5", "w") as file:
        data = file.create_dataset("features", (600, 8, 8), np.float32, **(storage | chunks))
        data[:300] = values
    rows = DatasetRows(tmp_path / "f.h5", "features", threads=2)
    np.testing.assert_array_equal(rows.read(0, 300), values)
    assert not rows.read(400, 600).any()


def test_pieces_join_near_rows_and_end_at_multiples():
    rows = np.array([1, 2, 40, 500, 501, 1023, 1024])
    assert cut_ranges(rows, length=1024, gap=37) == [(0, 3), (3, 5), (5, 6), (6, 7)]
    assert cut_ranges(rows, length=1024, gap=36) == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
    assert cut_ranges(rows, length=10**6, gap=10**6) == [(0, 7)]
    assert cut_ranges(np.array([], np.int64), length=10, gap=0) == []


def test_a_sparse_choice_takes_little_memory_beside_its_rows(tmp_path, storage, monkeypatch):
    """One row in ten: reading over the gaps must not cost ten times the memory."""
    values = np.tile(DIGITS, (20, 1)).astype(np.float32)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("features", data=values, **storage)
    monkeypatch.setattr(read_hdf5, "PIECE_BYTES", 2**16)
    rows = DatasetRows(tmp_path / "f.h5", "features", threads=1)
    wanted = np.arange(0, len(rows), 10)
    rows.take(wanted[:2])  # whatever is made only once
    tracemalloc.start()
    try:
        found = rows.take(wanted)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, values[wanted])
    pieces = 16 * len(wanted) * 8  # places, and a tuple of numbers for each of 3,594 pieces at most
    assert peak < found.nbytes + 3 * 2**16 + pieces


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
def test_rows_with_gaps_of_all_sizes(tmp_path, storage, share, threads, monkeypatch):
    monkeypatch.setattr(read_hdf5, "PIECE_BYTES", 2**14)  # 64 rows
    monkeypatch.setattr(read_hdf5, "GAP_BYTES", 2**12)  # 16 rows
    values = DIGITS.astype(np.float32)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("features", data=values, **storage)
    rows = DatasetRows(tmp_path / "f.h5", "features", threads=threads)
    draw = np.random.default_rng(0)
    wanted = draw.permutation(len(rows))[: int(share * len(rows))]
    np.testing.assert_array_equal(rows.take(wanted), values[wanted])
    wanted.sort()
    out = rows.empty(len(wanted) + 1)
    out[-1] = 77
    rows.read_rows(wanted, out[:-1])
    np.testing.assert_array_equal(out[:-1], values[wanted])
    assert (out[-1] == 77).all()


@pytest.mark.parametrize("fill", [np.nan, 3.5])
def test_what_was_never_written_holds_the_fill_value(tmp_path, storage, fill):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        data = file.create_dataset("features", (600, 64), np.float32, fillvalue=fill, **storage)
        file.create_dataset("nothing", (600, 64), np.float32, fillvalue=fill, **storage)
        data[150:170] = DIGITS[:20]
    with h5py.File(tmp_path / "f.h5") as file:
        expected = {key: file[key][()] for key in ("features", "nothing")}
    for key, values in expected.items():
        rows = DatasetRows(tmp_path / "f.h5", key, threads=2)
        np.testing.assert_array_equal(rows.read(0, 600), values)
        np.testing.assert_array_equal(rows.take(np.arange(0, 600, 7)), values[::7])


def test_threads_share_one_descriptor_and_one_pool(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("features", data=DIGITS, chunks=(10, 64), compression="gzip")
    written = pickle.dumps(DatasetRows(tmp_path / "f.h5", "features", threads=2))
    opened, real = [], os.open

    def slow_open(*args):
        time.sleep(0.05)
        opened.append(real(*args))
        return opened[-1]

    class SlowPool(ThreadPoolExecutor):
        def __init__(self, *args):
            time.sleep(0.05)
            super().__init__(*args)

    monkeypatch.setattr(os, "open", slow_open)
    monkeypatch.setattr(read_hdf5, "ThreadPoolExecutor", SlowPool)

    def asked(rows):
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda _: (rows.file, rows.pool), range(4)))

    found = asked(pickle.loads(written))
    assert len(set(found)) == 1 and opened == [found[0][0]]
    with pytest.raises(OSError):
        os.fstat(opened[0])


def test_what_is_no_feature_file_is_named(tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("features", data=DIGITS)
    whole = (tmp_path / "f.h5").read_bytes()
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    cases = {"absent.h5": "no such file", "text.h5": "not an HDF5 file", "half.h5": "truncated"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            DatasetRows(tmp_path / name, "features", threads=1)
    with pytest.raises(UserError, match="no dataset 'tokens'; the file has features"):
        DatasetRows(tmp_path / "f.h5", "tokens", threads=1)


def test_a_damaged_chunk_is_named(tmp_path):
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=DIGITS, chunks=(128, 64), compression="gzip")
    rows = DatasetRows(path, "features", threads=2)
    chunk = rows.storage.chunks[3]
    with open(path, "r+b") as file:
        file.seek(chunk.offset + 10)
        file.write(bytes(200))
    with pytest.raises(UserError, match="damaged chunk"):
        rows.read(0, len(rows))
    os.truncate(path, chunk.offset + 10)
    with pytest.raises(UserError, match="became shorter while it was read"):
        rows.read(0, len(rows))


def test_what_is_no_array_is_named(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_group("features")
        file["one"] = 3.0
        file["none"] = h5py.Empty("f4")
    for key in ("features", "one", "none"):
        with pytest.raises(UserError, match=f"'{key}' is no array; say with data.features_key"):
            DatasetRows(tmp_path / "f.h5", key, threads=1)


@pytest.mark.parametrize("stored", [">f2", ">f4", np.longdouble])
def test_rows_are_of_a_type_that_torch_knows(tmp_path, stored):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = DIGITS.astype(stored)
    rows = DatasetRows(tmp_path / "f.h5", "features", threads=1)
    found = torch.from_numpy(rows.take(np.array([3, 900])))
    np.testing.assert_array_equal(found, DIGITS[[3, 900]])
    assert rows.row_bytes == found[0].nbytes


def test_threads_after_a_fork(tmp_path):
    """A worker process has no thread of the pool that was used before it was forked."""
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_dataset("features", data=DIGITS, chunks=(10, 64), compression="gzip")
    rows = DatasetRows(tmp_path / "f.h5", "features", threads=2)
    rows.read(0, len(rows))
    assert rows.pool._threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        worker = multiprocessing.get_context("fork").Process(target=rows.read, args=(0, 900))
        worker.start()
    worker.join(30)
    is_done = worker.exitcode == 0
    worker.kill()
    assert is_done
