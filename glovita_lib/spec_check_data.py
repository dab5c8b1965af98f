"""Rules of the data section, and what a spec says of its data before any of it is read."""

from collections.abc import Iterator
from typing import Any

from glovita_lib.spec_augment import Ops
from glovita_lib.spec_data import Cifar10Data, Cifar100Data, DigitsData, GenericImageData, Subtask
from glovita_lib.spec_features import PrecomputedData
from glovita_lib.spec_heads import RegressionHead
from glovita_lib.spec_root import Root
from glovita_lib.spec_types import shown


def subtask_of(data: Any) -> Subtask | None:
    """Kind of target that the data section states; None if only the data can tell."""
    if isinstance(data, DigitsData | Cifar10Data | Cifar100Data):
        return "multiclass"
    if isinstance(data, GenericImageData):
        return data.subtask or ("regression" if data.task == "Regression" else "multiclass")
    return getattr(data, "subtask", None)


def is_regression(root: Root) -> bool:
    """Whether numbers are predicted; where the data section does not say, the head does."""
    subtask = subtask_of(root.data)
    return (subtask or "regression") == "regression" and (
        subtask is not None or isinstance(root.model.head, RegressionHead)
    )


def known_channels(data: Any) -> int | None:
    """Channels of the images, where the data section states them."""
    if isinstance(data, GenericImageData):
        return data.channels
    return {DigitsData: 1, Cifar10Data: 3, Cifar100Data: 3}.get(type(data))


def fold_count(data: Any) -> int | None:
    """Number of folds; None where a split file tells, or a function of the user's."""
    if isinstance(data, DigitsData | Cifar10Data | Cifar100Data):
        return 1
    source = getattr(data, "split_source", None)
    if source == "kfold":
        return data.n_folds
    return 1 if source in ("subdirs", "column", "files", "csv") else None


def stated_outputs(data: Any) -> list[tuple[str, int]]:
    """Number of classes or targets, with the keys that state it; empty if none does."""
    known = {DigitsData: 10, Cifar10Data: 10, Cifar100Data: 100}
    if type(data) in known:
        return [("data.dataset", known[type(data)])]
    stated = []
    if getattr(data, "num_classes", None) is not None:
        stated.append(("data.num_classes", data.num_classes))
    if getattr(data, "class_names", None) is not None:
        stated.append(("data.class_names", len(data.class_names)))
    columns = getattr(data, "label_column", None)
    regression = isinstance(data, GenericImageData) and subtask_of(data) == "regression"
    reads_columns = isinstance(data, GenericImageData) and data.label_source == "csv"
    if reads_columns and (isinstance(columns, tuple) or regression):
        count = len(columns) if isinstance(columns, tuple) else 1
        if subtask_of(data) in ("regression", "multilabel") and (regression or count > 1):
            stated.append(("data.label_column", count))
    return stated


def outputs_agree(root: Root) -> Iterator[str]:
    """All keys that state the number of classes state the same."""
    first, *others = stated_outputs(root.data) or [("", 0)]
    for key, count in others:
        if count != first[1]:
            yield f"{key}: {count} entries, but {first[0]} says {first[1]}"


def class_names_differ(root: Root) -> Iterator[str]:
    """No class name is given twice."""
    names = getattr(root.data, "class_names", None) or ()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield f"data.class_names: {shown(twice)} given more than once"


def task_fits_subtask(root: Root) -> Iterator[str]:
    """task and subtask agree."""
    data = root.data
    if not isinstance(data, GenericImageData) or data.task is None or data.subtask is None:
        return
    if (data.task == "Regression") != (data.subtask == "regression"):
        valid = '"regression"' if data.task == "Regression" else '"multiclass" or "multilabel"'
        yield (
            f"data.subtask: {shown(data.subtask)} contradicts data.task = {shown(data.task)}:"
            f" {valid} fits"
        )


def labels_fit_subtask(root: Root) -> Iterator[str]:
    """Folder names and single columns carry only what they can."""
    data = root.data
    if not isinstance(data, GenericImageData):
        return
    subtask = subtask_of(data)
    if data.label_source == "folder" and subtask != "multiclass":
        yield (
            f'data.label_source: "folder" gives each image one class, not {subtask} targets: use'
            ' "csv" or "json"'
        )
    if data.split_source == "column" and data.label_source != "csv":
        yield (
            f'data.split_source: "column" needs data.label_source = "csv", not'
            f" {shown(data.label_source)}"
        )
    columns = data.label_column
    if data.label_source == "csv" and isinstance(columns, tuple):
        if subtask == "multiclass" and len(columns) != 1:
            yield (
                f"data.label_column: {shown(columns)} are {len(columns)} columns, and multiclass"
                ' reads one: name one, or set data.subtask to "multilabel" or "regression"'
            )
        elif not columns or len(set(columns)) < len(columns):
            yield f"data.label_column: {shown(columns)} must name different columns, one at least"


def folds_exist(root: Root) -> Iterator[str]:
    """The fold is one that exists, so that no two folds train on the same split."""
    data = root.data
    fold, count = getattr(data, "fold", 0), fold_count(data)
    if count is not None and fold >= count:
        valid = (
            f"0 to {count - 1}" if count > 1 else '0 only; data.split_source = "kfold" makes more'
        )
        if not hasattr(data, "split_source"):
            valid = "0 only: this data set has one split; another seed draws another val"
        yield f"data.fold: {fold} does not exist: {valid}"


def feature_files_are_named(root: Root) -> Iterator[str]:
    """There is a file to read, and a table where the splits are read from one."""
    data = root.data
    elsewhere = root.mode == "umap" and root.umap.input is not None
    if not isinstance(data, PrecomputedData) or elsewhere:
        return
    drawn = data.split_source != "files"
    if drawn and data.features_file is None:
        yield (
            f"data.features_file: data.split_source = {shown(data.split_source)} divides the"
            " samples of one file or folder: name it here"
        )
    split_files = (data.train_features_file, data.val_features_file, data.test_features_file)
    if not drawn and split_files == (None, None, None):
        yield (
            "data.train_features_file: no feature file is named: name one a split, or data."
            'features_file with data.split_source = "kfold", "splits_json" or "csv"'
        )
    if data.split_source == "csv" and data.labels_file is None:
        yield 'data.labels_file: data.split_source = "csv" reads its column split: name it here'


def fractions_leave_train(root: Root) -> Iterator[str]:
    """val and test leave something to train on."""
    data = root.data
    if isinstance(data, DigitsData) and data.val_fraction + data.test_fraction >= 1:
        total = data.val_fraction + data.test_fraction
        yield f"data.val_fraction: with data.test_fraction it is {total:g}: below 1 leaves a train"


def split_names_differ(root: Root) -> Iterator[str]:
    """Nothing is trained on and evaluated; val and test may be one split."""
    data = root.data
    if isinstance(data, GenericImageData):
        held_out = (data.val_split_name, data.test_split_name)
        if data.train_split_name in held_out:
            yield (
                f"data.train_split_name: {shown(data.train_split_name)} is the name of val or test"
                " too: no sample may be trained on and evaluated"
            )


def suffixes_are_named(root: Root) -> Iterator[str]:
    """Some file suffix counts as an image."""
    if getattr(root.data, "allowed_exts", None) == ():
        yield 'data.allowed_exts: [] allows no file: name one suffix at least, e.g. ["png"]'


def crop_fits_resize(root: Root) -> Iterator[str]:
    """The crop is cut from an image that is at least as large."""
    sizes = getattr(root.data, "augmentation", None)
    resize, size = getattr(sizes, "resize_size", None), getattr(sizes, "image_size", None)
    if resize is not None and size is not None and resize < size:
        yield (
            f"data.augmentation.resize_size: {resize} pixels are too few for the crop of"
            f" data.augmentation.image_size = {size}: at least {size}"
        )


def ranges_ascend(root: Root) -> Iterator[str]:
    """Lowest value first in every range of an augmentation."""
    augmentation = getattr(root.data, "augmentation", None)
    for section in ("train_kwargs", "test_kwargs"):
        ops = getattr(augmentation, section, None)
        for name in getattr(ops, "__struct_fields__", ()):
            value = getattr(ops, name)
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                yield (
                    f"data.augmentation.{section}.{name}: {shown(value)} has its lowest value last:"
                    f" write {shown(value[::-1])}"
                )


def image_operations_fit(root: Root) -> Iterator[str]:
    """Odd blur kernels, and hue shifts of at most half the circle."""
    augmentation = getattr(root.data, "augmentation", None)
    for section in ("train_kwargs", "test_kwargs"):
        ops = getattr(augmentation, section, None)
        if not isinstance(ops, Ops):
            continue
        key = f"data.augmentation.{section}"
        if ops.blur_kernel and any(side % 2 == 0 for side in ops.blur_kernel):
            yield f"{key}.blur_kernel: {shown(ops.blur_kernel)} must be odd numbers of pixels"
        if ops.jitter and ops.jitter[3] > 0.5:
            yield f"{key}.jitter: hue {ops.jitter[3]:g} is more than half the circle: at most 0.5"


RULES = (
    task_fits_subtask,
    labels_fit_subtask,
    outputs_agree,
    class_names_differ,
    folds_exist,
    feature_files_are_named,
    fractions_leave_train,
    split_names_differ,
    suffixes_are_named,
    crop_fits_resize,
    ranges_ascend,
    image_operations_fit,
)
"""Rules of the data section, in the order in which their lines are shown."""
