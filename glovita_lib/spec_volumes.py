"""Volumes in a spec: how their files are read, and what is done to each of them once."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta

from glovita_lib.spec import Spec
from glovita_lib.spec_conditions import read_if
from glovita_lib.spec_errors import Count, PathText, Positive, shown

OF_SPACING = read_if("spacing")
Percentage = Annotated[float, Meta(ge=0, le=100)]
Spacing = tuple[Positive, Positive, Positive]
Voxels = tuple[Count, Count, Count]
Normalization = Literal["none", "zscore", "ct_window", "percentile", "minmax"]


class VolumeReading(Spec):
    """How volume files are read where they do not say it themselves."""

    canonical: bool = True
    """Whether axes are turned to run from left to right, back to front and foot to head (RAS); else
    they stay as they are stored."""
    frame: Annotated[int, Meta(ge=0)] | Literal["channels"] | None = None
    """Frame that is taken of a NIfTI file with four axes, from 0; "channels" takes each frame as a
    channel; none refuses such files."""
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
