"""Rate of mode extract against the bare forward passes of the same encoder.

    python benchmarks/extract.py [--images 2000] [--repeats 5] [--type vit_tiny_patch16_224]

Images are JPEG files of 256 pixels cut from real photos. "forward" runs the encoder on ready
normalised batches and copies the vectors to the host; "extract" is the whole mode: reading the
data set, building the model, hashing its weights, decoding, transform, forward, blocks on disk, the
finished HDF5 file; "steady" is the same without the start, from the first block on. All run with
the same number of threads, alternating; on few cores decoding takes its share of them, so
"decoding" gives the time that it needs alone in one process.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import glovita
from glovita_lib.spec_check import load_checked

SPEC = """
mode = "extract"
[data]
dataset = "generic_image_dataset"
data_root_dir = "{folder}"
split_source = "subdirs"
label_source = "folder"
[model.encoder]
encoder_type = "timm"
type = "{type}"
pretrained = false
[extract]
source = "encoder"
split = "train"
output_dir = "{folder}/features"
[dataloading]
eval_batch_size = 64
num_workers = {workers}
[logger]
backend = "none"
"""


def write_images(folder: Path, count: int) -> None:
    """JPEG crops of real photos, two classes, and a val split of two images."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    photos = load_sample_images().images
    for number in range(count + 2):
        photo = photos[number % len(photos)]
        y, x = (draw.integers(side - 256) for side in photo.shape[:2])
        split = "train" if number < count else "val"
        path = folder / "images" / split / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[y : y + 256, x : x + 256]).save(path, quality=90)


def forward_seconds(spec: Path, images: int) -> float:
    """Seconds of the forward passes alone."""
    from glovita_lib import dist
    from glovita_lib.run_extract import source_of

    loaded = load_checked(spec)
    with dist.session() as ranks:
        experiment, _ = source_of(loaded, ranks)
        model, size = experiment.model.eval(), experiment.resolved.inputs.shape[-1]
        batches = [torch.randn(64, 3, size, size) for _ in range(2)]
        started = time.perf_counter()
        with torch.no_grad():
            for number in range(-(-images // 64)):
                count = min(64, images - 64 * number)
                model.embed(batches[number % 2][:count], model.aggregation).half().cpu()
        return time.perf_counter() - started


def extract_seconds(spec: Path, folder: Path) -> tuple[float, float]:
    """Seconds of the whole mode, and from the first block to the finished file."""
    from glovita_lib.run_extract import Job

    for path in (folder / "features").glob("*"):
        path.unlink()
    begun, run = [], Job.run

    def noted(job: Job) -> None:
        begun.append(time.perf_counter())
        run(job)

    started = time.perf_counter()
    with redirect_stdout(StringIO()), patch.object(Job, "run", noted):
        code = glovita.main([str(spec)])
    assert code == 0
    ended = time.perf_counter()
    return ended - started, ended - begun[0]


def decode_seconds(folder: Path) -> float:
    """Seconds to decode all images in one process."""
    from glovita_lib.read_image import read_image

    paths = sorted((folder / "images" / "train").rglob("*.jpg"))
    started = time.perf_counter()
    for path in paths:
        read_image(str(path), channels=3, bit_depth=8)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--type", default="vit_tiny_patch16_224")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, asked.images)
        spec = folder / "spec.toml"
        spec.write_text(SPEC.format(folder=folder, type=asked.type, workers=asked.workers))
        rounds = []
        for _ in range(asked.repeats + 1):
            rounds.append((forward_seconds(spec, asked.images), *extract_seconds(spec, folder)))
        # the first round warms up
        floor, total, steady = map(statistics.median, zip(*rounds[1:], strict=True))
        threads = torch.get_num_threads()
        print(
            f"{asked.images:,} images, {asked.type}, {threads} threads, medians of {asked.repeats}"
        )
        print(f"  forward   {asked.images / floor:8,.1f} images/s")
        for name, seconds in (("extract", total), ("steady", steady)):
            rate = f"{asked.images / seconds:8,.1f} images/s"
            print(f"  {name:<9} {rate}, {floor / seconds:.2f} of forward")
        print(f"  decoding  {decode_seconds(folder) / floor:8.2f} of the forward time, one process")


if __name__ == "__main__":
    main()
