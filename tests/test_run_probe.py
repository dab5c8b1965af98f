"""Task probe from the command line."""

import csv
import json

import h5py
import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import glovita

DIGITS = load_digits()
SPLITS = {"train": slice(0, 900), "val": slice(900, 1200), "test": slice(1200, None)}
SPEC = """
[data]
dataset = "precomputed_features"
{files}
[model.encoder]
encoder_type = "precomputed"
[task]
objective = "probe"
bootstrap = 50
{task}
[logger]
backend = "none"
"""


def write(folder, features, labels, task="", splits=SPLITS):
    files = []
    for name, rows in splits.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"] = features[rows].astype(np.float32)
            file["labels"] = labels[rows]
        files.append(f'{name}_features_file = "{folder / name}.h5"')
    path = folder / "probe.toml"
    path.write_text(SPEC.format(files="\n".join(files), task=task))
    return str(path)


def run(spec, folder, *overrides):
    return glovita.main([spec, "--override", f"exp_dir={folder / 'runs'}", *overrides])


def results(folder):
    (path,) = folder.glob("runs/precomputed_features/probe*/0/metrics_probe.json")
    return path.parent, json.loads(path.read_text())


def test_both_probes_choose_on_val_and_report_test(tmp_path, capsys):
    spec = write(tmp_path, DIGITS.data, DIGITS.target, "l2 = [1e-4, 1e-2]\nk = [1, 5]")
    assert run(spec, tmp_path) == 0
    path, content = results(tmp_path)
    for method, key in (("knn", "k"), ("linear", "l2")):
        found = content[method]
        by_value = {c[key]: c["val"]["Accuracy"] for c in found["candidates"]}
        chosen = found["chosen"][key]
        assert by_value[chosen] == max(by_value.values()) == found["chosen"]["highest"]
        assert found["val"]["metrics"]["Accuracy"] == by_value[chosen]
        assert found["test"]["metrics"]["Accuracy"] > 0.9
        low, high = found["test"]["ci95"]["Accuracy"]
        assert low <= found["test"]["metrics"]["Accuracy"] <= high
        with open(path / f"predictions_{method}_test.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        right = np.mean([row["label"] == row["prediction"] for row in rows])
        assert right == pytest.approx(found["test"]["metrics"]["Accuracy"])
    scaler = StandardScaler().fit(DIGITS.data[SPLITS["train"]])
    x = {name: scaler.transform(DIGITS.data[rows]) for name, rows in SPLITS.items()}
    strength = content["linear"]["chosen"]["l2"]
    reference = LogisticRegression(C=1 / (strength * 900), tol=1e-6, max_iter=5000)
    reference.fit(x["train"], DIGITS.target[SPLITS["train"]])
    expected = reference.score(x["test"], DIGITS.target[SPLITS["test"]])
    assert content["linear"]["test"]["metrics"]["Accuracy"] == pytest.approx(expected, abs=0.004)
    capsys.readouterr()
    assert run(spec, tmp_path) == 0
    assert "finished before" in capsys.readouterr().out


def test_no_more_neighbours_than_there_are(tmp_path):
    task = 'methods = ["knn"]\nk = [5, 5000, 9000]'
    assert run(write(tmp_path, DIGITS.data, DIGITS.target, task), tmp_path) == 0
    _, content = results(tmp_path)
    assert [c["k"] for c in content["knn"]["candidates"]] == [5, 900]


def test_regression_and_bags(tmp_path):
    data = load_diabetes()
    splits = {"train": slice(0, 300), "val": slice(300, 370), "test": slice(370, None)}
    spec = write(tmp_path, data.data, data.target, 'metrics = ["mae", "r2"]', splits)
    assert run(spec, tmp_path, "task.result_plot=none") == 0
    _, content = results(tmp_path)
    assert content["linear"]["chosen"]["by"] == "MAE" and "lowest" in content["linear"]["chosen"]
    assert content["linear"]["test"]["metrics"]["R2"] > 0.3
    folder = tmp_path / "bags"
    folder.mkdir()
    bags = DIGITS.data[:1500].reshape(500, 3, 64)  # labels of the means: whether it is bright
    labels = (bags.mean((1, 2)) > np.median(bags.mean((1, 2)))).astype(np.int64)
    splits = {"train": slice(0, 300), "val": slice(300, 400), "test": slice(400, None)}
    spec = write(folder, bags, labels, "", splits)
    assert run(spec, folder, "task.result_plot=none") == 0
    assert results(folder)[1]["linear"]["test"]["metrics"]["Accuracy"] > 0.9


def test_what_cannot_be_probed_is_said_in_one_line(tmp_path, capsys):
    spec = write(tmp_path, DIGITS.data, DIGITS.target)
    cases = {
        "data.val_features_file=none": "there is no val split",
        "data.train_features_file=absent.h5": "no such file",
    }
    for override, message in cases.items():
        assert run(spec, tmp_path, override) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1
    path = tmp_path / "images.toml"
    path.write_text('[task]\nobjective = "probe"\n[logger]\nbackend = "none"\n')
    assert run(str(path), tmp_path) == 2
    assert "judges features" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    spec = write(tmp_path, DIGITS.data, DIGITS.target)
    assert glovita.main([spec, "--dry-run", "--override", f"exp_dir={tmp_path / 'runs'}"]) == 0
    assert "train (900, 64)" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
