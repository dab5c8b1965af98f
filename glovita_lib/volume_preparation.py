"""What is done once to every volume: resampling, crop and intensities.

C channels, X Y Z voxels in the axes of the sample, K voxels of foreground.

The steps, in this order:

1. The foreground is found; the box around it, with its margin, is what is kept where
   crop = "foreground".
2. Intensities are normalised, each channel by itself, before anything is interpolated.
3. Each axis is resampled by a matrix W (out, in) of its own: scipy.ndimage's Gaussian smoothing and
   interpolation of order 0, 1 or 3 with edge values repeated, both linear, so that
   out = W_x W_y W_z volume. The new grid has exactly the spacing asked for and the same centre as
   the whole volume, whatever is cropped: a crop never moves it.
4. The array is cut or padded around its centre, where a size is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glovita_lib.data import is_constant
from glovita_lib.errors import UserError
from glovita_lib.read_volume import spacing_of
from glovita_lib.spec_errors import shown
from glovita_lib.spec_volumes import VolumePreparation

ORDERS = {"nearest": 0, "linear": 1, "cubic": 3}
SAME_GRID = 0.01  # voxels by which the ends of two grids may differ and still be one
ROUNDING = 1e-6  # voxels: affines are stored as float32, places must not depend on that
FOREGROUND_POINTS = 1000
PIECE = 2**15  # values of a sum at a time: what stays in the cache of a core
FAINT = 0.02  # share of a CT window's width; what differs by less has its values elsewhere
EVEN = 1e-5  # relative difference of values that are one but for the rounding of resampling
BAND = 32  # rows of a resampling matrix that are applied at a time


@dataclass(frozen=True, slots=True)
class Prepared:
    """A volume as it is cached."""

    voxels: np.ndarray
    """(C, X, Y, Z)."""
    affine: np.ndarray
    """(4, 4) float64, voxel to world mm."""
    foreground: np.ndarray
    """(K, 3) int32, voxels drawn from the foreground, K <= FOREGROUND_POINTS."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where the voxels of a prepared volume lie along one axis of its file."""

    matrix: np.ndarray | None  # (out, in) float32; None: every voxel stays
    first: float  # coordinate of voxel 0 in the file, voxels
    step: float  # distance of neighbours in the file, voxels
    size: int

    def cut(self, start: int, stop: int) -> "Axis":
        """The part from start to stop."""
        matrix = None if self.matrix is None else self.matrix[start:stop]
        return Axis(matrix, self.first + start * self.step, self.step, stop - start)

    def inside(self, low: float, high: float) -> tuple[int, int]:
        """First voxel between two coordinates of the file and the one behind the last; one voxel at
        least."""
        start = int(np.ceil((low - self.first) / self.step - ROUNDING))
        stop = int(np.floor((high - self.first) / self.step + ROUNDING)) + 1
        if stop <= start:  # thinner than a voxel
            start = int(np.rint(((low + high) / 2 - self.first) / self.step))
            stop = start + 1
        start = min(max(start, 0), self.size - 1)
        return start, max(min(stop, self.size), start + 1)

    def places(self, coordinates: np.ndarray) -> np.ndarray:
        """Nearest voxels of coordinates of the file."""
        found = np.rint((coordinates - self.first) / self.step)
        return np.clip(found, 0, self.size - 1).astype(np.int32)


def prepare(
    voxels: np.ndarray, affine: np.ndarray, spec: VolumePreparation, *, has_spacing: bool
) -> Prepared:
    """Prepare a volume.

    Args:
        voxels: (C, X, Y, Z) as they were read.
        affine: (4, 4), voxel to world mm.
        has_spacing: whether the affine comes from the file, and is not made up.

    Raises:
        UserError: voxels that are not finite, a channel that is constant, before or after, no
            foreground, an unknown spacing, or a wrong number of normalisations; one line.
    """
    if spec.spacing is not None and not has_spacing:
        raise UserError(
            "its spacing is unknown, so it cannot be resampled to data.preparation.spacing: state"
            " data.reading.array_spacing, or leave data.preparation.spacing out"
        )
    voxels = finite(voxels, spec.fill_nan)
    names = channel_names(len(voxels), spec)
    refuse_constant(voxels)
    mask = foreground_mask(voxels, spec.foreground)  # (X, Y, Z)
    spacing = spacing_of(affine)
    axes = plan_axes(voxels.shape[1:], spacing, spec)
    kept = bounding_box(mask, spec, spacing) if spec.crop == "foreground" else None
    channels = normalized(
        voxels, names, spec, kept, mask if spec.statistics == "foreground" else None
    )
    if kept is not None:
        axes = [axis.cut(*axis.inside(*ends)) for axis, ends in zip(axes, kept, strict=True)]
    found = resample(channels, axes)
    points = foreground_points(mask, axes)
    affine = affine @ grid_affine(axes)
    if spec.size is not None:
        found, affine, points = fit_to_size(found, affine, points, spec.size)
    stored = stored_type(found, spec.dtype)
    refuse_blank(found, voxels, names, spec)
    return Prepared(stored, affine, points)


# ---------------------------------------------------------------------- checks


def finite(voxels: np.ndarray, fill: float | None) -> np.ndarray:
    """Voxels (C, X, Y, Z) as float32, NaN and infinite ones replaced.

    Raises:
        UserError: there are some, and no value takes their place.
    """
    if voxels.dtype.kind != "f":
        return voxels.astype(np.float32)
    bad = ~np.isfinite(voxels)
    count = int(np.count_nonzero(bad))
    if not count:
        return voxels
    if fill is None:
        raise UserError(
            f"{count:,} of {voxels.size:,} voxels are NaN or infinite: mend the file, or give the"
            " value that takes their place, as data.preparation.fill_nan = 0"
        )
    return np.where(bad, np.float32(fill), voxels)


def channel_names(channels: int, spec: VolumePreparation) -> tuple[str, ...]:
    """The normalisation of each channel.

    Raises:
        UserError: the spec has one a channel for another number of channels.
    """
    names = spec.normalizations
    if len(names) == 1:
        return names * channels
    if len(names) != channels:
        raise UserError(
            f"{channels} channels, but data.preparation.normalize has {len(names)} entries"
        )
    return names


def refuse_constant(voxels: np.ndarray) -> None:
    """Refuse a channel in which nothing is to be seen.

    Raises:
        UserError: all its voxels have one value.
    """
    for number, channel in enumerate(voxels):
        low, high = float(channel.min()), float(channel.max())
        if low == high:
            which = f"channel {number} is" if len(voxels) > 1 else ""
            raise UserError(f"{which} constant: every voxel is {low:g}".strip())


def refuse_blank(
    found: np.ndarray, file: np.ndarray, names: Sequence[str], spec: VolumePreparation
) -> None:
    """Refuse a channel of the file (C, X, Y, Z) of which nothing is to be seen once it is prepared,
    (C', X, Y, Z): one value is left, or of CT windows hardly anything lies in any.

    Raises:
        UserError: there is one.
    """
    lows, highs = found.min((1, 2, 3)), found.max((1, 2, 3))
    first = 0
    for number, name in enumerate(names):
        part = slice(first, first + (len(spec.ct_windows) if name == "ct_window" else 1))
        first = part.stop
        low, high = float(lows[part].min()), float(highs[part].max())
        which = f"channel {number}: " if len(names) > 1 else ""
        if name == "ct_window":
            spread = float((highs[part] - lows[part]).max())
            if spread < FAINT:
                raise UserError(
                    f"{which}its values, {file[number].min():g} to {file[number].max():g} in the"
                    f" file, fill {spread:.1%} of data.preparation.ct_windows"
                    f" {shown(spec.ct_windows)} (level, width; Hounsfield units): choose others, or"
                    " another normalize"
                )
        elif high - low <= EVEN * max(abs(low), abs(high)):
            raise UserError(
                f"{which}every voxel that data.preparation leaves is {high:g}, though the file has"
                f" {file[number].min():g} to {file[number].max():g}: change crop, foreground, size"
                " or spacing"
            )
        elif np.dtype(spec.dtype).type(low) == np.dtype(spec.dtype).type(high):
            raise UserError(
                f"{which}its values, {low:g} to {high:g}, are one in {spec.dtype}: set"
                ' data.preparation.dtype = "float32", or normalise them'
            )


def stored_type(voxels: np.ndarray, dtype: str) -> np.ndarray:
    """Voxels in the type of the cache.

    Raises:
        UserError: values that it cannot hold.
    """
    largest = float(np.abs(voxels).max())
    if largest > float(np.finfo(dtype).max):
        raise UserError(
            f"values up to {largest:g} do not fit into float16: set data.preparation.dtype ="
            ' "float32", or normalise them'
        )
    return voxels.astype(dtype)


# ---------------------------------------------------------------------- foreground


def foreground_mask(voxels: np.ndarray, what: float | str) -> np.ndarray:
    """Voxels (X, Y, Z) that are foreground in any channel (C, X, Y, Z)."""
    if what == "nonzero":
        found = voxels != 0
    elif what == "otsu":
        found = np.stack([channel > otsu(channel) for channel in voxels])
    else:
        found = voxels > float(what)
    return np.asarray(found.any(0))


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """Otsu's threshold: of a histogram the middle of the bin up to which the variance between the
    two classes w0 w1 (m0 - m1)^2 is largest (Otsu 1979; as in scikit-image)."""
    counts, edges = np.histogram(values, bins)
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * middles) / np.maximum(below, 1)
    mean_above = (np.cumsum((counts * middles)[::-1]) / np.maximum(above[::-1], 1))[::-1]
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(middles[int(np.argmax(between))])


def bounding_box(
    mask: np.ndarray, spec: VolumePreparation, spacing: Sequence[float]
) -> list[tuple[float, float]]:
    """Ends of the foreground along each axis with its margin, coordinates of the outer faces of its
    voxels.

    Raises:
        UserError: there is no foreground.
    """
    box = []
    for axis in range(3):
        found = np.flatnonzero(mask.any(tuple(other for other in range(3) if other != axis)))
        if not len(found):
            raise UserError(
                f"no foreground (data.preparation.foreground = {spec.foreground}), so that nothing"
                " is left of it after data.preparation.crop"
            )
        margin = spec.crop_margin / spacing[axis]
        box.append((float(found[0]) - 0.5 - margin, float(found[-1]) + 0.5 + margin))
    return box


def foreground_points(mask: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """Voxels (K, 3) of the prepared volume drawn from the foreground of the file, the same ones
    every time."""
    every = np.flatnonzero(mask)
    if len(every) > FOREGROUND_POINTS:
        every = np.sort(np.random.default_rng(0).choice(every, FOREGROUND_POINTS, replace=False))
    places = np.unravel_index(every, mask.shape)
    return np.stack([axis.places(place) for axis, place in zip(axes, places, strict=True)], 1)


# ---------------------------------------------------------------------- intensities


def normalized(
    voxels: np.ndarray,
    names: Sequence[str],
    spec: VolumePreparation,
    box: list[tuple[float, float]] | None,
    mask: np.ndarray | None,
) -> np.ndarray:
    """Channels (C', X, Y, Z) float32 with their intensities normalised.

    Args:
        box: what figures of the volume are taken over; None: all of it.
        mask: voxels (X, Y, Z) that they are taken over; None: all.

    Raises:
        UserError: no foreground to take them over, or none that varies.
    """
    part = (slice(None),) * 3 if box is None else tuple(inner(ends) for ends in box)
    inside = None if mask is None else mask[part]
    channels: list[np.ndarray] = []
    for channel, name in zip(voxels, names, strict=True):
        if name == "none":
            channels.append(channel)
        elif name == "ct_window":
            channels += [window(channel, *each) for each in spec.ct_windows]
        else:
            values = channel[part] if inside is None else channel[part][inside]
            channels.append(scaled(channel, values, name, spec))
    return stacked(channels)


def stacked(channels: list[np.ndarray]) -> np.ndarray:
    """Channels (X, Y, Z) as one array (C, X, Y, Z); a single one is not copied."""
    return channels[0][None] if len(channels) == 1 else np.stack(channels)


def mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    """Mean and variance in float64, a piece at a time: what NumPy does in one needs a float64 copy
    of a whole volume and takes twice as long."""
    flat = values.reshape(-1)
    mean = float(flat.mean(dtype=np.float64))
    squares = 0.0
    for start in range(0, flat.size, PIECE):
        distance = flat[start : start + PIECE].astype(np.float64)
        distance -= mean
        squares += float(distance @ distance)
    return mean, squares / flat.size


def inner(ends: tuple[float, float]) -> slice:
    """Voxels of the file between two coordinates."""
    return slice(max(0, int(np.ceil(ends[0]))), int(np.floor(ends[1])) + 1)


def window(channel: np.ndarray, level: float, width: float) -> np.ndarray:
    """A CT window: level - width / 2 becomes 0, level + width / 2 becomes 1, clipped."""
    return np.clip((channel - np.float32(level - width / 2)) / np.float32(width), 0, 1)


def scaled(
    channel: np.ndarray, values: np.ndarray, name: str, spec: VolumePreparation
) -> np.ndarray:
    """A channel with an offset subtracted and divided by a scale, by figures of some values of it.

    zscore: (v - mean) / deviation; minmax: (v - min) / (max - min); percentile: likewise between
    the two percentiles, clipped to 0 and 1.

    Raises:
        UserError: the values do not vary.
    """
    if not values.size:
        raise UserError(
            f"no foreground (data.preparation.foreground = {spec.foreground}) to take"
            ' data.preparation.statistics = "foreground" over'
        )
    if name == "zscore":
        offset, variance = mean_and_variance(values)
        scale = 0.0 if is_constant(offset, variance, values.size) else variance**0.5
    elif name == "minmax":
        offset, scale = float(values.min()), float(values.max()) - float(values.min())
    else:
        low, high = np.percentile(values, spec.percentiles)
        offset, scale = float(low), float(high - low)
    if scale <= 0:
        raise UserError(
            f"its {name} scale is 0, as nearly every voxel is {offset:g}: choose another"
            " data.preparation.normalize, statistics or percentiles"
        )
    found = (channel - np.float32(offset)) / np.float32(scale)
    return np.clip(found, 0, 1, out=found) if name == "percentile" else found


# ---------------------------------------------------------------------- resampling


def thick_axis(spacing: Sequence[float], limit: float) -> int | None:
    """The one axis whose spacing is more than `limit` times the smallest; None where there is none,
    or two are as thick."""
    largest = int(np.argmax(spacing))
    as_thick = [axis for axis in range(3) if spacing[axis] > 0.999 * spacing[largest]]
    is_thick = spacing[largest] > limit * min(spacing) and len(as_thick) == 1
    return largest if is_thick else None


def plan_axes(
    shape: Sequence[int], spacing: tuple[float, float, float], spec: VolumePreparation
) -> list[Axis]:
    """The grid of a prepared volume along each axis, before it is cropped.

    An axis of n voxels gets round(n spacing / target) of them, one at least, around the same
    centre.
    """
    if spec.spacing is None:
        return [Axis(None, 0.0, 1.0, size) for size in shape]
    thick = thick_axis(spacing, spec.anisotropy)
    thick = thick_axis(spec.spacing, spec.anisotropy) if thick is None else thick
    axes = []
    for axis, (size, old, new) in enumerate(zip(shape, spacing, spec.spacing, strict=True)):
        step = new / old
        if abs(step - 1) * size < SAME_GRID:
            axes.append(Axis(None, 0.0, 1.0, size))
            continue
        count = max(1, int(np.floor(size / step + 0.5 + ROUNDING)))
        first = (size - 1) / 2 - (count - 1) / 2 * step
        order = 0 if axis == thick else ORDERS[spec.interpolation]
        smooth = max(0.0, (step - 1) / 2) if spec.antialias and order else 0.0
        matrix = axis_matrix(size, first + np.arange(count) * step, order=order, sigma=smooth)
        axes.append(Axis(matrix, first, step, count))
    return axes


def axis_matrix(size: int, places: np.ndarray, *, order: int, sigma: float) -> np.ndarray:
    """Matrix (out, in) float32 that smooths a line of `size` values and interpolates it.

    It is what scipy.ndimage makes of the unit vectors: along the other axis the places are whole
    numbers, at which every order gives the values themselves.

    Args:
        places: (out,) coordinates of the new values, voxels.
        sigma: deviation of the Gaussian, voxels; 0 smooths nothing.
    """
    from scipy import ndimage

    unit = np.eye(size)
    if sigma > 0:
        unit = ndimage.gaussian_filter1d(unit, sigma, axis=0, mode="nearest")
    places = np.round(places / ROUNDING) * ROUNDING
    columns = np.arange(size, dtype=float)
    where = np.meshgrid(places, columns, indexing="ij")
    return ndimage.map_coordinates(unit, where, order=order, mode="nearest").astype(np.float32)


def resample(channels: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """Channels (C, X, Y, Z) on the new grid; axes that shrink most come first."""
    shares = [axis.size / channels.shape[1 + number] for number, axis in enumerate(axes)]
    for number in np.argsort(shares):
        axis = axes[number]
        if axis.matrix is not None:
            channels = stacked([apply(axis.matrix, channel, number) for channel in channels])
        elif axis.size != channels.shape[1 + number]:
            start = round(axis.first)
            channels = channels.take(np.arange(start, start + axis.size), axis=1 + number)
    return channels


def apply(matrix: np.ndarray, volume: np.ndarray, axis: int) -> np.ndarray:
    """A matrix (out, in) applied along one axis of a volume (X, Y, Z), a band of rows at a time, as
    each of them reaches only a few columns."""
    shape = [*volume.shape[:axis], len(matrix), *volume.shape[axis + 1 :]]
    out = np.empty(shape, np.float32)
    at: list[slice] = [slice(None)] * 3
    for start in range(0, len(matrix), BAND):
        rows = matrix[start : start + BAND]
        reached = np.flatnonzero(np.abs(rows).max(0) > 1e-9)
        columns = slice(int(reached[0]), int(reached[-1]) + 1)
        at[axis] = slice(start, start + len(rows))
        source = [slice(None)] * 3
        source[axis] = columns
        part, weights = volume[tuple(source)], rows[:, columns]
        if axis == 0:
            flat = np.ascontiguousarray(part).reshape(part.shape[0], -1)
            out[tuple(at)] = (weights @ flat).reshape(len(rows), *part.shape[1:])
        elif axis == 1:
            out[tuple(at)] = weights @ part
        else:
            out[tuple(at)] = part @ weights.T
    return out


def grid_affine(axes: Sequence[Axis]) -> np.ndarray:
    """Affine (4, 4) from voxels of the new grid to voxels of the file."""
    affine = np.eye(4)
    for number, axis in enumerate(axes):
        affine[number, number], affine[number, 3] = axis.step, axis.first
    return affine


def fit_to_size(
    voxels: np.ndarray, affine: np.ndarray, points: np.ndarray, size: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels (C, X, Y, Z) cut or padded around their centre, with the minimum of each channel; the
    affine and the points of foreground that are left go with them."""
    starts = np.array(
        [(have - want) // 2 for have, want in zip(voxels.shape[1:], size, strict=True)]
    )
    out = np.empty((len(voxels), *size), voxels.dtype)
    out[:] = voxels.min((1, 2, 3))[:, None, None, None]
    source, target = [], []
    for start, have, want in zip(starts, voxels.shape[1:], size, strict=True):
        first, end = max(0, int(start)), min(have, int(start) + want)
        source.append(slice(first, end))
        target.append(slice(first - int(start), end - int(start)))
    out[(slice(None), *target)] = voxels[(slice(None), *source)]
    moved = points - starts
    inside = ((moved >= 0) & (moved < size)).all(1)
    shift = np.eye(4)
    shift[:3, 3] = starts
    return out, affine @ shift, moved[inside].astype(np.int32)
