"""Videos in memory with a class a frame, and a small encoder of clips: runs of seconds."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from glovita_lib.data import ArraySource, ClipSamples, Data, Source, Split, VideoFrames
from glovita_lib.read_video import LoadedVideo, VideoView
from glovita_lib.spec_samples import UNLABELLED

COLOURS = ("red", "green", "blue")
FRAMES = 22  # of a video; no multiple of a clip
SPEC = """
[data]
dataset = "custom_video_dataset"
target = "small_videos:colours"
[data.sampling]
frames = 4
train_clips = 4
[data.augmentation]
image_size = 8
train_policy = "default_2d_1"
[model.encoder]
encoder_type = "custom"
target = "small_videos:network"
[model.head]
head_type = "framewise_decoder_1d"
[task]
objective = "framewise"
bootstrap = 50
[training]
epochs = 2
[optimizer]
lr = 0.01
[dataloading]
batch_size = 4
num_workers = 0
[logger]
backend = "none"
"""


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Videos (N, C, F, H, W) of noise with a colour for some frames, and the colours (N, F)."""
    rng = np.random.default_rng(seed)
    labels = np.empty((count, FRAMES), np.int64)
    for own in labels:
        edges = [0, *sorted(rng.choice(np.arange(3, FRAMES - 3), 3, replace=False)), FRAMES]
        for start, end in zip(edges, edges[1:], strict=False):
            own[start:end] = rng.integers(len(COLOURS))
    pixels = rng.integers(0, 60, (count, 3, FRAMES, 10, 12))
    for video, own in zip(pixels, labels, strict=True):
        video[own, np.arange(FRAMES)] += 120
    return pixels.astype(np.uint8), labels


def colours(spec, seed: int, *, labelled: bool = True) -> Data:
    """A data set of the user's own: eight frames of each video have no label."""
    splits = {}
    for number, (name, count) in enumerate({"train": 6, "val": 2, "test": 3}.items()):
        pixels, labels = coloured(count, number)
        labels[:, 5:9] = UNLABELLED
        ids = [f"{name}/{row}" for row in range(count)]
        frames = VideoFrames(
            ids=ids,
            video_of=np.arange(count),
            numbers=np.empty((count, 0), np.int64),
            times=[np.arange(FRAMES) / 25] * count,
            labels=list(labels) if labelled else None,
        )
        source = ArraySource(pixels, np.arange(count))
        splits[name] = Split(ids, labels[:, 0] if labelled else None, source, frames=frames)
    samples = ClipSamples(channels=3, label_level="frame")
    return Data("colours", splits, "framewise", COLOURS, samples)


def network(input_channels: int) -> nn.Module:
    """Clips (B, C, T, H, W) -> a map (B, 8, T / 2, h, w)."""
    return nn.Sequential(
        nn.Conv3d(input_channels, 8, (3, 4, 4), stride=(2, 4, 4), padding=(1, 0, 0)),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 1),
    )


def image_network(input_channels: int) -> nn.Module:
    """Images (B, C, H, W) -> vectors (B, 8)."""
    return nn.Sequential(
        nn.Conv2d(input_channels, 8, 4, stride=4), nn.ReLU(), nn.Flatten(2), Mean()
    )


class Mean(nn.Module):
    """Mean over the last axis."""

    def forward(self, x):
        return x.mean(-1)


@dataclass(frozen=True)
class Videos(Source):
    """Videos in memory of any length."""

    each: tuple[LoadedVideo, ...]

    @property
    def uniform(self) -> None:
        """They differ in length."""

    @property
    def sizes(self) -> np.ndarray:
        """Frames, height and width (N, 3)."""
        return np.array([video.shape[1:] for video in self.each])

    def windows(self, rows: np.ndarray) -> list[VideoView]:
        """Whole videos, of which clips are cut."""
        return [VideoView(self.each[row]) for row in rows]

    def fetch(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self.each[row].pixels.transpose(3, 0, 1, 2) for row in rows]

    def nbytes(self) -> int:
        return sum(video.pixels.nbytes for video in self.each)

    def select(self, rows: np.ndarray) -> "Videos":
        return Videos(tuple(self.each[row] for row in rows))


LENGTHS = (11, 3, 20, 9, 14, 30)  # the second is shorter than a clip
SIDE = 8


def lit(split: str) -> list[LoadedVideo]:
    """Videos of noise, every second of them brighter; the third begins dark, the last one has a
    variable frame rate."""
    rng = np.random.default_rng(len(split))
    found = []
    for row, count in enumerate(LENGTHS):
        pixels = rng.integers(90 * (row % 2), 160 + 90 * (row % 2), (count, SIDE, SIDE, 3))
        pixels[: 7 if row == 2 else 0] //= 2
        times = np.cumsum(rng.uniform(0.01, 0.09, count)) if row + 1 == len(LENGTHS) else None
        times = None if times is None else times - times[0]
        found.append(LoadedVideo(pixels.astype(np.uint8), 25.0 if row else 10.0, times))
    return found


def lights(spec, seed: int) -> Data:
    """Videos of different lengths with a label each, as a data set of the user's own."""
    splits = {}
    for name in ("train", "val", "test"):
        ids = [f"{name}/{row}" for row in range(len(LENGTHS))]
        splits[name] = Split(ids, np.arange(len(ids)) % 2, Videos(tuple(lit(name))))
    return Data("lights", splits, "multiclass", ("dark", "bright"), ClipSamples(channels=3))
