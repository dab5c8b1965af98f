"""Bag files whose planted instances alone tell the class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import nn

CLASSES = ("none", "left", "right")
WIDTH = 16


@dataclass(frozen=True)
class Planted:
    """Bags by split, and the data section of a spec that reads them."""

    folder: Path
    bags: dict[str, dict[str, Any]]

    @property
    def overrides(self) -> list[str]:
        """What makes a spec read them."""
        files = [f"data.{name}_features_file={name}.h5" for name in self.bags]
        return [f"data.data_root_dir={self.folder}", *files]


def plant(folder: Path, *, sizes: dict[str, int], coords: bool = True) -> Planted:
    """Write the bags of some splits: 12 to 40 instances of noise, of which in two thirds of the
    bags two to six are shifted along one of two directions, which is the class."""
    bags = {}
    for number, (split, count) in enumerate(sizes.items()):
        generator = np.random.default_rng(number)
        labels = np.arange(count) % len(CLASSES)
        lengths = generator.integers(12, 41, count)
        ptr = np.concatenate([[0], np.cumsum(lengths)])
        features = generator.normal(size=(ptr[-1], WIDTH)).astype(np.float32)
        planted = np.zeros(ptr[-1], bool)
        for start, length, label in zip(ptr, lengths, labels, strict=False):
            if label:
                chosen = start + generator.choice(length, generator.integers(2, 7), replace=False)
                planted[chosen] = True
                features[chosen, (label - 1) * 3 : label * 3] += 4.0
        tables = {"features": features, "bag_ptr": ptr, "labels": labels}
        if coords:
            place = np.arange(ptr[-1]) - np.repeat(ptr[:-1], lengths)
            tables["coords"] = np.stack([place % 6, place // 6], 1) * 256
        ids = [f"{split}/{b}" for b in range(count)]
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for name, values in tables.items():
                file[name] = values
            file["ids"] = np.array(ids, h5py.string_dtype())
            if coords:
                names = [f"{split}/{row}.png" for row in range(ptr[-1])]
                file["instance_ids"] = np.array(names, h5py.string_dtype())
            file.attrs["class_names"] = list(CLASSES)
        bags[split] = tables | {"ids": ids, "planted": planted, "lengths": lengths}
    return Planted(folder, bags)


def recall(attention: np.ndarray, bags: dict[str, Any]) -> float:
    """Share of the planted instances among as many with the highest attention, mean over the bags
    that have some; of several branches (M, K) that of the bag's class."""
    found = []
    for b, label in enumerate(bags["labels"]):
        rows = slice(bags["bag_ptr"][b], bags["bag_ptr"][b + 1])
        planted = bags["planted"][rows]
        if planted.any():
            branch = label if attention.shape[1] > 1 else 0
            top = np.argsort(-attention[rows, branch])[: planted.sum()]
            found.append(planted[top].mean())
    return float(np.mean(found))


def vector_encoder(input_channels: int) -> nn.Module:
    """An encoder of one vector an image, without tokens."""
    return nn.Sequential(nn.Flatten(), nn.Linear(input_channels * 64, 8))
