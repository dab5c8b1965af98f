"""Whole runs on tiny real data: the specs, the data, and how their results are read."""

import csv
import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A ViT of two blocks with dropout and no batch norm on 8x8 digits, 117 of them to train on.
TINY = """
mode = "train"
[data]
dataset = "digits"
data_fraction = 0.1
[data.augmentation]
image_size = 8
[model.encoder]
type = "test_vit"
pretrained = false
model_kwargs = { patch_size = 4, embed_dim = 16, depth = 2, num_heads = 2, proj_drop_rate = 0.1 }
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 2
[optimizer]
lr = 1e-3
[logger]
backend = "none"
"""

# A small network with batch norm.
RESNET = (
    TINY.replace("test_vit", "test_resnet")
    .replace("image_size = 8", "image_size = 16")
    .replace(TINY[TINY.index("model_kwargs") : TINY.index("[task]")], "")
)

FOLDERS = TINY.replace(
    'dataset = "digits"\ndata_fraction = 0.1\n',
    'dataset = "generic_image_dataset"\nsplit_source = "subdirs"\nlabel_source = "folder"\n'
    'channels = 1\ndata_root_dir = "ROOT"\n',
)

# Three files of feature vectors, to be followed by more of [data].
FEATURES = """
[model.encoder]
encoder_type = "precomputed"
[data]
dataset = "precomputed_features"
data_root_dir = "ROOT"
train_features_file = "train.h5"
val_features_file = "val.h5"
test_features_file = "test.h5"
"""

# Volumes of a table, see volume_files.write_labelled; to be followed by more of their preparation.
VOLUMES = """
[data]
dataset = "generic_3d_dataset"
data_root_dir = "ROOT"
label_source = "csv"
split_source = "csv"
[data.preparation]
workers = 1
"""

# One epoch and no figures.
EPOCH = """
[task]
result_plot = "none"
bootstrap = 0
[training]
epochs = 1
[dataloading]
batch_size = 4
[logger]
backend = "none"
"""


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, what it printed, and the run directory it was about."""

    code: int
    out: str
    err: str
    path: Path

    @property
    def best(self) -> dict[str, Any]:
        """The best checkpoint."""
        return load(self.path / "checkpoints" / "best.pt")

    @property
    def last(self) -> dict[str, Any]:
        """The last checkpoint."""
        return load(self.path / "checkpoints" / "last.pt")

    def records(self, event: str = "epoch") -> list[dict[str, Any]]:
        """Records of metrics.jsonl."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]

    def json(self, name: str) -> Any:
        """A JSON file of the run."""
        return json.loads((self.path / name).read_text())

    def rows(self, split: str = "test") -> list[dict[str, str]]:
        """Rows of a predictions file."""
        with open(self.path / f"predictions_{split}.csv", newline="") as file:
            return list(csv.DictReader(file))


def load(path: Path) -> dict[str, Any]:
    """A checkpoint."""
    from glovita_lib import checkpoint

    return checkpoint.load(path, map_location="cpu")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, and every folder; the spec that `command` writes
    is left out."""
    return {
        f"{path.relative_to(folder)}{'/' * path.is_dir()}": b""
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.name != "tiny.toml"
    }


# ---------------------------------------------------------------------- data


def digits(count: int) -> tuple[Any, Any]:
    """Real digits as uint8 images (N, 8, 8) and their labels (N,)."""
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images[:count] * (255 / 16)).astype(np.uint8)
    return images, data.target[:count]


def write_png(path: Path, image: Any, side: int | None = None) -> None:
    """An image as PNG, enlarged to a side in pixels if given."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image)
    if side is not None:
        picture = picture.resize((side, side))
    picture.save(path)


def one_layer(input_channels: int) -> Any:
    """A custom encoder: one convolution of the whole 8x8 image, a vector of 16 (B, 16, 1, 1)."""
    from torch import nn

    return nn.Sequential(nn.Conv2d(input_channels, 16, 8), nn.GELU())


def forgetful_layer(input_channels: int, uses: int) -> Any:
    """`one_layer` with weights "second" that only the first batches of training use."""
    from torch import nn

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = one_layer(input_channels), one_layer(input_channels)
            self.uses = uses

        def forward(self, images: Any) -> Any:
            found = self.first(images)
            if self.training:
                self.uses -= 1
            return found + self.second(images) if self.uses >= 0 else found

    return Forgetful()


def publish_cifar(
    monkeypatch: Any, root: Path, kind: Any, images: Any, labels: Any, names: list[str]
) -> None:
    """Write flat images (N, 3072) uint8, as many a file, below `root` in the published format, and
    let torchvision's `kind`, CIFAR10 or CIFAR100, know their md5 sums in place of the real ones."""
    import numpy as np

    lists = {
        part: [name for name, _ in getattr(kind, part)] for part in ("train_list", "test_list")
    }
    names_key, fine = kind.meta["key"], "fine_" if "fine" in kind.meta["key"] else ""
    files = [name for part in lists.values() for name in part]
    md5 = {}
    for name, rows in zip(files, np.array_split(np.arange(len(labels)), len(files)), strict=True):
        content = {"data": images[rows], f"{fine}labels": [int(labels[row]) for row in rows]}
        md5[name] = pickled(root / kind.base_folder / name, content)
    for part, found in lists.items():
        monkeypatch.setattr(kind, part, [[name, md5[name]] for name in found])
    meta = {"filename": kind.meta["filename"], "key": names_key}
    meta["md5"] = pickled(root / kind.base_folder / meta["filename"], {names_key: names})
    monkeypatch.setattr(kind, "meta", meta)


def pickled(path: Path, content: dict[str, Any]) -> str:
    """Write a Python 2 pickle, as CIFAR's files are; its md5 sum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
