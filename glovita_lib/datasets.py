"""The named data sets, and how the data set of a spec is built."""

import hashlib
import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib import data_features, data_folder  # noqa: F401  register their builders
from glovita_lib.data import ArraySource, Data, Split, read_data_set, refuse_fold, subset
from glovita_lib.data_splits import FRACTION, VAL, draw_stratified, strata
from glovita_lib.dist import hash_seed
from glovita_lib.errors import UserError, call_target
from glovita_lib.spec_data import BaseData, Cifar10Data, Cifar100Data, CustomData, DigitsData

# ------------------------------------------------------------------------------------- CIFAR
#
# CIFAR-10 and CIFAR-100 in torchvision's on-disk format.
#
# M images of a file.


@dataclass(frozen=True, slots=True)
class Cifar:
    """Files of one of the two data sets: md5 sums are those of the published archives."""

    name: str
    torchvision_class: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: str
    names_key: str  # in the meta file
    labels_key: str
    classes: int


CIFAR10 = Cifar(
    name="cifar10",
    torchvision_class="CIFAR10",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta="batches.meta",
    names_key="label_names",
    labels_key="labels",
    classes=10,
)
CIFAR100 = Cifar(
    name="cifar100",
    torchvision_class="CIFAR100",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta="meta",
    names_key="fine_label_names",
    labels_key="fine_labels",
    classes=100,
)


@read_data_set.register
def _(spec: Cifar10Data, *, seed: int) -> Data:
    return read_cifar(spec, CIFAR10, seed)


@read_data_set.register
def _(spec: Cifar100Data, *, seed: int) -> Data:
    return read_cifar(spec, CIFAR100, seed)


def read_cifar(spec: Cifar10Data | Cifar100Data, files: Cifar, seed: int) -> Data:
    """The data set with a val split held out of the training images, or, with val_fraction 0, with
    the test images as val."""
    refuse_fold(spec, f"data set {files.name} has one split (val follows the seed)")
    fetch_files(spec, files)
    folder = Path(spec.data_root_dir) / files.folder
    report: list[str] = []
    names = cifar_class_names(folder, files)
    train, test = (read_batches(folder, part, files, report) for part in (files.train, files.test))
    labels = strata(train[1], "multiclass", kept=spec.stratified)
    count = round(len(labels) * spec.val_fraction)
    val, rest = draw_stratified(labels, count, seed=hash_seed(seed, VAL), keep="rest")
    tested = cifar_split("test", *test, np.arange(len(test[1])))
    if not spec.val_fraction:
        report.append("the test images are the val split too (data.val_fraction = 0)")
    return Data(
        name=files.name,
        splits={
            "train": cifar_split("train", *train, rest),
            "val": cifar_split("train", *train, val) if spec.val_fraction else tested,
            "test": tested,
        },
        subtask="multiclass",
        class_names=names,
        channels=3,
        bit_depth=8,
        report=report,
    )


def cifar_split(part: str, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Split:
    """Rows of the training or test images."""
    return Split([f"{part}/{row}" for row in rows], labels[rows], ArraySource(images, rows))


def fetch_files(spec: Cifar10Data | Cifar100Data, files: Cifar) -> None:
    """Download the data set where it is missing.

    Raises:
        UserError: it is missing and cannot be, or must not be, downloaded.
    """
    root = Path(spec.data_root_dir)
    wanted = [*files.train, *files.test, files.meta]
    missing = [name for name in wanted if not (root / files.folder / name).is_file()]
    if not missing:
        return
    why = "data.download = false"
    if spec.download:
        import torchvision

        try:
            getattr(torchvision.datasets, files.torchvision_class)(root, download=True)
            return
        except (OSError, RuntimeError) as error:  # no network, no space, a broken archive
            why = " ".join(str(error).split())
    raise UserError(
        f"{root / files.folder}: {', '.join(missing)} missing and not downloaded ({why}); unpack"
        f" {files.name.replace('cifar', 'cifar-')}-python.tar.gz from"
        f" https://www.cs.toronto.edu/~kriz/cifar.html in {root} or set data.data_root_dir"
    )


# ---------------------------------------------------------------------- files


class PlainUnpickler(pickle.Unpickler):
    """Unpickles arrays, containers and numbers, and nothing that could run code."""

    ALLOWED = frozenset(
        (f"numpy{core}.multiarray", "_reconstruct") for core in (".core", "._core")
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path: Path, keys: Iterable[str], md5: str | None, report: list[str]) -> dict:
    """Content of a file; a file that is not the published one is reported.

    Raises:
        UserError: it cannot be read or lacks one of the keys.
    """
    data = path.read_bytes()
    if md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        report.append(f"{path} is not the published file (its md5 sum differs)")
    try:
        content = PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
        missing = [key for key in keys if key not in content]
    except Exception as error:  # unpickling broken bytes raises anything
        raise UserError(f"{path}: broken file ({error}); delete it and download again") from error
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)} in it; delete it and download again")
    return content


def read_batches(
    folder: Path, parts: dict[str, str], files: Cifar, report: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Images (M, 3, 32, 32) uint8 and labels (M,) int64 of several files.

    Raises:
        UserError: a file is broken or holds something else.
    """
    images, labels = [], []
    for name, md5 in parts.items():
        path = folder / name
        content = read_pickle(path, ("data", files.labels_key), md5, report)
        data, found = content["data"], np.asarray(content[files.labels_key])
        shaped = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2
        if not shaped or data.shape != (len(found), 3072) or found.dtype.kind not in "iu":
            raise UserError(f"{path}: expected data (M, 3072) uint8 and M whole-number labels")
        if len(found) and (found.min() < 0 or found.max() >= files.classes):
            raise UserError(
                f"{path}: labels {found.min()} to {found.max()}, expected 0 to {files.classes - 1}"
            )
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(found.astype(np.int64))
    return np.concatenate(images), np.concatenate(labels)


def cifar_class_names(folder: Path, files: Cifar) -> tuple[str, ...]:
    """Names of the classes.

    Raises:
        UserError: the meta file is broken or names another number of classes.
    """
    path = folder / files.meta
    names = tuple(read_pickle(path, (files.names_key,), None, [])[files.names_key])
    if len(names) != files.classes:
        raise UserError(f"{path}: {len(names)} class names, expected {files.classes}")
    return names


# ---------------------------------------------------------------------------------- building
#
# Data sets from their Structs: one registered builder per member of the union in spec_data.
#
# M samples of a whole data set.

DIGITS_TEST_SEED = 0


def build_data(spec: BaseData, *, seed: int, trains: bool = True) -> Data:
    """The data set of a spec with all its splits; data_fraction has cut the train split.

    Args:
        trains: whether there must be a train split.

    Raises:
        UserError: what is missing, broken or contradictory, all of a kind at once.
    """
    data = read_data_set(spec, seed=seed)
    empty = [name for name, split in data.splits.items() if not len(split)]
    if empty or (trains and "train" not in data.splits):
        what = f"the {' and the '.join(empty)} split has no sample" if empty else "no train split"
        raise UserError(f"data set {data.name}: {what} (data.data_root_dir = {spec.data_root_dir})")
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
    labels = strata(train.targets, subtask, kept=spec.stratified)
    rows, _ = draw_stratified(labels, count, seed=hash_seed(seed, FRACTION), keep="drawn")
    return subset(train, rows)


# ---------------------------------------------------------------------- digits


@read_data_set.register
def _(spec: DigitsData, *, seed: int) -> Data:
    """Digits: values 0..16 become round(v 255 / 16)."""
    from sklearn.datasets import load_digits

    refuse_fold(spec, "data set digits has one split (val follows the seed)")
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (M, 1, 8, 8)
    labels = digits.target.astype(np.int64)
    rows = held_out(labels, spec, seed)
    return Data(
        name="digits",
        splits={name: array_split(images, labels, rows[name]) for name in rows},
        subtask="multiclass",
        class_names=tuple(str(name) for name in digits.target_names),
        channels=1,
        bit_depth=8,
    )


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
def _(spec: CustomData, *, seed: int) -> Data:
    """The user's own function."""
    data = call_target("data", spec.target, spec, seed, **spec.options)
    if not isinstance(data, Data):
        raise UserError(
            f'data.target = "{spec.target}" returned {type(data).__name__}, expected'
            " glovita_lib.datasets.Data"
        )
    return data
