"""Attention of infer against the head itself, a bag at a time; blocks, ranks, ensembles, maps."""

import csv
import json
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from children import glovita
from planted_bags import CLASSES, Planted, plant
from small_runs import EPOCH

from glovita_lib import attention_maps, dist
from glovita_lib.attention_maps import (
    AttentionHook,
    AttentionWriter,
    BagMap,
    Sizes,
    attention_map,
    bag_blocks,
    caption,
    chosen_samples,
    concentration,
    drawn_places,
    softmax,
    tile_side,
    top_shares,
)
from glovita_lib.errors import UserError
from glovita_lib.experiment import restore
from glovita_lib.extraction import token_axes
from glovita_lib.metrics_classification import Scores
from glovita_lib.objectives import LabelledPredictions, Predictions
from glovita_lib.spec_check import load_checked

ONE = dist.Ranks(0, 1, 0, torch.device("cpu"))

SPEC = f"""
mode = "train"
[data]
dataset = "precomputed_features"
train_features_file = "t.h5"
[model.encoder]
encoder_type = "precomputed"
[model.head]
head_type = "HEAD"
[optimizer]
lr = 1e-3
{EPOCH}"""


@pytest.fixture
def bags(tmp_path: Path) -> Planted:
    """Few bags."""
    return plant(tmp_path, sizes={"train": 12, "val": 3, "test": 10})


def read(path: Path) -> dict[str, Any]:
    """An attention file."""
    with h5py.File(path) as file:
        texts = {"ids", "instance_ids"} & set(file)
        tables = {name: file[name][()] for name in file if name not in texts}
        tables |= {name: file[name].asstr()[()].tolist() for name in texts}
        return tables | {"attributes": dict(file.attrs)}


def one_by_one(path: Path, spec: Path, bags: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the head of a checkpoint, a bag at a time: raw and softmax (M, K)."""
    head = restore(path, load_checked(str(spec)).root, ONE).model.eval().head
    ptr = bags["bag_ptr"]
    parts = [torch.from_numpy(bags["features"][a:b]) for a, b in zip(ptr, ptr[1:], strict=False)]
    with torch.no_grad():
        pairs = [head.attention(bag) for bag in parts]
    return tuple(torch.cat(column).numpy() for column in zip(*pairs, strict=True))


@pytest.mark.parametrize(
    ("head", "branches"),
    [
        ('clam"\nvariant = "sb"\nsize_arg = "tiny', ["all classes"]),
        ('clam"\nvariant = "mb"\nsize_arg = "tiny', list(CLASSES)),
        ('abmil"\nhidden = 16\nattention = 8 #', ["all classes"]),
        ('dsmil"\nattention = 8 #', list(CLASSES)),
        ('transmil"\nhidden = 16\nheads = 2\nlandmarks = 4 #', ["all classes"]),
        ('temporal_transformer"\nhidden = 16\nheads = 2 #', ["all classes"]),
    ],
)
def test_file(command, bags, tmp_path, monkeypatch, head, branches):
    monkeypatch.setattr(attention_maps, "BLOCK", 50)  # blocks of one or two bags
    spec = SPEC.replace('HEAD"', head + '"' if "#" not in head else head)
    command(*bags.overrides, spec=spec)
    result = command(*bags.overrides, "mode=infer", "infer.attention_maps=4", spec=spec)
    got, test = read(result.path / "infer" / "attention_test.h5"), bags.bags["test"]
    checkpoint = result.path / "checkpoints" / "best.pt"
    (tmp_path / "plain.toml").write_text(spec)
    raw, weights = one_by_one(checkpoint, tmp_path / "plain.toml", test)
    np.testing.assert_allclose(got["raw"], raw, atol=1e-5)
    np.testing.assert_allclose(got["attention"], weights, atol=1e-6)
    assert got["attention"].shape == (test["bag_ptr"][-1], len(branches))
    sums = np.add.reduceat(got["attention"], test["bag_ptr"][:-1])
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    assert got["ids"] == test["ids"]
    np.testing.assert_array_equal(got["bag_ptr"], test["bag_ptr"])
    np.testing.assert_array_equal(got["coords"], test["coords"])
    assert got["instance_ids"] == [f"test/{row}.png" for row in range(test["bag_ptr"][-1])]
    assert list(got["attributes"]["branches"]) == branches
    assert list(got["attributes"]["class_names"]) == list(CLASSES)
    assert got["attributes"]["coords"] == "x,y"
    assert list(got["attributes"]["checkpoints"]) == [str(checkpoint)]
    maps = sorted(path.name for path in (result.path / "infer/plots/attention_test").iterdir())
    assert len(maps) == 4 and all(name.startswith("test_") for name in maps)
    assert not list(result.path.glob("infer/*.parts"))


def test_new_bags_without_labels(command, refused, bags, tmp_path):
    """A feature file without labels and a folder of bags are predicted as the test split is."""
    spec = SPEC.replace("HEAD", "abmil")
    run = command(*bags.overrides, spec=spec)
    command(*bags.overrides, "mode=infer", spec=spec)
    expected = read(run.path / "infer" / "attention_test.h5")
    scores = [
        {k: v for k, v in row.items() if k not in ("id", "target")} for row in run.rows("test")
    ]
    test, folder, file = bags.bags["test"], tmp_path / "slides", tmp_path / "new.h5"
    folder.mkdir()
    with h5py.File(file, "w") as written:
        for name in ("features", "bag_ptr", "coords"):
            written[name] = test[name]
    for b in range(len(test["ids"])):
        rows = slice(test["bag_ptr"][b], test["bag_ptr"][b + 1])
        with h5py.File(folder / f"slide{b}.h5", "w") as written:
            written["features"], written["coords"] = test["features"][rows], test["coords"][rows]
    for path, ids in ((file, "{}"), (folder, "slide{}")):
        result = command(*bags.overrides, "mode=infer", f"infer.input={path}", spec=spec)
        assert not (result.path / "infer" / f"metrics_{path.stem}.json").exists()
        with open(result.path / "infer" / f"predictions_{path.stem}.csv", newline="") as table:
            rows = list(csv.DictReader(table))
        assert [row.pop("id") for row in rows] == [ids.format(b) for b in range(len(rows))]
        assert all(row.items() <= known.items() for row, known in zip(rows, scores, strict=True))
        got = read(result.path / "infer" / f"attention_{path.stem}.h5")
        for name in ("attention", "raw", "coords", "bag_ptr"):
            np.testing.assert_array_equal(got[name], expected[name])
    with h5py.File(file, "a") as written:
        written["narrow"] = test["features"][:, :3]
    narrow = (f"infer.input={file}", "data.features_key=narrow")
    known = f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}"
    line = refused(*bags.overrides, "mode=infer", known, *narrow, spec=spec)
    assert f"the checkpoint was trained on bags of width 16, {file} has width 3" in line
    line = refused(*bags.overrides, "mode=infer", "infer.input=nowhere", spec=spec)
    assert "nowhere: no such file or folder, expected a feature file" in line


def test_a_test_file_alone(command, bags):
    """A checkpoint is evaluated on an external file; the files it was trained on are not needed."""
    spec = SPEC.replace("HEAD", "abmil").replace('train_features_file = "t.h5"\n', "")
    run = command(*bags.overrides, spec=spec)
    saved = run.rows("test")
    for name in ("train", "val"):
        (bags.folder / f"{name}.h5").unlink()
    command(
        f"data.data_root_dir={bags.folder}",
        "data.test_features_file=test.h5",
        "mode=infer",
        f"infer.checkpoint={run.path / 'checkpoints' / 'best.pt'}",
        f"infer.output_dir={bags.folder / 'external'}",
        spec=spec,
    )
    with open(bags.folder / "external" / "predictions_test.csv", newline="") as table:
        assert list(csv.DictReader(table)) == saved
    metrics = json.loads((bags.folder / "external" / "metrics_test.json").read_text())
    assert metrics == run.json("metrics_test.json")


def test_what_is_not_wanted_is_not_written(command, bags):
    spec = SPEC.replace('HEAD"', 'clam"\nsize_arg = "tiny"')
    command(*bags.overrides, spec=spec)
    result = command(*bags.overrides, "mode=infer", "infer.attention=false", spec=spec)
    command(*bags.overrides, "mode=infer", spec=spec, flags=["--dry-run"])
    folder = result.path / "infer"
    files = {"predictions_test.csv", "metrics_test.json", "resolved_config_test.json"}
    assert {path.name for path in folder.iterdir()} == files
    command(*bags.overrides, "mode=infer", "infer.attention_maps=0", spec=spec)
    assert (folder / "attention_test.h5").is_file() and not (folder / "plots").exists()


def test_heads_without_attention(command, bags):
    spec = SPEC.replace("HEAD", "mean")
    command(*bags.overrides, spec=spec)
    result = command(*bags.overrides, "mode=infer", spec=spec)
    assert (result.path / "infer" / "predictions_test.csv").is_file()
    assert not list(result.path.glob("infer/attention*"))


def test_bags_without_coordinates_have_no_maps(command, tmp_path):
    bags = plant(tmp_path, sizes={"train": 6, "val": 3, "test": 4}, coords=False)
    spec = SPEC.replace('HEAD"', 'clam"\nsize_arg = "tiny"')
    command(*bags.overrides, spec=spec)
    result = command(*bags.overrides, "mode=infer", spec=spec)
    got = read(result.path / "infer" / "attention_test.h5")
    assert "coords" not in got and "coords" not in got["attributes"]
    assert "heat maps" not in result.out and not (result.path / "infer/plots").exists()


def test_ensemble(command, bags):
    """Means over the members; members of other branches have none."""
    spec = SPEC.replace('HEAD"', 'clam"\nsize_arg = "tiny"')
    paths = []
    for seed, variant in ((0, "sb"), (1, "sb"), (0, "mb")):
        overrides = [f"seed={seed}", f"name=s{seed}{variant}", f"model.head.variant={variant}"]
        run = command(*bags.overrides, *overrides, spec=spec)
        paths.append(run.path / "checkpoints" / "best.pt")

    def infer(*members: int, code: int = 0):
        names = ",".join(f'"{paths[m]}"' for m in members)
        changes = [f"infer.checkpoint=[{names}]", f"infer.output_dir={bags.folder / 'out'}"]
        return command(*bags.overrides, "mode=infer", *changes, spec=spec, code=code)

    singles = []
    for member in (0, 1):
        infer(member)
        singles.append(read(bags.folder / "out" / "attention_test.h5"))
    infer(0, 1)
    both = read(bags.folder / "out" / "attention_test.h5")
    assert np.abs(singles[0]["raw"] - singles[1]["raw"]).max() > 1e-3
    for name in ("raw", "attention"):
        np.testing.assert_allclose(both[name], (singles[0][name] + singles[1][name]) / 2, rtol=1e-5)
    refused = infer(0, 2, code=2).err.splitlines()
    assert len(refused) == 1 and "1, 3 attention branches" in refused[0]
    assert not list((bags.folder / "out").glob("*.parts"))


@pytest.mark.processes
def test_ranks(command, bags, tmp_path):
    """Two ranks write the file of one; also where the first one has no bag."""
    spec = SPEC.replace('HEAD"', 'clam"\nsize_arg = "tiny"')
    (tmp_path / "alone").mkdir()
    alone = plant(tmp_path / "alone", sizes={"train": 6, "val": 1})
    run = command(*bags.overrides, spec=spec)
    (tmp_path / "run.toml").write_text(spec)
    for overrides, split in ((bags.overrides, "test"), (alone.overrides, "val")):
        changes = [*overrides, "mode=infer", f"infer.checkpoint={run.path}/checkpoints/best.pt"]
        changes += [f"infer.split={split}", "infer.attention_maps=0"]
        command(*changes, f"infer.output_dir={tmp_path / 'one'}", spec=spec)
        changes += [f"infer.output_dir={tmp_path / 'two'}"]
        glovita(tmp_path / "run.toml", "--override", *changes, ranks=2)
        one, two = (read(tmp_path / name / f"attention_{split}.h5") for name in ("one", "two"))
        for name in ("raw", "attention"):
            np.testing.assert_allclose(one[name], two[name], atol=1e-6)
        for name in ("bag_ptr", "coords"):
            np.testing.assert_array_equal(one[name], two[name])
        assert one["ids"] == two["ids"] and not list((tmp_path / "two").glob("*.parts"))


def test_a_full_disk_is_one_line(tmp_path):
    """The parts go when something fails."""

    class Full:
        name = "parts/0"

        def write(self, content):
            raise OSError(28, "No space left on device")

    head = SimpleNamespace(attention=lambda bag: (torch.zeros(len(bag), 1), None))
    with pytest.raises(UserError, match="cannot write parts/0: No space left"):
        AttentionHook(Full(), head)(head, (torch.zeros(3, 2),), torch.zeros(1, 2))
    with pytest.raises(UserError), AttentionWriter(tmp_path / "a.h5", ONE, wanted=True) as recorder:
        path = recorder.part(0, 0)
        path.parent.mkdir()
        path.write_bytes(b"")
        recorder.own.append(path)
        raise UserError("something else")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- parts


def test_softmax_and_blocks(monkeypatch):
    lengths = np.array([3, 1, 200, 5, 2, 7])
    scores = np.random.default_rng(0).normal(size=(lengths.sum(), 2)).astype(np.float32) * 50
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    parts = torch.from_numpy(scores).double().split(lengths.tolist())
    expected = torch.cat([part.softmax(0) for part in parts])
    np.testing.assert_allclose(softmax(scores, starts), expected, rtol=1e-9)
    monkeypatch.setattr(attention_maps, "BLOCK", 8)
    assert list(bag_blocks(lengths)) == [(0, 2), (2, 3), (3, 5), (5, 6)]


def test_scores_of_ranks_are_one_stream(tmp_path, monkeypatch):
    """Blocks that begin and end anywhere in the shards of three ranks, one of them empty."""
    monkeypatch.setattr(attention_maps, "BLOCK", 6)
    lengths = np.array([2, 3, 4, 1, 5])
    ranks = dist.Ranks(0, 3, 0, torch.device("cpu"))
    recorder = AttentionWriter(tmp_path / "a.h5", ranks, wanted=True)
    scores = np.arange(30, dtype=np.float32).reshape(15, 2)
    recorder.folder.mkdir()
    for rank, rows in enumerate((slice(0, 9), slice(0, 0), slice(9, 15))):
        recorder.part(0, rank).write_bytes(scores[rows].tobytes())
    parts = list(recorder.read(0, Sizes(lengths, 2, None)))
    assert [len(part) for part in parts] == [5, 5, 5]
    np.testing.assert_array_equal(np.concatenate(parts), scores)


def test_top_shares():
    values = np.array([0.1, 0.4, 0.1, 0.3, 0.1])
    np.testing.assert_allclose(top_shares(values), [0.7, 0.1, 0.7, 0.3, 0.7])
    assert top_shares(np.ones(1)) == 0.5
    assert top_shares(np.arange(1000.0))[[0, -1]].tolist() == pytest.approx([0.9995, 0.0005])


def test_tile_side_and_concentration():
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * 224.0
    assert tile_side(grid) == 224
    assert tile_side(np.concatenate([grid, grid + [3000, 17]])) == 224  # two pieces of tissue
    assert tile_side(np.array([[7.0, 7.0]])) == tile_side(np.array([[7.0, 7.0]] * 3)) == 1
    line = concentration(np.array([0.1, 0.6, 0.3])).replace("\n", " ")
    assert line == "1 of 3 have half of the attention, the first 1.8 times the mean"
    line = concentration(np.full(2000, 1 / 2000))
    assert line.startswith("1,000 of 2,000 ") and line.endswith("the first 1.0 times the mean")


def predictions(targets: Any, scores: Any = None) -> Predictions:
    count = len(targets) if scores is None else len(scores)
    scores = np.zeros((count, 2), np.float32) if scores is None else scores
    ids = [f"bag {i}" for i in range(count)]
    found = Predictions(ids, Scores(scores), np.arange(count))
    return found if targets is None else labelled(found, targets)


def labelled(found: Predictions, targets: np.ndarray) -> LabelledPredictions:
    losses = np.zeros(len(found.ids), np.float32)
    return LabelledPredictions(found.ids, found.scores, found.rows, targets, losses)


def test_chosen_samples():
    classes = predictions(np.array([0, 0, 0, 0, 1, 1, 2]))
    assert chosen_samples(classes, "multiclass", 5) == [0, 1, 4, 5, 6]
    assert chosen_samples(classes, "multiclass", 99) == list(range(7))
    assert chosen_samples(classes, "multiclass", 0) == []
    numbers = predictions(np.array([[5.0], [1.0], [9.0], [3.0]], np.float32))
    assert chosen_samples(numbers, "regression", 2) == [1, 2]  # the lowest and the highest
    assert chosen_samples(predictions(None, np.zeros((5, 2))), "multiclass", 3) == [0, 2, 4]


def test_captions():
    resolved = SimpleNamespace(subtask="multiclass", class_names=("a", "b"))
    scores = np.array([[0.25, 0.75]], np.float32)
    labelled = predictions(np.array([0]), scores)
    assert caption(labelled, 0, resolved) == "label a, predicted b (0.750)"
    assert caption(predictions(None, scores), 0, resolved) == "predicted b (0.750)"
    resolved.subtask = "multilabel"
    assert caption(predictions(np.array([[1, 0]]), scores), 0, resolved) == "labels a, predicted b"
    assert caption(predictions(np.array([[0, 0]]), scores / 4), 0, resolved).endswith("predicted –")
    resolved.subtask = "regression"
    truth = predictions(np.array([[1.5, 20.0]]), scores)
    assert caption(truth, 0, resolved) == "label 1.500, 20, predicted 0.250, 0.750"


def test_map_of_many_branches_shows_the_likeliest(tmp_path, monkeypatch):
    drawn = []
    original = attention_maps.draw_branch
    monkeypatch.setattr(
        attention_maps,
        "draw_branch",
        lambda *arguments: drawn.append(arguments[-1][0]) or original(*arguments),
    )
    attention_ = np.tile(np.arange(1.0, 9.0), (1, 1))  # one instance
    names = [f"class {k}" for k in range(8)]
    bag = BagMap("one", "label", np.zeros((1, 2)), attention_, names, [7, 0, 3, 4, 5, 6, 1, 2])
    attention_map(bag, tmp_path / "a.png")
    assert drawn == [1, 4, 5, 6, 7, 8]
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize("tiles", [5000, 50])
def test_map_colours_are_where_the_instances_are(tmp_path, monkeypatch, tiles):
    """The top instance's tile is the darkest place, drawn one by one or as cells of a picture."""
    from PIL import Image

    monkeypatch.setattr(attention_maps, "TILES", tiles)
    coords = np.stack(np.meshgrid(np.arange(10), np.arange(10)), -1).reshape(-1, 2).astype(float)
    values = np.full(100, 1e-3)
    values[[0, 1, 10, 11]] = 0.2  # the upper left corner
    bag = BagMap("b", "", coords, values[:, None], ["all"], [0])
    attention_map(bag, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    map_ = pixels[:, : width // 2]  # without the colour bar
    y, x = np.nonzero((map_[..., 0] > 100) & (map_[..., 1] < 90) & (map_[..., 2] < 60))
    assert len(y) and y.max() < 0.5 * height and x.max() < 0.35 * width


@pytest.mark.parametrize(("width", "height", "branches"), [(20, 25, 8), (60, 1, 1), (4, 60, 3)])
def test_no_words_of_a_map_lie_over_others(tmp_path, monkeypatch, width, height, branches):
    """Of several rows, of a row of tiles, and of columns that are narrower than their captions."""
    from matplotlib.text import Text

    drawn, original = [], attention_maps.drawing

    @contextmanager
    def kept(*page):
        with original(*page) as figure:
            drawn.append(figure)
            yield figure

    monkeypatch.setattr(attention_maps, "drawing", kept)
    coords = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2)
    values = np.random.default_rng(0).random((len(coords), branches))
    names = [f"tissue class {k}" for k in range(branches)]
    bag = BagMap(
        "a slide",
        "label a, predicted b",
        coords * 1.0,
        values / values.sum(0),
        names,
        range(branches),
    )
    attention_map(bag, tmp_path / "a.png")
    (figure,) = drawn
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 8
    for (one, box), (other, second) in combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(second), (one, other)


def test_members_of_other_grids_have_no_mean():
    four, nine = (
        attention_maps.Sizes(np.full(3, n * n), 1, [np.ones((n * n, 2))] * 3) for n in (2, 3)
    )
    assert attention_maps.one_size([four, four]) is four
    with pytest.raises(UserError, match="weigh different instances .patches of another grid"):
        attention_maps.one_size([four, nine])


def test_grids_of_channels_are_drawn_side_by_side():
    places = np.stack(np.meshgrid(*map(np.arange, (2, 2, 3)), indexing="ij"), -1).reshape(-1, 3)
    drawn = drawn_places(places.astype(float), "channel,row,column").tolist()
    assert drawn[:6] == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert drawn[6:] == [[4 + x, y] for x, y in drawn[:6]]
    assert drawn_places(np.array([[2.0], [4]]), "time").tolist() == [[2, 0], [4, 0]]
    assert drawn_places(np.array([[2.0, 3, 4]]), "x,y,z").tolist() == [[2, 3]]


def test_axes_of_tokens_are_those_of_their_samples():
    assert [token_axes("volumes", count) for count in (1, 2, 3)] == ["slice", "row,column", "x,y,z"]
    assert [token_axes("videos", count) for count in (1, 3)] == ["frame", "frame,row,column"]
    assert [token_axes("series", count) for count in (1, 3)] == ["time", "channel,row,column"]
    assert token_axes("images", 2) == "row,column"
