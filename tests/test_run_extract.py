"""Mode extract end to end: content, continuation after kills, ranks, broken images, bags."""

import csv
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from children import PRELOADED, SERVER
from children import glovita as glovita_ranks
from PIL import Image
from skimage import data as photos
from small_runs import FOLDERS, TINY, load, snapshot, write_png

import glovita
from glovita_lib import feature_writer, files, run_extract
from glovita_lib.datasets import build_data
from glovita_lib.extraction import Extractor
from glovita_lib.files import Lock
from glovita_lib.loggers import Rate
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_data import PrecomputedData

ROOT = Path(__file__).parents[1]


@pytest.fixture
def extract(command, tmp_path):
    """Runs mode extract on the encoder of the tiny spec, by default in blocks of 32 samples, into
    tmp_path/out."""

    def run(*overrides, **options):
        fixed = ["mode=extract", "extract.source=encoder", f"extract.output_dir={tmp_path / 'out'}"]
        fixed += ["extract.output_filename='{split}.h5'", "extract.block_samples=32"]
        return command(*fixed, *overrides, **options)

    return run


def content(path: Path) -> dict[str, np.ndarray]:
    """All datasets of a feature file."""
    with h5py.File(path) as file:
        return {
            name: values.asstr()[()] if values.dtype.kind == "O" else values[()]
            for name, values in file.items()
        }


def attributes(path: Path) -> dict:
    with h5py.File(path) as file:
        return dict(file.attrs)


def same(first: Path, second: Path, but: tuple[str, ...] = ()) -> None:
    """All datasets are equal byte by byte."""
    a, b = content(first), content(second)
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def data_of(tmp_path: Path, *overrides: str):
    """The data set of the spec that was last run."""
    root = load_checked(str(tmp_path / "tiny.toml"), list(overrides)).root
    return build_data(root.data, seed=root.seed)


def read_back(folder: Path, **fields):
    """The data set of features in a folder."""
    files = {f"{split}_features_file": f"{split}.h5" for split in ("train", "val", "test")}
    return build_data(PrecomputedData(data_root_dir=str(folder), **(files | fields)), seed=0)


def counted(monkeypatch) -> list[int]:
    """Samples of each batch that is read out from now on."""
    sizes, finish = [], Extractor.finish

    def counting(self, running, **options):
        sizes.append(len(running.rows))
        return finish(self, running, **options)

    monkeypatch.setattr(Extractor, "finish", counting)
    return sizes


def interrupted(extract, monkeypatch, after: int, *overrides, **options) -> None:
    """Ctrl-C after so many batches."""
    with monkeypatch.context() as patch:
        sizes, finish = [], Extractor.finish

        def stopping(self, running, **kwargs):
            sizes.append(len(running.rows))
            if len(sizes) > after:
                raise KeyboardInterrupt
            return finish(self, running, **kwargs)

        patch.setattr(Extractor, "finish", stopping)
        extract(*overrides, code=130, **options)


# ---------------------------------------------------------------------- content


def test_all_rows_in_the_order_of_the_data_set(extract, tmp_path):
    """The spec trains on a tenth of the train split; its features are those of the whole."""
    result = extract("extract.precision=32")
    data = data_of(tmp_path, "data.data_fraction=1")
    assert [len(split) for split in data.splits.values()] == [1168, 270, 359]
    for name, split in data.splits.items():
        file = content(tmp_path / "out" / f"{name}.h5")
        assert list(file["ids"]) == split.ids
        np.testing.assert_array_equal(file["labels"], split.targets)
        assert file["features"].shape == (len(split), 16)
        assert file["features"].dtype == np.float32
        assert f"{name}: {len(split):,} samples, features ({len(split)}, 16)" in result.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test.h5",
        "train.h5",
        "val.h5",
    ]


def test_each_row_is_the_embedding_of_its_sample(extract, tmp_path):
    from glovita_lib import dist
    from glovita_lib.run_extract import source_of

    extract("extract.precision=32", "extract.split=train", "extract.block_samples=64")
    ranks = dist.Ranks(0, 1, 0, torch.device("cpu"))
    loaded = load_checked(str(tmp_path / "tiny.toml"), ["mode=extract", "extract.source=encoder"])
    experiment, data = source_of(loaded, ranks)
    rows = np.array([0, 5, 63, 64, 700, 1167])
    images = torch.from_numpy(data.splits["train"].source.fetch(rows))
    with torch.no_grad():
        inputs = experiment.objective.eval_inputs(images, False, 0)
        expected = experiment.model.eval().embed(inputs, experiment.model.aggregation)
    found = content(tmp_path / "out" / "train.h5")["features"][rows]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found[0] - expected[1].numpy()).max() > 1e-2  # others are not as close


def test_data_fraction_where_it_is_asked_for(extract, tmp_path):
    extract("extract.use_data_fraction=true", "extract.split=train")
    file = content(tmp_path / "out" / "train.h5")
    assert list(file["ids"]) == data_of(tmp_path).splits["train"].ids
    assert len(file["features"]) == 117
    assert not (tmp_path / "out" / "val.h5").exists()


def test_attributes_say_how_the_features_were_made(extract, tmp_path):
    extract("extract.split=val", "extract.method=joint")
    found = attributes(tmp_path / "out" / "val.h5")
    expected = {
        "dataset": "digits",
        "split": "val",
        "subtask": "multiclass",
        "output": "embedding",
        "layout": "(N, D)",
        "aggregation": "joint",
        "layers": "encoder output",
        "encoder": "test_vit",
        "policy": "test",
        "stored_precision": 16,
        "compute_precision": "no",
        "compression": "none",
        "weights": "random, seed 0",
        "left_out": 0,
    }
    assert {name: found[name] for name in expected} == expected
    assert list(found["class_names"]) == list("0123456789")
    for name in ("transform", "encoder_spec", "peft_spec", "norm", "equals", "prefix_tokens"):
        assert found[name]
    for name in ("weights_sha256", "ids_sha256"):
        assert len(found[name]) == 64
    assert list(json.loads(found["spec"])) == ["seed", "data", "model", "peft"]
    assert found["timm"] == __import__("timm").__version__
    assert '"image_size": 8' in found["transform"] and '"interpolation"' in found["transform"]


@pytest.mark.parametrize("subtask", ["multilabel", "regression"])
def test_labels_of_every_kind(extract, table_spec, tmp_path, subtask):
    spec = table_spec(subtask, group_column='"patient"')
    extract(spec=spec)
    data = data_of(tmp_path)
    again = read_back(tmp_path / "out")
    assert again.subtask == subtask and again.class_names == data.class_names
    for name, split in data.splits.items():
        file = content(tmp_path / "out" / f"{name}.h5")
        kind = np.float64 if subtask == "regression" else np.float32
        assert file["labels"].dtype == kind and file["labels"].ndim == 2
        np.testing.assert_array_equal(file["labels"], split.targets)
        assert list(file["groups"]) == split.groups
        assert list(attributes(tmp_path / "out" / f"{name}.h5")["class_names"]) == list(
            data.class_names
        )
        found = again.splits[name]
        assert (found.ids, found.groups) == (split.ids, split.groups)
        np.testing.assert_array_equal(found.targets, split.targets)
        np.testing.assert_array_equal(found.source.fetch(np.arange(len(found))), file["features"])


@pytest.mark.parametrize("compression", ["none", "lzf", "gzip"])
@pytest.mark.parametrize("precision", [16, 32])
def test_round_trip(extract, tmp_path, compression, precision):
    extract(f"extract.compression={compression}", f"extract.precision={precision}")
    data, again = data_of(tmp_path, "data.data_fraction=1"), read_back(tmp_path / "out")
    assert (again.subtask, again.class_names) == (data.subtask, data.class_names)
    for name, split in data.splits.items():
        found = again.splits[name]
        assert found.ids == split.ids
        np.testing.assert_array_equal(found.targets, split.targets)
        features = found.source.fetch(np.arange(len(found)))
        assert features.dtype == (np.float16 if precision == 16 else np.float32)
        np.testing.assert_array_equal(
            features, content(tmp_path / "out" / f"{name}.h5")["features"]
        )
    if (compression, precision) != ("none", 32):
        extract("extract.precision=32", f"extract.output_dir={tmp_path / 'plain'}")
        plain = content(tmp_path / "plain" / "train.h5")["features"]
        dtype = np.float16 if precision == 16 else np.float32
        stored = content(tmp_path / "out" / "train.h5")["features"]
        np.testing.assert_array_equal(stored, plain.astype(dtype))


def test_tokens_are_bags(extract, tmp_path):
    extract("extract.output=tokens", "extract.prefix_tokens=true", "extract.split=val")
    file = content(tmp_path / "out" / "val.h5")
    assert file["features"].shape == (270 * 5, 16)  # CLS and 2 x 2 patches
    assert file["bag_ptr"].tolist() == list(range(0, 270 * 5 + 1, 5))
    places = [[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert file["coords"].tolist() == places * 270
    said = attributes(tmp_path / "out" / "val.h5")["coords"]
    assert said.startswith("row,column: in the grid of patches, from 0; -1: a prefix token")
    only = {"train_features_file": "val.h5", "val_features_file": None, "test_features_file": None}
    again = read_back(tmp_path / "out", **only)
    source = again.splits["train"].source
    bags = source.collate(source.fetch(np.array([3, 0])))
    assert bags.lengths.tolist() == [5, 5]
    np.testing.assert_array_equal(bags.features[:5], file["features"][15:20])
    assert again.splits["train"].ids == list(file["ids"])


def test_maps(extract, tmp_path):
    layers = "extract.layers=[-1, 0]"
    extract("extract.output=map", layers, "extract.split=val", "extract.compression=gzip")
    file = content(tmp_path / "out" / "val.h5")
    assert file["features"].shape == (270, 32, 2, 2) and len(file["labels"]) == 270
    tokens = ["extract.output=tokens", layers, "extract.split=val"]
    extract(*tokens, f"extract.output_dir={tmp_path / 'tokens'}")
    flat = content(tmp_path / "tokens" / "val.h5")["features"].reshape(270, 2, 2, 32)
    np.testing.assert_array_equal(file["features"], flat.transpose(0, 3, 1, 2))
    assert attributes(tmp_path / "out" / "val.h5")["norm"] == "final norm on layers [0, 1]"


def test_bfloat16_on_the_cpu(extract, tmp_path):
    extract("training.precision=bf16", "extract.split=val", "extract.precision=32")
    rough = content(tmp_path / "out" / "val.h5")["features"]
    exact = ["extract.split=val", "extract.precision=32"]
    extract(*exact, f"extract.output_dir={tmp_path / 'exact'}")
    exact = content(tmp_path / "exact" / "val.h5")["features"]
    assert 0 < np.abs(rough - exact).max() < 0.1
    assert attributes(tmp_path / "out" / "val.h5")["compute_precision"] == "bf16"


# ---------------------------------------------------------------------- where the model comes from


def test_checkpoint_and_explicit_mode_agree(command, extract, tmp_path):
    run = command("training.epochs=1")
    best = run.path / "checkpoints" / "best.pt"
    wide = "extract.precision=32"
    own = extract(wide, "extract.source=run", "training.epochs=1")
    assert "359 samples" in own.out
    place = f"extract.output_dir={tmp_path / 'named'}"
    extract(wide, place, f"extract.checkpoint={best}", "extract.source=run", "name=another")
    weights = {
        name.removeprefix("encoder.net."): tensor
        for name, tensor in load(best)["model"].items()
        if name.startswith("encoder.net.")
    }
    torch.save(weights, tmp_path / "encoder.pth")
    place = f"extract.output_dir={tmp_path / 'explicit'}"
    extract(wide, place, f"model.encoder.weights={tmp_path / 'encoder.pth'}")
    untrained = f"extract.output_dir={tmp_path / 'untrained'}"
    extract(wide, untrained)
    for split in ("train", "val", "test"):
        path = tmp_path / "out" / f"{split}.h5"
        same(path, tmp_path / "named" / f"{split}.h5")
        same(path, tmp_path / "explicit" / f"{split}.h5")
        features = content(path)["features"]
        assert not np.array_equal(
            features, content(tmp_path / "untrained" / f"{split}.h5")["features"]
        )
    found = attributes(tmp_path / "out" / "val.h5")
    others = [attributes(tmp_path / where / "val.h5") for where in ("named", "explicit")]
    assert {other["weights_sha256"] for other in others} == {found["weights_sha256"]}
    assert found["weights"] == others[0]["weights"] == f"checkpoint {best}"
    assert others[1]["weights"] == f"file {tmp_path / 'encoder.pth'}"


def test_a_patch_size_stays_with_the_run(command, tmp_path):
    """Train, infer and extract build the network for the patch of the augmentation; another spec
    that reads the checkpoint gets it too."""
    plain = TINY.replace("patch_size = 4, ", "").replace("epochs = 2", "epochs = 1")
    asked = "data.augmentation.patch_size=[4, 2]"
    run = command(asked, spec=plain)
    record = run.json("resolved_config.json")
    assert record["inputs"]["augmentation"]["patch_size"] == [4, 2]
    assert record["taken"]["model"]["encoder"]["patch_size"] == [4, 2]
    assert run.best["model"]["encoder.net.patch_embed.proj.weight"].shape == (16, 1, 4, 2)
    command(asked, "mode=infer", spec=plain)
    best = f"extract.checkpoint={run.path / 'checkpoints' / 'best.pt'}"
    tokens = ["mode=extract", "extract.output=tokens", "extract.split=val"]
    files = []
    for name, more in (("own", [asked]), ("other", [best])):
        folder = tmp_path / name
        command(*tokens, *more, f"extract.output_dir={folder}", spec=plain)
        (path,) = folder.glob("*.h5")
        files.append(content(path))
        assert np.unique(np.diff(files[-1]["bag_ptr"])).tolist() == [8]
    np.testing.assert_array_equal(files[0]["features"], files[1]["features"])


def test_the_precision_of_a_checkpoint_is_that_of_the_present_spec(command, extract, tmp_path):
    best = command("training.epochs=1").path / "checkpoints" / "best.pt"
    options = [f"extract.checkpoint={best}", "extract.source=run", "extract.split=val"]
    extract(*options, "training.precision=bf16")
    assert attributes(tmp_path / "out" / "val.h5")["compute_precision"] == "bf16"


def test_a_run_that_is_not_there(refused, tmp_path):
    text = refused("mode=extract", f"extract.output_dir={tmp_path / 'out'}")
    assert "best.pt does not exist: train the spec first" in text


def test_a_checkpoint_of_other_images(command, extract, folder_spec):
    best = command("training.epochs=1").path / "checkpoints" / "best.pt"
    other = ["data.channels=3", f"extract.checkpoint={best}", "extract.source=run"]
    result = extract(*other, spec=folder_spec, code=2)
    assert "trained on images of channels 1, data set generic_image_dataset has channels 3" in (
        result.err
    )
    deep = ["data.bit_depth=16", *other[1:]]
    result = extract(*deep, spec=folder_spec, code=2)
    assert "images of bit_depth 8, data set generic_image_dataset has bit_depth 16" in result.err


# ---------------------------------------------------------------------- names


def test_placeholders(extract, tmp_path):
    pattern = "{method}-{model}-{dataset}-{split}-{imgsize}-{precision}-{checkpoint}.h5"
    extract(f"extract.output_filename='{pattern}'", "extract.split=val")
    assert (tmp_path / "out" / "cls_token-test_vit-digits-val-8-16-encoder.h5").is_file()
    extract("extract.output_filename=none", "extract.split=val", "extract.method=avg")
    assert (tmp_path / "out" / "agg_avg_test_vit_digits_val_size8_float16.h5").is_file()
    extract("extract.output_filename=none", "extract.split=val", "extract.output=tokens")
    assert (tmp_path / "out" / "tokens_test_vit_digits_val_size8_float16.h5").is_file()
    extract("extract.output_filename='deep/{split}/{imgsize:03d}.h5'", "extract.split=val")
    assert (tmp_path / "out" / "deep" / "val" / "008.h5").is_file()


@pytest.mark.parametrize("pattern", ["{spilt}.h5", "{}.h5", "{split.h5", "{split.x}.h5"])
def test_an_unknown_placeholder(extract, tmp_path, pattern):
    result = extract(f'extract.output_filename="{pattern}"', code=2)
    assert "unknown placeholder" in result.err and len(result.err.splitlines()) == 1
    assert "{method}, {model}, {dataset}, {split}, {imgsize}, {precision}, {ch" in result.err
    assert not (tmp_path / "out").exists()


def test_one_name_for_several_splits(extract, tmp_path):
    result = extract("extract.output_filename=features.h5", code=2)
    assert "gives features.h5 to several of the splits train, val, test" in result.err
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there(extract, class_folders, tmp_path):
    import shutil

    shutil.rmtree(class_folders / "images" / "test")
    spec = FOLDERS.replace("ROOT", str(class_folders))
    result = extract("extract.split=test", spec=spec, code=2)
    assert 'extract.split = "test": data set generic_image_dataset has train, val' in result.err


# ---------------------------------------------------------------------- continuation


def test_a_complete_file_is_left_alone(extract, tmp_path, monkeypatch):
    extract("extract.split=val")
    path, sizes = tmp_path / "out" / "val.h5", counted(monkeypatch)
    before = path.read_bytes(), path.stat().st_mtime_ns
    result = extract("extract.split=val", "extract.block_samples=500")
    assert f"val: {path} is complete; nothing to do" in result.out
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert sizes == []
    extract()  # the other splits are made
    assert sum(sizes) == 1168 + 359


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("extract.precision=32", "stored_precision 16, now 32"),
        ("extract.method=avg", "aggregation cls_token, now avg"),
        ("extract.compression=gzip", "compression none, now gzip:1"),
        ("model.encoder.model_kwargs.depth=3", "another encoder_spec; another weights_sha256"),
        ("data.augmentation.interpolation=nearest", "another transform"),
        ("seed=1", "another weights_sha256"),
    ],
)
def test_a_file_made_otherwise(extract, tmp_path, monkeypatch, override, text):
    extract("extract.split=val")
    before, sizes = snapshot(tmp_path / "out"), counted(monkeypatch)
    # All splits are asked for: what would fail later fails before the train split is computed.
    result = extract(override, code=2)
    assert "val.h5 exists and was made otherwise: " in result.err and text in result.err
    assert len(result.err.splitlines()) == 1
    assert snapshot(tmp_path / "out") == before and sizes == []


def test_the_same_weights_under_another_path_make_the_same_file(extract, tmp_path, monkeypatch):
    """The sum of the weights says which they are, wherever a machine has them."""
    import timm

    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 8}
    network = timm.create_model("test_vit", in_chans=1, num_classes=0, **sizes)
    for name in ("a", "b"):
        torch.save(network.state_dict(), tmp_path / f"{name}.pth")
    extract("extract.split=val", f"model.encoder.weights={tmp_path / 'a.pth'}")
    sizes = counted(monkeypatch)
    extract("extract.split=val", f"model.encoder.weights={tmp_path / 'b.pth'}")
    assert sizes == []


def test_finished_blocks_are_not_computed_again(extract, tmp_path, monkeypatch):
    small = ["extract.split=test", "dataloading.eval_batch_size=16", "extract.block_samples=30"]
    extract(*small, f"extract.output_dir={tmp_path / 'whole'}")  # blocks of 32, in whole batches
    interrupted(extract, monkeypatch, 7, *small)  # in the fourth block
    folder = tmp_path / "out" / "test.h5.parts"
    assert sorted(path.name for path in folder.glob("*.npz")) == [
        "000000.npz",
        "000001.npz",
        "000002.npz",
    ]
    assert not (tmp_path / "out" / "test.h5").exists()
    (folder / "000001.npz").unlink()  # as a second rank that was slower leaves it
    sizes = counted(monkeypatch)
    result = extract(*small)
    assert "test: 2 of 12 blocks were finished" in result.out
    assert sum(sizes) == 359 - 64
    assert (tmp_path / "out" / "test.h5").read_bytes() == (
        tmp_path / "whole" / "test.h5"
    ).read_bytes()
    assert not folder.exists()


@pytest.mark.parametrize("output", ["tokens", "map", "embedding"])
def test_blocks_are_bound_by_bytes_too(extract, tmp_path, monkeypatch, output):
    """Whole batches, at least one; the file is the same, also when blocks are gone on with."""
    small = ["extract.split=val", "dataloading.eval_batch_size=16", "extract.block_samples=100"]
    small.append(f"extract.output={output}")
    extract(*small, f"extract.output_dir={tmp_path / 'large'}")
    sample = 16 * 2 * (1 if output == "embedding" else 4)  # width 16, float16, 2 x 2 patches
    written, write = [], feature_writer.BlockFiles.write

    def seen(self, block, rows, readouts):
        written.append((block, len(rows)))
        write(self, block, rows, readouts)

    monkeypatch.setattr(feature_writer.BlockFiles, "write", seen)
    monkeypatch.setattr("glovita_lib.run_extract.BLOCK_BYTES", 3 * 16 * sample - 1)
    interrupted(extract, monkeypatch, 5, *small)
    assert written == [(0, 32), (1, 32)]
    extract(*small)
    assert [block for block, _ in written] == list(range(9))
    assert {size for _, size in written} == {32, 270 - 8 * 32}
    same(tmp_path / "out" / "val.h5", tmp_path / "large" / "val.h5")
    monkeypatch.setattr("glovita_lib.run_extract.BLOCK_BYTES", 1)
    written.clear()
    extract(*small, f"extract.output_dir={tmp_path / 'least'}")
    assert [size for _, size in written] == [16] * 16 + [14]


def test_the_next_block_is_computed_while_one_is_written(extract, tmp_path, monkeypatch):
    small = ["extract.split=val", "dataloading.eval_batch_size=32"]
    extract(*small, f"extract.output_dir={tmp_path / 'plain'}")
    computed, write = threading.Event(), feature_writer.BlockFiles.write
    sizes, start = [], Extractor.start

    def starting(self, batch, **options):
        sizes.append(len(batch.rows))
        if len(sizes) == 3:  # a batch is started before the one ahead of it is finished
            computed.set()
        return start(self, batch, **options)

    def slow(self, block, rows, readouts):
        assert block or computed.wait(20)
        write(self, block, rows, readouts)

    monkeypatch.setattr(Extractor, "start", starting)
    monkeypatch.setattr(feature_writer.BlockFiles, "write", slow)
    extract(*small)
    same(tmp_path / "out" / "val.h5", tmp_path / "plain" / "val.h5")


def test_a_block_that_cannot_be_written_ends_it(extract, tmp_path, monkeypatch):
    """Though it is written beside the computing; what is finished stays."""
    write = feature_writer.BlockFiles.write

    def full(self, block, rows, readouts):
        if block == 3:
            raise files.write_error(self.path(block), OSError(errno.ENOSPC, "No space left"))
        write(self, block, rows, readouts)

    monkeypatch.setattr(feature_writer.BlockFiles, "write", full)
    small = ["extract.split=val", "dataloading.eval_batch_size=32"]
    result = extract(*small, code=2)
    assert "No space left; free some space" in result.err and len(result.err.splitlines()) == 1
    done = sorted(path.stem for path in (tmp_path / "out" / "val.h5.parts").glob("*.npz"))
    assert done == ["000000", "000001", "000002"]


@pytest.mark.parametrize(
    "override",
    ["extract.block_samples=64", "dataloading.eval_batch_size=48", "extract.method=avg", "seed=2"],
)
def test_blocks_of_other_settings_are_discarded(extract, tmp_path, monkeypatch, override):
    interrupted(extract, monkeypatch, 4, "extract.split=test")
    result = extract("extract.split=test", override)
    assert "were finished" not in result.out
    extract("extract.split=test", override, f"extract.output_dir={tmp_path / 'whole'}")
    same(tmp_path / "out" / "test.h5", tmp_path / "whole" / "test.h5")


def test_a_corrected_label_keeps_the_blocks(extract, table_spec, tmp_path, monkeypatch):
    spec = table_spec("multilabel")
    batches = ["dataloading.eval_batch_size=8", "extract.block_samples=8", "extract.split=train"]
    interrupted(extract, monkeypatch, 3, *batches, spec=spec)
    table = tmp_path / "multilabel" / "labels.csv"
    rows = read_table(table)
    rows[0]["odd"] = str(1 - int(rows[0]["odd"]))
    write_table(table, rows)
    result = extract(*batches, spec=spec)
    assert "train: 3 of 7 blocks were finished" in result.out
    labels = content(tmp_path / "out" / "train.h5")["labels"]
    assert labels[0, 0] == int(rows[0]["odd"])
    rows[0]["odd"] = "0" if rows[0]["odd"] == "1" else "1"
    write_table(table, rows)
    assert "made otherwise: another labels_sha256;" in extract(*batches, spec=spec, code=2).err


def in_child(tmp_path: Path, *overrides: str, moment: str = "") -> multiprocessing.Process:
    """A process that extracts as the fixture does; it dies at the moment of MOMENTS, if one."""
    SERVER.set_forkserver_preload(PRELOADED)
    argv = [str(tmp_path / "tiny.toml"), "--override", f"exp_dir={tmp_path / 'runs'}"]
    argv += ["mode=extract", "extract.source=encoder", f"extract.output_dir={tmp_path / 'out'}"]
    argv += ["extract.output_filename='{split}.h5'", "extract.block_samples=32", *overrides]
    process = SERVER.Process(target=run_main, args=(argv, moment))
    process.start()
    return process


def run_main(argv: list[str], moment: str) -> None:
    """The command without a word and without waiting for the disk."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.fsync = lambda handle: None
    if moment:
        owner, name = MOMENTS[moment]
        original = getattr(owner, name)

        def late(*arguments, **options):
            if name != "replace" or str(arguments[1]).endswith("val.h5"):
                die()
            return original(*arguments, **options)

        setattr(owner, name, late)
    with open(os.devnull, "w") as silence, redirect_stdout(silence):
        sys.exit(glovita.main(argv))


def check_whole(folder: Path, reference: bytes) -> None:
    """What is there under a final name is whole."""
    for path in folder.glob("*.h5"):
        if not path.name.startswith(".tmp"):
            assert path.read_bytes() == reference
    for path in folder.glob("*.parts/*.npz"):
        if not path.name.startswith(".tmp"):
            with np.load(path) as arrays:
                assert all(len(arrays[name]) for name in arrays.files)


@pytest.mark.processes
def test_kills_at_random_moments(extract, tmp_path):
    small = ["extract.split=train", "dataloading.eval_batch_size=8", "extract.block_samples=8"]
    small.append("extract.output=tokens")
    extract(*small, f"extract.output_dir={tmp_path / 'whole'}")
    expected = (tmp_path / "whole" / "train.h5").read_bytes()
    folder, draw = tmp_path / "out" / "train.h5.parts", random.Random(0)

    def blocks() -> int:
        return len(list(folder.glob("0*.npz")))

    for _ in range(4):
        enough = blocks() + draw.randint(1, 20)
        child = in_child(tmp_path, *small)
        while child.is_alive() and blocks() < enough:
            time.sleep(1e-4)
        time.sleep(draw.uniform(0, 0.01))
        assert child.is_alive()
        child.kill()  # SIGKILL
        child.join()
        check_whole(tmp_path / "out", expected)
    done = blocks()
    assert 0 < done < 146
    result = extract(*small)
    assert f"train: {done} of 146 blocks were finished" in result.out
    assert (tmp_path / "out" / "train.h5").read_bytes() == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.h5"]


def die(*arguments, **options) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = {
    "before it is put together": (run_extract, "put_together"),
    "while it is put together": (feature_writer, "as_stored"),
    "before the renaming": (feature_writer.files.os, "replace"),
    "after the renaming": (feature_writer.BlockFiles, "remove"),
    "while blocks are removed": (feature_writer.Path, "rmdir"),
}


@pytest.mark.processes
@pytest.mark.parametrize("moment", MOMENTS)
def test_kills_at_the_end(extract, tmp_path, monkeypatch, moment):
    extract("extract.split=val", f"extract.output_dir={tmp_path / 'whole'}")
    expected = (tmp_path / "whole" / "val.h5").read_bytes()
    child = in_child(tmp_path, "extract.split=val", moment=moment)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    check_whole(tmp_path / "out", expected)
    sizes = counted(monkeypatch)
    extract("extract.split=val")
    assert sizes == []
    assert (tmp_path / "out" / "val.h5").read_bytes() == expected
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val.h5"]


@pytest.mark.processes
def test_two_ranks_write_what_one_writes(extract, folder_spec, class_folders, tmp_path):
    """Also where each of them meets a broken image."""
    for path in some_files(class_folders, 2, 7, 13):
        damaged(path)
    small = ["dataloading.eval_batch_size=4", "extract.block_samples=4", "extract.output=tokens"]
    small.append("extract.on_error=skip")
    alone = extract(*small, spec=folder_spec)
    overrides = ["mode=extract", "extract.source=encoder", *small]
    overrides += [f"extract.output_dir={tmp_path / 'two'}", "extract.output_filename='{split}.h5'"]
    out = glovita_ranks(tmp_path / "tiny.toml", "--override", *overrides, ranks=2)
    for split in ("train", "val", "test"):
        first, second = tmp_path / "out" / f"{split}.h5", tmp_path / "two" / f"{split}.h5"
        same(first, second)
        assert first.read_bytes() == second.read_bytes()
        assert out.count(f"{split}.h5") == 1  # the first rank alone says so
    lines = [line for line in alone.out.splitlines() if "left out" in line]
    assert len(lines) == 3
    assert [line for line in out.splitlines() if "left out" in line] == lines


def test_a_second_process_is_told(extract, tmp_path, monkeypatch):
    interrupted(extract, monkeypatch, 3, "extract.split=val")
    lock = Lock(tmp_path / "out" / "val.h5.parts" / ".lock")
    lock.acquire()
    before = snapshot(tmp_path / "out")
    result = extract("extract.split=val", code=2)
    assert "val.h5.parts is in use by this process: wait for it or stop it\n" in result.err
    assert snapshot(tmp_path / "out") == before
    lock.release()
    extract("extract.split=val")


# ---------------------------------------------------------------------- train policy


def test_augmented_features_follow_from_the_seed_alone(extract, tmp_path, monkeypatch):
    options = ["extract.use_eval_transform_for_train=false", "extract.precision=32"]
    options += ["dataloading.eval_batch_size=16", "data.augmentation.train_policy=default_2d_2"]
    extract(*options)
    place = f"extract.output_dir={tmp_path / 'plain'}"
    extract(*options[1:], place)
    same(tmp_path / "out" / "val.h5", tmp_path / "plain" / "val.h5")
    first = content(tmp_path / "out" / "train.h5")["features"]
    plain = content(tmp_path / "plain" / "train.h5")["features"]
    assert (np.abs(first - plain).max(1) > 1e-2).mean() > 0.6
    again = [*options, f"extract.output_dir={tmp_path / 'again'}", "extract.split=train"]
    interrupted(extract, monkeypatch, 5, *again)
    assert len(list((tmp_path / "again").glob("*.parts/*.npz"))) == 2
    extract(*again)
    same(tmp_path / "out" / "train.h5", tmp_path / "again" / "train.h5")
    assert attributes(tmp_path / "again" / "train.h5")["policy"] == "train"
    assert attributes(tmp_path / "out" / "val.h5")["policy"] == "test"
    otherwise = extract(*options, "extract.block_samples=64", code=2)
    assert "train.h5 exists and was made otherwise: draws 32 / 16, now 64 / 16" in otherwise.err


def test_augmented_files_do_not_depend_on_workers(extract, folder_spec, tmp_path, monkeypatch):
    options = ["extract.use_eval_transform_for_train=false", "extract.split=train"]
    options += ["dataloading.eval_batch_size=4", "extract.block_samples=8"]
    extract(*options, "dataloading.num_workers=2", spec=folder_spec)
    again = [*options, f"extract.output_dir={tmp_path / 'again'}", "dataloading.num_workers=0"]
    interrupted(extract, monkeypatch, 3, *again, spec=folder_spec)
    extract(*again, spec=folder_spec)
    same(tmp_path / "out" / "train.h5", tmp_path / "again" / "train.h5")
    plain = [*options[1:], f"extract.output_dir={tmp_path / 'plain'}"]
    extract(*plain, spec=folder_spec)
    first, second = (content(tmp_path / n / "train.h5")["features"] for n in ("out", "plain"))
    assert (np.abs(first - second).max(1) > 1e-2).mean() > 0.6


# ---------------------------------------------------------------------- what can go wrong


def test_float16_overflow_ends_with_one_line(extract, tmp_path):
    from timm import create_model

    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    net = create_model("test_vit", num_classes=0, in_chans=1, img_size=8, **kwargs)
    with torch.no_grad():
        net.norm.weight.mul_(1e5)
    torch.save(net.state_dict(), tmp_path / "large.pth")
    large = [f"model.encoder.weights={tmp_path / 'large.pth'}", "extract.method=sum"]
    result = extract(*large, code=2)
    first = data_of(tmp_path, "data.data_fraction=1").splits["train"].ids[0]
    assert f"overflow float16 (largest number 65,504) in sample {first} and 31 more" in result.err
    assert "set extract.precision = 32, or another extract.method than sum" in result.err
    assert len(result.err.splitlines()) == 1 and result.err.startswith("train: features up to ")
    assert not list((tmp_path / "out").glob("*.h5"))
    extract(*large, "extract.precision=32", "extract.split=val")
    assert np.isfinite(content(tmp_path / "out" / "val.h5")["features"]).all()


def not_an_image(path: Path) -> None:
    path.write_bytes(b"this is not an image")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def damaged(path: Path) -> None:
    """Pixels that cannot be decoded between a sound header and a sound end."""
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 6
    content[at : at + 20] = b"\xff" * 20
    path.write_bytes(content)


BREAK = {"header": not_an_image, "cut": cut, "pixels": damaged}
BLOCKS = ["dataloading.eval_batch_size=4", "extract.block_samples=8", "extract.split=train"]


def some_files(folder: Path, *numbers: int) -> list[Path]:
    paths = sorted((folder / "images" / "train").rglob("*.png"))
    return [paths[number] for number in numbers]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", BREAK)
def test_a_broken_image_ends_it_with_its_path(extract, folder_spec, class_folders, how, workers):
    (path,) = some_files(class_folders, 13)
    BREAK[how](path)
    result = extract(*BLOCKS, f"dataloading.num_workers={workers}", spec=folder_spec, code=2)
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if path.name in line]
    assert len(lines) == 1
    if how == "pixels":  # found while it is decoded
        assert len(result.err.splitlines()) == 1 and str(path) in lines[0]
        assert "broken image file" in lines[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", BREAK)
def test_broken_images_are_left_out_and_listed(
    extract, folder_spec, class_folders, tmp_path, how, workers
):
    extract(*BLOCKS, f"extract.output_dir={tmp_path / 'sound'}", spec=folder_spec)
    broken = some_files(class_folders, 0, 13, 29)
    for path in broken:
        BREAK[how](path)
    options = [*BLOCKS, "extract.on_error=skip", f"dataloading.num_workers={workers}"]
    result = extract(*options, spec=folder_spec)
    count = "27 of 30" if how == "pixels" else "27"  # the data set leaves the others out
    end = result.out[result.out.index(f"{count} samples, features (27, 16)") :]
    for path in broken:
        assert end.count(path.name) == result.out.count(path.name) == 1
    sound, found = content(tmp_path / "sound" / "train.h5"), content(tmp_path / "out" / "train.h5")
    keep = np.isin(np.arange(30), [0, 13, 29], invert=True)
    assert list(found["ids"]) == list(sound["ids"][keep])
    for name in ("features", "labels"):
        np.testing.assert_array_equal(found[name], sound[name][keep])
    if how != "pixels":  # the file itself says that the data set has more
        (note,) = [line for line in found["notes"] if line.startswith("3 images left out:")]
        assert all(path.name in note for path in broken)
    if how == "pixels":
        assert attributes(tmp_path / "out" / "train.h5")["left_out"] == 3
        assert [str(path) in line for path, line in zip(broken, found["left_out"], strict=True)]
        again = extract(*options, spec=folder_spec)  # it is complete, and says what it lacks
        assert "nothing to do" in again.out and again.out.count("left out: ") == 3
        refused = extract(*BLOCKS, spec=folder_spec, code=2)  # where none may be left out
        assert "made otherwise: left_out 3, now 0" in refused.err
    assert len(read_back(tmp_path / "out", val_features_file=None, test_features_file=None)
               .splits["train"]) == 27  # fmt: skip


def test_all_images_are_broken(extract, folder_spec, class_folders, tmp_path):
    paths = some_files(class_folders, *range(30))
    sound = [path.read_bytes() for path in paths]
    for path in paths:
        damaged(path)
    skip = [*BLOCKS, "extract.on_error=skip"]
    result = extract(*skip, spec=folder_spec, code=2)
    assert "train: none of the 30 samples could be read" in result.err
    assert all(str(path) in result.err for path in paths) and len(result.err.splitlines()) == 31
    assert not list((tmp_path / "out").iterdir())
    for path, image in zip(paths, sound, strict=True):  # mended, and started again
        path.write_bytes(image)
    assert "30 samples" in extract(*skip, spec=folder_spec).out
    for path in paths:
        not_an_image(path)
    place = f"extract.output_dir={tmp_path / 'other'}"
    assert "train" in extract(*skip, place, spec=folder_spec, code=2).err
    assert not (tmp_path / "other").exists()


def test_what_was_broken_and_then_mended(
    extract, folder_spec, class_folders, tmp_path, monkeypatch
):
    """A note about an image of an unfinished block is forgotten; one of a finished block counts
    where images may be left out, else the block is read again."""
    extract(*BLOCKS, f"extract.output_dir={tmp_path / 'sound'}", spec=folder_spec)
    early, late = some_files(class_folders, 2, 20)
    kept = early.read_bytes(), late.read_bytes()
    damaged(early)
    damaged(late)
    skip = [*BLOCKS, "extract.on_error=skip", "dataloading.num_workers=2"]
    interrupted(extract, monkeypatch, 5, *skip, spec=folder_spec)
    notes = tmp_path / "out" / "train.h5.parts"
    assert (notes / "000000.npz").is_file() and not (notes / "000002.npz").is_file()
    (notes / "20.txt").write_text("a worker was ahead")
    late.write_bytes(kept[1])
    extract(*skip, spec=folder_spec)
    assert len(content(tmp_path / "out" / "train.h5")["ids"]) == 29
    stop = [*BLOCKS, f"extract.output_dir={tmp_path / 'stop'}"]
    interrupted(extract, monkeypatch, 5, *stop, "extract.on_error=skip", spec=folder_spec)
    assert str(early) in extract(*stop, spec=folder_spec, code=2).err
    early.write_bytes(kept[0])
    extract(*stop, spec=folder_spec)
    same(tmp_path / "stop" / "train.h5", tmp_path / "sound" / "train.h5")


def test_embeddings_in_memory_leave_the_same_ones_out(
    extract, folder_spec, class_folders, tmp_path
):
    """What mode umap looks at."""
    from glovita_lib import dist
    from glovita_lib.run_umap import samples_of_model
    from glovita_lib.spec_train import Umap

    for path in some_files(class_folders, 4, 20):
        damaged(path)
    skip = [*BLOCKS, "extract.on_error=skip", "extract.precision=32"]
    extract(*skip, spec=folder_spec)
    overrides = [*skip, "mode=extract", "extract.source=encoder"]
    loaded = load_checked(str(tmp_path / "tiny.toml"), overrides)
    ranks = dist.Ranks(0, 1, 0, torch.device("cpu"))
    found = samples_of_model(loaded, Umap(split="train"), ranks, 0)
    file = content(tmp_path / "out" / "train.h5")
    np.testing.assert_array_equal(found.features, file["features"])
    np.testing.assert_array_equal(found.targets, file["labels"])
    assert found.ids == list(file["ids"])
    assert sum("left out: " in note for note in found.notes) == 2


def test_a_file_that_vanishes_is_left_out_too(extract, folder_spec, class_folders, monkeypatch):
    (path,) = some_files(class_folders, 13)
    plan_job = __import__("glovita_lib.run_extract", fromlist=["plan_job"]).plan_job

    def vanishing(*arguments):
        path.unlink(missing_ok=True)
        return plan_job(*arguments)

    monkeypatch.setattr("glovita_lib.run_extract.plan_job", vanishing)
    result = extract(*BLOCKS, "extract.on_error=skip", spec=folder_spec)
    assert f"left out: {path}: no such file" in result.out


@pytest.mark.parametrize("sizes", ["equal", "differing"])
def test_images_broken_in_every_way_are_listed_once(
    extract, folder_spec, class_folders, tmp_path, sizes, monkeypatch
):
    """Before the start, where the data set finds it, and after it, where decoding does."""
    if sizes == "equal":
        for path in class_folders.rglob("*.png"):
            with Image.open(path) as image:
                image = image.resize((9, 9))
            image.save(path)
    extract(*BLOCKS, f"extract.output_dir={tmp_path / 'sound'}", spec=folder_spec)
    ways = [not_an_image, cut, Path.unlink, lambda path: path.write_bytes(b"")]
    early, late = some_files(class_folders, 0, 5, 9), some_files(class_folders, 11, 13, 16, 20, 29)
    plan_job = __import__("glovita_lib.run_extract", fromlist=["plan_job"]).plan_job

    def breaking(*arguments):
        for path, way in zip(late, [damaged, *ways], strict=True):
            if path.is_file():
                way(path)
        return plan_job(*arguments)

    for path, way in zip(early, [not_an_image, cut, ways[-1]], strict=True):
        way(path)
    monkeypatch.setattr("glovita_lib.run_extract.plan_job", breaking)
    result = extract(*BLOCKS, "extract.on_error=skip", spec=folder_spec)
    assert not result.err and "note: 3 images left out: listed at the end" in result.out
    end = result.out[result.out.index("train: 22 of 27 samples, features (22, 16)") :]
    for path in early + late:
        assert end.count(path.name) == result.out.count(path.name) == 1, path.name
    sound, found = content(tmp_path / "sound" / "train.h5"), content(tmp_path / "out" / "train.h5")
    keep = np.isin(np.arange(30), [0, 5, 9, 11, 13, 16, 20, 29], invert=True)
    assert list(found["ids"]) == list(sound["ids"][keep])
    np.testing.assert_array_equal(found["features"], sound["features"][keep])


def test_a_dry_run_writes_nothing(extract, folder_spec, class_folders, tmp_path):
    (path,) = some_files(class_folders, 3)
    damaged(path)
    before = snapshot(tmp_path)
    dry = {"spec": folder_spec, "flags": ["--dry-run"]}
    result = extract("extract.on_error=skip", **dry)
    assert "train: one batch gives features (30, 16); nothing was written" in result.out
    assert f"left out: {path}" in result.out
    assert extract(code=2, **dry).err.startswith(str(path))
    assert snapshot(tmp_path) == before
    extract("extract.on_error=skip", "extract.split=val", spec=folder_spec)
    before = snapshot(tmp_path)
    changed = extract("extract.on_error=skip", "extract.precision=32", code=2, **dry)
    assert "made otherwise" in changed.err  # what the real run would say
    assert snapshot(tmp_path) == before


def test_progress(extract, monkeypatch):
    monkeypatch.setattr(Rate, "EVERY", 0.0)
    result = extract("extract.split=val", "dataloading.eval_batch_size=64")
    lines = [line for line in result.out.splitlines() if "left" in line]
    assert [line.split(",")[0] for line in lines] == [
        f"val: {done} of 270" for done in (64, 128, 192, 256, 270)
    ]
    assert all("/s, " in line and line.endswith(" s left") for line in lines)


def test_features_are_read_out_already(extract, tmp_path):
    extract()
    spec = f"""
mode = "extract"
[data]
dataset = "precomputed_features"
data_root_dir = "{tmp_path / "out"}"
train_features_file = "train.h5"
[model.encoder]
encoder_type = "precomputed"
"""
    assert "the samples are vectors already" in extract(spec=spec, code=2).err


# ---------------------------------------------------------------------- training on the files


def test_shipped_specs_from_digits_to_a_linear_head(command, tmp_path):
    """extract_digits on a small random encoder, then features_linear on its files."""
    small = ["model.encoder.type=test_resnet", "model.encoder.small_images=false"]
    small += ["data.augmentation.image_size=32", f"extract.output_dir={tmp_path / 'out'}"]
    small += ["extract.source=encoder", "extract.precision=32"]
    command(*small, spec=ROOT / "specs" / "extract_digits.toml")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"digits_{split}.h5" for split in ("train", "val", "test")
    }
    fast = [f"data.data_root_dir={tmp_path / 'out'}", "task.result_plot=none", "task.bootstrap=0"]
    fast += ["data.standardize=true", "training.epochs=80"]  # as the network was not trained
    run = command(*fast, spec=ROOT / "specs" / "features_linear.toml")
    ids = content(tmp_path / "out" / "digits_test.h5")["ids"]
    assert [row["id"] for row in run.rows("test")] == list(ids)
    assert run.json("metrics_test.json")["metrics"]["acc"] > 0.75
    # about what scikit-learn finds possible on these features
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = (content(tmp_path / "out" / f"digits_{s}.h5") for s in ("train", "test"))
    possible = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    possible.fit(train["features"], train["labels"])
    reference = possible.score(test["features"], test["labels"])
    assert run.json("metrics_test.json")["metrics"]["acc"] > reference - 0.05


SLIDES, SIDE, TILES = 10, 24, 5  # slides of each photo, pixels and number of the tiles of a side


@pytest.fixture
def tiles(tmp_path) -> Path:
    """Slides of 5 x 5 tiles, cut from places in a photo of a cat and one of rocket; the rows of the
    table are not in the order of the slides."""
    folder, rows, places = tmp_path / "tiles", [], []
    for label, photo in (("cat", photos.chelsea()), ("rocket", photos.rocket())):
        for slide in range(SLIDES):
            top, left = 90 + 10 * (slide % 3), 40 + 30 * slide
            split = ("train", "train", "train", "val", "test")[slide % 5]
            for tile in range(TILES * TILES - slide % 3):  # slides of several lengths
                y, x = divmod(tile, TILES)
                name = f"{label}{slide}/{y}_{x}.png"
                part = photo[top + y * SIDE :, left + x * SIDE :][:SIDE, :SIDE]
                write_png(folder / "images" / name, np.ascontiguousarray(part))
                slide_name = f"{label}-{slide}"
                rows.append({"path": name, "label": label, "slide": slide_name, "split": split})
                places.append({"id": name, "x": left + x * SIDE, "y": top + y * SIDE})
    random.Random(0).shuffle(rows)
    write_table(folder / "labels.csv", rows)
    write_table(folder / "coords.csv", places)
    return folder


@pytest.fixture
def bags(command, tiles, tmp_path):
    """Runs specs/bags_from_tiles.toml on the tiles with a small random encoder."""

    def run(*overrides, **options):
        small = ["model.encoder.type=test_vit", "model.encoder.pretrained=false"]
        small += ["data.augmentation.image_size=32", f"data.data_root_dir={tiles}"]
        small += [f"extract.coords_file={tiles / 'coords.csv'}", "extract.block_samples=64"]
        small += [f"extract.output_dir={tmp_path / 'out'}", "extract.precision=32"]
        return command(*small, *overrides, spec=ROOT / "specs" / "bags_from_tiles.toml", **options)

    return run


def test_bags_from_tiles(bags, tiles, tmp_path):
    assert " in 12 bags, features " in bags().out
    said = attributes(tmp_path / "out" / "my_tiles_train.h5")
    assert said["layout"] == "(M, D), samples of group i at bag_ptr[i] to bag_ptr[i + 1]"
    assert said["coords"] == "x, y (and z) as in extract.coords_file"
    rows = read_table(tiles / "labels.csv")
    places = {row["id"]: row for row in read_table(tiles / "coords.csv")}
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        file = content(tmp_path / "out" / f"my_tiles_{split}.h5")
        slides = list(dict.fromkeys(row["slide"] for row in rows if row["split"] == split))
        assert len(slides) == count and set(file["ids"]) == set(slides)
        names = list(attributes(tmp_path / "out" / f"my_tiles_{split}.h5")["class_names"])
        for bag, slide in enumerate(file["ids"]):
            inside = slice(*file["bag_ptr"][bag : bag + 2])
            own = {row["path"] for row in rows if row["slide"] == slide}
            assert set(file["instance_ids"][inside]) == own
            assert names[file["labels"][bag]] == slide.split("-")[0]
            for tile, place in zip(
                file["instance_ids"][inside], file["coords"][inside], strict=True
            ):
                assert place.tolist() == [float(places[tile]["x"]), float(places[tile]["y"])]
        assert len(file["features"]) == len(file["instance_ids"]) == file["bag_ptr"][-1]
    # the same vectors as without bags, in another order
    bags(
        "extract.bag_by=none",
        "extract.coords_file=none",
        "extract.output_filename='flat_{split}.h5'",
    )
    flat = content(tmp_path / "out" / "flat_test.h5")
    by_id = dict(zip(flat["ids"], flat["features"], strict=True))
    slide_of = {row["path"]: row["slide"] for row in rows}
    slides = [slide_of[name] for name in flat["ids"]]
    assert list(file["ids"]) == list(dict.fromkeys(slides))  # by their first tile
    in_order = sorted(range(len(slides)), key=lambda row: list(file["ids"]).index(slides[row]))
    assert list(file["instance_ids"]) == [flat["ids"][row] for row in in_order]
    expected = np.stack([by_id[name] for name in file["instance_ids"]])
    np.testing.assert_allclose(file["features"], expected, rtol=1e-4, atol=1e-5)


def test_a_head_on_bags_learns_from_the_file(bags, command, tmp_path):
    bags()
    files = [
        f"data.{split}_features_file=my_tiles_{split}.h5" for split in ("train", "val", "test")
    ]
    fast = ["task.result_plot=none", "task.bootstrap=0", "data.standardize=true"]
    fast += ["training.epochs=40", "dataloading.batch_size=4"]
    place = f"data.data_root_dir={tmp_path / 'out'}"
    run = command(place, *files, *fast, "model.head.head_type=mean", "name=my_tiles",
                  spec=ROOT / "specs" / "features_linear.toml")  # fmt: skip
    assert run.json("metrics_test.json")["metrics"]["acc"] == 1
    assert [row["id"] for row in run.rows("test")] == list(
        content(tmp_path / "out" / "my_tiles_test.h5")["ids"]
    )
    best = run.json("resolved_config.json")
    assert best["class_names"] == ["cat", "rocket"] and best["inputs"]["kind"] == "bags"


def test_bags_after_kills_and_with_tiles_left_out(bags, tiles, tmp_path, monkeypatch):
    small = ["dataloading.eval_batch_size=16", "extract.split=train"]
    bags(*small)
    whole = content(tmp_path / "out" / "my_tiles_train.h5")
    again = f"extract.output_dir={tmp_path / 'again'}"
    interrupted(bags, monkeypatch, 6, *small, again)
    bags(*small, again)
    path = tmp_path / "again" / "my_tiles_train.h5"
    assert path.read_bytes() == (tmp_path / "out" / "my_tiles_train.h5").read_bytes()
    damaged(tiles / "images" / whole["instance_ids"][30])
    bags(*small, f"extract.output_dir={tmp_path / 'broken'}")
    found = content(tmp_path / "broken" / "my_tiles_train.h5")
    np.testing.assert_array_equal(found["features"], np.delete(whole["features"], 30, 0))
    np.testing.assert_array_equal(found["coords"], np.delete(whole["coords"], 30, 0))
    assert (np.diff(whole["bag_ptr"]) - np.diff(found["bag_ptr"])).tolist() == [0, 1] + [0] * 10


def changed(path: Path, change) -> None:
    write_table(path, change(read_table(path)))


def with_cell(rows: list[dict], number: int, **cells: str) -> list[dict]:
    return [row | cells if i == number else row for i, row in enumerate(rows)]


WRONG = {
    "two labels": (
        "labels.csv",
        lambda rows: with_cell(rows, 0, label="cat" if rows[0]["label"] == "rocket" else "rocket"),
        "has samples of different labels; a bag has one label",
    ),
    "no row": ("coords.csv", lambda rows: rows[:-1], "no row for 1 samples (rocket9/"),
    "twice": ("coords.csv", lambda rows: [*rows, rows[0]], "id 'cat0/0_0.png' occurs twice"),
    "no number": (
        "coords.csv",
        lambda rows: with_cell(rows, 3, x="left"),
        "coordinates of 'cat0/0_3.png' are 'left', '90'; write numbers",
    ),
    "nan": (
        "coords.csv",
        lambda rows: with_cell(rows, 0, y="nan"),
        "coordinates of 'cat0/0_0.png' are '40', 'nan'; write numbers",
    ),
    "no column": (
        "coords.csv",
        lambda rows: [{"id": row["id"], "x": row["x"]} for row in rows],
        'no column "y"; columns are id, x',
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_tables_of_bags_are_checked_before_anything_is_computed(
    bags, tiles, tmp_path, monkeypatch, wrong
):
    name, change, text = wrong
    changed(tiles / name, change)
    sizes = counted(monkeypatch)
    result = bags(code=2)
    assert text in result.err and len(result.err.splitlines()) == 1
    assert sizes == [] and not (tmp_path / "out").exists()


def test_short_rows_and_missing_files_of_coordinates(bags, tiles, tmp_path):
    (tiles / "coords.csv").write_text("id,x,y\ncat0/0_0.png,3\n")
    assert "coords.csv, line 2: 2 cells, the header has 3" in bags(code=2).err
    (tiles / "coords.csv").write_text("")
    assert "coords.csv: no header; the first line must hold" in bags(code=2).err
    (tiles / "coords.csv").unlink()
    assert "coords.csv: No such file or directory" in bags(code=2).err


def test_coordinates_separated_as_spreadsheets_do(bags, tiles, tmp_path):
    small = ["extract.split=val"]
    bags(*small)
    text = (tiles / "coords.csv").read_text().replace(",", ";")
    (tiles / "coords.csv").write_text(text, encoding="utf-8-sig")
    bags(*small, f"extract.output_dir={tmp_path / 'again'}")
    same(tmp_path / "out" / "my_tiles_val.h5", tmp_path / "again" / "my_tiles_val.h5")
    coords = content(tmp_path / "again" / "my_tiles_val.h5")["coords"]
    rows = [line.split(";") for line in text.splitlines()[1:]]
    known = {tuple(float(value) for value in row[1:3]) for row in rows}
    assert {tuple(map(float, place[:2])) for place in coords} <= known and len(set(known)) > 1


def test_corrected_coordinates_keep_the_blocks(bags, tiles, tmp_path, monkeypatch):
    small = ["dataloading.eval_batch_size=16", "extract.split=val"]
    interrupted(bags, monkeypatch, 2, *small, "extract.block_samples=16")
    changed(tiles / "coords.csv", lambda rows: [{**row, "z": "7"} for row in rows])
    result = bags(*small, "extract.block_samples=16")
    assert "2 of 6 blocks were finished" in result.out
    file = content(tmp_path / "out" / "my_tiles_val.h5")
    assert file["coords"].shape[1] == 3 and (file["coords"][:, 2] == 7).all()
    changed(tiles / "coords.csv", lambda rows: [{**row, "z": "8"} for row in rows])
    assert "made otherwise: another coords_sha256;" in bags(*small, code=2).err


def test_bags_without_groups(extract):
    result = extract("extract.bag_by=group", code=2)
    assert "the data set has no groups; name their column with data.group_column" in result.err
