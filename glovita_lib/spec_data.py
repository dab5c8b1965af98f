"""Data section of a spec: which samples exist, their labels and splits."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta
from msgspec.structs import replace

from glovita_lib.errors import composed
from glovita_lib.spec import Spec
from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_conditions import read_if, read_unless, target_problems
from glovita_lib.spec_errors import (
    Count,
    FoldName,
    Fraction,
    PathText,
    Positive,
    names_a_folder,
    shown,
)
from glovita_lib.spec_series import SeriesAugmentation, SeriesPreparation
from glovita_lib.spec_volumes import VolumeAugmentation, VolumePreparation, VolumeReading

Subtask = Literal["multiclass", "multilabel", "regression", "framewise"]
"""Kind of target; framewise is one class a frame of a video."""
WholeSubtask = Literal["multiclass", "multilabel", "regression"]
"""Kinds of targets of whole samples, which a spec may name."""
UNLABELLED = -100
"""Label of a frame that has none."""
OF_LABEL_FILE = read_if(
    "reads_label_file",
    True,
    words='data.label_source other than "folder" (images, volumes)',
)
OF_TABLE = read_if(
    "reads_table",
    True,
    words='data.label_source = "csv" (images, volumes) or data.labels_file (features)',
)
OF_NAMED_SPLITS = read_unless("split_source", "kfold")
OF_SEVERAL_LABELS = read_if(
    "separates_labels",
    True,
    words='data.label_source = "csv", data.subtask = "multilabel" and one data.label_column',
)
A_FILE_EACH = read_if("split_source", "files")


class BaseData(Spec):
    """Fields of every data set, and what other sections and the experiment ask of it."""

    built_in: ClassVar[str] = "datasets"
    samples: ClassVar[Literal["images", "volumes", "series", "features", "either"]] = "images"
    """What a sample is; of a user's data set its function tells."""
    folds: ClassVar[int | None] = 1
    """Number of folds; none where the fields or the files tell."""
    classes: ClassVar[int | None] = None
    """Number of classes, where it is always the same."""
    image_channels: ClassVar[int | None] = None
    """Channels of the images, where they are always the same."""
    default_policies: ClassVar[tuple[str, str]] = ("default_2d_2", "shared_default_2d")
    """Train and test policy where the spec names none; unread without augmentation."""
    one_fold: ClassVar[str] = "0 only: this data set has one split; another seed draws another val"
    """The folds that there are, where there is one."""
    split_fields: ClassVar[tuple[str, ...]] = (
        "fold", "n_folds", "split_source", "split_file", "split_column", "stratified",
        "group_column", "val_fraction", "test_fraction", "train_split_name", "val_split_name",
        "test_split_name",
    )  # fmt: skip
    """Fields that say which sample is in which split, as far as a data set has them; one with
    others of its own names them too."""

    data_root_dir: PathText = "data"
    """Folder of the data set; relative paths start where the command runs."""
    data_fraction: Fraction = 1.0
    """Share of the train split that is used; val and test are never cut."""
    stratified: bool = True
    """Whether data_fraction, folds and random splits keep the class proportions."""
    fold: FoldName = 0
    """Which fold of a cross-validation this run is; of a split file whose folds have names other
    than numbers its name."""

    def stated_folds(self) -> int | None:
        """Number of folds; None where a split file tells, or a function of the user's."""
        return self.folds

    def stated_channels(self) -> int | None:
        """Channels of the images; None if only the data can tell."""
        return self.image_channels

    def stated_subtask(self) -> Subtask | None:
        """Kind of target; None if only the data can tell."""
        return None if self.classes is None else "multiclass"

    def stated_outputs(self) -> list[tuple[str, int]]:
        """Number of classes or targets, with the keys that state it; empty if none does."""
        return [] if self.classes is None else [("data.dataset", self.classes)]

    @property
    def features(self) -> "PrecomputedData":
        """How feature files are read: the names of their datasets and the like; the defaults of
        the data set that has such fields, for all others."""
        return PrecomputedData()

    def missing_files(self) -> Iterator[tuple[str, str]]:
        """Fields that must name a file before samples can be read, and why."""
        yield from ()

    def unchecked(self) -> Self:
        """The same without a look at every value, for a rank after the one that has looked."""
        return self

    def lenient(self) -> Self:
        """The same with broken samples left out, where the data set can do that."""
        return self

    def problems(self) -> Iterator[tuple[str, str]]:
        """All keys that state the number of classes state the same, and the fold is one that
        exists, so that no two folds train on the same split."""
        first, *others = self.stated_outputs() or [("", 0)]
        for key, count in others:
            if count != first[1]:
                yield key.removeprefix("data."), f"{count} entries, but {first[0]} says {first[1]}"
        folds = self.stated_folds()
        valid = "" if folds is None else f"0 to {folds - 1}" if folds > 1 else self.one_fold
        if isinstance(self.fold, str):
            if self.fold.isdecimal():
                yield "fold", f"{shown(self.fold)} is a number: write it without quotes"
            elif folds is not None:
                yield "fold", f"{shown(self.fold)} does not exist: {valid}"
            elif not names_a_folder(self.fold):
                yield (
                    "fold",
                    f"{shown(self.fold)} cannot name the directory of its run: rename the fold with"
                    " letters, digits and . , = + - _",
                )
        elif folds is not None and self.fold >= folds:
            yield "fold", f"{self.fold} does not exist: {valid}"


class ImageData(BaseData):
    """Fields of data sets of images that need no files of labels and splits."""

    augmentation: ImageAugmentation = ImageAugmentation()
    """Augmentation and preprocessing."""


class FileData(BaseData):
    """Fields of data sets whose labels and splits stand in files, or are drawn."""

    one_fold: ClassVar[str] = '0 only; data.split_source = "kfold" makes more'

    subtask: WholeSubtask | None = None
    """Kind of target; none follows from task (images), or from the labels (features): whole numbers
    and names are multiclass, several 0/1 columns multilabel, other numbers regression (images: are
    asked for); it is asked for where all numbers are whole ones with decimals (2.0) and the head
    predicts classes."""
    num_classes: Count | None = None
    """Number of classes (regression: of targets); none counts them, a number is checked against the
    data."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their indices; none takes those of the feature file, or
    sorts what the labels hold."""
    labels_file: Annotated[PathText | None, OF_LABEL_FILE] = None
    """File of the labels below data_root_dir. Images and volumes: none is labels.json, labels.csv
    or dataset.json, after label_source. Features: a CSV file with a row a sample, samples without
    one are not used; none takes the labels in the feature file."""
    label_column: Annotated[str | tuple[str, ...], OF_TABLE] = "label"
    """CSV column of the label; several for multilabel (0/1 each) and multi-target regression."""
    group_column: Annotated[str | None, OF_TABLE] = None
    """CSV column of the group (patient, slide) that must stay in one split; none takes the groups
    of the feature file, where it has some."""
    split_file: Annotated[PathText, read_if("split_source", "splits_json")] = "splits.json"
    """JSON file below data_root_dir: {split: [id, ...]}, or a list (or {fold: ...}) of such
    objects, or {fold: [id, ...]}, where data.fold is test, the next fold val, the others train. The
    id of an image is its path below images_dir, as the file is named."""
    split_column: Annotated[str, read_if("split_source", "csv")] = "split"
    """CSV column of the split's name."""
    n_folds: Annotated[int, Meta(ge=3), read_if("split_source", "kfold")] = 5
    """Number of folds; fold i is test, the next one val, the others train."""

    @property
    def reads_label_file(self) -> bool:
        """Whether labels come from a file of their own, where one is named."""
        return True

    @property
    def reads_table(self) -> bool:
        """Whether labels come from a CSV file."""
        return self.labels_file is not None

    def folds_of(self, split_source: str) -> int | None:
        """Number of folds; None where a split file tells."""
        if split_source == "kfold":
            return self.n_folds
        return None if split_source == "splits_json" else 1

    def stated_subtask(self) -> Subtask | None:
        return self.subtask

    def stated_outputs(self) -> list[tuple[str, int]]:
        stated = [] if self.num_classes is None else [("data.num_classes", self.num_classes)]
        names = self.class_names
        return stated if names is None else [*stated, ("data.class_names", len(names))]

    def problems(self) -> Iterator[tuple[str, str]]:
        """No class name is given twice."""
        yield from super().problems()
        names = list(map(composed, self.class_names or ()))
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            yield "class_names", f"{shown(twice)} given more than once"


class DigitsData(ImageData, tag="digits", tag_field="dataset"):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, 10 classes; needs no file."""

    default_policies: ClassVar[tuple[str, str]] = ("default_2d_1", "shared_default_2d")
    classes: ClassVar[int | None] = 10
    image_channels: ClassVar[int | None] = 1

    val_fraction: Fraction = 0.15
    """Share of the samples in val, drawn from the seed."""
    test_fraction: Fraction = 0.2
    """Share of the samples in test; the test set does not depend on the seed."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """val and test leave something to train on."""
        yield from super().problems()
        total = self.val_fraction + self.test_fraction
        if total >= 1:
            yield "val_fraction", f"with data.test_fraction it is {total:g}: below 1 leaves a train"


class CifarData(ImageData):
    """Fields of the CIFAR data sets, read by torchvision from a folder below data_root_dir."""

    default_policies: ClassVar[tuple[str, str]] = ("randaugment", "default")
    image_channels: ClassVar[int | None] = 3

    download: bool = True
    """Whether a missing data set is downloaded."""
    val_fraction: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Share of the 50,000 training images held out as val; 0 uses the test images as val too, as
    published recipes do."""


class Cifar10Data(CifarData, tag="cifar10", tag_field="dataset"):
    """CIFAR-10 as published (the folder cifar-10-batches-py below data_root_dir), read by
    torchvision."""

    classes: ClassVar[int | None] = 10


class Cifar100Data(CifarData, tag="cifar100", tag_field="dataset"):
    """CIFAR-100 as published (the folder cifar-100-python below data_root_dir), read by
    torchvision."""

    classes: ClassVar[int | None] = 100


class FolderData(FileData):
    """Fields of data sets that are files below a folder, one sample each."""

    split_source: Literal["splits_json", "subdirs", "csv", "dataset_json", "kfold"] = "splits_json"
    """Splits from split_file, from sub-folders of images_dir named like the splits, from
    split_column of the CSV file, from the lists of dataset.json, or drawn as folds from the
    seed."""
    label_source: Literal["folder", "json", "csv", "dataset_json"] = "json"
    """Labels from the class folder, a JSON object {path: label}, a CSV file, or the lists of
    dataset.json: {split: [{"image": path, "label": label}]}."""
    task: Literal["Classification", "Regression"] | None = None
    """Kind of prediction; none follows from subtask."""
    images_dir: PathText = "images"
    """Folder of the files below data_root_dir."""
    train_split_name: Annotated[str, OF_NAMED_SPLITS] = "train"
    """Name of the train split in the split file, folder or column."""
    val_split_name: Annotated[str, OF_NAMED_SPLITS] = "val"
    """Name of the val split; the name of the test split uses its samples as both."""
    test_split_name: Annotated[str, OF_NAMED_SPLITS] = "test"
    """Name of the test split; may be absent unless another name than this one is given."""
    label_separator: Annotated[str, OF_SEVERAL_LABELS] = "|"
    """Separator of several labels in one CSV cell."""
    strict: bool = True
    """Whether a missing, unlabelled or broken file is an error; else it is left out and listed."""
    allowed_exts: tuple[str, ...] = ()
    """File suffixes that count as samples."""

    @property
    def path_columns(self) -> tuple[str, ...]:
        """CSV columns of the paths of a sample."""
        return ("path",)

    @property
    def reads_label_file(self) -> bool:
        return self.label_source != "folder"

    @property
    def label_path(self) -> str:
        """The label file below data_root_dir."""
        usual = {"json": "labels.json", "csv": "labels.csv", "dataset_json": "dataset.json"}
        return self.labels_file or usual[self.label_source]

    @property
    def reads_table(self) -> bool:
        return self.label_source == "csv"

    @property
    def separates_labels(self) -> bool:
        """Whether one CSV cell may hold several labels."""
        several = self.stated_subtask() == "multilabel" and isinstance(self.label_column, str)
        return self.reads_table and several

    def stated_folds(self) -> int | None:
        return self.folds_of(self.split_source)

    def lenient(self) -> Self:
        return replace(self, strict=False)

    def stated_subtask(self) -> Subtask | None:
        return self.subtask or ("regression" if self.task == "Regression" else "multiclass")

    def stated_outputs(self) -> list[tuple[str, int]]:
        stated = super().stated_outputs()
        subtask, columns = self.stated_subtask(), self.label_column
        if self.label_source == "csv" and subtask != "multiclass":
            count = len(columns) if isinstance(columns, tuple) else 1
            if subtask == "regression" or count > 1:
                stated.append(("data.label_column", count))
        return stated

    def problems(self) -> Iterator[tuple[str, str]]:
        """task and subtask agree, labels are what their source can carry, some file suffix counts,
        and nothing is trained on and evaluated; val and test may be one split."""
        yield from super().problems()
        task, subtask = self.task, self.subtask
        if task and subtask and (task == "Regression") != (subtask == "regression"):
            valid = '"regression"' if task == "Regression" else '"multiclass" or "multilabel"'
            yield "subtask", f"{shown(subtask)} contradicts data.task = {shown(task)}: {valid} fits"
        yield from self.label_problems()
        if self.train_split_name in (self.val_split_name, self.test_split_name):
            yield (
                "train_split_name",
                f"{shown(self.train_split_name)} is the name of val or test too: no sample may be"
                " trained on and evaluated",
            )
        if self.allowed_exts == ():
            example = shown([type(self)().allowed_exts[0]])
            yield "allowed_exts", f"[] allows no file: name one suffix at least, e.g. {example}"

    def label_problems(self) -> Iterator[tuple[str, str]]:
        """Folder names and single columns carry only what they can."""
        subtask, source, columns = self.stated_subtask(), self.label_source, self.label_column
        if source == "folder" and subtask not in (None, "multiclass"):
            yield (
                "label_source",
                f'"folder" gives each sample one class, not {subtask} targets: use "csv" or "json"',
            )
        if self.split_source in ("csv", "dataset_json") and source != self.split_source:
            asked = shown(self.split_source)
            yield (
                "split_source",
                f"{asked} needs data.label_source = {asked}, not {shown(source)}",
            )
        if source == "csv" and isinstance(columns, tuple):
            if subtask == "multiclass" and len(columns) != 1:
                yield (
                    "label_column",
                    f"{shown(columns)} are {len(columns)} columns, and multiclass reads one: name"
                    ' one, or set data.subtask to "multilabel" or "regression"',
                )
            elif not columns or len(set(columns)) < len(columns):
                yield "label_column", f"{shown(columns)} must name different columns, one at least"


class GenericImageData(FolderData, tag="generic_image_dataset", tag_field="dataset"):
    """Any folder of images with labels from folder names, a JSON or a CSV file."""

    built_in: ClassVar[str] = "data_folder"

    augmentation: ImageAugmentation = ImageAugmentation()
    """Augmentation and preprocessing."""
    path_column: Annotated[str, OF_TABLE] = "path"
    """CSV column of the image's path below images_dir, as the file is named."""
    allowed_exts: tuple[str, ...] = ("jpg", "jpeg", "png", "bmp", "tif", "tiff")
    """File suffixes that count as images."""
    channels: Literal[1, 3, 4] = 3
    """Channels of an image as the encoder sees it: grey, RGB or RGBA; files are converted."""
    bit_depth: Literal[8, 16] = 8
    """Bits per channel as the encoder sees them; files of the other depth are scaled, white stays
    white."""
    max_megapixels: Positive = 179.0
    """Largest image that is decoded, millions of pixels: a small file may claim to be huge and fill
    the memory."""

    @property
    def path_columns(self) -> tuple[str, ...]:
        return (self.path_column,)

    def stated_channels(self) -> int | None:
        return self.channels


class CollectionData(FileData):
    """Fields of data sets whose files hold many samples each."""

    data_root_dir: PathText = "."
    """Folder that the files below are relative to."""
    split_source: Literal["files", "kfold", "splits_json", "csv"] = "files"
    """Splits: one file each; folds drawn from the seed; ids listed in split_file; split_column of
    labels_file, of series also of their own CSV file."""
    id_column: Annotated[str, OF_TABLE] = "id"
    """CSV column of the sample's id: its id in the file, or the name of the bag's file."""

    def stated_folds(self) -> int | None:
        return self.folds_of(self.split_source)


class PrecomputedData(CollectionData, tag="precomputed_features", tag_field="dataset"):
    """Features in HDF5 files: vectors (N, D), bags (B, L, D), or bags of any length (M, D) with
    bag_ptr or bag_lengths; or a folder with one file (h5, pt) a bag."""

    built_in: ClassVar[str] = "data_features"
    samples: ClassVar[Literal["images", "volumes", "series", "features", "either"]] = "features"

    train_features_file: Annotated[PathText | None, A_FILE_EACH] = None
    """Feature file of the train split."""
    val_features_file: Annotated[PathText | None, A_FILE_EACH] = None
    """Feature file of the val split."""
    test_features_file: Annotated[PathText | None, A_FILE_EACH] = None
    """Feature file of the test split."""
    features_file: Annotated[PathText | None, read_unless("split_source", "files")] = None
    """One feature file, or a folder of one-bag files, whose samples split_source distributes;
    instead of a file a split."""
    features_key: str = "features"
    """Dataset of the features in the file."""
    labels_key: Annotated[str, read_unless("labels_file")] = "labels"
    """Dataset of the labels."""
    bag_ptr_key: str = "bag_ptr"
    """Dataset of the B + 1 positions where bags begin and the last one ends."""
    bag_lengths_key: str = "bag_lengths"
    """Dataset of the number of instances of each bag."""
    ids_key: str = "ids"
    """Dataset of the sample ids; without it ids are row numbers."""
    groups_key: str = "groups"
    """Dataset of the groups."""
    coords_key: str = "coords"
    """Dataset of the coordinates, one row an instance."""
    follow_links: bool = False
    """Whether links in a feature file to other HDF5 files are followed, too, where these do not lie
    in its folder or below: the file then decides what is read."""
    standardize: bool = False
    """Whether features are brought to mean 0 and deviation 1 over the train split, for features
    that no network made; the figures are kept in every checkpoint."""
    check_values: bool = True
    """Whether all features are looked at for NaN and infinity before training."""
    window_mb: Annotated[int, Meta(ge=1)] = 256
    """Files too large for memory are read in windows of so many MiB: blocks in random order,
    rows shuffled within a window."""

    @property
    def features(self) -> Self:
        return self

    def unchecked(self) -> Self:
        return replace(self, check_values=False)

    def missing_files(self) -> Iterator[tuple[str, str]]:
        drawn = self.split_source != "files"
        if drawn and self.features_file is None:
            yield (
                "features_file",
                f"data.split_source = {shown(self.split_source)} divides the samples of one file or"
                " folder: name it here",
            )
        files = (self.train_features_file, self.val_features_file, self.test_features_file)
        if not drawn and files == (None, None, None):
            yield (
                "train_features_file",
                "no feature file is named: name one a split, or data.features_file with"
                ' data.split_source = "kfold", "splits_json" or "csv"',
            )
        if self.split_source == "csv" and self.labels_file is None:
            yield (
                "labels_file",
                'data.split_source = "csv" reads its split_column: name it here',
            )


class VolumeData(FolderData, tag="generic_3d_dataset", tag_field="dataset"):
    """Any folder of volumes (NIfTI, NumPy, blosc2, DICOM folders) with labels from folder names,
    a JSON or a CSV file or dataset.json; where dataset.json below data_root_dir states subtask,
    num_classes or class_names, they count unless the spec states them."""

    built_in: ClassVar[str] = "data_volumes"
    samples: ClassVar[Literal["images", "volumes", "series", "features", "either"]] = "volumes"
    default_policies: ClassVar[tuple[str, str]] = ("default_nnunet", "shared_default_3d")

    path_column: Annotated[str | tuple[str, ...], OF_TABLE] = "path"
    """CSV column of the volume's path below images_dir, a file or a DICOM folder; several columns
    are the files whose channels make up a sample."""
    path_suffix: tuple[str, ...] = ()
    """What follows the names in tables and split files; several give one file each, as
    ["_0000.nii.gz", "_0001.nii.gz"], whose channels make up a sample."""
    allowed_exts: tuple[str, ...] = ("nii", "nii.gz", "npy", "npz", "b2nd", "dcm")
    """File suffixes that count as volumes; with dcm folders of DICOM files are volumes."""
    channels: Count | None = None
    """Channels of the files of a sample; none takes those that most have. Others are broken."""
    reading: VolumeReading = VolumeReading()
    """How files are read."""
    preparation: VolumePreparation = VolumePreparation()
    """Resampling, crop, intensities and where they are cached."""
    augmentation: VolumeAugmentation = VolumeAugmentation()
    """Policies and the patch that is cut."""

    @property
    def path_columns(self) -> tuple[str, ...]:
        return (self.path_column,) if isinstance(self.path_column, str) else self.path_column

    def stated_subtask(self) -> Subtask | None:
        """None where dataset.json may tell."""
        return self.subtask or ("regression" if self.task == "Regression" else None)

    def stated_channels(self) -> int | None:
        return None if self.channels is None else self.preparation.channels(self.channels)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Columns and suffixes differ, and each series has its files."""
        yield from super().problems()
        for name, texts in (("path_column", self.path_columns), ("path_suffix", self.path_suffix)):
            if len(set(texts)) < len(texts) or (name == "path_column" and not texts):
                yield name, f"{shown(texts)} must name different ones, one at least"
        files = len(self.path_columns) if self.label_source == "csv" else 1
        if files > 1 and len(self.path_suffix) > 1:
            yield (
                "path_suffix",
                f"{shown(self.path_suffix)}: with several path columns, one at most",
            )
        files = max(files, len(self.path_suffix))
        if files > 1 and len(self.reading.series) not in (0, 1, files):
            yield (
                "reading.series",
                f"{len(self.reading.series)} conditions for {files} files a sample: give one for"
                " all, or one each",
            )
        names = self.preparation.normalizations
        if self.channels is not None and len(names) not in (1, self.channels):
            yield (
                "preparation.normalize",
                f"{len(names)} entries for {self.channels} channels (data.channels): give one for"
                " all, or one each",
            )


class SeriesData(CollectionData, tag="generic_series_dataset", tag_field="dataset"):
    """Time series in CSV (a row a series, or a row a time point), npy, npz, .ts, .arff or .tsv
    files, or a folder with one file a series; several channels, any lengths, missing values."""

    built_in: ClassVar[str] = "data_series"
    samples: ClassVar[Literal["images", "volumes", "series", "features", "either"]] = "series"
    default_policies: ClassVar[tuple[str, str]] = ("default_series_1", "shared_default_series")
    split_fields: ClassVar[tuple[str, ...]] = (*FileData.split_fields, "resample", "problem")

    package: str | None = None
    """Installed package whose folder data_root_dir is relative to; it is located, not imported."""
    problem: str | None = None
    """Name of a data set of the UCR and UEA archives: NAME_TRAIN and NAME_TEST (.ts or .arff) in
    the folder NAME below data_root_dir are the files of train and test."""
    train_file: Annotated[PathText | None, A_FILE_EACH] = None
    """File of the train split."""
    val_file: Annotated[PathText | None, A_FILE_EACH] = None
    """File of the val split."""
    test_file: Annotated[PathText | None, A_FILE_EACH] = None
    """File of the test split."""
    series_file: Annotated[PathText | None, read_unless("split_source", "files")] = None
    """One file, or a folder of files of one series each, whose samples split_source distributes;
    instead of a file a split."""
    time_column: str = "time"
    """CSV column of the times: a file that has it holds a row a time point."""
    value_columns: tuple[str, ...] = ()
    """CSV columns of the values, the channels or, with a row a series, the time points; none takes
    all that are neither id, time, label, group nor split."""
    val_fraction: Annotated[float, Meta(ge=0, lt=1), A_FILE_EACH] = 0.0
    """Share of the train split that is drawn as val from the seed, where val has no file."""
    resample: Annotated[int, Meta(ge=0, lt=30), A_FILE_EACH] = 0
    """Which resample of train and test is used, by aeon's rule (stratified by class, of the sizes
    that the files have); 0 is the split of the files."""
    strict: bool = True
    """Whether a broken series is an error; else it is left out and listed."""
    preparation: SeriesPreparation = SeriesPreparation()
    """Resampling, normalisation and missing values."""
    augmentation: SeriesAugmentation = SeriesAugmentation()
    """Policies."""

    @property
    def reads_table(self) -> bool:
        return True

    def lenient(self) -> Self:
        return replace(self, strict=False)

    def missing_files(self) -> Iterator[tuple[str, str]]:
        drawn = self.split_source != "files"
        if drawn and self.series_file is None:
            yield (
                "series_file",
                f"data.split_source = {shown(self.split_source)} divides the samples of one file or"
                " folder: name it here",
            )
        named = (self.problem, self.train_file, self.val_file, self.test_file)
        if not drawn and named == (None,) * 4:
            yield (
                "train_file",
                "no file is named: name one a split, or data.problem of an archive, or"
                ' data.series_file with data.split_source = "kfold", "splits_json" or "csv"',
            )

    def problems(self) -> Iterator[tuple[str, str]]:
        """A resample has both splits; val comes from one place."""
        yield from super().problems()
        if self.problem is not None and self.split_source != "files":
            yield (
                "problem",
                'it has a file a split: leave it out, or set data.split_source = "files"',
            )
        files = self.split_source == "files" and self.problem is None
        if self.resample and files and None in (self.train_file, self.test_file):
            yield (
                "resample",
                f"{self.resample} draws train and test anew: name data.train_file and"
                " data.test_file, or data.problem",
            )
        for key in ("train_file", "test_file"):
            if self.problem is not None and getattr(self, key) is not None:
                yield key, f"data.problem = {shown(self.problem)} names it: drop one of them"
        if self.val_file is not None and self.val_fraction:
            yield "val_fraction", f"{self.val_fraction:g}, but data.val_file names val: drop one"


class OwnData(BaseData, kw_only=True):
    """Fields of a data set of your own, made by a function of yours."""

    folds: ClassVar[int | None] = None

    target: str
    """Where the function is: "package.module:function"; called as function(spec, seed,
    **options)."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from target_problems(self.target)


class CustomData(OwnData, tag="custom", tag_field="dataset"):
    """A data set of your own: a function of your package that returns glovita_lib.data.Data."""

    samples: ClassVar[Literal["images", "volumes", "series", "features", "either"]] = "either"

    augmentation: ImageAugmentation = ImageAugmentation()
    """Augmentation and preprocessing of images; volumes are taken as they are."""


class CustomVolumes(OwnData, tag="custom_3d_dataset", tag_field="dataset"):
    """A data set of volumes of your own: a function that returns glovita_lib.data.Data, whose
    patches are cut and augmented."""

    samples: ClassVar[Literal["images", "volumes", "series", "features", "either"]] = "volumes"
    default_policies: ClassVar[tuple[str, str]] = ("default_3d_1", "shared_default_3d")

    augmentation: VolumeAugmentation = VolumeAugmentation()
    """Policies and the patch that is cut."""


Data = (
    DigitsData
    | Cifar10Data
    | Cifar100Data
    | GenericImageData
    | VolumeData
    | SeriesData
    | PrecomputedData
    | CustomData
    | CustomVolumes
)
