"""What a data set is made of: splits, and the sources their samples come from."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from glovita_lib import files
from glovita_lib.errors import UserError, composed, listed, refuse_controls
from glovita_lib.spec import ByStruct, Spec
from glovita_lib.spec_errors import SampleKind
from glovita_lib.spec_samples import UNLABELLED, BaseData, OnlyPrediction, Subtask
from glovita_lib.spec_series import SeriesPreparation
from glovita_lib.spec_volumes import VolumePreparation, VolumeReading

if TYPE_CHECKING:  # processes that prepare volumes import this module and no torch
    from torch import Tensor

# ----------------------------------------------------------------------- names of the outputs


class Outputs(NamedTuple):
    """What a model predicts."""

    subtask: Subtask
    class_names: tuple[str, ...]
    """Names of the classes, or of the targets of a regression, in the order of the outputs."""
    number_names: dict[str, str] | None = None
    """What whole numbers, or columns by their place, mean in arrays of labels that state no names,
    where files or the spec said it."""


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
"""A number as it is written; float() reads more, such as 1_0 and nan, which are names."""
INNER = re.compile(r"([0-9]+(?:\.[0-9]+)?|(?<![^\W_]|\.)\.[0-9]+)")
"""A number inside a name: also one that begins with its point (.5 mg, $.5), not a point that ends
a word (No.5)."""


def are_ordered(names: Sequence[str]) -> bool:
    """Whether names say themselves that they are in order: they are numbers, or differ in a number
    alone, which rise or fall. A number behind a point or a comma that may be its own (dose.5) must
    do so with it and without.

    >>> are_ordered(["0", "1.5"]), are_ordered(["grade 1", "grade 2"]), are_ordered(["mild", "no"])
    (True, True, False)
    """
    if all(map(NUMBER.fullmatch, names)):
        return rise_or_fall(names)
    parts = [INNER.split(name) for name in names]
    if not all(len(split) == 3 for split in parts) or len({(s[0], s[2]) for s in parts}) > 1:
        return False
    numbers = [number for _, number, _ in parts]
    points = parts[0][0].endswith((".", ",")) and all(map(str.isdecimal, numbers))
    readings = [numbers, [f".{number}" for number in numbers]] if points else [numbers]
    return all(map(rise_or_fall, readings))


def rise_or_fall(numbers: Sequence[str]) -> bool:
    """Whether each number is larger than the one before it, or each is smaller."""
    values = list(map(Decimal, numbers))
    steps = [second > first for first, second in pairwise(values)]
    return len(set(values)) == len(values) and len(set(steps)) < 2


def outputs_line(subtask: str, names: Sequence[str], *, ordered: bool) -> tuple[str, str]:
    """What the outputs are, for the console, and the names of the first ten: of classes whose order
    a metric goes by as an inequality."""
    what = "targets" if subtask == "regression" else "classes"
    return what, listed(names, 10, " < " if ordered else ", ")


# --------------------------------------------------------------------------------- data sets
#
# B batch, C channels, H W pixels, N samples of a split, K classes or targets.


@runtime_checkable
class Source(Protocol):
    """Random access to the decoded samples of one split; picklable, for worker processes. A source
    of your own derives from this class, and so has what it does not say itself."""

    @property
    @abstractmethod
    def uniform(self) -> tuple[int, ...] | None:
        """(C, H, W) where all samples have one size, else None."""

    @property
    def sizes(self) -> np.ndarray | None:
        """Height and width (N, 2) of images, voxels along X, Y, Z (N, 3) of volumes, where they are
        known before they are decoded."""
        return None

    @property
    def windows(self) -> Callable[[np.ndarray], list[Any]] | None:
        """A method windows(rows) -> samples of which only what is sliced is read (volumes), arrays
        in all that `fit` of an objective asks of them; `loaded()` gives one in memory. None of
        samples that are read whole.

        Such samples are always fitted where they are read, also where all have one size.
        """
        return None

    @property
    def reads_at_once(self) -> bool:
        """Whether it is read fastest all at once (vectors in a file)."""
        return False

    @property
    def collate(self) -> Callable[[Any], Any] | None:
        """A method collate(samples) -> inputs of samples that are not images (bags of features,
        volumes); None of images.

        It makes of a list of fetched samples what a batch holds as `inputs`, a tensor or an object
        with `to(device, non_blocking=...)` and `pin_memory()`. Such samples may be of any type,
        reach no image augmentation and are held in memory as they are.
        """
        return None

    @abstractmethod
    def fetch(self, rows: np.ndarray) -> np.ndarray | list[Any]:
        """Samples (C, H, W), uint8 or uint16, of these rows in this order; one (B, C, H, W) array
        where they are uniform.

        Raises:
            UserError: one line for each sample that cannot be read, with its path.
        """

    @abstractmethod
    def nbytes(self) -> int:
        """Size of the whole split, decoded, in bytes."""

    @abstractmethod
    def select(self, rows: np.ndarray) -> "Source":
        """The source of these rows, in this order."""


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """The frames of V videos, of which the samples of a split are clips of T frames that cover
    every one of them."""

    ids: list[str]
    """Stable name of each video."""
    video_of: np.ndarray
    """(N,) int64, the video of each clip."""
    numbers: np.ndarray
    """(N, T) int64, the number of each frame of a clip in its video, as it is evaluated; -1 where a
    frame is repeated to fill the clip up. (N, 0) where samples are whole videos, of which clips are
    drawn later, see objectives.as_loaded."""
    times: list[np.ndarray]
    """V arrays (n,) float64, seconds of each frame from the start of its video."""
    labels: list[np.ndarray] | None
    """V arrays (n,) int64, the class of each frame, UNLABELLED where it has none; none of videos
    without labels."""

    def all_labels(self) -> np.ndarray:
        """Labels of all labelled frames of the videos that have clips here, one after the other."""
        assert self.labels is not None, "who asks has labels to learn from"
        found = [self.labels[video] for video in np.unique(self.video_of)]
        labels = np.concatenate(found) if found else np.zeros(0, np.int64)
        return labels[labels != UNLABELLED]

    def majority(self) -> np.ndarray:
        """Class (N,) of most labelled frames of each clip, the first of equal ones; UNLABELLED
        where no frame of it has a label."""
        found = np.full(len(self.video_of), UNLABELLED, np.int64)
        for row, (video, numbers) in enumerate(zip(self.video_of, self.numbers, strict=True)):
            labels = () if self.labels is None else self.labels[video][numbers[numbers >= 0]]
            known = [label for label in labels if label != UNLABELLED]
            if known:
                found[row] = np.bincount(known).argmax()
        return found

    def recoded(self, table: np.ndarray) -> "VideoFrames":
        """The same with class k as table[k]."""
        if self.labels is None:
            return self
        labels = [np.where(own == UNLABELLED, own, table[own.clip(0)]) for own in self.labels]
        return replace(self, labels=labels)

    def select(self, rows: np.ndarray) -> "VideoFrames":
        """The same of some clips."""
        return replace(self, video_of=self.video_of[rows], numbers=self.numbers[rows])


@dataclass(slots=True)
class Split:
    """One split of a data set in its stable order."""

    ids: list[str]
    """Stable name of each sample: path below the images folder, or row of the original data."""
    targets: np.ndarray | None
    """(N,) int64 for multiclass, (N, K) float32 for multilabel, (N, K) float64 for regression,
    (N,) int64 for framewise: the class of most frames, the others are in `frames`; None
    unlabelled."""
    source: Source
    groups: list[str] | None = None
    """What each sample belongs to (patient, slide), if known."""
    frames: VideoFrames | None = None
    """Of samples that are clips with a class a frame: which frames of which videos."""

    def __post_init__(self) -> None:
        refuse_controls("ids of samples", self.ids)
        refuse_controls("groups of samples", self.groups or ())

    def __len__(self) -> int:
        return len(self.ids)


# ---------------------------------------------------------------------------- standardisation


def is_constant(mean: Any, variance: Any, count: int) -> Any:
    """Whether columns of `count` numbers vary by no more than rounding in float64 makes them vary:
    variance <= N eps variance + (N eps mean)^2, the bound of scikit-learn's StandardScaler. Sixty
    times 0.1 has the deviation 1e-17.

    Args:
        mean, variance: of each column, arrays, tensors or numbers.
    """
    eps = float(np.finfo(np.float64).eps)
    return variance <= count * eps * variance + (count * eps * mean) ** 2


def column_means(values: np.ndarray) -> np.ndarray:
    """Mean (D,) in float64 of each column of numbers (N, D), N > 0, that of a constant column
    exactly its value, which the quotient of a sum is not: sixty times 1e30 miss it by 1e14."""
    return np.clip(values.mean(0, dtype=np.float64), values.min(0), values.max(0))


@dataclass(frozen=True, slots=True)
class Standardizer:
    """(x - mean) / std of each column: features of a train split, inputs of a probe or a map, and
    targets are all standardised by this one. A constant column has std 1, or, where rounding makes
    it vary by more, what that can come to; its mean is exactly its value."""

    mean: np.ndarray  # (D,) float64
    std: np.ndarray  # (D,)

    @classmethod
    def of(cls, blocks: "Callable[[], Iterable[Tensor]]") -> "Standardizer":
        """That of the rows of all blocks (B, D), by the device they are on. `blocks` is called
        twice: two passes keep the digits of large values."""
        import torch

        total, count = torch.zeros(()), 0
        low, high = torch.tensor(math.inf), torch.tensor(-math.inf)
        for block in blocks():
            values = block.double()
            total, count = total + values.sum(0), count + len(values)
            low = torch.minimum(low.to(values), values.amin(0))
            high = torch.maximum(high.to(values), values.amax(0))
        mean = (total / count).clamp(low, high)  # see column_means
        squares = sum((block.double() - mean).square_().sum(0) for block in blocks())
        variance = torch.as_tensor(squares / count)
        rounding = (count * float(np.finfo(np.float64).eps) * mean.abs()).clamp(min=1)
        rounding = torch.where(variance.isfinite(), rounding, 1.0)
        std = torch.where(is_constant(mean, variance, count), rounding, variance.sqrt())
        return cls(mean.cpu().numpy(), std.cpu().numpy())

    @classmethod
    def of_array(cls, values: np.ndarray) -> "Standardizer":
        """That of values (N, D)."""
        import torch

        return cls.of(lambda: [torch.from_numpy(values)])

    def __call__(self, values: "Tensor") -> "Tensor":
        """Values (N, D) -> (N, D) float32. The difference of float64 ones is taken in float64:
        float32 rounds 1,700,000,001 to 1,700,000,000."""
        import torch

        kind = torch.float64 if values.dtype == torch.float64 else torch.float32  # all that mps has
        mean, std = (
            torch.as_tensor(part, dtype=kind, device=values.device)
            for part in (self.mean, self.std)
        )
        return (values.to(kind) - mean).div_(std).float()

    def standardized(self, values: np.ndarray) -> np.ndarray:
        """Values (N, D) of any type -> (N, D) float32, by way of float64."""
        import torch

        return self(torch.from_numpy(values).double()).numpy()

    def restored(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs of a model (N, D) in units of the columns, float64."""
        return outputs.astype(np.float64) * self.std + self.mean


# ------------------------------------------------------------------------- kinds of samples


class BaseSamples(Spec, tag_field="kind"):
    """What a sample of a data set is; one Struct a modality."""

    built_in: ClassVar[str] = "resolved"
    spec_kind: ClassVar[SampleKind] = "images"
    """What the spec calls such samples: `samples` of its data set, `takes` of its encoder."""

    @property
    def kind(self) -> str:
        """Name of the modality."""
        return str(self.__struct_config__.tag)


class ImageSamples(BaseSamples, tag="images"):
    """Images (C, H, W)."""

    channels: int
    """1 grey, 3 RGB or 4 RGB and alpha."""
    bit_depth: int
    """Bits per channel: 8 (uint8 samples) or 16 (uint16 samples)."""


class VolumeSamples(BaseSamples, tag="volumes"):
    """Prepared volumes (C, X, Y, Z)."""

    built_in: ClassVar[str] = "loader_volumes"
    spec_kind: ClassVar[SampleKind] = "volumes"

    channels: int
    """Channels of a prepared volume: each series, frame or CT window is one."""
    reading: VolumeReading | None = None
    """How their files are read; none of a data set of the user's own."""
    preparation: VolumePreparation | None = None
    """How they are prepared, without what says where and how fast."""


class SeriesSamples(BaseSamples, tag="series"):
    """Prepared time series (C, T) of any lengths."""

    built_in: ClassVar[str] = "loader_series"
    spec_kind: ClassVar[SampleKind] = "series"

    channels: int
    """Channels of a prepared series."""
    preparation: SeriesPreparation | None = None
    """How they are prepared; none of a data set of the user's own."""
    value_columns: tuple[str, ...] = ()
    """Columns of the channels in CSV files, in their order; none of files without names."""
    time_points: tuple[str, ...] = ()
    """Columns of the time points in CSV files with a row a series; none of other files."""
    step: float | None = None
    """Time from a value to the next; none of series without times."""


def order_of_names(
    own: Sequence[str], wanted: Sequence[str], *, is_wide: bool
) -> Literal["same", "turned", "mixed", "other"]:
    """How the columns of one file of series stand to those of another one: the same; the same ones
    in another order; some the same and others not, so that by their places one would be taken for
    another; or other ones.

    Args:
        is_wide: whether they are time points, of which the one file may have more at the end, and
            which may be others though some are the same, see `are_other_windows`.
    """
    if not own or not wanted:
        return "same"
    ours, theirs = names_compared(own, wanted, is_wide=is_wide)
    shorter = min(len(ours), len(theirs)) if is_wide else None
    if ours[:shorter] == theirs[:shorter]:
        return "same"
    if set(ours) == set(theirs):
        return "turned"
    if is_wide:
        from glovita_lib.series_preparation import are_other_windows  # of series alone

        if are_other_windows(own, wanted):
            return "other"
    if set(ours).isdisjoint(theirs):
        return "other"
    return "mixed"


def names_compared(
    own: Sequence[str], wanted: Sequence[str], *, is_wide: bool
) -> tuple[list[str], list[str]]:
    """The columns of two files of series as they are compared. Capital letters tell no names apart,
    where each has others without; numbers and dates of time points are the same in any writing."""
    if is_wide:
        from glovita_lib.series_preparation import in_one_writing  # of series alone

        ours, theirs = in_one_writing(own, wanted)
    else:
        ours, theirs = list(map(composed, own)), list(map(composed, wanted))
    small = ([name.lower() for name in ours], [name.lower() for name in theirs])
    return (ours, theirs) if any(len(set(names)) < len(names) for names in small) else small


class ClipSamples(BaseSamples, tag="videos"):
    """Clips (C, T, H, W) of videos (T', H', W', 3)."""

    built_in: ClassVar[str] = "loader_video"
    spec_kind: ClassVar[SampleKind] = "videos"

    channels: int
    """Channels of a frame."""
    label_level: Literal["video", "frame"] = "video"
    """What has a label: a video, or each of its frames."""


class VectorSamples(BaseSamples, tag="vectors"):
    """Precomputed features (D,)."""

    built_in: ClassVar[str] = "loader_features"
    spec_kind: ClassVar[SampleKind] = "features"

    width: int
    """D."""


class BagSamples(BaseSamples, tag="bags"):
    """Bags of precomputed features (instances, D)."""

    built_in: ClassVar[str] = "loader_features"
    spec_kind: ClassVar[SampleKind] = "features"

    width: int
    """D."""


@dataclass(slots=True)
class Data:
    """A data set, ready to load from."""

    name: str
    """Tag of the data set."""
    splits: dict[str, Split]
    """train, val and test, as far as they exist."""
    subtask: Subtask
    class_names: tuple[str, ...]
    """Names of the classes, or of the targets of a regression, in the order of the outputs."""
    samples: BaseSamples
    """What a sample is."""
    report: list[str] = field(default_factory=list)
    """Lines worth showing: left-out files, duplicates, classes without samples."""
    ordered: bool = False
    """Whether the classes are a scale in the order of their names, as somebody has stated."""
    number_names: dict[str, str] | None = None
    """See `Outputs`."""
    size_text: str | None = None
    """How large samples are, where that tells how a file was read (series)."""

    def __post_init__(self) -> None:
        what = "targets" if self.subtask == "regression" else "classes"
        refuse_controls(f"data set {self.name}: names of {what}", self.class_names)

    @property
    def outputs(self) -> int:
        """Number of classes or targets."""
        return len(self.class_names)

    @property
    def sizes_text(self) -> str:
        """Samples of each split, and how large they are where that is known."""
        counts = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        return counts if self.size_text is None else f"{counts}; {self.size_text}"

    @property
    def has_order(self) -> bool:
        """Whether a metric may go by the order of the classes: it is stated, or their names are
        numbers or differ in one alone."""
        return self.ordered or are_ordered(self.class_names)


def splits_needed(there: Iterable[str], wanted: Sequence[str] | None) -> set[str]:
    """The splits, of those that are there, whose samples must be readable: the first of the wanted
    ones, else all. See `build_data`."""
    there = list(there)
    first = next((name for name in wanted or () if name in there), None)
    return set(there) if first is None else {first}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a data set is told of the run that reads it; those without files need none of it."""

    trained: Outputs | None = None
    """The model that the samples are for, whose outputs the labels of files are read as."""
    wanted: Sequence[str] | None = None
    """Names of splits, of which the first that is there is needed; empty: those that are there;
    none: all that training uses."""
    predicts: OnlyPrediction | None = None
    """What alone the head predicts that a spec names: it says what the labels of files are that may
    be classes or values, where nothing states their subtask."""


@ByStruct
def read_data_set(spec: BaseData, *, seed: int, asked: Asked) -> Data:
    """The whole data set of a spec, before data_fraction.

    Raises:
        UserError: what is missing, broken or contradictory, all of a kind at once.
    """
    raise TypeError(f"no builder for {type(spec).__name__}")


@dataclass(frozen=True, slots=True)
class ArraySource(Source):
    """Samples that are in memory already; several splits may share one array."""

    samples: np.ndarray  # (M, C, H, W) uint8 or uint16
    rows: np.ndarray  # (N,) rows of `samples` that make up the split

    @property
    def uniform(self) -> tuple[int, ...]:
        return self.samples.shape[1:]

    def fetch(self, rows: np.ndarray) -> np.ndarray:
        return self.samples[self.rows[rows]]

    def nbytes(self) -> int:
        size = int(np.prod(self.samples.shape[1:])) * self.samples.itemsize
        return size * len(self.rows)

    def select(self, rows: np.ndarray) -> "ArraySource":
        return ArraySource(self.samples, self.rows[rows])


@dataclass(slots=True)
class CachedSource:
    """Decoded samples: one array (N, C, H, W) if they are uniform, else a list."""

    samples: np.ndarray | list[Any]
    fitted: bool  # whether they were cropped and resized when they were decoded
    collate: Callable[[Any], Any] | None = None  # that of the source they came from
    windows: ClassVar[None] = None  # samples in memory are sliced as they are

    @property
    def uniform(self) -> tuple[int, ...] | None:
        return self.samples.shape[1:] if isinstance(self.samples, np.ndarray) else None

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[Any]:
        if isinstance(self.samples, np.ndarray):
            return self.samples[rows]
        return [self.samples[row] for row in rows]


def subset(split: Split, rows: np.ndarray) -> Split:
    """The split of these rows, in this order."""
    return Split(
        ids=[split.ids[row] for row in rows],
        targets=None if split.targets is None else split.targets[rows],
        source=split.source.select(rows),
        groups=None if split.groups is None else [split.groups[row] for row in rows],
        frames=None if split.frames is None else split.frames.select(rows),
    )


Images = Callable[[int], np.ndarray]
"""The image (C, H, W) of a sample, uint8 or uint16."""


# ------------------------------------------------------------------ some samples of a source
#
# A sample is read in the same way whichever others are read with it. Where that is asked, one that
# cannot be read is replaced and noted instead of ending the run.


@dataclass(frozen=True)
class PartSource(Source):
    """Some samples of a source.

    Whether they are of one size is said of the whole source: images of one size are resized as a
    batch on the training device, others one by one where they are decoded. So a sample takes the
    same way in a whole run, in one that was continued, and on any number of ranks.
    """

    whole: Source
    rows: np.ndarray  # (N,) rows of `whole`

    @property
    def uniform(self) -> tuple[int, ...] | None:
        """(C, H, W) where all samples of the whole source have one size."""
        return self.whole.uniform

    @property
    def sizes(self) -> np.ndarray | None:
        """Spatial sizes (N, 2 or 3), where they are known."""
        return None if self.whole.sizes is None else self.whole.sizes[self.rows]

    @property
    def windows(self) -> Callable[[np.ndarray], list[Any]] | None:
        """That of the whole source."""
        windows = self.whole.windows
        return None if windows is None else lambda rows: windows(self.rows[rows])

    @property
    def collate(self) -> Callable[[Any], Any] | None:
        """That of the whole source."""
        return self.whole.collate

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[Any]:
        """Samples of these rows."""
        return self.whole.fetch(self.rows[rows])

    def nbytes(self) -> int:
        """Size of all samples of the whole source, decoded, bytes."""
        return self.whole.nbytes()

    def select(self, rows: np.ndarray) -> "PartSource":
        """Some of the samples."""
        return PartSource(self.whole, self.rows[rows])


@dataclass(frozen=True)
class SkippingSource(PartSource):
    """Gives a black image in the place of one that cannot be read and leaves a note about it in a
    folder, where every process finds it, named by the row of the whole source."""

    notes: Path
    blank: tuple[int, int, int]  # (C, H, W) of a black image whose own size is unknown
    bit_depth: int

    def fetch(self, rows: np.ndarray) -> np.ndarray | list[Any]:
        """Samples, read one by one where one of them fails."""
        wanted = self.rows[rows]
        try:
            return self.whole.fetch(wanted)
        except UserError:
            images = [self.one(int(row)) for row in wanted]
            return np.stack(images) if self.uniform is not None else images

    def one(self, row: int) -> np.ndarray:
        """A sample, or a black one."""
        try:
            return self.whole.fetch(np.array([row]))[0]
        except UserError as error:
            files.write_text(self.notes / f"{row}.txt", str(error))
            return np.zeros(self.shape(row), np.uint8 if self.bit_depth == 8 else np.uint16)

    def shape(self, row: int) -> tuple[int, ...]:
        """(C, H, W) of a sample that cannot be read."""
        if self.uniform is not None:
            return self.uniform
        sizes = self.whole.sizes
        return self.blank if sizes is None else (self.blank[0], *map(int, sizes[row]))

    def select(self, rows: np.ndarray) -> "SkippingSource":
        """Some of the samples."""
        return SkippingSource(self.whole, self.rows[rows], self.notes, self.blank, self.bit_depth)


def skipped(notes: Path) -> dict[int, str]:
    """Rows that could not be read, in order, and why."""
    paths = sorted(notes.glob("[0-9]*.txt"), key=lambda path: int(path.stem))
    return {int(path.stem): path.read_text("utf-8") for path in paths}
