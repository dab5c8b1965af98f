"""Data sets: digits, CIFAR files, image folders with every kind of labels and splits, bad input."""

import csv
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from small_runs import publish_cifar
from torchvision.datasets import CIFAR10, CIFAR100

from glovita_lib.data import ImageSamples
from glovita_lib.data_folder import build_unlabelled
from glovita_lib.datasets import build_data, read_digits
from glovita_lib.errors import UserError
from glovita_lib.spec_data import (
    Cifar10Data,
    Cifar100Data,
    CustomData,
    DigitsData,
    GenericImageData,
)

DIGITS = load_digits()
PIXELS = np.rint(DIGITS.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
COUNT = 30  # digits of the folders below


def rows_by_digit(digit):
    return np.flatnonzero(DIGITS.target == digit)


def save(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS[row]).save(path)


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Digits 0 to COUNT - 1 as images/<row>.png, labels.json, labels.csv and splits.json."""
    root = tmp_path_factory.mktemp("digits")
    for row in range(COUNT):
        save(root / "images" / f"{row}.png", row)
    labels = {f"{row}.png": int(DIGITS.target[row]) for row in range(COUNT)}
    (root / "labels.json").write_text(json.dumps(labels))
    write_csv(
        root / "labels.csv",
        ["path", "label", "name", "even", "big", "patient", "split"],
        [
            (f"{row}.png", d, f"d{d}", int(d % 2 == 0), int(d > 4), f"p{row // 2}",
             "train" if row < 20 else "val" if row < 26 else "test")
            for row, d in enumerate(DIGITS.target[:COUNT])
        ],
    )  # fmt: skip
    splits = {
        "train": [f"{row}.png" for row in range(20)],
        "val": [f"./{row}.png" for row in range(20, 26)],
        "test": [f"{row}.png" for row in range(26, COUNT)],
    }
    (root / "splits.json").write_text(json.dumps(splits))
    return root


@pytest.fixture
def root(template, tmp_path):
    """A copy of the template that a test may change."""
    return shutil.copytree(template, tmp_path / "digits")


def generic(root, **fields):
    return GenericImageData(data_root_dir=str(root), **fields)


def build(root, seed=0, **fields):
    return build_data(generic(root, **fields), seed=seed)


def rows_of(split):
    return [int(identity.split(".")[0]) for identity in split.ids]


# ---------------------------------------------------------------------- digits


def test_digits_are_the_real_ones():
    data = build_data(DigitsData(), seed=0)
    assert (data.name, data.subtask, data.outputs) == ("digits", "multiclass", 10)
    assert (data.samples, data.report) == (ImageSamples(channels=1, bit_depth=8), [])
    seen = []
    for split in data.splits.values():
        rows = np.array(split.ids, int)
        seen += list(rows)
        images = split.source.fetch(np.arange(len(split)))
        assert images.dtype == np.uint8 and (images[:, 0] == PIXELS[rows]).all()
        assert (split.targets == DIGITS.target[rows]).all()
        assert split.source.uniform == (1, 8, 8) and split.source.nbytes() == 64 * len(split)
    assert sorted(seen) == list(range(1797))
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [1168, 270, 359]


def test_the_table_of_digits_is_that_of_scikit_learn_bit_for_bit():
    table = read_digits()
    assert table.dtype == DIGITS.data.dtype and table[:, :64].tobytes() == DIGITS.data.tobytes()
    assert (table[:, 64] == DIGITS.target).all()
    names = build_data(DigitsData(), seed=0).class_names
    assert names == tuple(map(str, DIGITS.target_names)) == DigitsData.labels


def test_digits_splits_are_stratified_and_only_test_ignores_the_seed():
    one, two = (build_data(DigitsData(), seed=seed).splits for seed in (1, 2))
    assert one["test"].ids == two["test"].ids
    assert one["val"].ids != two["val"].ids
    shares = np.bincount(one["val"].targets) / np.bincount(DIGITS.target)
    assert np.ptp(shares) < 0.01


def test_data_fraction_cuts_only_the_train_split():
    whole = build_data(DigitsData(), seed=1)
    part = build_data(DigitsData(data_fraction=0.1), seed=1)
    assert part.splits["val"].ids == whole.splits["val"].ids
    assert part.splits["test"].ids == whole.splits["test"].ids
    train = part.splits["train"]
    assert len(train) == 117 and set(train.ids) < set(whole.splits["train"].ids)
    assert np.bincount(train.targets).min() >= 11
    rows = np.array(train.ids, int)
    assert (train.source.fetch(np.arange(117))[:, 0] == PIXELS[rows]).all()
    assert (train.targets == DIGITS.target[rows]).all()
    assert train.source.nbytes() == 117 * 64
    assert part.report == ["train split cut to 117 of 1168 samples (data.data_fraction = 0.1)"]
    tiny = build_data(DigitsData(data_fraction=1e-6), seed=1)
    assert len(tiny.splits["train"]) == 1
    again = build_data(DigitsData(data_fraction=0.1), seed=1)
    assert again.splits["train"].ids == train.ids


def test_digits_refuse_what_makes_no_sense():
    with pytest.raises(UserError, match="data.fold: 2 does not exist: 0 only: this data set has"):
        build_data(DigitsData(fold=2), seed=0)
    with pytest.raises(UserError, match="data.val_fraction: with data.test_fraction it is 1.1"):
        build_data(DigitsData(val_fraction=0.5, test_fraction=0.6), seed=0)
    with pytest.raises(UserError, match="leave a split of the 1797 digits empty"):
        build_data(DigitsData(val_fraction=1e-5), seed=0)


# ---------------------------------------------------------------------- cifar


FLAT = np.repeat(np.pad(PIXELS, ((0, 0), (12, 12), (12, 12)))[:, None], 3, 1).reshape(-1, 3072)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """240 digits as CIFAR-10, 40 a file."""
    publish_cifar(monkeypatch, tmp_path, CIFAR10, FLAT[:240], DIGITS.target[:240], NAMES)
    return tmp_path


NAMES = [f"class {i}" for i in range(10)]


def cifar_spec(root, **fields):
    return Cifar10Data(data_root_dir=str(root), download=False, **fields)


def test_cifar_files(cifar):
    data = build_data(cifar_spec(cifar), seed=0)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 180, "val": 20, "test": 40,
    }  # fmt: skip
    train, val, test = data.splits.values()
    assert set(train.ids).isdisjoint(val.ids) and test.ids[:2] == ["test/0", "test/1"]
    for split, first in ((train, 0), (val, 0), (test, 200)):
        rows = np.array([int(identity.split("/")[1]) for identity in split.ids]) + first
        images = split.source.fetch(np.arange(len(split)))
        assert images.shape[1:] == (3, 32, 32) and images.dtype == np.uint8
        assert (images[:, 2, 12:20, 12:20] == PIXELS[rows]).all()
        assert (split.targets == DIGITS.target[rows]).all()
    assert data.class_names[3] == "class 3" and data.samples.channels == 3 and data.report == []
    other = build_data(cifar_spec(cifar), seed=1)
    assert other.splits["val"].ids != val.ids and other.splits["test"].ids == test.ids


def test_cifar_without_a_val_fraction_takes_the_test_images(cifar):
    data = build_data(cifar_spec(cifar, val_fraction=0), seed=0)
    assert data.splits["val"].ids == data.splits["test"].ids
    assert len(data.splits["train"]) == 200
    assert any("val split too" in line for line in data.report)


def test_cifar100_fine_labels(tmp_path, monkeypatch):
    names = [f"class {i}" for i in range(100)]
    publish_cifar(monkeypatch, tmp_path, CIFAR100, FLAT[:100], np.arange(100), names)
    data = build_data(Cifar100Data(data_root_dir=str(tmp_path), download=False), seed=0)
    assert data.outputs == 100 and len(data.splits["test"]) == 50
    assert data.splits["test"].targets.tolist() == list(range(50, 100))


def test_missing_cifar_is_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        build_data(cifar_spec(tmp_path), seed=0)
    text = str(caught.value)
    assert "\n" not in text and str(tmp_path / "cifar-10-batches-py") in text
    assert "data.download = false" in text and "cifar-10-python.tar.gz" in text

    def offline(*args, **options):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    with pytest.raises(UserError) as caught:
        build_data(Cifar10Data(data_root_dir=str(tmp_path)), seed=0)
    assert "Name or service not known" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("download", [False, True])
def test_a_damaged_cifar_file_is_one_clear_line(cifar, file, download):
    path = cifar / "cifar-10-batches-py" / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"!")
    with pytest.raises(UserError) as caught:
        build_data(Cifar10Data(data_root_dir=str(cifar), download=download), seed=0)
    text = str(caught.value)
    assert f"{path.parent}: {file}: not as published" in text and "\n" not in text
    path.unlink()
    with pytest.raises(UserError, match=f"{file} missing"):
        build_data(cifar_spec(cifar), seed=0)


def test_only_the_published_cifar_files_are_read_so_that_none_can_run_code(cifar, monkeypatch):
    """A pickle may run anything; its md5 sum is looked at before."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(cifar / "ran"),)

    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="test_batch: not as published"):
        build_data(cifar_spec(cifar), seed=0)
    assert not (cifar / "ran").exists()
    monkeypatch.undo()  # torchvision's own md5 sums
    with pytest.raises(UserError, match="data_batch_1, .*: not as published"):
        build_data(cifar_spec(cifar), seed=0)


# ---------------------------------------------------------------------- splits of folders


def test_splits_json_and_json_labels(template):
    data = build(template, channels=1)
    assert [rows_of(split) for split in data.splits.values()] == [
        list(range(20)), list(range(20, 26)), list(range(26, 30)),
    ]  # fmt: skip
    assert list(data.splits) == ["train", "val", "test"] and data.report == []
    assert data.class_names == tuple("0123456789") and data.name == "generic_image_dataset"
    for split in data.splits.values():
        rows = np.array(rows_of(split))
        assert (split.targets == DIGITS.target[rows]).all() and split.targets.dtype == np.int64
        assert (split.source.fetch(np.arange(len(split)))[:, 0] == PIXELS[rows]).all()


def test_channels_and_bit_depth_are_as_declared(template):
    data = build(template, channels=4, bit_depth=16)
    image = data.splits["train"].source.fetch(np.array([3]))[0]
    assert image.shape == (4, 8, 8) and image.dtype == np.uint16
    assert (image[:3] == PIXELS[3].astype(np.uint16) * 257).all() and (image[3] == 65535).all()
    assert data.samples == ImageSamples(channels=4, bit_depth=16)


@pytest.mark.parametrize("as_object", [False, True])
def test_splits_json_with_folds(root, as_object):
    names = [f"{row}.png" for row in range(COUNT)]
    folds = [
        {"train": names[10:], "val": names[:10]},
        {"train": names[:10] + names[20:], "val": names[10:20]},
    ]
    content = {str(i): fold for i, fold in enumerate(folds)} if as_object else folds
    (root / "splits.json").write_text(json.dumps(content))
    for fold in (0, 1):
        splits = build(root, fold=fold).splits
        assert splits["val"].ids == folds[fold]["val"] and "test" not in splits
    with pytest.raises(UserError, match=r"data.fold = 2, but .*splits.json has the folds 0, 1"):
        build(root, fold=2)


def test_splits_json_without_folds_refuses_a_fold(template):
    with pytest.raises(UserError, match="data.fold = 1, but .* has the splits .* and no folds"):
        build(template, fold=1)


def test_splits_json_whose_lists_are_folds(root):
    names = [f"{row}.png" for row in range(COUNT)]
    content = {"north": names[:5], "south": names[5:12], "west": names[12:]}
    (root / "splits.json").write_text(json.dumps(content))
    for fold, val in (("north", "south"), ("west", "north")):
        splits = build(root, fold=fold).splits
        assert splits["test"].ids == content[fold] and splits["val"].ids == content[val]
        rest = set(names) - {*content[fold], *content[val]}
        assert set(splits["train"].ids) == rest


def test_subdirs_with_class_folders(tmp_path):
    for split, rows in {"train": range(12), "dev": range(12, 16), "test": range(16, 20)}.items():
        for row in rows:
            folder = f"{'even' if DIGITS.target[row] % 2 == 0 else 'odd'}/deeper"
            save(tmp_path / "images" / split / folder / f"{row}.png", row)
    fields = {"split_source": "subdirs", "label_source": "folder", "val_split_name": "dev"}
    data = build(tmp_path, **fields)
    assert data.class_names == ("even", "odd")
    assert [len(split) for split in data.splits.values()] == [12, 4, 4]
    train = data.splits["train"]
    assert train.ids == sorted(train.ids) and train.ids[0].startswith("train/even/deeper/")
    for identity, target in zip(train.ids, train.targets, strict=True):
        assert target == DIGITS.target[int(identity.split("/")[-1][:-4])] % 2
    with pytest.raises(UserError) as caught:
        build(tmp_path, **{**fields, "val_split_name": "tset"})
    assert 'no split "tset"; did you mean "test"?' in str(caught.value)
    assert "train" in str(caught.value) and "data.val_split_name" in str(caught.value)
    with pytest.raises(UserError, match="data.fold: 1 does not exist: 0 only; data.split_source"):
        build(tmp_path, **fields, fold=1)
    shared = build(tmp_path, **{**fields, "val_split_name": "test"})
    assert shared.splits["val"].ids == shared.splits["test"].ids


def test_a_test_split_may_be_absent_unless_it_was_named(root):
    splits = json.loads((root / "splits.json").read_text())
    del splits["test"]
    (root / "splits.json").write_text(json.dumps(splits))
    assert list(build(root).splits) == ["train", "val"]
    with pytest.raises(UserError, match='no split "extra"'):
        build(root, test_split_name="extra")


def test_folder_labels_of_listed_files_with_and_without_a_split_folder(tmp_path):
    names = {"train": [], "val": []}
    for split, rows in {"train": range(8), "val": range(8, 12)}.items():
        for row in rows:
            name = f"{split}/d{DIGITS.target[row] % 2}/{row}.png"
            save(tmp_path / "images" / name, row)
            names[split].append(name)
    (tmp_path / "splits.json").write_text(json.dumps(names))
    data = build(tmp_path, label_source="folder")
    assert data.class_names == ("d0", "d1")
    assert (data.splits["val"].targets == DIGITS.target[8:12] % 2).all()


def test_split_column(template):
    data = build(template, label_source="csv", split_source="csv")
    assert [len(split) for split in data.splits.values()] == [20, 6, 4]
    with pytest.raises(UserError, match='no column "spilt"; did you mean "split"'):
        build(template, label_source="csv", split_source="csv", split_column="spilt")
    with pytest.raises(UserError, match='"csv" needs data.label_source = "csv", not'):
        build(template, split_source="csv")


@pytest.mark.parametrize("modes", [{}, {"trains": False, "wanted": ("test",)}])
@pytest.mark.parametrize("name", ["Test", "TEST", "test2", "training"])
def test_a_name_that_is_no_split_is_refused_in_tables_and_split_files(root, name, modes):
    """Whatever the mode: half of a cohort would be gone."""
    rows = list(csv.reader((root / "labels.csv").read_text().splitlines()))
    rows[-1][-1] = name
    write_csv(root / "labels.csv", rows[0], rows[1:])
    splits = json.loads((root / "splits.json").read_text())
    splits[name] = [splits["test"].pop()]
    (root / "splits.json").write_text(json.dumps(splits))
    tables = {"label_source": "csv", "split_source": "csv", "subtask": "multiclass"}
    for fields in (tables, {"subtask": "multiclass"}):
        with pytest.raises(UserError, match=f'"{name}" \\(1 images\\) is no split'):
            build_data(generic(root, **fields), seed=0, **modes)


def test_splits_that_the_spec_does_not_name_are_told(root):
    """Where it names its own; but never one that differs in case alone. So are empty cells."""
    rows = list(csv.reader((root / "labels.csv").read_text().splitlines()))
    rows[-1][-1], rows[-2][-1], rows[-3][-1] = "external", "", ""
    write_csv(root / "labels.csv", rows[0], rows[1:])
    fields = {"label_source": "csv", "split_source": "csv", "subtask": "multiclass"}
    data = build(root, **fields, test_split_name="external")
    assert len(data.splits["test"]) == 1
    assert "1 images of test are in no split: not used" in data.report
    assert "2 images of column split are in no split: not used" in data.report
    rows[-2][-1] = "External"
    write_csv(root / "labels.csv", rows[0], rows[1:])
    with pytest.raises(UserError, match='"External" .1 images. is no split, but "external" is'):
        build(root, **fields, test_split_name="external")


def test_folders_that_are_no_splits_are_told(tmp_path):
    for split in ("train", "val", "test", "extra", "test_2"):
        for row in range(4):
            save(tmp_path / "images" / split / f"d{DIGITS.target[row]}" / f"{row}.png", row)
    fields = {"split_source": "subdirs", "label_source": "folder"}
    data = build(tmp_path, **fields)
    assert "8 images of extra, test_2 are in no split: not used" in data.report
    (tmp_path / "images" / "extra").rename(tmp_path / "images" / "Test")
    with pytest.raises(UserError, match='"Test" .4 images. is no split, but "test" is'):
        build(tmp_path, **fields)


def test_kfold_from_the_seed(template):
    runs = [build(template, split_source="kfold", fold=fold) for fold in range(5)]
    tests = [set(run.splits["test"].ids) for run in runs]
    assert len(set.union(*tests)) == sum(map(len, tests)) == COUNT
    for fold, run in enumerate(runs):
        parts = [set(split.ids) for split in run.splits.values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == COUNT
        assert set(run.splits["val"].ids) == tests[(fold + 1) % 5]
    other = build(template, split_source="kfold", seed=1)
    assert set(other.splits["test"].ids) != tests[0]
    with pytest.raises(UserError, match="data.fold: 5 does not exist: 0 to 4"):
        build(template, split_source="kfold", fold=5)
    with pytest.raises(UserError, match="n_folds = 31, but there are only 30 samples"):
        build(template, split_source="kfold", n_folds=31)


def test_kfold_with_groups(template):
    fields = {"label_source": "csv", "group_column": "patient", "split_source": "kfold"}
    for fold in range(3):
        splits = build(template, n_folds=3, fold=fold, **fields).splits
        groups = [set(split.groups) for split in splits.values()]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 15
        for split in splits.values():
            assert split.groups == [f"p{row // 2}" for row in rows_of(split)]
    with pytest.raises(UserError, match="n_folds = 16, but there are only 15 groups"):
        build(template, n_folds=16, **fields)


def test_a_group_in_two_splits_is_an_error(root):
    fields = {"label_source": "csv", "group_column": "patient"}
    assert build(root, **fields).splits["val"].groups == [f"p{row // 2}" for row in range(20, 26)]
    splits = json.loads((root / "splits.json").read_text())
    splits["val"].append(splits["train"].pop())  # 19.png, of p9 like 18.png
    (root / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=r"1 groups are in more .*p9 \(train: 18.png, val: 19.png"):
        build(root, **fields)
    with pytest.raises(
        UserError, match='group_column: "patient" would be .* data.label_source = "csv"'
    ):
        build(root, group_column="patient")


def test_an_image_in_two_splits_is_an_error(root):
    splits = json.loads((root / "splits.json").read_text())
    splits["val"].append("./3.png")
    (root / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match="1 images are in the splits train and val: 3.png"):
        build(root)


def test_an_image_twice_in_a_split_is_used_once(root):
    splits = json.loads((root / "splits.json").read_text())
    splits["train"] += ["3.png", "./4.png"]
    (root / "splits.json").write_text(json.dumps(splits))
    data = build(root)
    assert len(data.splits["train"]) == 20
    assert data.report == [
        "2 entries of split train name images that the split has already: used once"
    ]


def test_a_table_names_files_exactly_or_the_near_one_is_offered(root):
    splits = json.loads((root / "splits.json").read_text())
    splits["val"][0], splits["test"][0] = "images/20.png", "26"
    (root / "splits.json").write_text(json.dumps(splits))
    labels = (root / "labels.json").read_text().replace('"3.png"', '"3.jpg"')
    (root / "labels.json").write_text(labels)
    with pytest.raises(UserError) as caught:
        build(root)
    assert str(caught.value).splitlines()[1:] == [
        '  images/20.png: no such file (in split val); did you mean "20.png"?',
        '  26: no such file (in split test); did you mean "26.png"?',
        '  3.png: no label; the label file has "3.jpg", and there is no such image',
    ]
    data = build(root, strict=False)
    assert [len(split) for split in data.splits.values()] == [19, 5, 3]


# ---------------------------------------------------------------------- kinds of labels


def test_string_class_names(template):
    data = build(template, label_source="csv", label_column="name")
    assert data.class_names == tuple(f"d{digit}" for digit in range(10))
    names = tuple(f"d{digit}" for digit in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7))
    data = build(template, label_source="csv", label_column="name", class_names=names)
    assert data.class_names == names
    train = data.splits["train"]
    assert [names[t] for t in train.targets] == [f"d{DIGITS.target[r]}" for r in range(20)]


def test_multilabel_columns_and_multi_target_regression(template):
    fields = {"label_source": "csv", "label_column": ("even", "big")}
    data = build(template, subtask="multilabel", **fields)
    digits = DIGITS.target[:20]
    expected = np.stack([digits % 2 == 0, digits > 4], 1).astype(np.float32)
    assert data.class_names == ("even", "big") and data.subtask == "multilabel"
    assert (data.splits["train"].targets == expected).all()
    assert data.splits["train"].targets.dtype == np.float32
    data = build(template, task="Regression", label_source="csv", label_column=("label", "big"))
    assert data.class_names == ("label", "big") and data.subtask == "regression"
    assert (data.splits["train"].targets == np.stack([digits, digits > 4], 1)).all()


def test_kinds_that_contradict_each_other(template):
    with pytest.raises(UserError, match='subtask: "multiclass" contradicts data.task = "Regr'):
        build(template, task="Regression", subtask="multiclass")
    with pytest.raises(UserError, match=r'label_column: \["even", "big"\] would be ignored, it is'):
        build(template, label_column=("even", "big"))
    with pytest.raises(UserError, match='"even", "big"] are 2 columns, and multiclass reads one'):
        build(template, label_source="csv", label_column=("even", "big"))
    with pytest.raises(UserError) as caught:
        build(template, task="Regression", subtask="multiclass", split_source="csv")
    assert len(str(caught.value).splitlines()) == 2  # both things that are wrong
    with pytest.raises(UserError, match='"folder" gives each sample one class, not multilabel'):
        build(template, label_source="folder", subtask="multilabel")


def test_num_classes_is_checked(template):
    assert build(template, num_classes=10).outputs == 10
    assert build(template, num_classes=12).class_names == tuple(map(str, range(12)))
    with pytest.raises(UserError, match="data.num_classes = 9, but the data have 10 classes"):
        build(template, num_classes=9)


def test_classes_without_training_samples_are_reported(template):
    data = build(template, class_names=tuple("0123456789ab"))
    assert data.outputs == 12
    assert data.report == ["classes without a training sample: a, b"]


# ---------------------------------------------------------------------- bad input


def test_missing_files_and_folders(root, tmp_path):
    with pytest.raises(UserError, match="nowhere/images: no such folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match="other.json: no such file"):
        build(root, labels_file="other.json")
    with pytest.raises(UserError, match="other.json: no such file"):
        build(root, split_file="other.json")


def test_all_unusable_images_are_listed_at_once_or_left_out(root):
    os.truncate(root / "images/3.png", 50)
    (root / "images/5.png").write_text("no image")
    os.remove(root / "images/21.png")
    labels = json.loads((root / "labels.json").read_text())
    del labels["7.png"]
    (root / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(UserError) as caught:
        build(root)
    head, *lines = str(caught.value).splitlines()
    assert head == "4 images cannot be used; mend them or set data.strict = false:"
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "./21.png", "3.png", "5.png", "7.png",
    ]  # fmt: skip
    text = str(caught.value)
    assert "7.png: no label" in text and "5.png: not an image file" in text
    assert "./21.png: no such file (in split val)" in text
    data = build(root, strict=False)
    assert rows_of(data.splits["train"]) == [r for r in range(20) if r not in (3, 5, 7)]
    assert rows_of(data.splits["val"]) == [20, 22, 23, 24, 25]
    assert (data.splits["train"].targets == DIGITS.target[rows_of(data.splits["train"])]).all()
    assert data.report[0].startswith("4 images left out:")


def test_missing_images_of_a_label_file_that_folds_are_drawn_from(root):
    os.remove(root / "images/4.png")
    with pytest.raises(UserError, match="4.png: no such file"):
        build(root, split_source="kfold")
    save(root / "images/extra.png", 99)
    data = build(root, split_source="kfold", strict=False)
    assert sum(map(len, data.splits.values())) == COUNT - 1
    assert any("1 images of" in line and "not in the label file" in line for line in data.report)


def test_an_empty_split_is_an_error(root):
    splits = json.loads((root / "splits.json").read_text())
    (root / "splits.json").write_text(json.dumps({**splits, "val": []}))
    with pytest.raises(UserError, match="the val split has no sample"):
        build(root)


def test_duplicates_and_leakage_are_reported(root):
    shutil.copy(root / "images/1.png", root / "images/2.png")  # train, other label
    shutil.copy(root / "images/8.png", root / "images/22.png")  # train and val
    across, within, torn = build(root).report
    assert across == (
        "leakage: 1 images are in several splits under different names:"
        " 8.png (train) = 22.png (val)"
    )
    assert within == "1 images occur several times within a split: 1.png (train) = 2.png (train)"
    assert torn.startswith("2 images occur with different labels: ")


def test_tiff_stacks_are_reported(root):
    first, second = Image.fromarray(PIXELS[4]), Image.fromarray(PIXELS[5])
    os.remove(root / "images/4.png")
    first.save(root / "images/4.tif", save_all=True, append_images=[second])
    labels = (root / "labels.json").read_text().replace('"4.png"', '"4.tif"')
    (root / "labels.json").write_text(labels)
    splits = (root / "splits.json").read_text().replace('"4.png"', '"4.tif"')
    (root / "splits.json").write_text(splits)
    assert build(root).report == ["1 TIFF files have several pages, the first is read: 4.tif"]


def test_data_fraction_of_files(template):
    data = build(template, data_fraction=0.5, label_source="csv", group_column="patient")
    train = data.splits["train"]
    assert len(train) == 10
    rows = np.array(rows_of(train))
    assert (train.source.fetch(np.arange(10))[:, 0] == PIXELS[rows]).all()
    assert train.groups == [f"p{row // 2}" for row in rows]
    assert train.source.uniform == (3, 8, 8) and train.source.nbytes() == 10 * 3 * 64


# ---------------------------------------------------------------------- custom, unlabelled


def test_custom_data(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "from glovita_lib.datasets import build_data\n"
        "from glovita_lib.spec_data import DigitsData\n"
        "def digits(spec, seed, test_fraction):\n"
        "    return build_data(DigitsData(test_fraction=test_fraction), seed=seed)\n"
        "def nothing(spec, seed):\n"
        "    return None\n"
        "def unread(spec, seed):\n"
        "    data = digits(spec, seed, 0.5)\n"
        "    data.splits['val'].source = [1, 2]\n"
        "    return data\n"
    )
    (tmp_path / "bad_import.py").write_text("import there_is_no_such_module\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def custom(target, **options):
        return build_data(CustomData(target=target, options=options), seed=0)

    assert len(custom("my_data:digits", test_fraction=0.5).splits["test"]) == 898
    for target, said in {
        "my_data": 'must read "package.module:function"',
        "other_data:digits": "no module other_data",
        "my_data:digit": "my_data has no function digit",
        "my_data:nothing": "returned NoneType, expected glovita_lib.data.Data",
        "my_data:unread": "source of the split val is of list, which must derive from glovita_lib",
    }.items():
        with pytest.raises(UserError, match=said):
            custom(target)
    with pytest.raises(UserError, match="unexpected keyword argument 'fraction'"):
        custom("my_data:nothing", fraction=0.5)
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        custom("bad_import:f")


def test_a_model_learns_from_labelled_splits_only(tmp_path, monkeypatch):
    (tmp_path / "my_images.py").write_text(
        "from dataclasses import replace\n"
        "from glovita_lib.datasets import build_data\n"
        "from glovita_lib.spec_data import DigitsData\n"
        "def digits(spec, seed, unlabelled):\n"
        "    data = build_data(DigitsData(), seed=seed)\n"
        "    new = {name: replace(data.splits[name], targets=None) for name in unlabelled}\n"
        "    return replace(data, splits={**data.splits, **new})\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def splits(*unlabelled, trains, **fields):
        options = {"unlabelled": unlabelled}
        spec = CustomData(target="my_images:digits", options=options, **fields)
        return build_data(spec, seed=0, trains=trains).splits

    assert all(split.targets is not None for split in splits(trains=True).values())
    for names in (["train"], ["val"], ["val", "test"]):
        with pytest.raises(UserError, match=f"the {' and the '.join(names)} split has no labels"):
            splits(*names, trains=True)
        assert all(splits(*names, trains=False)[name].targets is None for name in names)
    assert len(splits("train", trains=False, data_fraction=0.1)["train"]) == 117


def unlabelled(path):
    files = GenericImageData(allowed_exts=("png", "tif"))
    return build_unlabelled(str(path), channels=1, bit_depth=8, files=files)[0]


def test_new_images(root):
    (root / "images/sub").mkdir()
    shutil.move(root / "images/5.png", root / "images/sub/5.PNG")
    (root / "images/notes.txt").write_text("not an image")
    split = unlabelled(root / "images")
    assert len(split) == COUNT and split.targets is None and split.ids[-1] == "sub/5.PNG"
    assert split.ids == sorted(split.ids)
    assert (split.source.fetch(np.array([COUNT - 1]))[0, 0] == PIXELS[5]).all()
    write_csv(root / "new.csv", ["path", "x"], [["images/9.png", 1], ["images/2.png", 2]])
    split = unlabelled(root / "new.csv")
    assert split.ids == ["images/9.png", "images/2.png"]
    assert (split.source.fetch(np.arange(2))[:, 0] == PIXELS[[9, 2]]).all()
    assert unlabelled(root / "images/3.png").ids == ["3.png"]


def test_bad_new_images(root, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        unlabelled(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no image with a suffix of png, tif"):
        unlabelled(tmp_path / "empty")
    write_csv(tmp_path / "new.csv", ["file"], [["a.png"]])
    with pytest.raises(UserError, match='no column "path"'):
        unlabelled(tmp_path / "new.csv")
    os.truncate(root / "images/3.png", 50)
    (root / "images/4.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        unlabelled(root / "images")
    head, first, second = str(caught.value).splitlines()
    assert head.startswith("2 images of 30 cannot be read; mend them or set data.strict = false")
    assert "3.png: broken" in first and "4.png: an empty file" in second
    files = GenericImageData(allowed_exts=("png", "tif"), strict=False)
    split, (note,) = build_unlabelled(str(root / "images"), channels=1, bit_depth=8, files=files)
    assert note.startswith("2 images left out:") and "4.png: an empty file" in note
    assert len(split) == COUNT - 2 and not {"3.png", "4.png"} & set(split.ids)
    for number, name in enumerate(split.ids):
        pixels = split.source.fetch(np.array([number]))[0, 0]
        np.testing.assert_array_equal(pixels, PIXELS[int(name.removesuffix(".png"))])
    (root / "images/far").symlink_to(root / "not-mounted")
    with pytest.raises(UserError, match="cannot be listed"):
        unlabelled(root / "images")
    _, notes = build_unlabelled(str(root / "images"), channels=1, bit_depth=8, files=files)
    assert len(notes) == 2 and "far" in notes[0] and "left out:" in notes[0]
    for name in split.ids:
        (root / "images" / name).write_bytes(b"")
    with pytest.raises(UserError, match="30 images of 30 cannot be read:"):
        build_unlabelled(str(root / "images"), channels=1, bit_depth=8, files=files)
