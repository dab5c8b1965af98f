"""What data sets have in common: labels, splits and folds of their samples, in a spec."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta
from msgspec.structs import replace

from glovita_lib.errors import composed
from glovita_lib.spec import Spec
from glovita_lib.spec_augment import ImageAugmentation
from glovita_lib.spec_conditions import read_if, read_unless
from glovita_lib.spec_errors import (
    Count,
    FoldName,
    Fraction,
    PathText,
    SampleKind,
    names_a_folder,
    shown,
)

Subtask = Literal["multiclass", "multilabel", "regression", "framewise"]
"""Kind of target; framewise is one class a frame of a video."""
WholeSubtask = Literal["multiclass", "multilabel", "regression"]
"""Kinds of targets of whole samples, which a spec may name."""
OnlyPrediction = Literal["classes", "numbers"]
"""What a head predicts that cannot predict the other."""
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
    words='data.label_source = "csv" (images, volumes, videos), data.frames.label_level = "frame"'
    " or data.labels_file (features)",
)
OF_GROUPS = read_if(
    "reads_groups",
    True,
    words='data.label_source = "csv" (images, volumes, videos) or data.labels_file (features)',
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
    samples: ClassVar[SampleKind] = "images"
    """What a sample is; of a user's data set its function tells."""
    folds: ClassVar[int | None] = 1
    """Number of folds; none where the fields or the files tell."""
    classes: ClassVar[int | None] = None
    """Number of classes, where it is always the same."""
    labels: ClassVar[tuple[str, ...] | None] = None
    """Names of the classes, where these are always the same."""
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

    of_new_samples: ClassVar[tuple[str, ...]] = ()
    """Fields, with those of its sections, that say how files of new samples are found and read; a
    model does not depend on them."""

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

    def missing_files(self) -> Iterator[tuple[str, str]]:
        """Fields that must name a file before samples can be read, and why."""
        yield from ()

    def paths_taken(self) -> dict[str, Any]:
        """Files and folders that are used where no field names them, by the names of the fields."""
        return {}

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
            if self.fold.isdecimal() and str(int(self.fold)) == self.fold:
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
    asked for). Whole numbers with decimals (2.0) are what the head predicts that the spec names, or
    classes where num_classes says so, else it is asked for."""
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
    group_column: Annotated[str | None, OF_GROUPS] = None
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

    @property
    def reads_groups(self) -> bool:
        """Whether groups may come from the CSV file of the labels of samples."""
        return self.reads_table

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


class FolderData(FileData):
    """Fields of data sets that are files below a folder, one sample each."""

    of_new_samples: ClassVar[tuple[str, ...]] = ("strict", "allowed_exts", "path_column")

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
    path_column: Annotated[str | tuple[str, ...], OF_TABLE] = "path"
    """CSV column of the path of a sample below images_dir, as the file or folder is named."""

    @property
    def path_columns(self) -> tuple[str, ...]:
        """CSV columns of the paths of a sample."""
        return (self.path_column,) if isinstance(self.path_column, str) else self.path_column

    @property
    def reads_label_file(self) -> bool:
        return self.label_source != "folder"

    @property
    def label_path(self) -> str:
        """The label file below data_root_dir."""
        usual = {"json": "labels.json", "csv": "labels.csv", "dataset_json": "dataset.json"}
        return self.labels_file or usual[self.label_source]

    def paths_taken(self) -> dict[str, Any]:
        return {"labels_file": self.label_path} if self.reads_label_file else {}

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
        if isinstance(self.path_column, tuple) and self.samples != "volumes":
            yield "path_column", f"{shown(self.path_column)}: files of volumes are joined, name one"
        if self.allowed_exts == ():
            example = shown([type(self)().allowed_exts[0]])
            yield "allowed_exts", f"[] allows no file: name one suffix at least, e.g. {example}"

    def label_problems(self) -> Iterator[tuple[str, str]]:
        """Folder names and single columns carry only what they can."""
        subtask, source, columns = self.stated_subtask(), self.label_source, self.label_column
        if source == "folder" and subtask not in (None, "multiclass", "framewise"):
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
