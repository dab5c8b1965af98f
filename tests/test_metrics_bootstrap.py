"""Bootstrap intervals against a plain loop over the same resamples, and what must hold for them."""

import math

import numpy as np
import pytest
import scipy.stats

from glovita_lib import metrics
from glovita_lib.metric_names import metrics_of
from glovita_lib.metrics import compute, measure_of, metrics_report, samples_of
from glovita_lib.metrics_classification import Scores
from glovita_lib.results import summary_lines

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


def test_interval_is_the_percentiles_of_the_loop() -> None:
    """Of F1, precision, AP and calibration errors moved by the mean that resampling shifts them."""
    data = data_of("multiclass", 160)
    data["targets"] = np.arange(160) % 4
    names = ("acc", "ece", "auroc", "ap", "f1", "f1_per_class", "balanced_acc", "mcc", "brier")
    found = metrics_report(names, bootstrap=200, seed=9, **data)["ci95"]
    stream, loop = np.random.default_rng(9), {name: [] for name in found}
    for _ in range(200):
        rows = stream.integers(0, 160, 160)
        drawn = {"targets": data["targets"][rows], "scores": data["scores"].of(rows)}
        for name, value in compute(names, **(data | drawn)).items():
            loop[name].append(value)
    whole = compute(names, **data)
    for name, ends in found.items():
        low, high = np.nanpercentile(loop[name], [2.5, 97.5])
        if name in ("ece", "ap", "f1"):
            shift = np.nanmean(loop[name]) - whole[name]
            low, high = max(low - shift, 0), min(high - shift, 1)
        assert ends == pytest.approx([low, high], abs=1e-12)


def layout(subtask: str, counts: list[int], rng: np.random.Generator, n: int = 100) -> dict:
    """Samples with classes, or labels among n, that are there so often; scores of an even skill."""
    classes = len(counts)
    if subtask == "multiclass":
        targets = np.repeat(np.arange(classes), counts)
        true = targets[:, None] == np.arange(classes)
    else:
        true = np.zeros((n, classes), bool)
        for k, count in enumerate(counts):
            true[rng.choice(n, count, replace=False), k] = True
        targets = true.astype(float)
    logits = (rng.normal(size=true.shape) + 2.0 * true - (subtask == "multilabel")) * 1.5
    names = tuple(map(str, range(classes)))
    scores = Scores.of_logits(logits.astype(np.float32), subtask)
    return {"subtask": subtask, "targets": targets, "scores": scores, "class_names": names}


NAMES = ("balanced_acc", "f1", "precision", "recall", "auroc", "ap", "mcc", "ece")


@pytest.mark.parametrize(
    ("subtask", "counts"),
    [
        ("multiclass", [5] * 12),
        ("multiclass", [5] * 10 + [40] * 2),
        ("multiclass", [30, 120]),
        ("multilabel", [5] * 12),
        ("multilabel", [95] * 12),
        ("multilabel", [45]),
    ],
)
def test_intervals_of_few_samples_cover_the_truth(subtask: str, counts: list[int]) -> None:
    """The truth: the mean over many data sets of the same counts."""
    rng, trials = np.random.default_rng(0), 60
    ends: dict[str, list] = {name: [] for name in NAMES}
    for trial in range(trials):
        report = metrics_report(NAMES, bootstrap=60, seed=trial, **layout(subtask, counts, rng))
        assert report["no_ci95"] == {}
        for name in NAMES:
            ends[name].append(report["ci95"][name])
    drawn = [compute(NAMES, **layout(subtask, counts, rng)) for _ in range(300)]
    for name, pairs in ends.items():
        truth = np.mean([values[name] for values in drawn])
        known = [low <= truth <= high for low, high in pairs if low is not None]
        assert len(known) >= trials - 3, name
        assert np.mean(known) >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials), name


@pytest.mark.parametrize(
    ("subtask", "counts", "why"),
    [
        ("multiclass", [2] * 20, '"0" has 2 of the 5 samples that it takes, and 19 more'),
        ("multiclass", [4] + [30] * 20, '"0" has 4 of the 5 samples'),
        ("multiclass", [1] * 30, '"0" has 1 of the 5 samples'),
        ("multiclass", [10, 100], "rests on 13 of the 40 samples"),
        ("multilabel", [1, 50, 50], '"0" has 1 of the 5 samples of either kind'),
        ("multilabel", [50, 98, 50], '"1" has 2 of the 5 samples of either kind'),
        ("multilabel", [8, 8], "rests on 16 of the 40 samples of either kind"),
    ],
)
def test_too_few_samples_of_a_class_have_no_interval(
    subtask: str, counts: list[int], why: str
) -> None:
    """Means over classes have none and say why; metrics over all samples have one."""
    names = ("acc", "brier", *NAMES, "kappa", "f1_per_class")
    rng = np.random.default_rng(0)
    report = metrics_report(names, bootstrap=50, seed=0, **layout(subtask, counts, rng))
    over = {"balanced_acc", "f1", "precision", "recall", "auroc", "ap"}
    over |= {"mcc", "kappa"} if subtask == "multilabel" else set()
    reasons, ends = report["no_ci95"], report["ci95"]
    fewer = counts if subtask == "multiclass" else [min(m, 100 - m) for m in counts]
    rare = [k for k, m in enumerate(fewer) if m < 40]
    assert set(reasons) == over | {f"f1_per_class_{k}" for k in rare}
    assert all(why in reasons[name] for name in over)
    assert all(ends[name] == [None, None] for name in reasons)
    for name in {"acc", "brier"} | {f"f1_per_class_{k}" for k in range(len(counts))} - set(reasons):
        assert ends[name][0] < ends[name][1]
    lines = summary_lines({"test": {"loss": None, **report}})
    assert sum("no interval of" in text and why in text for _, text in lines) >= 1
    without = metrics_report(names, bootstrap=0, seed=0, **layout(subtask, counts, rng))
    assert without["no_ci95"] == {}


@pytest.mark.parametrize(("n", "given"), [(1, False), (14, False), (15, True)])
@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
def test_a_split_of_few_samples_has_no_interval(subtask: str, n: int, given: bool) -> None:
    data = data_of(subtask, n)
    names = {"regression": ("mse", "pearson")}.get(subtask, ("acc", "brier"))
    report = metrics_report(names, bootstrap=50, seed=0, **data)
    for name in names:
        assert (report["ci95"][name] != [None, None]) is given
        why = report["no_ci95"].get(name, "")
        assert why == ("" if given else f"the split has {n} of the 15 samples that it takes")


def test_classes_that_are_not_there_take_no_interval_away() -> None:
    data = layout("multiclass", [30, 0, 30], np.random.default_rng(0))
    report = metrics_report(("f1", "auroc", "recall"), bootstrap=50, seed=0, **data)
    assert report["no_ci95"] == {} and None not in report["ci95"]["recall"]
    labels = layout("multilabel", [50, 0, 50, 100], np.random.default_rng(0))
    report = metrics_report(("f1", "auroc", "recall"), bootstrap=50, seed=0, **labels)
    assert report["no_ci95"] == {} and None not in report["ci95"]["auroc"]


def test_a_mean_over_classes_is_as_skewed_as_one_of_so_many_samples() -> None:
    rng = np.random.default_rng(0)
    for counts in ([5] * 8, [6, 60], [3, 10, 30]):
        means = [rng.exponential(size=(200_000, m)).mean(1) for m in counts]
        skew = float(scipy.stats.skew(np.mean(means, 0)))
        behind = metrics.samples_behind(np.array([0, *counts]))
        assert skew == pytest.approx(2 / math.sqrt(behind), rel=0.1)  # 2 is that of one sample


def test_contains_the_value_and_shrinks_with_the_square_root_of_n() -> None:
    widths = []
    for n in (250, 4000):
        found = metrics_report(
            ("acc", "brier", "kappa", "mcc"), bootstrap=400, seed=1, **data_of("multiclass", n)
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
        pairs = zip(scores[rows].T, targets[rows].T, strict=True)
        ranks = [scipy.stats.spearmanr(a, b)[0] for a, b in pairs]
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
