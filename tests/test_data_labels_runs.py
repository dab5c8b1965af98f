"""Labels in whole runs: one cell has one meaning in every split, mode and file."""

import csv
import json
import shutil
import unicodedata

import h5py
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error
from small_runs import FEATURES

DIGITS = load_digits()
SPEC = f"""{FEATURES}
standardize = true
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 8
[optimizer]
lr = 0.02
[logger]
backend = "none"
"""
GRADES = ("none", "mild", "moderate", "severe")
COLUMNS = ("label", "prediction")
SPLITS = {"train": slice(0, 400), "val": slice(400, 550), "test": slice(550, 700)}


def digits_of(classes):
    """Features and digits of the first classes."""
    kept = DIGITS.target < classes
    return DIGITS.data[kept].astype(np.float32), DIGITS.target[kept]


def write(folder, name, features, **datasets):
    """A feature file."""
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["features"] = features
        for key, values in datasets.items():
            file[key] = values


def write_table(path, ids, labels):
    """A table of labels."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "label"), *zip(ids, labels, strict=True)])


@pytest.fixture
def table_of_classes(tmp_path):
    """Digits 0 to 3 as names from one table, the last of which only the train file has."""

    def build(names, missing=("val", "test")):
        features, digits = digits_of(4)
        ids, labels = [], []
        for split, rows in SPLITS.items():
            kept = digits[rows] < (3 if split in missing else 4)
            own = [f"{split}{row}" for row in range(kept.sum())]
            write(tmp_path / "set", split, features[rows][kept], ids=np.array(own, object))
            ids += own
            labels += [names[digit] for digit in digits[rows][kept]]
        write_table(tmp_path / "set" / "labels.csv", ids, labels)
        return dict(zip(ids, labels, strict=True))

    return build


def spec_of(tmp_path, **fields):
    """The spec on the features, with fields of data."""
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
    return SPEC.replace("ROOT", str(tmp_path / "set")).replace("[data]\n", f"[data]\n{text}")


def columns(path):
    """Columns of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    "names",
    [("1", "2", "3", "normal"), ("3_4", "4_3", "1_1", "11"), ("0", "1", "2", "3.5"), GRADES],
)
def test_a_class_that_a_split_lacks_shifts_none(command, table_of_classes, tmp_path, names):
    truth = table_of_classes(names)
    spec = spec_of(tmp_path, labels_file="labels.csv", subtask="multiclass")
    run = command(spec=spec)
    order = run.json("metrics_test.json")["class_names"]
    assert set(order) == set(names)
    assert "classes" in run.out and ", ".join(order) in run.out
    assert run.json("metrics_test.json")["metrics"]["acc"] > 0.9
    found = columns(run.path / "predictions_test.csv")
    assert found["label"] == [truth[name] for name in found["id"]]
    scores = np.array([found[f"p_{name}"] for name in order], float).T
    assert [order[k] for k in scores.argmax(1)] == found["prediction"]
    expected = accuracy_score(found["label"], found["prediction"])
    assert run.json("metrics_test.json")["metrics"]["acc"] == pytest.approx(expected)
    # a new cohort of two of the classes, in files of its own
    kept = [name for name in truth if name.startswith("test") and truth[name] in names[1:3]]
    features = dict(zip(found["id"], digits_of(4)[0][SPLITS["test"]][
        digits_of(4)[1][SPLITS["test"]] < 3], strict=True))  # fmt: skip
    cohort = tmp_path / "cohort"
    write(cohort, "test", np.stack([features[name] for name in kept]), ids=np.array(kept, object))
    write_table(cohort / "labels.csv", kept, [truth[name] for name in kept])
    fields = {"labels_file": "labels.csv", "subtask": "multiclass"}
    spec = spec_of(tmp_path, **fields).replace(str(tmp_path / "set"), str(cohort))
    spec = "".join(
        line for line in spec.splitlines(True) if not line.startswith(("train_", "val_"))
    )
    best = run.path / "checkpoints" / "best.pt"
    for given in ("", f"class_names = {json.dumps(list(names[::-1]))}\n"):
        out = tmp_path / f"out{len(given)}"
        text = spec.replace("[data]\n", f"[data]\n{given}")
        command("mode=infer", f"infer.checkpoint={best}", f"infer.output_dir={out}", spec=text)
        again = columns(out / "predictions_test.csv")
        assert again["label"] == [truth[name] for name in again["id"]] and len(again["id"]) > 50
        own = dict(zip(found["id"], found["prediction"], strict=True))
        assert again["prediction"] == [own[name] for name in again["id"]]


def test_an_ordered_metric_has_the_order_of_the_grades(
    command, refused, table_of_classes, tmp_path
):
    table_of_classes(GRADES, missing=())
    metrics = 'task.metrics=["acc", "quadratic_kappa"]'
    spec = spec_of(tmp_path, labels_file="labels.csv")
    line = refused(metrics, "training.epochs=1", spec=spec)
    assert '"quadratic_kappa" goes by the order of the classes' in line
    assert "mild, moderate, none, severe" in line and "data.class_names" in line
    plain = command("training.epochs=1", spec=spec)
    best = plain.path / "checkpoints" / "best.pt"
    assert "of the checkpoint" in refused(
        metrics, "mode=infer", f"infer.checkpoint={best}", f"infer.output_dir={tmp_path / 'out'}",
        spec=spec,
    )  # fmt: skip
    run = command(metrics, "training.epochs=1", "optimizer.lr=0.002", "name=ordered",
                  spec=spec_of(tmp_path, labels_file="labels.csv", class_names=GRADES))  # fmt: skip
    assert "none < mild < moderate < severe" in run.out
    report, found = run.json("metrics_test.json"), columns(run.path / "predictions_test.csv")
    assert report["class_names"] == list(GRADES)
    places = [[GRADES.index(name) for name in found[key]] for key in COLUMNS]
    expected = cohen_kappa_score(*places, weights="quadratic")
    assert report["metrics"]["quadratic_kappa"] == pytest.approx(expected)
    alphabet = [[sorted(GRADES).index(name) for name in found[key]] for key in COLUMNS]
    assert abs(expected - cohen_kappa_score(*alphabet, weights="quadratic")) > 0.05


def test_labels_that_files_leave_open(command, refused, tmp_path):
    """Whole floats are classes or values, as data.subtask or the head says; numbers beside names
    are indices of stated names alone."""
    features, digits = digits_of(3)
    names = np.array(["one", "zero", "two"], object)
    splits = {split: slice(rows.start // 2, rows.stop // 2) for split, rows in SPLITS.items()}
    for split, rows in splits.items():
        write(tmp_path / "set", split, features[rows], labels=digits[rows].astype(np.float64))
    spec = spec_of(tmp_path)
    assert 'be classes or values: set data.subtask = "multiclass" or' in refused(spec=spec)
    run = command("training.epochs=1", spec=spec + '[model.head]\nhead_type = "regression"\n')
    assert "mae" in run.json("metrics_test.json")["metrics"]
    for split, rows in splits.items():
        labels = names[digits[rows]] if split == "train" else digits[rows]
        write(tmp_path / "set", split, features[rows], labels=labels)
    assert "numbers (0, 1, 2): store the same names in both" in refused("name=mixed", spec=spec)
    run = command("name=mixed", spec=spec_of(tmp_path, class_names=list(names)))
    assert run.json("metrics_test.json")["metrics"]["acc"] > 0.9


def test_large_regression_labels_keep_their_digits(command, tmp_path):
    """Times in seconds, near 1.7e9, of which float32 knows every 128th."""
    features, digits = digits_of(10)
    times = 1.7e9 + 30 * (features @ np.linspace(-0.1, 0.1, 64)) + digits / 8
    for split, rows in SPLITS.items():
        write(tmp_path / "set", split, features[rows], labels=times[rows])
    head = '[model.head]\nhead_type = "regression"\n'
    spec = spec_of(tmp_path) + head
    run = command("training.epochs=20", spec=spec)
    found = columns(run.path / "predictions_test.csv")
    labels, predictions = (np.array(found[key], float) for key in ("label", "prediction"))
    np.testing.assert_array_equal(labels, times[SPLITS["test"]])
    assert len(set(predictions)) > 140
    report = run.json("metrics_test.json")["metrics"]
    assert report["mae"] == pytest.approx(mean_absolute_error(labels, predictions), rel=1e-12)
    assert 0 < report["mae"] < 0.5 * np.abs(labels - labels.mean()).mean()
    best = [r["val_mse"] for r in run.records() if r["best"] == r["val_mse"]]
    assert min(best) == min(r["val_mse"] for r in run.records()) > 0
    out = tmp_path / "out"
    both = [str(run.path / "checkpoints" / name) for name in ("best.pt", "last.pt")]
    command("mode=infer", f"infer.checkpoint={json.dumps(both)}", f"infer.output_dir={out}",
            spec=spec)  # fmt: skip
    mean = columns(out / "predictions_test.csv")
    np.testing.assert_array_equal(np.array(mean["label"], float), labels)
    assert json.loads((out / "metrics_test.json").read_text())["metrics"]["mae"] == pytest.approx(
        mean_absolute_error(labels, np.array(mean["prediction"], float)), rel=1e-12
    )
    probes = command(
        "task.objective=probe",
        "name=probe",
        spec=spec.replace("result_plot", 'metrics = ["mae"]\nresult_plot'),
    )
    for method in ("knn", "linear"):
        own = columns(probes.path / f"predictions_{method}_test.csv")
        errors = np.abs(np.array(own["prediction"], float) - times[SPLITS["test"]])
        assert errors.mean() < 0.7 * np.abs(labels - labels.mean()).mean()
        shown = json.loads((probes.path / "metrics_probe.json").read_text())[method]["test"]
        assert shown["metrics"]["mae"] == pytest.approx(errors.mean(), rel=1e-12)


def test_names_in_either_unicode_form_are_one(command, folder_spec, class_folders):
    """A folder from a Mac, with decomposed names, beside a table and a spec with composed ones."""
    images = class_folders / "images"
    for split in ("train", "val", "test"):
        (images / split / "zero").rename(images / split / unicodedata.normalize("NFD", "zähl"))
    (images / "val" / unicodedata.normalize("NFD", "zähl")).rename(images / "val" / "zähl")
    run = command(spec=folder_spec)
    names = run.json("metrics_test.json")["class_names"]
    assert [unicodedata.normalize("NFC", name) for name in names] == ["one", "two", "zähl"]
    ids = columns(run.path / "predictions_test.csv")["id"]
    assert all((images / name).is_file() for name in ids)
    # the same from tables
    entries, labels = {}, {}
    for path in sorted(images.rglob("*.png")):
        name = unicodedata.normalize("NFC", path.relative_to(images).as_posix())
        entries.setdefault(name.split("/")[0], []).append(name)
        labels[name] = name.split("/")[1]
    (class_folders / "splits.json").write_text(json.dumps(entries))
    (class_folders / "labels.json").write_text(json.dumps(labels))
    spec = folder_spec.replace('"subdirs"', '"splits_json"').replace('"folder"', '"json"')
    again = command("name=tables", spec=spec)
    assert columns(again.path / "predictions_test.csv")["id"] == ids


def test_folders_of_splits_are_no_classes(command, refused, folder_spec, class_folders):
    shutil.rmtree(class_folders / "images" / "test")
    spec = folder_spec.replace('"subdirs"', '"kfold"')
    line = refused(spec=spec)
    assert "the classes are the folders train, val" in line and 'split_source = "subdirs"' in line
    run = command('data.class_names=["train", "val"]', spec=spec)
    assert "train, val" in run.out


def test_text_of_feature_files_is_utf8(command, refused, tmp_path):
    features, digits = digits_of(2)
    names = np.array(["böse", "gut"], object)
    for split, rows in SPLITS.items():
        rows = slice(rows.start // 2, rows.stop // 2)
        labels = [names[digit].encode() for digit in digits[rows]]
        ids = [f"{split}-ä{row}".encode() for row in range(len(labels))]
        write(tmp_path / "set", split, features[rows], labels=np.array(labels), ids=np.array(ids))
    run = command("training.epochs=1", spec=spec_of(tmp_path))
    found = columns(run.path / "predictions_test.csv")
    assert set(found["label"]) == {"böse", "gut"} and found["id"][0] == "test-ä0"
    latin = np.array([name.decode().encode("latin-1") for name in labels])
    write(tmp_path / "set", "test", features[rows], labels=latin, ids=np.array(ids))
    line = refused("training.epochs=1", "name=latin", spec=spec_of(tmp_path))
    assert "test.h5: 'labels' holds b'b\\xf6se', which is not UTF-8" in line


def test_what_is_missing_is_said_before_an_empty_split(refused, table_spec, tmp_path):
    spec = table_spec("multilabel")
    (tmp_path / "multilabel" / "images").rename(tmp_path / "multilabel" / "pictures")
    (tmp_path / "multilabel" / "images").mkdir()
    for strict in ("true", "false"):
        said = refused(f"data.strict={strict}", spec=spec, lines=92)
        lines = said.splitlines()
        assert (
            lines[0].startswith("90 images cannot be used") and "000.png: no such file" in lines[1]
        )
        assert lines[-1] == lines[0].removesuffix(":")  # again below so many lines


def test_a_run_is_not_continued_on_other_classes(command, table_of_classes, tmp_path):
    table_of_classes(GRADES)
    spec = spec_of(tmp_path, labels_file="labels.csv")
    run = command("training.epochs=1", spec=spec)
    info = run.json("runtime_info.json") | {"finished": None}  # as after a kill
    (run.path / "runtime_info.json").write_text(json.dumps(info))
    table = tmp_path / "set" / "labels.csv"
    table.write_text(table.read_text().replace("none", "zero"))
    result = command("training.epochs=1", spec=spec, code=2)
    assert "mild, moderate, severe, zero" in result.err and "which is continued" in result.err
