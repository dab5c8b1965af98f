"""Bootstrap intervals against a plain loop over the same resamples, and what must hold for them."""

import math

import numpy as np
import pytest
import scipy.stats

from glovita_lib import metrics
from glovita_lib.metric_names import metrics_of
from glovita_lib.metrics import compute, measure_of, metrics_report, samples_of
from glovita_lib.metrics_classification import Scores

CLASSES = tuple("abcd")


def data_of(subtask: str, n: int, seed: int = 0) -> dict:
    """Ties, and a class that many resamples miss."""
    rng = np.random.default_rng(seed)
    if subtask == "multiclass":
        targets = rng.choice(4, n, p=[0.4, 0.3, 0.28, 0.02])
        scores = np.round(rng.random((n, 4)) + 0.5 * np.eye(4)[targets], 1) + 0.05
        scores = (scores / scores.sum(1, keepdims=True)).astype(np.float32)
    else:
        targets = (rng.random((n, 4)) < [0.5, 0.3, 0.2, 0.02]).astype(np.float32)
        scores = np.round(np.clip(rng.random((n, 4)) * 0.7 + targets * 0.3, 0, 1), 1)
    return {
        "subtask": subtask,
        "targets": targets,
        "scores": Scores(scores),
        "class_names": CLASSES,
    }


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
def test_equals_a_loop_over_the_same_resamples(subtask: str, monkeypatch) -> None:
    n, resamples = 60, 40
    monkeypatch.setattr(metrics, "ELEMENTS_AT_ONCE", 7 * n)  # blocks of 7 and one of 5
    data = data_of(subtask, n)
    names = metrics_of(subtask)
    measure = measure_of(names, samples_of(**data))
    blocks = list(metrics.draws(n, resamples, seed=5))
    assert [block.shape[1] for block in blocks] == [7] * 5 + [5]
    fast = [measure(block) for block in blocks]
    stream = np.random.default_rng(5)
    for i in range(resamples):
        rows = stream.integers(0, n, n)
        drawn = {"targets": data["targets"][rows], "scores": data["scores"].of(rows)}
        slow = compute(names, **(data | drawn))
        here = {name: value[i % 7] for name, value in fast[i // 7].items()}
        assert here == pytest.approx(slow, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("rare", [3, 9])
def test_interval_is_the_percentiles_of_the_loop(rare: int) -> None:
    """Rows of a class of three are two of these for means over classes, which count 3/2 times."""
    data = data_of("multiclass", 80)
    targets = data["targets"] = np.append(np.zeros(rare, int), 1 + np.arange(80 - rare) % 3)
    names = ("acc", "ece", "auroc", "f1_per_class", "balanced_acc")
    found = metrics_report(names, bootstrap=200, seed=9, **data)["ci95"]
    plain, inner = (np.random.default_rng(9) for _ in range(2))
    loop: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(200):
        rows = plain.integers(0, 80, 80)
        apart = rows
        if rare == 3:
            rest = np.flatnonzero(targets > 0)[inner.integers(0, 77, 77)]
            apart = np.concatenate([np.repeat(rest, 2), np.repeat(inner.integers(0, 3, 2), 3)])
        for some, drawn in ((names[:2], rows), (names[2:], apart)):
            drawn_data = {"targets": targets[drawn], "scores": data["scores"].of(drawn)}
            for name, value in compute(some, **(data | drawn_data)).items():
                loop[name].append(value)
    whole = compute(names, **data)
    for name, ends in found.items():
        low, high = np.nanpercentile(loop[name], [2.5, 97.5])
        inside = low <= whole[name] <= high
        assert ends == (pytest.approx([low, high], abs=1e-12) if inside else [None, None])


@pytest.mark.parametrize("per_class", [2, 3, 6])
def test_few_samples_of_a_class_cover_the_truth_too(per_class: int) -> None:
    """Of accuracy as of a mean over classes."""
    rng, hits = np.random.default_rng(0), {"acc": 0, "balanced_acc": 0}
    targets = np.repeat(np.arange(20), per_class)
    for trial in range(100):  # a classifier that is right in 60 % of the cases
        right = rng.random(len(targets)) < 0.6
        scores = Scores(np.eye(20)[np.where(right, targets, (targets + 1) % 20)])
        names, classes = tuple(hits), tuple(map(str, range(20)))
        data = {"subtask": "multiclass", "targets": targets, "class_names": classes}
        found = metrics_report(names, scores=scores, bootstrap=100, seed=trial, **data)["ci95"]
        for name in names:
            hits[name] += found[name][0] <= 0.6 <= found[name][1]
    assert all(0.86 <= count / 100 <= 0.99 for count in hits.values()), hits


def test_the_only_sample_of_a_class_says_nothing_of_the_spread() -> None:
    """Neither of its class nor of a mean over classes; of the others and of all samples it does."""
    data = data_of("multiclass", 61)
    data["targets"] = np.append(np.arange(60) % 3, 3)
    names = ("acc", "kappa", "f1", "f1_per_class", "auroc")
    found = metrics_report(names, bootstrap=50, seed=0, **data)["ci95"]
    none = [name for name, ends in found.items() if ends == [None, None]]
    assert none == ["f1", f"f1_per_class_{CLASSES[3]}", "auroc"]
    assert all(low < high for low, high in found.values() if low is not None)


@pytest.mark.parametrize("value", [0, 1])
def test_the_only_sample_of_a_label_says_nothing_of_the_spread(value: int) -> None:
    data = data_of("multilabel", 60)
    data["targets"] = np.tile(data["targets"][:2] * 0 + [[0], [1]], (30, 1)).astype(float)
    data["targets"][:, 3] = np.where(np.arange(60) == 7, value, 1 - value)
    names = ("acc", "brier", "f1", "f1_per_class", "auroc", "recall")
    found = metrics_report(names, bootstrap=50, seed=0, **data)["ci95"]
    none = [name for name, ends in found.items() if ends == [None, None]]
    assert none == ["f1", f"f1_per_class_{CLASSES[3]}", "auroc", "recall"]


def test_contains_the_value_and_shrinks_with_the_square_root_of_n() -> None:
    widths = []
    for n in (250, 4000):
        found = metrics_report(
            ("acc", "f1", "auroc", "mcc"), bootstrap=400, seed=1, **data_of("multiclass", n)
        )
        for name, (low, high) in found["ci95"].items():
            assert low < found["metrics"][name] < high
        widths.append(np.diff(found["ci95"]["acc"])[0])
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=0.25)


def test_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):  # a classifier that is right in 70 % of the cases
        right = rng.random(100) < 0.7
        scores = np.eye(2)[right.astype(int)]
        data = {"subtask": "multiclass", "targets": np.ones(100, int), "scores": Scores(scores)}
        found = metrics_report(
            ("acc",), class_names=("no", "yes"), bootstrap=200, seed=trial, **data
        )
        low, high = found["ci95"]["acc"]
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_blocks_do_not_change_the_draws(monkeypatch) -> None:
    whole = np.concatenate(list(metrics.draws(30, 11, seed=2)), 1)
    monkeypatch.setattr(metrics, "ELEMENTS_AT_ONCE", 1)  # a block holds one resample at least
    single = list(metrics.draws(30, 11, seed=2))
    assert len(single) == 11 and np.array_equal(np.concatenate(single, 1), whole)
    assert (whole.sum(0) == 30).all()
    assert not np.array_equal(whole, np.concatenate(list(metrics.draws(30, 11, seed=3)), 1))


def test_a_single_sample_and_one_class_have_no_interval() -> None:
    alone = metrics_report(("acc", "auroc"), bootstrap=20, seed=0, **data_of("multiclass", 1))
    assert alone["ci95"] == {"acc": [None, None], "auroc": [None, None]}
    one = data_of("multiclass", 30) | {"targets": np.zeros(30, int)}
    found = metrics_report(("acc", "auroc"), bootstrap=20, seed=0, **one)["ci95"]
    assert found["auroc"] == [None, None] and None not in found["acc"]


def test_undefined_resamples_are_left_out() -> None:
    ends = metrics.intervals(
        lambda weights: {"x": np.where(weights[0] > 0, 2.0, math.nan)},
        metrics.draws(5, 50, seed=0),
        values={"x": 2.0},
        level=0.95,
    )
    assert ends == {"x": (2.0, 2.0)}


@pytest.mark.parametrize(("value", "ends"), [
    (2.5, (2.5, 3.0)), (3.0, (2.5, 3.0)),
    (2.5 - 1e-10, (2.5 - 1e-10, 3.0)), (3.0 + 1e-10, (2.5, 3.0 + 1e-10)),  # by rounding alone
    (2.4, None), (3.1, None), (-1e9, None),
])  # fmt: skip
def test_an_interval_beside_its_value_is_none(value: float, ends: tuple | None) -> None:
    found = metrics.intervals(
        lambda weights: {"x": np.linspace(2.5, 3.0, weights.shape[1])},
        metrics.draws(5, 50, seed=0),
        values={"x": value},
        level=1.0,
    )["x"]
    assert found == ends if ends is not None else all(map(math.isnan, found))


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel"])
@pytest.mark.parametrize("seed", range(4))
def test_an_interval_holds_its_own_value_or_is_none(subtask: str, seed: int) -> None:
    """Many classes of one or two samples, of which resamples miss a third."""
    rng = np.random.default_rng(seed)
    targets = np.sort(np.append(np.arange(40), rng.integers(0, 40, 30)))
    scores = rng.random((70, 40)) + 1.5 * rng.random() * np.eye(40)[targets]
    targets = np.eye(40)[targets] if subtask == "multilabel" else targets
    data = {"subtask": subtask, "targets": targets, "class_names": tuple(map(str, range(40)))}
    names = metrics_of(subtask)
    scores = Scores.of_logits(scores, subtask)
    found = metrics_report(names, scores=scores, bootstrap=200, seed=0, **data)
    for name, (low, high) in found["ci95"].items():
        value = found["metrics"][name]
        assert value is None or low is None or low <= value <= high, (name, low, value, high)
    if subtask == "multiclass":
        assert found["ci95"]["f1"] == [None, None]  # of classes with one sample
        low, high = found["ci95"]["acc"]
        assert low < high or low == 1


@pytest.mark.parametrize("far", [1e3, 1e9, 1e15])
def test_resamples_without_a_far_outlier_keep_their_digits(far: float) -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(60, 2))
    scores = targets + 0.5 * rng.normal(size=(60, 2))
    targets[7], scores[7] = far, far * 1.01
    names = ("r2", "pearson", "spearman")
    data = {"subtask": "regression", "class_names": ("a", "b")}
    measure = measure_of(names, samples_of(targets=targets, scores=Scores(scores), **data))
    (weights,) = metrics.draws(60, 50, seed=1)
    found = measure(weights)
    assert 5 < (weights[7] == 0).sum() < 45
    for r in range(50):
        rows = np.repeat(np.arange(60), weights[:, r].astype(int))
        x, y = scores[rows].astype(np.longdouble), targets[rows].astype(np.longdouble)
        dx, dy = x - x.mean(0), y - y.mean(0)
        r2 = 1 - ((x - y) ** 2).sum(0) / (dy**2).sum(0)
        pearson = (dx * dy).sum(0) / np.sqrt((dx**2).sum(0) * (dy**2).sum(0))
        ranks = [scipy.stats.spearmanr(a, b)[0] for a, b in zip(x.T, y.T, strict=True)]
        assert found["r2"][r] == pytest.approx(float(r2.mean()), abs=1e-9)
        assert found["pearson"][r] == pytest.approx(float(pearson.mean()), abs=1e-9)
        assert found["spearman"][r] == pytest.approx(np.mean(ranks), abs=1e-9)


@pytest.mark.parametrize("far", [1e4, 1e8, 1e12])
def test_resamples_of_one_of_two_far_clusters_keep_their_digits(far: float) -> None:
    """The median of all lies between them, far from the samples of either."""
    rng = np.random.default_rng(0)
    targets = np.append(rng.normal(size=3), far + rng.normal(size=3))
    scores = targets + 0.5 * rng.normal(size=6)
    weights = next(metrics.draws(6, 300, seed=1))
    alone = np.flatnonzero((weights[:3].sum(0) == 0) | (weights[3:].sum(0) == 0))
    assert len(alone) > 3
    data = {"subtask": "regression", "targets": targets[:, None], "class_names": ("a",)}
    samples = samples_of(scores=Scores(scores[:, None]), **data)
    found = measure_of(("r2", "pearson"), samples)(weights)
    for r in alone:
        rows = np.repeat(np.arange(6), weights[:, r].astype(int))
        x, y = scores[rows].astype(np.longdouble), targets[rows].astype(np.longdouble)
        dx, dy = x - x.mean(), y - y.mean()
        xx, yy = (dx**2).sum(), (dy**2).sum()
        if len(set(rows)) == 1:
            assert np.isnan(found["r2"][r]) and np.isnan(found["pearson"][r])
            continue
        wanted = float(1 - ((x - y) ** 2).sum() / yy), float((dx * dy).sum() / np.sqrt(xx * yy))
        assert (found["r2"][r], found["pearson"][r]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("subtask", ["multiclass", "regression"])
def test_says_how_far_it_is(subtask: str, monkeypatch) -> None:
    """After each target or class of each metric, of several blocks of resamples."""
    monkeypatch.setattr(metrics, "ELEMENTS_AT_ONCE", 80 * 7)
    data, told = data_of(subtask, 80), []
    if subtask == "multiclass":
        data["targets"] = np.append([3, 3], np.arange(78) % 3)  # one class is drawn apart
    names = ("acc", "auroc", "ap") if subtask == "multiclass" else ("mse", "spearman")
    found = metrics_report(names, bootstrap=20, seed=0, tell=told.append, **data)
    assert told == sorted(told) and told[-1] == pytest.approx(1.0)
    assert len(told) >= 3 * len(names) and 0 < told[0] < 0.2
    assert found == metrics_report(names, bootstrap=20, seed=0, **data)
