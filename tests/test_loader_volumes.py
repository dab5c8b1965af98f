"""Batches of volumes: windows cut where the samples are read, the same ones in memory and not."""

from itertools import product

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from volume_files import blob, write_nifti

from glovita_lib.data import PartSource, Split
from glovita_lib.dist import Ranks
from glovita_lib.loader import build_loader
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

    def join(self, parts):
        return torch.stack(parts)

    def one(self, volume, box):
        room = torch.tensor(volume.shape[1:]) - torch.tensor(PATCH)
        start = (box * (room + 1)).long().minimum(room).tolist()
        part = tuple(slice(s, s + n) for s, n in zip(start, PATCH, strict=True))
        return torch.from_numpy(volume[(slice(None), *part)])


def split(tmp_path, sizes):
    samples = [
        (str(write_nifti(tmp_path / f"{number}.nii", blob(size, seed=number))),)
        for number, size in enumerate(sizes)
    ]
    spec = VolumePreparation(normalize="none")
    cache = VolumeCache(tmp_path / "cache", VolumeReading(), spec)
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
