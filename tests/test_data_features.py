"""Feature files as a data set: layouts, labels, splits, and what is wrong with them."""

import csv
import json
import re
import unicodedata
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from glovita_lib import data_features  # noqa: F401
from glovita_lib.data import VectorSamples
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.resolved import resolve_spec
from glovita_lib.spec_data import PrecomputedData
from glovita_lib.spec_root import Root

DIGITS = load_digits()
X, Y = DIGITS.data.astype(np.float32), DIGITS.target
LENGTHS = np.array([3, 1, 7, 4, 5, 10, 2, 8, 6, 4])


def write(path, **datasets):
    attributes = datasets.pop("attributes", {})
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        file.attrs.update(attributes)
    return path.name


def build(tmp_path, **fields):
    return build_data(PrecomputedData(data_root_dir=str(tmp_path), **fields), seed=0)


def ragged(tmp_path, name="bags.h5", pointers="bag_ptr", **datasets):
    ptr = np.concatenate([[0], np.cumsum(LENGTHS)])
    table = {"bag_ptr": ptr} if pointers == "bag_ptr" else {"bag_lengths": LENGTHS}
    content = {"features": X[: LENGTHS.sum()], "labels": np.arange(10) % 2, **table} | datasets
    return write(tmp_path / name, **content)


def test_vectors(tmp_path):
    train = write(tmp_path / "a.h5", features=X[:100], labels=Y[:100])
    val = write(tmp_path / "b.h5", features=X[100:150], labels=Y[100:150])
    data = build(tmp_path, train_features_file=train, val_features_file=val)
    assert data.subtask == "multiclass" and data.class_names == tuple("0123456789")
    assert data.samples == VectorSamples(width=64) and list(data.splits) == ["train", "val"]
    split = data.splits["val"]
    np.testing.assert_array_equal(split.targets, Y[100:150])
    np.testing.assert_array_equal(split.source.fetch(np.array([7, 3])), X[[107, 103]])


@pytest.mark.parametrize("pointers", ["bag_ptr", "bag_lengths"])
def test_ragged_bags(tmp_path, pointers):
    data = build(tmp_path, train_features_file=ragged(tmp_path, pointers=pointers))
    source = data.splits["train"].source
    bags = source.collate(source.fetch(np.array([5, 1])))
    assert bags.lengths.tolist() == [10, 1]
    expected = np.concatenate([X[20:30], X[3:4]])
    assert torch.equal(bags.features, torch.from_numpy(expected))
    assert source.nbytes() == LENGTHS.sum() * 64 * 4


def test_fixed_bags_and_other_keys(tmp_path):
    name = write(tmp_path / "f.h5", x=X[:60].reshape(20, 3, 64), y=Y[:20])
    data = build(tmp_path, train_features_file=name, features_key="x", labels_key="y")
    (bag,) = data.splits["train"].source.fetch(np.array([4]))
    np.testing.assert_array_equal(bag, X[12:15])


def test_whole_numbers_in_a_column_may_be_classes_or_targets(tmp_path):
    labels = np.arange(6)[:, None] % 3
    write(tmp_path / "all.h5", features=X[:6], labels=labels)
    given = {"features_file": "all.h5", "split_source": "kfold", "n_folds": 3}
    with pytest.raises(UserError, match=r"shape \(6, 1\) are whole numbers; store classes as"):
        build(tmp_path, **given)
    data = build(tmp_path, **given, subtask="regression")
    assert data.subtask == "regression" and data.splits["train"].targets.shape[1] == 1


def test_classes_that_train_lacks_are_reported(tmp_path):
    for split, labels in (("train", [0, 1, 1, 0, 1, 0]), ("val", [0, 1, 2, 4, 4, 1])):
        write(tmp_path / f"{split}.h5", features=X[:6], labels=np.array(labels))
    files = {"train_features_file": "train.h5", "val_features_file": "val.h5"}
    assert build(tmp_path, **files).report == ["classes without a training sample: 2, 3, 4"]


def test_the_table_says_which_samples_there_are(tmp_path):
    """A folder may hold more slides than a study has."""
    names = np.array(list("abcdef"), object)
    groups = np.array(list("uuvvww"), object)
    write(tmp_path / "all.h5", features=X[:6], ids=names, groups=groups)
    (tmp_path / "labels.csv").write_text("id,label\nf,1\nb,0\nd,1\nx,0\n")
    given = {"features_file": "all.h5", "labels_file": "labels.csv", "split_source": "kfold"}
    data = build(tmp_path, **given, n_folds=3)
    assert data.report[:2] == [
        f"3 of 6 samples of {tmp_path}/all.h5 are not in labels.csv: not used",
        "1 rows of labels.csv have no sample, e.g. x: not used",
    ]
    expected = {"b": (0, X[1], "u"), "d": (1, X[3], "v"), "f": (1, X[5], "w")}
    found = {}
    for split in data.splits.values():
        for row, name in enumerate(split.ids):
            found[name] = (
                split.targets[row],
                split.source.fetch(np.array([row]))[0],
                split.groups[row],
            )
    for name, (label, vector, group) in expected.items():
        assert found[name][0] == label and found[name][2] == group
        np.testing.assert_array_equal(found[name][1], vector)
    (tmp_path / "labels.csv").write_text("id,label\na.h5,1\nb.h5,0\n")
    with pytest.raises(
        UserError, match=r"no row for any sample .* its ids are a, b, c .* a.h5, b.h5"
    ):
        build(tmp_path, **given, n_folds=3)


@pytest.mark.parametrize("missing", ["NA", "n/a", "None", "?", "null", "#N/A"])
def test_words_for_a_missing_label_are_no_class(missing, tmp_path):
    cells = ["a", "b", missing, "a", "b", "b"]
    write(tmp_path / "all.h5", features=X[:6], ids=np.array(list("uvwxyz"), object))
    rows = [f"{i},{cell}" for i, cell in zip("uvwxyz", cells, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows]))
    given = {"features_file": "all.h5", "labels_file": "labels.csv", "split_source": "kfold"}
    with pytest.raises(UserError, match="there is no label"):
        build(tmp_path, **given, n_folds=3)
    named = build(tmp_path, **given, n_folds=3, class_names=("a", "b", missing))
    assert sum(map(len, named.splits.values())) == 6


def test_equal_ids_of_several_files_are_reported(tmp_path):
    for split, first in (("train", 0), ("val", 4)):
        ids = np.array([str(100 + number) for number in range(first, first + 6)], object)
        write(tmp_path / f"{split}.h5", features=X[:6], labels=Y[:6] % 2, ids=ids)
    files = {"train_features_file": "train.h5", "val_features_file": "val.h5"}
    assert build(tmp_path, **files).report == ["2 ids are in train and val, e.g. 104"]
    for split in ("train", "val"):
        write(tmp_path / f"{split}.h5", features=X[:6], labels=Y[:6] % 2)
    assert build(tmp_path, **files).report == []  # row numbers


def test_an_empty_cell_is_no_class(tmp_path):
    write(tmp_path / "all.h5", features=X[:6], ids=np.array(list("abcdef"), object))
    tables = {
        "label": "id,label,p\na,1,x\nb,2,x\nc,,y\nd,1,y\ne, ,z\nf,2,z\n",
        "p": "id,label,p\na,1,\nb,2,x\nc,1,y\nd,1,y\ne,2,\nf,2,z\n",
    }
    for column, text in tables.items():
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(UserError, match=f"column {column} is empty for 2 samples"):
            build(tmp_path, features_file="all.h5", labels_file="labels.csv", group_column="p",
                  split_source="kfold", n_folds=3)  # fmt: skip


def test_a_folder_of_bags(tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(6):
        if number % 2:
            torch.save(torch.from_numpy(X[number : number + 3]), folder / f"s{number}.pt")
        else:
            write(
                folder / f"s{number}.h5", features=X[number : number + 4][None], coords=np.eye(4, 2)
            )
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "label", "split", "patient"])
        for number in range(6):
            rows.writerow([f"s{number}", "ab"[number % 2], ["train", "val"][number > 3], number])
    data = build(
        tmp_path,
        features_file="slides",
        labels_file="labels.csv",
        split_source="csv",
        group_column="patient",
    )
    assert data.class_names == ("a", "b") and data.splits["train"].ids == ["s0", "s1", "s2", "s3"]
    source = data.splits["train"].source
    assert [len(bag) for bag in source.fetch(np.arange(4))] == [4, 3, 4, 3]
    assert source.coords(0).shape == (4, 2) and source.coords(1) is None


def test_label_kinds(tmp_path):
    cases = {
        "multilabel": np.stack([Y[:50] % 2, Y[:50] > 4], 1).astype(np.uint8),
        "regression": Y[:50] / 3,
    }
    for subtask, labels in cases.items():
        name = write(tmp_path / f"{subtask}.h5", features=X[:50], labels=labels)
        data = build(tmp_path, train_features_file=name)
        assert data.subtask == subtask
        expected = labels.reshape(50, -1)
        np.testing.assert_array_equal(data.splits["train"].targets, expected)
    name = write(
        tmp_path / "names.h5",
        features=X[:4],
        labels=np.array(["cat", "dog", "cat", "eel"], "S"),
        ids=np.array(["p", "q", "r", "s"], "S"),
    )
    data = build(tmp_path, train_features_file=name)
    assert data.class_names == ("cat", "dog", "eel")
    assert data.splits["train"].targets.tolist() == [0, 1, 0, 2]
    assert data.splits["train"].ids == ["p", "q", "r", "s"]


def test_kfold_by_group_is_disjoint_and_covers_all(tmp_path):
    groups = np.array([f"g{i // 5}" for i in range(200)], "S")
    name = write(tmp_path / "f.h5", features=X[:200], labels=Y[:200] % 2, groups=groups)
    tests = []
    for fold in range(4):
        data = build(tmp_path, features_file=name, split_source="kfold", n_folds=4, fold=fold)
        parts = [set(split.groups) for split in data.splits.values()]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        tests += data.splits["test"].ids
    assert sorted(map(int, tests)) == list(range(200))


def test_listed_splits_with_folds(tmp_path):
    name = write(tmp_path / "f.h5", features=X[:6], labels=Y[:6] % 2)
    folds = [{"train": [0, 1], "val": [2]}, {"train": [3, 4], "val": [5]}]
    (tmp_path / "splits.json").write_text(json.dumps(folds))
    data = build(tmp_path, features_file=name, split_source="splits_json", fold=1)
    assert data.splits["train"].ids == ["3", "4"]
    with pytest.raises(UserError, match="has the folds 0, 1"):
        build(tmp_path, features_file=name, split_source="splits_json", fold=2)
    (tmp_path / "splits.json").write_text(json.dumps({"a": [0, 1], "b": [2], "c": ["3", 4, 5]}))
    data = build(tmp_path, features_file=name, split_source="splits_json", fold="b")
    assert {split: part.ids for split, part in data.splits.items()} == {
        "train": ["0", "1"],
        "val": ["3", "4", "5"],
        "test": ["2"],
    }


def test_data_fraction_cuts_train_only(tmp_path):
    bags = ragged(tmp_path)
    val = ragged(tmp_path, "val.h5")
    data = build(tmp_path, train_features_file=bags, val_features_file=val, data_fraction=0.5)
    assert len(data.splits["train"]) == 5 and len(data.splits["val"]) == 10
    source = data.splits["train"].source
    assert source.collate(source.fetch(np.arange(5))).lengths.sum() > 0


BAD = {
    "truncated": ("bytes", "truncated"),
    "nan": ({"features": np.where(X[:43] == X[20], np.nan, X[:43])}, "NaN or infinite"),
    "inf16": ({"features": np.full((43, 64), np.inf, np.float16)}, "NaN or infinite"),
    "pointer ends": ({"bag_ptr": np.arange(11)}, "must rise from 0 to the 50 instances"),
    "pointer falls": (
        {"bag_ptr": np.array([0, 9, 4, 50, 50, 50, 50, 50, 50, 50, 50])},
        "falls after bag 1",
    ),
    "empty bag": (
        {"bag_ptr": np.array([0, 4, 4, 20, 30, 35, 40, 42, 44, 46, 50])},
        "no instance",
    ),
    "labels": ({"labels": np.arange(9)}, "has 9 rows, the file has 10 samples"),
    "range": (
        {"labels": np.arange(10) - 1},
        r'bags.h5: label not in class list: "-1" \(0\); classes: 0, 1, 2',
    ),
    "integers": ({"features": np.ones((50, 64), int)}, "features are floats"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(tmp_path, case):
    change, message = BAD[case]
    if change == "bytes":
        name = ragged(tmp_path)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-2000])
    elif case in ("nan", "inf16"):
        name = write(tmp_path / "f.h5", labels=Y[:43], **change)
    else:
        name = ragged(tmp_path, **change)
    with pytest.raises(UserError, match=message) as raised:
        build(tmp_path, train_features_file=name)
    first, *names = str(raised.value).splitlines()  # of many samples all names below
    assert not [line for line in names if line[:2] != "  " and line not in first]


def test_num_classes_and_absent_labels(tmp_path):
    name = write(tmp_path / "f.h5", features=X[:10], labels=np.arange(10))
    with pytest.raises(UserError, match="num_classes = 3, but .* 10 classes"):
        build(tmp_path, train_features_file=name, num_classes=3)
    assert build(tmp_path, train_features_file=name, num_classes=10).outputs == 10
    name = write(tmp_path / "g.h5", features=X[:10])
    with pytest.raises(UserError, match="no dataset 'labels'"):
        build(tmp_path, train_features_file=name)


@pytest.mark.parametrize("wrong", ["gone", "damaged", "NaN"])
def test_the_file_of_a_split_that_is_not_asked_for_may_be_wrong(tmp_path, wrong):
    names = np.array(["b", "c", "a"], "S")
    train = write(tmp_path / "a.h5", features=X[:3], labels=names)
    test = write(tmp_path / "b.h5", features=X[3:5], labels=names[:2])
    fields = {"train_features_file": train, "test_features_file": test}
    spec = PrecomputedData(data_root_dir=str(tmp_path), **fields)

    def asked():
        return build_data(spec, seed=0, trains=False, wanted=("test", "val"))

    whole = asked()  # the labels of train tell which classes there are
    assert whole.class_names == ("a", "b", "c") and whole.splits["test"].targets.tolist() == [1, 2]
    if wrong == "NaN":
        write(tmp_path / "a.h5", features=X[:3] * np.nan, labels=names)
    elif wrong == "gone":
        (tmp_path / "a.h5").unlink()
    else:
        (tmp_path / "a.h5").write_bytes(b"damaged")
    part = asked()
    assert part.splits["test"].source.fetch(np.array([1])).tolist() == [X[4].tolist()]
    assert part.class_names == (("a", "b", "c") if wrong == "NaN" else ("b", "c"))
    with pytest.raises(UserError, match="a.h5"):
        build_data(spec, seed=0, trains=False, wanted=("train",))
    with pytest.raises(UserError, match="a.h5"):
        build_data(spec, seed=0)


def test_a_group_in_two_splits_is_refused(tmp_path):
    groups = np.array(["p1", "p2"], "S")
    a = write(tmp_path / "a.h5", features=X[:2], labels=Y[:2], groups=groups)
    b = write(tmp_path / "b.h5", features=X[2:4], labels=Y[:2], groups=np.array(["p3", "p1"], "S"))
    c = write(tmp_path / "c.h5", features=X[4:6], labels=Y[:2])  # of other patients, unknown ones
    with pytest.raises(UserError, match=r"1 groups are in more than one .* p1 \(train: 0, val: 1"):
        build(tmp_path, train_features_file=a, val_features_file=b, test_features_file=c)
    assert len(build(tmp_path, train_features_file=a, val_features_file=c).splits) == 2


def test_a_sample_in_two_splits_is_refused_but_test_may_be_val(tmp_path):
    a, b = (write(tmp_path / f"{x}.h5", features=X[:6], labels=Y[:6] % 2) for x in "ab")
    with pytest.raises(UserError, match="6 samples are in the splits train and val: 0, 1, 2, 3, 4"):
        build(tmp_path, train_features_file=a, val_features_file=a)
    data = build(tmp_path, train_features_file=a, val_features_file=b, test_features_file=b)
    assert [len(split) for split in data.splits.values()] == [6, 6, 6]
    (tmp_path / "splits.json").write_text(json.dumps({"train": [0, 1, 2], "val": ["2", "3"]}))
    with pytest.raises(UserError, match="1 samples are in the splits train and val: 2; keep each"):
        build(tmp_path, features_file=a, split_source="splits_json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train": [0, 1], "valid": [2]}, "'valid' is no split; there are train, val and test"),
        ({"train": [0, 7], "val": [2]}, r"1 ids of train are not in .* \(7\); what is there is"),
        ({"train": [0], "val": ["S1", "S2"]}, r"2 ids of val are not in .*f.h5 \(S1, S2\)"),
        ({"train": [0, 1, 0], "val": [2]}, "train lists '0' twice"),
    ],
)
def test_split_files_that_do_not_fit(tmp_path, content, said):
    name = write(tmp_path / "f.h5", features=X[:6], labels=Y[:6] % 2)
    (tmp_path / "splits.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        build(tmp_path, features_file=name, split_source="splits_json")


NAMED = {
    "empty cells": "column label is empty for 25 samples",
    "no such ids": "25 ids of val are not in",
    "listed twice": "val lists '5' twice",
    "rows twice": "id '5' occurs twice",
    "equal ids": "is that of 2 samples",
    "not finite": "NaN or infinite features in 25 samples",
    "in two splits": "25 samples are in the splits train and val",
    "no class": "label not in class list",
    "control": "with line ends or other control characters",
}


@pytest.mark.parametrize("case", NAMED)
def test_all_bad_names_are_in_the_error(tmp_path, case):
    """Those of 25 of 30 samples, with the heading again below them."""
    names = [str(number) for number in range(30)]
    bad, features = names[5:], X[:30].copy()
    labels = dict.fromkeys(names, "1") | dict.fromkeys(names[::2], "0")
    splits, stored = {"train": names[:5], "val": list(bad)}, list(names)
    match case:
        case "empty cells":
            labels |= dict.fromkeys(bad, "")
        case "no class":
            labels |= {name: f"w{name}" for name in bad}
        case "not finite":
            features[5:, 0] = np.nan
        case "control":
            splits["val"] = [f"{name}\n" for name in bad]
        case "no such ids":
            splits["val"] = [f"z{name}" for name in bad]
        case "listed twice":
            splits["val"] *= 2
        case "in two splits":
            splits["train"] += bad
        case "equal ids":
            stored += bad
    file = write(tmp_path / "f.h5", features=np.resize(features, (len(stored), 64)), ids=stored)
    rows = [*names, *(bad if case == "rows twice" else [])]
    lines = "\n".join(f"{name},{labels[name]}" for name in rows)
    (tmp_path / "labels.csv").write_text(f"id,label\n{lines}\n")
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    fields = {"split_source": "splits_json", "labels_file": "labels.csv", "class_names": "01"}
    with pytest.raises(UserError, match=NAMED[case]) as caught:
        data = build(tmp_path, features_file=file, subtask="multiclass", **fields)
        for split in data.splits.values():
            split.source.check()
    first, *below, last = str(caught.value).splitlines()
    assert NAMED[case] in first and NAMED[case] in last and len(below) == 25
    assert {re.search(r"\d+", line)[0] for line in below} == set(bad)


def test_what_a_mode_does_not_need_of_a_split_file_may_be_elsewhere(tmp_path):
    """A cohort holds the test samples alone; training, and what names none, needs all."""
    name = write(tmp_path / "f.h5", features=X[:6], labels=Y[:6] % 2)
    content = {"train": ["x", "y"], "val": [0, "z", 0], "test": [1, 2]}
    (tmp_path / "splits.json").write_text(json.dumps(content))
    spec = PrecomputedData(
        data_root_dir=str(tmp_path), features_file=name, split_source="splits_json"
    )
    data = build_data(spec, seed=0, trains=False, wanted=("test", "val"))
    assert {name: split.ids for name, split in data.splits.items()} == {
        "val": ["0"],
        "test": ["1", "2"],
    }
    for wanted in ((), ("val",), ("train",)):
        with pytest.raises(UserError, match="are not in .*f.h5|lists '0' twice"):
            build_data(spec, seed=0, trains=False, wanted=wanted)
    with pytest.raises(UserError, match=r"2 ids of train are not in"):
        build_data(spec, seed=0)


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_split_that_is_listed_without_a_sample(name, tmp_path):
    write(tmp_path / "f.h5", features=X[:6], labels=Y[:6] % 2)
    content = {"train": [0, 1], "val": [2], "test": [3]} | {name: []}
    (tmp_path / "splits.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the {name} split has no sample"):
        build(tmp_path, features_file="f.h5", split_source="splits_json")


@pytest.mark.parametrize("layout", ["vectors", "bags"])
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_digits_that_float32_rounds_away_are_said(layout, kind, tmp_path):
    """1.7e9 with deviation 30 comes in steps of 128; beside it columns that lose nothing."""
    draw = np.random.default_rng(0)
    values = np.stack([1.7e9 + 30 * draw.normal(size=60), draw.normal(size=60), np.full(60, 0.1)])
    given = {} if layout == "vectors" else {"bag_ptr": np.arange(0, 61, 5)}
    count = 60 if layout == "vectors" else 12
    write(tmp_path / "f.h5", features=values.T.astype(kind), labels=np.arange(count) % 2, **given)
    fields = {"data_root_dir": str(tmp_path), "features_file": "f.h5", "split_source": "kfold"}
    for standardize in (False, True):
        spec = PrecomputedData(**fields, standardize=standardize)
        data = build_data(spec, seed=0)
        head = {"head_type": "classification" if layout == "vectors" else "abmil"}
        root = msgspec.convert(
            {
                "mode": "train",
                "data": {"dataset": "precomputed_features", **fields, "standardize": standardize},
                "model": {"encoder": {"encoder_type": "precomputed"}, "head": head},
            },
            Root,
        )
        resolve_spec(root, data)
        said = [line for line in data.report if "float32" in line]
        assert len(said) == (kind is np.float64 and not standardize)
        for line in said:
            assert " 1 of 3 columns" in line and "(column 0: 1" in line
            assert "in steps of 128): set data.standardize = true" in line


def test_what_no_split_uses_is_reported(tmp_path):
    name = write(tmp_path / "f.h5", features=X[:6], labels=Y[:6] % 2)
    (tmp_path / "splits.json").write_text(json.dumps({"train": [0, 1, 2], "val": [3]}))
    data = build(tmp_path, features_file=name, split_source="splits_json")
    assert f"2 samples of {tmp_path}/f.h5 are in no split: not used" in data.report
    table = "id,label,split\n0,a,train\n1,b,train\n2,a,val\n3,b,\n4,b,test\n5,a,val\n9,a,val\n"
    (tmp_path / "labels.csv").write_text(table)
    given = {"features_file": name, "labels_file": "labels.csv", "split_source": "csv"}
    data = build(tmp_path, **given)
    assert data.report[:2] == [
        "1 rows of labels.csv have no sample, e.g. 9: not used",
        f"1 samples of {tmp_path}/f.h5 are in no split: not used",
    ]
    assert {key: split.ids for key, split in data.splits.items()} == {
        "train": ["0", "1"],
        "val": ["2", "5"],
        "test": ["4"],
    }
    (tmp_path / "labels.csv").write_text(table.replace("split", "part"))
    assert build(tmp_path, **given, split_column="part").splits["val"].ids == ["2", "5"]
    (tmp_path / "labels.csv").write_text(table.replace("a,train", "a,trian"))
    with pytest.raises(UserError, match=r"'trian' \(1 samples\) is no split"):
        build(tmp_path, **given)


@pytest.mark.parametrize("emptied", ["train", "val", "test"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_split_of_the_table_whose_ids_are_all_missing_is_refused(tmp_path, emptied, folder):
    ids = [f"s{i}" for i in range(9)]
    if folder:
        (tmp_path / "f.h5").mkdir()
        for name in ids:
            write(tmp_path / "f.h5" / f"{name}.h5", features=X[:2])
    else:
        write(tmp_path / "f.h5", features=X[:9], ids=np.array(ids, object))
    split_of = {name: ("train", "val", "test")[i // 3] for i, name in enumerate(ids)}
    rows = [
        f"{name.upper() if split == emptied else name},{'ab'[int(name[1]) % 2]},{split}"
        for name, split in split_of.items()
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label,split", *rows, "X,a,"]))
    given = {"features_file": "f.h5", "labels_file": "labels.csv", "split_source": "csv"}
    spec = PrecomputedData(data_root_dir=str(tmp_path), **given)
    with pytest.raises(
        UserError, match=rf"no sample of {emptied}: no id of its 3 rows \(S"
    ) as raised:
        build_data(spec, seed=0)
    assert len(str(raised.value).splitlines()) == 1
    other = "val" if emptied == "test" else "test"
    data = build_data(spec, seed=0, trains=False, wanted=(other,))  # which needs no other split
    assert set(data.splits) == {"train", "val", "test"} - {emptied}
    with pytest.raises(UserError, match=f"no sample of {emptied}"):
        build_data(spec, seed=0, trains=False, wanted=(emptied, other))


def test_ids_of_a_split_file_that_the_table_lacks(tmp_path):
    name = write(tmp_path / "f.h5", features=X[:6])
    (tmp_path / "splits.json").write_text(json.dumps({"train": [0, 1], "val": [5]}))
    (tmp_path / "labels.csv").write_text("id,label\n0,a\n1,b\n2,a\n")
    with pytest.raises(UserError, match=r"val are not in both .*f.h5 and labels.csv \(5\)"):
        build(tmp_path, features_file=name, labels_file="labels.csv", split_source="splits_json")


def test_tables_may_be_separated_by_semicolons(tmp_path):
    name = write(tmp_path / "f.h5", features=X[:6])
    rows = "".join(f"{number} ; {'ab'[number % 2]}\n" for number in range(6))
    (tmp_path / "labels.csv").write_text("id;label\n" + rows)
    given = {"labels_file": "labels.csv", "features_file": name, "split_source": "kfold"}
    data = build(tmp_path, **given, n_folds=3)
    assert data.class_names == ("a", "b")
    with pytest.raises(UserError, match='no column "lable"; did you mean "label"'):
        build(tmp_path, **given, label_column="lable")


def test_equal_ids_are_refused(tmp_path):
    name = write(
        tmp_path / "f.h5", features=X[:4], labels=Y[:4], ids=np.array(["a", "b", "a", "c"], "S")
    )
    with pytest.raises(UserError, match="id 'a' is that of 2 samples"):
        build(tmp_path, train_features_file=name)
    folder = tmp_path / "slides"
    folder.mkdir()
    write(folder / "s.h5", features=X[:4])
    torch.save(torch.from_numpy(X[4:9]), folder / "s.pt")
    (tmp_path / "labels.csv").write_text("id,label\ns,0\n")
    with pytest.raises(UserError, match="id 's' is that of 2 samples"):
        build(tmp_path, train_features_file="slides", labels_file="labels.csv")


def test_files_that_contradict_each_other(tmp_path):
    def pair(**attributes):
        for name, values in zip("ab", zip(*attributes.values(), strict=True), strict=True):
            given = dict(zip(attributes, values, strict=True))
            write(tmp_path / f"{name}.h5", features=X[:6], labels=Y[:6] % 2, attributes=given)
        return {"train_features_file": "a.h5", "val_features_file": "b.h5"}

    with pytest.raises(
        UserError, match=r"different class_names \(.*a.h5: cat, dog; .*: dog, cat\)"
    ):
        build(tmp_path, **pair(class_names=(["cat", "dog"], ["dog", "cat"])))
    files = pair(subtask=("multiclass", "regression"))
    with pytest.raises(UserError, match="different subtasks: .*a.h5 multiclass, .*b.h5 regression"):
        build(tmp_path, **files)
    assert build(tmp_path, **files, subtask="multiclass").subtask == "multiclass"
    write(tmp_path / "b.h5", features=X[:6, :32], labels=Y[:6])
    with pytest.raises(UserError, match="different widths: .*a.h5 64, .*b.h5 32; use one encoder"):
        build(tmp_path, **files)
    ragged(tmp_path, "b.h5")
    with pytest.raises(UserError, match="different kinds: .*a.h5 vectors, .*b.h5 bags"):
        build(tmp_path, **files)


@pytest.mark.parametrize("kind", ["bag_ptr", "bag_lengths", "ids", "groups", "coords"])
def test_a_dataset_that_the_spec_names_must_be_there(tmp_path, kind):
    name = ragged(tmp_path)
    with pytest.raises(
        UserError, match="no dataset 'mine'; the file has bag_ptr, features, labels"
    ):
        build(tmp_path, train_features_file=name, **{f"{kind}_key": "mine"})


def test_what_says_the_bags_twice_says_the_same(tmp_path):
    """Also (B, L, D) beside lengths that its padding would need."""
    lengths = np.array([20, 13, 27])
    ptr = np.concatenate([[0], np.cumsum(lengths)])
    build(tmp_path, train_features_file=ragged_of(tmp_path, X[:60], ptr, lengths))
    for other, what in (
        (np.array([20, 27, 13]), "the first says 13 instances in bag 1, the second 27"),
        (np.array([20, 40]), "the first says 3 bags, the second 2"),
    ):
        name = ragged_of(tmp_path, X[:60], ptr, other)
        with pytest.raises(UserError, match=f"'bag_ptr' and 'bag_lengths' contradict.*{what}"):
            build(tmp_path, train_features_file=name)
    padded = X[:60].reshape(3, 20, -1)
    build(tmp_path, train_features_file=ragged_of(tmp_path, padded, np.arange(4) * 20))
    name = ragged_of(tmp_path, padded, lengths=np.array([20, 13, 7]))
    with pytest.raises(
        UserError, match="20 instances in bag 1, the second 13.*without the padding"
    ):
        build(tmp_path, train_features_file=name)


def ragged_of(folder, features, ptr=None, lengths=None) -> str:
    """A file of three bags."""
    tables = {"bag_ptr": ptr, "bag_lengths": lengths}
    given = {key: value for key, value in tables.items() if value is not None}
    return write(folder / "bags.h5", features=features, labels=Y[:3], **given)


@pytest.mark.parametrize("text", ['["even", "odd"]', "even, odd"])
def test_class_names_that_are_one_text(tmp_path, text):
    name = write(
        tmp_path / "f.h5", features=X[:60], labels=Y[:60] % 2, attributes={"class_names": text}
    )
    assert build(tmp_path, train_features_file=name).class_names == ("even", "odd")


BAD_BAGS = {
    "width": (
        lambda folder: write(folder / "s1.h5", features=X[:4, :32]),
        "most have 64, but s1.h5 32",
    ),
    "integers": (
        lambda folder: torch.save(torch.ones(3, 64, dtype=torch.long), folder / "s1.pt"),
        r"s1.pt: features of shape \(3, 64\) and type int64; a bag is floats",
    ),
    "pickle": (
        lambda folder: torch.save({"features": Path("x")}, folder / "s1.pt"),
        r"s1.pt: holds other objects than tensors.*torch.save\(features, path\)",
    ),
    "dictionary": (
        lambda folder: torch.save({"features": torch.ones(3, 64)}, folder / "s1.pt"),
        "s1.pt: holds a dict, not a tensor",
    ),
}


def test_coordinates_are_one_row_an_instance(tmp_path):
    for coords in (np.zeros((49, 2)), np.zeros(50), np.array([["a", "b"]] * 50, "S1")):
        name = ragged(tmp_path, coords=coords)
        with pytest.raises(UserError, match=r"coordinates are numbers of shape \(50, 1 or more\)"):
            build(tmp_path, train_features_file=name)
    folder = tmp_path / "slides"
    folder.mkdir()
    write(folder / "s0.h5", features=X[:4], coords=np.zeros((3, 2)))
    (tmp_path / "labels.csv").write_text("id,label\ns0,0\n")
    with pytest.raises(UserError, match=r"s0.h5: 'coords' has shape \(3, 2\)"):
        build(tmp_path, train_features_file="slides", labels_file="labels.csv")


@pytest.mark.parametrize("case", BAD_BAGS)
def test_one_bad_bag_among_good_ones(tmp_path, case):
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("s0", "s2", "s3"):
        write(folder / f"{name}.h5", features=X[:4])
    spoil, said = BAD_BAGS[case]
    spoil(folder)
    (tmp_path / "labels.csv").write_text("id,label\ns0,0\ns1,1\ns2,0\ns3,1\n")
    with pytest.raises(UserError, match=said) as raised:
        build(tmp_path, train_features_file="slides", labels_file="labels.csv")
    assert len(str(raised.value).splitlines()) == 1


def test_tensors_of_other_makes(tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    stored = torch.from_numpy(X[:3])
    torch.save(stored.bfloat16()[None], folder / "bfloat16.pt")
    torch.save(stored.clone().requires_grad_(), folder / "grad.pt")
    torch.save(stored, folder / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "labels.csv").write_text("id,label\nbfloat16,0\ngrad,1\nold,1\n")
    data = build(tmp_path, train_features_file="slides", labels_file="labels.csv")
    first, second, third = data.splits["train"].source.fetch(np.arange(3))
    np.testing.assert_array_equal(first, stored.bfloat16().float().numpy())
    np.testing.assert_array_equal(second, X[:3])
    np.testing.assert_array_equal(third, X[:3])


def test_numbers_beyond_any_type_are_one_line(tmp_path):
    name = write(tmp_path / "f.h5", features=X[:3])
    (tmp_path / "labels.csv").write_text(f"id,label\n0,{10**40}\n1,1e999\n2,-1e40\n")
    with pytest.raises(
        UserError, match=r"f.h5: the label .* must be a finite number, .*; wrong: 1( |$)"
    ):
        build(tmp_path, train_features_file=name, labels_file="labels.csv")


def spoiled(folder, how):
    """A bag that cannot be used."""
    if how == "nan":
        write(folder / "bad.h5", features=np.full((3, 64), np.nan, np.float32))
    elif how == "width":
        write(folder / "bad.h5", features=X[:3, :60])
    elif how == "damaged":
        (folder / "bad.h5").write_bytes(b"no HDF5")
    elif how == "empty":
        write(folder / "bad.h5", features=X[:0])
    else:
        (folder / "bad.pt").write_bytes(b"no tensor")


@pytest.mark.parametrize("how", ["nan", "width", "damaged", "empty", "tensor"])
def test_bags_that_nothing_lists_are_not_opened(tmp_path, how):
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(6):
        write(folder / f"s{number}.h5", features=X[number : number + 4])
    spoiled(folder, how)
    good = "".join(f"s{n},{n % 2},{['train', 'val'][n > 3]}\n" for n in range(6))
    (tmp_path / "labels.csv").write_text("id,label,split\n" + good)
    given = {"features_file": "slides", "labels_file": "labels.csv"}
    assert len(build(tmp_path, **given, split_source="kfold", n_folds=3).splits["train"]) > 0
    data = build(tmp_path, **given, split_source="csv")
    source = data.splits["val"].source
    np.testing.assert_array_equal(source.fetch(np.array([1]))[0], X[5:9])
    # a row of the table that no split uses
    (tmp_path / "labels.csv").write_text(f"id,label,split\n{good}bad,1,\n")
    assert list(map(len, build(tmp_path, **given, split_source="csv").splits.values())) == [4, 2]
    splits = {"train": ["s0", "s1", "s2", "s3"], "val": ["s4"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    build(tmp_path, **given, split_source="splits_json", split_file="splits.json")
    (tmp_path / "splits.json").write_text(json.dumps(splits | {"test": ["bad"]}))
    with pytest.raises(UserError, match="bad"):
        build(tmp_path, **given, split_source="splits_json", split_file="splits.json")
    with pytest.raises(UserError, match="bad"):
        build(tmp_path, **given, split_source="kfold", n_folds=3)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["x"], "val": ["y"]}))
    with pytest.raises(UserError, match="1 ids of train are not in"):
        build(tmp_path, **given, split_source="splits_json", split_file="splits.json")


def test_rows_that_nothing_lists_may_be_bad(tmp_path):
    """NaN, an empty bag, an id that occurs twice: of samples that are not used."""
    ptr = np.array([0, 3, 3, 8, 12, 15, 20])
    features = X[:20].copy()
    features[12:15] = np.nan
    names = np.array(["a", "empty", "b", "c", "nan", "d"], object)
    write(tmp_path / "all.h5", features=features, bag_ptr=ptr, ids=names)
    given = {"features_file": "all.h5", "labels_file": "labels.csv", "split_source": "kfold"}
    (tmp_path / "labels.csv").write_text("id,label\na,0\nb,1\nc,0\nd,1\n")
    data = build(tmp_path, **given, n_folds=3)
    for split in data.splits.values():
        for row, name in enumerate(split.ids):
            begin = {"a": 0, "b": 3, "c": 8, "d": 15}[name]
            bag = split.source.fetch(np.array([row]))[0]
            np.testing.assert_array_equal(bag, X[begin : begin + len(bag)])
    for name, said in (("nan", "1 samples .nan."), ("empty", "1 bags have no instance .bags 1.")):
        (tmp_path / "labels.csv").write_text(f"id,label\na,0\nb,1\nc,0\n{name},1\n")
        with pytest.raises(UserError, match=said):
            build(tmp_path, **given, n_folds=3)
    names[[1, 4]] = "twice"
    write(tmp_path / "all.h5", features=X[:6], ids=names)
    (tmp_path / "labels.csv").write_text("id,label\na,0\nb,1\nc,0\nd,1\n")
    build(tmp_path, **given, n_folds=3)
    (tmp_path / "labels.csv").write_text("id,label\na,0\nb,1\nc,0\ntwice,1\n")
    with pytest.raises(UserError, match="id 'twice' is that of 2 samples"):
        build(tmp_path, **given, n_folds=3)


def test_features_behind_a_link_are_those_of_the_other_file(tmp_path):
    (tmp_path / "store").mkdir()
    ids = np.array([f"s{n}" for n in range(100)], object)
    write(tmp_path / "store" / "x.h5", room=X, features=X[:100], labels=Y[:100], ids=ids)
    for name, target in (("below", "store/x.h5"), ("out", "../x.h5")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["before"] = np.ones(5000)
            for key in ("features", "labels", "ids"):
                file[key] = h5py.ExternalLink(target, key)
    split = build(tmp_path, train_features_file="below.h5").splits["train"]
    np.testing.assert_array_equal(split.source.fetch(np.arange(100)), X[:100])
    np.testing.assert_array_equal(split.targets, Y[:100])
    assert split.ids == ids.tolist()
    with pytest.raises(UserError, match=r"'features' cannot be opened, it leads to 'features' of"):
        build(tmp_path, train_features_file="out.h5")
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "store" / "x.h5").rename(tmp_path / "x.h5")
    (tmp_path / "out.h5").rename(inner / "out.h5")
    with pytest.raises(UserError, match=r"'features' lies in another file outside of its folder"):
        build(inner, train_features_file="out.h5")
    split = build(inner, train_features_file="out.h5", follow_links=True).splits["train"]
    np.testing.assert_array_equal(split.source.fetch(np.arange(100)), X[:100])


@pytest.mark.parametrize("key", ["labels", "ids", "groups", "coords", "bag_ptr"])
def test_no_table_is_read_from_files_that_are_not_hdf5(tmp_path, key):
    name = ragged(tmp_path)
    np.arange(100).tofile(tmp_path / "secret")
    shape = {"coords": (50, 2), "bag_ptr": (11,)}.get(key, (10,))
    with h5py.File(tmp_path / name, "a") as file:
        if key in file:
            del file[key]
        file.create_dataset(key, shape, np.int64, external=[("secret", 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(UserError, match=f"'{key}' keeps its numbers in files that are not HDF5"):
        build(tmp_path, train_features_file=name, follow_links=True)


def test_ids_groups_and_columns_in_either_unicode_form_are_one(tmp_path):
    """A feature file from a Mac, a table from elsewhere."""
    apart = [unicodedata.normalize("NFD", f"bär{number}") for number in range(6)]
    composed = [unicodedata.normalize("NFC", name) for name in apart]
    write(tmp_path / "f.h5", features=X[:6], ids=np.array(apart, object))
    rows = [("id", "größe", "p", "split")]
    rows += [(name, i // 2 % 2, "äß"[i % 2] * 3, "val" if i % 2 else "train")
             for i, name in enumerate(composed)]  # fmt: skip
    with open(tmp_path / unicodedata.normalize("NFD", "tabü.csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    given = {"features_file": "f.h5", "labels_file": "tabü.csv", "group_column": "p"}
    given["label_column"] = unicodedata.normalize("NFD", "größe")
    data = build(tmp_path, **given, split_source="csv")
    assert data.splits["train"].ids == apart[::2] and data.splits["val"].ids == apart[1::2]
    assert data.splits["train"].groups == ["äää"] * 3 and data.report == []
    (tmp_path / "splits.json").write_text(json.dumps({"train": composed[:4], "val": composed[4:]}))
    with pytest.raises(UserError, match="groups are in more than one split"):
        build(tmp_path, **given, split_source="splits_json")
    groups = np.array([unicodedata.normalize(form, "ä") for form in ("NFC", "NFD")] * 3, object)
    write(tmp_path / "g.h5", features=X[:6], labels=Y[:6] % 2, groups=groups)
    with pytest.raises(UserError, match="at most 1 folds"):
        build(tmp_path, features_file="g.h5", split_source="kfold", n_folds=3)
    write(
        tmp_path / "g.h5",
        features=X[:2],
        labels=Y[:2],
        ids=np.array([apart[0], composed[0]], object),
    )
    with pytest.raises(UserError, match="is that of 2 samples"):
        build(tmp_path, train_features_file="g.h5")


@pytest.mark.parametrize("key", ["labels", "ids", "groups"])
def test_text_that_is_not_utf8_is_one_line(tmp_path, key):
    tables = {"labels": Y[:2], key: np.array(["böse".encode("latin-1"), b"gut"])}
    name = write(tmp_path / "f.h5", features=X[:2], **tables)
    with pytest.raises(UserError, match=rf"f.h5: '{key}' holds b'b\\xf6se', which is not UTF-8"):
        build(tmp_path, train_features_file=name)
    tables[key] = np.array(["böse", "gut"], object)
    fixed = np.array([text.encode() for text in tables[key]])
    for values in (fixed, tables[key]):
        name = write(tmp_path / "f.h5", features=X[:2], **(tables | {key: values}))
        data = build(tmp_path, train_features_file=name)
        split = data.splits["train"]
        found = {"labels": list(data.class_names), "ids": split.ids, "groups": split.groups}
        assert found[key] == ["böse", "gut"]
    kinds = np.dtype([("a", int)])
    name = write(tmp_path / "f.h5", features=X[:2], **(tables | {key: np.zeros(2, kinds)}))
    with pytest.raises(UserError, match="it must be numbers or text"):
        build(tmp_path, train_features_file=name)
