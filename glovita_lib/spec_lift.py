"""How an encoder reads larger samples than its network takes: slices, frames, windows, inflated
kernels, series folded to images."""

import operator
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_conditions import read_unless
from glovita_lib.spec_errors import shown

Aggregation = Literal["cls_token", "avg", "patch_mean", "sum", "mean_all", "joint", "pooled"]
Positive = Annotated[int, Meta(ge=1)]
Axis = Literal["x", "y", "z"]


class Slices(Spec):
    """Which slices of a volume an encoder of images sees; without stride and count all."""

    built_in: ClassVar[str] = "encoder_slicewise"

    axis: Axis = "z"
    """Axis that slices lie across; the first of the others is the height of an image."""
    stride: Positive | None = None
    """Voxels from a slice to the next, around the middle."""
    count: Positive | None = None
    """Number of slices at most, evenly over the volume; with stride those around the middle."""
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


class Inflation(Spec):
    """How the kernels of a convolutional network get a third axis, as long as the others."""

    built_in: ClassVar[str] = "encoder_slicewise"

    axis: Axis = "z"
    """Axis of the volume that kernels did not have."""
    kernel: Literal["mean", "center"] = "mean"
    """Whether weights are spread along it (Carreira, Zisserman, CVPR 2017) or in its middle."""


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


class Folding(Spec):
    """How a time series becomes an image (TiViT, arXiv 2506.08641): each channel by itself, scaled
    by median and quartiles, cut into overlapping rows, stretched to values 0 to 1 and resized."""

    built_in: ClassVar[str] = "encoder_series"

    patch: Annotated[int, Meta(ge=2)] | None = None
    """Time points of a row; none is the square root of the length."""
    stride: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """Distance of one row to the next, share of a row."""
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


Lift = Literal["slices", "inflate", "windows", "fold"]
Lifting = Slices | Inflation | Windows | Folding
