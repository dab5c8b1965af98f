"""Mode umap from end to end: every layout of feature files, a trained run, the page, mistakes."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from children import glovita as glovita_ranks
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from small_runs import FOLDERS, TINY, write_png

import glovita
from glovita_lib import dist
from glovita_lib.dist import Ranks
from glovita_lib.errors import UserError
from glovita_lib.projection import project
from glovita_lib.read_image import FileSource
from glovita_lib.run_umap import open_input, samples_of_features, samples_of_model
from glovita_lib.rundir import alone
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_data import PrecomputedData
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Umap

ROOT = Path(__file__).parents[1]
X, Y = load_digits(return_X_y=True)
X = X.astype(np.float32)
LENGTHS = np.array([3, 1, 7, 4, 5])
PTR = np.concatenate([[0], np.cumsum(LENGTHS)])
SPEC = 'mode = "umap"\n[logger]\nbackend = "none"\n[umap]\nmethod = "pca"\ndpi = 50\n'
OWN_FEATURES = [
    "data.dataset=precomputed_features",
    "model.encoder.encoder_type=precomputed",
    "data.train_features_file=FILE",
]


def write(path, attributes=None, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        file.attrs.update(attributes or {})
    return path


def samples(path, **fields):
    data = open_input(path, Root(), named=False)
    return samples_of_features(data.splits, data, Umap(**fields), 0)


def command(tmp_path, *overrides, spec=SPEC, name="map.toml"):
    """Exit code of the entry script on a spec."""
    path = tmp_path / name
    path.write_text(spec)
    changed = [f"exp_dir={tmp_path / 'exp'}", *overrides]
    return glovita.main([str(path), "--override", *changed])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def embedded(page):
    """The data inside a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


# ---------------------------------------------------------------------- layouts


def test_vectors(tmp_path):
    path = write(tmp_path / "v.h5", features=X[:50].astype(np.float16), labels=Y[:50])
    found = samples(path)
    np.testing.assert_array_equal(found.features, X[:50])
    assert found.features.dtype == np.float32
    np.testing.assert_array_equal(found.targets, Y[:50])
    assert found.ids == [str(i) for i in range(50)] == found.owners
    some = samples(path, max_samples=20, max_per_class=0)
    np.testing.assert_array_equal(some.features, X[[int(i) for i in some.ids]])
    assert len(some.ids) == 20 and some.total == 50


@pytest.mark.parametrize("layout", ["bag_ptr", "bag_lengths", "fixed", "folder"])
def test_bags(tmp_path, layout):
    lengths, labels = LENGTHS, np.array([0, 1, 0, 1, 1])
    if layout == "fixed":
        lengths = np.full(5, 4)
        path = write(tmp_path / "b.h5", features=X[:20].reshape(5, 4, 64), labels=labels)
    elif layout == "folder":
        path = tmp_path / "b"
        path.mkdir()
        for i in range(5):
            if i % 2:
                torch.save(torch.from_numpy(X[PTR[i] : PTR[i + 1]]), path / f"{i}.pt")
            else:
                write(path / f"{i}.h5", features=X[PTR[i] : PTR[i + 1]])
    else:
        table = {"bag_ptr": PTR} if layout == "bag_ptr" else {"bag_lengths": LENGTHS}
        path = write(tmp_path / "b.h5", features=X[:20], labels=labels, **table)
    parts = np.split(X[:20], np.cumsum(lengths)[:-1])
    found = samples(path)
    np.testing.assert_allclose(found.features, [part.mean(0) for part in parts], rtol=1e-6)
    assert found.ids == list("01234")
    found = samples(path, bags="instances")
    np.testing.assert_array_equal(found.features, X[:20])
    owner = np.repeat(np.arange(5), lengths)
    assert found.owners == [str(bag) for bag in owner]
    assert found.ids[:5] == ["0#0", "0#1", "0#2", *(["0#3", "1#0"] if layout == "fixed" else
                             ["1#0", "2#0"])]  # fmt: skip
    if layout == "folder":
        assert found.targets is None
    else:
        np.testing.assert_array_equal(found.targets, labels[owner])
    some = samples(path, bags="instances", max_samples=9, max_per_class=0)
    place = [
        owner.tolist().index(int(b)) + int(i) for b, _, i in (n.partition("#") for n in some.ids)
    ]
    np.testing.assert_array_equal(some.features, X[place])
    assert len(some.ids) == 9 and some.total == 20


def test_names_labels_and_keys_of_the_file(tmp_path):
    attributes = {"class_names": ["even", "odd"], "subtask": "multiclass"}
    ids = [f"img/{i}.png" for i in range(30)]
    path = write(tmp_path / "v.h5", attributes, x=X[:30], labels=Y[:30] % 2, ids=ids)
    data = PrecomputedData(features_file="unused", features_key="x")
    found = open_input(path, Root(data=data), named=False)
    assert found.class_names == ("even", "odd") and found.splits[""].ids == ids


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ([], None),
        (["model.head.head_type=classification"], "class"),
        ([*OWN_FEATURES, "data.num_classes=10"], "class"),
        ([*OWN_FEATURES, "data.subtask=multiclass"], "class"),
        ([*OWN_FEATURES, "data.subtask=regression", "model.head.head_type=regression"], None),
        (["class_names"], "name"),
    ],
)
def test_whole_numbers_with_decimals_are_classes_where_something_says_so(tmp_path, said, found):
    """A head that is named, the data section of features, or names in the file; else a scale."""
    names = [f"digit {n}" for n in range(10)]
    attributes = {"class_names": names} if said == ["class_names"] else {}
    path = write(tmp_path / "v.h5", attributes, features=X[:40], labels=Y[:40].astype("f4"))
    changes = [text.replace("FILE", str(path)) for text in said if text != "class_names"]
    assert command(tmp_path, f"umap.input={path}", *changes) == 0
    (table,) = tmp_path.rglob("*.csv")
    labels = [row["label"] for row in rows(table)]
    if found is None:
        assert labels[:3] == ["0.0", "1.0", "2.0"]
    else:
        wanted = {"class": "{}", "name": "digit {}"}[found]
        assert labels == [wanted.format(n) for n in Y[:40]]


@pytest.mark.parametrize("kind", [np.float32, np.int64])
@pytest.mark.parametrize("names", [["a", "b", "c"], ["-1", "0", "1"]])
def test_names_of_the_section_are_those_of_the_classes(tmp_path, kind, names):
    """Numbers are places in the list, or stand in it themselves."""
    start = int(names[0]) if names[0] == "-1" else 0
    labels = (np.arange(40) % 3 + start).astype(kind)
    path = write(tmp_path / "v.h5", features=X[:40], labels=labels)
    changes = [*(text.replace("FILE", str(path)) for text in OWN_FEATURES), f"umap.input={path}"]
    assert command(tmp_path, *changes, f"data.class_names={json.dumps(names)}") == 0
    (table,) = tmp_path.rglob("*.csv")
    assert [row["label"] for row in rows(table)] == [names[n % 3] for n in range(40)]


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_whole_numbers_are_values_where_the_section_says_so(tmp_path, kind):
    path = write(tmp_path / "v.h5", features=X[:40], labels=Y[:40].astype(kind))
    own = [text.replace("FILE", str(path)) for text in OWN_FEATURES]
    said = ["data.subtask=regression", "model.head.head_type=regression"]
    assert command(tmp_path, f"umap.input={path}", *own, *said) == 0
    (page,) = tmp_path.rglob("*.html")
    np.testing.assert_allclose(embedded(page.read_text())["colorings"][0]["values"], Y[:40])


@pytest.mark.parametrize(
    ("value", "said", "line"),
    [
        (np.nan, "model.head.head_type=classification", "there is no label; wrong: 3"),
        (np.nan, 'data.class_names=["a", "b", "c"]', "there is no label; wrong: 3"),
        (np.inf, "model.head.head_type=classification", "the label must be a finite number"),
        (0.5, 'data.class_names=["a", "b", "c"]', '"0.5" (3); data.class_names: a, b'),
        (2, 'data.class_names=["a", "b"]', 'label not in class list: "2" (2)'),
        (7, 'data.class_names=["a", "b", "c"]', 'label not in class list: "7" (3)'),
    ],
)
def test_a_label_that_is_no_class_is_called_one(tmp_path, value, said, line, capsys):
    labels = (np.arange(40) % 3).astype(np.float32)
    labels[3] = value
    path = write(tmp_path / "v.h5", features=X[:40], labels=labels)
    changes = [*(text.replace("FILE", str(path)) for text in OWN_FEATURES), f"umap.input={path}"]
    assert command(tmp_path, *changes, said) == 2
    told = capsys.readouterr().err
    assert line in told and "regression" not in told


def test_values_are_not_for_a_head_of_classes_and_what_may_be_either_is_said(tmp_path, capsys):
    said = "where they are classes, set model.head.head_type"
    whole, half = Y[:40].astype(np.float32), Y[:40] + np.float32(0.5)
    for stated, labels, line in ((None, whole, True), ("regression", whole, False),
                                 (None, half, False)):  # fmt: skip
        attributes = {} if stated is None else {"subtask": stated}
        path = write(tmp_path / "v.h5", attributes, features=X[:40], labels=labels)
        assert command(tmp_path, f"umap.input={path}") == 0
        assert (said in " ".join(capsys.readouterr().out.split())) == line
        code = command(tmp_path, f"umap.input={path}", "model.head.head_type=classification")
        told = capsys.readouterr()
        assert said not in " ".join(told.out.split())
        assert code == (0 if line else 2)
        assert ('model.head.head_type: "classification" cannot predict' in told.err) != line


# ---------------------------------------------------------------------- whole runs


def test_a_file_becomes_pictures_table_page_and_numbers(tmp_path, capsys):
    names = [f"class {k}" for k in range(10)]
    ids = [f"scan {i} <b>&amp;" for i in range(60)]
    path = write(tmp_path / "v.h5", {"class_names": names}, features=X[:60], labels=Y[:60], ids=ids)
    assert command(tmp_path, f"umap.input={path}", "umap.title=<i>Map</i>") == 0
    folder = tmp_path / "umap_plots" / "v"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"pca.{suffix}" for suffix in ("csv", "html", "json", "png", "svg")
    ]
    table = rows(folder / "pca.csv")
    assert [row["id"] for row in table] == ids
    assert [row["label"] for row in table] == [names[label] for label in Y[:60]]
    page = (folder / "pca.html").read_text()
    data = embedded(page)
    assert data["ids"] == ids and data["title"] == "<i>Map</i>" and data["thumbnails"] is None
    assert not re.search(r"https?://|//[a-z]|@import|src=", page.replace(json.dumps(data), ""))
    assert "<i>Map" not in page and "&lt;i&gt;Map" in page
    np.testing.assert_allclose(data["x"], [float(row["x"]) for row in table], rtol=1e-4)
    numbers = json.loads((folder / "pca.json").read_text())
    assert numbers["splits"] == [] and numbers["title"] and 1 < numbers["point_size"] < 8
    assert numbers["samples"] == 60 and 0.5 < numbers["trustworthiness"] <= 1
    assert numbers["umap"]["method"] == "pca" and numbers["versions"]["umap-learn"]
    assert "class 3" in (folder / "pca.svg").read_text()
    out = capsys.readouterr().out
    assert f"{numbers['trustworthiness']:.3f}" in out and str(folder / "pca.html") in out


def test_two_draw_the_same_map_one_after_the_other(tmp_path, capsys):
    path = write(tmp_path / "v.h5", features=X[:60])
    with alone(tmp_path / "umap_plots" / "v" / "pca", Ranks(0, 1, 0, torch.device("cpu"))):
        assert command(tmp_path, f"umap.input={path}") == 2
        line = capsys.readouterr().err
    assert "in use by this process" in line and "on_existing" not in line
    assert command(tmp_path, f"umap.input={path}") == 0


def test_the_same_command_gives_the_same_files(tmp_path):
    path = write(tmp_path / "v.h5", features=X[:300], labels=Y[:300])
    some = ["umap.max_samples=200", "umap.max_per_class=15", f"umap.input={path}"]
    for name in "ab":
        assert command(tmp_path, *some, f"umap.output_dir={tmp_path / name}") == 0
    for suffix in ("csv", "html", "png", "svg"):
        first, second = (tmp_path / name / f"pca.{suffix}" for name in "ab")
        assert first.read_bytes() == second.read_bytes()
    assert len(rows(tmp_path / "a" / "pca.csv")) == 150
    assert command(tmp_path, *some, f"umap.output_dir={tmp_path / 'c'}", "umap.seed=1") == 0
    assert rows(tmp_path / "a" / "pca.csv") != rows(tmp_path / "c" / "pca.csv")


@pytest.mark.parametrize("kind", ["regression", "whole", "multilabel", "none"])
def test_other_labels(tmp_path, kind, capsys):
    labels = {"regression": X[:40].mean(1), "multilabel": np.stack([Y[:40] % 2, Y[:40] > 4], 1)}
    labels["whole"] = Y[:40]  # as floats
    more = {} if kind == "none" else {"labels": labels[kind].astype(np.float32)}
    path = write(tmp_path / "v.h5", features=X[:40], **more)
    assert command(tmp_path, f"umap.input={path}") == 0
    table = rows(tmp_path / "umap_plots" / "v" / "pca.csv")
    data = embedded((tmp_path / "umap_plots" / "v" / "pca.html").read_text())
    if kind in ("regression", "whole"):
        assert [float(row["label"]) for row in table] == more["labels"].tolist()
        np.testing.assert_allclose(data["colorings"][0]["values"], labels[kind], rtol=1e-4)
    elif kind == "multilabel":
        wanted = {"": "no label", "0": "target_0", "1": "target_1", "01": "target_0 + target_1"}
        expected = ["".join(str(k) for k in (0, 1) if row[k]) for row in labels[kind]]
        assert [row["label"] for row in table] == [wanted[text] for text in expected]
    else:
        assert list(table[0]) == ["id", "x", "y"] and data["colorings"] == []
        assert "no labels" in capsys.readouterr().out


def test_numbers_of_the_table_read_back_equal(tmp_path):
    labels = 1.7e9 + np.random.default_rng(0).normal(size=20) * 30
    path = write(tmp_path / "v.h5", features=X[:20], labels=labels)
    assert command(tmp_path, f"umap.input={path}") == 0
    table = rows(tmp_path / "umap_plots" / "v" / "pca.csv")
    assert [float(row["label"]) for row in table] == labels.tolist()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_float64_beside_a_large_offset(tmp_path, metric, capsys):
    """Centred before float32 where distances allow it; what float32 then joins is said."""
    path = write(tmp_path / "v.h5", features=1e8 + 1e-3 * X[:40].astype(np.float64))
    assert command(tmp_path, f"umap.input={path}", f"umap.metric={metric}") == 0
    table = rows(tmp_path / "umap_plots" / "v" / "pca.csv")
    points = np.array([[float(row["x"]), float(row["y"])] for row in table])
    said = capsys.readouterr().out
    if metric == "cosine":
        assert "differ from others by less than float32" in said
        return
    expected = PCA(2).fit_transform((1e-3 * X[:40]).astype(np.float64))
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-7)
    assert "float32" not in said


def test_what_float32_joins_is_said(tmp_path, capsys):
    """Two groups so far apart that float32 has no digits left within them; what float64 rounds, as
    in means of equal bags, is not meant."""
    values = X[:10].astype(np.float64)
    path = write(tmp_path / "v.h5", features=np.concatenate([values * 1e-9, values * 1e-9 + 1]))
    assert command(tmp_path, f"umap.input={path}") == 0
    assert "samples differ from others by less than float32" in capsys.readouterr().out
    same = np.concatenate([values, values * (1 + 2**-52)])
    path = write(tmp_path / "same.h5", features=same)
    assert command(tmp_path, f"umap.input={path}") == 0
    assert "less than float32" not in capsys.readouterr().out


def test_a_column_gives_the_colours(tmp_path):
    path = write(tmp_path / "v.h5", features=X[:20], labels=Y[:20])
    colors = tmp_path / "who.csv"
    colors.write_text("id,label\n" + "".join(f"{i},{'xy'[i % 2]}\n" for i in range(19)))
    chosen = [f"umap.input={path}", f"umap.color_file={colors}", "umap.color_column=label"]
    assert command(tmp_path, *chosen, "umap.color_by=column") == 0
    data = embedded((tmp_path / "umap_plots" / "v" / "pca_label.html").read_text())
    assert [c["title"] for c in data["colorings"]] == [
        "label",
        "label_",
    ]  # what was asked for first
    assert data["colorings"][0]["names"] == ["x", "y"]
    assert data["colorings"][0]["codes"][-1] == -1
    assert rows(tmp_path / "umap_plots" / "v" / "pca_label.csv")[1]["label"] == "y"


ENCODER = TINY.replace('mode = "train"', 'mode = "umap"') + '[umap]\nmethod = "pca"\ndpi = 50\n'


def test_an_encoder_on_the_specs_own_images(tmp_path, capsys):
    overrides = ["extract.source=encoder", "umap.max_samples=60", "umap.max_per_class=0"]
    assert command(tmp_path, *overrides, spec=ENCODER) == 0
    folder = tmp_path / "exp" / "digits" / "map" / "0" / "umap"
    table = rows(folder / "pca.csv")
    assert len(table) == 60 and set(table[0]) == {"id", "x", "y", "label", "split"}
    assert {row["split"] for row in table} == {"train", "val", "test"}
    assert [row["label"] for row in table] == [str(Y[int(row["id"])]) for row in table]
    data = embedded((folder / "pca.html").read_text())
    assert data["thumbnails"]["cell"] == 8 and len(data["thumbnails"]["sheets"]) == 1
    assert command(tmp_path, *overrides, "umap.color_by=prediction", spec=ENCODER) == 2
    assert "nothing was trained" in capsys.readouterr().err


def test_a_trained_run_with_its_predictions(tmp_path, capsys):
    run = ["training.epochs=1", "umap.split=test", "umap.max_samples=40"]
    assert command(tmp_path, *run, spec=ENCODER) == 2
    assert "does not exist: train the spec first" in capsys.readouterr().err
    assert command(tmp_path, *run, "mode=train", spec=ENCODER) == 0
    assert command(tmp_path, *run, "umap.color_by=prediction", spec=ENCODER) == 0
    folder = next((tmp_path / "exp").rglob("umap"))
    table = {row["id"]: row for row in rows(folder / "pca_test_prediction.csv")}
    saved = {row["id"]: row for row in rows(folder.parent / "predictions_test.csv")}
    assert len(table) == 40
    for name, row in table.items():
        assert (row["label"], row["prediction"]) == (
            saved[name]["label"],
            saved[name]["prediction"],
        )
        assert row["mistakes"] == ("right" if row["label"] == row["prediction"] else "wrong")
    data = embedded((folder / "pca_test_prediction.html").read_text())
    assert [c["title"] for c in data["colorings"]] == ["prediction", "label", "mistakes"]


def digit_folders(folder, names, **sizes):
    """A spec on digits in {train,val,test}/<name>, `names` of the digits 0, 1 ..."""
    chosen = [i for i in range(len(Y)) if Y[i] < len(names)][: sum(sizes.values())]
    splits = [split for split, size in sizes.items() for _ in range(size)]
    for split, i in zip(splits, chosen, strict=True):
        image = np.round(X[i].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        write_png(folder / "images" / split / names[Y[i]] / f"{i:03d}.png", image)
    return FOLDERS.replace("ROOT", str(folder)).replace('mode = "train"', 'mode = "umap"') + (
        '[umap]\nmethod = "pca"\ndpi = 50\n'
    )


@pytest.mark.parametrize("count", [2, 6])
def test_a_checkpoint_on_data_with_other_classes(tmp_path, capsys, count):
    """Features and labels are those of the data, predictions have the model's own names."""
    trained = digit_folders(tmp_path / "a", ("nil", "one", "two"), train=30, val=10)
    run = ["mode=train", "training.epochs=1"]
    assert command(tmp_path, *run, spec=trained) == 0
    best = next((tmp_path / "exp").rglob("best.pt"))
    names = [f"digit {k}" for k in range(count)]
    other = digit_folders(tmp_path / "b", names, train=30, val=10)
    asked = [f"extract.checkpoint={best}", f"umap.output_dir={tmp_path / 'out'}"]
    capsys.readouterr()
    assert command(tmp_path, *asked, "umap.color_by=prediction", spec=other) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "other classes" in line]
    assert len(lines) == 1 and "(multiclass: nil, one, two)" in lines[0]
    table = rows(tmp_path / "out" / "pca_prediction.csv")
    assert list(table[0]) == ["id", "x", "y", "prediction", "label", "split"]
    assert {row["prediction"] for row in table} <= {"nil", "one", "two"}
    assert {row["label"] for row in table} == set(names)
    assert all(f"/{row['label']}/" in row["id"] for row in table)
    assert command(tmp_path, *asked, "umap.split=val", spec=trained) == 0  # its own classes
    assert "other classes" not in capsys.readouterr().out
    assert "mistakes" in rows(tmp_path / "out" / "pca_val.csv")[0]


@pytest.mark.parametrize(
    ("head", "method"),
    [
        ("classification", "none"),
        ("abmil", "avg"),
        pytest.param("classification", "avg", marks=pytest.mark.slow),
        pytest.param("abmil", "none", marks=pytest.mark.slow),
    ],
)
def test_features_and_predictions_are_of_one_pass(tmp_path, monkeypatch, method, head):
    """Each sample is decoded once; predictions are those of mode infer, features of mode extract,
    also where the head takes other vectors than those that are drawn."""
    spec = digit_folders(tmp_path / "a", ("nil", "one", "two"), train=30, val=10)
    spec += f'[model.head]\nhead_type = "{head}"\n'
    chosen = [f"extract.method={method}", "extract.precision=32", "dataloading.num_workers=0"]
    spec = spec.replace("epochs = 2", "epochs = 1")
    assert command(tmp_path, "mode=train", spec=spec) == 0
    fetched, fetch = [], FileSource.fetch

    def counting(self, rows):
        fetched.extend(rows.tolist())
        return fetch(self, rows)

    monkeypatch.setattr(FileSource, "fetch", counting)
    path = tmp_path / "map.toml"
    loaded = load_checked(path, [f"exp_dir={tmp_path / 'exp'}", *chosen])
    ranks = dist.Ranks(0, 1, 0, torch.device("cpu"))
    found = samples_of_model(loaded, Umap(split="val"), ranks, 0)
    assert sorted(fetched) == [0, *range(10)]  # the first one again, to know that it is an image
    out = f"extract.output_dir={tmp_path / 'out'}"
    assert command(tmp_path, "mode=extract", "extract.split=val", *chosen[:2], out, spec=spec) == 0
    with h5py.File(next((tmp_path / "out").glob("*.h5"))) as file:
        np.testing.assert_array_equal(found.features, file["features"])
    assert command(tmp_path, "mode=infer", "infer.split=val", spec=spec) == 0
    saved = rows(next((tmp_path / "exp").rglob("predictions_val.csv")))
    assert [row["id"] for row in saved] == found.ids
    scores = [[float(row[f"p_{name}"]) for name in ("nil", "one", "two")] for row in saved]
    np.testing.assert_allclose(found.said.scores.values, scores, rtol=1e-5, atol=1e-7)


@pytest.mark.processes
def test_the_first_of_several_ranks_draws_alone(tmp_path):
    """Images and feature files; the others wait and fail with it."""
    write(tmp_path / "t.h5", features=X[:40], labels=Y[:40])
    images, vectors = tmp_path / "images.toml", tmp_path / "vectors.toml"
    images.write_text(ENCODER)
    vectors.write_text(OWN.replace("FOLDER", str(tmp_path)))

    def run(spec, *overrides, code=0):
        fixed = [f"exp_dir={tmp_path / 'exp'}", f"umap.output_dir={tmp_path / spec.stem}"]
        return glovita_ranks(spec, "--override", *fixed, *overrides, ranks=2, code=code)

    out = run(images, "extract.source=encoder", "umap.max_samples=40")
    assert out.count("trustworthiness") == 1
    assert len(rows(tmp_path / "images" / "pca.csv")) == 40
    assert 'umap.split = "test"' in run(vectors, "umap.split=test", code=2)


OWN = SPEC + (
    '[data]\ndataset = "precomputed_features"\ndata_root_dir = "FOLDER"\n'
    'train_features_file = "t.h5"\n'
    '[model.encoder]\nencoder_type = "precomputed"\nfeature_dim = 64\n'
)


@pytest.mark.parametrize("bags", ["", "mean", "instances"])
def test_standardised_features_are_what_a_model_takes(tmp_path, monkeypatch, bags):
    """Moments of the whole train split, whichever samples and split are drawn."""
    scale = np.linspace(0.1, 50, 64, dtype=np.float32)
    for name, part in (("t", slice(0, 40)), ("v", slice(40, 60))):
        table = {"bag_lengths": np.full(len(X[part]) // 5, 5)} if bags else {}
        labels = Y[part][::5] if bags else Y[part]
        write(tmp_path / f"{name}.h5", features=X[part] * scale + scale, labels=labels, **table)
    drawn = []

    def seen(features, *others, **options):
        drawn.append(features)
        return project(features, *others, **options)

    monkeypatch.setattr("glovita_lib.run_umap.project", seen)
    spec = OWN.replace("FOLDER", str(tmp_path))
    asked = ["data.val_features_file=v.h5", "umap.split=val", "data.standardize=true"]
    asked += [f"umap.bags={bags}"] if bags else []
    assert command(tmp_path, *asked, spec=spec) == 0
    train = (X[:40] * scale + scale).astype(np.float64)
    std = train.std(0)
    expected = (X[40:60] * scale + scale - train.mean(0)) / np.where(std > 0, std, 1)
    if bags == "mean":
        expected = expected.reshape(4, 5, 64).mean(1)
    np.testing.assert_allclose(drawn[0], expected, rtol=1e-4, atol=1e-4)
    assert drawn[0].dtype == np.float32
    assert json.loads(next((tmp_path / "exp").rglob("pca_val.json")).read_text())["standardized"]
    assert "standardised features" in next((tmp_path / "exp").rglob("pca_val.svg")).read_text()


def test_standardised_features_without_a_train_split(tmp_path, capsys):
    write(tmp_path / "v.h5", features=X[:20], labels=Y[:20])
    spec = OWN.replace("FOLDER", str(tmp_path)).replace("train_features", "val_features")
    spec = spec.replace("t.h5", "v.h5")
    assert command(tmp_path, "data.standardize=true", spec=spec) == 2
    error = capsys.readouterr().err.strip()
    assert "data.standardize takes the mean and deviation of the train split" in error
    assert "\n" not in error


def test_a_data_set_of_features_draws_its_own(tmp_path):
    write(tmp_path / "t.h5", features=X[:40], labels=Y[:40])
    write(tmp_path / "v.h5", features=X[40:60], labels=Y[40:60])
    spec = OWN.replace("FOLDER", str(tmp_path)).replace(
        "[model", 'val_features_file = "v.h5"\n[model'
    )
    assert command(tmp_path, spec=spec) == 0
    table = rows(next((tmp_path / "exp").rglob("pca.csv")))
    assert [row["split"] for row in table] == ["train"] * 40 + ["val"] * 20
    assert command(tmp_path, "umap.split=val", spec=spec) == 0
    assert len(rows(next((tmp_path / "exp").rglob("pca_val.csv")))) == 20
    assert command(tmp_path, "umap.split=test", spec=spec) == 2


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    path = write(tmp_path / "v.h5", features=X[:300], labels=Y[:300])
    spec = tmp_path / "map.toml"
    spec.write_text(SPEC)
    assert glovita.main([str(spec), "--dry-run", "--override", f"umap.input={path}"]) == 0
    assert "50 of 300 samples" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["map.toml", "v.h5"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_samples(tmp_path, count):
    path = write(tmp_path / "v.h5", features=X[:count], labels=Y[:count])
    assert command(tmp_path, f"umap.input={path}", "umap.method=umap") == 0
    assert len(rows(tmp_path / "umap_plots" / "v" / "umap.csv")) == count


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["umap.input=nowhere.h5"], '"nowhere.h5" does not exist'),
        (["umap.input=FILE", "umap.split=test"], "umap.split"),
        (["umap.input=FILE", "umap.color_by=prediction"], "predictions of mode infer"),
        ([*OWN_FEATURES, "umap.color_by=prediction"], "predictions of mode infer"),
        (["umap.input=FILE", "umap.color_by=column"], "needs umap.color_file"),
        (["umap.input=FILE", "umap.color_column=a"], "umap.color_column"),
        (["umap.input=FILE", "umap.color_file=a.csv"], "name the column"),
        (["umap.input=FILE", "umap.color_file=a.csv", "umap.color_column=b"], "no such file"),
        (["umap.input=FILE", "umap.min_dist=0.5"], "min_dist: 0.5 would be ignored"),
        (["umap.input=FILE", "umap.perplexity=5"], "perplexity"),
        (["umap.input=FILE", "umap.pca=5"], "umap.pca: 5 would be ignored"),
        (["umap.bags=instances"], "umap.bags"),
        (["umap.input=FILE", "umap.method=umpa"], 'did you mean "umap"'),
        (["umap.input=FILE", "umap.n_neighbors=1"], "n_neighbors"),
        (["umap.input=BAD"], "bad.h5: NaN or infinite features in 2 samples (3, 5)"),
        (["umap.input=EMPTY"], "no sample"),
        (["umap.input=SPEC"], "map.toml"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, overrides, message):
    bad = X[:10].copy()
    bad[[3, 5], 7] = np.nan
    places = {
        "FILE": write(tmp_path / "v.h5", features=X[:10], labels=Y[:10]),
        "BAD": write(tmp_path / "bad.h5", features=bad, labels=Y[:10]),
        "EMPTY": write(tmp_path / "empty.h5", features=X[:0], labels=Y[:0]),
        "SPEC": tmp_path / "map.toml",
    }
    for name, path in places.items():
        overrides = [text.replace(f"={name}", f"={path}") for text in overrides]
    assert command(tmp_path, *overrides) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "umap_plots").exists()


def test_missing_umap_learn_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "v.h5", features=X[:10], labels=Y[:10])
    monkeypatch.setattr("glovita_lib.run_umap.util.find_spec", lambda name: None)
    monkeypatch.setattr("glovita_lib.run_umap.find_samples", lambda *a: pytest.fail("worked"))
    assert command(tmp_path, f"umap.input={path}", "umap.method=umap") == 2
    assert "pip install umap-learn" in capsys.readouterr().err
    load_checked(tmp_path / "map.toml", ["umap.method=umap"])  # and nothing else needs it


def test_an_unknown_layout_of_features_is_refused(tmp_path):
    path = write(tmp_path / "v.h5", features=np.arange(10), labels=Y[:10])
    with pytest.raises(UserError, match="features are floats"):
        samples(path)


# ---------------------------------------------------------------------- the page's program

STAGE = """
const fs = require("fs"), page = fs.readFileSync(process.argv[2], "utf8");
const data = page.match(/id="data">([^]*?)<\\/script>/)[1];
const program = page.match(/<script>\\n([^]*?)<\\/script>/)[1];
const calls = { fill: 0, stroke: 0, drawImage: [], styles: new Set() };
const pen = new Proxy({}, {
  get: (_, key) => key === "drawImage" ? (...a) => calls.drawImage.push(a.slice(1))
    : () => { calls[key] = (calls[key] || 0) + 1 },
  set: (_, key, value) => { if (key === "fillStyle") calls.styles.add(value); return true } });
class Element {
  constructor() {
    this.children = []; this.style = {}; this.dataset = {}; this.listeners = {};
    this.names = new Set(); this.textContent = ""; this.offsetWidth = this.offsetHeight = 50;
    this.classList = { add: n => this.names.add(n), remove: n => this.names.delete(n),
      toggle: (n, on) => on ? this.names.add(n) : this.names.delete(n) };
  }
  set innerHTML(html) {
    this.html = html;
    this.children = [...html.matchAll(/<(div|span)/g)].map(() => new Element());
    if (html.includes('id="ends"')) {
      elements.bar = this.children[0]; elements.ends = new Element();
      elements.ends.children = [new Element(), new Element()];
    }
  }
  append(...parts) { this.children.push(...parts) }
  replaceChildren(...parts) { this.children = parts }
  addEventListener(name, call) { this.listeners[name] = call }
  getBoundingClientRect() { return { left: 0, top: 0, width: 800, height: 600 } }
  setPointerCapture() {}
  getContext() { return pen }
  text() {
    return this.textContent + this.children.map(c => c.text ? c.text() : c).join("");
  }
}
const elements = {};
for (const id of ["plot", "front", "ring", "stage", "card", "by", "find", "legend", "hint", "in",
  "out", "home", "data"]) elements[id] = new Element();
elements.data.textContent = data;
globalThis.document = { getElementById: id => elements[id], createElement: () => new Element() };
globalThis.window = { devicePixelRatio: 2, addEventListener() {} };
globalThis.Image = class {};
globalThis.Option = class { constructor(text, value) { this.text = () => text } };
globalThis.requestAnimationFrame = call => call();
const waits = [];
globalThis.setTimeout = (call, wait, ...given) => { waits.push(wait); call(...given) };
globalThis.clearTimeout = () => {};
eval(program);
const fire = (name, x, y, more) =>
  elements.plot.listeners[name]({ clientX: x, clientY: y, pointerId: 1, preventDefault() {},
    deltaMode: 0, type: name, ...more });
const painted = act => { calls.fill = 0; act(); return calls.fill };
const cards = () => {
  const seen = new Set();
  for (let x = 0; x < 800; x += 8) for (let y = 0; y < 600; y += 8) {
    fire("pointermove", x, y);
    if (elements.card.style.display === "block") seen.add(elements.card.text());
  }
  return [...seen];
};
const rows = () => elements.legend.children;
const result = { all: painted(() => elements.home.onclick()), cards: cards(),
  legend: rows().map(r => r.text()), colours: [...calls.styles], images: calls.drawImage.length };
result.withoutFirst = painted(() => rows()[0].onclick());
result.again = painted(() => rows()[0].onclick());
result.alone = painted(() => { rows()[1].onclick(); rows()[1].onclick(); rows()[1].ondblclick() });
result.off = rows().map(r => r.names.has("off"));
result.everything = painted(() => rows()[1].ondblclick());
result.sought = painted(() => elements.find.oninput({ target: { value: "SCAN 7" } }));
result.hovered = painted(() => {
  for (let x = 0; x < 800; x += 8) fire("pointermove", x, 300);
});
result.waits = [...waits];
result.found = elements.hint.textContent;
elements.find.oninput({ target: { value: "" } });
result.zoomed = painted(() => { for (let i = 0; i < 30; i++) fire("wheel", 790, 590,
  { deltaY: -300 }) });
result.home = painted(() => elements.home.onclick());
fire("pointerdown", 100, 100);
result.moved = painted(() => fire("pointermove", 5000, 100));
fire("pointerup", 5000, 100);
if (elements.by.children.length > 1) {
  elements.by.onchange({ target: { value: "1" } });
  result.second = { legend: elements.legend.html || rows().map(r => r.text()),
    ends: elements.ends ? elements.ends.children.map(c => String(c.textContent)) : null };
}
console.log(JSON.stringify(result));
"""


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_shows_hides_finds_and_moves(tmp_path):
    ids, ink = [f"scan {i}" for i in range(12)], X[:12].mean(1)
    path = write(tmp_path / "v.h5", features=X[:12], labels=Y[:12] % 3, ids=ids)
    colors = tmp_path / "ink.csv"
    colors.write_text("id,ink\n" + "".join(f"scan {i},{v}\n" for i, v in enumerate(ink)))
    colored = [f"umap.color_file={colors}", "umap.color_column=ink"]
    assert command(tmp_path, f"umap.input={path}", *colored) == 0
    page, stage = tmp_path / "umap_plots" / "v" / "pca.html", tmp_path / "stage.js"
    stage.write_text(STAGE)
    done = subprocess.run(
        ["node", str(stage), str(page)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    sizes = np.bincount(Y[:12] % 3).tolist()
    assert shown["all"] == 12 and shown["legend"] == [f"{k}{n}" for k, n in enumerate(sizes)]
    assert len(shown["cards"]) == 12  # each sample has its card, with id and all properties
    assert any(re.fullmatch(r"id scan 7label 1ink [\d.]+", card) for card in shown["cards"])
    assert {"#0072B2", "#D55E00", "#009E73"} <= set(shown["colours"])
    assert shown["withoutFirst"] == 12 - sizes[0] and shown["again"] == 12
    assert shown["alone"] >= sizes[1] and shown["off"] == [True, False, True]
    assert shown["everything"] == 12 and shown["found"] == "1 found"
    assert shown["sought"] == 1 and shown["hovered"] == 0 and shown["waits"] == [150]
    assert shown["zoomed"] < shown["home"] == 12 and shown["moved"] == 0
    ends = [float(end) for end in shown["second"]["ends"]]
    assert ends == pytest.approx([ink.min(), ink.max()], abs=float(ink.max() - ink.min()) / 1000)


@pytest.mark.processes
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_of_images_shows_thumbnails_below_the_pointer(tmp_path):
    overrides = ["extract.source=encoder", "umap.max_samples=30", "umap.split=val"]
    assert command(tmp_path, *overrides, spec=ENCODER) == 0
    page, stage = next((tmp_path / "exp").rglob("pca_val.html")), tmp_path / "stage.js"
    stage.write_text(STAGE)
    done = subprocess.run(
        ["node", str(stage), str(page)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] >= 25
