"""Data section of a spec: which samples exist, their labels and splits."""

import os
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta
from msgspec.structs import replace

from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_conditions import read_unless, target_problems
from glovita_lib.spec_errors import (
    Count,
    Fraction,
    PathText,
    Positive,
    SampleKind,
    shown,
)
from glovita_lib.spec_samples import (
    A_FILE_EACH,
    OF_TABLE,
    BaseData,
    FileData,
    FolderData,
    ImageData,
    Subtask,
)
from glovita_lib.spec_series import SeriesAugmentation, SeriesPreparation
from glovita_lib.spec_video import VIDEO_EXTS, ClipSampling, FrameLabels, VideoReading
from glovita_lib.spec_volumes import VolumeAugmentation, VolumePreparation, VolumeReading


class DigitsData(ImageData, tag="digits", tag_field="dataset"):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, 10 classes; needs no file."""

    default_policies: ClassVar[tuple[str, str]] = ("default_2d_1", "shared_default_2d")
    classes: ClassVar[int | None] = 10
    labels: ClassVar[tuple[str, ...] | None] = tuple("0123456789")
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
    labels: ClassVar[tuple[str, ...] | None] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip


class Cifar100Data(CifarData, tag="cifar100", tag_field="dataset"):
    """CIFAR-100 as published (the folder cifar-100-python below data_root_dir), read by
    torchvision."""

    classes: ClassVar[int | None] = 100
    labels: ClassVar[tuple[str, ...] | None] = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle",
        "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle",
        "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
        "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox",
        "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
        "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
        "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
        "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
        "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
        "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle",
        "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip


class GenericImageData(FolderData, tag="generic_image_dataset", tag_field="dataset"):
    """Any folder of images with labels from folder names, a JSON or a CSV file."""

    built_in: ClassVar[str] = "data_folder"
    of_new_samples: ClassVar[tuple[str, ...]] = (*FolderData.of_new_samples, "max_megapixels")

    augmentation: ImageAugmentation = ImageAugmentation()
    """Augmentation and preprocessing."""
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
    samples: ClassVar[SampleKind] = "features"
    of_new_samples: ClassVar[tuple[str, ...]] = (
        "features_key", "bag_ptr_key", "bag_lengths_key", "ids_key", "groups_key", "coords_key",
        "follow_links", "check_values", "window_mb",
    )  # fmt: skip

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
    samples: ClassVar[SampleKind] = "volumes"
    default_policies: ClassVar[tuple[str, str]] = ("default_nnunet", "shared_default_3d")
    of_new_samples: ClassVar[tuple[str, ...]] = (*FolderData.of_new_samples, "path_suffix")

    path_column: Annotated[str | tuple[str, ...], OF_TABLE] = "path"
    """CSV column of the volume's path below images_dir, a file or a DICOM folder; several columns
    are the files whose channels make up a sample."""
    path_suffix: tuple[str, ...] = ()
    """What follows the names in tables and split files; several give one file each, as
    ["_0000.nii.gz", "_0001.nii.gz"], whose channels make up a sample."""
    allowed_exts: tuple[str, ...] = ("nii", "nii.gz", "npy", "npz", "b2nd", "dcm")
    """File suffixes that count as volumes; with dcm also folders of DICOM slices, and DICOM files
    with frames, whatever their names."""
    channels: Count | None = None
    """Channels of the files of a sample; none takes those that most have. Others are broken."""
    reading: VolumeReading = VolumeReading()
    """How files are read."""
    preparation: VolumePreparation = VolumePreparation()
    """Resampling, crop, intensities and where they are cached."""
    augmentation: VolumeAugmentation = VolumeAugmentation()
    """Policies and the patch that is cut."""

    def paths_taken(self) -> dict[str, Any]:
        cache = self.preparation.cache_folder(self.data_root_dir)
        return {**super().paths_taken(), "preparation": {"cache_dir": cache}}

    @property
    def files_a_sample(self) -> int:
        """How many files or DICOM folders a sample has by names."""
        columns = len(self.path_columns) if self.label_source == "csv" else 1
        return columns * max(1, len(self.path_suffix))

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
        files = self.files_a_sample
        if files > len(self.path_suffix) > 1:
            yield (
                "path_suffix",
                f"{shown(self.path_suffix)}: with several path columns, one at most",
            )
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


INDEX = "video_index.json"


class VideoData(FolderData, tag="generic_video_dataset", tag_field="dataset"):
    """Any folder of videos, files or folders of frames, with labels from folder names, a JSON or a
    CSV file, of whole videos or of their frames."""

    built_in: ClassVar[str] = "data_video"
    samples: ClassVar[SampleKind] = "videos"
    image_channels: ClassVar[int | None] = 3
    of_new_samples: ClassVar[tuple[str, ...]] = (*FolderData.of_new_samples, "reading")

    images_dir: PathText = "videos"
    """Folder of the videos below data_root_dir."""
    allowed_exts: tuple[str, ...] = VIDEO_EXTS
    """File suffixes that count as videos; what cannot be read of them is listed."""
    reading: VideoReading = VideoReading()
    """How files are read."""
    sampling: ClipSampling = ClipSampling()
    """Which clips are drawn."""
    frames: FrameLabels = FrameLabels()
    """Labels of frames."""
    augmentation: ImageAugmentation = ImageAugmentation()
    """Augmentation and preprocessing of frames; all of a clip get the same."""

    @property
    def index_path(self) -> str:
        """File of what is known of every video."""
        return self.reading.index_file or os.path.join(self.data_root_dir, INDEX)

    def paths_taken(self) -> dict[str, Any]:
        return {**super().paths_taken(), "reading": {"index_file": self.index_path}}

    @property
    def reads_table(self) -> bool:
        return super().reads_table or self.frames.label_level == "frame"

    @property
    def reads_groups(self) -> bool:
        return super().reads_table

    def stated_subtask(self) -> Subtask | None:
        return "framewise" if self.frames.label_level == "frame" else super().stated_subtask()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Labels of frames are classes, and clips show every frame."""
        yield from super().problems()
        if self.frames.label_level != "frame":
            return
        if self.subtask not in (None, "multiclass"):
            yield "subtask", f"{shown(self.subtask)}: labels of frames are classes, drop it"
        for name, text in self.sampling.frame_problems():
            yield f"sampling.{name}", text


class SeriesData(CollectionData, tag="generic_series_dataset", tag_field="dataset"):
    """Time series in CSV (a row a series, or a row a time point), npy, npz, .ts, .arff or .tsv
    files, or a folder with one file a series; several channels, any lengths, missing values."""

    built_in: ClassVar[str] = "data_series"
    samples: ClassVar[SampleKind] = "series"
    default_policies: ClassVar[tuple[str, str]] = ("default_series_1", "shared_default_series")
    split_fields: ClassVar[tuple[str, ...]] = (*FileData.split_fields, "resample", "problem")
    of_new_samples: ClassVar[tuple[str, ...]] = (
        "strict", "id_column", "time_column", "value_columns",
    )  # fmt: skip

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
    """Share of the train split that is drawn as val from the seed, where val has no file; with
    group_column that share of the groups, whole."""
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

    samples: ClassVar[SampleKind] = "either"

    augmentation: ImageAugmentation = ImageAugmentation()
    """Augmentation and preprocessing of images; volumes are taken as they are."""


class CustomVolumes(OwnData, tag="custom_3d_dataset", tag_field="dataset"):
    """A data set of volumes of your own: a function that returns glovita_lib.data.Data, whose
    patches are cut and augmented."""

    samples: ClassVar[SampleKind] = "volumes"
    default_policies: ClassVar[tuple[str, str]] = ("default_3d_1", "shared_default_3d")

    augmentation: VolumeAugmentation = VolumeAugmentation()
    """Policies and the patch that is cut."""


class CustomVideos(OwnData, tag="custom_video_dataset", tag_field="dataset"):
    """A data set of videos of your own: a function that returns glovita_lib.data.Data, of which
    clips are drawn and augmented."""

    samples: ClassVar[SampleKind] = "videos"

    sampling: ClipSampling = ClipSampling()
    """Which clips are drawn."""
    augmentation: ImageAugmentation = ImageAugmentation()
    """Augmentation and preprocessing of frames."""


def features_of(data: BaseData) -> PrecomputedData:
    """How feature files are read (names of their datasets and the like): as the section says, or
    the defaults where it is another data set."""
    return data if isinstance(data, PrecomputedData) else PrecomputedData()


Data = (
    DigitsData
    | Cifar10Data
    | Cifar100Data
    | GenericImageData
    | VolumeData
    | VideoData
    | SeriesData
    | PrecomputedData
    | CustomData
    | CustomVolumes
    | CustomVideos
)
