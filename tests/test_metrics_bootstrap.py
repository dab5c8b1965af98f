"""Bootstrap intervals against a plain loop over the same resamples, and what must hold for them."""

import math

import numpy as np
import pytest

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


def test_interval_is_the_percentiles_of_the_loop() -> None:
    data = data_of("multiclass", 80)
    found = metrics_report(("acc", "auroc", "f1_per_class"), bootstrap=200, seed=9, **data)["ci95"]
    stream = np.random.default_rng(9)
    loop: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(200):
        rows = stream.integers(0, 80, 80)
        drawn = {"targets": data["targets"][rows], "scores": data["scores"].of(rows)}
        for name, value in compute(("acc", "auroc", "f1_per_class"), **(data | drawn)).items():
            loop[name].append(value)
    for name, ends in found.items():
        assert ends == pytest.approx(np.nanpercentile(loop[name], [2.5, 97.5]), abs=1e-12)


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
        5,
        resamples=50,
        seed=0,
        level=0.95,
    )
    assert ends == {"x": (2.0, 2.0)}
