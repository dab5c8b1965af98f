"""Summaries over folds against scikit-learn and the statistics module."""

import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import KFold

from glovita_lib import files
from glovita_lib.metrics import compute
from glovita_lib.metrics_classification import Scores
from glovita_lib.prediction_files import read_predictions, write_prediction_files
from glovita_lib.results import joined, write_summary
from glovita_lib.rundir import RunDir

NAMES = ("setosa", "versicolor", "virginica")
RESOLVED = {"subtask": "multiclass", "class_names": NAMES}
CONFIG = {"optimizer": {"lr": 0.1}, "data": {"fold": 0}}


def measure(targets: np.ndarray, scores: Scores) -> dict[str, float]:
    return compute(("acc",), targets=targets, scores=scores, **RESOLVED)


summarize = partial(
    write_summary,
    config=CONFIG,
    read=partial(read_predictions, **RESOLVED),
    measure=lambda tables: measure(*joined(tables)),
)


def fold(
    group: Path,
    number: int,
    ids: list[str],
    targets: np.ndarray,
    scores: np.ndarray,
    *,
    split: str = "test",
    lr: float = 0.1,
) -> None:
    run = RunDir(group / str(number))
    files.write_json(run.config, {"optimizer": {"lr": lr}, "data": {"fold": number}})
    write_prediction_files(
        run.predictions_of(split), ids=ids, targets=targets, scores=Scores(scores), **RESOLVED
    )
    metrics = measure(targets, Scores(scores))
    files.write_json(run.metrics_of(split), {"loss": 0.5 + number, "metrics": metrics})


def test_out_of_fold_predictions_of_iris(tmp_path: Path) -> None:
    x, y = load_iris(return_X_y=True)
    predicted = np.empty(150, dtype=int)
    accuracies = []
    # unequal folds, so that the pooled value is not the mean
    for number, (train, test) in enumerate(KFold(4, shuffle=True, random_state=0).split(x)):
        model = LogisticRegression(C=0.01, max_iter=1000).fit(x[train], y[train])
        scores = model.predict_proba(x[test]).astype(np.float32)
        fold(tmp_path, number, [str(i) for i in test], y[test], scores)
        predicted[test] = scores.argmax(1)
        accuracies.append(accuracy_score(y[test], scores.argmax(1)))
    (tmp_path / "notes").mkdir()
    (tmp_path / "9").mkdir()  # a fold that has not started
    result = summarize(tmp_path)
    assert result["left_out"] == {}
    test = files.read_json(tmp_path / "summary.json")["test"]
    accuracy = test["metrics"]["acc"]
    assert accuracy["mean"] == pytest.approx(statistics.mean(accuracies))
    assert accuracy["sd"] == pytest.approx(statistics.stdev(accuracies))
    assert accuracy["n"] == 4
    assert accuracy["values"] == {str(i): pytest.approx(a) for i, a in enumerate(accuracies)}
    assert test["metrics"]["loss"]["mean"] == 2.0
    assert test["pooled"]["acc"] == pytest.approx(accuracy_score(y, predicted))
    assert test["pooled"]["acc"] != pytest.approx(accuracy["mean"])
    assert (test["samples"], test["repeated_ids"]) == (150, 0)
    assert test["folds"] == ["0", "1", "2", "3"]


def test_small_and_odd_folds(tmp_path: Path) -> None:
    scores = np.eye(3, dtype=np.float32)
    fold(tmp_path, 10, ["a", "b"], np.array([0, 1]), scores[:2])
    only = summarize(tmp_path)["test"]
    assert only["metrics"]["acc"] | {"values": None} == {
        "mean": 1.0,
        "sd": None,
        "n": 1,
        "values": None,
    }
    fold(tmp_path, 2, ["b", "c"], np.array([0, 2]), scores[1:])
    fold(tmp_path, 3, [], np.zeros(0, dtype=np.int64), scores[:0])
    result = summarize(tmp_path)["test"]
    assert result["folds"] == ["2", "3", "10"]
    assert result["repeated_ids"] == 1
    assert result["samples"] == 4
    assert result["pooled"]["acc"] == 0.75
    assert result["metrics"]["acc"]["values"]["3"] is None
    assert result["metrics"]["acc"]["n"] == 2
    assert result["metrics"]["acc"]["mean"] == 0.75


def test_folds_that_do_not_belong_are_named(tmp_path: Path) -> None:
    scores = np.eye(3, dtype=np.float32)
    targets = np.arange(3)
    fold(tmp_path, 0, ["a", "b", "c"], targets, scores)
    fold(tmp_path, 1, ["d", "e", "f"], targets, scores[::-1], lr=0.2)
    fold(tmp_path, 2, ["g", "h", "i"], targets, scores)
    fold(tmp_path, 2, ["j", "k", "l"], targets, scores, split="val")
    RunDir(tmp_path / "2").predictions_of("test").write_text("id,p_cat\n")
    result = summarize(tmp_path)
    assert result["test"]["folds"] == ["0"]
    assert result["test"]["pooled"]["acc"] == 1.0
    assert result["val"]["folds"] == ["2"]
    assert result["left_out"]["1"] == "another spec: optimizer.lr: 0.1 -> 0.2"
    assert "no column p_setosa" in result["left_out"]["2"]


def test_nothing_is_evaluated_yet(tmp_path: Path) -> None:
    assert summarize(tmp_path) == {"left_out": {}}
