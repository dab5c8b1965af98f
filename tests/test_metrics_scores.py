"""Scores of samples: probabilities near 1 that float64 does not tell apart, ensembles, files."""

from pathlib import Path

import numpy as np
import pytest
import scipy.special
import sklearn.metrics as sk
import torch

from glovita_lib.metrics import compute
from glovita_lib.metrics_classification import Scores
from glovita_lib.prediction_files import read_predictions, write_prediction_files

KINDS = pytest.mark.parametrize("subtask", ["multiclass", "multilabel"])


def confident(subtask: str, classes: int, scale: float, n: int = 400):
    """Targets, and float32 logits of a model that is sure, and often wrong."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, classes)) * scale
    if subtask == "multiclass":
        targets = np.where(rng.random(n) < 0.6, logits.argmax(1), rng.integers(0, classes, n))
        return targets, logits.astype(np.float32)
    targets = (logits + scale * rng.normal(size=logits.shape) > 0).astype(np.float64)
    return targets, logits.astype(np.float32)


def measured(subtask: str, targets: np.ndarray, scores: Scores, names=("auroc", "ap")):
    classes = tuple(map(str, range(scores.values.shape[1])))
    return compute(names, subtask=subtask, targets=targets, scores=scores, class_names=classes)


def expected(subtask: str, targets: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """By scikit-learn, from log-odds by their definition in 80-bit numbers."""
    wide = logits.astype(np.longdouble)
    if subtask == "multiclass":
        others = [np.delete(wide, k, 1) for k in range(wide.shape[1])]
        tops = [rest.max(1) for rest in others]
        sums = [np.exp(r - t[:, None]).sum(1) for r, t in zip(others, tops, strict=True)]
        pairs = zip(tops, sums, strict=True)
        wide = wide - np.stack([t + np.log(s) for t, s in pairs], 1)
        targets = np.eye(wide.shape[1])[targets]
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in wide.T], 1)
    pairs = list(zip(targets.T, ranks.T, strict=True))
    return {
        "auroc": np.mean([sk.roc_auc_score(*pair) for pair in pairs]),
        "ap": np.mean([sk.average_precision_score(*pair) for pair in pairs]),
    }


@KINDS
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("scale", [1.0, 20.0, 150.0, 5000.0])
def test_ranks_by_logits_where_probabilities_are_one(subtask: str, classes: int, scale) -> None:
    targets, logits = confident(subtask, classes, scale)
    found = measured(subtask, targets, Scores.of_logits(logits, subtask))
    assert found == pytest.approx(expected(subtask, targets, logits), abs=1e-12)
    if scale == 20.0:  # probabilities in float32 say something else
        rounded = Scores.of_logits(logits, subtask).values.astype(np.float32)
        assert abs(measured(subtask, targets, Scores(rounded))["auroc"] - found["auroc"]) > 1e-4


@KINDS
def test_the_file_keeps_enough_to_compute_them_again(tmp_path: Path, subtask: str) -> None:
    targets, logits = confident(subtask, 3, 40.0)
    scores, path = Scores.of_logits(logits, subtask), tmp_path / "predictions.csv"
    kind = {"subtask": subtask, "class_names": ("a", "b", "c")}
    ids = list(map(str, range(len(targets))))
    write_prediction_files(path, ids=ids, targets=targets, scores=scores, **kind)
    table = read_predictions(path, **kind)
    assert np.array_equal(table.scores.values, scores.values)
    again = measured(subtask, table.targets, table.scores)
    assert again == measured(subtask, targets, scores)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_logits_that_are_equal_stay_equal(classes: int) -> None:
    """As those of a network in bfloat16 often are: the first of the best classes is predicted, and
    samples whose other classes stand in another order are equal."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(2000, classes)) * 16).round() / 8
    logits[::2, 1:] = rng.permuted(logits[1::2, 1:], axis=1)
    logits[::2, 0] = logits[1::2, 0]
    found = Scores.of_logits(logits, "multiclass")
    assert (found.log_odds.argmax(1) == logits.argmax(1)).all()
    assert (found.values.argmax(1) == logits.argmax(1)).all()
    assert (found.log_odds[::2, 0] == found.log_odds[1::2, 0]).all()
    assert (found.values[::2, 0] == found.values[1::2, 0]).all()
    for row, odds in zip(logits, found.log_odds, strict=True):
        assert len(set(row)) == len(set(odds))


@pytest.mark.parametrize("k", [3, 5, 20])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_votes_of_neighbours_that_are_equal_stay_equal(k: int, kind: type) -> None:
    """Whatever those of the other classes are, whose sums round."""
    rng = np.random.default_rng(0)
    votes = (rng.multinomial(k, np.full(10, 0.1), size=700) / k).astype(kind)
    targets = rng.integers(0, 10, 700)
    found = measured("multiclass", targets, Scores.of_probabilities(votes, "multiclass"), RANKS)
    pairs = list(zip(np.eye(10)[targets].T, votes.T, strict=True))
    assert found == pytest.approx({
        "auroc": np.mean([sk.roc_auc_score(*pair) for pair in pairs]),
        "ap": np.mean([sk.average_precision_score(*pair) for pair in pairs]),
        "acc": np.mean(votes.argmax(1) == targets),
    }, abs=1e-12)  # fmt: skip


def test_probabilities_near_one_rank_by_those_of_the_others() -> None:
    """Also where the rule changes: larger ones never rank below smaller ones."""
    rest = np.concatenate(
        [10.0 ** np.linspace(-35, -1, 400), 2.0**-10 * (1 + np.arange(-9, 9) * 1e-8)]
    )
    values = np.stack([1 - rest, rest * 0.25, rest * 0.75], 1).astype(np.float32)
    found = Scores.of_probabilities(values, "multiclass").log_odds[:, 0]
    order = np.argsort(rest)
    assert (np.diff(found[order]) <= 0).all()
    exact = np.log1p(-rest) - np.log(rest)
    np.testing.assert_allclose(found[rest > 1e-30], exact[rest > 1e-30], rtol=1e-4)


RANKS = ("auroc", "ap", "acc")


@KINDS
def test_probabilities_are_those_of_scipy(subtask: str) -> None:
    _, logits = confident(subtask, 4, 30.0)
    wide = logits.astype(np.float64)
    formula = scipy.special.expit if subtask == "multilabel" else scipy.special.softmax
    wanted = formula(wide) if subtask == "multilabel" else formula(wide, axis=1)
    found = Scores.of_logits(logits, subtask)
    np.testing.assert_allclose(found.values, wanted, rtol=1e-12)
    inner = (wanted > 1e-9) & (wanted < 1 - 1e-6)
    np.testing.assert_allclose(found.log_odds[inner], scipy.special.logit(wanted)[inner], 1e-8)


@KINDS
def test_an_ensemble_of_the_same_is_the_same(subtask: str) -> None:
    _, logits = confident(subtask, 3, 60.0)
    one = Scores.of_logits(logits, subtask)
    two = Scores.mean([one, one])
    np.testing.assert_allclose(two.values, one.values, rtol=1e-14)
    np.testing.assert_allclose(two.log_odds, one.log_odds, rtol=1e-12)
    other = Scores.of_logits(-logits, subtask)
    mean = Scores.mean([one, other])
    np.testing.assert_allclose(mean.values, (one.values + other.values) / 2, rtol=1e-14)


def test_classes_that_are_ruled_out() -> None:
    logits = np.array([[-np.inf, 3.0, 1.0], [-np.inf, 0.0, -np.inf]])
    found = Scores.of_logits(logits, "multiclass")
    np.testing.assert_allclose(found.values[0], scipy.special.softmax(logits[0]), rtol=1e-14)
    assert found.values[1].tolist() == [0.0, 1.0, 0.0]
    assert found.log_odds[1].tolist() == [-np.inf, np.inf, -np.inf]
    targets = np.array([2, 1])
    assert measured("multiclass", targets, found, ("acc", "auroc", "ap")) == {
        "acc": 0.5, "auroc": 1.0, "ap": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_of_equal_logits_the_first_class_is_predicted(classes: int) -> None:
    """Logits in bfloat16 have 8 bits: many are equal."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(6000, classes)) * 2).bfloat16().float().numpy()
    assert ((logits == logits.max(1, keepdims=True)).sum(1) > 1).sum() > 3
    targets = np.where(rng.random(6000) < 0.5, logits.argmax(1), rng.integers(0, classes, 6000))
    scores = Scores.of_logits(logits, "multiclass")
    found = measured("multiclass", targets, scores, ("acc", "top5acc"))
    assert found["acc"] == (logits.argmax(1) == targets).mean()
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert found["top5acc"] == (best == targets[:, None]).any(1).mean()
    assert np.array_equal(scores.ranked.argmax(1), logits.argmax(1))


@KINDS
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_equal_votes_of_neighbours_rank_equal(subtask: str, kind: type, k: int) -> None:
    """Shares of k neighbours are often equal, whichever classes have the rest."""
    rng = np.random.default_rng(0)
    votes = (rng.multinomial(k, np.full(6, 1 / 6), size=500) / k).astype(kind)
    targets = np.where(rng.random(500) < 0.4, votes.argmax(1), rng.integers(0, 6, 500))
    labels = np.eye(6)[targets]
    scores = Scores.of_probabilities(votes, subtask)
    found = measured(subtask, targets if subtask == "multiclass" else labels, scores)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels, votes), abs=1e-12)
    assert found["ap"] == pytest.approx(sk.average_precision_score(labels, votes), abs=1e-12)
