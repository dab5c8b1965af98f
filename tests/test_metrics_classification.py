"""Sums and ranks under weights against the same on repeated samples."""

import numpy as np
import pytest
import scipy.stats

from glovita_lib.metrics import mid_ranks, squared_deviations
from glovita_lib.metrics_classification import bin_of, ratio, sum_by


def test_one_and_many_resamples_agree_with_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 4, (30, 3)).astype(float)
    groups, values = rng.integers(0, 5, 30), rng.normal(size=30)
    many = sum_by(groups, 6, weights, values)
    for r in range(3):
        rows = np.repeat(np.arange(30), weights[:, r].astype(int))
        expected = [values[rows][groups[rows] == g].sum() for g in range(6)]
        assert np.allclose(many[:, r], expected)
        assert np.allclose(sum_by(groups, 6, weights[:, [r]], values)[:, 0], expected)


def test_mid_ranks_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 8, 40).astype(float)
    weights = rng.integers(0, 3, (40, 2)).astype(float)
    ranks, spread = mid_ranks(values, weights)
    for r in range(2):
        rows = np.repeat(np.arange(40), weights[:, r].astype(int))
        expected = scipy.stats.rankdata(values[rows])
        assert np.array_equal(ranks[rows, r], expected)
        assert spread[r] == pytest.approx(((expected - expected.mean()) ** 2).sum())


def test_equal_values_have_no_spread_whatever_the_rounding() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 1))
    only_one = np.diag(rng.integers(1, 50, 200)).astype(float)  # each resample holds one sample
    assert (squared_deviations(values, only_one) == 0).all()
    two = only_one + np.roll(only_one, 1, 0)
    assert (squared_deviations(values, two) > 0).all()


def test_bins_hold_their_upper_edge() -> None:
    assert bin_of(np.array([0, 1e-9, 0.2, 0.2000001, 0.6, 1])).tolist() == [0, 0, 2, 3, 8, 14]


def test_ratio_is_undefined_over_zero() -> None:
    found = ratio(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 0.0]))
    assert found[0] == 0.5 and np.isnan(found[1:]).all()
