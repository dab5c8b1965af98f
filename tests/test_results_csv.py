"""Predictions as CSV: what people read in them, and reading them back equal."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glovita_lib.errors import UserError
from glovita_lib.metrics_classification import Scores
from glovita_lib.results import read_predictions, write_prediction_csv

NAMES = ("cat", 'a "b", c', "Ümlaut")


def columns(path: Path) -> dict[str, list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}


def data(subtask: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = rng.random((n, k))
    if subtask == "multiclass":
        return rng.integers(0, k, n), scores / scores.sum(1, keepdims=True)
    if subtask == "multilabel":
        return rng.integers(0, 2, (n, k)).astype(np.float64), scores
    return 1.7e9 + rng.normal(size=(n, k)), 1.7e9 + rng.normal(size=(n, k))


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize(("n", "k"), [(50, 3), (1, 3), (0, 3), (7, 1)])
def test_reads_back_equal(tmp_path: Path, subtask: str, n: int, k: int) -> None:
    targets, scores = data(subtask, n, k)
    ids = [f"folder/{i},.png" for i in range(n)]
    resolved = {"subtask": subtask, "class_names": NAMES[:k]}
    path = tmp_path / "predictions_test.csv"
    write_prediction_csv(path, ids=ids, targets=targets, scores=Scores(scores), **resolved)
    table = read_predictions(path, **resolved)
    assert table.ids == ids
    assert np.array_equal(table.scores.values.reshape(n, k), scores)
    assert np.array_equal(table.targets.reshape(targets.shape), targets)
    assert table.targets.dtype == targets.dtype


def test_columns_of_multiclass(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], dtype=np.float32)
    resolved = {"subtask": "multiclass", "class_names": NAMES}
    write_prediction_csv(
        path, ids=["a", "b"], targets=np.array([2, 0]), scores=Scores(scores), **resolved
    )
    assert columns(path) == {
        "id": ["a", "b"],
        "label": ["Ümlaut", "cat"],
        "prediction": ['a "b", c', "cat"],
        "p_cat": ["0.1", "0.5"],
        'p_a "b", c': ["0.7", "0.25"],
        "p_Ümlaut": ["0.2", "0.25"],
    }
    write_prediction_csv(path, ids=["a", "b"], targets=None, scores=Scores(scores), **resolved)
    assert "label" not in columns(path)
    assert read_predictions(path, **resolved).targets is None


def test_columns_of_multilabel_and_regression(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    scores = np.array([[0.5, 0.49]], dtype=np.float32)
    targets = np.array([[0, 1]], dtype=np.float32)
    rest = {"ids": ["a"], "targets": targets, "scores": Scores(scores), "class_names": ("x", "y")}
    write_prediction_csv(path, subtask="multilabel", **rest)
    assert columns(path) == {
        "id": ["a"],
        "label_x": ["0"],
        "label_y": ["1"],
        "prediction_x": ["1"],
        "prediction_y": ["0"],
        "p_x": ["0.5"],
        "p_y": ["0.49"],
        "logit_x": ["0.5"],
        "logit_y": ["0.49"],
    }
    write_prediction_csv(path, subtask="regression", **rest)
    assert list(columns(path)) == ["id", "label_x", "label_y", "prediction_x", "prediction_y"]
    one = {
        "ids": ["a"],
        "targets": targets[:, 1:],
        "scores": Scores(scores[:, 1:]),
        "class_names": ("y",),
    }
    write_prediction_csv(path, subtask="regression", **one)
    assert columns(path) == {"id": ["a"], "label": ["1.0"], "prediction": ["0.49"]}


def test_other_files_are_one_line(tmp_path: Path) -> None:
    resolved = {"subtask": "multiclass", "class_names": NAMES}
    path = tmp_path / "x.csv"
    with pytest.raises(UserError, match="cannot read"):
        read_predictions(path, **resolved)
    path.write_text("")
    with pytest.raises(UserError, match="cannot read"):
        read_predictions(path, **resolved)
    write_prediction_csv(
        path, ids=["a"], targets=np.array([0]), scores=Scores(np.ones((1, 3))), **resolved
    )
    with pytest.raises(UserError, match="no column p_dog"):
        read_predictions(path, subtask="multiclass", class_names=("cat", "dog"))
    path.write_text(path.read_text().replace("a,cat", "a,dog"))
    with pytest.raises(UserError, match="'dog'"):
        read_predictions(path, **resolved)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBER = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_strings_and_numbers_read_back(tmp_path: Path, subtask: str, data) -> None:
    """Line ends, quotes, commas and byte-order marks in ids and names; numbers of any size."""
    names = tuple(data.draw(st.lists(TEXT, min_size=1, max_size=3, unique=True)))
    ids = data.draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    shape = (len(ids), len(names))
    count = len(ids) * len(names)
    flat = data.draw(st.lists(NUMBER, min_size=count, max_size=count))
    values = np.array(flat).reshape(shape)
    targets = np.zeros(len(ids), int) if subtask == "multiclass" else np.nan_to_num(values)
    targets = (targets > 0).astype(float) if subtask == "multilabel" else targets
    path, kind = tmp_path / "any.csv", {"subtask": subtask, "class_names": names}
    with np.errstate(all="ignore"):
        scores = Scores(values, values if subtask == "multilabel" else None)
        write_prediction_csv(path, ids=ids, targets=targets, scores=scores, **kind)
        table = read_predictions(path, **kind)
    assert table.ids == ids
    np.testing.assert_array_equal(table.scores.values, values)
    np.testing.assert_array_equal(table.targets, targets)
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(
        path, dtype=str, keep_default_na=False, encoding="utf-8", skip_blank_lines=False
    )
    assert frame["id"].tolist() == ids
