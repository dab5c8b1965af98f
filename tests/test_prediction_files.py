"""Files of predictions: what people read in them, and reading them back equal."""

import csv
import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.special
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glovita_lib.errors import UserError
from glovita_lib.metrics import compute
from glovita_lib.metrics_classification import Scores, log_odds_of_mean
from glovita_lib.prediction_files import (
    MOST_COLUMNS,
    Table,
    as_read,
    read_predictions,
    write_prediction_files,
)

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
    write_prediction_files(path, ids=ids, targets=targets, scores=Scores(scores), **resolved)
    table = read_predictions(path, **resolved)
    assert table.ids == ids
    assert np.array_equal(table.scores.values.reshape(n, k), scores)
    assert np.array_equal(table.targets.reshape(targets.shape), targets)
    assert table.targets.dtype == targets.dtype


def test_columns_of_multiclass(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], dtype=np.float32)
    resolved = {"subtask": "multiclass", "class_names": NAMES}
    write_prediction_files(
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
    write_prediction_files(path, ids=["a", "b"], targets=None, scores=Scores(scores), **resolved)
    assert "label" not in columns(path)
    assert read_predictions(path, **resolved).targets is None


def test_columns_of_multilabel_and_regression(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    scores = np.array([[0.5, 0.49]], dtype=np.float32)
    targets = np.array([[0, 1]], dtype=np.float32)
    rest = {"ids": ["a"], "targets": targets, "scores": Scores(scores), "class_names": ("x", "y")}
    write_prediction_files(path, subtask="multilabel", **rest)
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
    write_prediction_files(path, subtask="regression", **rest)
    assert list(columns(path)) == ["id", "label_x", "label_y", "prediction_x", "prediction_y"]
    one = {
        "ids": ["a"],
        "targets": targets[:, 1:],
        "scores": Scores(scores[:, 1:]),
        "class_names": ("y",),
    }
    write_prediction_files(path, subtask="regression", **one)
    assert columns(path) == {"id": ["a"], "label": ["1.0"], "prediction": ["0.49"]}


def test_other_files_are_one_line(tmp_path: Path) -> None:
    resolved = {"subtask": "multiclass", "class_names": NAMES}
    path = tmp_path / "x.csv"
    with pytest.raises(UserError, match="cannot read"):
        read_predictions(path, **resolved)
    path.write_text("")
    with pytest.raises(UserError, match="cannot read"):
        read_predictions(path, **resolved)
    write_prediction_files(
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
        write_prediction_files(path, ids=ids, targets=targets, scores=scores, **kind)
        table = read_predictions(path, **kind)
    assert table.ids == ids
    np.testing.assert_array_equal(table.scores.values, values)
    np.testing.assert_array_equal(table.targets, targets)
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(
        path, dtype=str, keep_default_na=False, encoding="utf-8", skip_blank_lines=False
    )
    assert frame["id"].tolist() == ids


# ------------------------------------------------------------------------------- many classes

MANY = tuple(f'class {k}, "ü"' for k in range(MOST_COLUMNS + 20))
CLASSES = pytest.mark.parametrize("subtask", ["multiclass", "multilabel"])


def many(
    subtask: str, n: int, k: int = len(MANY), seed: int = 0, largest: float = 400.0
) -> tuple[np.ndarray, Scores]:
    """Targets and scores of a network that is sure of some samples."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(n, k)) * rng.choice([1, largest], (n, 1))).astype(np.float32)
    if subtask == "multiclass":
        return rng.integers(0, k, n), Scores.of_logits(logits, subtask)
    return (rng.random((n, k)) < 0.1).astype(np.float64), Scores.of_logits(logits, subtask)


def same(one: Table, two: Table) -> None:
    """Two tables are equal to the last bit."""
    assert one.ids == two.ids
    for a, b in ((one.targets, two.targets), (one.scores.values, two.scores.values)):
        assert (a is None) == (b is None)
        assert a is None or (np.array_equal(a, b) and a.dtype == b.dtype)
    assert np.array_equal(one.scores.ranked, two.scores.ranked)


@CLASSES
@pytest.mark.parametrize("n", [0, 1, 60])
@pytest.mark.parametrize("k", [3, MOST_COLUMNS, MOST_COLUMNS + 1])
@pytest.mark.parametrize("labelled", [True, False])
def test_what_was_written_need_not_be_read(
    tmp_path: Path, subtask: str, n: int, k: int, labelled: bool
) -> None:
    names = tuple(map(str, range(k)))
    targets, scores = many(subtask, n, k)
    known, ids = targets if labelled else None, [f"s/{i}" for i in range(n)]
    path, kind = tmp_path / "p.csv", {"subtask": subtask, "class_names": names}
    write_prediction_files(path, ids=ids, targets=known, scores=scores, **kind)
    assert (tmp_path / "p.h5").is_file() == (k > MOST_COLUMNS)
    table = read_predictions(path, **kind)
    same(table, as_read(ids, known, scores, subtask))
    assert np.array_equal(table.scores.values, scores.values)
    if n and labelled:
        metrics = ("auroc", "ap", "acc", "top5acc", "brier")[: 5 if subtask == "multiclass" else 3]
        measured = partial(compute, metrics, subtask=subtask, class_names=names)
        found = measured(targets=table.targets, scores=table.scores)
        assert found == pytest.approx(
            measured(targets=targets, scores=scores), abs=1e-12, nan_ok=True
        )


@CLASSES
@pytest.mark.parametrize("largest", [9.0, 120.0, 1000.0])
def test_scores_of_ensembles_and_neighbours_of_many_classes(
    tmp_path: Path, subtask: str, largest: float
) -> None:
    n, rng = 200, np.random.default_rng(0)
    targets, one = many(subtask, n, largest=largest)
    mean = Scores.mean([one, many(subtask, n, seed=1, largest=largest)[1]])
    ids = list(map(str, range(n)))
    votes = rng.multinomial(20, np.full(len(MANY), 1 / len(MANY)), n) / 20
    of_votes = [Scores.of_probabilities(votes.astype(kind), subtask) for kind in ("f4", "f8")]
    for scores in (mean, *of_votes, Scores.mean(of_votes[1:] * 2)):
        path, kind = tmp_path / "p.csv", {"subtask": subtask, "class_names": MANY}
        write_prediction_files(path, ids=ids, targets=targets, scores=scores, **kind)
        found = read_predictions(path, **kind).scores
        assert np.array_equal(found.values, scores.values)
        assert np.array_equal(found.predicted(subtask), scores.predicted(subtask))
        names = ("acc", "f1", "auroc", "ap", "ece", "brier")
        wanted, again = (
            compute(names, subtask=subtask, targets=targets, scores=s, class_names=MANY)
            for s in (scores, found)
        )
        assert again == wanted


@CLASSES
@pytest.mark.parametrize("classes", [2, 3, MOST_COLUMNS + 1])
@pytest.mark.parametrize("scale", [20.0, 40.0, 300.0])
def test_what_an_ensemble_predicts_is_exact_everywhere(
    tmp_path: Path, subtask: str, classes: int, scale: float
) -> None:
    """Members that are sure and disagree: their mean is one half to all digits of float64."""
    mpmath = pytest.importorskip("mpmath")
    n, rng = 400 if classes < 4 else 20, np.random.default_rng(1)
    truth = rng.integers(0, classes, n)
    logits = rng.normal(size=(2, n, classes)) + 2.0 * np.eye(classes)[truth]
    members = (logits * scale).astype(np.float32)
    scores = Scores.mean([Scores.of_logits(each, subtask) for each in members])
    with mpmath.workdps(400):
        means = []
        for row in members.swapaxes(0, 1):  # (2, K)
            e = [[mpmath.exp(mpmath.mpf(float(x))) for x in each] for each in row]
            if subtask == "multilabel":
                p = [[x / (1 + x) for x in each] for each in e]
            else:
                p = [[x / mpmath.fsum(each) for x in each] for each in e]
            means.append([sum(both) / 2 for both in zip(*p, strict=True)])
        if subtask == "multilabel":
            exact = np.array([[p >= 0.5 for p in row] for row in means])
        else:
            exact = np.array([max(range(classes), key=row.__getitem__) for row in means])
    assert np.array_equal(scores.predicted(subtask), exact)
    targets = truth if subtask == "multiclass" else np.eye(classes)[truth]
    kind = {"subtask": subtask, "class_names": MANY[:classes]}
    right = compute(("acc",), targets=targets, scores=scores, **kind)["acc"]
    assert right == pytest.approx((exact == targets).mean(), abs=1e-12)
    path, ids = tmp_path / "p.csv", list(map(str, range(n)))
    write_prediction_files(path, ids=ids, targets=targets, scores=scores, **kind)
    found = read_predictions(path, **kind).scores
    for again in (found, as_read(ids, targets, scores, subtask).scores):
        assert compute(("acc",), targets=targets, scores=again, **kind)["acc"] == right
    if subtask == "multiclass":
        assert columns(path)["prediction"] == [MANY[k] for k in exact]
    elif classes <= MOST_COLUMNS:
        said = [columns(path)[f"prediction_{name}"] for name in MANY[:classes]]
        assert np.array_equal(np.array(said, int).T, exact)
    if subtask == "multiclass" and classes == 2:  # what the probabilities say is less
        assert (scores.values.argmax(1) != exact).any()


def test_members_that_cancel_out_say_nothing() -> None:
    """Log-odds of x, x + 1, -x, -x - 1 have the mean probability 1 / 2: all are exactly 0."""
    x = np.random.default_rng(0).normal(size=(2000, 1)) * 3
    for members in ([x, -x], [x, x + 1, -x, -x - 1], [-x - 1, x, x + 1, -x]):
        assert not log_odds_of_mean(members).any()
    assert log_odds_of_mean([x, -x + 1e-9]).all()


def test_order_within_a_predicted_class_is_kept_in_the_file(tmp_path: Path) -> None:
    """Members that disagree and are sure, where all are predicted alike: probabilities are 1 / 2 to
    all digits, and only log-odds rank the samples."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 300)
    sure, more = 40 + 40 * rng.random(300), 0.1 + np.abs(rng.normal(6 - 4 * targets, 2))
    first = np.stack([sure + more, 0 * sure], 1).astype(np.float32)
    second = np.stack([0 * sure, sure], 1).astype(np.float32)
    scores = Scores.mean([Scores.of_logits(one, "multiclass") for one in (first, second)])
    assert (scores.predicted("multiclass") == 0).all()
    named = {"subtask": "multiclass", "class_names": ("a", "b")}
    path = tmp_path / "predictions.csv"
    ids = list(map(str, range(300)))
    write_prediction_files(path, ids=ids, targets=targets, scores=scores, **named)
    read = read_predictions(path, **named).scores
    found = [compute(("auroc", "ap"), targets=targets, scores=s, **named) for s in (scores, read)]
    assert found[0] == pytest.approx(found[1], abs=1e-12) and abs(found[0]["auroc"] - 0.5) > 0.01


def test_equal_means_of_an_ensemble_predict_the_first_class() -> None:
    """Two members that say the opposite: one half each, whatever rounding leaves of it."""
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0, 100.0):
        logits = (rng.normal(size=(500, 2)) * scale).astype(np.float32)
        members = [Scores.of_logits(each, "multiclass") for each in (logits, logits[:, ::-1])]
        mean = Scores.mean(members)
        assert (mean.predicted("multiclass") == 0).all()
        labels = [Scores.of_logits(each, "multilabel") for each in (logits, -logits)]
        assert Scores.mean(labels).predicted("multilabel").all()


@pytest.mark.parametrize("classes", [2, 3, len(MANY)])
def test_ensembles_of_confident_members_rank_alike_in_the_file(tmp_path: Path, classes) -> None:
    """Two that disagree give one half to all digits, and what ranks samples is far below these."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, 200)
    logits = rng.normal(size=(2, 200, classes)) + 2 * np.eye(classes)[targets]
    members = [Scores.of_logits((40 * each).astype(np.float32), "multiclass") for each in logits]
    scores, path = Scores.mean(members), tmp_path / "p.csv"
    kind = {"subtask": "multiclass", "class_names": MANY[:classes]}
    ids = list(map(str, range(200)))
    write_prediction_files(path, ids=ids, targets=targets, scores=scores, **kind)
    found = read_predictions(path, **kind).scores
    names = ("acc", "auroc", "ap")
    wanted = compute(names, targets=targets, scores=scores, **kind)
    assert compute(names, targets=targets, scores=found, **kind) == wanted
    told = as_read(ids, targets, scores, "multiclass").scores
    assert np.array_equal(told.ranked, found.ranked)
    if classes < len(MANY):
        plain = Scores.of_probabilities(scores.values, "multiclass")
        lost = compute(names, targets=targets, scores=plain, **kind)
        assert abs(lost["ap"] - wanted["ap"]) > 1e-4


def test_equal_votes_of_many_classes_are_equal_in_the_file(tmp_path: Path) -> None:
    """Metrics of the file are those of the votes, also by the one line that reads it."""
    rng, classes = np.random.default_rng(0), len(MANY)
    targets = rng.integers(0, classes, 300)
    drawn = np.where(
        rng.random((300, 20)) < 0.15, targets[:, None], rng.integers(0, classes, (300, 20))
    )
    votes = np.stack([np.bincount(row, minlength=classes) for row in drawn]) / 20
    path, kind = tmp_path / "p.csv", {"subtask": "multiclass", "class_names": MANY}
    scores, ids = Scores.of_probabilities(votes, "multiclass"), list(map(str, range(300)))
    write_prediction_files(path, ids=ids, targets=targets, scores=scores, **kind)
    with h5py.File(tmp_path / "p.h5") as file:
        assert "logits" not in file and "log_odds" not in file
        plain = file["probabilities"][:]
    assert np.array_equal(plain, votes)
    wanted = compute(("ap", "auroc", "acc"), targets=targets, scores=scores, **kind)
    again = read_predictions(path, **kind).scores
    for found in (again, Scores(plain)):
        assert compute(("ap", "auroc", "acc"), targets=targets, scores=found, **kind) == (
            pytest.approx(wanted, abs=1e-12)
        )


def test_columns_of_many_classes(tmp_path: Path) -> None:
    targets, scores = many("multiclass", 40)
    path, kind = tmp_path / "p.csv", {"subtask": "multiclass", "class_names": MANY}
    write_prediction_files(
        path, ids=list(map(str, range(40))), targets=targets, scores=scores, **kind
    )
    found = columns(path)
    tops = [f"{kind}{place}" for place in range(1, 6) for kind in ("top", "p_top")]
    assert list(found) == ["id", "label", "prediction", "probability", *tops]
    order = np.argsort(-scores.given, axis=1, kind="stable")
    names = np.array(MANY)
    assert found["label"] == names[targets].tolist()
    assert found["prediction"] == found["top1"] == names[order[:, 0]].tolist()
    for place in range(5):
        assert found[f"top{place + 1}"] == names[order[:, place]].tolist()
        numbers = np.array(found[f"p_top{place + 1}"], float)
        assert np.array_equal(numbers, np.take_along_axis(scores.values, order, 1)[:, place])
    with h5py.File(tmp_path / "p.h5") as file:
        assert file["class_names"].asstr()[:].tolist() == list(MANY)
        assert file["ids"].asstr()[:].tolist() == found["id"]
        assert file["logits"].dtype == np.float32
        softmax = scipy.special.softmax(file["logits"][:].astype(np.float64), 1)
        np.testing.assert_allclose(softmax, scores.values, rtol=1e-12, atol=1e-300)
        assert np.array_equal(file["labels"], targets)


def test_columns_of_many_labels(tmp_path: Path) -> None:
    targets, scores = many("multilabel", 40)
    path, kind = tmp_path / "p.csv", {"subtask": "multilabel", "class_names": MANY}
    write_prediction_files(
        path, ids=list(map(str, range(40))), targets=targets, scores=scores, **kind
    )
    found, names = columns(path), np.array(MANY)
    order = np.argsort(-scores.given, axis=1, kind="stable")
    for row in range(40):
        cell = {name: values[row] for name, values in found.items()}
        assert json.loads(cell["label"]) == names[targets[row] > 0].tolist()
        assert int(cell["label_count"]) == targets[row].sum()
        best = [k for k in order[row, :5] if scores.values[row, k] >= 0.5]
        assert json.loads(cell["prediction"]) == names[best].tolist()
        assert json.loads(cell["probability"]) == scores.values[row, best].tolist()
        assert int(cell["prediction_count"]) == (scores.values[row] >= 0.5).sum()
        assert [cell[f"top{place}"] for place in range(1, 6)] == names[order[row, :5]].tolist()


@CLASSES
def test_other_orders_and_other_classes_of_many(tmp_path: Path, subtask: str) -> None:
    targets, scores = many(subtask, 30)
    path, ids = tmp_path / "p.csv", list(map(str, range(30)))
    rest = {"ids": ids, "targets": targets, "scores": scores}
    write_prediction_files(path, **rest, subtask=subtask, class_names=MANY)
    table = read_predictions(path, subtask=subtask, class_names=MANY[::-1])
    np.testing.assert_allclose(table.scores.values[:, ::-1], scores.values, rtol=1e-12)
    turned = len(MANY) - 1 - targets if subtask == "multiclass" else targets[:, ::-1]
    assert np.array_equal(table.targets, turned)
    with pytest.raises(UserError, match="no class new"):
        read_predictions(path, subtask=subtask, class_names=(*MANY[1:], "new"))
    with pytest.raises(UserError, match="other classes: it has 120 classes"):
        read_predictions(path, subtask=subtask, class_names=MANY[:-5])


def write_many(path: Path, seed: int, k: int = len(MANY)) -> None:
    targets, scores = many("multiclass", 30, k, seed)
    ids = list(map(str, range(30)))
    names = MANY[:k]
    write_prediction_files(
        path, ids=ids, targets=targets, scores=scores, subtask="multiclass", class_names=names
    )


def test_files_of_two_writings_are_never_taken_for_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    write_many(one, 1)
    write_many(two, 2)
    kind = {"subtask": "multiclass", "class_names": MANY}
    stale = one.with_suffix(".h5").read_bytes()
    one.with_suffix(".h5").write_bytes(two.with_suffix(".h5").read_bytes())
    with pytest.raises(UserError, match="is not the table that one.h5 was written with"):
        read_predictions(one, **kind)
    one.with_suffix(".h5").write_bytes(stale[: len(stale) // 2])
    with pytest.raises(UserError, match="cannot read .*one.h5"):
        read_predictions(one, **kind)
    one.with_suffix(".h5").unlink()
    with pytest.raises(UserError, match="cannot read .*one.h5"):
        read_predictions(one, **kind)
    two.unlink()
    with pytest.raises(UserError, match="cannot read .*two.csv"):
        read_predictions(two, **kind)


def test_few_classes_leave_no_scores_of_many_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    write_many(path, 0)
    write_many(path, 1, 5)
    assert [file.name for file in tmp_path.iterdir()] == ["p.csv"]
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["mine"] = 1
    write_many(path, 1, 5)
    assert (tmp_path / "p.h5").is_file(), "a file of somebody else stays"


STEPS = ("replace", "unlink", "fsync")


@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_any_step_leaves_one_writing_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The step-th call that changes or flushes a file, and all after it, do not happen."""
    path, kind = tmp_path / "p.csv", {"subtask": "multiclass", "class_names": MANY}
    write_many(path, 1)
    before = read_predictions(path, **kind)
    done = []

    def killed(name: str):
        real = getattr(os, name)

        def call(*args, **more):
            done.append(name)
            if len(done) > step:
                raise KeyboardInterrupt
            return real(*args, **more)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, killed(name))
        with suppress(KeyboardInterrupt):
            write_many(path, 2)
    targets, scores = many("multiclass", 30, seed=2)
    after = as_read(before.ids, targets, scores, "multiclass")
    try:
        found = read_predictions(path, **kind)
    except UserError as error:
        assert "p.csv: No such file" in str(error)
    else:
        same(found, after if np.array_equal(found.scores.values, scores.values) else before)
    write_many(path, 2)
    same(read_predictions(path, **kind), after)


@CLASSES
def test_probabilities_that_round_to_0_keep_their_logits(tmp_path: Path, subtask: str) -> None:
    """Logits of two classes 2,000 apart: the probability of one is 0."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(200, 2)) * 1000).astype(np.float32)
    targets = rng.integers(0, 2, 200) if subtask == "multiclass" else rng.integers(0, 2, (200, 2))
    scores, path = Scores.of_logits(logits, subtask), tmp_path / "p.csv"
    kind = {"subtask": subtask, "class_names": ("a", "b")}
    ids = list(map(str, range(200)))
    write_prediction_files(path, ids=ids, targets=targets, scores=scores, **kind)
    table = read_predictions(path, **kind)
    assert np.array_equal(table.scores.ranked, scores.ranked)
    assert np.array_equal(table.scores.values, scores.values)
