"""Geometry of volumes against scipy.ndimage and scipy.interpolate, on smooth random volumes."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.interpolate import BSpline

from glovita_lib import augment_patch
from glovita_lib.augment_patch import Affine, Grid, PatchCut, Placement
from glovita_lib.augment_volumes import VOLUME_OPERATIONS, keep_sides, rotation
from glovita_lib.spec_augment import policy
from glovita_lib.spec_volumes import PLAIN_VOLUME

SIZE = (13, 11, 12)


def smooth(*shape: int) -> torch.Tensor:
    """A volume of smooth noise, float32."""
    noise = np.random.default_rng(0).normal(size=shape)
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 1, 1, 1))).float()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(size=SIZE, spacing=(1.0, 1.0, 1.0), thick=None, mirrors=(0, 1, 2)) -> Grid:
    return Grid(size, spacing, thick, mirrors)


def placed(place: Placement, ops, seed: int = 0) -> Placement:
    """A placement with everything drawn that a policy draws."""
    generator = seeded(seed)
    for each in VOLUME_OPERATIONS.active(ops, "geometry"):
        each.function(place, ops, generator)
    keep_sides(place, ops)
    return place


def turns(*angles: float) -> torch.Tensor:
    return rotation(torch.tensor([angles]))[0]


MATRICES = {
    "rotation": turns(0.3, -0.4, 0.5) * 1.1,
    "in a plane": turns(0.0, 0.0, 0.3),
    "scale": torch.diag(torch.tensor([1.2, 0.7, -0.9], dtype=torch.float64)),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("way", ["sample", "grid", "planes"])
def test_affine_maps_equal_scipy(name, way):
    """Each way to interpolate, in a cut larger and smaller than the patch."""
    volume, size = smooth(2, 17, 15, 9), (14, 16, 7)
    affine = Affine.centred(MATRICES[name], [1, -1, 1], size)
    padded = augment_patch.framed(volume)
    if way == "planes":
        if name == "rotation":
            pytest.skip("leaves the planes")
        if name == "scale":
            matrix = torch.diag(torch.tensor([1.2, 0.7, -1.0], dtype=torch.float64))
            affine = Affine.centred(matrix, [1, -1, 1], size)
        out = affine.in_planes(padded, None, 2)
    elif way == "grid":
        out = affine.by_grid(padded, None)
    else:
        out = torch.full((2, *size), math.nan)
        affine.sample(volume, None, None, out)
    for channel, got in zip(volume.double().numpy(), out, strict=True):
        expected = ndimage.affine_transform(
            channel, affine.matrix.numpy(), affine.offset.numpy(), size,
            order=1, mode="grid-constant", cval=channel.min(),
        )  # fmt: skip
        np.testing.assert_allclose(got.numpy(), expected, atol=5e-6)


@pytest.mark.parametrize("thick", [None, 0, 2])
def test_affine_and_elastic_are_one_interpolation(thick):
    """The patch equals scipy's interpolation at A P (o + u(o)), with u scipy's B-spline."""
    volume = smooth(1, *SIZE)
    ops = policy(
        PLAIN_VOLUME, rotate_p=1.0, scale_p=1.0, scale_same_p=0.0, elastic_p=1.0,
        elastic_strength=(0.3, 0.3), mirror_p=0.5,
    )  # fmt: skip
    place = placed(Placement.centred(grid(thick=thick), 1, SIZE), ops)
    out = augment_patch.moved(volume[None], place)[0, 0]
    matrix = (place.matrices[0] @ place.turns[0]).numpy()
    shifts = np.stack([spline_of_scipy(each) for each in place.control[0].double().numpy()])
    middle = (np.array(SIZE) - 1) / 2
    centred = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij")) + shifts
    centred = centred - middle[:, None, None, None]
    places = np.tensordot(matrix, centred, 1) + middle[:, None, None, None]
    image = volume[0].double().numpy()
    expected = ndimage.map_coordinates(
        image, places, order=1, mode="grid-constant", cval=image.min()
    )
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)
    if thick is not None:
        across = places[thick] - np.rint(places[thick])
        np.testing.assert_allclose(across, 0, atol=1e-9)
    by_grid = Affine.centred(torch.from_numpy(matrix), [0, 0, 0], SIZE).by_grid(
        augment_patch.framed(volume), place.control[0]
    )
    np.testing.assert_allclose(by_grid[0].numpy(), expected, atol=2e-5)


def spline_of_scipy(control: np.ndarray) -> np.ndarray:
    """(K, K, K) control points -> (X, Y, Z), cubic."""
    count = len(control)
    knots = np.arange(-3, count + 1)
    for side in SIZE:
        control = BSpline(knots, control, 3)(np.linspace(0, count - 3, side)[:, None][:, 0])
        control = np.moveaxis(control, 0, 2)
    return control


def test_a_spline_is_one_where_all_points_are():
    ones = augment_patch.spline(torch.ones(3, 7, 7, 7), SIZE)
    np.testing.assert_allclose(ones.numpy(), 1, atol=1e-6)


def test_rotations_keep_lengths_in_mm():
    """With 2.5 mm slices the map in voxels is a rotation once it is said in mm."""
    spacing = np.diag([1.0, 1.0, 2.5])
    place = placed(
        Placement.centred(grid(spacing=(1.0, 1.0, 2.5)), 3, SIZE),
        policy(PLAIN_VOLUME, rotate_p=1.0),
    )
    for matrix in place.matrices.numpy():
        world = spacing @ matrix @ np.linalg.inv(spacing)
        np.testing.assert_allclose(world @ world.T, np.eye(3), atol=1e-6)
        assert np.abs(world - np.eye(3)).max() > 0.05


def test_quarter_turns_equal_torch():
    volume = smooth(1, 8, 8, 8)[None]
    for axes in ((0, 1), (0, 2), (1, 2)):
        for quarters in (1, 2, 3):
            turn = torch.eye(3, dtype=torch.float64)
            turn[axes[0], axes[0]] = turn[axes[1], axes[1]] = 0
            turn[axes[0], axes[1]], turn[axes[1], axes[0]] = 1, -1
            turn = torch.linalg.matrix_power(turn, quarters)
            expected = torch.rot90(volume[0], quarters, [axis + 1 for axis in axes])
            assert torch.equal(augment_patch.turned(volume[0], turn), expected)
            affine = Affine.centred(turn, [0, 0, 0], (8, 8, 8))
            found = torch.empty_like(expected)
            affine.along_axes(augment_patch.framed(volume[0]), found)
            assert torch.equal(found, expected)


def test_turns_and_mirrors_are_permutations_of_voxels():
    ops = policy(PLAIN_VOLUME, rot90_p=0.7, transpose_p=0.7, mirror_p=0.5)
    volumes = torch.arange(6 * 6 * 6.0).view(1, 1, 6, 6, 6).expand(500, -1, -1, -1, -1)
    place = placed(Placement.centred(grid((6, 6, 6)), 500, (6, 6, 6)), ops)
    out = augment_patch.moved(volumes, place)
    assert torch.equal(out.flatten(1).sort(1).values, volumes.flatten(1))
    assert len(out.flatten(1).unique(dim=0)) == 48  # every symmetry of the cube is drawn


@pytest.mark.parametrize(
    "size, spacing, thick, equal",
    [
        ((6, 6, 6), (1.0, 1.0, 1.0), None, [0, 1, 2]),
        ((6, 6, 6), (1.0, 1.0, 2.5), None, [0, 1]),
        ((6, 6, 6), (5.0, 1.0, 1.0), 0, [1, 2]),
        ((6, 4, 6), (1.0, 1.0, 1.0), None, [0, 2]),
        ((6, 4, 5), (1.0, 1.0, 1.0), None, [0]),
    ],
)
def test_only_axes_alike_are_exchanged(size, spacing, thick, equal):
    assert len(grid(size, spacing, thick).equal) == len(equal)
    if len(equal) > 1:
        assert grid(size, spacing, thick).equal == equal
    ops = policy(PLAIN_VOLUME, rot90_p=1.0, transpose_p=1.0)
    place = placed(Placement.centred(grid(size, spacing, thick), 20, size), ops)
    others = [axis for axis in range(3) if axis not in equal]
    assert bool((place.turns[:, others, others] == 1).all())
    assert augment_patch.moved(torch.zeros(20, 1, *size), place).shape == (20, 1, *size)


def test_mirrors_keep_to_their_axes():
    ops = policy(PLAIN_VOLUME, mirror_p=0.5)
    place = placed(Placement.centred(grid(mirrors=(1, 2)), 10_000, SIZE), ops)
    share = (place.turns.diagonal(dim1=1, dim2=2) < 0).double().mean(0)
    assert share[0] == 0
    np.testing.assert_allclose(share[1:], 0.5, atol=0.02)


def test_ranges_and_probabilities_of_the_geometry():
    count = 10_000
    ops = policy(
        PLAIN_VOLUME, rotate_p=0.3, rotate_radians=0.4, scale_p=0.25, scale=(0.7, 1.4),
        elastic_p=0.2, elastic_points=2, elastic_strength=(0.1, 0.3),
    )  # fmt: skip
    place = placed(Placement.centred(grid(), count, SIZE), ops)
    determinants = torch.linalg.det(place.matrices)
    factors = determinants ** (1 / 3)
    scaled = (factors - 1).abs() > 1e-6
    assert abs(scaled.double().mean() - 0.25) < 0.015
    assert 0.7 <= factors.min() < 0.71 and 1.39 < factors.max() <= 1.4001
    turned = place.matrices / factors[:, None, None]
    y = (-turned[:, 2, 0]).asin()
    x, z = (
        torch.atan2(turned[:, 2, 1], turned[:, 2, 2]),
        torch.atan2(turned[:, 1, 0], turned[:, 0, 0]),
    )
    for angle in (x, y, z):
        rotated = angle.abs() > 1e-9
        assert abs(rotated.double().mean() - 0.3) < 0.015
        assert 0.39 < angle.abs().max() <= 0.4 + 1e-6
        assert abs(angle[rotated].mean()) < 0.02
    largest = place.control.abs().flatten(1).amax(1)
    assert abs((largest > 0).double().mean() - 0.2) < 0.015
    assert largest.max() <= 0.3 * (max(SIZE) - 1) / 2 + 1e-6


def test_a_thick_axis_is_left_alone():
    ops = policy(
        PLAIN_VOLUME, rotate_p=1.0, scale_p=1.0, scale_same_p=0.0, elastic_p=1.0, mirror_p=0.5
    )
    for thick in range(3):
        volumes = smooth(1, *SIZE).expand(8, 1, -1, -1, -1).contiguous()
        volumes[:, 0].select(thick + 1, 4)[:] = 9.0  # one slice of one value
        place = placed(Placement.centred(grid(thick=thick), 8, SIZE), ops)
        out = augment_patch.moved(volumes, place)[:, 0].movedim(thick + 1, 1)
        high = (out > 5).flatten(2).any(2)  # (8, N)
        assert bool((high.sum(1) == 1).all())  # it stays one slice
        assert {int(row.int().argmax()) for row in high} == {4, SIZE[thick] - 5}


# --- the cut ----------------------------------------------------------------------------------


class Stored:
    """A prepared volume that notes what is read of it."""

    def __init__(self, voxels: np.ndarray, foreground: list) -> None:
        self.voxels, self.shape, self.dtype = voxels, voxels.shape, voxels.dtype
        self.fill = np.full(len(voxels), -7.0)
        self.foreground = np.array(foreground, np.int32).reshape(-1, 3)
        self.read = 0

    def __getitem__(self, index):
        part = self.voxels[index]
        self.read += part.size
        return part


def stored(*sides: int, foreground: list | None = None) -> Stored:
    voxels = np.arange(math.prod(sides), dtype=np.float16 if sides[0] < 9 else np.float32)
    return Stored(voxels.reshape(1, *sides), foreground or [])


def cut(volume: Stored, crop: str, size, share: float = 1.0, seed: int = 0) -> torch.Tensor:
    patches = PatchCut(crop, share, size)
    box = patches.boxes(np.array([volume.shape[1:]]), seeded(seed))[0]
    return patches.one(volume, box)


def test_a_centre_cut_reads_its_part_alone():
    volume = stored(9, 8, 10)
    patch = cut(volume, "center", (4, 4, 5))
    assert np.array_equal(patch.numpy(), volume.voxels[:, 2:6, 2:6, 2:7])
    assert volume.read == 4 * 4 * 5


@pytest.mark.parametrize("crop", ["center", "random", "foreground"])
def test_small_volumes_are_centred_and_filled(crop):
    volume = stored(3, 5, 4, foreground=[[0, 0, 0]])
    patch = cut(volume, crop, (6, 5, 1))
    start = [-2, 0, None]
    assert patch.dtype == torch.float16 and patch.shape == (1, 6, 5, 1)
    inside = patch[0, -start[0] : 3 - start[0]]
    assert (patch == -7).sum() == 3 * 5 and not (inside == -7).any()
    z = int(inside[0, 0, 0])
    assert np.array_equal(inside.numpy(), volume.voxels[0, :, :, z : z + 1])


def test_random_cuts_reach_every_place_evenly():
    sizes = np.tile([7, 4, 5], (10_000, 1))
    boxes = PatchCut("random", 0.0, (4, 4, 2)).boxes(sizes, seeded())
    assert bool((boxes[:, 3] == -1).all()) and bool((boxes[:, 1] == 0).all())
    for axis, room in ((0, 3), (2, 3)):
        share = np.bincount(boxes[:, axis].long(), minlength=room + 1) / len(sizes)
        np.testing.assert_allclose(share, 1 / (room + 1), atol=0.02)


@pytest.mark.parametrize("mirrors", [(1, 2), (0, 2), (0,), ()])
@pytest.mark.parametrize("thick", [None, 2])
def test_axes_that_are_not_mirrored_keep_their_direction(mirrors, thick):
    """Exchanged axes and quarter turns make no mirror image that mirror_axes rules out."""
    ops = policy(PLAIN_VOLUME, rot90_p=0.7, transpose_p=0.7, mirror_p=0.5)
    place = Placement.centred(grid((4, 4, 4), thick=thick, mirrors=mirrors), 400, (4, 4, 4))
    turns = placed(place, ops).turns
    for axis in {0, 1, 2} - set(mirrors):
        assert bool((turns[:, axis, axis] == 1).all())
    distinct = len(torch.unique(turns.flatten(1), dim=0))
    free = len(set(mirrors) - {thick})
    assert distinct == {0: 1, 1: 2, 2: 8}[free] * 2 ** (thick in mirrors)


@pytest.mark.parametrize("mirrors", [(1, 2), (0, 2), (1,), (2,), ()])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.0)])
def test_rotations_of_any_angle_make_no_mirror_image_of_other_axes(mirrors, spacing):
    """A half turn and a mirrored axis are a mirror image of the other axis in the plane."""
    ops = policy(
        PLAIN_VOLUME, rotate_p=0.9, rotate_radians=3.14, rot90_p=0.5, transpose_p=0.5, mirror_p=0.5,
        scale_p=0.5,
    )  # fmt: skip
    place = Placement.centred(grid((4, 4, 4), spacing, mirrors=mirrors), 2000, (4, 4, 4))
    maps = placed(place, ops).matrices @ place.turns
    images = torch.linalg.det(maps) < 0
    for axis in {0, 1, 2} - set(mirrors):
        assert not (images & (maps[:, axis, axis] < 0)).any()
        assert bool((maps[:, axis, axis] < 0).any())  # rotations reverse it all the same
    assert bool(images.any()) == bool(mirrors)


def test_nothing_is_mirrored_where_nothing_may_be():
    """Two axes exchanged are a mirror image too, with one of them backwards a quarter turn."""
    ops = policy(PLAIN_VOLUME, rot90_p=0.7, transpose_p=0.7, mirror_p=0.0)
    place = Placement.centred(grid((4, 4, 4)), 2000, (4, 4, 4))
    turns = placed(place, ops).turns
    assert bool((torch.linalg.det(turns) > 0).all())
    assert len(torch.unique(turns.flatten(1), dim=0)) == 24


def test_foreground_is_in_the_middle_of_its_share():
    volume = stored(20, 20, 20, foreground=[[10, 12, 9], [0, 19, 10]])
    values = [float(volume.voxels[(0, *voxel)]) for voxel in volume.foreground]
    patches = PatchCut("foreground", 0.33, (4, 4, 4))
    boxes = patches.boxes(np.tile([20, 20, 20], (10_000, 1)), seeded())
    assert abs((boxes[:, 3] >= 0).double().mean() - 0.33) < 0.015
    seen = set()
    for box in boxes[boxes[:, 3] >= 0][:20]:
        patch = patches.one(volume, box)
        middle, corner = patch[0, 2, 2, 2].item(), patch[0, 0, 3, 2].item()
        assert middle == values[0] or corner == values[1]  # cut at the border, wholly inside
        seen.add(middle == values[0])
        assert not (patch == -7).any()
    assert seen == {True, False}
    empty = stored(20, 20, 20)
    assert patches.one(empty, boxes[0]).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("crop", ["random", "foreground"])
@pytest.mark.parametrize("have", [9, 5, 3])
def test_patches_with_a_margin_lie_where_those_without_do(crop, have):
    """The margin may reach beyond a volume, patches go up to its border all the same."""
    volume = stored(have, 12, 8, foreground=[[0, 0, 7], [have - 1, 11, 0]])
    volume.fill = np.array([-7.0])
    sizes = np.tile([have, 12, 8], (60, 1))
    bare, wide = (PatchCut(crop, 0.5, (4, 4, 4), m) for m in ((0, 0, 0), (1, 3, 2)))
    seen = []
    for box in wide.boxes(sizes, seeded()):
        cut = wide.one(volume, box)
        assert cut.shape == (1, 6, 10, 8)
        assert torch.equal(cut[:, 1:5, 3:7, 2:6], bare.one(volume, box))
        seen.append(wide.start(volume, box))
    starts = np.array(seen)
    room = have - 4
    lowest, highest = (0, room) if room > 0 else (room // 2, room // 2)
    assert starts.min(0).tolist() == [lowest, 0, 0] and starts.max(0).tolist() == [highest, 8, 4]
    padded = np.pad(volume.voxels[0], [(1, 1), (3, 3), (2, 2)], constant_values=-7)
    for box, (x, y, z) in zip(wide.boxes(sizes, seeded()), seen, strict=True):
        if room >= 0:
            expected = padded[x : x + 6, y : y + 10, z : z + 8]
            assert np.array_equal(wide.one(volume, box)[0].numpy(), expected)


def test_arrays_are_filled_with_the_minimum_of_each_channel():
    voxels = np.stack([np.full((2, 2, 2), 3.0), np.full((2, 2, 2), 5.0)]).astype(np.float32)
    voxels[0, 0, 0, 0], voxels[1, 0, 0, 0] = -1, -2
    patches = PatchCut("center", 0.0, (3, 2, 2))
    patch = patches.one(voxels, patches.boxes(np.array([[2, 2, 2]]), None)[0])
    assert patch[:, 0, 0, 0].tolist() == [-1, -2]
    assert patch[:, 1, 0, 0].tolist() == [-1, -2] and patch[0, 2, 1, 1] == 3


def test_windows_of_the_device_are_those_of_the_reader():
    """A patch in the middle of an unread volume is what the reader cuts."""
    volume = stored(9, 3, 6)
    volume.fill = volume.voxels.min((1, 2, 3))
    size = (4, 5, 6)
    place = Placement.centred(grid(size), 1, (9, 3, 6))
    out = augment_patch.moved(torch.from_numpy(volume.voxels)[None], place)
    assert torch.equal(out[0], cut(volume, "center", size))
