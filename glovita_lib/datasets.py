"""Data sets from their Structs: one registered builder per member of the union in spec_data.

M samples of a whole data set.
"""

import numpy as np

from glovita_lib import datasets_cifar, datasets_folder, precomputed  # noqa: F401  their builders
from glovita_lib.dist import mix
from glovita_lib.plugins import call_target
from glovita_lib.samples import (
    ArraySource,
    Data,
    Source,
    Split,
    read_data,
    refuse_fold,
    subset,
)
from glovita_lib.spec import UserError
from glovita_lib.spec_data import BaseData, CustomData, DigitsData
from glovita_lib.splits import FRACTION, VAL, draw, strata
from glovita_lib.unlabelled import build_unlabelled

__all__ = ["Data", "Source", "Split", "build_data", "build_unlabelled", "read_data"]

DIGITS_TEST_SEED = 0


def build_data(spec: BaseData, *, seed: int, trains: bool = True) -> Data:
    """The data set of a spec with all its splits; data_fraction has cut the train split.

    Args:
        trains: whether there must be a train split.

    Raises:
        UserError: what is missing, broken or contradictory, all of a kind at once.
    """
    data = read_data(spec, seed=seed)
    empty = [name for name, split in data.splits.items() if not len(split)]
    if empty or (trains and "train" not in data.splits):
        what = f"the {' and the '.join(empty)} split has no sample" if empty else "no train split"
        raise UserError(f"data set {data.name}: {what} (data.data_root_dir = {spec.data_root_dir})")
    train = data.splits.get("train")
    if train is not None and spec.data_fraction < 1:
        data.splits["train"] = cut(train, spec, data.subtask, seed)
        data.report.append(
            f"train split cut to {len(data.splits['train'])} of {len(train)} samples"
            f" (data.data_fraction = {spec.data_fraction:g})"
        )
    return data


def cut(train: Split, spec: BaseData, subtask: str, seed: int) -> Split:
    """The share data_fraction of the train split; a smaller share of the same seed is taken from
    the same random order."""
    count = max(1, round(len(train) * spec.data_fraction))
    labels = strata(train.targets, subtask, kept=spec.stratified)
    rows, _ = draw(labels, count, seed=mix(seed, FRACTION), keep="drawn")
    return subset(train, rows)


# ---------------------------------------------------------------------- digits


@read_data.register
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
    test, rest = draw(groups, test_count, seed=DIGITS_TEST_SEED, keep="rest")
    val, train = draw(groups[rest], val_count, seed=mix(seed, VAL), keep="rest")
    return {"train": rest[train], "val": rest[val], "test": test}


def array_split(samples: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> Split:
    """A split of an array in memory; the ids are the rows of the array."""
    return Split([str(row) for row in rows], targets[rows], ArraySource(samples, rows))


# ---------------------------------------------------------------------- custom


@read_data.register
def _(spec: CustomData, *, seed: int) -> Data:
    """The user's own function."""
    data = call_target("data", spec.target, spec, seed, **spec.options)
    if not isinstance(data, Data):
        raise UserError(
            f'data.target = "{spec.target}" returned {type(data).__name__}, expected'
            " glovita_lib.datasets.Data"
        )
    return data
