"""Augmentations of volumes against scipy, closed forms in float64 and batchgeneratorsv2's."""

import math

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, stats

from glovita_lib import augment_volumes
from glovita_lib.augment_patch import Grid, Placement
from glovita_lib.augment_volumes import (
    VOLUME_OPERATIONS,
    ResolvedVolumeAugmentation,
    VolumeAugmenter,
)
from glovita_lib.errors import UserError
from glovita_lib.loader_volumes import resolve_volume_augmentation
from glovita_lib.spec_augment import policy
from glovita_lib.spec_errors import extra_of
from glovita_lib.spec_volumes import (
    PLAIN_VOLUME,
    VOLUME_TEST,
    VOLUME_TRAIN,
    VolumeAugmentation,
    VolumeKwargs,
    VolumeOps,
)

SIZE = (12, 10, 11)
GRID = Grid(SIZE, (1.0, 1.0, 1.0), None, (0, 1, 2))
VALUES = [each for each in VOLUME_OPERATIONS.table if each.stage == "values"]


def volumes(count: int = 4, channels: int = 1, size=SIZE) -> torch.Tensor:
    """Smooth noise of mean 0, (count, channels, *size) float32."""
    noise = np.random.default_rng(0).normal(size=(count, channels, *size))
    return torch.from_numpy(3 * ndimage.gaussian_filter(noise, (0, 0, 1, 1, 1))).float()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(got: torch.Tensor, expected, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(got.double().numpy(), np.asarray(expected), atol=atol, rtol=0)


# --- formulas ---------------------------------------------------------------------------------


def test_blur_equals_scipy():
    x = volumes()[:, 0]
    sigma = torch.tensor([[0.5, 0.7, 1.2], [1.0, 1.0, 0.3], [1.2, 0.5, 0.5], [0.3, 1.5, 1.0]])
    taps = [augment_volumes.gaussian_taps(sigma[:, i], SIZE[i]) for i in range(3)]
    out = augment_volumes.blurred(x.clone(), *taps)
    for image, row, got in zip(x.double().numpy(), sigma.tolist(), out, strict=True):
        for axis, each in enumerate(row):
            side = [n for n in (1, 3, 5, 7, 9) if abs(n - (6 * each + 0.5)) <= 1][0]
            offset = np.arange(side) - side // 2
            kernel = np.exp(-0.5 * (offset / np.float64(np.float32(each))) ** 2)
            image = ndimage.correlate1d(image, kernel / kernel.sum(), axis, mode="mirror")
        assert_close(got, image)


def test_blur_of_one_voxel_axes_and_few():
    for size in ((1, 5, 2), (2, 2, 2)):
        ones = torch.ones(2, 1, *size)
        ops = policy(PLAIN_VOLUME, blur_p=1.0, blur_sigma=(1.5, 3.0))
        assert_close(augment_volumes.random_blur(ones, ops, seeded(), GRID), np.ones((2, 1, *size)))


@pytest.mark.parametrize("side", [2, 3, 4, 7])
def test_median_equals_scipy(side):
    for size in ((9, 6, 7), (2, 5, 1)):
        x = volumes(1, size=size)[0, 0]
        expected = ndimage.median_filter(x.numpy(), side)
        assert np.array_equal(augment_volumes.median(x, side).numpy(), expected)
        assert np.array_equal(augment_volumes.window_median(x, side).numpy(), expected)


def test_contrast_formula():
    x = volumes(4)[:, 0]
    factors, clipped = [0.5, 1.6, 1.6, 1.0], [True, True, False, False]
    out = augment_volumes.contrasted(x.clone(), torch.tensor(factors), torch.tensor(clipped))
    for image, factor, clip, got in zip(x.double().numpy(), factors, clipped, out, strict=True):
        expected = (image - image.mean()) * factor + image.mean()
        assert_close(got, expected.clip(image.min(), image.max()) if clip else expected)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_gamma_formula(offset):
    """Minimum and maximum to 0 and 1, the power, back, and the mean and deviation kept."""
    x = volumes(3)[:, 0] + offset
    exponents = [0.7, 1.0, 1.5]
    together = augment_volumes.curved(x.clone(), torch.tensor(exponents))
    for image, exponent, row in zip(x, exponents, together, strict=True):
        alone = augment_volumes.curved(image[None].clone(), torch.tensor([exponent]))[0]
        values = image.double().numpy()
        spread = np.ptp(values)
        curve = ((values - values.min()) / spread) ** exponent * spread + values.min()
        expected = (curve - curve.mean()) / curve.std() * values.std() + values.mean()
        assert_close(alone, expected, 2e-3 if offset else 2e-5)
        assert_close(row, expected, 2e-3 if offset else 2e-5)


def test_powers_of_zero_and_of_what_is_next_to_it():
    """2^(exponent log2 x) without the logarithm of 0, which is 0 for small exponents too."""
    x = torch.tensor([0.0, 1e-45, 2e-38, 1e-30, 1e-7, 0.3, 1.0, math.nan])
    for exponent in (0.01, 0.7, 1.5, 4.0):
        values = torch.where(x < 1.1754944e-38, 0.0, x).double().numpy()
        out = augment_volumes.powered(x.clone().view(1, 2, 2, 2), torch.tensor([exponent]))
        np.testing.assert_allclose(out.flatten(), values**exponent, rtol=2e-5, atol=1e-37)


def test_gamma_of_the_inverted_values():
    x = volumes(2)
    ops = policy(PLAIN_VOLUME, gamma_inverted_p=1.0, gamma_inverted=(1.5, 1.5))
    out = augment_volumes.random_gamma_inverted(x.clone(), ops, seeded(), GRID)
    ops = policy(PLAIN_VOLUME, gamma_p=1.0, gamma=(1.5, 1.5))
    assert_close(out, -augment_volumes.random_gamma(-x, ops, seeded(), GRID))


@pytest.mark.parametrize("each", VALUES, ids=lambda each: each.switches[0])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_constant_volumes_stay_finite(each, value):
    x = torch.full((3, 2, *SIZE), value)
    ops = policy(PLAIN_VOLUME, **dict.fromkeys(each.switches, 1.0), median_share=0.5)
    out = each.function(x, ops, seeded(), GRID)
    assert bool(out.isfinite().all())
    if each.switches[0] in ("blur_p", "contrast_p", "gamma_p", "low_resolution_p", "sharpen_p"):
        assert_close(out, np.full(out.shape, value))


def test_low_resolution_equals_torch():
    x = volumes(1)[0, 0]
    for size in ((6, 10, 7), (12, 10, 11), (1, 5, 3)):
        coarse = F.interpolate(x[None, None].double(), size, mode="nearest-exact")
        expected = F.interpolate(coarse, SIZE, mode="trilinear")[0, 0]
        assert_close(augment_volumes.coarse(x, size), expected)


def test_low_resolution_keeps_thick_slices():
    x = volumes(1)
    ops = policy(PLAIN_VOLUME, low_resolution_p=1.0, low_resolution=(0.5, 0.5))
    grid = Grid(SIZE, (1.0, 1.0, 5.0), 2, (0, 1, 2))
    out = augment_volumes.random_low_resolution(x.clone(), ops, seeded(), grid)
    for number in range(SIZE[2]):
        expected = augment_volumes.coarse(x[0, 0, :, :, number : number + 1], (6, 5, 1))
        assert torch.equal(out[0, 0, :, :, number : number + 1], expected)


def test_sharpening_subtracts_the_laplacian():
    x = volumes(2)[:, 0]
    out = augment_volumes.sharpened(x.clone(), torch.tensor([0.3, 1.0]))
    for image, factor, got in zip(x.double().numpy(), (0.3, 1.0), out, strict=True):
        assert_close(got, image - factor * ndimage.laplace(image, mode="nearest"))


def test_bumps_are_gaussians_between_0_and_1():
    """The mass of a normal distribution in each voxel, along each axis, stretched to 0..1."""
    parts = augment_volumes.profiles(5, SIZE, (0.2, 1.0), (-0.5, 1.5), seeded(3))
    generator = seeded(3)
    expected = []
    for side in SIZE:
        log_sigma = augment_volumes.uniform(5, math.log(0.2), 0.0, generator).double()
        centre = augment_volumes.uniform(5, -0.5, 1.5, generator).double() * side
        edges = np.arange(side + 1) - 0.5
        scale = log_sigma.exp().numpy()[:, None] * side
        expected.append(np.diff(stats.norm.cdf(edges, centre.numpy()[:, None], scale)))
    found = augment_volumes.bump(*parts)
    for number in range(5):
        product = np.einsum("x,y,z->xyz", *(each[number] for each in expected))
        assert_close(found[number], (product - product.min()) / np.ptp(product))


def test_local_gamma_formula():
    x = volumes(3)[:, 0]
    exponents = torch.tensor([0.2, 0.8, 3.0])
    parts = augment_volumes.profiles(3, SIZE, (0.2, 1.0), (-0.5, 1.5), seeded())
    out = augment_volumes.locally_curved(x.clone(), exponents, *parts)
    for i, image in enumerate(x.double().numpy()):
        kernel = augment_volumes.bump(*(each[i : i + 1] for each in parts))[0].double().numpy()
        unit = (image - image.min()) / np.ptp(image)
        mixed = unit * (1 - kernel) + unit ** float(exponents[i]) * kernel
        assert_close(out[i], mixed * np.ptp(image) + image.min())


def test_gradients_add_a_bump_of_either_sign():
    x = torch.zeros(200, 1, *SIZE)
    ops = policy(PLAIN_VOLUME, gradient_p=1.0)
    out = augment_volumes.random_gradient(x, ops, seeded(), GRID).flatten(1)
    height = torch.where(out.amax(1) > -out.amin(1), out.amax(1), out.amin(1))
    assert bool(((height.abs() > 0.9999) & (height.abs() < 5.0001)).all())
    assert 60 < (height > 0).sum() < 140
    assert bool((out.abs().amin(1) < 1e-6).all())


def test_rectangles_hold_the_mean_of_what_they_cover():
    x = volumes(1, size=(20, 20, 20))
    ops = policy(PLAIN_VOLUME, rectangles_p=1.0, rectangles=(1, 1))
    sides = set()
    for seed in range(30):
        out = augment_volumes.random_rectangles(x.clone(), ops, seeded(seed), GRID)
        changed = (out != x)[0, 0]
        places = [np.unique(axis) for axis in changed.nonzero().numpy().T]
        box = np.ix_(*(np.arange(p[0], p[-1] + 1) for p in places))
        mean = x[0, 0].double().numpy()[box].mean()
        np.testing.assert_allclose(out[0, 0].numpy()[box], mean, atol=1e-5)
        sides.update(len(p) for p in places)
    assert sides == set(range(2, 7))  # 0.1 to 0.33 of 20


def test_noise_is_normal_and_of_one_strength_in_all_channels():
    x = torch.zeros(50, 2, 16, 16, 16)
    ops = policy(PLAIN_VOLUME, noise_p=1.0, noise_std=(0.1, 0.5))
    out = augment_volumes.random_noise(x, ops, seeded(), GRID)
    std = out.flatten(2).std(2)
    np.testing.assert_allclose(std[:, 0], std[:, 1], rtol=0.06)
    assert 0.09 < std.min() < 0.15 and 0.45 < std.max() < 0.52
    standard = (out.flatten(2) / std[:, :, None]).flatten().numpy()
    assert stats.kstest(standard[::10], "norm").pvalue > 1e-3


# --- draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", VALUES, ids=lambda each: each.switches[0])
def test_probabilities_of_samples_and_channels(each):
    """10,000 draws: the share of samples is the switch, of their channels channel_p."""
    name = each.switches[0]
    channel = name.replace("_p", "_channel_p")
    has_channels = channel in VolumeOps.__struct_fields__
    changes = {name: 0.3, "low_resolution": (0.3, 0.6), "rectangles_size": (0.5, 0.9)}
    changes |= {channel: 0.5} if has_channels else {}
    x = torch.randn(10_000, 2, 4, 4, 4, generator=seeded(1))
    out = each.function(x.clone(), policy(PLAIN_VOLUME, **changes), seeded(), GRID)
    changed = (out != x).flatten(2).any(2).double()
    wanted = 0.15 if has_channels else 0.3
    assert abs(changed.mean() - wanted) < 0.015
    assert abs(changed.prod(1).mean() - (0.075 if has_channels else 0.3)) < 0.015


@pytest.mark.parametrize("limits", [(0.7, 1.5), (0.5, 2.0), (1.2, 1.5), (0.3, 0.8), (1.0, 1.0)])
def test_factors_are_below_and_above_one_as_often(limits):
    low, high = limits
    drawn = augment_volumes.around_one(10_000, limits, seeded())
    assert low <= drawn.min() <= low + 0.01 and high - 0.01 <= drawn.max() <= high + 1e-6
    if low < 1 < high:
        assert abs((drawn < 1).double().mean() - 0.5) < 0.02
        below = (drawn[drawn < 1].numpy() - low) / (1 - low)
        assert stats.kstest(below, "uniform").pvalue > 1e-3


def test_a_share_of_the_blurs_is_a_median():
    x = torch.randn(4000, 1, 3, 3, 3, generator=seeded(1))
    ops = policy(PLAIN_VOLUME, blur_p=1.0, median_share=0.3, median_size=(3, 3))
    out = augment_volumes.random_blur(x.clone(), ops, seeded(), GRID)
    known = (out.flatten(1)[:, :, None] == x.flatten(1)[:, None]).any(2).all(1)  # values of x
    assert abs(known.double().mean() - 0.3) < 0.03


# --- the table --------------------------------------------------------------------------------


def test_table_and_struct_have_the_same_switches_in_the_same_order():
    """A field is the switch of one operation, or part of a switch that there is."""
    fields = msgspec.inspect.type_info(VolumeOps).fields
    part_of = {field.name: extra_of(field.type).get("part_of") for field in fields}
    switches = [name for each in VOLUME_OPERATIONS.table for name in each.switches]
    assert switches == [name for name, switch in part_of.items() if switch is None]
    assert set(part_of.values()) - {None} <= set(switches)


class Watched:
    """Parameters that note which of them are read."""

    def __init__(self, ops: VolumeOps) -> None:
        self.ops, self.read = ops, set()

    def __getattr__(self, name: str):
        self.read.add(name)
        return getattr(self.ops, name)


@pytest.mark.parametrize("each", VOLUME_OPERATIONS.table, ids=lambda each: each.switches[0])
def test_an_operation_reads_its_switches_and_their_parts(each):
    fields = msgspec.inspect.type_info(VolumeOps).fields
    parts = {f.name for f in fields if extra_of(f.type).get("part_of") in each.switches}
    changes = {name: "foreground" if name == "crop" else 1.0 for name in each.switches}
    watched = Watched(policy(PLAIN_VOLUME, **changes, median_share=0.5))
    if each.stage == "geometry":
        each.function(Placement.centred(GRID, 4, (15, 15, 15)), watched, seeded())
    else:
        assert each.function(volumes(), watched, seeded(), GRID).shape == (4, 1, *SIZE)
    assert watched.read == {*each.switches, *parts} - {"blur_first"}  # what the order reads


def test_policies_say_what_they_draw():
    assert PLAIN_VOLUME.random() == []
    assert VOLUME_TRAIN["default_3d_1"] == VOLUME_TEST["shared_default_3d"] == PLAIN_VOLUME
    assert not any(ops.random() for ops in VOLUME_TEST.values())
    five = VOLUME_TRAIN["default_nnunet_DA5"]
    assert (five.gamma_p, five.gamma_inverted_p) == (0.1, 0.1)  # one of each
    assert VOLUME_TRAIN["default_nnfoundation"].crop == "random"


# --- application ------------------------------------------------------------------------------


def resolved(train_policy: str = "default_3d_1", **changes) -> ResolvedVolumeAugmentation:
    values = {"encoder_size": None, "native_size": SIZE, "spacing": None, "available": None}
    values |= {name: changes.pop(name) for name in list(changes) if name in values}
    return resolve_volume_augmentation(
        VolumeAugmentation(train_policy=train_policy, **changes),
        default_policies=("default_3d_2", "shared_default_3d"),
        **values,
    )


@pytest.mark.parametrize("name", VOLUME_TRAIN)
@pytest.mark.parametrize("thick", [None, 2])
def test_every_policy_runs_and_follows_from_its_seed(name, thick):
    spacing = (1.0, 1.0, 1.0) if thick is None else (1.0, 1.0, 4.0)
    augmenter = VolumeAugmenter(resolved(name, spacing=spacing), train=True)
    assert augmenter.grid.thick == thick
    x = volumes(6, 2)
    kept = x.clone()
    for dtype in (torch.float32, torch.float16):
        first, again = (augmenter(x.to(dtype), False, 7) for _ in range(2))
        assert torch.equal(first, again) and first.shape == x.shape
        assert first.dtype == torch.float32 and bool(first.isfinite().all())
    assert torch.equal(x, kept)  # the inputs are left alone
    if VOLUME_TRAIN[name].random():
        assert not torch.equal(first, augmenter(x.half(), False, 8))


def test_samples_do_not_see_their_partners():
    """The same draws give a sample the same result whatever lies beside it in the batch."""
    augmenter = VolumeAugmenter(resolved("default_nnunet_DA5"), train=True)
    x, other = volumes(6, 2), volumes(6, 2).flip(0) * 2
    for seed in range(4):
        out = augmenter(x, False, seed)
        for row in range(6):
            beside = other.clone()
            beside[row] = x[row]
            got = augmenter(beside, False, seed)[row]
            if not torch.equal(got, out[row]):
                torch.testing.assert_close(got, out[row], atol=1e-6, rtol=0)


def test_rows_together_equal_rows_alone():
    """A device takes all rows that drew an operation at once, a CPU one after the other."""
    x = volumes(5)[:, 0]
    one = torch.linspace(0.5, 1.5, 5)
    bumps = augment_volumes.profiles(5, SIZE, (0.2, 1.0), (0.0, 1.0), seeded())
    taps = [augment_volumes.gaussian_taps(one, side) for side in SIZE]
    for function, *parameters in (
        (augment_volumes.contrasted, one, one > 1),
        (augment_volumes.curved, one),
        (augment_volumes.locally_curved, one, *bumps),
        (augment_volumes.sharpened, one),
        (augment_volumes.blurred, *taps),
    ):
        together = function(x.clone(), *parameters)
        for i in range(5):
            alone = function(x[i : i + 1].clone(), *(each[i : i + 1] for each in parameters))
            torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=0)


def test_evaluation_changes_nothing_and_cuts_the_centre():
    augmenter = VolumeAugmenter(resolved("default_nnunet"), train=False)
    x = volumes()
    assert torch.equal(augmenter(x, False, 0), x)
    assert augmenter(x[:0], False, 0).shape == (0, 1, *SIZE)
    small = VolumeAugmenter(resolved(patch_size=(4, 5, 20)), train=False)
    out = small(x, False, 0)
    assert torch.equal(out[..., 5:16], x[:, :, 4:8, 2:7])
    low = x.amin((2, 3, 4))[:, :, None, None, None]
    assert bool((out[..., :5] == low).all()) and bool((out[..., 16:] == low).all())


def test_the_reader_cuts_a_margin_only_for_what_shows_it():
    size = (10, 10, 10)
    for name, train, side in (
        ("default_3d_2", True, 12), ("default_3d_2", False, 10), ("default_3d_1", True, 10),
    ):  # fmt: skip
        augmenter = VolumeAugmenter(resolved(name, patch_size=size), train=train)
        assert augmenter.fit.size == size
        assert augmenter.fit.margin == ((side - 10) // 2,) * 3
        batch = volumes(2, size=(side,) * 3)
        assert augmenter(batch, True, 0).shape == (2, 1, *size)
    augmenter = VolumeAugmenter(resolved("default_3d_2", patch_size=size), train=True)
    still = policy(augmenter.ops, rotate_p=0.0, scale_p=0.0, mirror_p=0.0)
    augmenter.ops = still
    batch = volumes(2, size=(12, 12, 12))
    assert torch.equal(augmenter(batch, True, 0), batch[:, :, 1:11, 1:11, 1:11])


def test_random_parts_of_volumes_that_no_reader_cut():
    augmenter = VolumeAugmenter(
        resolved(patch_size=(3, 10, 11), train_kwargs=VolumeKwargs(crop="random")), train=True
    )
    x = torch.arange(12.0)[:, None, None].expand(400, 1, *SIZE)
    starts = augmenter(x, False, 0)[:, 0, 0, 0, 0]
    assert set(starts.tolist()) == set(range(10))
    centre = augmenter(x, True, 0)[:, 0, 0, 0, 0]
    assert bool((centre == 4).all())


# --- what a run uses --------------------------------------------------------------------------


def test_the_spec_comes_before_the_encoder_and_the_data():
    assert resolved().patch_size == SIZE
    assert resolved(encoder_size=(8, 8, 8)).patch_size == (8, 8, 8)
    assert resolved(encoder_size=(8, 8, 8), patch_size=(4, 5, 6)).patch_size == (4, 5, 6)
    with pytest.raises(UserError, match="patch_size: none given"):
        resolved(native_size=None)
    with pytest.raises(UserError, match="train_kwargs.noise_std.*noise_p above 0"):
        resolved(train_kwargs=VolumeKwargs(noise_std=(0.0, 1.0)))
    made = resolved(train_kwargs=VolumeKwargs(noise_p=0.5))
    assert made.train == policy(VOLUME_TRAIN["default_3d_1"], noise_p=0.5)


@pytest.mark.parametrize(
    "spacing, thick",
    [
        (None, None), ((1.0, 1.0, 3.0), None), ((1.0, 1.0, 3.1), 2), ((3.1, 1.0, 0.9), 0),
        ((3.1, 3.1, 1.0), None),
    ],
)  # fmt: skip
def test_the_thick_axis(spacing, thick):
    assert resolved(spacing=spacing).thick_axis == thick


@pytest.mark.parametrize(
    "patch, spacing, thick",
    [
        ((64, 64, 16), None, 2), ((16, 64, 40), (1.0, 1.0, 2.9), 0), ((48, 48, 16), None, None),
        ((64, 16, 64), (1.0, 1.0, 4.0), 2), ((64, 16, 12), None, 0), ((32, 32, 1), None, 2),
        ((64, 20, 1), None, 2), ((2, 1, 2), None, 1), ((1, 1, 1), None, None),
    ],
)  # fmt: skip
def test_a_flat_patch_is_thick_across_its_short_side(patch, spacing, thick):
    """nnU-Net's do_dummy_2d_data_aug, max(patch) / patch[axis] > 3, beside the spacing."""
    found = resolved(patch_size=patch, spacing=spacing)
    assert found.thick_axis == thick
    assert found.flat_axis == (1 if patch == (64, 16, 64) else None)


def test_slices_of_flat_volumes_lie_in_deeper_patches():
    deep = {"patch_size": (32, 32, 16), "native_size": (40, 40, 1)}
    assert resolved(**deep, available=(40, 40, 1)).thick_axis == 2
    assert resolved(**deep, available=(40, 40, 2)).thick_axis is None
    assert resolved(patch_size=(64, 64, 16), anisotropy=4.0).thick_axis is None
    assert resolved(patch_size=(64, 64, 1), anisotropy=99.0).thick_axis == 2


def test_what_is_refused():
    problems = dict(VolumeAugmentation(test_kwargs=VolumeKwargs(mirror_p=0.5)).problems())
    assert "evaluation is deterministic" in problems["test_kwargs.mirror_p"]
    problems = dict(VolumeAugmentation(test_kwargs=VolumeKwargs(crop="random")).problems())
    assert 'crop = "center"' in problems["test_kwargs.crop"]
    assert not list(VolumeAugmentation(test_kwargs=VolumeKwargs(crop="center")).problems())
    assert "twice" in dict(VolumeAugmentation(mirror_axes=("x", "x")).problems())["mirror_axes"]
