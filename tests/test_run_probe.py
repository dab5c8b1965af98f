"""Task probe from the command line."""

import csv
import json
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import glovita
from glovita_lib import run_probe
from glovita_lib.dist import Ranks
from glovita_lib.prediction_files import read_predictions
from glovita_lib.read_features import BagSource, feature_scale
from glovita_lib.rundir import RunDir

DIGITS = load_digits()
FEW = "k = [1]\nl2 = [1.0]\nresult_plot = 'none'"
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
        by_value = {c[key]: c["val"]["acc"] for c in found["candidates"]}
        chosen = found["chosen"][key]
        assert by_value[chosen] == max(by_value.values()) == found["chosen"]["highest"]
        assert found["val"]["metrics"]["acc"] == by_value[chosen]
        assert found["test"]["metrics"]["acc"] > 0.9
        low, high = found["test"]["ci95"]["acc"]
        assert low <= found["test"]["metrics"]["acc"] <= high
        with open(path / f"predictions_{method}_test.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        right = np.mean([row["label"] == row["prediction"] for row in rows])
        assert right == pytest.approx(found["test"]["metrics"]["acc"])
    scaler = StandardScaler().fit(DIGITS.data[SPLITS["train"]])
    x = {name: scaler.transform(DIGITS.data[rows]) for name, rows in SPLITS.items()}
    strength = content["linear"]["chosen"]["l2"]
    reference = LogisticRegression(C=1 / (strength * 900), tol=1e-6, max_iter=5000)
    reference.fit(x["train"], DIGITS.target[SPLITS["train"]])
    expected = reference.score(x["test"], DIGITS.target[SPLITS["test"]])
    assert content["linear"]["test"]["metrics"]["acc"] == pytest.approx(expected, abs=0.004)
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
    assert run(spec, tmp_path, "task.result_plot=none") == 2  # whole floats may be classes
    assert run(spec, tmp_path, "task.result_plot=none", "data.subtask=regression") == 0
    _, content = results(tmp_path)
    assert content["linear"]["chosen"]["by"] == "mae" and "lowest" in content["linear"]["chosen"]
    assert content["linear"]["test"]["metrics"]["r2"] > 0.3
    folder = tmp_path / "bags"
    folder.mkdir()
    bags = DIGITS.data[:1500].reshape(500, 3, 64)  # labels of the means: whether it is bright
    labels = (bags.mean((1, 2)) > np.median(bags.mean((1, 2)))).astype(np.int64)
    splits = {"train": slice(0, 300), "val": slice(300, 400), "test": slice(400, None)}
    spec = write(folder, bags, labels, "", splits)
    assert run(spec, folder, "task.result_plot=none") == 0
    assert results(folder)[1]["linear"]["test"]["metrics"]["acc"] > 0.9


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


# ---------------------------------------------------------------- stopped and started again


def outputs(folder):
    """Bytes of what a run predicts and reports, by name."""
    path, _ = results(folder)
    kept = [*path.glob("*.csv"), path / "metrics_probe.json"]
    return {file.name: file.read_bytes() for file in kept}


def test_a_stopped_probe_is_done_again(tmp_path, monkeypatch, capsys):
    """Stopped between its methods, and started with other features then, a probe gives what the
    undisturbed one gives and keeps nothing of the first start."""
    task = "l2 = [1e-4, 1e-1, 1e-2]\nk = [1, 5]\nresult_plot = 'none'"
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    assert run(write(tmp_path / "whole", DIGITS.data, DIGITS.target, task), tmp_path / "whole") == 0
    spec = write(tmp_path / "stopped", DIGITS.data[:, :60], DIGITS.target, task)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_probe, "fit_models", stop)
        assert run(spec, tmp_path / "stopped") == 130
    (folder,) = tmp_path.glob("stopped/runs/precomputed_features/probe*/0")
    assert (folder / "predictions_knn_test.csv").is_file()
    assert not (folder / "metrics_probe.json").exists()
    write(tmp_path / "stopped", DIGITS.data, DIGITS.target, task)
    assert run(spec, tmp_path / "stopped") == 0
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")
    assert not list((tmp_path / "stopped").rglob("*.pt"))
    assert "is finished" in capsys.readouterr().out


def test_progress_says_what_is_left(tmp_path, capsys):
    task = 'methods = ["linear"]\nl2 = [1e-2, 1.0]\nresult_plot = "none"'
    assert run(write(tmp_path, DIGITS.data, DIGITS.target, task), tmp_path) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("linear: ")]
    assert "l2 1 (1 of 2)" in said[0] and "l2 0.01 (2 of 2)" in said[1]
    assert said[1].endswith("about 0 s left")


# ---------------------------------------------------------------- reading


class Reader:
    """Bags by number that are never together in memory."""

    width, item_bytes = 4, 2
    lengths = np.array([5000, 1, 3])

    def read(self, bag):
        generator = np.random.default_rng(bag)
        return (generator.normal(size=(self.lengths[bag], 4)) * 3 + 100).astype(np.float16)


class OneByOne(BagSource):
    """Bags of which only one may be asked for at a time."""

    def fetch(self, rows):
        assert len(rows) == 1
        return super().fetch(rows)


def test_one_bag_at_a_time_is_in_memory():
    source = OneByOne(Reader(), np.array([2, 0, 1]))
    bags = [Reader().read(bag).astype(np.float64) for bag in (2, 0, 1)]
    means = np.stack([bag.mean(0) for bag in bags])
    np.testing.assert_allclose(run_probe.gather_features(source, 3, None), means, rtol=1e-6)
    scale = feature_scale(source)
    np.testing.assert_allclose(scale.mean, np.concatenate(bags).mean(0))
    np.testing.assert_allclose(scale.std, np.concatenate(bags).std(0))
    scaled = run_probe.gather_features(source, 3, scale)
    np.testing.assert_allclose(scaled, (means - scale.mean) / scale.std, atol=1e-5)


@pytest.fixture(scope="module")
def scaled_runs(tmp_path_factory):
    """Probes of a label in a small feature and noise in large ones, by what standardises them:
    method -> test scores of class 1 and accuracy."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, len(DIGITS.data))
    features = generator.normal(size=(len(labels), 4)) * [0.25, 100, 100, 0]
    features[:, 0] += labels
    task = 'k = [5]\ndistance = "euclidean"\nl2 = [1e-3]\nresult_plot = "none"'
    found = {}
    for data in (False, True):
        for linear in (False, True):
            folder = tmp_path_factory.mktemp("scaled")
            spec = write(folder, features, labels, f"{task}\nstandardize = {str(linear).lower()}")
            assert run(spec, folder, f"data.standardize={str(data).lower()}") == 0
            path, content = results(folder)
            for method in ("knn", "linear"):
                table = read_predictions(
                    path / f"predictions_{method}_test.csv",
                    subtask="multiclass",
                    class_names=("0", "1"),
                )
                accuracy = content[method]["test"]["metrics"]["acc"]
                found[method, data, linear] = table.scores.values[:, 1], accuracy
    return found


def test_standardised_features_have_other_neighbours(scaled_runs):
    assert scaled_runs["knn", True, False][1] > 0.95 > 0.7 > scaled_runs["knn", False, False][1]
    np.testing.assert_array_equal(
        scaled_runs["knn", True, True][0], scaled_runs["knn", True, False][0]
    )


def test_linear_models_may_be_standardised_by_either_option(scaled_runs):
    expected = scaled_runs["linear", False, True][0]
    for options in ((True, False), (True, True)):
        np.testing.assert_allclose(scaled_runs["linear", *options][0], expected, atol=1e-4)
    assert np.abs(scaled_runs["linear", False, False][0] - expected).max() > 1e-2  # L2 differs


# ---------------------------------------------------------------- float64


def write_float64(folder, offset, scale=1e-3, bags=False):
    """Features of three classes, float64 beside a large offset, by split; the spec."""
    generator = np.random.default_rng(0)
    found, files = {}, []
    for name, count in (("train", 90), ("val", 30), ("test", 60)):
        labels = np.arange(count) % 3
        features = 4 * np.eye(3)[labels] + generator.normal(size=(count, 3))
        features = offset + scale * (features.repeat(2, 0) if bags else features)
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"], file["labels"] = features, labels
            if bags:
                file["bag_lengths"] = np.full(count, 2)
        files.append(f'{name}_features_file = "{folder / name}.h5"')
        found[name] = features[::2] if bags else features, labels
    path = folder / "probe.toml"
    path.write_text(SPEC.format(files="\n".join(files), task=FEW.replace("1.0", "1e-3")))
    return found, str(path)


@pytest.mark.parametrize("where", ["task", "data", "neither"])
@pytest.mark.parametrize(("offset", "bags"), [(1e8, False), (1e6, True)])
def test_float64_beside_a_large_offset_keeps_its_digits(tmp_path, offset, bags, where):
    found, spec = write_float64(tmp_path, offset, bags=bags)
    scale = 1e-3 if where != "neither" else 1.0  # without standardising L2 decides what is learnt
    if where == "neither":
        found, spec = write_float64(tmp_path, offset, scale, bags)
    chosen = [f"{part}.standardize={str(part == where).lower()}" for part in ("task", "data")]
    assert run(spec, tmp_path, *chosen, "task.distance=euclidean") == 0
    path, content = results(tmp_path)
    x, y = found["train"]
    scaler = StandardScaler(with_std=where != "neither").fit(x)
    reference = LogisticRegression(C=1 / (1e-3 * len(x)), tol=1e-8, max_iter=5000)
    reference.fit(scaler.transform(x), y)
    inputs = scaler.transform(found["test"][0])
    table = read_predictions(
        path / "predictions_linear_test.csv", subtask="multiclass", class_names=("0", "1", "2")
    )
    np.testing.assert_allclose(table.scores.values, reference.predict_proba(inputs), atol=1e-3)
    knn = KNeighborsClassifier(1).fit(scaler.transform(x), y)
    accuracy = knn.score(inputs, found["test"][1])
    assert content["knn"]["test"]["metrics"]["acc"] == pytest.approx(accuracy, abs=1e-9)
    assert accuracy > 0.9


@pytest.mark.parametrize("mode", ["probe", "umap", "umap.input"])
@pytest.mark.parametrize("bags", [False, True])
def test_features_beyond_float32_are_one_line(tmp_path, capsys, mode, bags):
    _, spec = write_float64(tmp_path, 0, 1e200, bags)
    more = [] if mode == "probe" else ["mode=umap", "umap.method=pca"]
    more += [f"umap.input={tmp_path / 'val.h5'}"] if mode == "umap.input" else []
    assert run(spec, tmp_path, *more) == 2
    error = capsys.readouterr().err.strip()
    assert "features beyond 3.4e+38, the largest float32" in error.splitlines()[0]
    assert "Traceback" not in error


# ---------------------------------------------------------------- nothing to choose by


@pytest.mark.parametrize("kind", ["one class", "constant target"])
def test_a_metric_that_val_cannot_define_chooses_nothing(tmp_path, capsys, kind):
    x, y = DIGITS.data[:300], (DIGITS.target[:300] > 4).astype(np.int64)
    metric = "auroc"
    if kind == "constant target":
        metric, y = "pearson", x.mean(1)
    y[100:200] = y[100]
    splits = {"train": slice(0, 100), "val": slice(100, 200), "test": slice(200, None)}
    task = f'metrics = ["{metric}"]\nk = [3, 1]\nl2 = [1.0, 1e-2]\nresult_plot = "none"'
    spec = write(tmp_path, x, y, task, splits)
    line = f"note: the labels of val define no {metric}, whatever the model predicts"
    for dry in (["--dry-run"], []):
        assert glovita.main([spec, *dry, "--override", f"exp_dir={tmp_path / 'runs'}"]) == 0
        said = capsys.readouterr().out
        assert line in said and "nothing can be chosen" in said and "nan" not in said
    assert "knn (k 1, not chosen: undefined on val) test" in said
    _, content = results(tmp_path)
    assert content["knn"]["chosen"] == {"k": 1, "by": None}
    assert content["linear"]["chosen"]["l2"] == 1 and content["linear"]["chosen"]["by"] is None


# ---------------------------------------------------------------- what a probe is not for


def test_infer_says_where_the_predictions_are(tmp_path, capsys):
    spec = write(tmp_path, DIGITS.data, DIGITS.target, FEW)
    assert run(spec, tmp_path) == 0
    capsys.readouterr()
    assert run(spec, tmp_path, "mode=infer") == 2
    error = capsys.readouterr().err.strip()
    assert "a probe keeps no model" in error and len(error.splitlines()) == 1
    path, _ = results(tmp_path)
    assert str(path) in error and "metrics_probe.json" in error


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    @contextmanager
    def session():
        yield Ranks(1, 2, 1, torch.device("cpu"))

    monkeypatch.setattr(run_probe.dist, "session", session)
    assert run(write(tmp_path, DIGITS.data, DIGITS.target), tmp_path) == 2
    assert capsys.readouterr().err.strip() == (
        "a probe runs in one process: start it without torchrun"
    )


def test_the_scores_beside_a_table_are_named(tmp_path, capsys):
    (tmp_path / "metrics_probe.json").write_text("{}")
    table = tmp_path / "predictions_<method>_<split>"
    run_probe.show_results(RunDir(tmp_path), "fresh")
    assert f"{table}.csv" in (said := capsys.readouterr().out) and f"{table}.h5" not in said
    (tmp_path / "predictions_knn_test.h5").write_bytes(b"")
    run_probe.show_results(RunDir(tmp_path), "fresh")
    assert f"{table}.h5" in capsys.readouterr().out
