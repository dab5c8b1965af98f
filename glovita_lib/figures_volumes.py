"""Slices of volumes in figures: through one place, in the middle, on sheets.

Slices across each axis of a volume (X, Y, Z) in RAS order, seen as radiologists do: the right of
the patient on the left, the front on the left or above, the head above. All sides are in mm.

B samples, R augmented versions of each, C channels, X Y Z voxels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glovita_lib.figures import (
    GAP,
    GREY,
    HEIGHT,
    INK,
    LINE,
    SKY,
    WIDTH,
    Limits,
    Line,
    bare,
    image_grid,
    short,
    title_of_worst,
    worst_captions,
    write_below,
)
from glovita_lib.metrics_classification import Scores

PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}  # by the axis that is cut
LETTERS = {2: "RLAP", 1: "RLSI", 0: "APSI"}  # left, right, above, below
STACK_GAP = 0.03  # between slices on top of each other, share of their height
WORST_COLUMNS = 6
FEW = (0.5, 99.5)  # percentiles of a volume that are black and white
CHANNELS = 4  # of a volume that are shown
LEAST = 0.5  # inches, the width of a volume; a sheet of many becomes longer than a page

Planes = dict[int, np.ndarray]
"""Slices (rows, columns) by the axis that is cut, in the order of PLANES."""


class Middle(NamedTuple):
    """The slices in the middle of a volume."""

    channels: dict[str, Planes]
    """By the names of channel_names."""
    spacing: np.ndarray
    """(3,) of the axes in RAS order, mm."""

    @property
    def sides(self) -> tuple[float, float, float]:
        """Those of stack_sides."""
        return stack_sides(shape_of(next(iter(self.channels.values()))), self.spacing)


def channel_names(count: int) -> list[str]:
    """What stands at those of `count` channels that are shown; nothing where there is one."""
    return [f"channel {i} of {count}" if count > 1 else "" for i in range(1, count + 1)][:CHANNELS]


def upright(
    volume: np.ndarray, values: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A volume (C, X, Y, Z) and a map of it (X, Y, Z), with axes as near to RAS as they get without
    interpolation, and the spacing (3,) of these, mm."""
    from nibabel.orientations import apply_orientation, io_orientation

    turn = io_orientation(affine)
    channels = np.stack([apply_orientation(channel, turn) for channel in volume])
    return channels, apply_orientation(values, turn), turned_spacing(affine)


def turned_spacing(affine: np.ndarray) -> np.ndarray:
    """Spacing (3,) of the axes of a volume in RAS order, mm."""
    from nibabel.orientations import io_orientation

    spacing = np.empty(3)
    spacing[io_orientation(affine)[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return spacing


def plane(volume: np.ndarray, axis: int, place: int) -> np.ndarray:
    """The slice (rows, columns) at a voxel of an axis."""
    return volume.take(place, axis)[::-1, ::-1].T


def plane_sides(sides: np.ndarray, axis: int) -> tuple[float, float]:
    """Width and height of a slice of a volume with these sides (3,)."""
    width, height = (float(side) for other, side in enumerate(sides) if other != axis)
    return width, height


def draw_plane(
    axes: Any,
    volume: np.ndarray,
    axis: int,
    place: int,
    spacing: np.ndarray,
    limits: Limits,
    *,
    lettered: bool,
) -> None:
    """A slice in grey.

    Args:
        lettered: whether letters say where its sides lie in the patient.
    """
    from matplotlib.patheffects import withStroke

    width, height = plane_sides(np.array(volume.shape) * spacing, axis)
    low, high = limits
    axes.imshow(
        plane(volume, axis, place),
        cmap="gray",
        vmin=low,
        vmax=high,
        extent=(0, width, height, 0),
        interpolation="antialiased",
    )
    bare(axes)
    if not lettered:
        return
    edge = {
        "color": "white",
        "fontsize": 7.5,
        "path_effects": [withStroke(linewidth=2, foreground=INK)],
    }
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    sides = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (ha, va) in zip(LETTERS[axis], places, sides, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, ha=ha, va=va, **edge)


def draw_cross(
    axes: Any, voxel: Sequence[int], shape: Sequence[int], spacing: np.ndarray, axis: int
) -> None:
    """Lines through a voxel in a slice."""
    from_end = (np.array(shape) - np.array(voxel) - 0.5) * spacing
    x, y = (float(mm) for other, mm in enumerate(from_end) if other != axis)
    axes.axvline(x, color=SKY, linewidth=0.6, alpha=0.8)
    axes.axhline(y, color=SKY, linewidth=0.6, alpha=0.8)


def stack_sides(shape: Sequence[int], spacing: np.ndarray) -> tuple[float, float, float]:
    """Width and height of the three slices of a volume on top of each other, and the gap between
    them."""
    sides = [plane_sides(np.array(shape) * spacing, axis) for axis in PLANES]
    height = sum(high for _, high in sides)
    gap = STACK_GAP * height
    return max(wide for wide, _ in sides), height + (len(sides) - 1) * gap, gap


def middle_planes(volume: Any, affine: np.ndarray, planes: Sequence[int] = (*PLANES,)) -> Middle:
    """The slices in the middle of what is sliced as (C, X, Y, Z), however its axes run; only they
    are read.

    Args:
        affine: (4, 4) voxel to world mm, of which directions and lengths count.
        planes: the axes to cut, in RAS order.
    """
    from nibabel.orientations import apply_orientation, io_orientation

    turn = io_orientation(affine)
    stored = np.argsort(turn[:, 0])  # axis of the volume that runs along each of RAS
    channels: dict[str, Planes] = {name: {} for name in channel_names(volume.shape[0])}
    for axis in planes:
        along = int(stored[axis])
        side, forward = volume.shape[along + 1], turn[along, 1] > 0
        place = side // 2 if forward else side - 1 - side // 2
        part = [slice(place, place + 1) if along == other else slice(None) for other in range(3)]
        cut = np.asarray(volume[(slice(0, len(channels)), *part)])
        for found, channel in zip(channels.values(), cut, strict=True):
            found[axis] = plane(apply_orientation(channel, turn), axis, 0)
    return Middle(channels, turned_spacing(affine))


def middle_picture(volume: Any, affine: np.ndarray) -> np.ndarray:
    """The axial slice in the middle, channels side by side, as an image (1, H, W) uint8 with square
    pixels; see middle_planes."""
    middle = middle_planes(volume, affine, (2,))
    pictures = [square(planes, middle.spacing) for planes in middle.channels.values()]
    return np.concatenate(pictures, 1)[None]


def square(planes: Planes, spacing: np.ndarray) -> np.ndarray:
    """An axial slice as (H, W) uint8 with square pixels."""
    grey = planes[2].astype(np.float32)
    low, high = limits_of(planes)
    pixels = np.round(np.clip((grey - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    x, y = (float(mm) for mm in spacing[:2])
    rows, columns = (
        np.minimum((np.arange(round(n * mm / min(x, y))) + 0.5) * min(x, y) / mm, n - 1)
        for n, mm in zip(pixels.shape, (y, x), strict=True)
    )
    return pixels[rows.astype(int)[:, None], columns.astype(int)]


def limits_of(planes: Planes) -> Limits:
    """Values of slices shown as black and white."""
    values = np.concatenate([part.ravel() for part in planes.values()]).astype(np.float32)
    low, high = np.percentile(values, FEW)
    return float(low), float(high) if high > low else float(low) + 1.0


def show_volume(
    cell: Any,
    planes: Planes,
    spacing: np.ndarray,
    limits: Limits,
    lines: list[Line],
    *,
    named: bool = False,
) -> Any:
    """Axes with three slices of a volume on top of each other, and their caption below.

    Args:
        spacing: (3,) mm.
        named: whether the names of the slices stand beside them.
    """
    axes = cell.get_gridspec().figure.add_subplot(cell)
    width, height, gap = stack_sides(shape_of(planes), spacing)
    top = 0.0
    for axis, part in planes.items():
        wide, high = plane_sides(np.array(shape_of(planes)) * spacing, axis)
        left = (width - wide) / 2
        axes.imshow(
            part,
            cmap="gray",
            vmin=limits[0],
            vmax=limits[1],
            extent=(left, left + wide, top + high, top),
            interpolation="antialiased",
        )
        if named:
            words = {"color": GREY, "fontsize": 6.6, "rotation": 90, "ha": "right", "va": "center"}
            axes.text(-0.03 * width, top + high / 2, PLANES[axis], **words)
        top += high + gap
    bare(axes)
    axes.set(xlim=(0, width), ylim=(height, 0), anchor="N")
    write_below(axes, lines)
    return axes


def shape_of(planes: Planes) -> tuple[int, int, int]:
    """Voxels (X, Y, Z) of the volume that slices are of."""
    (y, x), (z, _) = planes[2].shape, planes[1].shape
    return x, y, z


def augmented_volumes(
    prepared: Sequence[Middle],
    augmented: Sequence[Sequence[Middle]],
    *,
    path: Path,
    captions: Sequence[str],
) -> None:
    """Rows per sample, one for each channel: slices of the prepared volume with its caption, then
    those of augmented versions in the window of the prepared volume.

    Args:
        prepared: B volumes; sizes may differ.
        augmented: B times R volumes as the encoder sees them.
        path: of the PNG.
        captions: B texts, e.g. the id.
    """
    rounds, rows = len(augmented[0]), sum(len(sample.channels) for sample in prepared)
    ratio = max(high / wide for wide, high, _ in (versions[0].sides for versions in augmented))
    room = (HEIGHT - 0.5) / rows - LINE - 0.14  # inches of a row
    side = max(min(WIDTH / (rounds + 1.1), room / ratio), LEAST)
    widths = [1, 0.05, *[1] * rounds]  # an empty column behind the first one
    with image_grid(path, rows, widths, side=side, lines=1, ratio=ratio) as (_, cells):
        row, characters = 0, int(side / 0.055)
        for sample, versions, text in zip(prepared, augmented, captions, strict=True):
            for channel, (name, planes) in enumerate(sample.channels.items()):
                limits, said = limits_of(planes), Line(short(text, characters), INK)
                lines = [Line(name, GREY) if channel else said]
                left = show_volume(cells[row, 0], planes, sample.spacing, limits, lines, named=True)
                shown = [
                    show_volume(cells[row, column], each.channels[name], each.spacing, limits, [])
                    for column, each in enumerate(versions, 2)
                ]
                if not row:
                    points = min(9.5, 12 * side)  # as much as has room above a narrow volume
                    left.set_title("prepared", fontsize=points)
                    shown[0].set_title("augmented, as the encoder sees it", fontsize=points)
                row += 1


def worst_volumes(
    volumes: Sequence[Middle],
    *,
    ids: Sequence[str],
    targets: np.ndarray,
    scores: Scores,
    losses: np.ndarray,
    subtask: str,
    class_names: tuple[str, ...],
    path: Path,
) -> None:
    """Slices of volumes in the given order, channels below each other, each with id, truth,
    prediction and loss; further arguments as for worst_sheet."""
    columns = max(1, min(WORST_COLUMNS, len(volumes)))
    most = max((len(volume.channels) for volume in volumes), default=1)
    side = WIDTH / WORST_COLUMNS - GAP
    rows = -(-len(volumes) // columns) * most
    ratio = max((high / wide for wide, high, _ in (v.sides for v in volumes)), default=1.0)
    side = max(min(side, ((HEIGHT - 0.7) / max(rows, 1) - 4 * LINE - 0.14) / ratio), LEAST)
    captions = worst_captions(ids, targets, scores, losses, subtask, class_names, side)
    with image_grid(path, rows, [1] * columns, side=side, lines=4, ratio=ratio) as (figure, cells):
        title_of_worst(figure, len(volumes))
        for i, volume in enumerate(volumes):
            for channel, (name, planes) in enumerate(volume.channels.items()):
                cell = cells[i // columns * most + channel, i % columns]
                lines = [Line(name, GREY)] if channel else captions[i]
                show_volume(cell, planes, volume.spacing, limits_of(planes), lines)
