"""Which frames make a clip, and how they are decoded: place, stride, rate, short videos, crops."""

import numpy as np
import pytest
import torch
from video_files import SIDE, resolved

from glovita_lib.augment import build_fit
from glovita_lib.data import ArraySource, VideoFrames
from glovita_lib.loader import BatchBuilder
from glovita_lib.loader_video import (
    ArrayVideos,
    ClipCut,
    clip_frames,
    covering_starts,
    decoded_size,
    from_start,
)
from glovita_lib.read_video import Clock, LoadedVideo, VideoView
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_video import ResolvedClips

DEFAULTS = {
    "frames": 4,
    "method": "dense",
    "stride": 1,
    "fps": None,
    "train": "random",
    "train_clips": 1,
    "clips": 1,
    "combine": "logits",
    "chunk": 8,
}


def sampling(**changes):
    return ResolvedClips(**DEFAULTS | changes)


def frames(count, rate=25.0, draws=None, clips=1, **changes):
    return clip_frames(sampling(**changes), count, Clock(rate), draws, clips).tolist()


def test_dense_clips():
    assert frames(12) == [[4, 5, 6, 7]]  # in the middle
    assert frames(12, stride=3) == [[1, 4, 7, 10]]
    assert frames(12, clips=3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert frames(12, draws=np.array([[0.0]])) == [[0, 1, 2, 3]]
    assert frames(12, draws=np.array([[0.999999]])) == [[8, 9, 10, 11]]
    assert frames(3) == [[0, 1, 2, 3]]  # the last of which is beyond the end
    assert frames(1, clips=2) == [[0, 1, 2, 3]] * 2


def test_a_rate_of_its_own():
    """Every second half: of 30 frames a second every 15th, of 25 the 0th, 12th, 25th, 37th."""
    assert frames(60, 30.0, fps=2.0) == [[7, 22, 37, 52]]
    assert frames(38, 25.0, fps=2.0) == [[0, 12, 25, 37]]
    assert frames(8, 10.0, fps=20.0) == [[3, 3, 4, 4]]  # a slower video repeats its frames


def test_uniform_clips():
    """One frame of each quarter of twelve: the middle one, or that drawn."""
    assert frames(12, method="uniform") == [[1, 4, 7, 10]]
    assert frames(12, method="uniform", clips=3) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    draws = np.array([[0.0, 0.99, 0.0, 0.99]])
    assert frames(12, method="uniform", draws=draws) == [[0, 5, 6, 11]]
    assert frames(3, method="uniform") == [[0, 1, 2, 3]]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 4, 9, 24, 25])
def test_clips_that_cover_show_every_frame_once(stride, count):
    of = sampling(stride=stride)
    shown = from_start(covering_starts(of, count, Clock(25.0)), of, Clock(25.0))
    assert sorted(shown[shown < count].tolist()) == list(range(count))


def test_clips_that_cover_at_a_rate_show_its_frames_once():
    of = sampling(fps=10.0)
    shown = from_start(covering_starts(of, 30, Clock(25.0)), of, Clock(25.0))
    assert shown[shown < 30].tolist() == [int(2.5 * k) for k in range(12)]


@pytest.mark.parametrize("rate", [2.0, 10.0, 30.0])
def test_a_rate_of_a_video_of_variable_rate_goes_by_its_times(rate):
    """The frame that is shown at each time of the clip; clips that cover do so to the end."""
    times = np.random.default_rng(0).choice([0.02, 0.05, 0.3], 60).cumsum()
    clock = Clock(59 / (times[-1] - times[0]), times - times[0])
    of = sampling(fps=rate)
    for start in (0, 11, 40):
        shown = from_start(start, of, clock)
        wanted = clock.times[start] + np.arange(4) / rate
        inside = wanted <= clock.times[-1]
        found = [int(np.flatnonzero(clock.times <= time + 1e-5)[-1]) for time in wanted]
        assert shown[inside].tolist() == np.array(found)[inside].tolist()
        assert (shown[~inside] >= 59).all()
    starts = covering_starts(of, 60, clock)
    assert starts[0] == 0 and from_start(starts, of, clock).max() >= 59 - 1 / rate / 0.02
    first, *_, last = clip_frames(of, 60, clock, None, 3)
    assert first[0] == 0 and last[-1] <= 59
    assert clock.times[last[-1]] > clock.times[-1] - 1 / rate - 2 * 0.3  # the longest frame


def cut(train=True, test_kwargs=None, policy="default_2d_1", kwargs=None, **changes):
    aug = resolved(policy, **(kwargs or {}))
    crop = build_fit(aug, aug.train if train else aug.test, bit_depth=8)
    return ClipCut(crop, sampling(**changes), train=train)


def video(count, height=30, width=40):
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return VideoView(LoadedVideo(pixels, 25.0))


def test_a_short_video_repeats_its_last_frame_and_says_so():
    fit = cut(train=False, frames=16)
    sample = video(3)
    clip = fit.one(sample, fit.boxes(np.array([sample.shape[1:]]), None)[0])
    batch = fit.join([clip, clip], [])
    assert batch.pixels.shape == (2, 16, 3, SIDE, SIDE)
    assert batch.real[0].tolist() == [True] * 3 + [False] * 13
    assert batch.frames[0].tolist() == [0, 1, 2] + [2] * 13
    assert batch.times[0].tolist() == [number / 25 for number in batch.frames[0].tolist()]
    assert torch.equal(batch.pixels[0, 2], batch.pixels[0, 15])


def test_one_window_serves_all_frames_of_a_clip():
    """A random crop without a resize: each frame of the clip is that part of its frame."""
    fit = cut(kwargs={"crop": "random", "resize": "none"})
    sample = video(20)
    places = set()
    for seed in range(8):
        box = fit.boxes(np.array([sample.shape[1:]]), torch.Generator().manual_seed(seed))[0]
        clip = fit.one(sample, box)
        (top, left), numbers = (int(box[3]), int(box[7])), clip.frames[0]
        places.add((top, left, int(numbers[0])))
        whole = sample.read(numbers)[:, top : top + SIDE, left : left + SIDE].transpose(0, 3, 1, 2)
        assert (clip.pixels[0].numpy() == whole).all()
        assert (np.diff(numbers) == 1).all()
    assert len(places) == 8


@pytest.mark.parametrize("crop", ["resized", "padded", "random"])
def test_a_window_that_is_resized_is_that_of_an_image(crop):
    """Each frame of a clip is what the same box makes of it as an image, upright or across."""
    fit = cut(kwargs={"crop": crop})
    for height, width in ((30, 70), (70, 30)):
        sample = video(9, height, width)
        box = fit.boxes(np.array([sample.shape[1:]]), torch.Generator().manual_seed(0))[0]
        clip = fit.one(sample, box)
        frames = torch.from_numpy(sample.read(clip.frames[0])).permute(0, 3, 1, 2).contiguous()
        each = [fit.crop.canvas(frame[None], box[:8].long().view(1, 2, 4)) for frame in frames]
        assert torch.equal(clip.pixels[0], torch.cat(each))


def test_a_bag_has_as_many_clips_in_training_each_drawn_for_itself():
    for combine, count in (("bag", 3), ("logits", 1), ("probabilities", 1)):
        fit = cut(combine=combine, clips=3)
        sample = video(40)
        box = fit.boxes(np.array([sample.shape[1:]]), torch.Generator().manual_seed(0))[0]
        starts = fit.one(sample, box).frames[:, 0].tolist()
        assert len(starts) == len(set(starts)) == count and starts != [0, 18, 36]


def test_a_repeated_frame_has_no_label():
    """It counts once in the loss, as it does where frames are evaluated."""
    labels = np.array([2, 0, 1])
    frames = VideoFrames(["v"], np.zeros(1, int), np.empty((1, 0), int), [np.arange(3)], [labels])
    fit, pixels = cut(frames=5), np.zeros((3, 30, 40, 3), np.uint8)
    source = ArraySource(pixels.transpose(3, 0, 1, 2)[None], np.arange(1))
    videos = ArrayVideos(source, np.arange(1))
    build = BatchBuilder(videos, 0, None, fit, 0, frames=frames)
    batch = build((0, 0, np.arange(1)))
    assert batch.inputs.frames.tolist() == [[0, 1, 2, 2, 2]]
    assert batch.targets.tolist() == [[2, 0, 1, UNLABELLED, UNLABELLED]]


@pytest.mark.parametrize("crop", ["none", "center", "random", "resized", "padded"])
def test_every_crop_gives_the_side(crop):
    fit = cut(kwargs={"crop": crop})
    height, width = decoded_size(fit.crop, 50, 80)
    sample = video(9, height, width)
    box = fit.boxes(np.array([sample.shape[1:]]), torch.Generator().manual_seed(0))[0]
    assert fit.one(sample, box).pixels.shape == (1, 4, 3, SIDE, SIDE)


def test_frames_are_decoded_no_larger_than_the_crop_needs():
    def size(crop, height, width):
        return decoded_size(cut(kwargs={"crop": crop}).crop, height, width)

    assert size("none", 480, 640) == (24, 24)
    assert size("center", 480, 640) == (27, 36)  # 24 / 0.875
    assert size("resized", 480, 640) == (27, 36)
    assert size("resized", 20, 30) == (20, 30)
    assert size("center", 20, 30) == (27, 40)
