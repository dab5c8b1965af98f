"""An epoch of linear training from feature files, as ratios to ready-made batches in memory.

    python benchmarks/features.py [--samples 100000] [--width 768] [--repeats 5]

Every variant feeds the same linear model, loss and optimizer. The floor iterates over float32
batches that lie in memory, shuffled beforehand. "memory" is glovita on a file that fits
`dataloading.in_memory_mb`, "windows" on one that is taken for larger than memory. The files are
smaller than memory, and after the first epoch the operating system has them in its page cache:
"windows" shows what reading and shuffling by windows costs, not the disk. "windows, cold" drops the
file from the page cache before each epoch, as far as the kernel lets an ordinary user, and so
depends on the disk (and on what a virtual machine's host keeps of it); where the first page stays
cached all the same (tmpfs, some network file systems) it is left out. "h5py a sample" is what most
code does: a map-style data set that reads a row by h5py, in a DataLoader with two workers; it runs
on a part of the samples, from the page cache, and its time is scaled up. Variants alternate;
medians.

The features are those of a random convolutional network on real images, so that compression has
what it has to do with in practice; the sizes of the files are printed beside the times.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from glovita_lib.data import Split
from glovita_lib.dist import Ranks
from glovita_lib.loader_features import build_feature_loader
from glovita_lib.read_features import VectorSource
from glovita_lib.read_hdf5 import DatasetRows
from glovita_lib.spec_train import Dataloading

CLASSES, BATCH = 100, 512
STORAGE = {
    "none": {},
    "lzf": {"compression": "lzf", "shuffle": True},
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
}
CHUNK_BYTES = 256 * 2**10

Batches = Iterator[tuple[Tensor, Tensor]]


def features(samples: int, width: int) -> np.ndarray:
    """(N, D) float16: a random network's activations on crops of real photos."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(p).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 5, 2), nn.ReLU(), nn.Conv2d(64, width, 3, 2), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width),
    )  # fmt: skip
    out = np.empty((samples, width), np.float16)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for start in range(0, samples, 256):
            stop = min(start + 256, samples)
            crops = []
            for _ in range(stop - start):
                photo = photos[generator.integers(len(photos))]
                y, x = (generator.integers(side - 24) for side in photo.shape[1:])
                crops.append(photo[:, y : y + 24, x : x + 24])
            out[start:stop] = net(torch.stack(crops)).half().numpy()
    return out


class PerSample(Dataset):
    """What most code does: one h5py read a sample, the file opened once a worker."""

    def __init__(self, path: Path, labels: Tensor, count: int) -> None:
        self.path, self.labels, self.count, self.file = path, labels, count, None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.file = self.file or h5py.File(self.path, "r")
        return torch.from_numpy(self.file["features"][row].astype(np.float32)), self.labels[row]


def epoch(batches: Batches, width: int) -> float:
    """Seconds of an epoch of a linear model."""
    torch.manual_seed(0)
    model = nn.Linear(width, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    started = time.perf_counter()
    for inputs, targets in batches:
        F.cross_entropy(model(inputs.float()), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def ours(path: Path, labels: Tensor, *, in_memory_mb: int) -> Callable[[], Batches]:
    """Batches of glovita's loader, a new epoch at each call."""
    rows = DatasetRows(path, "features", threads=torch.get_num_threads())
    split = Split([""] * len(rows), labels.numpy(), VectorSource(rows, np.arange(len(rows))))
    loader = build_feature_loader(
        split,
        Dataloading(in_memory_mb=in_memory_mb),
        fit=None,
        window_mb=64,
        train=True,
        seed=0,
        ranks=Ranks(0, 1, 0, torch.device("cpu")),
        batch_size=BATCH,
    )
    count = iter(range(10**9))
    return lambda: ((batch.inputs, batch.targets) for batch in loader.epoch(next(count)))


def drop(path: Path) -> bool:
    """Drop a file from the page cache -> whether its first page is out of it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet would stay
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:  # it would have to be read from the disk
            return True
        except OSError:  # a file system that cannot tell
            return False
    return False


def cold(path: Path, batches: Callable[[], Batches]) -> Callable[[], Batches]:
    """The batches with the file dropped from the page cache before each epoch."""

    def epoch_from_disk() -> Batches:
        drop(path)
        return batches()

    return epoch_from_disk


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--per-sample", type=int, default=4096, help="samples read one by one")
    parser.add_argument("--gzip-per-sample", type=int, default=512)
    asked = parser.parse_args()
    values = features(asked.samples, asked.width)
    labels = torch.randint(CLASSES, (asked.samples,))
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, options in STORAGE.items():
            paths[name] = Path(folder) / f"{name}.h5"
            chunk = max(1, CHUNK_BYTES // (2 * asked.width))
            if options:
                options = options | {"chunks": (chunk, asked.width)}
            with h5py.File(paths[name], "w") as file:
                file.create_dataset("features", data=values, **options)
        measure(asked, values, labels, paths)


def measure(
    asked: argparse.Namespace, values: np.ndarray, labels: Tensor, paths: dict[str, Path]
) -> None:
    """Alternate the variants and print their medians as ratios to the floor."""
    order = torch.randperm(len(labels))
    ready = [(torch.from_numpy(values)[rows].float(), labels[rows]) for rows in order.split(BATCH)]
    variants: dict[str, tuple[Callable[[], Batches], float]] = {
        "floor: ready float32 batches": (lambda: iter(ready), 1.0),
        "memory": (ours(paths["none"], labels, in_memory_mb=10**6), 1.0),
    }
    for name in STORAGE:
        windows = ours(paths[name], labels, in_memory_mb=0)
        variants[f"windows, {name}"] = (windows, 1.0)
        if drop(paths[name]):
            variants[f"windows, cold, {name}"] = (cold(paths[name], windows), 1.0)
    for name, count in (("none", asked.per_sample), ("gzip", asked.gzip_per_sample)):
        count = min(count, len(labels))
        loader = DataLoader(
            PerSample(paths[name], labels, count), BATCH, shuffle=True, num_workers=2
        )
        variants[f"h5py a sample, {name}"] = (loader.__iter__, len(labels) / count)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(asked.repeats + 1):
        for name, (batches, factor) in variants.items():
            seconds = epoch(batches(), asked.width) * factor
            if repeat:  # the first round warms caches up
                times[name].append(seconds)
    floor = statistics.median(times["floor: ready float32 batches"])
    print(f"{len(labels):,} x {asked.width} float16, {torch.get_num_threads()} threads,"
          f" medians of {asked.repeats}, floor {floor:.2f} s")  # fmt: skip
    for name, seconds in times.items():
        ratios = sorted(second / floor for second in seconds)
        print(
            f"  {name:<30} {statistics.median(ratios):8.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    print("  windows: files in the page cache; cold: dropped from it before each epoch")
    if not any("cold" in name for name in variants):
        print("  no cold variant: this file system keeps the files in its cache")
    raw = values.nbytes
    for name, path in paths.items():
        print(f"  size of the file, {name:<5} {path.stat().st_size / raw:.2f} of the raw numbers")


if __name__ == "__main__":
    main()
