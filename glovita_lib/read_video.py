"""Video files and folders of frames: what they are, whether their frames may be read at random, and
the frames themselves.

decord decodes. Read in order its frames are right, but for MPEG transport streams, of which it
loses the first ones. Asked for a frame it goes to the key frame before it, and in many containers
and codecs (MPEG program streams, AVI, ASF, MPEG-4 with B-frames, open groups of pictures) then
counts from a wrong one, without a word. So frames are read at random only where a file was seen to
give the same in both ways; all others are read in order from the first.

N frames, T frames that are asked for, H W pixels. This module imports no torch.
"""

import os
import re
import stat
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.errors import UserError, listed, reason
from glovita_lib.read_container import file_type, surely_closed
from glovita_lib.read_image import read_image

# -------------------------------------------------------------------------------------- a video


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What is known of a video before its frames are read."""

    kind: str
    """Container and codec, or "frames" of a folder of images."""
    frames: int
    height: int
    width: int
    fps: float
    """Frames a second; 0 where the video does not say it, as a folder of images."""
    random: bool
    """Whether its frames may be read at random."""
    times: tuple[float, ...] | None = None
    """Seconds of each frame from the first, of a variable frame rate; none: frame / fps."""
    timed: bool = True
    """Whether fps and times are those of its timestamps; else fps is what the header says."""

    @property
    def clock(self) -> "Clock":
        """When its frames are shown."""
        return Clock(self.fps, None if self.times is None else np.array(self.times))


@dataclass(frozen=True, eq=False, slots=True)
class Clock:
    """When the frames of a video are shown, in seconds from the first."""

    fps: float  # frames a second, of a variable rate their mean
    times: np.ndarray | None = None  # (F,) of a variable rate

    def seconds(self, frames: np.ndarray) -> np.ndarray:
        """When frames are shown; those behind the last follow as it follows the one before."""
        if self.times is None:
            return np.asarray(frames) / self.fps
        last, step = len(self.times) - 1, self.times[-1] - self.times[-2]
        return self.times[np.clip(frames, 0, last)] + np.maximum(frames - last, 0) * step

    def frames(self, seconds: np.ndarray) -> np.ndarray:
        """Numbers of the frames that are shown then, int64."""
        if self.times is None:
            return np.floor(np.asarray(seconds) * self.fps + 1e-9).astype(np.int64)
        shown = np.searchsorted(self.times, np.asarray(seconds) + 1e-5, side="right") - 1
        behind = np.maximum(seconds - self.times[-1], 0) / (self.times[-1] - self.times[-2])
        return shown + np.floor(behind + 1e-5).astype(np.int64)


@dataclass(eq=False)
class LoadedVideo:
    """A video in memory."""

    pixels: np.ndarray  # (F, H, W, C) uint8
    fps: float
    times: np.ndarray | None = None  # (F,) seconds from the first, of a variable frame rate

    @property
    def clock(self) -> Clock:
        """When its frames are shown."""
        return Clock(self.fps, self.times)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, F, H, W)."""
        frames, height, width, channels = self.pixels.shape
        return channels, frames, height, width

    def read(self, frames: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, C), not to be written to; a view where their numbers ascend evenly."""
        steps = np.diff(frames)
        if len(steps) and steps[0] > 0 and bool((steps == steps[0]).all()):
            return self.pixels[frames[0] : frames[-1] + 1 : steps[0]]
        return self.pixels[frames]


@dataclass(frozen=True)
class VideoView:
    """A video, of which only what is asked for is decoded, or which is in memory; and where the
    clip begins that is wanted of it."""

    video: Any  # LoadedVideo or StoredVideo
    start: int | None = None
    """First frame of the clip; none: it is drawn."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, F, H, W) as decoded."""
        return tuple(self.video.shape)

    @property
    def clock(self) -> Clock:
        """When its frames are shown."""
        clock: Clock = self.video.clock
        return clock

    def read(self, frames: np.ndarray) -> np.ndarray:
        """Frames (T, H, W, C) uint8."""
        found: np.ndarray = self.video.read(frames)
        return found

    def loaded(self) -> "VideoView":
        """The same in memory."""
        return self if isinstance(self.video, LoadedVideo) else self.video.loaded(self.start)


FAULTS = 1e-9  # share of frames that decord may replace by others: none
MOST_OPEN = 2  # files that a thread keeps open


def open_reader(path: str, size: tuple[int, int] | None) -> Any:
    """decord's reader of a file, one thread.

    Args:
        size: height and width of the frames; none: those of the file.

    Raises:
        UserError: it cannot be opened.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    height, width = size or (-1, -1)
    with decoding():
        return decord.VideoReader(
            path, decord.cpu(0), width=width, height=height, num_threads=1, fault_tol=FAULTS
        )


@contextmanager
def decoding() -> Iterator[None]:
    """Turn what decord says of a broken file into a user error; the block must hold calls of it
    alone."""
    try:
        yield
    except (RuntimeError, AssertionError, StopIteration, OSError, ValueError, IndexError) as error:
        raise UserError(f"it cannot be decoded ({told(error)})") from None
    except Exception as error:
        if type(error).__name__ not in ("DECORDError", "DECORDLimitReachedError"):
            raise
        raise UserError(f"it cannot be decoded ({told(error)})") from None


SAID = {
    "duplicate frames": "frames are missing, or cut away by an edit list; ffmpeg makes it anew",
    "cannot find video stream": "it has no picture",
    "measure duration": "it does not say how many frames it has; ffmpeg makes an mp4 of it",
    "avfilter_graph": "it has no picture that can be decoded",
    "(-11 vs. 0)": "decord loses step with its decoder, as of closed groups of HEVC; make it H.264",
    "Error reading": "no video, or its header is missing",
}
"""What stands in errors of decord, and what it means."""


def told(error: Exception) -> str:
    """What decord says, without its own source and stack."""
    for part, words in SAID.items():
        if part in str(error):
            return words
    text = reason(error)
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: |\[[^]]*\]", "", text).partition("Stack trace")[0]
    return text.strip()[:200] or "no video stream"


def rgb(frame: Any) -> np.ndarray:
    """A frame of decord, (H, W, 3). Where rows are filled up to a multiple of their width (those of
    48 or 96 pixels) it takes the filling for further channels."""
    pixels: np.ndarray = frame.asnumpy()
    height, width, channels = pixels.shape
    if channels == 3:
        return pixels
    rows = pixels.reshape(height, -1)[:, : 3 * width]
    return np.ascontiguousarray(rows).reshape(height, width, 3)


def in_order(reader: Any, first: int = 0) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) of a reader that stands at a frame, up to its last."""
    for _ in range(first, len(reader)):
        with decoding():
            frame = rgb(reader.next())
        yield frame


def frames_at(
    reader: Any, frames: Sequence[int], *, random: bool, start: int = 0
) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) uint8 of a reader, as `read_at` gives them."""
    at = start
    for number in frames:
        with decoding():
            if random and at != number:
                reader.seek_accurate(number)
                at = number
            while True:
                frame = reader.next()
                at += 1
                if at > number:
                    break
            pixels = rgb(frame)
        yield pixels


def read_at(reader: Any, frames: Sequence[int], *, random: bool, start: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 of a reader.

    Args:
        frames: their numbers, ascending.
        random: whether it may go to a frame; else it decodes all from the first.
        start: frame at which it stands.

    Raises:
        UserError: one cannot be decoded.
    """
    out: np.ndarray | None = None
    for row, pixels in enumerate(frames_at(reader, frames, random=random, start=start)):
        if out is None:
            out = np.empty((len(frames), *pixels.shape), np.uint8)
        out[row] = pixels
    return np.empty((0, 0, 0, 3), np.uint8) if out is None else out


class OpenFiles(threading.local):
    """The files that a thread has read last, still open: the clips of a long video come one after
    the other, and to open it takes a look at all of its packets."""

    def __init__(self) -> None:
        self.readers: dict[tuple[Any, ...], tuple[Any, int]] = {}  # reader and where it stands

    def take(self, key: tuple[Any, ...]) -> tuple[Any, int] | None:
        """The reader of a file, which is then no longer here."""
        return self.readers.pop(key, None)

    def keep(self, key: tuple[Any, ...], reader: Any, at: int) -> None:
        """Keep a reader that stands at a frame, instead of the one that is here longest."""
        close_before_forks()
        self.readers[key] = reader, at
        while len(self.readers) > MOST_OPEN:
            del self.readers[next(iter(self.readers))]

    def close(self) -> None:
        """Close the files."""
        self.readers.clear()


@cache
def close_before_forks() -> None:
    """Have the files of a thread closed before it forks: a child that closed them would wait for
    threads of decord that it does not have."""
    os.register_at_fork(before=OPEN.close)


OPEN = OpenFiles()


def read_frames(
    path: str, facts: VideoFacts, frames: Sequence[int] | np.ndarray, size: tuple[int, int] | None
) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 of a video, resized while they are decoded.

    Each is decoded once, in one pass over the file where they are many.

    Args:
        frames: their numbers, in any order.
        size: height and width; none: those of the file.

    Raises:
        UserError: one line with the path.
    """
    wanted, inverse = np.unique(np.asarray(frames, np.int64), return_inverse=True)
    if not len(wanted):
        height, width = size or (facts.height, facts.width)
        return np.empty((0, height, width, 3), np.uint8)
    try:
        if facts.kind == FRAMES:
            found = read_images(path, wanted, size)
        else:
            found = read_file(path, facts, wanted.tolist(), size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found if len(inverse) == len(wanted) and (np.diff(inverse) > 0).all() else found[inverse]


def read_file(
    path: str, facts: VideoFacts, wanted: list[int], size: tuple[int, int] | None
) -> np.ndarray:
    """The same of a file, ascending frames."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(error.strerror or "it cannot be read") from None
    key = (path, state.st_size, state.st_mtime_ns, size)
    reader, at = OPEN.take(key) or (None, 0)
    if reader is None or (at > wanted[0] and not facts.random):
        reader, at = open_reader(path, size), 0
        if len(reader) != facts.frames:
            raise UserError(
                f"{len(reader)} frames, {facts.frames} when the run was started: the file has"
                " changed"
            )
    try:
        found = read_at(reader, wanted, random=facts.random, start=at)
    except UserError:
        if not facts.random:
            raise
        reader = open_reader(path, size)  # a frame that is broken fails in order as well
        found = read_at(reader, wanted, random=False)
    OPEN.keep(key, reader, wanted[-1] + 1)
    return found


# ------------------------------------------------------------------------------ folders of frames

FRAMES = "frames"


def frame_files(folder: str, exts: Sequence[str]) -> list[str]:
    """Names of the images in a folder, in the order of the numbers in them."""
    endings = tuple("." + ext.lower().lstrip(".") for ext in exts)
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name[0] != "." and e.name.lower().endswith(endings)]
    return sorted(names, key=natural)


def natural(name: str) -> list[Any]:
    """Key that sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


IMAGE_EXTS = ("jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp")
MEGAPIXELS = 179.0  # of a frame at most, as of images


def read_images(folder: str, wanted: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Frames (T, H, W, 3) of a folder of images, ascending."""
    from PIL import Image

    names = frame_files(folder, IMAGE_EXTS)
    found = []
    for number in wanted.tolist():
        if number >= len(names):
            raise UserError(f"{len(names)} frames, fewer than when the run was started")
        path = os.path.join(folder, names[number])
        pixels = read_image(path, channels=3, bit_depth=8, max_megapixels=MEGAPIXELS)
        pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        if size is not None and pixels.shape[:2] != size:
            image = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
            pixels = np.asarray(image)
        found.append(pixels)
    if len({pixels.shape for pixels in found}) > 1:
        raise UserError("its frames differ in size")
    return np.stack(found)


# -------------------------------------------------------------------------------- a look at a file

LOOK = (48, 64)  # height and width of the frames that are compared
NO_TIME = -1e9  # seconds; FFmpeg's mark of a frame without a timestamp is -2^63 ticks
ROUNDED = 2e-3  # seconds that timestamps of an even rate may be off: containers count milliseconds


def look_at(path: str, *, check: bool, trusted: bool) -> VideoFacts:
    """What a video is, and whether it can be read.

    Args:
        check: whether all frames are decoded, and compared with those read at random.
        trusted: without check, whether such a file was found to be right at random; if not, this
            one is compared, where its packets say that it may be right.

    Raises:
        UserError: why it cannot be used.
    """
    if os.path.isdir(path):
        return look_at_images(path, check=check)
    try:
        kind = file_type(path)
    except OSError as error:
        raise UserError(error.strerror or "it cannot be read") from None
    reader = open_reader(path, None)
    with decoding():
        frames, fps = len(reader), float(reader.get_avg_fps())
        height, width, _ = reader.next().shape
    if not (np.isfinite(fps) and fps > 0):
        fps = 0.0
    is_timed = timestamps(reader, frames) is not None
    random = kind.may_be_random and is_timed
    fps, times = timed(reader, frames, fps)
    if random and not check:  # another encoder may have made this file than the one looked at
        with decoding():
            keys = reader.get_key_indices()
        random = surely_closed(path, kind, np.asarray(keys), frames)
    if check or (random and not trusted):
        small = open_reader(path, LOOK)
        sums = [zlib.crc32(frame.data) for frame in in_order(small)]
        if len(sums) != frames:
            raise UserError(f"{len(sums)} frames can be decoded, its header says {frames}")
        random = random and agrees(path, sums)
    return VideoFacts(str(kind), frames, int(height), int(width), fps, random, times, is_timed)


def timestamps(reader: Any, frames: int) -> np.ndarray | None:
    """Seconds of each frame from the first one (F,); none where the container does not say them or
    they do not ascend. By them decord finds a key frame, and those behind it that it skips: without
    (B-frames in AVI) what it gives at random is right or wrong by chance."""
    with decoding():
        stamps = np.asarray(reader.get_frame_timestamp(range(frames)), np.float64).reshape(-1, 2)
    known = bool(np.isfinite(stamps).all() and (stamps > NO_TIME).all())
    times = stamps[:, 0] - stamps[:1, 0]
    return times if known and bool((np.diff(times) > 0).all()) else None


def timed(reader: Any, frames: int, fps: float) -> tuple[float, tuple[float, ...] | None]:
    """The frame rate of a video by the timestamps of its frames, and these in seconds from the
    first one where they do not follow from a rate.

    The rate in a header may be none or a wrong one, so it counts where all timestamps are as it
    says, else their mean rate. Where there are no timestamps, or they do not ascend, there is
    nothing but the header.

    Args:
        frames: how many there are.
        fps: frames a second as the header says, 0 where it does not.
    """
    times = timestamps(reader, frames)
    if times is None or len(times) < 2:
        return fps, None
    mean = (frames - 1) / float(times[-1])
    for rate in (fps, mean):
        if rate and np.abs(times - np.arange(frames) / rate).max() <= ROUNDED:
            return rate, None
    return mean, tuple(times.round(6).tolist())


def agrees(path: str, sums: list[int]) -> bool:
    """Whether frames at random are those in order, whose checksums are given.

    What comes at random follows from the key frame that decord goes to: some groups of a file may
    be open (frames that are shown before a key frame are stored behind it, or decoding recovers
    slowly from it) while others are closed. So every group is read from its key frame to its end,
    and its last frame, then the one behind the key frame and one in the middle are asked for: a
    group is decoded about two and a half times.
    """
    reader = open_reader(path, LOOK)
    with decoding():
        keys = {0, *map(int, reader.get_key_indices())}
    ends, at = [*sorted(keys), len(sums)], 0
    for key, end in reversed([*zip(ends[:-1], ends[1:], strict=True)]):
        asked: list[Sequence[int]] = [range(key, end)]
        if end - key > 1:
            asked += [[end - 1], sorted({key + 1, (key + end) // 2})]
        for wanted in asked:
            found = frames_at(reader, wanted, random=True, start=at)
            try:
                if not all(
                    zlib.crc32(x.data) == sums[n] for n, x in zip(wanted, found, strict=True)
                ):
                    return False
            except UserError:
                return False
            at = wanted[-1] + 1
    return True


def look_at_images(folder: str, *, check: bool) -> VideoFacts:
    """The same of a folder of frames."""
    names = frame_files(folder, IMAGE_EXTS)
    if not names:
        raise UserError("no frame in it")
    wanted = range(len(names)) if check else (0, len(names) - 1)
    shapes = set()
    for number in wanted:
        try:
            shapes.add(read_images(folder, np.array([number]), None).shape[1:3])
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{folder}{os.sep}")) from None
    if len(shapes) > 1:
        raise UserError(f"frames of different sizes: {listed(sorted(shapes), 3)}")
    ((height, width),) = shapes
    return VideoFacts(FRAMES, len(names), height, width, 0.0, random=True)


def stamp(path: str | Path) -> list[int | str]:
    """What changes when the facts of a video may do: size and time of change, and the version of
    decord, as another one may give other frames; of a folder of frames size and time of these, with
    a checksum of their names and all of these."""
    state = os.stat(path)
    if not stat.S_ISDIR(state.st_mode):
        import decord

        return [state.st_size, state.st_mtime_ns, f"decord {decord.__version__}"]
    with os.scandir(path) as entries:
        found = sorted((e.name, (of := e.stat()).st_size, of.st_mtime_ns) for e in entries)
    sizes, times = sum(size for _, size, _ in found), max((t for *_, t in found), default=0)
    return [sizes, times, zlib.crc32(repr(found).encode("utf-8", "surrogateescape"))]
