"""Sums and ranks under weights against the same on repeated samples."""

import numpy as np
import pytest
import scipy.stats

from glovita_lib.metrics import Drawn, rank_correlation, squared_deviations
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


@pytest.mark.parametrize("values", [2, 8, 1000])
@pytest.mark.parametrize("n", [3, 40])
def test_rank_correlation_equals_scipy(values: int, n: int) -> None:
    """Of repeated samples, with ties in one, both or none."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, values, n) / 7, rng.integers(0, 8, n) * 1.0
    weights = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(50)], 1)
    drawn = Drawn(weights.astype(float))
    for one, other in ((x, y), (y, x), (x, x + 1), (rng.normal(size=n), rng.normal(size=n))):
        found = rank_correlation(one, other, drawn)
        for r in range(50):
            rows = np.repeat(np.arange(n), weights[:, r])
            if np.ptp(other[rows]) == 0:
                assert np.isnan(found[r])
            elif np.ptp(one[rows]) == 0:
                assert found[r] == 0
            else:
                expected = scipy.stats.spearmanr(one[rows], other[rows]).statistic
                assert found[r] == pytest.approx(expected, abs=1e-12)


def test_ranks_of_many_samples_have_room() -> None:
    """Twice the sum of ranks of 70,000 samples, one of which is drawn 60,000 times."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 70_000))
    weights = np.zeros((70_000, 1))
    weights[:10_000] = 1
    weights[5] = 60_000
    drawn = Drawn(weights)
    assert drawn.whole.dtype == np.int64
    rows = np.repeat(np.arange(70_000), weights[:, 0].astype(int))
    expected = scipy.stats.spearmanr(x[rows], y[rows]).statistic
    assert rank_correlation(x, y, drawn)[0] == pytest.approx(expected, abs=1e-12)


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
