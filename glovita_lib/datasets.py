"""The named data sets, and how the data set of a spec is built."""

import gzip
from collections.abc import Sequence
from http.client import HTTPException
from importlib import resources
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glovita_lib.data import (
    ArraySource,
    Asked,
    Data,
    ImageSamples,
    Outputs,
    Source,
    Split,
    read_data_set,
    subset,
)
from glovita_lib.data_splits import FRACTION, VAL, draw_stratified, strata
from glovita_lib.dist import hash_seed
from glovita_lib.errors import UserError, call_target
from glovita_lib.spec_conditions import section_problems
from glovita_lib.spec_data import Cifar10Data, Cifar100Data, DigitsData, OwnData
from glovita_lib.spec_samples import BaseData, OnlyPrediction

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

# ------------------------------------------------------------------------------------- CIFAR
#
# CIFAR-10 and CIFAR-100, checked, read and downloaded by torchvision.
#
# M images.


@read_data_set.register
def _(spec: Cifar10Data, *, seed: int, asked: Asked) -> Data:
    return read_cifar(spec, "cifar10", seed)


@read_data_set.register
def _(spec: Cifar100Data, *, seed: int, asked: Asked) -> Data:
    return read_cifar(spec, "cifar100", seed)


def read_cifar(spec: Cifar10Data | Cifar100Data, name: str, seed: int) -> Data:
    """The data set with a val split held out of the training images, or, with val_fraction 0, with
    the test images as val."""
    train, test = open_cifar(spec, name)
    labels = strata(np.array(train.targets), "multiclass", kept=spec.stratified)
    count = round(len(labels) * spec.val_fraction)
    val, rest = draw_stratified(labels, count, seed=hash_seed(seed, VAL), keep="rest")
    tested = cifar_split("test", test, np.arange(len(test)))
    shared = "the test images are the val split too (data.val_fraction = 0)"
    return Data(
        name=name,
        splits={
            "train": cifar_split("train", train, rest),
            "val": cifar_split("train", train, val) if spec.val_fraction else tested,
            "test": tested,
        },
        subtask="multiclass",
        class_names=tuple(train.classes),
        samples=ImageSamples(channels=3, bit_depth=8),
        report=[] if spec.val_fraction else [shared],
    )


def cifar_split(part: str, images: "CIFAR10", rows: np.ndarray) -> Split:
    """Rows of the training or test images."""
    targets = np.array(images.targets, np.int64)[rows]
    pixels = images.data.transpose(0, 3, 1, 2)  # (M, 3, 32, 32) uint8, as the files hold them
    return Split([f"{part}/{row}" for row in rows], targets, ArraySource(pixels, rows))


def open_cifar(spec: Cifar10Data | Cifar100Data, name: str) -> tuple["CIFAR10", "CIFAR10"]:
    """torchvision's training and test images, from files whose md5 sums are the published ones.

    Raises:
        UserError: files are missing and cannot be, or must not be, downloaded; or are damaged.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind, root = getattr(datasets, name.upper()), Path(spec.data_root_dir)
    folder = root / kind.base_folder
    md5 = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
    missing = [file for file in md5 if not (folder / file).is_file()]
    why = "data.download = false"
    try:
        if missing and spec.download:
            kind(root, download=True)
        if spec.download or not missing:
            return kind(root, train=True), kind(root, train=False)
    except (OSError, RuntimeError, HTTPException) as error:
        why = " ".join(str(error).split())
    if missing:
        raise UserError(
            f"{folder}: {', '.join(missing)} missing and not downloaded ({why}); unpack"
            f" {kind.filename} from https://www.cs.toronto.edu/~kriz/cifar.html in {root} or set"
            " data.data_root_dir"
        )
    damaged = [file for file in md5 if not check_integrity(folder / file, md5[file])]
    raise UserError(
        f"{folder}: {', '.join(damaged) or why}: not as published (the md5 sum differs); delete the"
        " folder to have it downloaded again (data.download = true)"
    )


# ---------------------------------------------------------------------------------- building
#
# The data set of a spec, and those that need no module of their own.
#
# M samples of a whole data set.

DIGITS_TEST_SEED = 0


def build_data(
    spec: BaseData,
    *,
    seed: int,
    trains: bool = True,
    trained: Outputs | None = None,
    wanted: Sequence[str] | None = None,
    predicts: OnlyPrediction | None = None,
) -> Data:
    """The data set of a spec with the splits that are needed; data_fraction has cut the train
    split.

    Args:
        trains: whether a model learns from it: there must be a train split, and labels.
        trained, wanted, predicts: see `Asked`.

    Raises:
        UserError: what is missing, broken or contradictory, all of a kind at once.
    """
    missing = [f"data.{name}: {text}" for name, text in spec.missing_files()]
    if problems := [*section_problems(spec, "data."), *missing]:
        raise UserError("\n".join(problems))
    data = read_data_set(spec, seed=seed, asked=Asked(trained, wanted, predicts))
    empty = [name for name, split in data.splits.items() if not len(split)]
    if empty or (trains and "train" not in data.splits):
        what = f"the {' and the '.join(empty)} split has no sample" if empty else "no train split"
        raise UserError(f"data set {data.name}: {what} (data.data_root_dir = {spec.data_root_dir})")
    unlabelled = [name for name, split in data.splits.items() if split.targets is None]
    if trains and unlabelled:
        raise UserError(
            f"data set {data.name}: the {' and the '.join(unlabelled)} split has no labels, which"
            ' mode = "train" needs of every split: give the targets, or leave the split out'
        )
    train = data.splits.get("train")
    if train is not None and spec.data_fraction < 1:
        data.splits["train"] = cut_fraction(train, spec, data.subtask, seed)
        data.report.append(
            f"train split cut to {len(data.splits['train'])} of {len(train)} samples"
            f" (data.data_fraction = {spec.data_fraction:g})"
        )
    return data


def cut_fraction(train: Split, spec: BaseData, subtask: str, seed: int) -> Split:
    """The share data_fraction of the train split; a smaller share of the same seed is taken from
    the same random order."""
    count = max(1, round(len(train) * spec.data_fraction))
    labels = np.zeros(len(train), np.int64)
    if train.targets is not None:
        labels = strata(train.targets, subtask, kept=spec.stratified)
    rows, _ = draw_stratified(labels, count, seed=hash_seed(seed, FRACTION), keep="drawn")
    return subset(train, rows)


# ---------------------------------------------------------------------- digits


@read_data_set.register
def _(spec: DigitsData, *, seed: int, asked: Asked) -> Data:
    """Digits: values 0..16 become round(v 255 / 16)."""
    table = read_digits()
    images = np.rint(table[:, :64].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = table[:, 64].astype(np.int64)
    rows = held_out(labels, spec, seed)
    return Data(
        name="digits",
        splits={name: array_split(images, labels, rows[name]) for name in rows},
        subtask="multiclass",
        class_names=tuple("0123456789"),
        samples=ImageSamples(channels=1, bit_depth=8),
    )


def read_digits() -> np.ndarray:
    """The table (M, 65) float64 behind sklearn.datasets.load_digits: 8x8 values 0..16, the digit.

    The package is found but not imported, which takes seconds.

    Raises:
        UserError: there is no scikit-learn.
    """
    package = find_spec("sklearn")
    if package is None:
        raise UserError('data.dataset = "digits" is in scikit-learn: pip install scikit-learn')
    folder = resources.files(module_from_spec(package))
    file = folder / "datasets" / "data" / "digits.csv.gz"
    with file.open("rb") as packed, gzip.open(packed) as text:
        return np.loadtxt(text, delimiter=",")


def held_out(labels: np.ndarray, spec: DigitsData, seed: int) -> dict[str, np.ndarray]:
    """Rows of the splits; val and test are shares of all samples, val is drawn from the seed.

    Raises:
        UserError: nothing is left to train on.
    """
    count = len(labels)
    val_count, test_count = round(count * spec.val_fraction), round(count * spec.test_fraction)
    if val_count + test_count >= count or not val_count or not test_count:
        raise UserError(
            f"data.val_fraction = {spec.val_fraction:g} and data.test_fraction ="
            f" {spec.test_fraction:g} leave a split of the {count} digits empty: their sum must be"
            " below 1 and each of them a sample at least"
        )
    groups = labels if spec.stratified else np.zeros_like(labels)
    test, rest = draw_stratified(groups, test_count, seed=DIGITS_TEST_SEED, keep="rest")
    val, train = draw_stratified(groups[rest], val_count, seed=hash_seed(seed, VAL), keep="rest")
    return {"train": rest[train], "val": rest[val], "test": test}


def array_split(samples: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> Split:
    """A split of an array in memory; the ids are the rows of the array."""
    return Split([str(row) for row in rows], targets[rows], ArraySource(samples, rows))


# ---------------------------------------------------------------------- custom


@read_data_set.register
def _(spec: OwnData, *, seed: int, asked: Asked) -> Data:
    """The user's own function."""
    data = call_target("data", spec.target, spec, seed, **spec.options)
    if not isinstance(data, Data):
        raise UserError(
            f'data.target = "{spec.target}" returned {type(data).__name__}, expected'
            " glovita_lib.data.Data"
        )
    if spec.samples not in ("either", data.samples.spec_kind):
        raise UserError(
            f'data.target = "{spec.target}" returned {data.samples.kind}, and data.dataset ='
            f' "{spec.__struct_config__.tag}" takes {spec.samples}: set it to "custom"'
        )
    for name, split in data.splits.items():
        if not isinstance(split.source, Source):
            raise UserError(
                f'data.target = "{spec.target}": the source of the split {name} is of'
                f" {type(split.source).__name__}, which must derive from glovita_lib.data.Source"
            )
    return data
