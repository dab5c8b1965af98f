"""Metrics against scikit-learn and scipy, and what they do where they are undefined."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk

from glovita_lib.metric_names import logged_names, metrics_of
from glovita_lib.metrics import compute, metrics_report, undefined
from glovita_lib.metrics_classification import Scores

NAMES = tuple("abcdefg")


def multiclass(n: int, classes: int, *, absent: tuple[int, ...] = (), seed: int = 0):
    """Targets without the absent classes, and probabilities in steps of 1/20, so that many tie."""
    rng = np.random.default_rng(seed)
    targets = rng.choice([k for k in range(classes) if k not in absent], n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[targets]
    steps = rng.multinomial(20, [1 / classes] * classes, n) * (logits > 0) + 1e-3
    scores = (np.round(np.exp(logits) * 4) + steps).astype(np.float32)
    return targets, scores / scores.sum(1, keepdims=True)


def multilabel(n: int, labels: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, labels)) < 0.4).astype(np.float32)
    scores = np.clip(0.5 + 0.3 * (targets - 0.5) + rng.normal(0, 0.25, targets.shape), 0, 1)
    return targets, np.round(scores, 2).astype(np.float32)  # rounding makes ties


def values(subtask: str, targets: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    names = NAMES[: scores.shape[1]]
    return compute(
        metrics_of(subtask),
        subtask=subtask,
        targets=targets,
        scores=Scores(scores),
        class_names=names,
    )


def expected_ece(confidence: np.ndarray, outcome: np.ndarray) -> float:
    """By the book: a loop over the bins."""
    total = 0.0
    for b in range(15):
        inside = (confidence > (b / 15 if b else -1)) & (confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(outcome[inside].mean() - confidence[inside].mean())
    return total


def one_against_rest(metric, targets: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the columns that have positives and negatives."""
    columns = [k for k in range(targets.shape[1]) if 0 < targets[:, k].sum() < len(targets)]
    return np.mean([metric(targets[:, k], scores[:, k]) for k in columns])


@pytest.mark.parametrize("absent", [(), (0,), (2, 5)])
@pytest.mark.parametrize("n", [40, 500])
def test_multiclass_equals_sklearn(n: int, absent: tuple[int, ...]) -> None:
    targets, scores = multiclass(n, 6, absent=absent, seed=n)
    found = values("multiclass", targets, scores)
    predicted = scores.argmax(1)
    onehot = np.eye(6)[targets]
    macro = {"average": "macro", "zero_division": 0}
    recalls = sk.recall_score(targets, predicted, labels=np.unique(targets), average=None)
    confidence = scores.max(1).astype(np.float64)
    expected = {
        "acc": sk.accuracy_score(targets, predicted),
        "balanced_acc": recalls.mean(),
        "f1": sk.f1_score(targets, predicted, **macro),
        "precision": sk.precision_score(targets, predicted, **macro),
        "recall": sk.recall_score(targets, predicted, **macro),
        "auroc": one_against_rest(sk.roc_auc_score, onehot, scores),
        "ap": one_against_rest(sk.average_precision_score, onehot, scores),
        "mcc": sk.matthews_corrcoef(targets, predicted),
        "kappa": sk.cohen_kappa_score(targets, predicted),
        "quadratic_kappa": sk.cohen_kappa_score(targets, predicted, weights="quadratic"),
        "ece": expected_ece(confidence, predicted == targets),
        "brier": ((scores.astype(np.float64) - onehot) ** 2).sum(1).mean(),
    }
    f1s = sk.f1_score(targets, predicted, labels=range(6), average=None, zero_division=math.nan)
    expected |= {f"f1_per_class_{name}": value for name, value in zip(NAMES, f1s, strict=False)}
    assert {k: v for k, v in found.items() if k != "top5acc"} == pytest.approx(
        expected, nan_ok=True, abs=1e-6
    )
    assert set(found) == set(expected) | {"top5acc"}
    if not absent:
        assert found["auroc"] == pytest.approx(
            sk.roc_auc_score(targets, scores.astype(np.float64), multi_class="ovr"), abs=1e-9
        )


def test_unpredicted_absent_class_is_left_out_and_predicted_one_counts() -> None:
    scores = np.eye(4)[[0, 0, 1, 1, 1, 2]]  # class 2 is predicted once, class 3 never
    targets = np.array([0, 0, 1, 1, 1, 1])
    found = values("multiclass", targets, scores)
    assert found["f1"] == pytest.approx((1 + 6 / 7 + 0) / 3)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx((1 + 0.75 + 0) / 3)
    assert found["balanced_acc"] == pytest.approx((1 + 0.75) / 2)
    assert found["f1_per_class_c"] == 0.0 and math.isnan(found["f1_per_class_d"])


def test_top5() -> None:
    rng = np.random.default_rng(1)
    targets, scores = rng.integers(0, 20, 300), rng.random((300, 20))
    names = tuple(map(str, range(20)))
    data = {"subtask": "multiclass", "targets": targets}
    found = compute(("top5acc",), scores=Scores(scores), class_names=names, **data)
    assert found["top5acc"] == sk.top_k_accuracy_score(targets, scores, k=5)
    tied = compute(("top5acc",), scores=Scores(np.full((300, 20), 0.05)), class_names=names, **data)
    assert tied["top5acc"] == np.mean(targets < 5)  # of equal scores the first count
    few = compute(
        ("top5acc",),
        subtask="multiclass",
        targets=np.array([2, 0]),
        scores=Scores(np.eye(3)[[0, 1]]),
        class_names=NAMES[:3],
    )
    assert few["top5acc"] == 1.0


def test_brier_equals_sklearn() -> None:
    targets, scores = multiclass(200, 5)
    scores = scores.astype(np.float64)
    scores /= scores.sum(1, keepdims=True)
    # the sum over the classes; scikit-learn has that of several classes since 1.7
    expected = sum(sk.brier_score_loss(targets == k, scores[:, k]) for k in range(5))
    assert values("multiclass", targets, scores)["brier"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [30, 400])
def test_multilabel_equals_sklearn(n: int) -> None:
    targets, scores = multilabel(n, 5, seed=n)
    found = values("multilabel", targets, scores)
    predicted = (scores >= 0.5).astype(int)
    true = targets.astype(int)
    macro = {"average": "macro", "zero_division": 0}
    columns = list(zip(true.T, predicted.T, scores.T.astype(np.float64), strict=True))
    expected = {
        "acc": sk.accuracy_score(true.ravel(), predicted.ravel()),
        "balanced_acc": np.mean([sk.balanced_accuracy_score(t, p) for t, p, _ in columns]),
        "f1": sk.f1_score(true, predicted, **macro),
        "precision": sk.precision_score(true, predicted, **macro),
        "recall": sk.recall_score(true, predicted, **macro),
        "auroc": sk.roc_auc_score(true, scores),
        "ap": sk.average_precision_score(true, scores),
        "mcc": np.mean([sk.matthews_corrcoef(t, p) for t, p, _ in columns]),
        "kappa": np.mean([sk.cohen_kappa_score(t, p) for t, p, _ in columns]),
        "ece": np.mean([expected_ece(s, t) for t, _, s in columns]),
        "brier": np.mean([sk.brier_score_loss(t, s) for t, _, s in columns]),
    }
    f1s = sk.f1_score(true, predicted, average=None)
    expected |= {f"f1_per_class_{name}": value for name, value in zip(NAMES, f1s, strict=False)}
    assert found == pytest.approx(expected, abs=1e-6)


def test_labels_of_one_kind_are_left_out() -> None:
    targets, scores = multilabel(50, 3)
    wider = np.concatenate([targets, np.zeros((50, 1)), np.ones((50, 1))], 1)
    more = np.concatenate([scores, np.full((50, 1), 0.1), np.full((50, 1), 0.9)], 1)
    found, without = values("multilabel", wider, more), values("multilabel", targets, scores)
    for name in ("auroc", "ap", "mcc", "kappa", "balanced_acc"):
        assert found[name] == without[name]
    assert found["f1_per_class_e"] == 1.0 and math.isnan(found["f1_per_class_d"])
    assert found["f1"] == pytest.approx((3 * without["f1"] + 1) / 4)


def test_regression_equals_sklearn_and_scipy() -> None:
    rng = np.random.default_rng(0)
    targets = np.round(1e4 + rng.normal(0, 3, (300, 3)), 1)  # far from zero, with ties
    scores = np.round(targets + rng.normal(0, [1, 2, 30], (300, 3)))
    found = values("regression", targets, scores)
    columns = list(zip(scores.T, targets.T, strict=True))
    assert found == pytest.approx(
        {
            "mse": sk.mean_squared_error(targets, scores),
            "mae": sk.mean_absolute_error(targets, scores),
            "r2": sk.r2_score(targets, scores),
            "pearson": np.mean([scipy.stats.pearsonr(x, y)[0] for x, y in columns]),
            "spearman": np.mean([scipy.stats.spearmanr(x, y)[0] for x, y in columns]),
        },
        abs=1e-10,
    )


def test_regression_targets_that_do_not_vary() -> None:
    rng = np.random.default_rng(0)
    moving = rng.normal(size=(20, 1))
    targets = np.concatenate([moving, np.full((20, 1), 1e6 / 3), moving], 1).astype(np.float32)
    scores = np.concatenate([moving, moving, np.full((20, 1), 0.1)], 1).astype(np.float32)
    found = metrics_report(
        metrics_of("regression"),
        subtask="regression",
        targets=targets,
        scores=Scores(scores),
        class_names=NAMES[:3],
        bootstrap=20,
        seed=0,
    )
    assert [found["per_class"][k]["pearson"] for k in "abc"] == [pytest.approx(1.0), None, 0.0]
    assert [found["per_class"][k]["spearman"] for k in "abc"] == [pytest.approx(1.0), None, 0.0]
    assert found["metrics"]["pearson"] == pytest.approx(0.5)
    assert found["per_class"]["b"]["r2"] is None and found["per_class"]["a"]["r2"] == 1.0


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(subtask: str, n: int) -> None:
    targets = np.zeros(n, int) if subtask == "multiclass" else np.zeros((n, 3), np.float32)
    scores = np.full((n, 3), 0.25, np.float32)
    names = metrics_of(subtask)
    found = compute(
        names, subtask=subtask, targets=targets, scores=Scores(scores), class_names=NAMES[:3]
    )
    assert tuple(found) == logged_names(names, NAMES[:3])
    if n == 0:
        assert all(math.isnan(value) for value in found.values())
    elif subtask == "regression":
        assert found["mse"] == 0.0625 and math.isnan(found["r2"]) and math.isnan(found["pearson"])
    else:
        assert found["acc"] == 1.0
        assert all(math.isnan(found[k]) for k in ("auroc", "ap", "mcc", "kappa"))


def test_constant_predictions_are_worth_nothing() -> None:
    targets = np.array([0, 1, 1, 0])
    found = values("multiclass", targets, np.full((4, 2), 0.5))
    assert (found["mcc"], found["kappa"], found["quadratic_kappa"], found["auroc"]) == (
        0,
        0,
        0,
        0.5,
    )
    assert found["ap"] == sk.average_precision_score(targets, np.full(4, 0.5)) == 0.5


def test_one_class_of_one() -> None:
    found = values("multiclass", np.zeros(3, int), np.ones((3, 1)))
    assert found["acc"] == found["f1"] == found["balanced_acc"] == 1.0
    assert math.isnan(found["auroc"]) and math.isnan(found["mcc"])
    assert found["ece"] == found["brier"] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite(bad: float) -> None:
    targets, scores = multiclass(10, 3)
    scores[4, 1] = bad
    assert all(math.isnan(value) for value in values("multiclass", targets, scores).values())


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
def test_report_is_json_and_agrees_with_compute(subtask: str) -> None:
    targets, scores = (
        multiclass(60, 4, absent=(3,)) if subtask == "multiclass" else multilabel(60, 4)
    )
    data = {"subtask": subtask, "targets": targets, "class_names": NAMES[:4]}
    data["scores"], names = Scores(scores), metrics_of(subtask)
    found = metrics_report(names, bootstrap=50, seed=3, **data)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    direct = compute(names, **data)
    defined = {name: value for name, value in direct.items() if not math.isnan(value)}
    assert {k: v for k, v in found["metrics"].items() if v is not None} == defined
    assert found["n"] == 60 and list(found["per_class"]) == list(NAMES[:4])
    assert list(found["ci95"]) == list(found["metrics"])
    if subtask == "multiclass":
        matrix = sk.confusion_matrix(targets, scores.argmax(1), labels=range(4))
        assert found["confusion"] == matrix.tolist()
        assert [found["per_class"][k]["n"] for k in NAMES[:4]] == matrix.sum(1).tolist()
        assert found["per_class"]["d"]["auroc"] is None
    else:
        assert found["confusion"] is None
    without = metrics_report(names, bootstrap=0, seed=3, **data)
    assert without["ci95"] == {} and without["metrics"] == found["metrics"]


def test_metrics_that_no_prediction_defines():
    def of(names, subtask, targets, classes="abc"):
        return undefined(names, subtask=subtask, targets=targets, class_names=tuple(classes))

    names = ("acc", "auroc", "ap", "f1")
    assert of(names, "multiclass", np.ones(5, int)) == ["auroc", "ap"]
    assert of(names, "multiclass", np.array([0, 1, 1])) == []
    assert of(names, "multilabel", np.zeros((4, 3))) == ["auroc", "ap"]
    numbers = ("mse", "r2", "pearson", "spearman")
    assert of(numbers, "regression", np.full((60, 1), 0.1), "y") == list(numbers[1:])
    assert of(numbers, "regression", np.arange(6.0)[:, None], "y") == []
