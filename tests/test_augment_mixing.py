"""Mixup and CutMix against explicit loops, the Beta distribution and the pasted area."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits

from glovita_lib.augment import (
    beta,
    mixed,
    mixed_series,
    mixup_cutmix,
    mixup_draws,
    rectangles,
)


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    images = torch.from_numpy(data.images[:count] / 16).float()[:, None]  # (B, 1, 8, 8)
    return images, torch.from_numpy(data.target[:count])


def mix(inputs, targets, *, mixup=True, cutmix=False, alpha=1.0, seed=0, outputs=10):
    return mixup_cutmix(
        inputs,
        targets,
        outputs=outputs,
        mixup=mixup,
        mixup_alpha=alpha,
        cutmix=cutmix,
        cutmix_alpha=alpha,
        seed=seed,
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_given_parameters_equal_explicit_loops():
    inputs, targets = digits(4)
    soft = torch.nn.functional.one_hot(targets, 10).float()
    partner = torch.tensor([2, 0, 3, 1])
    kept = torch.tensor([0.25, 1.0, 0.7, 1.0])
    boxes = torch.tensor([[0, 0, 0, 0], [1, 4, 2, 8], [0, 0, 0, 0], [0, 8, 0, 8]])
    pasted = torch.tensor([False, True, False, True])
    out, labels = mixed(inputs, soft, partner, kept, boxes, pasted)
    for i in range(4):
        j = partner[i]
        if pasted[i]:
            y0, y1, x0, x1 = boxes[i].tolist()
            expected = inputs[i].double().clone()
            expected[:, y0:y1, x0:x1] = inputs[j, :, y0:y1, x0:x1].double()
            share = 1 - (y1 - y0) * (x1 - x0) / 64
        else:
            share = float(kept[i])
            expected = share * inputs[i].double() + (1 - share) * inputs[j].double()
        target = share * soft[i].double() + (1 - share) * soft[j].double()
        torch.testing.assert_close(out[i].double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(labels[i].double(), target, atol=1e-6, rtol=0)


def test_mixup_share_in_pixels_is_the_share_in_targets():
    """Constant images of value i with target i: a mixed image's value equals its mixed target."""
    values = torch.arange(64.0)
    inputs = values[:, None, None, None].expand(64, 3, 5, 7).contiguous()
    out, targets = mix(inputs, values[:, None], outputs=1)
    torch.testing.assert_close(out.mean((1, 2, 3)), targets[:, 0])
    assert (out.amax((1, 2, 3)) - out.amin((1, 2, 3)) < 1e-5).all()
    assert (targets[:, 0] - values).abs().gt(0.5).float().mean() > 0.8  # most are mixed


@pytest.mark.parametrize("cutmix_only", [True, False])
def test_cutmix_target_share_is_the_pasted_area(cutmix_only):
    values = torch.arange(200.0)
    inputs = values[:, None, None, None].expand(200, 1, 9, 13).contiguous()
    out, targets = mix(inputs, values[:, None], mixup=not cutmix_only, cutmix=True, outputs=1)
    torch.testing.assert_close(out.mean((1, 2, 3)), targets[:, 0], atol=1e-3, rtol=1e-5)
    two_valued = torch.tensor([len(image.unique()) == 2 for image in out])
    assert two_valued.float().mean() > (0.7 if cutmix_only else 0.3)
    blended = torch.tensor(
        [len(image.unique()) == 1 and float(image[0, 0, 0]) % 1 > 1e-3 for image in out]
    )
    assert blended.float().mean() == 0 if cutmix_only else 0.35 < blended.float().mean() < 0.65


def test_rectangles_are_centred_anywhere_and_cut_at_the_border():
    kept = torch.full((5000,), 0.75)  # half of each side
    y0, y1, x0, x1 = rectangles(kept, 16, 32, seeded()).T
    assert (y0 >= 0).all() and (y1 <= 16).all() and (x0 >= 0).all() and (x1 <= 32).all()
    inner = (y0 > 0) & (y1 < 16) & (x0 > 0) & (x1 < 32)
    assert ((y1 - y0)[inner] == 8).all() and ((x1 - x0)[inner] == 16).all()
    assert 0.15 < inner.float().mean() < 0.3  # about (7/16) (15/32)
    assert (rectangles(torch.ones(5), 16, 32, seeded())[:, ::2].numpy() >= 0).all()
    y0, y1, x0, x1 = rectangles(torch.ones(5), 16, 32, seeded()).T
    assert (y0 == y1).all() and (x0 == x1).all()


@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    draws = beta(4000, alpha, seeded()).double().numpy()
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_samples_have_their_own_share():
    inputs, targets = digits(64)
    _, soft = mix(inputs, targets)
    top = soft.amax(1)
    assert len(top[top < 1].unique()) > 30


def test_multilabel_targets_are_mixed_per_label():
    inputs, _ = digits(6)
    targets = torch.eye(6)[:, :3] + torch.tensor([0.0, 0.0, 1.0])
    _, soft = mix(inputs, targets.clamp(max=1), outputs=3)
    assert soft.shape == (6, 3) and (soft >= 0).all() and (soft <= 1).all()
    assert torch.allclose(soft[:, 2], torch.ones(6))  # all samples have it


def test_soft_targets_sum_to_one():
    inputs, targets = digits(32)
    for options in ({"cutmix": True}, {"mixup": False, "cutmix": True}, {}):
        _, soft = mix(inputs, targets, **options)
        assert soft.shape == (32, 10)
        torch.testing.assert_close(soft.sum(1), torch.ones(32))


def test_seed_decides():
    inputs, targets = digits(16)
    first, again, other = (mix(inputs, targets, cutmix=True, seed=s) for s in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_small_batches_and_neither():
    inputs, targets = digits(1)
    out, soft = mix(inputs, targets, cutmix=True)
    torch.testing.assert_close(out, inputs)  # its own partner
    assert soft[0, targets[0]] == 1
    out, soft = mix(inputs[:0], targets[:0])
    assert out.shape == (0, 1, 8, 8) and soft.shape == (0, 10)
    out, soft = mix(inputs, targets, mixup=False)
    assert out is inputs and np.array_equal(soft.argmax(1), targets)


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel"])
def test_mixup_of_vectors_is_the_formula(subtask):
    """x = l x_i + (1 - l) x_j and y likewise, in float64, with the draws of the seed."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    hot = F.one_hot(y, 3).float()
    targets = y if subtask == "multiclass" else hot
    options = {"outputs": 3, "mixup": True, "mixup_alpha": 0.4, "cutmix": False}
    found, soft = mixup_cutmix(x, targets, **options, cutmix_alpha=1.0, seed=7)
    partner, kept, again = mixup_draws(targets, outputs=3, alpha=0.4, seed=7)
    share = kept.double()[:, None]
    assert float(kept.min()) > 0 and float(kept.max()) < 1 and found.shape == x.shape
    expected = share * x.double() + (1 - share) * x.double()[partner]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    expected = share * hot.double() + (1 - share) * hot.double()[partner]
    torch.testing.assert_close(soft.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(soft, again)


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.5, 0.7, 1 - 1e-6])
def test_a_blend_of_series_has_the_time_points_of_the_larger_share(share):
    """Against a loop over time points in float64; none that counts is made of padding."""
    torch.manual_seed(0)
    series = torch.randn(4, 3, 9)
    there = torch.zeros(4, 9, dtype=torch.bool)
    for row, length in enumerate((9, 3, 6, 5)):
        there[row, :length] = True
    there[0, 4] = there[2, 1] = False  # missing in between
    inputs = torch.cat([series * there[:, None] + 1e3 * ~there[:, None], there[:, None]], 1)
    partner, kept = torch.tensor([1, 2, 3, 0]), torch.full((4,), share)
    found = mixed_series(inputs, partner, kept)
    for row in range(4):
        other = int(partner[row])
        counts = there[row] if share >= 0.5 else there[other]
        assert torch.equal(found[row, 3] > 0, counts) and set(found[row, 3].tolist()) <= {0, 1}
        for t in counts.nonzero()[:, 0].tolist():
            weights = np.array([share * bool(there[row, t]), (1 - share) * bool(there[other, t])])
            values = series[[row, other], :, t].double().numpy()
            expected = (weights[:, None] * values).sum(0) / weights.sum()
            np.testing.assert_allclose(found[row, :3, t], expected, atol=1e-5)
