"""Videos for tests: files of any container and codec whose frames carry their number."""

from fractions import Fraction
from pathlib import Path

import numpy as np

from glovita_lib.augment import resolve_augmentation
from glovita_lib.encoder import Preprocess
from glovita_lib.spec_augment import ImageAugmentation, ImageKwargs

HEIGHT, WIDTH, CELL = 64, 96, 12  # pixels
BITS = 8


def numbered(count, *, first=0, seed=0):
    """Frames (H, W, 3) of something that moves, each with its number in the cells of its top."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    still = coarse.repeat(8, 0).repeat(8, 1)
    frames = []
    for number in range(first, first + count):
        frame = np.roll(still, (number, 2 * number), (0, 1)).copy()
        for bit in range(BITS):
            frame[:CELL, bit * CELL : (bit + 1) * CELL] = 255 * (number >> bit & 1)
        frames.append(frame)
    return frames


def number_of(frame):
    """The number that a frame (H, W, 3) of any size carries."""
    scale = frame.shape[1] / WIDTH
    places = [int(scale * (bit + 0.5) * CELL) for bit in range(BITS)]
    row = frame[int(scale * CELL / 2)]
    return sum(int(row[place].mean() > 127) << bit for bit, place in enumerate(places))


def write_video(
    path,
    frames=24,
    *,
    codec="libx264",
    container=None,
    gop=12,
    pixels="yuv420p",
    times=None,
    options=None,
):
    """A video file; frames are a number of them or arrays (H, W, 3), shown at times (milliseconds)
    or 25 a second; options are those of the codec."""
    import av

    frames = numbered(frames) if isinstance(frames, int) else frames
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, 2
        stream.codec_context.bit_rate = 2_000_000
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            if times is not None:
                picture.pts, picture.time_base = int(times[number]), Fraction(1, 1000)
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
    return path


def write_frames(folder, frames):
    """A folder of frames, named by their number without leading zeros."""
    from PIL import Image

    frames = numbered(frames) if isinstance(frames, int) else frames
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    return folder


def write_sound(path):
    """A file with a sound and no picture."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        samples = np.zeros((1, 1024), np.float32)
        for place in range(8):
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * place
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


SIDE = 24
ENCODER = Preprocess(SIDE, 0.875, "bilinear", (0.4,) * 3, (0.2,) * 3, fixed_size=False)


def resolved(policy="default_2d_1", **kwargs):
    """The policies of images for frames of SIDE pixels."""
    aug = ImageAugmentation(train_policy=policy, train_kwargs=ImageKwargs(**kwargs))
    return resolve_augmentation(
        aug,
        default_policies=("default_2d_2", "shared_default_2d"),
        encoder=ENCODER,
        channels=3,
        native_size=None,
    )
