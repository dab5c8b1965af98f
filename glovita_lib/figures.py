"""Style and drawing of figures, and sheets of images."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from glovita_lib.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# ---------------------------------------------------------------------------------- the look
#
# One style for all figures: page, font, colours. They are drawn without pyplot and written whole.
#
# Colours are those of Okabe and Ito, told apart with any colour vision; no meaning rests on colour
# alone.

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, INK, GREY, PALE = "#E69F00", "#56B4E9", "#222222", "#8a8a8a", "#d9d9d9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, INK, GREY)
WIDTH = 7.5  # inches: A4 less its margins
HEIGHT = 10.5  # inches
STYLE: "dict[RcKeyType, Any]" = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a class name is a $
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#777777",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#ececec",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}


@contextmanager
def drawing(path: Path | str, width: float, height: float) -> Iterator[Any]:
    """A matplotlib Figure in this style, saved at `path` as PNG after the block.

    The same content gives the same bytes; the user's matplotlibrc has no say. A block that raises
    leaves the file as it was.

    Args:
        path: of the PNG.
        width: inches.
        height: inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # an empty box will do
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(
                temporary,
                format="png",
                metadata={"Software": None},  # else the version of matplotlib
                bbox_inches="tight",
                pad_inches=0.12,
            )


def grid(figure: Any, count: int, columns: int) -> list[Any]:
    """Axes of `count` panels in rows of at most `columns`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    return [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def short(name: str, length: int) -> str:
    """A name cut to a length, with its middle left out: both ends of a path or an id tell most.

    >>> short("a_rather_long_class_name", 13)
    'a_rath…s_name'
    """
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    head = length // 2
    return f"{name[:head]}…{name[len(name) - (length - head - 1) :]}"


def unique_short(names: Sequence[str], length: int) -> list[str]:
    """Short names; those that would look the same get their number."""
    cut = [short(name, length) for name in names]
    return [f"{name} #{i}" if cut.count(name) > 1 else name for i, name in enumerate(cut)]


def nothing_to_show(axes: Any, reason: str) -> None:
    """A panel that says why it is empty."""
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def number(value: float | None) -> str:
    """Three decimals, four digits of numbers from 10 on, three of tiny ones; a dash where
    undefined."""
    if value is None or value != value:
        return "–"
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3g}"


# -------------------------------------------------------------------------- sheets of images
#
# Two sheets: versions of samples that the augmentation makes, and the worst predictions.
#
# B samples, R augmented versions of each, C channels, H W pixels, S side, K classes or targets.
#
# Images are shown as they are stored: one or two channels in grey (the first), three or more as RGB
# (the first three; alpha or infrared are left out). 16-bit images, which seldom use their range,
# are stretched between their 0.5 and 99.5 percentiles.

GAP = 0.07  # inches between images
COLUMNS = 5  # of the sheet of worst predictions
LINE = 0.125  # inches of a caption line
SMALL = 96  # pixels up to which each pixel stays a sharp square


Limits = tuple[float, float]
"""Values shown as black and white."""


class Line(NamedTuple):
    """One line of a caption."""

    text: str
    colour: str


# ---------------------------------------------------------------------- the two sheets


def augmented_sheet(
    originals: Sequence[np.ndarray],
    augmented: torch.Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    captions: Sequence[str],
) -> None:
    """A row per sample: the stored image with its caption, then augmented versions.

    Args:
        originals: B arrays (C, H, W), uint8, or wider for 16-bit images; sizes may differ.
        augmented: (R, B, C, S, S) as the encoder sees them, on any device.
        mean: C values that were subtracted, of pixels in 0..1.
        std: C values divided by.
        path: of the PNG.
        captions: B texts, e.g. the class.
    """
    rounds, rows = augmented.shape[:2]
    scale = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
    shift = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
    pixels = (augmented.detach().cpu().float() * scale + shift).clamp(0, 1).numpy()
    side = min(WIDTH / (rounds + 1.2), (HEIGHT - 0.5) / max(rows, 1) - LINE, 1.7)
    room = int(side / 0.055)
    # an empty column, as the originals stand a little apart
    widths = [1, 0.05, *[1] * rounds]
    with image_grid(path, rows, widths, side=side, lines=1) as (_, cells):
        for row, (image, caption) in enumerate(zip(originals, captions, strict=True)):
            depth = 8 if image.dtype == np.uint8 else 16
            low, high = window(image, depth)
            lines = [Line(short(caption, room), INK)]
            first = show(cells[row, 0], displayed(image, low, high), lines, "NW")
            if not row:
                first.set_title("stored")
            for column in range(rounds):
                values = pixels[column, row] * (2**depth - 1)
                axes = show(cells[row, column + 2], displayed(values, low, high), [], "NW")
                if not row and not column:
                    axes.set_title("augmented, as the encoder sees it")


def worst_sheet(
    images: Sequence[np.ndarray],
    *,
    ids: Sequence[str],
    targets: np.ndarray,
    scores: np.ndarray,
    losses: np.ndarray,
    subtask: str,
    class_names: tuple[str, ...],
    bit_depth: int,
    path: Path,
) -> None:
    """Samples in the given order, each with id, truth, prediction and loss.

    Args:
        images: B arrays (C, H, W); sizes may differ.
        ids: B ids.
        targets: (B,) class indices or (B, K).
        scores: (B, K) probabilities or outputs.
        losses: (B,).
        subtask: multiclass, multilabel or regression.
        class_names: K names.
        bit_depth: 8 or 16.
        path: of the PNG.
    """
    columns = max(1, min(COLUMNS, len(images)))
    side = WIDTH / COLUMNS - GAP
    captions = worst_captions(ids, targets, scores, losses, subtask, class_names, side)
    rows = -(-len(images) // columns)
    with image_grid(path, rows, [1] * columns, side=side, lines=4) as (figure, cells):
        title_of_worst(figure, len(images))
        for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
            low, high = window(image, bit_depth)
            show(cells[divmod(i, columns)], displayed(image, low, high), lines, "SW")


def title_of_worst(figure: Any, count: int) -> None:
    """The heading of a sheet of so many samples."""
    title = "Largest losses" if count else "No samples"
    figure.suptitle(title, x=0, y=1.01, ha="left", va="bottom", fontsize=9.5)


def worst_captions(
    ids: Sequence[str],
    targets: np.ndarray,
    scores: np.ndarray,
    losses: np.ndarray,
    subtask: str,
    class_names: tuple[str, ...],
    side: float,
) -> list[list[Line]]:
    """Id, truth, prediction and loss of each sample, in images of a width in inches; the other
    arguments are those of worst_sheet."""
    room = int(side / 0.056)  # characters of a caption line
    said = caption_lines(targets, scores, subtask, class_names, room)
    names = unique_short(ids, room)
    return [
        [Line(name, GREY), *lines, Line(f"loss {number(float(loss))}", GREY)]
        for name, lines, loss in zip(names, said, losses, strict=True)
    ]


# ---------------------------------------------------------------------- pixels


def window(image: np.ndarray, bit_depth: int) -> Limits:
    """Values shown as black and white."""
    if bit_depth == 8:
        return 0.0, 255.0
    low, high = np.percentile(image[:3], (0.5, 99.5))
    return float(low), max(float(high), float(low) + 1.0)


def displayed(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Image (C, H, W) as RGB (H, W, 3) uint8."""
    kept = image[:3] if len(image) >= 3 else image[:1].repeat(3, 0)
    scaled = (kept.astype(np.float32) - low) / (high - low)
    return np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


# ---------------------------------------------------------------------- words


def caption_lines(
    targets: np.ndarray,
    scores: np.ndarray,
    subtask: str,
    class_names: tuple[str, ...],
    room: int,
) -> list[list[Line]]:
    """Two lines a sample: the truth and what the model says."""
    rows = range(len(targets))
    if subtask == "multiclass":
        return [class_lines(int(targets[i]), scores[i], class_names, room) for i in rows]
    if subtask == "multilabel":
        return [label_lines(targets[i] > 0.5, scores[i], class_names, room) for i in rows]
    spread = targets.std(0) if len(targets) else np.ones(len(class_names))
    spread = np.where(spread > 0, spread, 1.0)
    return [value_lines(targets[i], scores[i], spread, class_names, room) for i in rows]


def class_lines(target: int, scores: np.ndarray, names: tuple[str, ...], room: int) -> list[Line]:
    """Probability of the true and of the predicted class."""
    predicted = int(scores.argmax())
    sign, colour = ("✓", BLUE) if predicted == target else ("✗", ORANGE)
    return [
        Line(f"true {short(names[target], room - 12)} · {scores[target]:.0%}", INK),
        Line(f"{sign} {short(names[predicted], room - 9)} · {scores[predicted]:.0%}", colour),
    ]


def label_lines(
    truth: np.ndarray, scores: np.ndarray, names: tuple[str, ...], room: int
) -> list[Line]:
    """Labels that were missed and false ones, the surest mistake first."""
    said = scores >= 0.5
    missed = [k for k in np.argsort(scores, kind="stable") if truth[k] and not said[k]]
    false = [k for k in np.argsort(-scores, kind="stable") if said[k] and not truth[k]]
    if not missed and not false:
        return [Line("✓ all labels", BLUE), Line("", INK)]
    both = (("✗ missed ", missed), ("✗ false ", false))
    lines = [
        Line(start + some([names[k] for k in wrong], room - len(start)), ORANGE)
        for start, wrong in both
        if wrong
    ]
    return (lines + [Line("", INK)])[:2]


def some(names: list[str], room: int) -> str:
    """As many names as have room, and how many more there are."""
    text = ", ".join(names)
    if len(text) <= room:
        return text
    more = f" +{len(names) - 1}" if len(names) > 1 else ""
    return short(names[0], room - len(more)) + more


def value_lines(
    target: np.ndarray, output: np.ndarray, spread: np.ndarray, names: tuple[str, ...], room: int
) -> list[Line]:
    """True and predicted value of the target with the largest error in units of its spread."""
    k = int((np.abs(output - target) / spread).argmax())
    start = f"{short(names[k], room - 15)} " if len(names) > 1 else ""
    return [
        Line(f"true {start}{float(target[k]):.4g}", INK),
        Line(f"predicted {float(output[k]):.4g}", ORANGE),
    ]


# ---------------------------------------------------------------------- the page


@contextmanager
def image_grid(
    path: Path, rows: int, widths: list[float], *, side: float, lines: int, ratio: float = 1.0
) -> Iterator[tuple[Any, Any]]:
    """A figure and its GridSpec of cells with room for captions below them.

    Args:
        path: of the PNG.
        widths: of the columns, 1 for an image.
        side: width of an image, inches.
        lines: of a caption.
        ratio: height of a cell over its width.
    """
    rows, below, high = max(rows, 1), lines * LINE + 0.14, side * ratio
    width = sum(widths) * side + (len(widths) - 1) * GAP
    with drawing(path, width, rows * high + (rows - 1) * below) as figure:
        figure.set_layout_engine("none")  # which would make room beside the images for captions
        edges = {"left": 0, "right": 1, "bottom": 0, "top": 1}
        gaps = {"wspace": GAP * len(widths) / (sum(widths) * side), "hspace": below / high}
        yield figure, figure.add_gridspec(rows, len(widths), width_ratios=widths, **edges, **gaps)


def show(cell: Any, pixels: np.ndarray, lines: list[Line], anchor: str) -> Any:
    """Axes with pixels (H, W, 3), whole and in proportion, and their caption below.

    Args:
        cell: of a GridSpec.
        anchor: where in the cell the image lies.
    """
    axes = cell.get_gridspec().figure.add_subplot(cell)
    small = max(pixels.shape[:2]) <= SMALL
    axes.imshow(pixels, interpolation="nearest" if small else "antialiased", aspect="equal")
    axes.set(xticks=[], yticks=[], anchor=anchor)
    axes.spines[:].set(visible=True, color=PALE, linewidth=0.5)  # for images as white as paper
    write_below(axes, lines)
    return axes


def write_below(axes: Any, lines: list[Line]) -> None:
    """The caption of an image."""
    for i, line in enumerate(lines):
        axes.annotate(
            line.text,
            xy=(0, 0),
            xycoords="axes fraction",
            xytext=(0, -72 * LINE * (i + 0.35)),
            textcoords="offset points",
            color=line.colour,
            fontsize=6.6,
            va="top",
        )


def bare(axes: Any) -> None:
    """Equal scales, no ticks, no grid, no frame."""
    axes.set_aspect("equal")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


# ------------------------------------------------------------------------------- volumes
#
# Slices across each axis of a volume (X, Y, Z) in RAS order, seen as radiologists do: the right of
# the patient on the left, the front on the left or above, the head above. All sides are in mm.

PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}  # by the axis that is cut
LETTERS = {2: "RLAP", 1: "RLSI", 0: "APSI"}  # left, right, above, below
STACK_GAP = 0.03  # between slices on top of each other, share of their height
WORST_COLUMNS = 6
FEW = (0.5, 99.5)  # percentiles of a volume that are black and white

Planes = dict[int, np.ndarray]
"""Slices (rows, columns) by the axis that is cut, in the order of PLANES."""


def upright(
    volume: np.ndarray, values: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A volume and a map of it (X, Y, Z), with axes as near to RAS as they get without
    interpolation, and the spacing (3,) of these, mm."""
    from nibabel.orientations import apply_orientation, io_orientation

    turn = io_orientation(affine)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    return apply_orientation(volume, turn), apply_orientation(values, turn), spacing


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


def middle_planes(volume: Any) -> Planes:
    """The slices in the middle of the first channel of what is sliced as (C, X, Y, Z); only they
    are read."""
    shape, found = volume.shape[1:], {}
    for axis in PLANES:
        middle = shape[axis] // 2
        part = [slice(middle, middle + 1) if axis == other else slice(None) for other in range(3)]
        found[axis] = plane(np.asarray(volume[(slice(0, 1), *part)])[0], axis, 0)
    return found


def middle_picture(volume: Any, spacing: Sequence[float]) -> np.ndarray:
    """The axial slice in the middle of the first channel as an image (1, H, W) uint8 with square
    pixels; only it is read."""
    middle = volume.shape[3] // 2
    grey = plane(np.asarray(volume[:1, :, :, middle : middle + 1])[0], 2, 0).astype(np.float32)
    low, high = limits_of({2: grey})
    pixels = np.round(np.clip((grey - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    x, y = spacing[:2]
    rows, columns = (
        np.minimum((np.arange(round(n * mm / min(x, y))) + 0.5) * min(x, y) / mm, n - 1)
        for n, mm in zip(pixels.shape, (y, x), strict=True)
    )
    return pixels[rows.astype(int)[:, None], columns.astype(int)][None]


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
    prepared: Sequence[Planes],
    spacings: Sequence[Sequence[float]],
    augmented: Sequence[Sequence[Planes]],
    spacing: Sequence[float],
    *,
    path: Path,
    captions: Sequence[str],
) -> None:
    """A row per sample: slices of the prepared volume with its caption, then those of augmented
    versions in the window of the prepared volume.

    Args:
        prepared: of B volumes; sizes may differ.
        spacings: B of three numbers, mm.
        augmented: of B times R volumes of one size, as the encoder sees them.
        spacing: of those, mm.
        path: of the PNG.
        captions: B texts, e.g. the id.
    """
    rows, rounds = len(augmented), len(augmented[0])
    wide, high, _ = stack_sides(shape_of(augmented[0][0]), np.array(spacing))
    room = (HEIGHT - 0.5) / rows - LINE - 0.14  # inches of a row
    side = min(WIDTH / (rounds + 1.1), room * wide / high)
    widths = [1, 0.05, *[1] * rounds]  # an empty column behind the first one
    with image_grid(path, rows, widths, side=side, lines=1, ratio=high / wide) as (_, cells):
        for row, (planes, own, text) in enumerate(zip(prepared, spacings, captions, strict=True)):
            limits = limits_of(planes)
            lines = [Line(short(text, int(side / 0.055)), INK)]
            first = show_volume(cells[row, 0], planes, np.array(own), limits, lines, named=True)
            if not row:
                first.set_title("prepared")
            for column, version in enumerate(augmented[row]):
                axes = show_volume(cells[row, column + 2], version, np.array(spacing), limits, [])
                if not row and not column:
                    axes.set_title("augmented, as the encoder sees it")


def worst_volumes(
    volumes: Sequence[Planes],
    spacings: Sequence[Sequence[float]],
    *,
    ids: Sequence[str],
    targets: np.ndarray,
    scores: np.ndarray,
    losses: np.ndarray,
    subtask: str,
    class_names: tuple[str, ...],
    path: Path,
) -> None:
    """Slices of volumes in the given order, each with id, truth, prediction and loss; further
    arguments as for worst_sheet."""
    columns = max(1, min(WORST_COLUMNS, len(volumes)))
    side = WIDTH / WORST_COLUMNS - GAP
    rows = -(-len(volumes) // columns)
    sides = [stack_sides(shape_of(v), np.array(s)) for v, s in zip(volumes, spacings, strict=True)]
    ratio = max((high / wide for wide, high, _ in sides), default=1.0)
    side = min(side, ((HEIGHT - 0.7) / max(rows, 1) - 4 * LINE - 0.14) / ratio)
    captions = worst_captions(ids, targets, scores, losses, subtask, class_names, side)
    with image_grid(path, rows, [1] * columns, side=side, lines=4, ratio=ratio) as (figure, cells):
        title_of_worst(figure, len(volumes))
        for i, (planes, own) in enumerate(zip(volumes, spacings, strict=True)):
            show_volume(
                cells[divmod(i, columns)], planes, np.array(own), limits_of(planes), captions[i]
            )
