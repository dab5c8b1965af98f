"""Data section of a spec: which samples exist, their labels and their splits."""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_augment import Augmentation
from glovita_lib.spec_features import PrecomputedData, Subtask

Fraction = Annotated[float, Meta(gt=0, le=1)]


class BaseData(Spec):
    """Fields of every data set."""

    default_policies: ClassVar[tuple[str, str]] = ("default_2d_2", "shared_default_2d")
    # train and test policy where the spec names none

    data_root_dir: str = "data"
    """Folder of the data set; relative paths start where the command runs."""
    data_fraction: Fraction = 1.0
    """Share of the train split that is used; val and test are never cut."""
    stratified: bool = True
    """Whether data_fraction and random splits keep the class proportions."""
    fold: Annotated[int, Meta(ge=0)] = 0
    """Which fold of a cross-validation this run is."""
    augmentation: Augmentation = Augmentation()
    """Augmentation and preprocessing."""


class DigitsData(BaseData, tag="digits", tag_field="dataset"):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, 10 classes; needs no file."""

    default_policies: ClassVar[tuple[str, str]] = ("default_2d_1", "shared_default_2d")

    val_fraction: Fraction = 0.15
    """Share of the samples in val, drawn from the seed."""
    test_fraction: Fraction = 0.2
    """Share of the samples in test; the test set does not depend on the seed."""


class Cifar10Data(BaseData, tag="cifar10", tag_field="dataset"):
    """CIFAR-10 in torchvision's on-disk format (cifar-10-batches-py below data_root_dir)."""

    default_policies: ClassVar[tuple[str, str]] = ("randaugment", "default")

    download: bool = True
    """Whether a missing data set is downloaded."""
    val_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Share of the 50,000 training images held out as val; 0 uses the test images as val too, as
    published recipes do."""


class Cifar100Data(BaseData, tag="cifar100", tag_field="dataset"):
    """CIFAR-100 in torchvision's on-disk format (cifar-100-python below data_root_dir)."""

    default_policies: ClassVar[tuple[str, str]] = ("randaugment", "default")

    download: bool = True
    """Whether a missing data set is downloaded."""
    val_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Share of the 50,000 training images held out as val; 0 uses the test images as val too, as
    published recipes do."""


class GenericImageData(BaseData, tag="generic_image_dataset", tag_field="dataset"):
    """Any folder of images with labels from folder names, a JSON or a CSV file."""

    task: Literal["Classification", "Regression"] | None = None
    """Kind of prediction; none follows from subtask."""
    subtask: Subtask | None = None
    """Kind of target; none is regression for task Regression, else multiclass."""
    num_classes: Annotated[int, Meta(ge=1)] | None = None
    """Number of classes (regression: of targets); none counts them, a number is checked against the
    data."""
    images_dir: str = "images"
    """Folder of the images below data_root_dir."""
    split_source: Literal["splits_json", "subdirs", "column", "kfold"] = "splits_json"
    """Splits from split_file, from sub-folders of images_dir named like the splits, from
    split_column of the CSV file, or drawn as folds from the seed."""
    label_source: Literal["folder", "json", "csv"] = "json"
    """Labels from the class folder, a JSON object {path: label} or a CSV file."""
    split_file: str = "splits.json"
    """JSON file below data_root_dir: {split: [path, ...]}, or a list (or {"0": ...}) of such
    objects, one a fold."""
    labels_file: str | None = None
    """Label file below data_root_dir; none is labels.json or labels.csv, after label_source."""
    path_column: str = "path"
    """CSV column of the image path."""
    label_column: str | tuple[str, ...] = "label"
    """CSV column of the label; several for multilabel (0/1 each) and multi-target regression."""
    group_column: str | None = None
    """CSV column of the group (patient, slide) that must stay in one split; needs label_source
    csv."""
    split_column: str = "split"
    """CSV column of the split's name, for split_source column."""
    train_split_name: str = "train"
    """Name of the train split in the split file, folder or column."""
    val_split_name: str = "val"
    """Name of the val split; the name of the test split uses its images as both."""
    test_split_name: str = "test"
    """Name of the test split; may be absent unless another name than this one is given."""
    allowed_exts: tuple[str, ...] = ("jpg", "jpeg", "png", "bmp", "tif", "tiff")
    """File suffixes that count as images."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their indices; none sorts what the labels hold."""
    label_separator: str = "|"
    """Separator of several labels in one CSV cell (multilabel with one label column)."""
    strict: bool = True
    """Whether a missing, unlabelled or broken image is an error; else it is left out and listed."""
    n_folds: Annotated[int, Meta(ge=3)] = 5
    """Number of folds of split_source kfold; fold i is test, the next one val, the others train."""
    channels: Literal[1, 3, 4] = 3
    """Channels of an image as the encoder sees it: grey, RGB or RGBA; files are converted."""
    bit_depth: Literal[8, 16] = 8
    """Bits per channel as the encoder sees them; files of the other depth are scaled, white stays
    white."""


class CustomData(BaseData, tag="custom", tag_field="dataset", kw_only=True):
    """A data set of your own: a function of your package that returns glovita_lib.datasets.Data."""

    target: str
    """Where the function is: "package.module:function"; called as function(spec, seed,
    **options)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""


Data = DigitsData | Cifar10Data | Cifar100Data | GenericImageData | PrecomputedData | CustomData
