"""Slices of volumes in pictures: which way round, in mm, only they are read; and the sheets and
thumbnails of whole runs."""

import re

import nibabel
import numpy as np
import pytest
from PIL import Image
from small_runs import EPOCH, VOLUMES
from volume_files import ORIENTATIONS, affine_of, blob, write_labelled, write_nifti

from glovita_lib.figures_volumes import (
    CHANNELS,
    PLANES,
    augmented_volumes,
    limits_of,
    middle_picture,
    middle_planes,
    plane,
    shape_of,
    stack_sides,
    upright,
    worst_volumes,
)
from glovita_lib.metrics_classification import Scores

SHAPE = (8, 10, 6)


class Sliced:
    """A volume that only slices are read of; `read` counts voxels."""

    def __init__(self, voxels):
        self.voxels, self.shape, self.read = voxels, voxels.shape, 0

    def __getitem__(self, part):
        found = self.voxels[part]
        self.read += found.size
        return found


def test_slices_are_seen_as_radiologists_do():
    """The right of the patient is on the left, the front on the left or above, the head above."""
    for axis, marks in (
        (2, {0: "left", 1: "up"}),
        (1, {0: "left", 2: "up"}),
        (0, {1: "left", 2: "up"}),
    ):
        for bright, side in marks.items():
            voxels = np.zeros(SHAPE)
            voxels[tuple(-1 if other == bright else slice(None) for other in range(3))] = 1
            shown = plane(voxels, axis, SHAPE[axis] // 2)
            line = shown[:, 0] if side == "left" else shown[0]
            assert line.all() and shown.sum() == len(line)


def test_only_the_middle_slices_are_read():
    """Of as many channels as are shown, each under its name."""
    voxels = np.random.default_rng(0).random((6, *SHAPE)).astype(np.float16)
    volume = Sliced(voxels)
    middle = middle_planes(volume, np.diag([1.0, 2.0, 5.0, 1.0]))
    assert volume.read == CHANNELS * (80 + 48 + 60)
    assert list(middle.channels) == [f"channel {number} of 6" for number in range(1, 5)]
    assert list(middle.spacing) == [1, 2, 5]
    for planes, channel in zip(middle.channels.values(), voxels, strict=False):
        assert list(planes) == list(PLANES) == [2, 1, 0] and shape_of(planes) == SHAPE
        for axis, part in planes.items():
            assert (part == plane(channel, axis, SHAPE[axis] // 2)).all()
        low, high = limits_of(planes)
        assert 0 <= low < high <= 1
    assert limits_of({2: np.zeros((3, 3))}) == (0.0, 1.0)
    volume = Sliced(voxels[:2])
    thumbnail = middle_picture(volume, np.diag([1.0, 2.0, 5.0, 1.0]))  # square pixels of 1 mm
    assert thumbnail.shape == (1, 20, 16) and thumbnail.dtype == np.uint8 and volume.read == 160
    assert (thumbnail[0, ::2] == thumbnail[0, 1::2]).all()
    assert thumbnail.min() == 0 and thumbnail.max() == 255


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_slices_are_named_by_where_axes_lead_in_the_patient(codes, tmp_path):
    """Of volumes that keep the axes of their files."""
    affine = affine_of((1, 2, 3), (5, 6, 7))
    upright_planes = middle_planes(blob(SHAPE)[None], affine)
    image = nibabel.load(write_nifti(tmp_path / "a.nii", blob(SHAPE), affine, codes))
    found = middle_planes(image.get_fdata()[None], image.affine)
    np.testing.assert_allclose(found.spacing, (1, 2, 3))
    for axis, part in upright_planes.channels[""].items():
        assert (found.channels[""][axis] == part).all()


def test_sides_are_in_mm():
    """Thick slices are as high as they are in the patient."""
    wide, high, gap = stack_sides((80, 100, 20), np.array([1.0, 1.0, 5.0]))
    assert wide == 100 and high == 100 + 100 + 100 + 2 * gap  # y, then z twice


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_volumes_of_any_orientation_are_turned_upright(codes, tmp_path):
    voxels = blob(SHAPE)
    path = write_nifti(tmp_path / "a.nii", voxels, affine_of((1, 2, 3), (5, 6, 7)), codes)
    image = nibabel.load(path)
    stored = image.get_fdata()
    volume, values, spacing = upright(stored[None], -stored, image.affine)
    assert (volume == voxels[None]).all() and (values == -voxels).all()
    np.testing.assert_allclose(spacing, (1, 2, 3))


def grey_levels(path):
    return np.array(Image.open(path).convert("L")).astype(int)


def test_versions_are_in_the_window_of_the_prepared_volume(tmp_path):
    """A version that is brighter than the volume is shown so; the identity is shown the same."""
    voxels, spaced = (blob((20, 24, 16)) / 40)[None], np.diag([1.0, 1.0, 3.0, 1.0])
    prepared = middle_planes(voxels, spaced)
    shown = {}
    for name, more in (("same", 0), ("brighter", 0.3)):
        path = tmp_path / f"{name}.png"
        version = middle_planes(voxels + more, spaced)
        augmented_volumes([prepared], [[version]], path=path, captions=["a" * 99])
        shown[name] = grey_levels(path)
    assert shown["same"].shape == shown["brighter"].shape
    half = shown["same"].shape[1] // 2
    assert shown["brighter"][:, half:].mean() > shown["same"][:, half:].mean() + 5
    left = shown["same"].shape[1] // 3
    assert (shown["brighter"][:, :left] == shown["same"][:, :left]).all()


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("channels", [1, 2])
def test_worst_volumes_of_differing_sizes(tmp_path, count, channels):
    spaced = np.diag([1.0, 1.0, 2.0, 1.0])
    volumes = [
        middle_planes(np.stack([blob((8 + n, 10, 6), seed=n)] * channels), spaced)
        for n in range(count)
    ]
    worst_volumes(
        volumes,
        ids=[f"{n}.nii" for n in range(count)],
        targets=np.zeros(count, int),
        scores=Scores(np.full((count, 2), 0.5, np.float32)),
        losses=np.full(count, 0.7, np.float32),
        subtask="multiclass",
        class_names=("a", "b"),
        path=tmp_path / "worst.png",
    )
    assert (tmp_path / "worst.png").stat().st_size > 1000


SPEC = f"""{VOLUMES}
[data.augmentation]
train_policy = "default_nnunet"
patch_size = [8, 8, 6]
[model.encoder]
encoder_type = "residual_encoder"
features_per_stage = [4, 8]
n_blocks_per_stage = 1
strides = [1, 2]
{EPOCH.replace('result_plot = "none"', "")}"""


def test_sheets_and_thumbnails_of_whole_runs(command, tmp_path):
    voxels = [blob((10 + n % 3, 10, 8), seed=n) for n in range(16)]
    write_labelled(tmp_path, voxels, affine_of((1, 1, 2)), shares=(6, 5, 5), codes=ORIENTATIONS)
    spec = SPEC.replace("ROOT", str(tmp_path))
    result = command(spec=spec)
    for name in ("augmented", "worst_val", "worst_test"):
        pixels = grey_levels(result.path / "plots" / f"{name}.png")
        assert pixels.std() > 20 and min(pixels.shape) > 150
    command("mode=umap", "umap.method=pca", spec=spec)
    page = (result.path / "umap" / "pca.html").read_text(encoding="utf-8")
    assert re.search(r'"sheets":\["data:image/png;base64,', page)
    command("mode=extract", f"extract.output_dir={tmp_path / 'features'}", spec=spec)
    assert all("size8x8x6" in path.name for path in (tmp_path / "features").glob("*.h5"))
