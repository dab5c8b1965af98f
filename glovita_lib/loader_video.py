"""Videos on their way to an encoder: the clips that are drawn of them, what a run derives of them,
and their augmentation.

A run on other samples does not load this module. B batch, V clips of a video, T frames of a clip,
F frames of a video, C channels, H W pixels, S side of a frame as the encoder receives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from glovita_lib.augment import ClipAugmenter, Clips, build_fit, empty, resolve_augmentation
from glovita_lib.augment_crop import CropResize
from glovita_lib.data import ClipSamples, Data, Source, Split, VideoFrames, subset
from glovita_lib.data_video import VideoSource, frames_of
from glovita_lib.encoder import preprocess_of
from glovita_lib.errors import UserError, refuse
from glovita_lib.objectives import as_loaded, build_inputs, frames_shown
from glovita_lib.read_video import Clock, LoadedVideo, VideoView
from glovita_lib.resolved import ClipInputs, resolve_inputs
from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_root import Root
from glovita_lib.spec_video import ClipSampling, ResolvedClips

# ------------------------------------------------------------------------------ frames of clips


def from_start(start: np.ndarray | int, sampling: ResolvedClips, clock: Clock) -> np.ndarray:
    """Frames (..., T) of dense clips that begin at frames (...); they may lie beyond the end."""
    first, steps = np.asarray(start)[..., None], np.arange(sampling.frames)
    if sampling.fps is None:
        return first + steps * sampling.stride
    if clock.times is None:
        return first + clock.frames(steps / sampling.fps)
    return clock.frames(clock.seconds(first) + steps / sampling.fps)


def clip_frames(
    sampling: ResolvedClips, frames: int, clock: Clock, draws: np.ndarray | None, clips: int
) -> np.ndarray:
    """Frames (V, T) of the clips of a video; those from `frames` on lie beyond its end.

    Args:
        frames: of the video, F.
        draws: (V, n) numbers from 0 to below 1: where a dense clip begins, n = 1, or which frame of
            each part a uniform one takes, n = T; none: clips evenly over the video.
        clips: V.
    """
    if sampling.method == "dense":
        room = room_of(sampling, frames, clock)
        if draws is not None:
            starts = np.floor(draws[:, 0] * (room + 1)).astype(np.int64)
        elif clips == 1:
            starts = np.array([room // 2])
        else:
            starts = np.round(np.linspace(0, room, clips)).astype(np.int64)
        return from_start(starts, sampling, clock)
    count = sampling.frames
    if frames <= count:
        return np.tile(np.arange(count), (clips, 1))
    if draws is None:
        draws = np.tile((2 * np.arange(clips)[:, None] + 1) / (2 * clips), (1, count))
    return np.floor((np.arange(count) + draws) * frames / count).astype(np.int64)


def room_of(sampling: ResolvedClips, frames: int, clock: Clock) -> int:
    """The last frame at which a dense clip may begin that ends within a video, or 0."""
    if clock.times is None or sampling.fps is None:
        return max(frames - 1 - int(from_start(0, sampling, clock)[-1]), 0)
    length = (sampling.frames - 1) / sampling.fps  # seconds
    return max(int(clock.frames(np.array(clock.times[-1] - length))), 0)


def covering_starts(sampling: ResolvedClips, frames: int, clock: Clock) -> np.ndarray:
    """First frames of the dense clips that show every frame of a video once; with fps those of the
    clip's rate."""
    count = sampling.frames
    if sampling.fps is not None:
        shown = frames * sampling.fps / clock.fps  # frames of the clip's rate
        return clock.frames(np.arange(0, shown, count) / sampling.fps)
    phases = range(min(sampling.stride, frames))
    return np.array([s for p in phases for s in range(p, frames, count * sampling.stride)])


# ----------------------------------------------------------------------------- clips of a batch


class Clip(NamedTuple):
    """Clips of one video."""

    pixels: Tensor  # (V, T, C, S, S) uint8
    frames: np.ndarray  # (V, T)
    real: np.ndarray  # (V, T)
    times: np.ndarray  # (V, T) seconds


class ClipCut:
    """Draws clips and decodes them, cropped and resized, where videos are read.

    Picklable: workers use it per sample.
    """

    one_size = False

    def __init__(self, crop: CropResize, sampling: ResolvedClips, *, train: bool) -> None:
        self.crop, self.sampling = crop, sampling
        self.draws = train and sampling.train == "random"
        several = not train or sampling.combine == "bag"
        self.clips = sampling.clips if several else 1

    def boxes(self, sizes: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """What is drawn of videos.

        Args:
            sizes: (B, 3) frames, height and width of each, as decoded.
            generator: CPU generator; unused (may be None) where nothing is drawn.

        Returns:
            (B, 8 + V n) float64: window of the crop, see CropResize, and the draws of `clip_frames`
            where training draws some.

        Raises:
            UserError: a video is smaller than a crop that does not resize it.
        """
        sizes = np.asarray(sizes).reshape(-1, 3)
        windows = self.crop.boxes(sizes[:, 1:], generator).flatten(1).double()  # (B, 8)
        if not self.draws:
            return windows
        each = 1 if self.sampling.method == "dense" else self.sampling.frames
        draws = torch.rand(len(sizes), self.clips * each, generator=generator, dtype=torch.float64)
        return torch.cat([windows, draws], 1)

    def one(self, sample: Any, box: Tensor) -> Clip:
        """The clips of a video in a worker: only their frames are decoded."""
        view = sample if isinstance(sample, VideoView) else VideoView(sample)
        frames, clock = view.shape[1], view.clock
        if view.start is not None:
            numbers = from_start(np.array([view.start]), self.sampling, clock)
        else:
            draws = box[8:].numpy().reshape(self.clips, -1) if self.draws else None
            numbers = clip_frames(self.sampling, frames, clock, draws, self.clips)
        real = numbers < frames
        numbers = np.minimum(numbers, frames - 1)
        times = clock.seconds(numbers)
        window = box[:8].long().view(2, 4)
        if len(numbers) == 1 and bool((np.diff(numbers[0]) > 0).all()):
            return Clip(self.cropped(view.read(numbers[0]), window)[None], numbers, real, times)
        shown, place = np.unique(numbers, return_inverse=True)
        pixels = self.cropped(view.read(shown), window)  # (n, C, S, S)
        index = torch.from_numpy(place.reshape(numbers.shape))
        return Clip(pixels[index], numbers, real, times)

    def cropped(self, frames: np.ndarray, box: Tensor) -> Tensor:
        """The window of frames (n, H, W, C), (n, C, S, S)."""
        images = frames.transpose(0, 3, 1, 2)
        size = self.crop.size
        (y, h, tall, top), (x, w, wide, left) = box.tolist()
        whole = (h, w) == (tall, wide)
        first, side = (y + top, x + left), images.shape[2:]
        if whole and all(a >= 0 and a + size <= s for a, s in zip(first, side, strict=True)):
            images = images[:, :, first[0] : first[0] + size, first[1] : first[1] + size]
            return torch.from_numpy(np.ascontiguousarray(images))
        return self.crop.canvas(
            torch.from_numpy(np.require(images, requirements=["W"])), box.expand(len(images), 2, 4)
        )

    def join(self, parts: list[Clip], samples: Sequence[Any]) -> Clips:
        """The clips of a batch."""
        pixels = empty(len(parts), *parts[0].pixels.shape, dtype=torch.uint8)
        torch.stack([part.pixels for part in parts], out=pixels)
        rest = [
            torch.from_numpy(np.stack(arrays))
            for arrays in zip(*(part[1:] for part in parts), strict=True)
        ]
        if self.clips == 1 or pixels.shape[1] == 1:
            pixels, rest = pixels[:, 0], [part[:, 0] for part in rest]
        return Clips(pixels, *rest)


def decoded_size(crop: CropResize, height: int, width: int) -> tuple[int, int]:
    """Height and width at which frames are decoded: those that a crop of pixels resizes to; of one
    that resizes by itself no more than it needs."""
    if crop.ops.crop == "none":
        return crop.size, crop.size
    scaled = crop.scaled(torch.tensor([[height, width]], dtype=torch.float64))[0]
    tall, wide = (int(side) for side in scaled.tolist())
    if crop.ops.crop in ("resized", "padded") and tall * wide > height * width:
        return height, width
    return tall, wide


# ---------------------------------------------------------------------------- what a run derives


@resolve_inputs.register
def _(samples: ClipSamples, root: Root, data: Data) -> ClipInputs:
    section = getattr(root.data, "augmentation", None)
    assert isinstance(section, ImageAugmentation), "a data set of videos has data.augmentation"
    sampling = getattr(root.data, "sampling", ClipSampling())
    if samples.label_level == "frame":
        refuse("data.sampling", sampling.frame_problems())
    sizes = {
        tuple(size) for split in data.splits.values() for size in sizes_of(split)[:, 1:].tolist()
    }
    same = sizes.pop() if len(sizes) == 1 else None
    augmentation = resolve_augmentation(
        section,
        default_policies=root.data.default_policies,
        encoder=preprocess_of(root.model.encoder, channels=samples.channels),
        channels=samples.channels,
        native_size=None if same is None else (same[0], same[1]),
    )
    fields = {name: getattr(sampling, name) for name in ResolvedClips.__struct_fields__}
    if not sampling.is_bag and sampling.combine == "bag":
        fields["combine"] = "logits"
    kinds = {"multiclass": "softmax", "multilabel": "sigmoid"}
    return ClipInputs(
        **msgspec.structs.asdict(samples),
        augmentation=augmentation,
        sampling=ResolvedClips(**fields),
        probability=msgspec.convert(kinds.get(data.subtask), Any),
    )


def sizes_of(split: Split) -> np.ndarray:
    """Frames, height and width (N, 3) of the videos of a split.

    Raises:
        UserError: a source of the user's own that does not tell.
    """
    source = split.source
    if source.uniform is not None:  # (C, F, H, W)
        return np.tile(source.uniform[1:], (len(split), 1))
    if source.sizes is None:
        raise UserError(
            "the source of the data set must tell `sizes` (N, 3): frames, height and width of its"
            " videos"
        )
    return np.asarray(source.sizes).reshape(-1, 3)


@build_inputs.register
def _(inputs: ClipInputs, *, train: bool) -> ClipAugmenter:
    of = inputs.sampling
    ops = inputs.augmentation.train if train else inputs.augmentation.test
    crop = build_fit(inputs.augmentation, ops, bit_depth=8)
    combine = {"logits": "mean", "bag": "bag", "probabilities": inputs.probability or "mean"}
    return ClipAugmenter(
        inputs.augmentation,
        train=train,
        fit=ClipCut(crop, of, train=train),
        combine=combine[of.combine],
        chunk=of.chunk,
    )


# -------------------------------------------------------------------------------- what is loaded


@frames_shown.register
def _(inputs: ClipInputs, split: Split) -> dict[str, np.ndarray]:
    """Of a video that is shorter than a clip the last frame stands several times."""
    source = split.source
    if source.windows is None:
        source = ArrayVideos(source, np.arange(len(split)))
    if not isinstance(source, VideoSource | ArrayVideos) or source.starts is not None:
        return {}  # clips already
    if source.sizes is None or inputs.sampling.clips > 1 or inputs.label_level == "frame":
        return {}
    frames, times = [], []
    for count, clock in zip(source.sizes[:, 0].tolist(), source.clocks, strict=True):
        numbers = clip_frames(inputs.sampling, count, clock, None, 1)[0]
        frames.append(np.minimum(numbers, count - 1))
        times.append(clock.seconds(frames[-1]))
    return {"frames": np.array(frames), "times": np.array(times)}


@as_loaded.register
def _(
    inputs: ClipInputs, split: Split, *, train: bool, once: bool = False, frames: bool = False
) -> Split:
    """The clips of a split: of training as many of each video as an epoch takes, of frames all that
    show every frame once, else a row a video; their frames are resized where they are decoded.
    Clips stay what they are."""
    source, of = split.source, inputs.sampling
    if source.windows is None:
        source = ArrayVideos(source, np.arange(len(split)))
    rows, starts = np.arange(len(split)), None
    if train:
        rows = np.repeat(rows, 1 if once else of.train_clips)
    if not isinstance(source, VideoSource | ArrayVideos):
        refuse_undrawn(split, frames)
        return subset(split, rows) if len(rows) > len(split) else split
    if source.starts is not None:
        return split
    shown = split.frames
    if shown is None and frames:
        shown = frames_of(split.ids, source, None)
    if not train and (frames or inputs.label_level == "frame"):
        sides = zip(sizes_of(split)[:, 0].tolist(), source.clocks, strict=True)
        each = [covering_starts(of, count, clock) for count, clock in sides]
        rows = np.repeat(rows, [len(part) for part in each])
        starts = np.concatenate(each or [np.zeros(0, np.int64)])
    if isinstance(source, VideoSource):
        ops = inputs.augmentation.train if train else inputs.augmentation.test
        crop = build_fit(inputs.augmentation, ops, bit_depth=8)
        source = source.changed(
            (train, once, msgspec.json.encode(inputs)),
            which=source.which[rows],
            starts=starts,
            resized=partial(decoded_size, crop),
        )
    else:
        source = replace(source, which=source.which[rows], starts=starts)
    return Split(
        ids=[split.ids[row] for row in rows],
        targets=None if split.targets is None else split.targets[rows],
        source=source,
        groups=None if split.groups is None else [split.groups[row] for row in rows],
        frames=frames_of_clips(shown, rows, starts, of, source),
    )


def frames_of_clips(
    frames: VideoFrames | None,
    rows: np.ndarray,
    starts: np.ndarray | None,
    sampling: ResolvedClips,
    source: "VideoSource | ArrayVideos",
) -> VideoFrames | None:
    """Which frames the clips of videos show that begin at given frames; None where frames have no
    labels.

    Args:
        frames: of the videos.
        rows: (N,) video of each clip.
        starts: (N,); none: clips are drawn, of which nothing can be said.
        source: of the clips.
    """
    if frames is None:
        return None
    videos = frames.video_of[rows]
    numbers = np.empty((len(rows), 0 if starts is None else sampling.frames), np.int64)
    if starts is not None:
        lengths = np.array([len(frames.times[video]) for video in videos], np.int64)
        for row, (start, clock) in enumerate(zip(starts.tolist(), source.clocks, strict=True)):
            numbers[row] = from_start(start, sampling, clock)
        numbers[numbers >= lengths[:, None]] = -1
    return replace(frames, video_of=videos, numbers=numbers)


def refuse_undrawn(split: Split, frames: bool) -> None:
    """Videos of a source of the user's own that reads clips by itself cannot be seen frame by
    frame.

    Raises:
        UserError: labels are those of frames, or all frames are to be read.
    """
    labelled = split.frames is not None and not split.frames.numbers.shape[1]
    if labelled or frames:
        what = "labels are those of frames" if labelled else 'extract.output = "frames"'
        raise UserError(
            f"{what}: these are read from files or from a source that gives whole videos"
            " (C, F, H, W): its `windows` must be None"
        )


@dataclass(frozen=True, eq=False)
class ArrayVideos(Source):
    """Videos (C, F, H, W) of a source of the user's own that gives whole arrays."""

    whole: Source
    which: np.ndarray  # (N,) videos of it
    starts: np.ndarray | None = None  # (N,) first frame of the clip of each; None: clips are drawn
    clock: ClassVar[Clock] = Clock(25.0)

    @property
    def uniform(self) -> None:
        """None: clips are cut where videos are read."""

    @property
    def sizes(self) -> np.ndarray | None:
        """Frames, height and width (N, 3)."""
        if self.whole.uniform is not None:
            return np.tile(self.whole.uniform[1:], (len(self.which), 1))
        return None if self.whole.sizes is None else self.whole.sizes[self.which]

    @property
    def clocks(self) -> list[Clock]:
        """When the frames of each are shown."""
        return [self.clock] * len(self.which)

    def windows(self, rows: np.ndarray) -> list[VideoView]:
        """Videos in memory."""
        starts: list[int | None] = [None] * len(rows)
        if self.starts is not None:
            starts = self.starts[rows].tolist()
        return [self.view(*pair) for pair in zip(self.fetch(rows), starts, strict=True)]

    def view(self, video: np.ndarray, start: int | None) -> VideoView:
        """One video (C, F, H, W)."""
        return VideoView(LoadedVideo(np.moveaxis(np.asarray(video), 0, 3), self.clock.fps), start)

    def fetch(self, rows: np.ndarray) -> Any:
        return self.whole.fetch(self.which[rows])

    def nbytes(self) -> int:
        return self.whole.nbytes()

    def select(self, rows: np.ndarray) -> "ArrayVideos":
        starts = None if self.starts is None else self.starts[rows]
        return replace(self, which=self.which[rows], starts=starts)
