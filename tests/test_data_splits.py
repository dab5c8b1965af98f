"""Splits and folds: proportions, disjointness, groups, small inputs."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import StratifiedGroupKFold

from glovita_lib.data_splits import apportion, draw_stratified, fold_splits, folds, strata
from glovita_lib.errors import UserError

DIGITS = load_digits().target.astype(np.int64)
SUGAR = load_diabetes().target[:, None].astype(np.float32)


def spread(labels, fold, n_folds):
    """Largest difference between folds in the number of samples of one class."""
    counts = np.array([np.bincount(labels[fold == i], minlength=10) for i in range(n_folds)])
    return int((counts.max(0) - counts.min(0)).max()), int(np.ptp(counts.sum(1)))


def test_draw_keeps_the_proportions_and_the_count():
    drawn, rest = draw_stratified(DIGITS, 360, seed=1, keep="rest")
    assert len(drawn) == 360
    assert sorted([*drawn, *rest]) == list(range(len(DIGITS)))
    assert (np.diff(drawn) > 0).all() and (np.diff(rest) > 0).all()
    exact = np.bincount(DIGITS) * 360 / len(DIGITS)
    assert np.abs(np.bincount(DIGITS[drawn]) - exact).max() < 1
    assert set(drawn) != set(draw_stratified(DIGITS, 360, seed=2, keep="rest")[0])
    assert (drawn == draw_stratified(DIGITS, 360, seed=1, keep="rest")[0]).all()


def test_a_larger_share_contains_the_smaller_one():
    small, _ = draw_stratified(DIGITS, 100, seed=1, keep="drawn")
    large, _ = draw_stratified(DIGITS, 400, seed=1, keep="drawn")
    assert set(small) < set(large)


def test_draw_from_small_classes():
    labels = np.array([0] * 20 + [1] * 2 + [2])
    drawn, rest = draw_stratified(labels, 11, seed=0, keep="rest")
    assert set(labels[rest]) == {0, 1, 2} and 2 not in labels[drawn]
    drawn, _ = draw_stratified(labels, 4, seed=0, keep="drawn")
    assert set(labels[drawn]) == {0, 1, 2} and len(drawn) == 4
    assert len(draw_stratified(labels, 2, seed=0, keep="drawn")[0]) == 2  # fewer than classes
    assert len(draw_stratified(labels, 22, seed=0, keep="rest")[0]) == 22  # more than it would like
    drawn, rest = draw_stratified(labels[:0], 0, seed=0, keep="rest")
    assert len(drawn) == len(rest) == 0


def test_apportion_is_largest_remainder():
    sizes = np.array([10, 10, 5])
    assert apportion(sizes, 6).tolist() == [3, 2, 1]  # of 2.4, 2.4 and 1.2
    assert apportion(sizes, 24).tolist() == [10, 9, 5]
    assert apportion(sizes, 26).tolist() == [10, 10, 5]  # no more than there are
    assert apportion(sizes, 9, high=np.array([2, 9, 9])).tolist() == [2, 4, 3]


def test_apportioned_shares_keep_to_their_bounds():
    generator = np.random.default_rng(0)
    for _ in range(200):
        sizes = generator.integers(0, 50, generator.integers(1, 12))
        room = int(generator.integers(1, 80))
        kept = apportion(sizes, room, low=np.minimum(sizes, 1))
        assert kept.sum() == min(sizes.sum(), room) and (kept <= sizes).all() and (kept >= 0).all()
        if (sizes > 0).sum() <= room:
            assert (kept[sizes > 0] >= 1).all()


def test_folds_are_disjoint_differ_and_are_stratified():
    fold = folds(DIGITS, 5, seed=3)
    assert spread(DIGITS, fold, 5) <= (1, 1)
    tests = []
    for number in range(5):
        rows = fold_splits(fold, number, 5)
        assert sorted(np.concatenate(list(rows.values()))) == list(range(len(DIGITS)))
        assert (fold[rows["val"]] == (number + 1) % 5).all()
        tests.append(set(rows["test"]))
    assert set.union(*tests) == set(range(len(DIGITS)))
    assert sum(len(t) for t in tests) == len(DIGITS)
    assert (fold != folds(DIGITS, 5, seed=4)).any()
    assert (fold == folds(DIGITS, 5, seed=3)).all()


def test_grouped_folds_keep_groups_whole_and_are_as_even_as_scikit_learns():
    groups = np.array([f"p{i}" for i in np.random.default_rng(0).integers(0, 120, len(DIGITS))])
    fold = folds(DIGITS, 5, seed=3, groups=groups)
    for group in set(groups):
        assert len(set(fold[groups == group])) == 1
    theirs = np.empty(len(DIGITS), int)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for number, (_, rows) in enumerate(splitter.split(DIGITS, DIGITS, groups)):
        theirs[rows] = number
    ours, reference = spread(DIGITS, fold, 5), spread(DIGITS, theirs, 5)
    assert ours[0] <= reference[0] + 3 and ours[1] <= reference[1] + 10
    assert (fold != folds(DIGITS, 5, seed=4, groups=groups)).any()


def test_folds_of_few_samples_and_groups():
    assert sorted(folds(np.zeros(3, int), 3, seed=0)) == [0, 1, 2]
    groups = np.array(["a"] * 50 + ["b", "c"])
    assert len(set(folds(np.zeros(52, int), 3, seed=0, groups=groups))) == 3
    with pytest.raises(UserError, match="n_folds = 4, but there are only 3 samples"):
        folds(np.zeros(3, int), 4, seed=0)
    with pytest.raises(UserError, match="only 3 groups: at most 3 folds"):
        folds(np.zeros(52, int), 5, seed=0, groups=groups)


def test_strata_of_a_regression_are_quantiles():
    bins = strata(SUGAR, "regression")
    counts = np.bincount(bins)
    assert len(counts) == 10 and np.ptp(counts) <= 6
    order = np.argsort(SUGAR[:, 0])
    assert (np.diff(bins[order]) >= 0).all()
    assert len(set(strata(SUGAR[:3], "regression"))) == 1
    assert len(set(strata(np.ones((20, 2), np.float32), "regression"))) == 1
    fold = folds(bins, 5, seed=0)
    means = [SUGAR[fold == i].mean() for i in range(5)]
    assert np.ptp(means) < 0.1 * SUGAR.mean()


def test_strata_of_multilabel_are_the_rarest_label():
    targets = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0], [0, 0, 0]], np.float32)
    assert strata(targets, "multilabel").tolist() == [0, 1, 2, 1, 3]
    assert strata(targets[:0], "multilabel").tolist() == []
