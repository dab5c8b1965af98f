"""Volumes in a spec: how their files are read, what is done to each of them once, and how they are
augmented."""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_augment import (
    BaseOps,
    Probability,
    part_of,
    partial,
    policy,
    random_problems,
    unread_changes,
)
from glovita_lib.spec_conditions import read_if
from glovita_lib.spec_errors import (
    Count,
    Fraction,
    NonNegative,
    PathText,
    Positive,
    shown,
)

OF_SPACING = read_if("spacing")
OF_WINDOWS = read_if("evaluation", "windows")
Percentage = Annotated[float, Meta(ge=0, le=100)]
Spacing = tuple[Positive, Positive, Positive]
Voxels = tuple[Count, Count, Count]
CACHE = "volume_cache"  # folder of the cache files, below that of the data set
VolumeTrainPolicy = Literal[
    "default_3d_1",
    "default_3d_2",
    "default_3d_3",
    "default_3d_4",
    "default_nnunet",
    "default_nnunet_DA5",
    "default_nnfoundation",
]
VolumeTestPolicy = Literal["shared_default_3d", "default_nnfoundation"]
AxisName = Literal["x", "y", "z"]
Normalization = Literal["none", "zscore", "ct_window", "percentile", "minmax"]


class VolumeReading(Spec):
    """How volume files are read where they do not say it themselves."""

    canonical: bool = True
    """Whether axes are turned to run from left to right, back to front and foot to head (RAS); else
    they stay as they are stored."""
    frame: Annotated[int, Meta(ge=0)] | Literal["channels"] | None = None
    """Frame that is taken of a NIfTI file with four axes, from 0; "channels" takes each frame as a
    channel; none refuses such files. Samples of which no file has that frame are refused."""
    series: tuple[str, ...] = ()
    """Conditions that choose a series of a DICOM folder, "Keyword=pattern" with * and ?, several
    joined by &; each condition gives one channel, or belongs to one path column."""
    array_key: str | None = None
    """Entry of a .npz file that is the volume; none takes the only array there."""
    array_spacing: Spacing | None = None
    """Spacing of .npy, .npz and .b2nd files that state none, X, Y, Z, mm."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Conditions have a keyword and a pattern."""
        for text in self.series:
            if re.fullmatch(r"\s*\w+\s*=[^&]+(&\s*\w+\s*=[^&]+)*", text) is None:
                yield "series", f'{shown(text)} must read "Keyword=pattern", as "EchoNumbers=1"'


class VolumePreparation(Spec):
    """What is done to every volume once, and kept in a cache file each; a changed value makes new
    files."""

    spacing: Spacing | None = None
    """Spacing that volumes are resampled to, X, Y, Z, mm; none keeps each volume's own."""
    interpolation: Annotated[Literal["nearest", "linear", "cubic"], OF_SPACING] = "linear"
    """Resampling: nearest voxel, linear, or cubic spline."""
    antialias: Annotated[bool, OF_SPACING] = True
    """Whether axes that get fewer voxels are smoothed before, by a Gaussian of (factor - 1) / 2
    voxels."""
    anisotropy: Annotated[float, Meta(ge=1), OF_SPACING] = 3.0
    """Across the one axis whose spacing is more than this many times the smallest, in the file or
    in spacing, the nearest slice is taken and nothing is interpolated."""
    foreground: float | Literal["nonzero", "otsu"] = "nonzero"
    """What is foreground, in any channel: voxels other than 0, above Otsu's threshold, or above
    this value of the file (CT: -500)."""
    crop: Literal["none", "foreground"] = "none"
    """Whether volumes are cut to the box around their foreground."""
    crop_margin: Annotated[float, Meta(ge=0), read_if("crop", "foreground")] = 0.0
    """Margin around that box, mm."""
    normalize: Normalization | tuple[Normalization, ...] = "zscore"
    """Intensities, of each volume and channel by itself: mean 0 and deviation 1 (zscore), windows
    of CT, percentiles, or minimum and maximum as 0 and 1; a list has one entry a channel."""
    statistics: Annotated[
        Literal["all", "foreground"],
        read_if("has_statistics", True, words="normalize zscore, percentile or minmax"),
    ] = "all"
    """Voxels that means, percentiles and extremes are taken over, after the crop."""
    ct_windows: Annotated[
        tuple[tuple[float, Positive], ...],
        read_if("has_windows", True, words='normalize = "ct_window"'),
    ] = ((40.0, 400.0),)
    """Level and width of CT windows, Hounsfield units; each becomes a channel, clipped to 0 and
    1."""
    percentiles: Annotated[
        tuple[Percentage, Percentage],
        read_if("has_percentiles", True, words='normalize = "percentile"'),
    ] = (0.5, 99.5)
    """Percentiles that become 0 and 1; beyond them values are clipped."""
    size: Voxels | None = None
    """Voxels X, Y, Z that prepared volumes are cut or padded to around their centre; none keeps
    each volume's own."""
    fill_nan: float | None = None
    """Value of the file that takes the place of NaN and infinite voxels; none refuses such
    volumes."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the cached voxels; float16 rounds to 3 digits."""
    cache_dir: PathText | None = None
    """Folder of the cache files; none: volume_cache below data_root_dir."""
    workers: Count | None = None
    """Processes that prepare volumes; none: one a core."""

    def cache_folder(self, beside: str) -> str:
        """Folder of the cache files of volumes of a folder."""
        return os.path.join(beside, CACHE) if self.cache_dir is None else self.cache_dir

    def processes(self, cores: int) -> int:
        """Processes that prepare volumes on so many cores."""
        return self.workers or cores

    @property
    def normalizations(self) -> tuple[Normalization, ...]:
        """The normalisation of each channel, or the one of all."""
        return (self.normalize,) if isinstance(self.normalize, str) else self.normalize

    @property
    def has_statistics(self) -> bool:
        """Whether figures of the volume itself are needed."""
        return not {"zscore", "percentile", "minmax"}.isdisjoint(self.normalizations)

    @property
    def has_windows(self) -> bool:
        """Whether a channel is cut into CT windows."""
        return "ct_window" in self.normalizations

    @property
    def has_percentiles(self) -> bool:
        """Whether a channel is scaled by its percentiles."""
        return "percentile" in self.normalizations

    def channels(self, stored: int) -> int:
        """Channels of a prepared volume whose files have so many."""
        names = self.normalizations
        names = names * stored if len(names) == 1 else names
        return sum(len(self.ct_windows) if name == "ct_window" else 1 for name in names)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Percentiles ascend; lists are not empty."""
        low, high = self.percentiles
        if low >= high:
            yield "percentiles", f"{shown(self.percentiles)} must ascend"
        if not self.normalizations:
            yield "normalize", "[] names no normalisation: name one for all, or one a channel"
        if not self.ct_windows:
            yield "ct_windows", "[] has no window: give [level, width], as [[40, 400]]"


# ---------------------------------------------------------------------------------- volumes
#
# Names and meaning of the operations are those of nnU-Net (batchgeneratorsv2). An operation "of
# channels" is drawn for the sample, then for each of its channels, which have their own numbers.


class VolumeOps(BaseOps):
    """Parameters of the augmentations of volumes (C, X, Y, Z), whose intensities are normalised."""

    crop: Literal["center", "random", "foreground"] = "center"
    """Where the patch is cut: around the centre, at a random place, or there with a share around
    voxels of the foreground; what lies outside the volume is the minimum of its channel."""
    foreground_share: Annotated[float, part_of("crop", "foreground", ge=0, le=1)] = 0.33
    """Share of the samples whose patch has a random voxel of the foreground in its middle."""
    rotate_p: Probability = 0.0
    """Probability of a rotation."""
    rotate_radians: Annotated[float, part_of("rotate_p", ge=0, le=3.1416)] = 0.5
    """Angle about each axis, drawn from -this to +this, radians; across thick slices none."""
    rotate_axis_p: Annotated[float, part_of("rotate_p", ge=0, le=1)] = 1.0
    """Probability of each axis that the rotation goes about it too."""
    scale_p: Probability = 0.0
    """Probability of a change of scale."""
    scale: Annotated[tuple[Positive, Positive], part_of("scale_p")] = (0.7, 1.4)
    """How much of the volume the patch shows, as a factor a side, lowest and highest: above 1 what
    is in it gets smaller (the meaning of nnU-Net)."""
    scale_same_p: Annotated[float, part_of("scale_p", ge=0, le=1)] = 1.0
    """Probability that the factor is the same along all axes."""
    elastic_p: Probability = 0.0
    """Probability of an elastic deformation, a cubic B-spline through random control points."""
    elastic_points: Annotated[int, part_of("elastic_p", ge=2)] = 5
    """Distances between control points that an axis of the patch is long."""
    elastic_strength: Annotated[tuple[Probability, Probability], part_of("elastic_p")] = (0.0, 0.3)
    """Largest shift of control points along each axis, share of their distance, lowest and highest;
    up to 0.4 nothing folds (Choi and Lee 2000)."""
    rot90_p: Probability = 0.0
    """Probability of one to three quarter turns in the plane of two of mirror_axes on which the
    patch is as long."""
    transpose_p: Probability = 0.0
    """Probability that those of mirror_axes on which the patch is as long are exchanged at
    random."""
    mirror_p: Probability = 0.0
    """Probability of mirroring along each of mirror_axes."""
    noise_p: Probability = 0.0
    """Probability of additive Gaussian noise."""
    noise_std: Annotated[tuple[NonNegative, NonNegative], part_of("noise_p")] = (0.0, 0.1)
    """Standard deviation of the noise, lowest and highest (what nnU-Net calls variance)."""
    blur_p: Probability = 0.0
    """Probability of a blur of channels."""
    blur_sigma: Annotated[tuple[Positive, Positive], part_of("blur_p")] = (0.5, 1.0)
    """Deviation of the Gaussian along each axis, voxels, lowest and highest."""
    blur_same_p: Annotated[float, part_of("blur_p", ge=0, le=1)] = 0.0
    """Probability that the deviation is the same along all axes."""
    blur_first: Annotated[bool, part_of("blur_p")] = False
    """Whether the blur comes before the noise, which it would take away."""
    blur_channel_p: Annotated[float, part_of("blur_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    median_share: Annotated[float, part_of("blur_p", ge=0, le=1)] = 0.0
    """Share of the blurred samples that get a median filter instead of a Gaussian."""
    median_size: Annotated[tuple[Count, Count], part_of("blur_p")] = (2, 7)
    """Side of the median filter, voxels, smallest and largest."""
    brightness_p: Probability = 0.0
    """Probability of a brightness factor of channels."""
    brightness: Annotated[tuple[NonNegative, NonNegative], part_of("brightness_p")] = (0.75, 1.25)
    """Brightness factor, lowest and highest; below and above 1 as often."""
    brightness_channel_p: Annotated[float, part_of("brightness_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    shift_p: Probability = 0.0
    """Probability of a number added to the values of channels."""
    shift_std: Annotated[float, part_of("shift_p", ge=0)] = 0.5
    """Standard deviation of that number."""
    shift_channel_p: Annotated[float, part_of("shift_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    contrast_p: Probability = 0.0
    """Probability of a contrast change of channels."""
    contrast: Annotated[tuple[NonNegative, NonNegative], part_of("contrast_p")] = (0.75, 1.25)
    """Factor of the distance to the mean, lowest and highest; below and above 1 as often."""
    contrast_channel_p: Annotated[float, part_of("contrast_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    contrast_clip_share: Annotated[float, part_of("contrast_p", ge=0, le=1)] = 1.0
    """Share of these samples that stay between their minimum and maximum."""
    low_resolution_p: Probability = 0.0
    """Probability of a low resolution of channels: nearest voxels down, linear up again; across
    thick slices nothing changes."""
    low_resolution: Annotated[tuple[Fraction, Fraction], part_of("low_resolution_p")] = (0.5, 1.0)
    """Voxels that are left along each axis, as a share, lowest and highest."""
    low_resolution_channel_p: Annotated[float, part_of("low_resolution_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    gamma_inverted_p: Probability = 0.0
    """Probability of a gamma curve on the inverted values; mean and deviation are kept."""
    gamma_inverted: Annotated[tuple[Positive, Positive], part_of("gamma_inverted_p")] = (0.7, 1.5)
    """Exponent, lowest and highest; below and above 1 as often."""
    gamma_p: Probability = 0.0
    """Probability of a gamma curve on values between minimum and maximum; mean and deviation are
    kept."""
    gamma: Annotated[tuple[Positive, Positive], part_of("gamma_p")] = (0.7, 1.5)
    """Exponent, lowest and highest; below and above 1 as often."""
    rectangles_p: Probability = 0.0
    """Probability of cuboids of channels filled with the mean of what they cover."""
    rectangles: Annotated[tuple[Count, Count], part_of("rectangles_p")] = (1, 4)
    """Number of the cuboids, smallest and largest."""
    rectangles_size: Annotated[tuple[Fraction, Fraction], part_of("rectangles_p")] = (0.1, 0.33)
    """Sides of a cuboid, share of those of the patch, smallest and largest."""
    rectangles_channel_p: Annotated[float, part_of("rectangles_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    gradient_p: Probability = 0.0
    """Probability of a Gaussian bump added to channels."""
    gradient_scale: Annotated[tuple[Positive, Positive], part_of("gradient_p")] = (0.1667, 1.0)
    """Deviation of the Gaussian along each axis, share of the side, lowest and highest; drawn
    evenly in its logarithm."""
    gradient_place: Annotated[tuple[float, float], part_of("gradient_p")] = (-0.5, 1.5)
    """Centre of the Gaussian along each axis, share of the side, lowest and highest."""
    gradient_strength: Annotated[tuple[NonNegative, NonNegative], part_of("gradient_p")] = (1, 5)
    """Height of the bump, lowest and highest; positive and negative as often."""
    gradient_channel_p: Annotated[float, part_of("gradient_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    local_gamma_p: Probability = 0.0
    """Probability of a gamma curve of channels that is strongest in the middle of a Gaussian."""
    local_gamma_scale: Annotated[tuple[Positive, Positive], part_of("local_gamma_p")] = (
        0.1667,
        1.0,
    )
    """Deviation of the Gaussian along each axis, as gradient_scale."""
    local_gamma_place: Annotated[tuple[float, float], part_of("local_gamma_p")] = (-0.5, 1.5)
    """Centre of the Gaussian along each axis, as gradient_place."""
    local_gamma_low: Annotated[tuple[Positive, Positive], part_of("local_gamma_p")] = (0.01, 0.8)
    """Exponent of one half of these samples, lowest and highest."""
    local_gamma_high: Annotated[tuple[Positive, Positive], part_of("local_gamma_p")] = (1.5, 4.0)
    """Exponent of the other half, lowest and highest."""
    local_gamma_channel_p: Annotated[float, part_of("local_gamma_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""
    sharpen_p: Probability = 0.0
    """Probability of a sharpening of channels: the Laplacian is subtracted."""
    sharpen: Annotated[tuple[NonNegative, NonNegative], part_of("sharpen_p")] = (0.1, 1.0)
    """Factor of the Laplacian, lowest and highest."""
    sharpen_channel_p: Annotated[float, part_of("sharpen_p", ge=0, le=1)] = 1.0
    """Probability of each channel."""

    def draws(self, switch: str) -> bool:
        """A patch from the centre draws nothing."""
        return self.crop not in (None, "center") if switch == "crop" else super().draws(switch)


@partial
class VolumeKwargs(VolumeOps):
    """Parameters that replace those of a policy for volumes, in the order in which its operations
    are applied; an unset one (none) keeps the value of the named policy."""


PLAIN_VOLUME = VolumeOps()
VOLUME_3 = policy(
    PLAIN_VOLUME,
    rotate_p=0.25,
    rotate_radians=0.25,
    scale_p=0.2,
    scale=(0.9, 1.1),
    mirror_p=0.5,
    noise_p=0.1,
    noise_std=(0.0, 0.05),
    contrast_p=0.1,
    contrast=(0.85, 1.15),
)
NNUNET = policy(
    PLAIN_VOLUME,
    rotate_p=0.35,
    scale_p=0.3,
    mirror_p=0.5,
    noise_p=0.15,
    blur_p=0.2,
    blur_sigma=(0.5, 1.2),
    blur_channel_p=0.5,
    brightness_p=0.15,
    contrast_p=0.15,
    low_resolution_p=0.25,
    low_resolution_channel_p=0.5,
    gamma_inverted_p=0.1,
    gamma_p=0.25,
)
VOLUME_TRAIN: dict[str, VolumeOps] = {
    "default_3d_1": PLAIN_VOLUME,
    "default_3d_2": policy(
        PLAIN_VOLUME,
        rotate_p=0.2,
        rotate_radians=0.15,
        scale_p=0.15,
        scale=(0.95, 1.05),
        mirror_p=0.5,
    ),
    "default_3d_3": VOLUME_3,
    "default_3d_4": policy(
        VOLUME_3,
        rotate_p=0.3,
        rotate_radians=0.35,
        scale_p=0.25,
        scale=(0.8, 1.2),
        noise_p=0.12,
        noise_std=(0.0, 0.08),
        blur_p=0.15,
        blur_channel_p=0.5,
        brightness_p=0.15,
        brightness=(0.8, 1.2),
        contrast_p=0.15,
        contrast=(0.8, 1.2),
        low_resolution_p=0.2,
        low_resolution=(0.6, 1.0),
        low_resolution_channel_p=0.5,
    ),
    "default_nnunet": NNUNET,
    "default_nnunet_DA5": policy(  # nnUNetTrainerDA5, but for one gamma curve that is not inverted
        PLAIN_VOLUME,
        rotate_p=0.4,
        rotate_radians=0.5236,
        rotate_axis_p=0.5,
        scale_p=0.2,
        scale=(0.7, 1.43),
        scale_same_p=0.0,
        rot90_p=0.375,  # 0 to 3 turns in half of the samples
        transpose_p=0.5,
        mirror_p=0.5,
        noise_p=0.1,
        blur_p=0.2,
        blur_sigma=(0.3, 1.5),
        blur_same_p=1.0,
        blur_first=True,
        blur_channel_p=0.5,
        median_share=0.5,
        shift_p=0.1,
        shift_channel_p=0.5,
        contrast_p=0.2,
        contrast=(0.5, 2.0),
        contrast_channel_p=0.5,
        contrast_clip_share=0.5,
        low_resolution_p=0.15,
        low_resolution=(0.25, 1.0),
        low_resolution_channel_p=0.5,
        gamma_inverted_p=0.1,
        gamma_p=0.1,
        rectangles_p=0.4,
        rectangles_channel_p=0.5,
        gradient_p=0.3,
        gradient_channel_p=0.5,
        local_gamma_p=0.3,
        local_gamma_channel_p=0.5,
        sharpen_p=0.2,
        sharpen_channel_p=0.5,
    ),
    "default_nnfoundation": policy(  # the numbers of nnU-Net itself
        NNUNET,
        crop="random",
        rotate_p=0.2,
        rotate_radians=0.5236,
        scale_p=0.2,
        noise_p=0.1,
        blur_sigma=(0.5, 1.0),
        gamma_p=0.3,
    ),
}
VOLUME_TEST: dict[str, VolumeOps] = {
    "shared_default_3d": PLAIN_VOLUME,
    "default_nnfoundation": PLAIN_VOLUME,
}


class VolumeAugmentation(Spec):
    """Policies and the patch of volumes; what is unset is derived from the data set (policies), the
    encoder and the volumes (patch)."""

    train_policy: VolumeTrainPolicy | None = None
    """Policy of the training split; none takes the data set's default."""
    test_policy: VolumeTestPolicy | None = None
    """Policy of evaluation, inference and extraction; none takes the data set's default."""
    patch_size: tuple[Count, Count, Count] | None = None
    """Voxels X, Y, Z that the encoder receives; none takes the encoder's, else whole volumes, where
    all are of one size or the encoder cuts windows (model.encoder.lift)."""
    margin: Annotated[float, Meta(ge=0, le=1)] | None = None
    """What is cut beyond the patch on every side in training, share of patch_size, so that a policy
    that rotates, scales or deforms has something to show there; beyond the volume it is filled.
    None: as much as its largest angle, factor and shift reach, up to half of the patch and no
    further than the volumes."""
    mirror_axes: tuple[AxisName, ...] = ("x", "y", "z")
    """Axes of the patient along which a policy may mirror, and which it may exchange; without x
    (left and right) the side of a finding stays."""
    anisotropy: Annotated[float, Meta(ge=1)] = 3.0
    """Across the one axis whose spacing is more than this many times the smallest, nothing is
    rotated, scaled or interpolated; nor across the one that the longest side of the patch is more
    than this many times as long as, as in nnU-Net, nor across a single voxel."""
    evaluation: Literal["center", "windows"] | None = None
    """What evaluation, inference and extraction see of a volume that is larger than the patch: its
    centre, or all of it by windows of patch_size; none is center, or what a checkpoint was trained
    with."""
    window_overlap: Annotated[float, Meta(ge=0, lt=1), OF_WINDOWS] = 0.5
    """What neighbouring windows have in common along each axis, share of patch_size; the last one
    ends with the volume."""
    window_reduce: Annotated[Literal["mean", "max"], OF_WINDOWS] = "mean"
    """What becomes of the logits of the windows, or the outputs of a regression; vectors are
    averaged."""
    window_chunk: Annotated[Count, OF_WINDOWS] = 8
    """Windows that pass the model at once; dataloading.eval_batch_size counts volumes."""
    train_kwargs: VolumeKwargs = VolumeKwargs()
    """Parameters that replace those of the train policy."""
    test_kwargs: VolumeKwargs = VolumeKwargs()
    """Parameters that replace those of the test policy."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Evaluation is deterministic; an axis is named once."""
        yield from random_problems(self.test_kwargs, 'crop = "center"')
        if len(set(self.mirror_axes)) < len(self.mirror_axes):
            yield "mirror_axes", f"{shown(self.mirror_axes)} names an axis twice"

    def unread_kwargs(self, default_policies: tuple[str, str]) -> Iterator[tuple[str, str]]:
        """Parameters that no operation of their policy reads, under the policies of a data set."""
        train = VOLUME_TRAIN[self.train_policy or default_policies[0]]
        test = VOLUME_TEST[self.test_policy or default_policies[1]]
        yield from unread_changes("train_kwargs", train, self.train_kwargs)
        yield from unread_changes("test_kwargs", test, self.test_kwargs)


class ResolvedVolumeAugmentation(Spec):
    """What augmentation of volumes a run uses, complete; saved with its checkpoints."""

    train_policy: str
    """Policy of the training split."""
    test_policy: str
    """Policy of evaluation, inference and extraction."""
    patch_size: tuple[int, int, int]
    """Voxels X, Y, Z that the encoder receives; of whole volumes the largest."""
    whole: bool
    """Whether it receives whole volumes, each of its own size."""
    evaluation: str
    """What evaluation sees of a volume: center or windows."""
    window_overlap: float
    """Overlap of those windows, share of patch_size."""
    window_reduce: str
    """What becomes of their logits: mean or max."""
    window_chunk: int
    """Windows that pass the model at once."""
    margin: tuple[int, int, int]
    """What is cut beyond the patch on every side in training, voxels X, Y, Z."""
    mirror_axes: tuple[str, ...]
    """Axes of the volumes as they are stored, first to third, along which a policy may mirror, and
    which it may exchange."""
    spacing: tuple[float, float, float]
    """Median spacing of the train volumes, mm: what rotations go by where the spacing of a sample
    is not known."""
    thick_axis: int | None
    """Axis across which slices of some volumes are thick, else along which the patch is flat:
    across it nothing is rotated, scaled or interpolated in any."""
    flat_axis: int | None
    """Axis along which the patch is flat, likewise, where slices are thick across another."""
    train: VolumeOps
    """Every parameter of the train policy."""
    test: VolumeOps
    """Every parameter of the test policy."""
