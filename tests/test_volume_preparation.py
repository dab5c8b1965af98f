"""Preparation of volumes against scipy.ndimage, nibabel.processing, scikit-image and closed
forms."""

import nibabel
import numpy as np
import pytest
from msgspec.structs import replace
from nibabel.processing import resample_from_to
from scipy import ndimage
from skimage.filters import threshold_otsu
from volume_files import ICBM, ORIENTATIONS, PLAIN, affine_of, blob, shipped, write_nifti

from glovita_lib.errors import UserError
from glovita_lib.read_volume import open_sample
from glovita_lib.spec_volumes import VolumePreparation
from glovita_lib.volume_preparation import FOREGROUND_POINTS, otsu, prepare

NOTHING = VolumePreparation(normalize="none", dtype="float32")
SPACING = (0.9, 1.4, 2.0)
RESAMPLED = replace(NOTHING, spacing=(1.3, 1.0, 1.5), antialias=False)


def prepared(voxels, spec, affine=None, has_spacing=True):
    voxels = voxels if voxels.ndim == 4 else voxels[None]
    affine = affine_of() if affine is None else affine
    return prepare(voxels, affine, spec, has_spacing=has_spacing)


def refused(voxels, spec, **options):
    with pytest.raises(UserError) as caught:
        prepared(voxels, spec, **options)
    (line,) = str(caught.value).splitlines()
    return line


# ---------------------------------------------------------------------- resampling


@pytest.mark.parametrize(("name", "order"), [("nearest", 0), ("linear", 1), ("cubic", 3)])
def test_resampling_is_that_of_nibabel(name, order):
    """Onto the very grid that was made, values beyond the outermost voxels repeated."""
    voxels, affine = blob(), affine_of(SPACING, (3, -20, 7))
    found = prepared(voxels, replace(RESAMPLED, interpolation=name), affine)
    image = nibabel.Nifti1Image(voxels, affine)
    grid = found.voxels.shape[1:], found.affine
    expected = resample_from_to(image, grid, order=order, mode="nearest")
    np.testing.assert_allclose(found.voxels[0], expected.get_fdata(), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :3], axis=0), (1.3, 1.0, 1.5))


def test_the_new_grid_has_the_centre_of_the_old_one_and_all_of_its_extent():
    voxels = blob((9, 15, 8))
    affine = nibabel.affines.from_matvec(rotation(0.3), [1, 2, 3]) @ affine_of(SPACING)
    found = prepared(voxels, RESAMPLED, affine)
    extent = np.array([9, 15, 8]) * SPACING
    assert found.voxels.shape[1:] == tuple(np.rint(extent / (1.3, 1.0, 1.5)).astype(int))
    middle, before = np.array(found.voxels.shape[1:]), np.array(voxels.shape)
    np.testing.assert_allclose(
        nibabel.affines.apply_affine(found.affine, (middle - 1) / 2),
        nibabel.affines.apply_affine(affine, (before - 1) / 2),
    )


def rotation(angle):
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])


@pytest.mark.parametrize(("name", "order"), [("linear", 1), ("cubic", 3)])
def test_axes_that_shrink_are_smoothed_as_scikit_image_does(name, order):
    voxels = blob((20, 22, 12))
    spec = replace(NOTHING, spacing=(2.5, 0.8, 2.0), interpolation=name, anisotropy=4)
    found = prepared(voxels, spec)
    smooth = ndimage.gaussian_filter(voxels.astype(float), (0.75, 0, 0.5), mode="nearest")
    expected = resample_from_to(
        nibabel.Nifti1Image(smooth, np.eye(4)),
        (found.voxels.shape[1:], found.affine),
        order=order,
        mode="nearest",
    )
    np.testing.assert_allclose(found.voxels[0], expected.get_fdata(), atol=1e-4)


def test_linear_functions_stay_what_they_are():
    """A closed form: interpolation of order 1 and 3 is exact on planes, away from the edges."""
    x, y, z = np.meshgrid(*map(np.arange, (20, 18, 16)), indexing="ij")
    voxels = (2 * x * 0.9 - 3 * y * 1.4 + z * 2.0).astype(np.float32)
    for name in ("linear", "cubic"):
        found = prepared(voxels, replace(RESAMPLED, interpolation=name), affine_of(SPACING))
        grid = np.stack(np.meshgrid(*map(np.arange, found.voxels.shape[1:]), indexing="ij"), -1)
        a, b, c = np.moveaxis(nibabel.affines.apply_affine(found.affine, grid), -1, 0)
        inner = (slice(4, -4),) * 3
        atol = 1e-3 if name == "linear" else 0.05  # a spline feels the repeated edge for long
        np.testing.assert_allclose(found.voxels[0][inner], (2 * a - 3 * b + c)[inner], atol=atol)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("spacing", "target", "thick"),
    [
        ((1, 1, 5), (1.5, 1.5, 4), 2),
        ((1, 1, 4), (1.5, 1, 9), 2),
        ((6, 1, 1.2), (1, 1, 1), 0),
        ((1, 1, 1), (1, 1, 4), 2),
        ((1, 1, 3), (0.8, 0.8, 1), None),
        ((0.5, 4, 4), (1, 2, 2), None),
    ],
)
def test_nothing_is_interpolated_across_thick_slices(spacing, target, thick, antialias):
    """nnU-Net's rule: the one axis that is more than three times as coarse. Nor are thick slices
    smoothed where they get fewer, only the axes within them."""
    voxels = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    spec = replace(NOTHING, spacing=target, antialias=antialias)
    found = prepared(voxels, spec, affine_of(spacing))
    steps = np.array(target) / spacing
    shape = found.voxels.shape[1:]
    first = (np.array(voxels.shape) - 1) / 2 - (np.array(shape) - 1) / 2 * steps
    places = [f + np.arange(n) * s for f, n, s in zip(first, shape, steps, strict=True)]
    if thick is not None:
        places[thick] = np.floor(np.round(places[thick], 6) + 0.5)
    grid = np.meshgrid(*places, indexing="ij")
    sigma = [max(0.0, (s - 1) / 2) * antialias * (a != thick) for a, s in enumerate(steps)]
    smooth = ndimage.gaussian_filter(voxels.astype(float), sigma, mode="nearest")
    expected = ndimage.map_coordinates(smooth, grid, order=1, mode="nearest")
    np.testing.assert_allclose(found.voxels[0], expected, atol=1e-5)


def test_the_same_spacing_changes_nothing_to_the_last_bit():
    affine = affine_of(np.float32((0.7, 0.7, 1.2)).astype(float))
    spec = replace(NOTHING, spacing=(0.7, 0.7, 1.2))
    found = prepared(blob(), spec, affine)
    assert (found.voxels[0] == blob()).all()
    np.testing.assert_allclose(found.affine, affine)


def test_an_axis_of_one_voxel():
    found = prepared(blob()[:, :, 5:6], replace(RESAMPLED, spacing=(1, 1, 5)), affine_of((1, 1, 1)))
    assert found.voxels.shape == (1, 12, 14, 1)


# ---------------------------------------------------------------------- orientations, spacings


def test_eight_orientations_give_the_same_array(tmp_path):
    spec = VolumePreparation(
        spacing=(1.2, 0.8, 2.5), crop="foreground", crop_margin=1, size=(10, 16, 8)
    )
    affine = affine_of((0.7, 1.1, 2.1), (-30, 12, 4))
    found = []
    for codes in ORIENTATIONS:
        path = write_nifti(tmp_path / f"{codes}.nii.gz", blob(), affine, codes)
        sample = open_sample([str(path)], PLAIN)
        found.append(prepare(sample.read(), sample.affine, spec, has_spacing=True))
    for other in found[1:]:
        assert (other.voxels == found[0].voxels).all()
        np.testing.assert_allclose(other.affine, found[0].affine, atol=1e-5)
        assert (other.foreground == found[0].foreground).all()


def test_three_spacings_give_the_same_array_but_for_interpolation():
    """The grey matter of ICBM152 at 1 mm, and the same smoothed and stored at 1.5 and 2 mm: at
    2 mm they differ by less than 2 % of the range on average, and nowhere is one displaced."""
    image = nibabel.load(shipped(ICBM.format("gm")))
    whole = image.get_fdata(dtype=np.float32)[40:136, 60:156, 50:146]  # 96 mm on each side
    smooth = ndimage.gaussian_filter(whole, 1.5)
    spec = replace(NOTHING, spacing=(2, 2, 2), antialias=False, normalize="zscore")
    found = []
    for side in (1.0, 1.5, 2.0):
        count = round(96 / side)
        places = (np.arange(count) + 0.5) * side - 0.5
        stored = ndimage.map_coordinates(
            smooth, np.meshgrid(places, places, places, indexing="ij"), order=3
        )
        origin = [(side - 1) / 2] * 3
        found.append(prepared(stored, spec, affine_of((side,) * 3, origin)))
    for other in found[1:]:
        assert other.voxels.shape == found[0].voxels.shape == (1, 48, 48, 48)
        np.testing.assert_allclose(other.affine, found[0].affine, atol=1e-9)
        apart = np.abs(other.voxels - found[0].voxels)
        assert apart.mean() < 0.02 * np.ptp(found[0].voxels)
        assert np.corrcoef(other.voxels.ravel(), found[0].voxels.ravel())[0, 1] > 0.995


# ---------------------------------------------------------------------- crop and size


def test_the_crop_is_the_box_around_the_foreground_and_moves_no_voxel():
    voxels = np.zeros((20, 18, 16), np.float32)
    voxels[5:9, 3:10, 7:8] = blob((8, 8, 8))[2:6, :7, 3:4] + 5
    cut = prepared(voxels, replace(NOTHING, crop="foreground"))
    assert (cut.voxels[0] == voxels[5:9, 3:10, 7:8]).all()
    assert cut.affine[:3, 3].tolist() == [5, 3, 7]
    wide = prepared(voxels, replace(NOTHING, crop="foreground", crop_margin=4.2))
    assert (wide.voxels[0] == voxels[1:13, 0:14, 3:12]).all()
    spec, affine = replace(NOTHING, crop="foreground", crop_margin=4.2), affine_of((2, 4.2, 1))
    in_mm = prepared(voxels, spec, affine).voxels[0]
    assert (in_mm == voxels[3:11, 2:11, 3:12]).all()
    spec = replace(RESAMPLED, spacing=(1.7, 0.6, 1.3))
    whole, part = prepared(voxels, spec), prepared(voxels, replace(spec, crop="foreground"))
    shift = np.rint(np.linalg.solve(whole.affine[:3, :3], (part.affine - whole.affine)[:3, 3]))
    start = shift.astype(int)
    box = tuple(slice(s, s + n) for s, n in zip(start, part.voxels.shape[1:], strict=True))
    np.testing.assert_allclose(part.voxels[0], whole.voxels[0][box], atol=1e-4)
    whole_mask = np.zeros_like(whole.voxels[0])
    whole_mask[box] = 1
    assert whole.voxels[0][whole_mask == 0].max() < 0.9 * voxels.max()


@pytest.mark.parametrize("size", [(12, 14, 10), (5, 20, 10), (30, 3, 1)])
def test_cut_or_padded_around_the_centre(size):
    voxels = blob() + 7
    found = prepared(voxels, replace(NOTHING, size=size))
    assert found.voxels.shape == (1, *size)
    for point in found.foreground[:20]:
        source = nibabel.affines.apply_affine(found.affine, point)
        assert found.voxels[0][tuple(point)] == voxels[tuple(np.rint(source).astype(int))]
    expected = np.full(size, voxels.min())
    have = np.array(voxels.shape)
    start = (have - size) // 2
    for index in np.ndindex(*size):
        place = start + index
        if ((place >= 0) & (place < have)).all():
            expected[index] = voxels[tuple(place)]
    assert (found.voxels[0] == expected).all()


def test_each_channel_is_padded_with_its_own_minimum():
    voxels = two_channels()
    size = tuple(side + 4 for side in voxels.shape[1:])
    found = prepared(voxels, replace(NOTHING, size=size)).voxels
    assert found[:, 0, 0, 0].tolist() == voxels.min((1, 2, 3)).tolist()


# ---------------------------------------------------------------------- intensities


def two_channels():
    return np.stack([blob(seed=1), 50 - 2 * blob(seed=2)])


def test_zscore_minmax_and_percentile_are_their_formulas():
    voxels = two_channels().astype(np.float64)
    flat = voxels.reshape(2, -1)

    def each(values):
        return values[:, None, None, None]

    def made(name, **fields):
        spec = replace(NOTHING, normalize=name, **fields)
        return prepared(voxels.astype(np.float32), spec).voxels

    expected = (voxels - each(flat.mean(1))) / each(flat.std(1))
    np.testing.assert_allclose(made("zscore"), expected, atol=1e-5)
    low, high = flat.min(1), flat.max(1)
    np.testing.assert_allclose(made("minmax"), (voxels - each(low)) / each(high - low), atol=1e-5)
    low, high = np.percentile(flat, (5, 90), axis=1)
    expected = np.clip((voxels - each(low)) / each(high - low), 0, 1)
    np.testing.assert_allclose(made("percentile", percentiles=(5, 90)), expected, atol=1e-5)


def test_figures_over_the_foreground_and_over_the_crop():
    voxels = blob()
    inside = voxels[voxels != 0].astype(np.float64)
    spec = replace(NOTHING, normalize="zscore", statistics="foreground")
    found = prepared(voxels, spec).voxels[0]
    np.testing.assert_allclose(found, (voxels - inside.mean()) / inside.std(), atol=1e-5)
    box = voxels[2:10, 2:12, 2:8].astype(np.float64)
    found = prepared(voxels, replace(NOTHING, normalize="zscore", crop="foreground")).voxels[0]
    np.testing.assert_allclose(found, (box - box.mean()) / box.std(), atol=1e-5)


def test_each_ct_window_is_a_channel_and_each_channel_has_its_own_way():
    voxels = np.stack([np.linspace(-1000, 1000, 1000).reshape(10, 10, 10)] * 2).astype(np.float32)
    spec = replace(NOTHING, normalize=("ct_window", "none"), ct_windows=((40, 400), (-600, 1500)))
    found = prepared(voxels, spec).voxels
    assert found.shape == (3, 10, 10, 10) and spec.channels(2) == 3
    np.testing.assert_allclose(found[0], np.clip((voxels[0] + 160) / 400, 0, 1), atol=1e-5)
    np.testing.assert_allclose(found[1], np.clip((voxels[0] + 1350) / 1500, 0, 1), atol=1e-5)
    assert (found[2] == voxels[1]).all()
    assert replace(spec, normalize="ct_window").channels(2) == 4


def test_integers_and_half_precision():
    voxels = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    assert (prepared(voxels, NOTHING).voxels[0] == voxels).all()
    half = prepared(voxels, replace(NOTHING, dtype="float16", normalize="zscore")).voxels
    assert half.dtype == np.float16
    np.testing.assert_allclose(half[0], (voxels - 499.5) / voxels.std(), rtol=2**-10, atol=2**-12)
    assert "do not fit into float16" in refused(voxels * 100.0, replace(NOTHING, dtype="float16"))


# ---------------------------------------------------------------------- foreground


def test_otsu_is_that_of_scikit_image():
    rng = np.random.default_rng(0)
    for values in (
        blob(),
        np.concatenate([rng.normal(0, 1, 500), rng.normal(6, 2, 300)]),
        rng.integers(0, 5, 100).astype(np.float32),
    ):
        assert otsu(values) == pytest.approx(threshold_otsu(values), abs=1e-5)


@pytest.mark.parametrize("what", ["nonzero", "otsu", 40.0])
def test_points_lie_in_the_foreground(what):
    voxels = two_channels()
    voxels[1] = 0
    voxels[1, 0, 0, 0] = 1e-3
    found = prepared(voxels, replace(NOTHING, foreground=what))
    limit = {"nonzero": 0, "otsu": threshold_otsu(voxels[0]), 40.0: 40}[what]
    mask = (voxels[0] > limit) | (voxels[1] > (5e-4 if what == "otsu" else limit))
    values = mask[tuple(found.foreground.T)]
    assert values.all() and len(found.foreground) == min(FOREGROUND_POINTS, mask.sum())
    assert found.foreground.dtype == np.int32
    again = prepared(voxels, replace(NOTHING, foreground=what)).foreground
    assert (again == found.foreground).all()


def test_points_follow_the_new_grid():
    voxels = np.zeros((20, 20, 20), np.float32)
    voxels[12:15, 4:7, 9:12] = 9
    voxels[13, 5, 10] = 10
    found = prepared(voxels, replace(RESAMPLED, size=(12, 12, 12)), affine_of((1, 1, 1)))
    assert len(found.foreground) and (found.voxels[0][tuple(found.foreground.T)] > 3).all()


# ---------------------------------------------------------------------- refused


def test_volumes_that_cannot_be_prepared_are_one_line():
    voxels = blob()
    holes = voxels.copy()
    holes[0, 0, 0], holes[1, 1, 1] = np.nan, np.inf
    assert "2 of 1,680 voxels are NaN or infinite" in refused(holes, NOTHING)
    filled = prepared(holes, replace(NOTHING, fill_nan=-1.0)).voxels[0]
    assert filled[0, 0, 0] == filled[1, 1, 1] == -1 and (filled[2:] == voxels[2:]).all()
    assert refused(np.full((4, 4, 4), 3.0), NOTHING) == "constant: every voxel is 3"
    both = np.stack([voxels, np.zeros_like(voxels)])
    assert refused(both, NOTHING) == "channel 1 is constant: every voxel is 0"
    assert "no foreground" in refused(voxels, replace(NOTHING, crop="foreground", foreground=1e6))
    spec = replace(NOTHING, normalize="zscore", statistics="foreground", foreground=1e6)
    assert "no foreground" in refused(voxels, spec)
    assert "spacing is unknown" in refused(voxels, RESAMPLED, has_spacing=False)
    assert "1 channels, but data.preparation.normalize has 2 entries" in refused(
        voxels, replace(NOTHING, normalize=("zscore", "none"))
    )
    sparse = np.zeros((10, 10, 10), np.float32)
    sparse[0, 0, 0] = 1
    assert "percentile scale is 0" in refused(sparse, replace(NOTHING, normalize="percentile"))


def test_volumes_that_are_constant_only_when_prepared_are_one_line():
    """Nothing is to be seen in the CT windows, in the box that is kept, or in float16."""
    lung = 4 * blob() - 1000
    assert lung.max() < -160
    soft = replace(NOTHING, normalize="ct_window", ct_windows=((40.0, 400.0),))
    line = refused(lung, soft)
    assert f"its values, -1000 to {lung.max():g} in the file, fill 0.0% of" in line
    assert "ct_windows [[40.0, 400.0]]" in line
    assert "fill 0.0%" in refused(lung, replace(soft, ct_windows=((40.0, 80.0), (400.0, 1000.0))))
    assert "fill 0.2% of" in refused(blob() / blob().max(), soft)  # scaled to 0..1 before
    both = prepared(lung, replace(soft, ct_windows=((40.0, 400.0), (-600.0, 1500.0)))).voxels
    assert np.ptp(both[0]) == 0 and np.ptp(both[1]) > 0.1  # an empty one of several is no mistake
    second = replace(soft, normalize=("none", "ct_window"))
    assert refused(np.stack([lung, lung]), second).startswith("channel 1: its values")

    even = np.zeros((12, 12, 12), np.float32)
    even[3:9, 3:9, 3:9] = 7
    whole = prepared(even, replace(NOTHING, size=(8, 8, 8))).voxels
    assert np.ptp(whole) == 7
    for settings in (
        {"crop": "foreground"},
        {"size": (4, 4, 4)},
        {"size": (4, 4, 4), "normalize": "zscore"},
    ):
        line = refused(even, replace(NOTHING, **settings))
        assert "every voxel that data.preparation leaves is" in line and "has 0 to 7" in line
    large = np.float32(10_000) + np.arange(4, dtype=np.float32).reshape(2, 2, 1)
    assert "10000 to 10003, are one in float16" in refused(large, replace(NOTHING, dtype="float16"))
    assert (prepared(large, NOTHING).voxels[0] == large).all()
