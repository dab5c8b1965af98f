"""Augmentations of time series: each operation against its formula, lengths and masks."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline

from glovita_lib.augment_series import SERIES_OPERATIONS, SeriesAugmenter, between_knots, warped
from glovita_lib.augment_series import resolve_series_augmentation as resolve
from glovita_lib.spec_series import SeriesAugmentation, SeriesKwargs, SeriesOps

POLICIES = ("default_series_1", "shared_default_series")
ALL = {"time_warp_p": 1, "permute_p": 1, "slice_p": 1, "magnitude_warp_p": 1, "scale_p": 1}
ALL |= {"jitter_p": 1, "jitter_std": (0.1, 0.2)}


def augmenter(channels=2, masks=0, **kwargs):
    aug = SeriesAugmentation(train_kwargs=SeriesKwargs(**kwargs))
    resolved = resolve(aug, default_policies=POLICIES, length=40)
    return SeriesAugmenter(resolved, channels, train=True, masks=masks)


def ragged(lengths, channels=2):
    """Ramps from 1 up, with their last row."""
    batch = torch.zeros(len(lengths), channels + 1, max(lengths))
    for row, n in zip(batch, lengths, strict=True):
        row[:channels, :n] = torch.arange(1, n + 1)
        row[channels, :n] = 1
    return batch


def test_every_operation_has_its_switch_in_order():
    switches = [each.switches[0] for each in SERIES_OPERATIONS.table]
    assert switches == [name for name in SeriesOps.__struct_fields__ if name.endswith("_p")]
    assert SeriesOps().random() == []


def test_evaluation_and_the_policy_of_nothing_change_nothing():
    x = ragged([40, 7])
    assert augmenter()(x, False, 3) is x
    aug = resolve(SeriesAugmentation(), default_policies=POLICIES, length=40)
    assert SeriesAugmenter(aug, 2, train=False)(x, False, 3) is x


@pytest.mark.parametrize("kwargs", [{name: value} for name, value in ALL.items() if "_p" in name])
def test_samples_are_independent_of_their_padding_and_repeatable(kwargs):
    kwargs = kwargs | ({"jitter_std": (0.1, 0.2)} if "jitter_p" in kwargs else {})
    x = ragged([40, 7, 1, 23])
    found = augmenter(**kwargs)(x.clone(), False, 5)
    torch.testing.assert_close(found, augmenter(**kwargs)(x.clone(), False, 5))
    assert not torch.equal(found, x) and torch.isfinite(found).all()
    for row, n in zip(found, [40, 7, 1, 23], strict=True):
        assert not row[:, n:].any() and row[2, :n].all()
    other = augmenter(**kwargs)(x.clone(), False, 6)
    assert not torch.equal(found, other)
    assert not torch.equal(found[0], found[3, :, :]) or "scale_p" in kwargs


@pytest.mark.parametrize("lengths", [[40, 7, 23], [40, 40, 40]])
@pytest.mark.parametrize("kwargs", [{name: value} for name, value in ALL.items() if "_p" in name])
def test_masks_move_along_and_stay_masks(kwargs, lengths):
    """Of missing values beside their channels: the values are those of a batch without masks."""
    kwargs = kwargs | ({"jitter_std": (0.1, 0.2)} if "jitter_p" in kwargs else {})
    x = ragged(lengths)
    x = x if len(set(lengths)) > 1 else x[:, :2]
    masks = (torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    masks *= (torch.arange(40) < torch.tensor(lengths)[:, None])[:, None]
    found = augmenter(4, 2, **kwargs)(torch.cat([x[:, :2], masks, x[:, 2:]], 1), False, 5)
    plain = augmenter(**kwargs)(x, False, 5)
    assert torch.equal(found[:, [0, 1, *range(4, found.shape[1])]], plain)
    assert set(found[:, 2:4].unique().tolist()) == {0.0, 1.0}
    if kwargs.keys() & {"time_warp_p", "permute_p", "slice_p"}:
        place = augmenter(1, **kwargs)(torch.arange(40.0).repeat(3, 1, 1), False, 5)[:, 0]
        if len(set(lengths)) == 1:
            near = place.round().long()[:, None].expand(-1, 2, -1)
            tie = (place % 1 - 0.5).abs() < 1e-3
            same = (found[:, 2:4] == masks.gather(2, near)).all(1)
            assert (same | tie).all() and not torch.equal(found[:, 2:4], masks)
    else:
        assert torch.equal(found[:, 2:4], masks)


def test_series_of_one_length_have_no_last_row():
    x = ragged([30, 30])[:, :2]
    found = augmenter(**ALL)(x, False, 1)
    assert found.shape == x.shape and torch.isfinite(found).all()


def test_a_window_is_stretched():
    found = augmenter(1, slice_p=1, slice_share=(0.5, 0.5))(ragged([21], 1), False, 0)[0, 0]
    steps = found.diff()
    torch.testing.assert_close(steps, torch.full((20,), 0.5), atol=1e-4, rtol=0)
    assert 1 <= found[0] <= 11.01


def test_time_warps_keep_the_ends_and_the_order():
    found = augmenter(1, time_warp_p=1)(ragged([30], 1), False, 0)[0, 0]
    assert found[0] == 1 and abs(found[-1] - 30) < 1e-4 and (found.diff() > 0).all()
    speed = torch.tensor([[1.0, 3.0, 2.0]]).double()
    share = torch.linspace(0, 1, 101).double()[None]
    pace = np.interp(np.linspace(0, 1, 100_001), [0, 0.5, 1], speed[0])
    way = np.cumsum(pace) / pace.sum()
    np.testing.assert_allclose(warped(speed, share)[0], way[::1000], atol=1e-4)


def test_segments_change_places():
    found = augmenter(1, permute_p=1, permute_segments=(3, 3))(ragged([30], 1), False, 2)[0, 0]
    assert sorted(found.round().int().tolist()) == list(range(1, 31))
    parts = found.round().int().view(3, 10)
    assert (parts.diff(dim=1) == 1).all() and parts[:, 0].tolist() != [1, 11, 21]


def test_smooth_curves_are_catmull_rom_splines():
    knots = np.random.default_rng(0).standard_normal(5)
    padded = np.concatenate([[2 * knots[0] - knots[1]], knots, [2 * knots[-1] - knots[-2]]])
    slopes = (padded[2:] - padded[:-2]) / 2
    share = np.linspace(0, 1, 50)
    expected = CubicHermiteSpline(np.arange(5), knots, slopes)(share * 4)
    found = between_knots(torch.from_numpy(knots), torch.from_numpy(share), smooth=True)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_factors_are_of_each_channel_and_noise_of_each_value():
    x = torch.ones(400, 2, 50)
    factors = augmenter(scale_p=1, scale_std=0.5)(x, False, 0)
    assert (factors == factors[..., :1]).all() and abs(factors[..., 0].std() - 0.5) < 0.05
    noise = augmenter(jitter_p=1, jitter_std=(0.3, 0.3))(x, False, 0) - 1
    assert abs(noise.std() - 0.3) < 0.01
    half = augmenter(jitter_p=0.5, jitter_std=(0.3, 0.3))(x, False, 0)
    changed = (half != 1).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 0.6
