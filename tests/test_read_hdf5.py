"""Rows read past h5py equal rows read through it, whatever the storage."""

import configparser
import multiprocessing
import os
import pickle
import re
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from glovita_lib import read_hdf5, read_hdf5_file
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.read_hdf5 import DatasetRows, cut_ranges
from glovita_lib.spec_data import PrecomputedData

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
    with pytest.raises(UserError, match=r"rows 384 to 511 of .features. are damaged"):
        rows.read(0, len(rows))
    os.truncate(path, chunk.offset + 10)
    with pytest.raises(UserError, match="became shorter while it was read"):
        rows.read(0, len(rows))


@pytest.mark.parametrize("count", [5, 15])
@pytest.mark.parametrize("names", ["", "gzip", "shuffle gzip", "gzip shuffle"])
def test_a_chunk_of_another_length_is_refused(tmp_path, names, count):
    """The library gives what stood in memory in place of rows that lack, and no error."""
    path, held = tmp_path / "f.h5", DIGITS[20 : 20 + count].astype("f4")
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((10, 64))
    for name in names.split():
        plist.set_deflate(4) if name == "gzip" else plist.set_shuffle()
    stored = held.tobytes()
    for name in names.split():
        over = len(stored) % 4
        whole = np.frombuffer(stored[: len(stored) - over], np.uint8).reshape(-1, 4)
        turned = whole.T.tobytes() + stored[len(stored) - over :]
        stored = zlib.compress(stored) if name == "gzip" else turned
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((100, 64))
        dataset = h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F32LE, space, plist)
        h5py.Dataset(dataset)[...] = DIGITS[:100]
        dataset.write_direct_chunk((20, 0), stored)
    rows = DatasetRows(path, "features", threads=2)
    assert rows.direct and rows.storage is not None
    np.testing.assert_array_equal(rows.read(0, 20), DIGITS[:20])
    np.testing.assert_array_equal(rows.read(30, 100), DIGITS[30:100])
    said = rf"rows 20 to 29 of 'features' are damaged \(.* holds {count * 256:,} bytes, not 2,560\)"
    with pytest.raises(UserError, match=said):
        rows.read(25, 27)


def test_a_chunk_of_another_length_does_not_make_the_library_read(tmp_path):
    """Where it is one of the blocks by which the direct way is proven."""
    with h5py.File(tmp_path / "f.h5", "w") as file:
        data = file.create_dataset("features", data=DIGITS, chunks=(100, 64), compression="gzip")
        data.id.write_direct_chunk((0, 0), zlib.compress(DIGITS[:50].tobytes()))
    rows = DatasetRows(tmp_path / "f.h5", "features", threads=1)
    np.testing.assert_array_equal(rows.read(100, 200), DIGITS[100:200])
    with pytest.raises(UserError, match="rows 0 to 99 of 'features' are damaged"):
        rows.read(0, 1)


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


def test_the_bounds_of_the_libraries(tmp_path, monkeypatch):
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")
    bound = settings["glovita:libraries"]["hdf5"]
    assert tuple(map(int, bound.split("."))) == read_hdf5_file.HDF5_AT_LEAST
    assert h5py.version.hdf5_version_tuple >= read_hdf5_file.HDF5_AT_LEAST
    asked = settings["options"]["install_requires"].split()
    (h5py_bound,) = [entry for entry in asked if entry.startswith("h5py>=")]
    wanted = tuple(map(int, h5py_bound.removeprefix("h5py>=").split(".")))
    assert h5py.version.version_tuple[: len(wanted)] >= wanted
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = DIGITS
    monkeypatch.setattr(h5py.version, "hdf5_version_tuple", (1, 10, 10))
    with pytest.raises(UserError, match=rf"HDF5 .*, at least {bound} is needed: pip install"):
        DatasetRows(tmp_path / "f.h5", "features", threads=1)


TORN = {
    "big-endian": {"dtype": ">f4", "chunks": (10, 8), "compression": "gzip"},
    "big-endian, raw": {"dtype": ">f4", "chunks": (10, 8)},
    "columns": {"dtype": "f4", "chunks": (10, 4), "compression": "gzip"},
    "columns, shuffled": {"dtype": "f8", "chunks": (10, 4), "compression": "gzip", "shuffle": True},
    "columns, raw": {"dtype": "f2", "chunks": (10, 4)},
    "checksum": {"dtype": "f4", "chunks": (10, 8), "compression": "gzip", "fletcher32": True},
}


@pytest.mark.parametrize("change", [-4, 4], ids=["short", "long"])
@pytest.mark.parametrize("kind", TORN)
def test_chunks_of_another_length_that_the_library_would_read(kind, change, tmp_path):
    """Storage that the direct way leaves to the library, which takes what stands in memory."""
    values = np.arange(240).reshape(30, 8).astype(TORN[kind]["dtype"])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("features", data=values, **TORN[kind])
        size = int(np.prod(data.chunks)) * data.dtype.itemsize
        raw, place = b"\1" * (size + change), (10,) + (0,) * (data.ndim - 1)
        raw = zlib.compress(raw) if "compression" in TORN[kind] else raw
        raw += b"\0" * 4 if "fletcher32" in TORN[kind] else b""  # a wrong sum, never asked for
        data.id.write_direct_chunk(place, raw)
    rows = DatasetRows(tmp_path / "x.h5", "features", threads=1)
    assert np.array_equal(rows.read(0, 10), values[:10])
    assert np.array_equal(rows.read(20, 30), values[20:])
    said = rf"rows 10 to 19 of 'features' are damaged \(.* {size + change} bytes, not {size}\)"
    for start, stop in ((0, 30), (15, 16)):
        with pytest.raises(UserError, match=said):
            rows.read(start, stop)
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = h5py.VirtualSource("x.h5", "features", values.shape)
        file.create_virtual_dataset("features", layout)
    rows = DatasetRows(tmp_path / "virtual.h5", "features", threads=1)
    with pytest.raises(UserError, match=said):
        rows.read(0, 30)


def test_labels_in_chunks_of_another_length_are_refused(tmp_path):
    for name, labels in {"number": np.arange(30), "text": np.array([b"ab", b"cd"] * 15)}.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["features"] = np.zeros((30, 4), np.float32)
            data = file.create_dataset("labels", data=labels, chunks=(10,))
            data.id.write_direct_chunk((10,), b"abcd")
        spec = PrecomputedData(
            data_root_dir=str(tmp_path), features_file=f"{name}.h5", split_source="kfold"
        )
        with pytest.raises(UserError, match=r"rows 10 to 19 of 'labels' are damaged \(.* 4 bytes"):
            build_data(spec, seed=0)


def refused(path, key="features", **options):
    """The line that ends the opening of a dataset."""
    with pytest.raises(UserError) as raised:
        DatasetRows(path, key, threads=1, **options)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_links_out_of_the_folder_ask_for_leave(tmp_path):
    (tmp_path / "own" / "below").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for folder in ("own/below", "other"):
        with h5py.File(tmp_path / folder / "far.h5", "w") as file:
            file["before"] = np.ones(1000)
            file["x"] = DIGITS
    with h5py.File(tmp_path / "own" / "f.h5", "w") as file:
        file["below"] = h5py.ExternalLink("below/far.h5", "x")
        file["other"] = h5py.ExternalLink("../other/far.h5", "x")
        file["gone"] = h5py.ExternalLink("gone.h5", "x")
        file["loose"] = h5py.SoftLink("/nothing")
        file["circle"] = h5py.SoftLink("/circle")
        file["group"] = h5py.SoftLink("/round")
        file["round"] = h5py.SoftLink("/group")
        file["far circle"] = h5py.ExternalLink("f.h5", "/circle")
        file["folder"] = h5py.ExternalLink(".", "/x")
        layout = h5py.VirtualLayout(DIGITS.shape, DIGITS.dtype)
        layout[...] = h5py.VirtualSource("../other/far.h5", "x", DIGITS.shape)
        file.create_virtual_dataset("virtual", layout)
    path = tmp_path / "own" / "f.h5"
    (tmp_path / "link.h5").symlink_to(path)
    for place in (path, tmp_path / "link.h5"):
        rows = DatasetRows(place, "below", threads=1)
        assert rows.direct and rows.offset is not None
        np.testing.assert_array_equal(rows.take(np.array([7, 3])), DIGITS[[7, 3]])
    for key in ("other", "virtual"):
        said = refused(path, key)
        assert "outside of its folder" in said and "data.follow_links = true" in said
        rows = DatasetRows(path, key, threads=1, follow_links=True)
        np.testing.assert_array_equal(rows.read(0, len(rows)), DIGITS)
    assert "leads to 'x' of gone.h5" in refused(path, "gone")
    assert "leads to '/nothing'" in refused(path, "loose")
    circles = {"circle": "/circle", "group/x": "/round", "far circle": "/circle"}
    for key, target in circles.items():
        said = refused(path, key)
        assert f"leads to {target!r}" in said and "too many links)); correct the link" in said
    assert "leads to '/x' of . (" in refused(path, "folder")
    assert "no dataset 'gon'" in refused(path, "gon")
    assert "no dataset 'below/x'" in refused(path, "below/x")


def test_numbers_outside_of_hdf5_files_are_never_read(tmp_path):
    """A feature file must not make the program read any file as floats."""
    DIGITS.tofile(tmp_path / "secret")
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file.create_dataset(
            "x", DIGITS.shape, DIGITS.dtype, external=[("secret", 0, h5py.h5f.UNLIMITED)]
        )
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["linked"] = h5py.ExternalLink("raw.h5", "x")
        layout = h5py.VirtualLayout(DIGITS.shape, DIGITS.dtype)
        layout[...] = h5py.VirtualSource("raw.h5", "x", DIGITS.shape)
        file.create_virtual_dataset("virtual", layout)
    for name, key in (("raw.h5", "x"), ("f.h5", "linked"), ("f.h5", "virtual")):
        for follow in (False, True):
            said = refused(tmp_path / name, key, follow_links=follow)
            assert "keeps its numbers in files that are not HDF5 (secret)" in said


def virtual(path, key, source, name):
    """Add a virtual dataset of one source, or of as many as a pattern of names finds."""
    kind, rows = h5py.h5t.IEEE_F64LE, h5py.h5s.create_simple(DIGITS.shape)
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    space = rows
    if "%b" in source:
        space = h5py.h5s.create_simple(DIGITS.shape, (h5py.h5s.UNLIMITED, DIGITS.shape[1]))
        many = (h5py.h5s.UNLIMITED, 1)
        space.select_hyperslab((0, 0), many, stride=DIGITS.shape, block=DIGITS.shape)
    plist.set_virtual(space, source.encode(), name.encode(), rows)
    with h5py.File(path, "a", libver="latest") as file:
        h5py.h5d.create(file.id, key.encode(), kind, space, plist)


def test_sources_of_virtual_datasets_are_there(tmp_path):
    """The library would give zeros in their place."""
    path = tmp_path / "f.h5"
    with h5py.File(tmp_path / "far.h5", "w") as file:
        file["x"] = DIGITS
    virtual(path, "absolute", "/moved/far.h5", "x")  # its name alone, in the own folder
    virtual(path, "chain", ".", "absolute")
    virtual(path, "gone", "gone.h5", "x")
    virtual(path, "other", "far.h5", "y")
    virtual(path, "itself", "f.h5", "itself")
    virtual(path, "one", ".", "two")
    virtual(path, "two", "f.h5", "/one")
    virtual(path, "pattern", "far%b.h5", "x")
    for key in ("absolute", "chain"):
        rows = DatasetRows(path, key, threads=1)
        np.testing.assert_array_equal(rows.read(0, len(rows)), DIGITS)
    assert "'x' of gone.h5, which is not there" in refused(path, "gone")
    assert "'y' of far.h5, which the file has not" in refused(path, "other")
    assert "and so from itself" in refused(path, "itself")
    assert "and so from itself" in refused(path, "one")
    assert "a pattern of names" in refused(path, "pattern")


def mapping(path, key, shape, parts, **options):
    """Add a virtual dataset of parts (place in it, source, part of the source or None: all)."""
    rows = h5py.VirtualLayout(shape, "f8", **options)
    with h5py.File(path, "a", libver="latest") as file:
        for place, name, part in parts:
            endless = (None, 4) if options else None
            source = h5py.VirtualSource("far.h5", name, (40, 4), maxshape=endless)
            rows[place] = source if part is None else source[part]
        file.create_virtual_dataset(key, rows)


ALL, ENDLESS = np.s_[:, :], np.s_[: h5py.h5s.UNLIMITED, :]
EVEN, ODD = np.s_[::2, :], np.s_[1::2, :]
MAPPINGS = {  # parts -> what the refusal says; None where all rows are mapped
    "whole": ([(ALL, "x", ALL)], None),
    "all of it": ([(ALL, "x", None)], None),
    "head of a longer one": ([(ALL, "long", ALL)], None),
    "halves": ([(np.s_[:20], "x", np.s_[:20]), (np.s_[20:], "x", np.s_[20:])], None),
    "overlap": ([(np.s_[:30], "x", np.s_[:30]), (np.s_[10:], "x", np.s_[10:])], None),
    "turns": ([(EVEN, "x", EVEN), (ODD, "x", ODD)], None),
    "list": ([([0, 1, 4, *range(5, 40)], "x", np.s_[:38]), ([2, 3], "x", np.s_[38:])], None),
    "columns": ([(np.s_[:, :3], "x", np.s_[:, :3]), (np.s_[:, 3:], "x", np.s_[:, 3:])], None),
    "head": ([(np.s_[:30], "x", np.s_[:30])], "10 of 40 rows of the .*, first row 30, are not"),
    "tail": ([(np.s_[10:], "x", np.s_[10:])], "10 of 40 rows of the .*, first row 0, are not"),
    "every other": ([(EVEN, "x", EVEN)], "20 of 40 rows of the .*, first row 1, are not"),
    "some": ([([0, 2, 3], "x", np.s_[:3])], "37 of 40 rows of the .*, first row 1, are not"),
    "narrow": ([(np.s_[:, :3], "x", np.s_[:, :3])], "40 of 40 rows .*, are not or not wholly"),
    "corner": (
        [(np.s_[:, :3], "x", np.s_[:, :3]), (np.s_[:39, 3:], "x", np.s_[:39, 3:])],
        "1 of 40 rows of the .*, first row 39, are not or not wholly mapped",
    ),
    "nothing": ([], "40 of 40 rows of the .*, first row 0, are not"),
    "short": ([(ALL, "short", ALL)], r"160 numbers to 40 of 'short' .* shape \(10, 4\); correct"),
    "thin": ([(ALL, "thin", ALL)], r"160 numbers to 80 of 'thin' .* shape \(40, 2\); correct"),
    "long": ([(ALL, "long", None)], r"160 numbers to 320 of 'long' .* shape \(80, 4\); correct"),
    "flat": ([(ALL, "flat", None)], r"160 numbers to 40 of 'flat' .* shape \(40,\); correct"),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_all_rows_of_a_virtual_dataset_are_mapped(tmp_path, name):
    """The library gives its fill value for the others; what it says of sources that are too small
    does not tell what is wrong."""
    values = DIGITS[:80, :4]
    with h5py.File(tmp_path / "far.h5", "w") as file:
        file["x"], file["short"], file["long"] = values[:40], values[:10], values
        file["thin"], file["flat"] = values[:40, :2], values[:40, 0]
    parts, said = MAPPINGS[name]
    mapping(tmp_path / "f.h5", "v", (40, 4), parts)
    with h5py.File(tmp_path / "f.h5") as file:
        if not file["v"].is_virtual:
            pytest.skip("without sources this h5py makes a plain dataset of it")
    if said is None:
        with h5py.File(tmp_path / "f.h5") as file:
            expected = file["v"][()]
        rows = DatasetRows(tmp_path / "f.h5", "v", threads=1)
        np.testing.assert_array_equal(rows.read(0, 40), expected)
    else:
        assert re.search(said, refused(tmp_path / "f.h5", "v"))


def test_mappings_without_end_go_as_far_as_their_sources(tmp_path):
    with h5py.File(tmp_path / "far.h5", "w") as file:
        for name, count in {"x": 50, "short": 10}.items():
            file.create_dataset(name, data=DIGITS[:count, :4], maxshape=(None, 4))
    path, grows = tmp_path / "f.h5", {"maxshape": (None, 4)}
    mapping(path, "x", (40, 4), [(ENDLESS, "x", ENDLESS)], **grows)
    even, odd = (np.s_[start : h5py.h5s.UNLIMITED : 2, :] for start in (0, 1))
    mapping(path, "same", (40, 4), [(even, "x", ENDLESS), (odd, "x", ENDLESS)], **grows)
    mapping(path, "other", (40, 4), [(even, "x", ENDLESS), (odd, "short", ENDLESS)], **grows)
    values = DIGITS[:50, :4]
    for key, expected in {"x": values, "same": np.repeat(values, 2, axis=0)}.items():
        rows = DatasetRows(path, key, threads=1)
        np.testing.assert_array_equal(rows.read(0, len(rows)), expected)
    assert "to 40 of 'short' of far.h5" in refused(path, "other")


@pytest.mark.parametrize("present", ["abcd", "bcd", "cd", "d"])
def test_sources_are_sought_where_the_library_seeks_them(tmp_path, monkeypatch, present):
    """The one that is checked is the one that is read."""
    folders = {"a": "named", "b": "links", "c": "here", "d": "real"}
    for number, folder in enumerate(folders.values()):
        (tmp_path / folder).mkdir()
        if folder[0] in [folders[letter][0] for letter in present]:
            with h5py.File(tmp_path / folder / "far.h5", "w") as file:
                file["x"] = np.full_like(DIGITS, number)
    virtual(tmp_path / "real" / "f.h5", "absolute", str(tmp_path / "named" / "far.h5"), "x")
    virtual(tmp_path / "real" / "f.h5", "relative", "far.h5", "x")
    (tmp_path / "links" / "f.h5").symlink_to(tmp_path / "real" / "f.h5")
    monkeypatch.chdir(tmp_path / "here")
    path = str(tmp_path / "links" / "f.h5")
    for key, name in (("absolute", str(tmp_path / "named" / "far.h5")), ("relative", "far.h5")):
        with h5py.File(path) as file, h5py.File(read_hdf5_file.source_path(path, name)) as source:
            assert source["x"][0, 0] == file[key][0, 0]


def test_a_filter_that_is_not_there_is_named(tmp_path):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((100, 64))
        plist.set_filter(32999, h5py.h5z.FLAG_OPTIONAL)
        kind, space = h5py.h5t.IEEE_F64LE, h5py.h5s.create_simple(DIGITS.shape)
        h5py.h5d.create(file.id, b"features", kind, space, plist)
    assert "filter 32999, which is not installed" in refused(tmp_path / "f.h5")


def test_damage_is_one_line_whoever_reads(tmp_path):
    path = tmp_path / "f.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("features", data=DIGITS, chunks=(128, 64), fletcher32=True)
        place = data.id.get_chunk_info(5).byte_offset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes(range(200)))
    rows = DatasetRows(path, "features", threads=2)
    np.testing.assert_array_equal(rows.read(0, 640), DIGITS[:640])
    with pytest.raises(UserError, match=r"of 'features' are damaged"):
        rows.read(600, 700)


@pytest.mark.parametrize("options", [{}, {"compression": "lzf", "chunks": (100, 64)}])
def test_a_file_that_is_replaced_is_not_read_as_the_first_one(tmp_path, options):
    path = tmp_path / "f.h5"
    for values in (DIGITS, DIGITS + 1):
        with h5py.File(path, "w") as file:
            file["room"] = np.zeros(int(values[0, 0]) * 100)
            file.create_dataset("features", data=values, **options)
        if values is DIGITS:
            sent = pickle.dumps(DatasetRows(path, "features", threads=1))
    rows = pickle.loads(sent)
    with pytest.raises(UserError, match="changed while the program ran"):
        rows.read(0, 5)
    path.unlink()
    with pytest.raises(UserError, match="changed while the program ran"):
        pickle.loads(sent).read(0, 5)
