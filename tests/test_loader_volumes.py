"""Batches of volumes: windows cut where the samples are read, the same ones in memory and not."""

from itertools import product

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from volume_files import affine_of, blob, write_nifti

from glovita_lib.augment_volumes import VolumeAugmenter
from glovita_lib.data import Data, PartSource, Split, VolumeSamples
from glovita_lib.dist import Ranks
from glovita_lib.errors import UserError
from glovita_lib.loader import build_loader
from glovita_lib.resolved import resolve_inputs
from glovita_lib.spec_root import Root
from glovita_lib.spec_train import Dataloading
from glovita_lib.spec_volumes import VolumePreparation, VolumeReading
from glovita_lib.volume_cache import VolumeCache, VolumeSource

RANKS = Ranks(0, 1, 0, torch.device("cpu"))
PATCH = (8, 9, 10)


class Cut:
    """A window of PATCH voxels at a drawn place, or in the middle; `read` counts the voxels."""

    one_size = True

    def __init__(self, drawn):
        self.drawn = drawn

    def boxes(self, sizes, generator):
        if not self.drawn:
            return torch.full((len(sizes), 3), 0.5)
        return torch.rand(len(sizes), 3, generator=generator)

    def join(self, parts, samples):
        return torch.stack(parts)

    def one(self, volume, box):
        room = torch.tensor(volume.shape[1:]) - torch.tensor(PATCH)
        start = (box * (room + 1)).long().minimum(room).tolist()
        part = tuple(slice(s, s + n) for s, n in zip(start, PATCH, strict=True))
        return torch.from_numpy(volume[(slice(None), *part)])


def split(tmp_path, sizes, spacings=None, codes=None, canonical=True):
    """Volumes of these sizes, the files in these spacings and orders of axes."""
    spacings, codes = spacings or [(1, 1, 1)] * len(sizes), codes or ["RAS"] * len(sizes)
    samples = [
        (
            str(
                write_nifti(
                    tmp_path / f"{number}.nii", blob(size, seed=number), affine_of(mm), code
                )
            ),
        )
        for number, (size, mm, code) in enumerate(zip(sizes, spacings, codes, strict=True))
    ]
    spec = VolumePreparation(normalize="none")
    cache = VolumeCache(tmp_path / "cache", VolumeReading(canonical=canonical), spec)
    entries = cache.fill(samples, workers=1, advance=lambda count: None)
    targets = np.arange(len(samples))
    return Split([path for (path,) in samples], targets, VolumeSource(entries, spec.dtype))


def batches(split, *, train, fit, epoch=0, **changes):
    spec = replace(Dataloading(batch_size=2, num_workers=0, pin_memory=False), **changes)
    loader = build_loader(split, spec, fit=fit, train=train, seed=5, ranks=RANKS, batch_size=2)
    try:
        return list(loader.epoch(epoch))
    finally:
        loader.close()


VARIED = [(12, 14, 10), (9, 9, 12), (8, 20, 10), (12, 14, 11), (30, 9, 10)]
SAME = [(12, 14, 10)] * 5


@pytest.mark.parametrize(("sizes", "train"), [*product([VARIED, SAME], [True, False])])
def test_windows_are_the_same_in_memory_and_not(tmp_path, sizes, train):
    samples, fit = split(tmp_path, sizes), Cut(train)
    whole = samples.source.fetch(np.arange(5))
    held = batches(samples, train=train, fit=fit)
    read = batches(samples, train=train, fit=fit, in_memory_mb=0)
    part = batches(
        Split(samples.ids, samples.targets, PartSource(samples.source, np.arange(5))),
        train=train,
        fit=fit,
        in_memory_mb=0,
    )
    for one, other, third in zip(held, read, part, strict=True):
        assert one.inputs.shape[1:] == (1, *PATCH) and one.inputs.dtype == torch.float16
        assert one.fitted and other.fitted
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.inputs, third.inputs)
        assert torch.equal(one.rows, other.rows)
        for row, window in zip(one.rows.tolist(), one.inputs.numpy(), strict=True):
            views = np.lib.stride_tricks.sliding_window_view(whole[row][0], PATCH)
            assert (views == window[0]).all((3, 4, 5)).any()
    again = batches(samples, train=train, fit=fit, epoch=1)
    same = all(torch.equal(a.inputs, b.inputs) for a, b in zip(held, again, strict=True))
    assert same != train


@pytest.mark.processes
def test_worker_processes_and_threads_make_the_same_batches(tmp_path):
    samples, fit = split(tmp_path, VARIED), Cut(True)
    alone = batches(samples, train=True, fit=fit)
    for changes in ({"num_workers": 2, "in_memory_mb": 0}, {"num_workers": None}):
        other = batches(samples, train=True, fit=fit, **changes)
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(alone, other, strict=True))


@pytest.mark.parametrize("memory", [0, 100])
def test_only_windows_are_read(tmp_path, monkeypatch, memory):
    """Of a cache file no whole volume is read, but to be kept for the windows of training."""
    samples = split(tmp_path, SAME)
    monkeypatch.setattr(VolumeSource, "fetch", lambda *_: pytest.fail("a whole volume was read"))
    for train in (True, False):
        assert len(batches(samples, train=train, fit=Cut(train), in_memory_mb=memory)) == 3 - train


def test_volumes_of_one_size_are_given_whole_where_nothing_is_cut(tmp_path):
    samples = split(tmp_path, SAME)
    for memory in (0, 100):
        found = batches(samples, train=False, fit=None, in_memory_mb=memory)
        inputs = torch.cat([batch.inputs for batch in found]).numpy()
        assert inputs.shape == (5, 1, 12, 14, 10) and not found[0].fitted
        assert (inputs == samples.source.fetch(np.arange(5))).all()


# --- what a run makes of the geometry of its files ----------------------------------------------


def resolved(train, encoder=None, mode="train", **augmentation):
    """The augmentation of a run on a train split, and the notes on its data."""
    spec = {
        "mode": mode,
        "data": {
            "dataset": "generic_3d_dataset",
            "augmentation": {"patch_size": [8, 8, 8], **augmentation},
        },
        "model": {"encoder": encoder or {"encoder_type": "residual_encoder"}},
    }
    data = Data("mine", {"train": train}, "multiclass", ("a", "b"), VolumeSamples(channels=1))
    found = resolve_inputs(data.samples, msgspec.convert(spec, Root), data)
    return found.augmentation, data.report


AXIAL, SAGITTAL, EVEN = (0.5, 0.5, 4), (4, 0.5, 0.5), (0.5, 0.5, 0.5)


def test_nothing_is_turned_across_slices_that_are_thick_in_some_volumes(tmp_path):
    samples = split(tmp_path, SAME, [EVEN, EVEN, AXIAL, EVEN, EVEN])
    augmentation, report = resolved(samples)
    assert augmentation.thick_axis == 2 and augmentation.spacing == EVEN
    (line,) = report
    assert line.startswith("1 of 5 train volumes have thick slices across z: nothing is rotated")
    assert resolved(samples, anisotropy=8)[0].thick_axis is None
    plain, report = resolved(samples, train_policy="default_3d_1")
    assert plain.thick_axis is None and report == []


def test_nothing_is_turned_out_of_flat_patches(tmp_path):
    """Single slices, as 2-D NIfTI files are, and patches that are short along one axis, beside
    axes that the spacing makes thick."""
    samples = split(tmp_path, [(14, 14, 1)] * 3)
    for patch in ((8, 8, 1), (8, 8, 4)):
        augmentation, report = resolved(samples, patch_size=patch)
        assert augmentation.thick_axis == 2 and augmentation.margin[2] == 0 and report == []
        assert min(augmentation.margin[:2]) > 0
    deep = split(tmp_path / "deep", SAME)
    flat = {"patch_size": [8, 2, 8]}
    assert resolved(deep, **flat)[0].thick_axis == 1
    assert resolved(deep, **flat, anisotropy=4)[0].thick_axis is None
    thick = split(tmp_path / "thick", SAME, [AXIAL] * 5)
    both = resolved(thick, **flat)[0]
    assert (both.thick_axis, both.flat_axis, both.margin[1:]) == (2, 1, (0, 0))
    assert resolved(thick, patch_size=[8, 8, 2])[0].flat_axis is None


@pytest.mark.parametrize("policy", ["default_3d_2", "default_nnunet_DA5"])
def test_rotations_and_exchanged_axes_go_by_the_spacing_of_each_volume(tmp_path, policy):
    spacings = [(1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 1)]
    samples = split(tmp_path, [(14, 13, 12)] * 4, spacings)
    always = {"rotate_p": 1.0, "rotate_axis_p": 1.0, "mirror_p": 0.0}
    augmentation, _ = resolved(samples, train_policy=policy, train_kwargs=always)
    augment = VolumeAugmenter(augmentation, train=True)
    for memory in (0, 100):
        found = batches(samples, train=True, fit=augment.fit, in_memory_mb=memory)
        for batch in found:
            both = augment(batch.inputs, True, 3)
            for number, row in enumerate(batch.rows.tolist()):
                own = replace(augmentation, spacing=spacings[row])
                alone = VolumeAugmenter(own, train=True)(batch.inputs.voxels, True, 3)
                assert torch.equal(both[number], alone[number])
                plain = augment(batch.inputs.voxels, True, 3)
                assert torch.equal(plain[number], alone[number]) == (row == 0)
    plain, _ = resolved(samples, train_policy="default_3d_1")
    fit = VolumeAugmenter(plain, train=True).fit
    assert isinstance(batches(samples, train=True, fit=fit)[0].inputs, torch.Tensor)


def test_thick_slices_across_different_axes_are_not_rotated_as_if_they_were_not(tmp_path):
    """The median of these spacings has no thick axis."""
    samples = split(tmp_path, SAME[:4], [AXIAL, SAGITTAL] * 2)
    with pytest.raises(UserError) as caught:
        resolved(samples)
    line = str(caught.value)
    assert f"x in 2 ({samples.ids[1]}), z in 2 ({samples.ids[0]})" in line
    assert "data.preparation.spacing" in line and "default_nnunet rotates" in line
    assert resolved(samples, anisotropy=8)[0].thick_axis is None
    assert resolved(samples, train_policy="default_3d_1")[0].thick_axis is None
    assert resolved(samples, mode="infer")[0].thick_axis is None


@pytest.mark.parametrize("code, stored", [("SPL", ("x", "y")), ("ASR", ("x", "y")), ("LAS", "yz")])
def test_mirror_axes_are_those_of_the_patient(tmp_path, code, stored):
    """SPL: the axes run up, back and left: front and back are the second, up and down the first."""
    cube = [(12, 12, 12)] * 3
    samples = split(tmp_path, cube, codes=[code] * 3, canonical=False)
    augmentation, _ = resolved(samples, mirror_axes=["y", "z"])
    assert augmentation.mirror_axes == tuple(stored)
    assert resolved(samples, mirror_axes=[])[0].mirror_axes == ()
    turned = split(tmp_path / "turned", cube, codes=[code] * 3)
    assert resolved(turned, mirror_axes=["z", "y"])[0].mirror_axes == ("y", "z")


def test_axes_of_the_patient_that_lie_differently_are_refused(tmp_path):
    samples = split(tmp_path, SAME[:3], codes=["RAS", "LPS", "SPL"], canonical=False)
    with pytest.raises(UserError) as caught:
        resolved(samples, mirror_axes=["y", "z"])
    ids = samples.ids
    assert f"x is axis 1 of {ids[0]}, axis 3 of {ids[2]} as they are stored" in str(caught.value)
    assert resolved(samples)[0].mirror_axes == ("x", "y", "z")
    plain = resolved(samples, mirror_axes=["y"], train_policy="default_3d_1")
    assert plain[0].mirror_axes == ("y",)


def test_slices_across_another_axis_of_the_patient_are_said(tmp_path):
    encoder = {"encoder_type": "timm", "type": "test_vit", "pretrained": False, "lift": "slices"}
    codes = ["RAS", "LPS", "SPL"]
    _, report = resolved(split(tmp_path, SAME[:3], codes=codes, canonical=False), encoder)
    (line,) = report
    assert "z is axis 3 as volumes are stored, which does not run foot to head in 1 of 3" in line
    assert resolved(split(tmp_path / "turned", SAME[:3], codes=codes), encoder)[1] == []
