"""The real volumes that specs learn from: where pieces lie, what their targets are."""

from itertools import combinations

import numpy as np
import pytest

from glovita_lib import data_icbm
from glovita_lib.data import Data
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError
from glovita_lib.spec_data import CustomData, CustomVolumes

SPLITS = ("train", "val", "test")


def build(function: str, seed: int = 0, **options: int) -> Data:
    """A data set of the module as a spec builds it."""
    target = f"glovita_lib.data_icbm:{function}"
    return build_data(CustomVolumes(target=target, options=options), seed=seed)


def voxels_of(data: Data, split: str) -> np.ndarray:
    """Which voxels of the brain the pieces of a split cover, by their affines."""
    brain = data_icbm.read_brain()
    source = data.splits[split].source
    to_voxel = np.linalg.inv(brain.affine)
    covered = np.zeros(brain.t1.shape, bool)
    for piece in source.windows(np.arange(len(data.splits[split]))):
        start = np.rint((to_voxel @ piece.affine)[:3, 3]).astype(int)
        part = tuple(slice(at, at + side) for at, side in zip(start, piece.shape[1:], strict=True))
        expected = brain.t1[part].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(piece[0], expected, atol=1e-6)
        covered[part] = True
    return covered


@pytest.mark.parametrize("function", ["tissue", "white_depth"])
@pytest.mark.parametrize("seed", [0, 3, 4])
def test_no_voxel_is_in_two_splits(function, seed):
    data = build(function, seed, pieces=300)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 150,
        "val": 45,
        "test": 105,
    }
    covered = {split: voxels_of(data, split) for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        assert not (covered[first] & covered[second]).any()
    half = len(covered["train"]) // 2
    assert not covered["test"][: half + 1].any()
    assert not (covered["train"] | covered["val"])[half:].any()


def test_the_seed_chooses_the_block_of_validation_alone():
    first, same, other = (build("tissue", seed, pieces=300) for seed in (0, 0, 3))
    for split in SPLITS:
        assert first.splits[split].ids == same.splits[split].ids
    assert first.splits["test"].ids == other.splits["test"].ids
    assert not set(first.splits["val"].ids) & set(other.splits["val"].ids)


def middle_voxels(split) -> tuple[np.ndarray, ...]:
    """The voxels in the middle of pieces, from their ids."""
    affine = data_icbm.read_brain().affine
    world = np.array([[float(side) for side in name.split("_")] for name in split.ids])
    voxels = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    return tuple(np.rint(voxels).astype(int).T)


def middles(split, volume, width) -> np.ndarray:
    """Means of a volume over the cube of a width in the middle of pieces, the id's voxel last."""
    corners = zip(*middle_voxels(split), strict=True)
    parts = [tuple(slice(at - width + 1, at + 1) for at in corner) for corner in corners]
    return np.array([volume[part].mean() for part in parts])


@pytest.mark.parametrize(("size", "width"), [(16, 2), (9, 1)])
def test_labels_are_the_tissue_in_the_middle(size, width):
    brain = data_icbm.read_brain()
    for split in build("tissue", pieces=300, size=size).splits.values():
        grey, white = (middles(split, each, width) for each in (brain.gm, brain.wm))
        assert np.bincount(split.targets).tolist() == [len(split) // 3] * 3
        assert (grey[split.targets == 0] > 200).all() and (white[split.targets == 1] > 230).all()
        assert ((grey + white)[split.targets == 2] < 127).all()


def test_depth_is_the_distance_to_the_surface():
    """By brute force over all voxels near the place."""
    white = data_icbm.read_brain().wm > 127
    split = build("white_depth", pieces=60, size=15).splits["test"]
    for place, (depth,) in zip(zip(*middle_voxels(split), strict=True), split.targets, strict=True):
        part = tuple(slice(max(0, at - 9), at + 10) for at in place)
        others = np.argwhere(white[part] != white[place]) + [each.start for each in part]
        nearest = np.sqrt(((others - place) ** 2).sum(1)).min() - 0.5
        assert depth == pytest.approx(nearest if white[place] else -nearest)
    assert np.abs(split.targets).max() < 6 and split.targets.std() > 2
    assert split.targets.dtype == np.float64
    even = build("white_depth", pieces=60).splits["test"]
    expected = middles(even, data_icbm.depth_in(white), 2)
    np.testing.assert_allclose(even.targets[:, 0], expected, atol=1e-9)


def test_sizes_and_numbers_are_options():
    data = build("tissue", pieces=30, size=9)
    assert data.splits["test"].source.uniform == (1, 9, 9, 9)
    assert voxels_of(data, "train").any()
    with pytest.raises(UserError, match=r"data.options: .* pieces of 90 voxels .* there are \d+"):
        build("tissue", size=90)
    with pytest.raises(UserError, match="unexpected keyword argument 'sise'"):
        build("tissue", sise=9)


def test_foreground_is_brain():
    source = build("tissue", pieces=30).splits["train"].source
    for piece in source.windows(np.arange(3)):
        x, y, z = piece.foreground.T
        assert len(x) and (piece[0][x, y, z] > -1).all()
        assert (piece.fill == piece[...].min()).all() and piece.spacing == (1, 1, 1)


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setattr(data_icbm, "FILE", "package:no_nilearn/{}.nii.gz")
    data_icbm.read_brain.cache_clear()
    with pytest.raises(UserError, match="no_nilearn/t1.nii.gz is not there: pip install --no-d"):
        build("tissue")


def test_volumes_are_asked_for():
    """Of a function that returns something else the data set of volumes says so."""
    with pytest.raises(UserError, match='returned images, .* set it to "custom"'):
        build_data(CustomVolumes(target="test_data_icbm:of_images"), seed=0)
    assert build_data(CustomData(target="test_data_icbm:of_images"), seed=0).name == "digits"


def of_images(spec, seed):
    """A data set of images."""
    from glovita_lib.spec_data import DigitsData

    return build_data(DigitsData(), seed=seed)


def test_every_second_piece_has_a_lesion_where_its_id_says():
    """A ball in white matter, as bright as grey matter; around it is the brain."""
    data, brain = build("lesions", pieces=60, size=24, radius=3.0), data_icbm.read_brain()
    to_voxel = np.linalg.inv(brain.affine)
    grey = np.median(brain.t1[brain.gm > data_icbm.GREY]) / 127.5 - 1
    for name, count in (("train", 30), ("val", 8), ("test", 20)):
        split = data.splits[name]
        assert split.targets.tolist() == [0, 1] * (count // 2)
        for row, piece in enumerate(split.source.windows(np.arange(count))):
            start = np.rint((to_voxel @ piece.affine)[:3, 3]).astype(int)
            part = tuple(slice(at, at + 24) for at in start)
            changed = np.abs(piece[0] - (brain.t1[part] / np.float32(127.5) - 1)) > 1e-6
            assert changed.any() == ("lesion" in split.ids[row]) == split.targets[row]
            if not changed.any():
                continue
            middle = np.array(split.ids[row].partition("_lesion_")[2].split("_"), float)
            voxels = np.argwhere(changed)
            world = voxels @ piece.affine[:3, :3].T + piece.affine[:3, 3]
            distance = np.linalg.norm(world - middle, axis=1)
            assert distance.max() <= 3.5 and 60 < len(voxels) < 180  # 4/3 pi 3.5^3
            near = tuple(voxels[distance < 2].T)
            np.testing.assert_allclose(piece[0][near], grey, atol=1e-6)
            assert (brain.wm[part][near] > data_icbm.HALF).all()
