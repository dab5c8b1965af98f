"""Maps of volumes: the file, and where it lies in the world."""

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nibabel.processing import resample_from_to
from volume_files import ORIENTATIONS, PLAIN, affine_of, blob, write_nifti

from glovita_lib.augment_patch import PatchCut, WindowGrid
from glovita_lib.read_volume import open_sample
from glovita_lib.spec_volumes import VolumePreparation
from glovita_lib.volume_cache import PreparedVolume
from glovita_lib.volume_maps import (
    box_density,
    map_titles,
    mean_over,
    part_affine,
    slice_density,
    token_boxes,
    window_density,
    write_map,
)
from glovita_lib.volume_preparation import prepare

# ------------------------------------------------------------------------------------ the file

OBLIQUE = np.array(
    [[0.8, -0.6, 0.0, 5.0], [0.6, 0.8, 0.0, -7.0], [0.0, 0.0, 2.5, 3.0], [0.0, 0.0, 0.0, 1.0]]
)
SHEARED = OBLIQUE @ np.array(
    [[1.0, 0.3, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
)


@pytest.mark.parametrize("name", ["map.nii.gz", "map.nii"])
@pytest.mark.parametrize("affine", [affine_of((1, 2, 3)), OBLIQUE, SHEARED, OBLIQUE[[1, 0, 2, 3]]])
def test_a_map_is_read_by_nibabel_with_its_values_and_place(tmp_path, name, affine):
    values = np.random.default_rng(0).normal(size=(4, 5, 6))
    write_map(tmp_path / name, values, affine)
    image = nibabel.load(tmp_path / name)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), values.astype(np.float32))
    np.testing.assert_allclose(image.affine, affine, rtol=1e-6, atol=1e-6)
    assert image.header.get_xyzt_units()[0] == "mm"
    if image.header["qform_code"]:  # what viewers that know no other affine take
        np.testing.assert_allclose(image.get_qform(), affine, atol=1e-5)
    assert bool(image.header["qform_code"]) is (affine is not SHEARED)


def test_a_map_is_the_same_bytes_again(tmp_path):
    values = np.ones((2, 2, 2))
    written = []
    for name in ("a.nii.gz", "b.nii.gz"):
        write_map(tmp_path / name, values, np.eye(4))
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.nii.gz", "b.nii.gz"]


# ------------------------------------------------------------------------------------ its place

PREPARATIONS = [
    {},
    {"spacing": (1.5, 1.5, 1.5)},
    {"crop": "foreground", "crop_margin": 1.0},
    {"size": (32, 14, 11)},
    {"spacing": (1.0, 1.0, 4.0), "size": (20, 30, 9)},
    {"spacing": (2.0, 1.5, 1.0), "crop": "foreground", "size": (15, 15, 15)},
    {"spacing": (0.7, 0.8, 0.9), "crop": "foreground"},
    {"size": (12, 40, 12), "crop": "foreground"},
]


@pytest.mark.parametrize(("codes", "settings"), [*zip(ORIENTATIONS, PREPARATIONS, strict=True)])
def test_the_maximum_of_a_map_lies_at_the_planted_lesion(tmp_path, codes, settings):
    """A file in any orientation, prepared and cut to a patch: the map of the patch lies over the
    file."""
    voxels = blob((22, 24, 18))
    voxels[12:15, 8:11, 10:13] += 10 * voxels.max()
    affine = affine_of((1.0, 1.2, 1.5), (-30.0, 12.0, 7.0))
    lesion = apply_affine(affine, (13, 9, 11))
    path = write_nifti(tmp_path / "a.nii.gz", voxels, affine, codes)
    sample = open_sample((str(path),), PLAIN)
    spec = VolumePreparation(dtype="float32", **settings)
    found = prepare(sample.read(), sample.affine, spec, has_spacing=True)
    volume = PreparedVolume(
        found.voxels, affine=found.affine, fill=found.voxels.min((1, 2, 3)), foreground=np.empty(0)
    )
    cut = PatchCut("center", 0.0, (16, 26, 13))
    (box,) = cut.boxes(np.array([volume.shape[1:]]), None)
    patch, starts = cut.one(volume, box), cut.start(volume, box)
    write_map(tmp_path / "map.nii.gz", patch[0].numpy(), part_affine(volume.affine, starts))
    written = nibabel.load(tmp_path / "map.nii.gz")
    places = np.argwhere(written.get_fdata() > 0.8 * written.get_fdata().max())
    centre = apply_affine(written.affine, places.mean(0))
    assert np.abs(centre - lesion).max() < max(1.0, 0.6 * max(volume.spacing))
    original = nibabel.load(path)
    over = resample_from_to(written, original, order=0, cval=float(voxels.min())).get_fdata()
    top = np.unravel_index(over.argmax(), over.shape)
    assert original.get_fdata()[top] > 5 * voxels[:12].max()  # it is inside the lesion


@pytest.mark.parametrize(
    "ids, titles",
    [
        (["a.nii", "b.nii.gz", "c/d.nii", "p", "x.npy"], ["a", "b", "c/d", "p", "x.npy"]),
        (["a.nii", "a.nii.gz", "b.nii"], ["a.nii", "a.nii.gz", "b"]),
        (["p", "p.nii.gz"], ["p", "p.nii.gz"]),  # a DICOM folder beside a file
        (["a", "a.nii", "a.nii.nii.gz"], ["a", "a.nii", "a.nii.nii.gz"]),
        (["a.nii", "a.nii"], ["a", "a"]),  # named twice by a table
    ],
)
def test_maps_of_two_volumes_have_two_names(ids, titles):
    assert map_titles(ids) == titles


# ------------------------------------------------------------------------------------ its values


@pytest.mark.parametrize(
    "places", [range(16), range(0, 16, 2), range(0, 16, 3), [1, 4, 7, 10, 13], [7], [2, 6, 10, 15]]
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_equal_attention_to_slices_makes_an_even_map(places, axis):
    """And the maximum is at the slice that counts most, between slices the map is linear."""
    at = np.array(places)[:, None]
    have = [9, 6, 7]
    have[axis] = 16
    even = slice_density(np.full(len(at), 1 / len(at)), at, have, have, axis=axis)
    np.testing.assert_allclose(even, 1)
    shares = np.random.default_rng(0).dirichlet(np.ones(len(at)))
    found = slice_density(shares, at, have, have, axis=axis)
    assert found.mean() == pytest.approx(1)
    line = np.moveaxis(found, axis, 0)
    assert (line == line[:, :1, :1]).all()
    line = line[:, 0, 0]
    np.testing.assert_allclose(line[at[:, 0]] / line[at[0, 0]], shares / shares[0])
    if len(at) > 1:
        middle = (at[0, 0] + at[1, 0]) / 2
        halves = np.interp(middle, np.arange(16), line)
        assert halves == pytest.approx((line[at[0, 0]] + line[at[1, 0]]) / 2)


def test_slices_of_a_patch_lie_in_the_middle_of_the_volume():
    """Of a larger volume the rest has none; of a smaller one what stands out is lost."""
    at = np.array([[1], [5]])
    found = slice_density(np.array([0.25, 0.75]), at, (4, 8, 4), (6, 12, 4), axis=1)
    assert found.mean() == pytest.approx(1) and (found[1:5, 2:10] > 0).all()
    found[1:5, 2:10] = 0
    assert not found.any()
    small = slice_density(np.array([0.25, 0.75]), at, (4, 8, 4), (2, 4, 4), axis=1)
    np.testing.assert_allclose(small[0, :, 0] / small[0, 0, 0], np.array([3, 4, 5, 6]) / 3)


def test_patches_of_a_grid_divide_the_input():
    places = np.stack(np.meshgrid(*map(np.arange, (2, 3, 1)), indexing="ij"), -1).reshape(-1, 3)
    ends = token_boxes(places, (5, 9, 4))
    assert (mean_over(np.ones(6), ends, (5, 9, 4)) == 1).all()
    assert sum(np.prod(b - a) for a, b in zip(*ends, strict=True)) == 5 * 9 * 4


GRIDS = [  # voxels of volumes, windows and strides; in some the last window is close to another
    ((40, 40, 40), (8, 8, 8), (4, 4, 4)),
    ((80, 80, 80), (24, 24, 24), (18, 18, 18)),
    ((160, 60, 60), (48, 48, 48), (36, 36, 36)),
    ((100, 50, 61), (24, 12, 16), (12, 7, 16)),
    ((41, 7, 30), (8, 12, 30), (4, 6, 15)),
]


@pytest.mark.parametrize(("shape", "size", "stride"), GRIDS)
def test_equal_shares_of_windows_make_an_even_map(shape, size, stride):
    """Two strides within the border all is even, and nothing is more; whatever the shares, the mean
    of the map is their sum."""
    grid = WindowGrid(size, stride)
    starts = grid.starts(shape)
    even = window_density(np.full(len(starts), 1 / len(starts)), starts, shape, shape, windows=grid)
    assert even.mean() == pytest.approx(1)
    inner = even
    for axis, (have, side, step) in enumerate(zip(shape, size, stride, strict=True)):
        margin = min(side // 2 + step, (have - 1) // 2) if have > side else 0
        inner = inner.take(range(margin, have - margin), axis)
    assert np.ptp(inner) < 0.02 * inner.max() and even.max() < 1.02 * inner.max()
    shares = np.random.default_rng(0).dirichlet(np.ones(len(starts)))
    found = window_density(shares, starts, shape, shape, windows=grid)
    assert found.mean() == pytest.approx(1) and (found >= 0).all()
    kept = shares > np.median(shares)  # the others are left out, as those of air
    some = window_density(shares[kept], starts[kept], shape, shape, windows=grid)
    all_of = window_density(shares * kept, starts, shape, shape, windows=grid)
    np.testing.assert_allclose(some, all_of)
    assert some.mean() == pytest.approx(shares[kept].sum())


def test_windows_of_a_patch_lie_in_the_middle_of_the_volume():
    grid, shares = WindowGrid((8, 8, 8), (4, 4, 4)), np.full(9, 1 / 9)
    starts = grid.starts((16, 8, 16))
    found = window_density(shares, starts, (16, 8, 16), (20, 8, 10), windows=grid)
    assert (found[2:18] > 0).all() and found.mean() == pytest.approx(1)
    found[2:18] = 0
    assert not found.any()
    thin = grid.starts((16, 5, 16))  # the windows stand out of the volume
    assert thin[0, 1] < 0
    thick = window_density(shares, thin, (16, 5, 16), (16, 5, 16), windows=grid)
    assert (thick == thick[:, :1]).all()


@pytest.mark.parametrize(("shape", "size", "stride"), GRIDS[:4])
def test_the_maximum_is_in_the_window_that_counts_or_between_two(shape, size, stride):
    """At the border too: there a mean over the windows that look would be largest in the corner."""
    grid = WindowGrid(size, stride)
    starts = grid.starts(shape)
    shares = np.full(len(starts), 0.01)
    shares[0] = 1.0
    found = window_density(shares, starts, shape, shape, windows=grid)
    top = np.argwhere(found == found.max()).mean(0)
    assert (np.abs(top - (np.array(size) - 1) / 2) <= np.array(stride) / 4).all()
    shares[(starts == starts[0] + (stride[0], 0, 0)).all(1)] = 1.0
    assert shares.sum() > 2
    found = window_density(shares, starts, shape, shape, windows=grid)
    top = np.argwhere(found == found.max()).mean(0)
    assert abs(top[0] - (size[0] - 1 + stride[0]) / 2) <= stride[0] / 4


def test_equal_shares_of_patches_make_an_even_map():
    """Also where they do not divide the input, and some have more voxels."""
    places = np.stack(np.meshgrid(*map(np.arange, (2, 3, 1)), indexing="ij"), -1).reshape(-1, 3)
    ends = token_boxes(places, (5, 9, 4))
    np.testing.assert_allclose(box_density(np.full(6, 1 / 6), ends, (5, 9, 4)), 1)
    shares = np.array([0.3, 0.1, 0.1, 0.2, 0.2, 0.1])
    found = box_density(shares, ends, (5, 9, 4))
    assert found.mean() == pytest.approx(1)
    assert found[0, 0, 0] / found[-1, 0, 0] == pytest.approx(0.3 / 0.2)
