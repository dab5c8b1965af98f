"""Time series in a spec: what is done to each of them when they are read, how they are augmented,
and their encoders."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_augment import (
    BaseOps,
    Probability,
    part_of,
    partial,
    policy,
    unread_changes,
)
from glovita_lib.spec_conditions import read_if
from glovita_lib.spec_errors import (
    Count,
    Fraction,
    NonNegative,
    PathText,
    Positive,
    SampleKind,
)
from glovita_lib.spec_lift import BaseEncoder, Channels, OwnChannels, WithoutClassToken

SeriesTrainPolicy = Literal["default_series_1", "default_series_2", "default_series_3"]
SeriesTestPolicy = Literal["shared_default_series"]


class SeriesPreparation(Spec):
    """What is done to every series when it is read, in this order."""

    step: Positive | None = None
    """Distance of the time points that series are resampled to, in the unit of their times, linear
    between observations; none takes them as they are and refuses irregular times and gaps."""
    normalize: Literal["zscore", "none"] = "zscore"
    """Whether each channel of each series is brought to mean 0 and deviation 1 over the values that
    are there; a constant channel becomes 0."""
    fill: Literal["linear", "previous", "zero"] = "linear"
    """What stands for missing values: what lies on the line between their neighbours, and the
    nearest value at both ends; the value before, the first one at the start; or 0, the mean of the
    channel under zscore. Channels without any value are 0."""
    mask_channels: bool = False
    """Whether each channel gets another one behind all of them, 1 where its value was there and 0
    where it is filled."""


# ---------------------------------------------------------------------------------- series
#
# Operations that move time points are one map from the time points of the result to those of the
# source, and one interpolation. Lengths are each series' own.


class SeriesOps(BaseOps):
    """Parameters of the augmentations of time series (C, T)."""

    time_warp_p: Probability = 0.0
    """Probability of a time that runs faster here and slower there."""
    time_warp_std: Annotated[float, part_of("time_warp_p", ge=0)] = 0.2
    """Standard deviation of its speed around 1."""
    time_warp_knots: Annotated[int, part_of("time_warp_p", ge=2)] = 6
    """Evenly spaced time points at which a speed is drawn, linear between them."""
    permute_p: Probability = 0.0
    """Probability that segments change places."""
    permute_segments: Annotated[tuple[Count, Count], part_of("permute_p")] = (2, 5)
    """Number of equally long segments, smallest and largest."""
    slice_p: Probability = 0.0
    """Probability of a window that is stretched to the length of the series."""
    slice_share: Annotated[tuple[Fraction, Fraction], part_of("slice_p")] = (0.8, 1.0)
    """Share of the series in the window, lowest and highest."""
    magnitude_warp_p: Probability = 0.0
    """Probability of a factor that changes smoothly over time."""
    magnitude_warp_std: Annotated[float, part_of("magnitude_warp_p", ge=0)] = 0.2
    """Standard deviation of the factor around 1, of each channel."""
    magnitude_warp_knots: Annotated[int, part_of("magnitude_warp_p", ge=2)] = 6
    """Evenly spaced time points at which a factor is drawn, a Catmull-Rom spline between them."""
    scale_p: Probability = 0.0
    """Probability of a factor of each channel."""
    scale_std: Annotated[float, part_of("scale_p", ge=0)] = 0.1
    """Standard deviation of the factor around 1."""
    jitter_p: Probability = 0.0
    """Probability of additive Gaussian noise."""
    jitter_std: Annotated[tuple[NonNegative, NonNegative], part_of("jitter_p")] = (0.0, 0.1)
    """Standard deviation of the noise in units of the values, lowest and highest."""


@partial
class SeriesKwargs(SeriesOps):
    """Parameters that replace those of a policy for time series, in the order in which its
    operations are applied; an unset one (none) keeps the value of the named policy."""


PLAIN_SERIES = SeriesOps()
SERIES_2 = policy(PLAIN_SERIES, scale_p=0.5, jitter_p=0.5)
SERIES_TRAIN: dict[str, SeriesOps] = {
    "default_series_1": PLAIN_SERIES,
    "default_series_2": SERIES_2,
    "default_series_3": policy(SERIES_2, time_warp_p=0.3, slice_p=0.5, magnitude_warp_p=0.3),
}
SERIES_TEST: dict[str, SeriesOps] = {"shared_default_series": PLAIN_SERIES}


class SeriesAugmentation(Spec):
    """Policies of time series."""

    train_policy: SeriesTrainPolicy | None = None
    """Policy of the training split; none takes the data set's default."""
    test_policy: SeriesTestPolicy | None = None
    """Policy of evaluation, inference and extraction; none takes the data set's default."""
    train_kwargs: SeriesKwargs = SeriesKwargs()
    """Parameters that replace those of the train policy."""

    def unread_kwargs(self, default_policies: tuple[str, str]) -> Iterator[tuple[str, str]]:
        """Parameters that no operation of their policy reads, under the policies of a data set."""
        train = SERIES_TRAIN[self.train_policy or default_policies[0]]
        yield from unread_changes("train_kwargs", train, self.train_kwargs)


class ResolvedSeriesAugmentation(Spec):
    """What augmentation of time series a run uses, complete; saved with its checkpoints."""

    train_policy: str
    """Policy of the training split."""
    test_policy: str
    """Policy of evaluation, inference and extraction."""
    length: int
    """Time points of the longest series, which encoders are built for; any length is taken."""
    train: SeriesOps
    """Every parameter of the train policy."""
    test: SeriesOps
    """Every parameter of the test policy."""


# -------------------------------------------------------------------------------- encoders


class SeriesEncoder(OwnChannels, WithoutClassToken, BaseEncoder):
    """What the encoders of time series (C, T) of any length share; none has a class token. Means
    and norms are over the time points that count."""

    built_in: ClassVar[str] = "encoder_series"

    input_channels: Channels | None = None
    """Channels of the input; none takes the data's."""
    weights: PathText | None = None
    """File of weights (pth, pt, safetensors) to start from."""
    weights_key: Annotated[str | None, read_if("weights")] = None
    """Where in the file the network stands, as "state_dict_ema" or "teacher.backbone"; "" is the
    top. none takes the averaged one of several, or the teacher."""

    @property
    def takes(self) -> SampleKind:
        return "series"


class InceptionTimeEncoder(SeriesEncoder, tag="inception_time", tag_field="encoder_type"):
    """InceptionTime (Ismail Fawaz et al., DMKD 2020): modules of three convolutions of different
    lengths and a maximum, with a residual connection over every third. The published classifier is
    the mean of five runs with other seeds, see infer.checkpoint."""

    depth: Count = 6
    """Inception modules."""
    filters: Count = 32
    """Channels of each of the four branches; the width is four times as large."""
    kernel_size: Annotated[int, Meta(ge=4)] = 40
    """Time points of the longest convolution; the others have a half and a quarter of it."""
    bottleneck: Annotated[int, Meta(ge=0)] = 32
    """Channels before the convolutions; 0 leaves them as they are."""


class SeriesResNetEncoder(SeriesEncoder, tag="resnet_1d", tag_field="encoder_type"):
    """The residual network of Wang, Yan, Oates (IJCNN 2017): blocks of three convolutions."""

    features: tuple[Count, ...] = (64, 128, 128)
    """Channels of the blocks; the last is the width."""
    kernel_sizes: tuple[Count, Count, Count] = (8, 5, 3)
    """Time points of the three convolutions of a block."""


class SeriesTransformerEncoder(SeriesEncoder, tag="transformer_1d", tag_field="encoder_type"):
    """A transformer over patches of time points, with sines of their place added (Vaswani et al.,
    2017) and the norm before attention and MLP."""

    patch: Count = 8
    """Time points of a patch; the last one of a series is filled up with zeros."""
    width: Count = 128
    """Features of a token."""
    depth: Count = 4
    """Blocks."""
    heads: Count = 8
    """Attention heads; they share the width."""
    mlp_ratio: Annotated[float, Meta(gt=0)] = 4.0
    """Hidden features of the MLP in proportion to the width."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Probability of dropping a feature of what attention and MLP add."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Attention heads have equally many features, and sines come with cosines."""
        if self.width % (2 * self.heads):
            yield "width", f"{self.width} must be a multiple of twice the {self.heads} heads"
