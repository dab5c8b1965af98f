"""Any layout of a feature file gives the rows that h5py gives, or one line."""

import ctypes
import os
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t, h5z
from hypothesis import given, settings
from hypothesis import strategies as st

from glovita_lib import data_features, read_hdf5
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.read_hdf5 import DatasetRows
from glovita_lib.read_hdf5_file import read_whole
from glovita_lib.spec_data import PrecomputedData

KEEP_EDGE_UNFILTERED = 0x2  # H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS
LZF = 32000


def hdf5_library():
    """The HDF5 that h5py has loaded, for what h5py does not offer; None where it is not found."""
    if not os.path.isfile("/proc/self/maps"):
        return None
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = [path for path in paths if "/libhdf5-" in path or "/libhdf5.so" in path]
    return ctypes.CDLL(found[0]) if found else None


HDF5 = hdf5_library()


def leave_edge_unfiltered(plist):
    """The chunk that reaches over the end is written without filters."""
    HDF5.H5Pset_chunk_opts.argtypes = [ctypes.c_int64, ctypes.c_uint]
    assert HDF5.H5Pset_chunk_opts(plist.id, KEEP_EDGE_UNFILTERED) >= 0


def undefine_fill_value(plist):
    """What was never written holds no value."""
    HDF5.H5Pset_fill_value.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    assert HDF5.H5Pset_fill_value(plist.id, h5t.IEEE_F32LE.id, None) >= 0


def bfloat16():
    """A type that numpy lacks."""
    kind = h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


@dataclass(frozen=True, slots=True)
class Layout:
    """How a dataset lies in its file."""

    kind: str  # a numpy type or "bfloat16"
    committed: bool  # whether the type has a name in the file
    shape: tuple[int, ...]
    storage: str  # contiguous, compact, chunked, virtual
    chunk: tuple[int, ...]
    filters: tuple[str, ...]  # in the order of writing
    filter_edge: bool
    fill: float | None | str  # None: the default; "undefined"
    fill_time: int
    alloc_time: int
    written: tuple[tuple[int, int], ...]  # ranges of rows
    raw: int | None  # a chunk that is written with all filters left out
    user_block: int
    newest: bool  # of the file format
    link: str


@st.composite
def layouts(draw):
    rows = draw(st.integers(0, 40))
    shape = (rows, *draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    storage = draw(st.sampled_from(["chunked"] * 5 + ["contiguous", "compact", "virtual"]))
    whole = draw(st.integers(0, 4))
    chunk = (
        draw(st.integers(1, 15)),
        *(d if whole else draw(st.integers(1, d)) for d in shape[1:]),
    )
    filters = st.sampled_from(["gzip", "shuffle", "lzf", "checksum"])
    some = st.one_of(st.just(["shuffle", "gzip"]), st.lists(filters, max_size=3))
    ends = st.integers(0, rows)
    fills = [None, 3.5, np.nan] + ["undefined"] * (HDF5 is not None)
    return Layout(
        kind=draw(st.sampled_from(["<f4", "<f2", "<f8", ">f4", "bfloat16", "longdouble"])),
        committed=draw(st.booleans()),
        shape=shape,
        storage=storage,
        chunk=chunk,
        filters=tuple(draw(some)) if storage == "chunked" else (),
        filter_edge=HDF5 is None or draw(st.booleans()),
        fill=draw(st.sampled_from(fills)),
        fill_time=draw(
            st.sampled_from([h5d.FILL_TIME_IFSET, h5d.FILL_TIME_ALLOC, h5d.FILL_TIME_NEVER])
        ),
        alloc_time=draw(
            st.sampled_from([h5d.ALLOC_TIME_DEFAULT, h5d.ALLOC_TIME_EARLY, h5d.ALLOC_TIME_LATE])
        ),
        written=tuple(draw(st.lists(st.tuples(ends, ends).map(sorted).map(tuple), max_size=3)))
        if draw(st.booleans())
        else ((0, rows),),
        raw=draw(st.one_of(st.none(), st.integers(0, 5))),
        user_block=draw(st.sampled_from([0, 0, 512, 2048])),
        newest=draw(st.booleans()),
        link=draw(
            st.sampled_from(["none", "hard", "soft", "external", "chain", "group", "outside"])
        ),
    )


def write(path, layout):
    """Write the dataset "x" of a layout and its values' own file where it is virtual."""
    values = np.random.default_rng(0).normal(size=layout.shape).astype(np.float32)
    if layout.storage == "virtual":
        source = path.with_name("source.h5")
        with h5py.File(source, "w") as file:
            file["y"] = values.astype("f4" if layout.kind == "bfloat16" else layout.kind)
    with h5py.File(
        path,
        "w",
        userblock_size=layout.user_block,
        libver="latest" if layout.newest or not layout.filter_edge else None,
    ) as file:
        kind = bfloat16() if layout.kind == "bfloat16" else h5t.py_create(np.dtype(layout.kind))
        if layout.storage == "virtual":
            rows = h5py.VirtualLayout(layout.shape, kind.dtype)
            for start, stop in layout.written:
                if stop > start:
                    source = h5py.VirtualSource("source.h5", "y", layout.shape)
                    rows[start:stop] = source[start:stop]
            fill = 0 if isinstance(layout.fill, str) else layout.fill
            file.create_virtual_dataset("x", rows, fillvalue=fill)
            return
        kind = kind.copy()
        if layout.committed:
            kind.commit(file.id, b"kind")
        space = h5s.create_simple(layout.shape)
        if layout.storage == "chunked":
            space = h5s.create_simple(layout.shape, (h5s.UNLIMITED,) * len(layout.shape))
        written = h5d.create(file.id, b"x", kind, space, plist_of(layout))
        dataset = h5py.Dataset(written)
        for start, stop in layout.written:
            dataset[start:stop] = values[start:stop]
        write_raw(dataset, values, layout)


def plist_of(layout):
    """Creation properties of a layout."""
    plist = h5p.create(h5p.DATASET_CREATE)
    if layout.storage == "compact":
        plist.set_layout(h5d.COMPACT)
    elif layout.storage == "chunked":
        plist.set_chunk(layout.chunk)
        plist.set_alloc_time(layout.alloc_time)
    for name in layout.filters:
        match name:
            case "gzip":
                plist.set_deflate(2)
            case "shuffle":
                plist.set_shuffle()
            case "checksum":
                plist.set_fletcher32()
            case "lzf":
                plist.set_filter(LZF, h5z.FLAG_OPTIONAL)
    if layout.filters and not layout.filter_edge:
        leave_edge_unfiltered(plist)
    if layout.fill == "undefined":
        undefine_fill_value(plist)
    elif layout.fill is not None:
        plist.set_fill_value(np.array(layout.fill, np.float32))
    if layout.fill != "undefined" or layout.fill_time != h5d.FILL_TIME_ALLOC:
        plist.set_fill_time(layout.fill_time)
    return plist


def write_raw(dataset, values, layout):
    """Write a chunk past the filters, as programs do that compress in parallel."""
    if layout.storage != "chunked" or layout.raw is None or layout.kind == "bfloat16":
        return
    first = layout.raw * layout.chunk[0]
    if layout.chunk[1:] != layout.shape[1:] or first >= len(values):
        return
    block = np.zeros(layout.chunk, layout.kind)
    part = values[first : first + layout.chunk[0]]
    block[: len(part)] = part
    mask = (1 << len(layout.filters)) - 1
    dataset.id.write_direct_chunk((first, *(0 for _ in layout.chunk[1:])), block.tobytes(), mask)


def link_to(folder, layout):
    """A file that links to the dataset as the layout says -> the file, and the name in it."""
    target = folder / "in" / "deep" / "f.h5"
    if layout.link in ("none", "hard", "soft"):
        with h5py.File(target, "r+") as file:
            if layout.link == "hard":
                file["g/x"] = file["x"]
            elif layout.link == "soft":
                file["g/x"] = h5py.SoftLink("/x")
        return target, "x" if layout.link == "none" else "g/x"
    own = folder / "out" / "f.h5" if layout.link == "outside" else folder / "in" / "f.h5"
    with h5py.File(own, "w") as file:
        reached = os.path.relpath(target, own.parent)
        if layout.link == "group":
            file["far"] = h5py.ExternalLink(reached, "/")
            return own, "far/x"
        file["far"] = h5py.ExternalLink(reached, "/x")
        if layout.link == "chain":
            with h5py.File(own.with_name("first.h5"), "w") as first:
                first["x"] = h5py.SoftLink("/far")
                first["far"] = h5py.ExternalLink("f.h5", "/far")
            return own.with_name("first.h5"), "x"
    return own, "far"


def by_library(path, key):
    """The rows that h5py gives, in the type that is asked for; None where it gives none."""
    with h5py.File(path) as file:
        try:
            return file[key][()].astype(read_hdf5.readable_type(file[key].dtype))
        except OSError:
            return None


def refused(call, match):
    """A call ends in one line for the user."""
    with pytest.raises(UserError, match=match) as raised:
        call()
    assert len(str(raised.value).splitlines()) == 1


def assert_rows_of_h5py(layout):
    """The rows of a layout are those that h5py gives."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "in" / "deep").mkdir(parents=True)
        (folder / "out").mkdir()
        write(folder / "in" / "deep" / "f.h5", layout)
        path, key = link_to(folder, layout)
        expected = by_library(path, key)
        if layout.link == "outside":
            refused(lambda: DatasetRows(path, key, threads=1), "outside of its folder")
        left = set(range(layout.shape[0])).difference(*(range(*ends) for ends in layout.written))
        with h5py.File(path) as file:  # an older h5py makes a plain dataset of no sources
            mapped = layout.link == "outside" or file[key].is_virtual
        if layout.storage == "virtual" and mapped and left:
            opened = partial(DatasetRows, path, key, threads=1, follow_links=True)
            refused(opened, f"{len(left)} of {layout.shape[0]} rows .* first row {min(left)},")
            return
        rows = DatasetRows(path, key, threads=2, follow_links=layout.link == "outside")
        if expected is None:
            refused(lambda: rows.read(0, len(rows)), "are damaged")
            return
        draw = np.random.default_rng(1)
        count = len(expected)
        for wanted in (
            np.arange(count),
            np.sort(draw.permutation(count)[: count // 3]),
            np.arange(0, count, 5),
        ):
            out = np.full((len(wanted), *expected.shape[1:]), 77, rows.dtype)  # of an earlier use
            rows.read_rows(wanted, out)
            np.testing.assert_array_equal(out, expected[wanted])
        shuffled = draw.permutation(count)
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(rows)).take(shuffled), expected[shuffled]
        )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layouts())
def test_any_layout_gives_the_rows_of_h5py(layout):
    assert_rows_of_h5py(layout)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(layouts())
def test_many_layouts_give_the_rows_of_h5py(layout):
    assert_rows_of_h5py(layout)


def unfiltered_edge(path, values, *filters):
    """A file whose last chunk is written without filters."""
    with h5py.File(path, "w", libver="latest") as file:
        plist = h5p.create(h5p.DATASET_CREATE)
        plist.set_chunk((100, values.shape[1]))
        for name in filters:
            {"gzip": plist.set_deflate, "shuffle": plist.set_shuffle}[name]()
        leave_edge_unfiltered(plist)
        space = h5s.create_simple(values.shape)
        written = h5d.create(file.id, b"features", h5t.IEEE_F32LE, space, plist)
        h5py.Dataset(written)[...] = values
        file["labels"] = np.arange(len(values)) % 2


@pytest.mark.skipif(HDF5 is None, reason="h5py does not offer it")
@pytest.mark.parametrize("filters", [["shuffle"], ["gzip"], ["shuffle", "gzip"]])
def test_last_rows_that_are_stored_unfiltered_are_right_and_noted(tmp_path, filters):
    values = np.random.default_rng(0).normal(size=(250, 8)).astype(np.float32)
    unfiltered_edge(tmp_path / "f.h5", values, *filters)
    spec = PrecomputedData(data_root_dir=str(tmp_path), train_features_file="f.h5")
    data = build_data(spec, seed=0)
    np.testing.assert_array_equal(data.splits["train"].source.fetch(np.arange(250)), values)
    said = "read through h5py, as the direct way gave other values"
    assert data.report == [f"{tmp_path}/f.h5: features {said}"]
    split, samples, notes = data_features.unlabelled_features(tmp_path / "f.h5", spec)
    assert samples.kind == "vectors"
    assert notes == data.report and len(split) == 250
    (tmp_path / "bags").mkdir()
    (tmp_path / "f.h5").rename(tmp_path / "bags" / "a.h5")
    with h5py.File(tmp_path / "bags" / "b.h5", "w") as file:
        file["features"] = values
    split, samples, notes = data_features.unlabelled_features(tmp_path / "bags", spec)
    assert samples.kind == "bags"
    assert notes == [f"{tmp_path}/bags: 1 files {said}"]
    for bag in split.source.fetch(np.arange(2)):
        np.testing.assert_array_equal(bag, values)


@pytest.mark.parametrize("libver", ["v108", "v110", "latest"])
@pytest.mark.parametrize("chunk", [(31, 2), (31, 8)])
@pytest.mark.parametrize("written", [np.s_[31:62], np.s_[100:], np.s_[:, :2], np.s_[:, 2:5]])
def test_chunks_that_the_library_cannot_be_asked_about(tmp_path, libver, chunk, written):
    """HDF5 1.14 says other places of chunks than theirs where the second axis alone may grow."""
    values = np.arange(1600, dtype=np.float32).reshape(200, 8)
    for options in ({"compression": "gzip"}, {"fletcher32": True}, {}):
        with h5py.File(tmp_path / "a.h5", "w", libver=(libver, "latest")) as file:
            layout = {"shape": (200, 8), "chunks": chunk, "maxshape": (200, None), **options}
            file.create_dataset("features", dtype="f4", fillvalue=7, **layout)[written] = values[
                written
            ]
        expected = np.full_like(values, 7)
        expected[written] = values[written]
        rows = DatasetRows(tmp_path / "a.h5", "features", threads=1)
        assert np.array_equal(rows.read(0, 200), expected)
        with h5py.File(tmp_path / "a.h5") as file:
            assert np.array_equal(read_whole(file["features"], "features"), expected)


@pytest.mark.parametrize("shape", [(50, 8), (0, 8)])
@pytest.mark.parametrize("block", [0, 512, 4096])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_dataset_never_written_behind_a_user_block(tmp_path, shape, block, libver):
    """As MATLAB's files have one: the library says that it begins before the end of the block."""
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=block, libver=libver) as file:
        file.create_dataset("features", shape=shape, dtype="f4", fillvalue=3)
    rows = DatasetRows(tmp_path / "a.h5", "features", threads=1)
    assert np.array_equal(rows.read(0, len(rows)), np.full(shape, 3, np.float32))
    with h5py.File(tmp_path / "a.h5", "a", libver=libver) as file:
        file["written"] = np.arange(400, dtype=np.float32).reshape(50, 8)
    rows = DatasetRows(tmp_path / "a.h5", "written", threads=1)
    assert rows.direct and rows.offset is not None and rows.read(49, 50)[0, 7] == 399
    size = os.path.getsize(tmp_path / "a.h5")
    os.truncate(tmp_path / "a.h5", size - 100)
    with pytest.raises(UserError, match="truncated"):
        DatasetRows(tmp_path / "a.h5", "written", threads=1)
