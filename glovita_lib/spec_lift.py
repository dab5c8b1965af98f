"""What every encoder in a spec answers, and how one reads larger samples than its network takes:
slices, frames, windows, inflated kernels, series folded to images."""

import operator
import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from msgspec import Meta
from msgspec.structs import StructConfig

from glovita_lib.spec import Spec
from glovita_lib.spec_conditions import read_unless
from glovita_lib.spec_errors import SampleKind, shown

Aggregation = Literal["cls_token", "avg", "patch_mean", "sum", "mean_all", "joint", "pooled"]
Positive = Annotated[int, Meta(ge=1)]
Axis = Literal["t", "x", "y", "z"]
AXES: dict[Axis | None, int] = {"t": 0, "x": 0, "y": 1, "z": 2, None: 2}
"""Number of an axis of clips (T, H, W) or volumes (X, Y, Z); unset is that of a volume."""
AXIS_NAMES = {"videos": ("t",), "volumes": ("x", "y", "z")}
USUAL_AXES: dict[str, Axis] = {"videos": "t", "volumes": "z"}
"""Axis that parts follow one another along, by the kind of samples."""


IMAGE_SIZE, PATCH_SIZE = "data.augmentation.image_size", "data.augmentation.patch_size"
FRAMES = "data.sampling.frames"
"""Keys of the size of images and of volumes, for which a lift has others."""


def axis_problems(key: str, axis: Axis | None, samples: str) -> Iterator[tuple[str, str]]:
    """Clips have one axis to be named, time; volumes have three others."""
    if axis is None or samples not in USUAL_AXES or (axis == "t") == (samples == "videos"):
        return
    valid = '"t"' if samples == "videos" else '"x", "y" and "z"'
    yield key, f"{shown(axis)} is no axis of {samples}, which have {valid}: leave it out"


class Slices(Spec):
    """Which slices of a volume, or frames of a clip, an encoder of images sees; without stride and
    count all."""

    built_in: ClassVar[str] = "encoder_slicewise"

    axis: Axis | None = None
    """Axis that slices lie across; the first of the others is the height of an image. none is z of
    volumes, t of clips."""
    stride: Positive | None = None
    """Voxels, or frames, from a slice to the next, around the middle."""
    count: Positive | None = None
    """Number of slices at most, evenly over the volume or clip; with stride those around the
    middle."""
    adjacent: bool = False
    """Whether a channel becomes three: of the slice before, of the slice and of the one behind."""
    size: tuple[Positive, Positive] | None = None
    """Height and width in pixels that slices are resized to; none keeps them."""
    aggregation: Aggregation | None = None
    """How the tokens of a slice become its vector, as model.feature_aggregation_method says it of
    images; that key is about the vectors of the slices then."""
    chunk: Positive | None = None
    """Slices that pass the encoder at once; where it trains, the backward pass computes each chunk
    anew. none is all where it trains, else 64."""

    def renamed(self, text: str) -> str:
        """A message about images or clips with the keys of the size and number of slices."""
        both = re.sub(rf"{IMAGE_SIZE} = (\d+)", rf"{IMAGE_SIZE} = [\1, \1]", text)
        sized = both.replace(IMAGE_SIZE, "model.encoder.slices.size")
        return sized.replace(FRAMES, "model.encoder.slices.count")


class Inflation(Spec):
    """How the kernels of a convolutional network get a third axis, as long as the others."""

    built_in: ClassVar[str] = "encoder_inflated"

    axis: Axis | None = None
    """Axis that kernels did not have; none is z of volumes, t of clips."""
    kernel: Literal["mean", "center"] = "mean"
    """Whether weights are spread along it (Carreira, Zisserman, CVPR 2017) or in its middle."""

    def renamed(self, text: str) -> str:
        """A message about images with the key of the size of volumes; clips are of images."""
        return text if self.axis == "t" else text.replace(IMAGE_SIZE, PATCH_SIZE)


OF_OVERLAP = read_unless("stride")


class Windows(Spec):
    """Which windows of a volume an encoder of volumes sees."""

    built_in: ClassVar[str] = "encoder_slicewise"

    size: tuple[Positive, Positive, Positive] | None = None
    """Voxels X, Y, Z of a window; none takes the patch that the encoder was made for. A shorter
    volume is filled up with the minimum of each channel."""
    overlap: Annotated[float, Meta(ge=0, lt=1), OF_OVERLAP] = 0.25
    """What neighbouring windows have in common along each axis, share of their side; the last one
    ends with the volume."""
    stride: tuple[Positive, Positive, Positive] | None = None
    """Voxels X, Y, Z from a window to the next; none follows from overlap."""
    skip_below: float | None = None
    """Windows without a voxel above this value, after normalisation, are left out (air), unless
    all are; none keeps all."""
    aggregation: Aggregation | None = None
    """How the tokens of a window become its vector, as model.feature_aggregation_method says it of
    volumes; that key is about the vectors of the windows then."""
    chunk: Positive | None = None
    """Windows that pass the encoder at once; where it trains, the backward pass computes each chunk
    anew. none is all where it trains, else 16."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Windows leave no voxel out between them."""
        if self.size and self.stride and any(map(operator.gt, self.stride, self.size)):
            yield (
                "stride",
                f"{shown(self.stride)} leaves voxels out between windows of {shown(self.size)}: at"
                " most as long",
            )

    def renamed(self, text: str) -> str:
        """A message about volumes with the key of the size of windows."""
        return text.replace(PATCH_SIZE, "model.encoder.windows.size")


class Folding(Spec):
    """How a time series becomes an image (TiViT, arXiv 2506.08641): each channel by itself, scaled
    by median and quartiles, cut into overlapping rows, stretched to values 0 to 1 and resized. The
    last row ends with the series; the first value is repeated before it as often as that takes."""

    built_in: ClassVar[str] = "encoder_series"

    patch: Annotated[int, Meta(ge=2)] | None = None
    """Time points of a row; none is the square root of the length."""
    stride: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """Distance of one row to the next, share of a row. 1 has no overlap, and columns for rows, as
    in the published code."""
    size: Positive | None = None
    """Side of the image, pixels; none takes the encoder's."""
    contrast: Annotated[float, Meta(gt=0)] = 0.8
    """Exponent of the values 0 to 1."""
    layer: Annotated[int, Meta(ge=1)] | None = None
    """How many blocks of a transformer are kept, from the input: inner ones are often the better
    for series. none keeps all."""
    aggregation: Aggregation | None = None
    """How the tokens of an image become its vector, as model.feature_aggregation_method says it of
    images; that key is about the channels then, whose vectors stand side by side for none."""

    def renamed(self, text: str) -> str:
        """A message about images with the key of the side of the image of a series, which is one
        frame."""
        if FRAMES in text:
            return "a series becomes one image, without frames: leave it out"
        return text.replace(IMAGE_SIZE, "model.encoder.folding.size")


Lift = Literal["slices", "inflate", "windows", "fold"]
Lifting = Slices | Inflation | Windows | Folding


# --------------------------------------------------------------------------- encoders

Channels = Annotated[int, Meta(ge=1)]
Patch = int | tuple[int, ...]
"""Side of a patch of an image, or its height and width, pixels."""
ENCODERS = {  # one that takes them
    "images": "timm",
    "volumes": "residual_encoder",
    "videos": "torchvision_video",
    "series": "inception_time",
}
OTHER_DATA = {
    "features": ' set data.dataset to "precomputed_features", or',
    "volumes": ' set data.dataset to "generic_3d_dataset" or "custom_3d_dataset", or',
}


class OwnChannels:
    """The sections of encoders that may state the channels of their input."""

    __slots__ = ()

    input_channels: Channels | None

    @property
    def stated_channels(self) -> int | None:
        """Channels of the input, where the section states them."""
        return self.input_channels


class WithoutClassToken:
    """The sections of encoders whose networks have no class token."""

    __slots__ = ()
    __struct_config__: ClassVar[StructConfig]

    @property
    def without_class_token(self) -> str | None:
        """What the encoder is called."""
        return str(self.__struct_config__.tag)


class BaseEncoder(Spec):
    """What other sections and the model ask every encoder."""

    built_in: ClassVar[str] = "encoder"

    @property
    def takes(self) -> SampleKind:
        """What a sample is; either is an image, a volume, a clip or a series."""
        return "images"

    def reads(self, samples: str) -> bool:
        """Whether samples of a kind, such as "images" or "features", are what it takes."""
        return samples == self.takes or (self.takes == "either" and samples != "features")

    @property
    def stated_channels(self) -> int | None:
        """Channels of the input, where the section states them."""
        return None

    @property
    def without_class_token(self) -> str | None:
        """Name of the model, where it says that there is no class token."""
        return None

    @property
    def lifting(self) -> "Lifting | None":
        """How samples become what the network takes, where they are larger than that."""
        return None

    def of_samples(self, samples: str) -> Self:
        """The section with what is left open and follows from the kind of samples."""
        return self

    def patch_problems(self, patch: Patch, side: int | None) -> Iterator[tuple[str, str]]:
        """What is wrong with a size of the patches of images of a side, None: not known yet."""
        yield (
            "patch_size",
            f"encoder {shown(self.__struct_config__.tag)} has no patch embedding of an asked size:"
            " leave it out, or name a transformer of timm, e.g. vit_base_patch16_224",
        )

    def with_patch_size(self, patch: Patch) -> Self:
        """The section, whose network is built for patches of a size."""
        raise TypeError(f"{type(self).__name__} has patches of one size")  # see patch_problems

    def sample_problems(self, samples: str) -> Iterator[tuple[str, str]]:
        """Features pass by the encoder; images and volumes have one that takes them."""
        if samples == "features" and self.takes != "features":
            yield "encoder_type", 'the samples are features already: set it to "precomputed"'
        elif not self.reads(samples):
            yield (
                "encoder_type",
                f"{shown(self.__struct_config__.tag)} takes {self.takes}, and the samples are"
                f" {samples}:{OTHER_DATA.get(self.takes, '')} name an encoder for"
                f" {samples}, e.g. {shown(ENCODERS[samples])}{self.other_samples(samples)}",
            )

    def other_samples(self, samples: str) -> str:
        """What else lets the encoder read samples of a kind, as the end of a message."""
        return ""

    def channel_problems(self, channels: int) -> Iterator[tuple[str, str]]:
        """Where the section states the channels, the data have as many."""
        stated = self.stated_channels
        if stated is not None and stated != channels:
            yield (
                "input_channels",
                f"{stated}, but the samples have {channels} channels: leave it out",
            )


class LiftedEncoder(BaseEncoder):
    """An encoder that may read larger samples than its network takes."""

    lift: Lift | None = None
    """How it reads whole volumes; none: as its network does."""
    windows: Windows = Windows()
    """Which windows, and what becomes of them."""

    windowed: ClassVar[bool] = True
    """Whether its network may take volumes, and so windows of them."""

    @property
    def has_patch(self) -> bool:
        """Whether it was made for a certain patch."""
        return False

    @property
    def lifts(self) -> dict[str, tuple[str, Lifting]]:
        """Key and options of every lift, by the value of `lift`."""
        return {"windows": ("windows", self.windows)}

    @property
    def lifting(self) -> Lifting | None:
        return None if self.lift is None else self.lifts[self.lift][1]

    @property
    def without_class_token(self) -> str | None:
        return None if self.lift is None else f"lift = {shown(self.lift)}"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Options of a lift are read with it alone; windows have a size."""
        for lift, (key, options) in self.lifts.items():
            if self.lift != lift and options != type(options)():
                needed = f"model.encoder.lift = {shown(lift)}"
                yield key, f"it would be ignored, it is read only with {needed}"
        tag = shown(self.__struct_config__.tag)
        if self.lift == "windows" and not self.windowed:
            yield (
                "lift",
                f'"windows" cuts volumes for an encoder of volumes, and {tag} is one of images: set'
                ' it to "slices", or encoder_type to one of volumes, e.g. "residual_encoder"',
            )
        elif self.lift == "windows" and self.windows.size is None and not self.has_patch:
            yield "windows.size", f"{tag} takes windows of any size: name theirs, as [64, 64, 64]"
