"""Blocks on disk: what is discarded, what is kept, how they become one file."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from children import run
from PIL import Image
from skimage import data as photos
from sklearn.datasets import load_digits

from glovita_lib import feature_writer, files
from glovita_lib.data import PartSource, SkippingSource, skipped
from glovita_lib.errors import UserError
from glovita_lib.extraction import Instances, Readout
from glovita_lib.feature_writer import BlockFiles, BlockPlan, left_out, put_together, refuse_other
from glovita_lib.files import Lock
from glovita_lib.read_hdf5 import DatasetRows
from glovita_lib.read_image import FileSource, Header

X = (load_digits().data / 7).astype(np.float16)
RECIPE = {"encoder": "resnet18", "class_names": ["a", "b"], "stored_precision": 16}
COUNT, BLOCK = 70, 16


def parts_of(folder: Path, count=COUNT, block=BLOCK, order=None, **recipe) -> BlockFiles:
    rows = np.arange(count) if order is None else order
    return BlockFiles(folder / "out" / "f.h5", RECIPE | recipe, BlockPlan(rows, block))


def vectors(parts: BlockFiles, block: int) -> tuple[np.ndarray, list[Readout]]:
    """A block in two batches."""
    rows = parts.plan.rows_of(block)
    return rows, [Readout(X[part], None) for part in np.array_split(rows, 2)]


def bags(parts: BlockFiles, block: int) -> tuple[np.ndarray, list[Readout]]:
    """Sample i as the tokens i, i + 1 ... of i % 3 + 1, at (i, 0), (i, 1) ..."""
    rows = parts.plan.rows_of(block)
    places = [(row, i) for row in rows for i in range(row % 3 + 1)]
    features = X[[row + i for row, i in places]]
    return rows, [Readout(features, Instances(rows % 3 + 1, np.array(places, np.int32)))]


def written(folder: Path, make=vectors, **options) -> BlockFiles:
    parts = parts_of(folder, **options)
    parts.open()
    for block in parts.pending():
        parts.write(block, *make(parts, block))
    return parts


def assemble(parts: BlockFiles, keep=None, compression="none", tables=(), notes=()):
    keep = np.ones(len(parts.plan.rows), bool) if keep is None else keep
    return put_together(
        parts, tables=dict(tables), compression=compression, keep=keep, notes=dict(notes)
    )


# ---------------------------------------------------------------------- blocks


def test_finished_blocks_stay_when_it_is_opened_again(tmp_path):
    parts = parts_of(tmp_path)
    parts.open()
    assert parts.pending() == [0, 1, 2, 3, 4]
    parts.write(3, *vectors(parts, 3))
    (parts.folder / ".tmp-123-000001.npz").write_bytes(b"half")
    (parts.target.parent / ".tmp-123-f.h5").write_bytes(b"half")
    (parts.target.parent / ".tmp-123-other.h5").write_bytes(b"of another process")
    again = parts_of(tmp_path)
    again.open()
    assert again.pending() == [0, 1, 2, 4]
    names = {path.name for path in parts.target.parent.rglob(".tmp*")}
    assert names == {".tmp-123-other.h5"}


OTHERS = {
    "recipe": {"encoder": "resnet34"},
    "number of samples": {"count": 71},
    "size of blocks": {"block": 32},
    "order of samples": {"order": np.arange(COUNT)[::-1]},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_blocks_of_another_recipe_are_discarded(tmp_path, other):
    written(tmp_path)
    parts = parts_of(tmp_path, **other)
    parts.open()
    assert parts.pending() == list(range(parts.plan.blocks))


def test_a_folder_whose_clearing_was_killed_is_cleared(tmp_path):
    """Blocks without a recipe are of nobody knows what."""
    parts = written(tmp_path)
    (parts.folder / "recipe.json").unlink()
    parts.open()
    assert len(parts.pending()) == 5


def test_clearing_ends_with_the_recipe(tmp_path, monkeypatch):
    parts, order = written(tmp_path), []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda p, **k: (order.append(p.name), unlink(p, **k)))
    parts.clear()
    assert order[-1] == "recipe.json" and len(order) == 6


def test_a_block_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    parts = parts_of(tmp_path)
    parts.open()

    def half(archive, name, pieces):
        archive.writestr(f"{name}.npy", b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_writer, "write_array", half)
    with pytest.raises(KeyboardInterrupt):
        parts.write(0, *vectors(parts, 0))
    assert parts.pending()[0] == 0
    assert {path.name for path in parts.folder.iterdir()} == {"recipe.json"}


def test_a_block_is_what_numpy_writes(tmp_path):
    """In pieces, some of them not contiguous; read by numpy in its own format."""
    parts = parts_of(tmp_path)
    parts.open()
    rows = parts.plan.rows_of(1)
    maps = X[:32].reshape(16, 2, 8, 8)
    pieces = [maps[:5].transpose(0, 2, 3, 1), maps[5:].transpose(0, 2, 3, 1)]
    lengths, coords = np.arange(1, 17), np.arange(272, dtype=np.int32).reshape(136, 2)
    parts.write(1, rows, [
        Readout(piece, Instances(lengths[part], coords[part]))
        for piece, part in zip(pieces, (slice(5), slice(5, None)), strict=True)
    ])  # fmt: skip
    np.savez(tmp_path / "own.npz", rows=rows, features=np.concatenate(pieces),
             lengths=lengths, coords=coords)  # fmt: skip
    with np.load(parts.path(1)) as found, np.load(tmp_path / "own.npz") as own:
        assert found.files == own.files
        for name in own.files:
            assert found[name].dtype == own[name].dtype
            np.testing.assert_array_equal(found[name], own[name])


def test_no_block_is_copied_to_be_written(tmp_path):
    """Peak memory beside the readouts, writing, and beside one block, putting together."""
    import tracemalloc

    parts = parts_of(tmp_path, count=16)
    parts.open()
    pieces = [np.ones((8, 2**19), np.float16) for _ in range(2)]  # 16 MiB in all
    tracemalloc.start()
    try:
        parts.write(0, np.arange(16), [Readout(piece, None) for piece in pieces])
        assert tracemalloc.get_traced_memory()[1] < 2**20
        del pieces
        assemble(parts)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_removal_takes_everything(tmp_path):
    parts = written(tmp_path)
    lock = Lock(parts.lock)
    lock.acquire()
    parts.remove()
    lock.release()
    assert not parts.folder.exists()
    parts.remove()  # twice is fine


# ---------------------------------------------------------------------- the file


@pytest.mark.parametrize("compression", ["none", "lzf", "gzip:1", "gzip:9"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_read_back_is_what_was_written(tmp_path, monkeypatch, compression, dtype):
    monkeypatch.setattr("test_feature_writer.X", X.astype(dtype))
    monkeypatch.setattr(feature_writer, "CHUNK_BYTES", 20 * 64 * 2)  # several chunks
    parts = written(tmp_path)
    ids = np.array([f"bild_{i}_ä.png" for i in range(COUNT)], object)
    shape = assemble(parts, compression=compression, tables={"ids": ids, "labels": np.arange(70)})
    assert shape == (COUNT, 64)
    with h5py.File(parts.target) as file:
        assert file["features"].dtype == dtype
        name, _, level = compression.partition(":")
        assert file["features"].compression == (None if compression == "none" else name)
        assert file["features"].compression_opts == (int(level) if level else None)
        assert file["features"].chunks is None or file["features"].chunks[0] in (10, 20)
        np.testing.assert_array_equal(file["features"], X[:COUNT].astype(dtype))
        assert list(file["ids"].asstr()) == list(ids)
        np.testing.assert_array_equal(file["labels"], np.arange(70))
        assert {name: files.as_json(file.attrs[name]) for name in RECIPE} == RECIPE
    rows = DatasetRows(parts.target, "features", threads=2)  # as training reads it
    np.testing.assert_array_equal(rows.read(0, COUNT), X[:COUNT].astype(dtype))
    np.testing.assert_array_equal(rows.take(np.array([69, 0, 33])), X[[69, 0, 33]].astype(dtype))


def test_the_order_of_the_file_is_that_of_the_plan(tmp_path):
    order = np.random.default_rng(0).permutation(COUNT)
    parts = written(tmp_path, order=order)
    assemble(parts)
    with h5py.File(parts.target) as file:
        np.testing.assert_array_equal(file["features"], X[order])


@pytest.mark.parametrize("make", [vectors, bags])
@pytest.mark.parametrize("first", [0, BLOCK + 3])
def test_samples_that_are_left_out(tmp_path, make, first):
    """Also where the whole first block is."""
    keep = np.arange(COUNT) >= first
    keep[[20, 47, 69]] = False
    parts = written(tmp_path, make=make)
    assemble(parts, keep=keep)
    rows = np.flatnonzero(keep)
    with h5py.File(parts.target) as file:
        if make is vectors:
            np.testing.assert_array_equal(file["features"], X[rows])
            return
        ptr = file["bag_ptr"][()]
        assert len(ptr) == len(rows) + 1 and ptr[-1] == len(file["features"])
        for bag, row in enumerate(rows):
            inside = slice(ptr[bag], ptr[bag + 1])
            np.testing.assert_array_equal(file["features"][inside], X[row : row + row % 3 + 1])
            assert file["coords"][inside].tolist() == [[row, i] for i in range(row % 3 + 1)]


def test_one_sample_and_a_map(tmp_path):
    parts = parts_of(tmp_path, count=1)
    parts.open()
    parts.write(0, np.array([0]), [Readout(X[:6].reshape(1, 6, 8, 8), None)])
    assert assemble(parts, compression="gzip") == (1, 6, 8, 8)
    with h5py.File(parts.target) as file:
        np.testing.assert_array_equal(file["features"][0], X[:6].reshape(6, 8, 8))


def test_equal_blocks_make_equal_bytes(tmp_path):
    contents = []
    for name in ("a", "b"):
        parts = written(tmp_path / name)
        assemble(parts, compression="gzip", notes={"weights": "random"})
        contents.append(parts.target.read_bytes())
    assert contents[0] == contents[1]


def test_twenty_thousand_class_names(tmp_path):
    """More than the 64 KiB that an attribute holds in HDF5's oldest format."""
    names = [f"n{i:08d} a long description" for i in range(20_000)]
    parts = written(tmp_path, class_names=names)
    assemble(parts)
    with h5py.File(parts.target) as file:
        assert list(file.attrs["class_names"]) == names
    assert refuse_other(parts.target, parts.recipe)


def test_nothing_half_is_left_where_a_file_fails(tmp_path):
    parts = written(tmp_path)
    with pytest.raises(TypeError):
        assemble(parts, tables={"labels": np.array([object()])})
    assert [path.name for path in parts.target.parent.iterdir()] == ["f.h5.parts"]
    assert parts.pending() == []


# ---------------------------------------------------------------------- what is there already


def test_a_file_made_otherwise_is_refused(tmp_path):
    parts = written(tmp_path)
    assert not refuse_other(parts.target, RECIPE)
    assemble(parts)
    assert refuse_other(parts.target, RECIPE)
    with pytest.raises(UserError) as caught:
        refuse_other(parts.target, RECIPE | {"encoder": "resnet34", "class_names": ["x"] * 40})
    text = str(caught.value)
    assert "encoder resnet18, now resnet34; another class_names; set extract.output_fil" in text
    assert "stored_precision" not in text and "\n" not in text
    with pytest.raises(UserError, match="norm None, now raw"):
        refuse_other(parts.target, RECIPE | {"norm": "raw"})


@pytest.mark.parametrize("content", [b"", b"some notes", b"\x89HDF\r\n\x1a\n"])
def test_a_file_of_others_is_refused(tmp_path, content):
    (tmp_path / "f.h5").write_bytes(content)
    with pytest.raises(UserError, match="exists and was not written by mode extract; set"):
        refuse_other(tmp_path / "f.h5", RECIPE)


def test_lines_about_left_out_samples(tmp_path):
    parts = written(tmp_path)
    assemble(parts, tables={"left_out": np.array(["a.png: broken", "b.png: gone"], object)})
    assert left_out(parts.target) == ["a.png: broken", "b.png: gone"]
    assemble(parts)
    assert left_out(parts.target) == []


# ---------------------------------------------------------------------- disk full


def test_a_full_disk_is_told_before_the_writing(tmp_path, monkeypatch):
    parts = written(tmp_path)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(feature_writer.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"has 0 MiB left, the features need 0: free some space"):
        assemble(parts)
    assert parts.pending() == [] and not parts.target.exists()


LIMITED = """
import resource, sys
from pathlib import Path
from test_feature_writer import assemble, written
parts = written(Path({folder!r}), count=1500)
limit = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limit))
from glovita_lib.errors import UserError
for compression in ("none", "gzip"):
    try:
        assemble(parts, compression=compression)
    except UserError as error:
        print(error)
"""


@pytest.mark.processes
def test_a_disk_that_fills_up_while_it_is_written(tmp_path):
    """The kernel's limit on the size of a file stands for it. HDF5 alone would end the process with
    a crash."""
    done = run(LIMITED.format(folder=str(tmp_path)))
    lines = done.out.splitlines()
    assert len(lines) == 2 and done.code == 0, done.out
    for line in lines:
        assert line.startswith(f"cannot write {tmp_path / 'out' / 'f.h5'}: File too large; ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["f.h5.parts"]


# ---------------------------------------------------------------------- leaving out


class Images:
    """Two of five images cannot be read."""

    uniform = None
    sizes = np.array([[4, 5]] * 5)

    def fetch(self, rows):
        if bad := sorted({1, 12} & set(rows.tolist())):
            raise UserError(f"image {bad[0]}: broken")
        return [np.full((1, 4, 5), row, np.uint8) for row in rows]


def test_unreadable_samples_become_black_and_are_noted(tmp_path):
    images = Images()
    images.sizes = np.array([[4, 5]] * 20)
    source = SkippingSource(images, np.array([3, 12, 2, 1]), tmp_path, (1, 9, 9), 8)
    found = source.fetch(np.array([0, 1, 3]))
    assert [int(image.max()) for image in found] == [3, 0, 0]
    assert {image.shape for image in found} == {(1, 4, 5)}
    assert skipped(tmp_path) == {1: "image 1: broken", 12: "image 12: broken"}
    assert list(skipped(tmp_path)) == [1, 12]  # by number, not by name
    images.sizes = None  # a source that does not know them
    assert source.select(np.array([1])).fetch(np.array([0]))[0].shape == (1, 9, 9)


def test_a_part_is_read_as_the_whole_is(tmp_path):
    """Images of one size travel as one array, others in a list: the same way for every part."""
    sizes = [(8, 8)] * 3 + [(9, 8)] * 3
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for path, (height, width) in zip(paths, sizes, strict=True):
        Image.fromarray(photos.camera()[:height, :width]).save(path)
    headers = [Header(height, width, 1) for height, width in sizes]
    mixed = FileSource(paths, headers, channels=1, bit_depth=8, max_megapixels=1)
    rows = np.arange(3, 6)
    assert isinstance(mixed.select(rows).fetch(np.arange(3)), np.ndarray)
    part = PartSource(mixed, rows)
    assert isinstance(part.fetch(np.arange(3)), list) and part.uniform is None
    assert part.sizes.tolist() == [[9, 8]] * 3
    alike = PartSource(mixed.select(rows), np.array([2, 0]))
    assert alike.uniform == (1, 9, 8) and alike.fetch(np.arange(2)).shape == (2, 1, 9, 8)
    assert alike.select(np.array([1])).rows.tolist() == [0]
