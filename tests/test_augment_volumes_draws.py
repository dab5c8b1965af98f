"""What the augmentations of volumes draw: distributions of every parameter on 10,000 draws, and
the draws of nnU-Net's own policies."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from glovita_lib import augment_patch, augment_volumes
from glovita_lib.augment_patch import Grid, Placement
from glovita_lib.augment_volumes import VOLUME_OPERATIONS, VolumeAugmenter
from glovita_lib.loader_volumes import resolve_volume_augmentation
from glovita_lib.spec_augment import policy
from glovita_lib.spec_volumes import (
    PLAIN_VOLUME,
    VOLUME_TRAIN,
    VolumeAugmentation,
    VolumeKwargs,
    VolumeOps,
)

COUNT = 10_000
FUNCTIONS = {each.switches[0]: each.function for each in VOLUME_OPERATIONS.table}
LINE = Grid((1, 1, 1), (1.0, 1.0, 1.0), None, (0, 1, 2))  # of any size, no axis is thick
FINE = 1e-3  # p-value of Kolmogorov and Smirnov's test that passes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_uniform(values, low: float, high: float) -> None:
    values = np.asarray(values, np.float64).ravel()
    assert stats.kstest(values, "uniform", (low, high - low)).pvalue > FINE


def assert_around_one(values, low: float, high: float) -> None:
    """Half of them uniform below 1, half above."""
    values = np.asarray(values, np.float64)
    below = values < 1
    assert abs(below.mean() - 0.5) < 0.02
    assert_uniform(values[below], low, 1)
    assert_uniform(values[~below], 1, high)


# --- intensities --------------------------------------------------------------------------------


def parameters(monkeypatch, switch: str, **changes) -> tuple[torch.Tensor, ...]:
    """What an operation gives its formula for 10,000 samples that all draw it."""
    seen = []

    def noted(x, rows, function, *values):
        seen.append((len(rows), values))
        return x

    monkeypatch.setattr(augment_volumes, "on_channels", noted)
    ops = policy(PLAIN_VOLUME, **{switch: 1.0}, **changes)
    FUNCTIONS[switch](torch.zeros(COUNT, 1, 1, 1, 1), ops, seeded(), LINE)
    ((rows, values),) = seen
    assert rows == COUNT
    return values


def test_additive_brightness_is_normal_around_0(monkeypatch):
    """shift_p, shift_std: darker as often as brighter."""
    (shift,) = parameters(monkeypatch, "shift_p", shift_std=0.7)
    assert stats.kstest(shift.double().numpy() / 0.7, "norm").pvalue > FINE


@pytest.mark.parametrize(
    "switch, changes",
    [
        ("brightness_p", {"brightness": (0.6, 1.9)}),
        ("contrast_p", {"contrast": (0.5, 2.0)}),
        ("gamma_p", {"gamma": (0.6, 1.8)}),
        ("gamma_inverted_p", {"gamma_inverted": (0.4, 1.3)}),
    ],
)
def test_factors_and_exponents(monkeypatch, switch, changes):
    ((low, high),) = changes.values()
    assert_around_one(parameters(monkeypatch, switch, **changes)[0], low, high)


@pytest.mark.parametrize(
    "switch, changes",
    [
        ("noise_p", {"noise_std": (0.1, 0.7)}),
        ("sharpen_p", {"sharpen": (0.1, 1.0)}),
    ],
)
def test_strengths_are_uniform(monkeypatch, switch, changes):
    ((low, high),) = changes.values()
    assert_uniform(parameters(monkeypatch, switch, **changes)[0], low, high)


def test_a_share_of_the_contrasts_is_clipped(monkeypatch):
    _, clipped = parameters(monkeypatch, "contrast_p", contrast_clip_share=0.3)
    assert abs(clipped.double().mean() - 0.3) < 0.015


def test_bumps_are_of_either_sign_and_where_they_are_asked_for(monkeypatch):
    asked = []
    profiles = augment_volumes.profiles
    monkeypatch.setattr(
        augment_volumes, "profiles", lambda *given: (asked.append(given[2:4]), profiles(*given))[1]
    )
    height, *_ = parameters(
        monkeypatch, "gradient_p", gradient_strength=(2, 5), gradient_scale=(0.3, 0.6),
        gradient_place=(0.1, 0.9),
    )  # fmt: skip
    assert abs((height > 0).double().mean() - 0.5) < 0.02
    assert_uniform(height.abs(), 2, 5)
    exponent, *_ = parameters(
        monkeypatch, "local_gamma_p", local_gamma_scale=(0.2, 0.5), local_gamma_place=(0.0, 1.0),
        local_gamma_low=(0.1, 0.8), local_gamma_high=(1.5, 4.0),
    )  # fmt: skip
    assert abs((exponent < 1).double().mean() - 0.5) < 0.02
    assert_uniform(exponent[exponent < 1], 0.1, 0.8)
    assert_uniform(exponent[exponent > 1], 1.5, 4.0)
    assert asked == [((0.3, 0.6), (0.1, 0.9)), ((0.2, 0.5), (0.0, 1.0))]


def test_deviations_and_centres_of_bumps(monkeypatch):
    """Deviations uniform in their logarithm, centres uniform, each axis by itself: read off the
    mass in the two halves of an axis of two voxels."""
    seen = []
    ndtr = torch.special.ndtr
    monkeypatch.setattr(torch.special, "ndtr", lambda x: (seen.append(x), ndtr(x))[1])
    augment_volumes.profiles(COUNT, (10, 10, 10), (0.2, 0.8), (-0.5, 1.5), seeded())
    for units in seen:  # (edge - centre) / sigma
        sigma = 1 / units.diff(dim=1)[:, 0].numpy() / 10
        centre = -0.05 - units[:, 0].numpy() * sigma
        assert_uniform(np.log(sigma), math.log(0.2), math.log(0.8))
        assert_uniform(centre, -0.5, 1.5)
    assert abs(np.corrcoef(seen[0][:, 0], seen[1][:, 0])[0, 1]) < 0.05


@pytest.mark.parametrize("same", [0.0, 0.4, 1.0])
def test_deviations_of_blurs(monkeypatch, same):
    drawn = []

    def noted(sigma, side):
        drawn.append(sigma)
        return torch.ones(len(sigma), 1)

    monkeypatch.setattr(augment_volumes, "gaussian_taps", noted)
    parameters(monkeypatch, "blur_p", blur_sigma=(0.3, 1.5), blur_same_p=same)
    for sigma in drawn:
        assert_uniform(sigma, 0.3, 1.5)
    alike = (drawn[0] == drawn[1]) & (drawn[1] == drawn[2])
    assert abs(alike.double().mean() - same) < 0.015


def test_sides_of_medians(monkeypatch):
    sides = []
    monkeypatch.setattr(augment_volumes, "median", lambda x, side: (sides.append(side), x)[1])
    ops = policy(PLAIN_VOLUME, blur_p=1.0, median_share=1.0, median_size=(2, 7))
    augment_volumes.random_blur(torch.zeros(COUNT, 1, 1, 1, 1), ops, seeded(), LINE)
    values, counts = np.unique(sides, return_counts=True)
    assert values.tolist() == [2, 3, 4, 5, 6, 7]
    assert stats.chisquare(counts).pvalue > FINE


def test_shares_of_low_resolution(monkeypatch):
    sizes = []
    monkeypatch.setattr(augment_volumes, "coarse", lambda x, size: (sizes.append(size), x)[1])
    x = torch.zeros(2000, 1, 1000, 1, 1)
    ops = policy(PLAIN_VOLUME, low_resolution_p=1.0, low_resolution=(0.25, 1.0))
    augment_volumes.random_low_resolution(x, ops, seeded(), LINE)
    assert_uniform(np.array(sizes)[:, 0] / 1000, 0.25, 1.0)


def test_counts_sides_and_places_of_rectangles():
    """On a line of voxels the boxes are runs of one value."""
    x = torch.rand(1, 1, 100, 1, 1, generator=seeded()).expand(4000, -1, -1, -1, -1).clone()
    ops = policy(PLAIN_VOLUME, rectangles_p=1.0, rectangles=(1, 1), rectangles_size=(0.1, 0.3))
    out = augment_volumes.random_rectangles(x.clone(), ops, seeded(), LINE)
    changed = (out != x).flatten(1)
    side = changed.sum(1).numpy()
    start = changed.int().argmax(1).numpy()
    jitter = np.random.default_rng(0).random(len(side))
    assert set(side) == set(range(10, 30))
    assert_uniform(side + jitter, 10, 30)
    assert_uniform((start + jitter) / (101 - side), 0, 1)
    x = torch.rand(4000, 1, 300, 1, 1, generator=seeded(1))
    ops = policy(ops, rectangles=(1, 4), rectangles_size=(0.007, 0.0099))  # two voxels
    out = augment_volumes.random_rectangles(x.clone(), ops, seeded(), LINE)
    counted = (out != x).flatten(1).sum(1).numpy() / 2
    shares = [(counted == count).mean() for count in (1, 2, 3, 4)]
    np.testing.assert_allclose(shares, 0.25, atol=0.05)  # a few boxes lie on others


# --- geometry -----------------------------------------------------------------------------------


def placement(switch: str, seed: int = 0, spacing=(1.0, 1.0, 1.0), **changes) -> Placement:
    """10,000 placements of which all draw one operation."""
    place = Placement.centred(Grid((8, 8, 8), spacing, None, (0, 1, 2)), COUNT, (8, 8, 8))
    FUNCTIONS[switch](place, policy(PLAIN_VOLUME, **{switch: 1.0, **changes}), seeded(seed))
    return place


def angles(place: Placement) -> np.ndarray:
    """About x, y, z of rotations Rz Ry Rx, (3, B)."""
    m = place.matrices.numpy()
    x, z = np.arctan2(m[:, 2, 1], m[:, 2, 2]), np.arctan2(m[:, 1, 0], m[:, 0, 0])
    return np.stack([x, -np.arcsin(m[:, 2, 0]), z])


@pytest.mark.parametrize("each", [1.0, 0.5])
def test_angles_are_uniform_and_about_a_share_of_the_axes(each):
    found = angles(placement("rotate_p", rotate_radians=0.4, rotate_axis_p=each))
    turned = np.abs(found) > 1e-9
    np.testing.assert_allclose(turned.mean(1), each, atol=0.015)
    for angle, there in zip(found, turned, strict=True):
        assert_uniform(angle[there], -0.4, 0.4)
    np.testing.assert_allclose(np.cov(turned), each * (1 - each) * np.eye(3), atol=0.01)


@pytest.mark.parametrize("same", [0.0, 0.3, 1.0])
def test_scales_are_uniform_and_a_share_of_them_the_same(same):
    found = placement("scale_p", scale=(0.7, 1.43), scale_same_p=same).matrices
    factors = found.diagonal(dim1=1, dim2=2)
    for axis in range(3):
        assert_uniform(factors[:, axis], 0.7, 1.43)
    alike = (factors[:, 0] == factors[:, 1]) & (factors[:, 1] == factors[:, 2])
    assert abs(alike.double().mean() - same) < 0.015


def test_shifts_of_control_points_are_uniform():
    place = placement("elastic_p", elastic_points=2, elastic_strength=(0.1, 0.3))
    distance = 7 / 2
    share = place.control.abs().flatten(1).amax(1).double().numpy() / distance
    assert_uniform(share / (375 / 376), 0.1, 0.3)  # the largest of 3 x 5^3
    first = place.control.flatten(1)[:, 0].double().numpy() / distance / share
    assert_uniform(first, -1, 1)


def test_quarter_turns_are_one_two_or_three_in_any_plane():
    place = placement("rot90_p", rot90_p=0.375)
    eye = torch.eye(3, dtype=torch.float64)
    turned = (place.turns != eye).flatten(1).any(1)
    assert abs(turned.double().mean() - 0.375) < 0.015
    kinds, counts = place.turns[turned].flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 9 and bool((torch.linalg.det(kinds.view(-1, 3, 3)) > 0).all())
    assert stats.chisquare(counts.numpy()).pvalue > FINE


def test_axes_are_exchanged_in_any_order():
    kinds, counts = placement("transpose_p").turns.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 6 and stats.chisquare(counts.numpy()).pvalue > FINE


def test_axes_are_mirrored_each_by_itself():
    flipped = placement("mirror_p", mirror_p=0.3).turns.diagonal(dim1=1, dim2=2).numpy() < 0
    np.testing.assert_allclose(flipped.mean(0), 0.3, atol=0.015)
    np.testing.assert_allclose(np.cov(flipped.T), 0.21 * np.eye(3), atol=0.01)


# --- nnU-Net ------------------------------------------------------------------------------------


def test_five_is_nnunets_own():
    """nnUNetTrainerDA5 of nnU-Net 2: its numbers, with quarter turns of which a fourth are none."""
    ops, radians = VOLUME_TRAIN["default_nnunet_DA5"], math.pi / 6
    wanted = policy(
        PLAIN_VOLUME, rotate_p=0.4, rotate_radians=pytest.approx(radians, abs=1e-4),
        rotate_axis_p=0.5, scale_p=0.2, scale=(0.7, 1.43), scale_same_p=0.0, rot90_p=0.5 * 3 / 4,
        transpose_p=0.5, mirror_p=0.5, noise_p=0.1, noise_std=(0.0, 0.1), blur_p=0.2,
        blur_sigma=(0.3, 1.5), blur_same_p=1.0, blur_first=True, blur_channel_p=0.5,
        median_share=0.5, median_size=(2, 7), shift_p=0.1, shift_std=0.5, shift_channel_p=0.5,
        contrast_p=0.2, contrast=(0.5, 2.0), contrast_channel_p=0.5, contrast_clip_share=0.5,
        low_resolution_p=0.15, low_resolution=(0.25, 1.0), low_resolution_channel_p=0.5,
        gamma_inverted_p=0.1, gamma_inverted=(0.7, 1.5), gamma_p=0.1, gamma=(0.7, 1.5),
        rectangles_p=0.4, rectangles=(1, 4), rectangles_channel_p=0.5, gradient_p=0.3,
        gradient_strength=(1, 5), gradient_channel_p=0.5, local_gamma_p=0.3,
        local_gamma_channel_p=0.5, sharpen_p=0.2, sharpen=(0.1, 1.0), sharpen_channel_p=0.5,
    )  # fmt: skip
    for name in VolumeOps.__struct_fields__:
        assert getattr(ops, name) == getattr(wanted, name), name
    for name, each in VOLUME_TRAIN.items():
        assert each.blur_first == (name == "default_nnunet_DA5"), name
        assert each.rotate_axis_p == (0.5 if name == "default_nnunet_DA5" else 1.0), name


@pytest.mark.parametrize("first", [True, False])
def test_noise_comes_before_the_blur_or_after(first):
    """Neighbours in blurred noise are alike, in noise on what was blurred they are not."""
    changes = VolumeKwargs(noise_p=1.0, blur_p=1.0, blur_sigma=(1.0, 1.2), blur_first=first)
    resolved = resolved_policy("default_3d_1", train_kwargs=changes)
    noise = VolumeAugmenter(resolved, train=True)(torch.zeros(4, 1, 16, 16, 16), False, 0).numpy()
    alike = [np.corrcoef(x[0, 1:].ravel(), x[0, :-1].ravel())[0, 1] for x in noise]
    assert max(alike) < 0.1 if first else min(alike) > 0.5


@pytest.mark.parametrize("name", ["default_nnunet", "default_nnunet_DA5"])
def test_operations_come_in_the_order_of_nnunet(monkeypatch, name):
    names = []

    def noted(each):
        return replace(each, function=lambda x, *_: (names.append(each.switches[0]), x)[1])

    table = [noted(each) if each.stage == "values" else each for each in VOLUME_OPERATIONS.table]
    monkeypatch.setattr(VOLUME_OPERATIONS, "table", table)
    VolumeAugmenter(resolved_policy(name), train=True)(torch.zeros(1, 1, 16, 16, 16), False, 0)
    five = """blur noise shift contrast low_resolution gamma_inverted gamma rectangles gradient
        local_gamma sharpen"""
    own = "noise blur brightness contrast low_resolution gamma_inverted gamma"
    assert names == [f"{each}_p" for each in (five if "DA5" in name else own).split()]


# --- how much is cut ----------------------------------------------------------------------------


def resolved_policy(name: str, size=16, **given):
    values = {"encoder_size": None, "native_size": (size,) * 3, "spacing": None}
    values |= {key: given.pop(key) for key in list(given) if key in {*values, "available"}}
    return resolve_volume_augmentation(
        VolumeAugmentation(train_policy=name, **given),
        default_policies=("default_3d_2", "shared_default_3d"),
        **values,
    )


def furthest(size, spacing, planes, most: float) -> np.ndarray:
    """Half the extent (3,) in mm of a patch that is turned about one axis, by trying angles."""
    half = np.array(size) * spacing / 2
    found = half.copy()
    corners = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1) * half[:, None]
    for a, b in planes:
        for angle in np.linspace(0, most, 2000):
            turn = np.eye(3)
            turn[[a, b], [a, b]] = math.cos(angle)
            turn[a, b], turn[b, a] = math.sin(angle), -math.sin(angle)
            found = np.maximum(found, np.abs(turn @ corners).max(1))
    return found


@pytest.mark.parametrize("thick", [None, 0, 2])
@pytest.mark.parametrize(
    "size, spacing",
    [((64, 64, 64), (1, 1, 1)), ((40, 64, 52), (1, 1, 1)), ((48, 40, 60), (2, 1, 1.5))],
)
@pytest.mark.parametrize("angle", [0.0, 0.3, 0.5236, 2.0])
def test_the_margin_is_as_wide_as_the_policy_reaches(thick, size, spacing, angle):
    planes = [pair for pair in ((0, 1), (0, 2), (1, 2)) if thick not in pair]
    margin = augment_patch.reach(
        size, spacing, [thick], angle=angle, factor=1.1, shift=0.0, available=None
    )
    extent = furthest(size, np.array(spacing, float), planes, angle) / spacing
    for axis in range(3):
        wanted = extent[axis] * (1 if axis == thick else 1.1) - size[axis] / 2
        wanted = min(math.ceil(wanted - 1e-3), math.ceil(size[axis] / 2))
        assert margin[axis] == (0 if axis == thick else wanted)


def test_shifts_count_and_volumes_end_the_margin():
    def margin(available, size=(50, 50, 50), thick=None):
        return augment_patch.reach(
            size, (1, 1, 1), [thick], angle=0.0, factor=1.0, shift=0.06, available=available
        )

    assert margin(None) == (3, 3, 3) and margin((200, 200, 200), thick=1) == (3, 0, 3)
    assert margin((50, 50, 50)) == (0, 0, 0) and margin((20, 50, 40)) == (0, 0, 0)
    assert margin((51, 50, 200)) == (2, 1, 3)  # a voxel of the fill of each volume


@pytest.mark.parametrize(
    "size", [(16, 16, 16), (24, 24, 6), (4, 24, 20), (24, 6, 6), (24, 24, 1), (1, 16, 24)], ids=str
)
@pytest.mark.parametrize("name", [name for name, ops in VOLUME_TRAIN.items() if ops.rotate_p])
def test_policies_show_what_the_volume_has(name, size):
    """Of a patch in the middle of a large volume next to nothing is filled, be it a cube, flat, a
    rod or a single slice."""
    resolved = resolved_policy(name, 200, patch_size=size)
    still = [each.switches[0] for each in VOLUME_OPERATIONS.table if each.stage == "values"]
    augmenter = VolumeAugmenter(resolved, train=True)
    augmenter.ops = policy(augmenter.ops, **dict.fromkeys(still, 0.0))
    margin = augmenter.fit.margin
    assert all(beyond <= side // 2 for beyond, side in zip(margin, size, strict=True))
    sides = [side + 2 * beyond for side, beyond in zip(size, margin, strict=True)]
    cut = torch.ones(400, 1, *sides)
    cut[:, :, *(side // 2 for side in sides)] = 0  # the minimum, which fills
    filled = (augmenter(cut, True, 0) < 0.5).flatten(1).double().mean(1)
    assert (filled > 0.01).double().mean() < 0.01


def test_a_single_slice_is_turned_in_its_plane_alone():
    """Whatever axis is thick, and where one of the volumes of a batch is a single slice."""
    always = VolumeKwargs(rotate_p=1.0, scale_p=1.0, elastic_p=1.0, mirror_p=0.0)
    for size, spacing in (((16, 16, 1), (1, 1, 1)), ((1, 16, 12), (1, 1, 4)), ((9, 1, 1), None)):
        resolved = resolved_policy(
            "default_3d_2", 40, patch_size=size, spacing=spacing, train_kwargs=always
        )
        single = [axis for axis in range(3) if size[axis] == 1]
        assert all(resolved.margin[axis] == 0 for axis in single)
        place = Placement.centred(VolumeAugmenter(resolved, train=True).grid, 20, size)
        for each in VOLUME_OPERATIONS.active(resolved.train, "geometry"):
            each.function(place, resolved.train, torch.Generator().manual_seed(0))
        eye = torch.eye(3, dtype=torch.float64)
        for axis in {*single, *({2} if spacing == (1, 1, 4) else ())}:
            assert bool((place.matrices[:, axis] == eye[axis]).all())
            assert bool((place.matrices[:, :, axis] == eye[axis]).all())
            assert not place.control[:, axis].any()
        assert not torch.equal(place.matrices, eye.expand(20, 3, 3)) and place.control.any()


@pytest.mark.parametrize("name", [name for name, ops in VOLUME_TRAIN.items() if ops.rotate_p])
@pytest.mark.parametrize(
    "size, spacing, held",
    [((24, 24, 2), (1, 4, 1), (1, 2)), ((4, 24, 24), (1, 1, 4), (0, 2)),
     ((24, 6, 6), (1, 1, 4), (0, 2)), ((24, 24, 6), (1, 1, 4), (2,))],
)  # fmt: skip
def test_thick_slices_of_a_patch_that_is_flat_along_another_axis_hold_both(
    name, size, spacing, held
):
    """Volumes as flat as the patch: turned about the axis that is thick, its slices would show the
    fill beside the volume."""
    have = tuple(side if side < 10 else 2 * side for side in size)
    resolved = resolved_policy(name, 40, patch_size=size, spacing=spacing, available=have)
    still = [each.switches[0] for each in VOLUME_OPERATIONS.table if each.stage == "values"]
    always = {"rotate_p": 1.0, "scale_p": 1.0, "rotate_axis_p": 1.0, "mirror_p": 0.0}
    augmenter = VolumeAugmenter(resolved, train=True)
    assert tuple(augmenter.grid.held) == held
    augmenter.ops = policy(augmenter.ops, **dict.fromkeys(still, 0.0), **always)
    place = Placement.centred(augmenter.grid, 40, size)
    for each in VOLUME_OPERATIONS.active(augmenter.ops, "geometry"):
        each.function(place, augmenter.ops, seeded())
    eye = torch.eye(3, dtype=torch.float64)
    assert bool((place.matrices[:, list(held)] == eye[list(held)]).all())
    sides = [side + 2 * beyond for side, beyond in zip(size, augmenter.fit.margin, strict=True)]
    cut = torch.ones(40, 1, *sides)
    cut[:, :, 0, 0, 0] = 0  # the minimum, which fills
    filled = (augmenter(cut, True, 0) < 0.5).flatten(1).double().mean(1)
    assert float(filled.max()) < 0.01


def test_an_explicit_margin_stays_and_nothing_is_cut_that_nobody_shows():
    kept = {"patch_size": (10, 12, 14), "native_size": (40,) * 3}
    assert resolved_policy("default_nnunet", margin=0.1, **kept).margin == (1, 2, 2)
    assert resolved_policy("default_nnunet", margin=0.0, **kept).margin == (0, 0, 0)
    assert resolved_policy("default_3d_1", margin=0.5, **kept).margin == (0, 0, 0)
    still = VolumeKwargs(rotate_p=0.0, scale_p=0.0)
    assert resolved_policy("default_nnunet", train_kwargs=still, **kept).margin == (0, 0, 0)
    cut = resolved_policy("default_nnunet", available=(40, 12, 14), **kept).margin
    assert cut == (5, 1, 1)
    resolved = resolved_policy("default_nnunet", **kept)
    assert resolved.margin == (5, 6, 6)
    assert VolumeAugmenter(resolved, train=True).fit.margin == (5, 6, 6)
    assert VolumeAugmenter(resolved, train=False).fit.margin == (0, 0, 0)
