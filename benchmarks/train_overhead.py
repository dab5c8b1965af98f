"""Training: one epoch of the real train mode against its floor and against two usual ways.

    python benchmarks/train_overhead.py [--images 10000] [--runs 5] [--threads N] [--width 16]
    python -m pip install lightning    # to have it compared too; nothing else needs it

Files in CIFAR-10's format of 32x32 crops from scikit-learn's two photographs (the class is the
fifth of the photograph that a crop comes from), batches of 128, SGD. The network is timm's
resnet10t with its stem of stride 4 and a quarter of its channels: so light (0.3 ms of one core per
image and training step) that transforming single images (0.2 ms) takes nearly as long, the case
where the input pipeline counts; heavier networks bring all ratios nearer to 1. One epoch is, in
every row, the training batches and one evaluation of the held-out images (a tenth as many). Rows
alternate within one process after a round that is not counted; numbers are medians, ratios medians
over the rounds.

- floor: the network and optimizer in a bare loop over ready float batches; nothing is logged
- glovita: mode train on the data set held in memory: augmentation, metrics, step and epoch records,
  last.pt and best.pt written to disk; timed from the first batch to the last file
- per sample: the bare loop, fed by torchvision's CIFAR10 and transforms of single PIL images in a
  DataLoader with 2 persistent workers, started before
- Lightning: its Trainer with CSV logger and checkpoint, on the ready batches and on those loaders

CPU seconds are those of the process and its workers: they hardly change when others use the
machine. RandAugment of both pipelines is 2 operations on every sample.
"""

import argparse
import contextlib
import importlib.util
import io
import logging
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import glovita
from glovita_lib import run_train
from glovita_lib.data import ArraySource, Data, ImageSamples, Split
from glovita_lib.spec_check import load_checked
from glovita_lib.spec_data import CustomData
from glovita_lib.trainer import Trainer

Batches = Iterable[tuple[Tensor, Tensor]]
Times = tuple[float, float]  # wall and CPU seconds
Epoch = Callable[[], Times]
BATCH, CLASSES, SIDE, FILES, WORKERS = 128, 10, 32, 5, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOOR_TARGET, SAMPLE_TARGET = 1.05, 1.7
SGD = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "nesterov": True,
    "fused": True,
}
SPEC = """
[data]
dataset = "custom"
target = "train_overhead:read_images"
data_root_dir = "{folder}"

[data.augmentation]
train_policy = "{policy}"
test_policy = "default"

[data.augmentation.train_kwargs]
{kwargs}

[model.encoder]
encoder_type = "timm"
type = "resnet10t"
pretrained = false
model_kwargs = {{ channels = {channels}, stem_width = {stem} }}

[task]
{task}

[training]
epochs = 1
on_existing = "overwrite"

[dataloading]
batch_size = 128

[optimizer]
name = "SGD"
lr = 0.1
weight_decay = 5e-4
nesterov = true

[logger]
backend = "none"
"""
POLICIES: dict[str, tuple[str, list[Any]]] = {  # parameters of ours, operations of torchvision
    "baseline": ("", []),
    "randaugment": (
        "cutout_size = 0\nrandaugment_p = 1.0\nrandaugment_magnitude = [3, 3]",
        [transforms.RandAugment(num_ops=2, magnitude=9)],  # of 30, so 3 of our 10
    ),
}


# ---------------------------------------------------------------------- data


def write_images(folder: Path, count: int) -> None:
    """CIFAR-10 files with `count` training images and a tenth as many test images."""
    from sklearn.datasets import load_sample_images

    rng, photos = np.random.default_rng(0), load_sample_images().images
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    parts = {f"data_batch_{i + 1}": count // FILES for i in range(FILES)}
    for name, size in {**parts, "test_batch": count // 10}.items():
        labels = rng.integers(CLASSES, size=size)
        data = np.stack([crop(photos[label // 5], label % 5, rng) for label in labels])
        write(folder, name, {"data": data, "labels": labels.tolist()})
    write(folder, "batches.meta", {"label_names": [f"part_{i}" for i in range(CLASSES)]})


def crop(photo: np.ndarray, fifth: int, rng: np.random.Generator) -> np.ndarray:
    """A window (3072,) out of one fifth of the photo's width, channel by channel as in CIFAR."""
    height, width = photo.shape[:2]
    x = rng.integers(fifth * width // 5, (fifth + 1) * width // 5 - SIDE)
    y = rng.integers(height - SIDE)
    return photo[y : y + SIDE, x : x + SIDE].transpose(2, 0, 1).reshape(-1)


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    """One file of the data set."""
    (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))


class Unpublished(datasets.CIFAR10):
    """torchvision's CIFAR10 over files with other check sums."""

    train_list: ClassVar = [[f"data_batch_{i + 1}", None] for i in range(FILES)]
    test_list: ClassVar = [["test_batch", None]]
    meta: ClassVar = {"filename": "batches.meta", "key": "label_names", "md5": None}


def read_images(spec: CustomData, seed: int) -> Data:
    """The data set of the glovita rows; the test images are the val split too."""
    splits = {}
    for name, train in (("train", True), ("val", False), ("test", False)):
        images = Unpublished(spec.data_root_dir, train=train)
        pixels, rows = images.data.transpose(0, 3, 1, 2), np.arange(len(images))
        splits[name] = Split(
            [str(row) for row in rows], np.array(images.targets), ArraySource(pixels, rows)
        )
    names, samples = tuple(images.classes), ImageSamples(channels=3, bit_depth=8)
    return Data("crops", splits, "multiclass", names, samples)


def sample_loader(folder: Path, *, train: bool, extra: list[Any]) -> DataLoader:
    """The usual pipeline: transforms of one PIL image after the other."""
    moves = [
        transforms.RandomCrop(SIDE, padding=4),
        transforms.RandomHorizontalFlip(),
        *extra,
    ]
    ends = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    chain = transforms.Compose([*(moves if train else []), *ends])
    return DataLoader(
        Unpublished(folder, train=train, transform=chain),
        batch_size=BATCH,
        shuffle=train,
        num_workers=WORKERS,
        persistent_workers=True,
    )


@dataclass(frozen=True, slots=True)
class Ready:
    """Batches as they are, in a type that Lightning does not take for a list of loaders."""

    batches: list[tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


# ---------------------------------------------------------------------- clocks


def now() -> Times:
    """Wall clock, and processor time of this process and of its workers, dead or alive."""
    own = os.times()
    cpu = sum(own[:4])
    for worker in multiprocessing.active_children():
        stat = Path(f"/proc/{worker.pid}/stat")
        if stat.is_file():  # Linux
            fields = stat.read_text().rsplit(")", 1)[1].split()
            cpu += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), cpu


def since(start: Times) -> Times:
    """Seconds since then."""
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


# ---------------------------------------------------------------------- rows


def network(width: int) -> nn.Module:
    """The network of SPEC, from timm alone."""
    return timm.create_model("resnet10t", num_classes=CLASSES, **network_arguments(width))


def network_arguments(width: int) -> dict[str, Any]:
    """Arguments of timm.create_model."""
    channels = tuple(width * 2**stage for stage in range(4))
    return {"channels": channels, "stem_width": width // 2}


def bare_epoch(width: int, train: Batches, val: Batches) -> Epoch:
    """A training loop of a few lines."""

    def epoch() -> Times:
        torch.manual_seed(0)
        model = network(width)
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        start = now()
        model.train()
        for x, y in train:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in val)
        assert right >= 0
        return since(start)

    return epoch


def write_spec(folder: Path, policy: str, width: int, task: str) -> Path:
    """The spec of the glovita row."""
    path = folder / f"{policy}_{'quiet' if task else 'default'}.toml"
    text = SPEC.format(
        folder=folder,
        policy=policy,
        kwargs=POLICIES[policy][0],
        channels=list(network_arguments(width)["channels"]),
        stem=width // 2,
        task=task,
    )
    path.write_text(f'exp_dir = "{folder}/experiments"\n{text}')
    return path


def glovita_epoch(folder: Path, policy: str, width: int) -> Epoch:
    """Mode train; final results without plots and intervals, which are not part of an epoch."""
    spec = write_spec(folder, policy, width, 'result_plot = "none"\nbootstrap = 0')
    times: list[Times] = []
    fit = Trainer.fit

    def timed(trainer: Trainer) -> None:
        start = now()
        fit(trainer)
        times.append(since(start))

    def epoch() -> Times:
        with (
            patch.object(Trainer, "fit", timed),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            run_train.run(load_checked(spec), dry_run=False)
        return times[-1]

    return epoch


def lightning_epoch(folder: Path, width: int, train: Batches, val: Batches) -> Epoch:
    """Lightning's Trainer with what it does by default, bar and summary left out."""
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network(width)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss, accuracy = self.measure(batch)
            self.log_dict({"train_loss": loss, "train_acc": accuracy}, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            loss, accuracy = self.measure(batch)
            self.log_dict({"val_loss": loss, "val_acc": accuracy}, batch_size=len(batch[1]))

        def measure(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, y = batch
            logits = self.model(x)
            return F.cross_entropy(logits, y), (logits.detach().argmax(1) == y).float().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), **SGD)

    def epoch() -> Times:
        torch.manual_seed(0)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(folder / "lightning"),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        module = Module()
        start = now()
        trainer.fit(module, train, val)
        return since(start)

    return epoch


def build_rows(
    folder: Path, policy: str, width: int, ready: tuple[Ready, Ready], *, peers: bool
) -> dict[str, Epoch]:
    """All rows of one policy; the ready batches do not depend on it."""
    loaders = tuple(
        sample_loader(folder, train=train, extra=POLICIES[policy][1]) for train in (True, False)
    )
    rows = {
        "floor": bare_epoch(width, *ready),
        "glovita": glovita_epoch(folder, policy, width),
        "per sample": bare_epoch(width, *loaders),
    }
    if peers:
        rows["Lightning, ready"] = lightning_epoch(folder, width, *ready)
        rows["Lightning, per sample"] = lightning_epoch(folder, width, *loaders)
    return rows


# ---------------------------------------------------------------------- measuring


def measure(rows: dict[str, Epoch], runs: int) -> dict[str, list[Times]]:
    """Wall and CPU seconds of each row; each round starts with another row."""
    names, results = list(rows), {name: [] for name in rows}
    for name in names:  # the first round starts workers, allocates and loads modules
        rows[name]()
    for turn in range(runs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            results[name].append(rows[name]())
    return results


def ratio(ours: list[Times], theirs: list[Times], which: int) -> float:
    """Median over the rounds of wall (0) or CPU (1) seconds of ours over theirs."""
    return statistics.median(a[which] / b[which] for a, b in zip(ours, theirs, strict=True))


def report(policy: str, results: dict[str, list[Times]], images: int) -> None:
    """A line per row and the two ratios that have a target."""
    floor, ours = results["floor"], results["glovita"]
    print(f"\npolicy {policy}")
    print(
        f"{'':22} {'seconds':>8} {'low..high':>12} {'samples/s':>10} {'x floor':>8}"
        f" {'CPU s':>7} {'x floor':>8}"
    )
    for name, pairs in results.items():
        wall, cpu = zip(*pairs, strict=True)
        middle, spread = statistics.median(wall), f"{min(wall):.2f}..{max(wall):.2f}"
        print(
            f"{name:22} {middle:8.2f} {spread:>12} {images / middle:10,.0f}"
            f" {ratio(pairs, floor, 0):8.2f} {statistics.median(cpu):7.2f}"
            f" {ratio(pairs, floor, 1):8.2f}"
        )
    print(f"glovita / floor: {ratio(ours, floor, 0):.3f} (target at most {FLOOR_TARGET})")
    gain = ratio(results["per sample"], ours, 0)
    print(f"per sample / glovita: {gain:.2f} (target at least {SAMPLE_TARGET})")


def whole_command(folder: Path, width: int) -> float:
    """Wall seconds of the command with that one epoch, final results, plots and intervals."""
    spec = write_spec(folder, "baseline", width, "")
    start = time.perf_counter()
    command = [sys.executable, glovita.__file__, str(spec)]
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]  # where read_images is
    settings["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    subprocess.run(command, check=True, capture_output=True, env=os.environ | settings)
    return time.perf_counter() - start


def has_lightning() -> bool:
    """Whether Lightning is there to be compared; its chatter is switched off."""
    if importlib.util.find_spec("lightning") is None:
        print("Lightning left out: python -m pip install lightning")
        return False
    import lightning  # noqa: F401  # sets its log level, so it comes before ours

    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return True


def main() -> None:
    """Write the images, measure each policy, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--runs", type=int, default=5, help="epochs of each row, at least 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--no-lightning", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = not options.no_lightning and has_lightning()
    parameters = sum(p.numel() for p in network(options.width).parameters())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder, options.images)
        loaders = (sample_loader(folder, train=train, extra=[]) for train in (True, False))
        ready = tuple(Ready([tuple(batch) for batch in loader]) for loader in loaders)
        count = sum(len(targets) for _, targets in ready[0])
        print(
            f"resnet10t with {network_arguments(options.width)['channels']} channels,"
            f" {parameters:,} parameters; {count:,} images 32x32 and"
            f" {count // 10:,} to evaluate, batches of {BATCH}; {options.threads} threads,"
            f" medians of {max(5, options.runs)} runs"
        )
        for policy in options.policies:
            rows = build_rows(folder, policy, options.width, ready, peers=peers)
            report(policy, measure(rows, max(5, options.runs)), count)
        print(f"\nwhole command with plots: {whole_command(folder, options.width):.1f} s")


if __name__ == "__main__":
    main()
