"""Windows of a feature file: every row once, well mixed, the same from any start."""

import json
import sys

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import glovita_lib.loader_features
from glovita_lib.data import Split
from glovita_lib.dist import Ranks
from glovita_lib.loader_features import WindowLoader, build_feature_loader
from glovita_lib.read_features import VectorSource
from glovita_lib.read_hdf5 import DatasetRows
from glovita_lib.spec_train import Dataloading

DIGITS = load_digits()
ORDER = np.argsort(DIGITS.target, kind="stable")  # sorted by class: the worst file to shuffle
FEATURES = DIGITS.data[ORDER].astype(np.float16)
STORAGE = {
    "contiguous": {},
    "chunked": {"chunks": (16, 64)},
    "gzip": {"chunks": (16, 64), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (16, 64), "compression": "lzf"},
}


def loader(
    path, monkeypatch, *, storage="contiguous", train=True, world=1, rank=0, memory=0, every=1
):
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=FEATURES, **STORAGE[storage])
    monkeypatch.setattr(glovita_lib.loader_features, "BLOCK_BYTES", 1024)  # 8 rows
    rows = np.arange(0, len(FEATURES), every)
    split = Split(
        [str(row) for row in rows],
        DIGITS.target[ORDER][rows],
        VectorSource(DatasetRows(path, "features", threads=2), rows),
    )
    return build_feature_loader(
        split,
        Dataloading(in_memory_mb=memory),
        fit=None,
        window_mb=1,
        train=train,
        seed=3,
        ranks=Ranks(rank, world, rank, torch.device("cpu")),
        batch_size=50,
    )


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("train", [True, False])
def test_every_row_once_with_its_own_vector_and_label(storage, train, tmp_path, monkeypatch):
    made = loader(tmp_path / "f.h5", monkeypatch, storage=storage, train=train)
    assert isinstance(made, WindowLoader)
    made.window = 5  # several windows, the last one incomplete
    batches = list(made.epoch(0))
    rows = torch.cat([batch.rows for batch in batches]).numpy()
    assert sorted(rows) == list(range(len(FEATURES)))
    assert train != (rows == np.arange(len(rows))).all()
    vectors = torch.cat([batch.inputs for batch in batches]).numpy()
    np.testing.assert_array_equal(vectors, FEATURES[rows])
    targets = torch.cat([batch.targets for batch in batches]).numpy()
    np.testing.assert_array_equal(targets, DIGITS.target[ORDER][rows])


def test_an_epoch_continues_where_it_was_left(tmp_path, monkeypatch):
    made = loader(tmp_path / "f.h5", monkeypatch)
    made.window = made.order.window = 7
    whole = list(made.epoch(2))
    for start in (0, 1, 7, 13, 35, 36):
        for ours, expected in zip(made.epoch(2, start), whole[start:], strict=True):
            assert torch.equal(ours.inputs, expected.inputs)
            assert torch.equal(ours.rows, torch.from_numpy(made.rows(2, start)))
            start += 1


def test_a_sorted_file_is_mixed_and_epochs_differ(tmp_path, monkeypatch):
    made = loader(tmp_path / "f.h5", monkeypatch)
    made.window = made.order.window = 7  # windows of 350 rows in 44 blocks
    first = [batch.rows for batch in made.epoch(0)]
    classes = [len(np.unique(DIGITS.target[ORDER][rows])) for rows in first[:-1]]
    assert min(classes) >= 7  # a random batch of 50 has 9 or 10 of the 10 classes
    assert not torch.equal(first[0], next(iter(made.epoch(1))).rows)


@pytest.mark.parametrize("storage", STORAGE)
def test_a_window_of_a_sparse_split_holds_its_rows_only(storage, tmp_path, monkeypatch):
    """With a row in seven, as after data_fraction, a buffer must not hold the rows between."""
    made = loader(tmp_path / "f.h5", monkeypatch, storage=storage, every=7)
    made.window = made.order.window = 2  # batches of 50
    for batch in made.epoch(0):
        np.testing.assert_array_equal(batch.inputs.numpy(), FEATURES[::7][batch.rows.numpy()])
    assert max(map(len, made._buffers)) == 100


def test_ranks_share_the_rows(tmp_path, monkeypatch):
    seen = []
    for rank in range(2):
        made = loader(tmp_path / "f.h5", monkeypatch, world=2, rank=rank)
        seen += [batch.rows for batch in made.epoch(0)]
    assert set(torch.cat(seen).tolist()) == set(range(len(FEATURES)))


def test_what_fits_is_held_in_memory(tmp_path, monkeypatch):
    made = loader(tmp_path / "f.h5", monkeypatch, memory=10)
    assert not isinstance(made, WindowLoader) and made.is_ready
    batch = next(iter(made.epoch(0)))
    np.testing.assert_array_equal(batch.inputs.numpy(), FEATURES[batch.rows.numpy()])


def test_leaving_an_epoch_early_ends_the_reading(tmp_path, monkeypatch):
    made = loader(tmp_path / "f.h5", monkeypatch)
    made.window = 3
    for _ in made.epoch(0):
        break
    assert len(list(made.epoch(1))) == len(made)


def test_ranks_whose_share_fits_hold_it_in_memory(tmp_path):
    """The limit is that of a rank, as for images: 1.75 MiB of vectors in two ranks' memory."""
    values = np.tile(FEATURES, (8, 1))
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file["features"] = values
    rows = np.arange(len(values))
    source = VectorSource(DatasetRows(tmp_path / "wide.h5", "features", threads=1), rows)
    split = Split([""] * len(rows), np.tile(DIGITS.target[ORDER], 8), source)

    def made(*, train, world):
        return build_feature_loader(
            split,
            Dataloading(in_memory_mb=1),
            fit=None,
            window_mb=1,
            train=train,
            seed=3,
            ranks=Ranks(world - 1, world, 0, torch.device("cpu")),
            batch_size=500,
        )

    assert isinstance(made(train=False, world=1), WindowLoader)
    assert isinstance(made(train=True, world=2), WindowLoader)  # an epoch may ask for any row
    last = made(train=False, world=2)
    assert last.held and last.builder.source.samples.nbytes == source.nbytes() / 2
    found = torch.cat([batch.inputs for batch in last.epoch(0)]).numpy()
    np.testing.assert_array_equal(found, values[len(values) // 2 :])


def test_a_rank_without_vectors_has_no_batch(tmp_path, monkeypatch):
    made = loader(tmp_path / "f.h5", monkeypatch, train=False, world=2, every=len(FEATURES))
    assert list(made.epoch(0)) == []


CUSTOM = """
from glovita_lib.read_hdf5 import DatasetRows
from glovita_lib.data import Data, Split, VectorSamples
from glovita_lib.read_features import VectorSource
import numpy as np

def vectors(spec, seed, path):
    rows, splits = DatasetRows(path, "features", threads=1), {}
    targets = np.load(path + ".npy")
    for start, name in enumerate(("train", "val", "test")):
        index = np.arange(start, len(rows), 3)
        source = VectorSource(rows, index)
        splits[name] = Split([str(row) for row in index], targets[index], source)
    return Data("mine", splits, "multiclass", tuple("0123456789"), VectorSamples(width=64))
"""


@pytest.mark.parametrize("memory", [0, 2048])
def test_vectors_of_a_custom_data_set(command, tmp_path, monkeypatch, memory):
    """They need no field of precomputed features: windows have their default size."""
    (tmp_path / "own_vectors.py").write_text(CUSTOM)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = FEATURES / 16
    np.save(tmp_path / "f.h5.npy", DIGITS.target[ORDER])
    spec = f"""
        [data]
        dataset = "custom"
        target = "own_vectors:vectors"
        options = {{path = "{tmp_path / "f.h5"}"}}
        [model.encoder]
        encoder_type = "precomputed"
        [training]
        epochs = 3
        [optimizer]
        lr = 1e-2
        [dataloading]
        in_memory_mb = {memory}
        [logger]
        backend = "none"
        """
    result = command(spec=spec)
    metrics = json.loads((result.path / "metrics_test.json").read_text())
    assert metrics["metrics"]["acc"] > 0.8
