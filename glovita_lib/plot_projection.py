"""Maps of samples in two dimensions: colours, PNG and SVG, interactive HTML page."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.data import NUMBER, Images
from glovita_lib.dist import cores
from glovita_lib.errors import UserError, key_of
from glovita_lib.figures import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    SKY,
    displayed,
    drawing,
    save_figure,
    short,
    window,
)
from glovita_lib.files import read_csv, write_text
from glovita_lib.metrics_classification import Scores

# ----------------------------------------------------------------------------------- colours
#
# The meaning of colours: classes, sets of labels, values, columns of a table.
#
# N samples, K classes or targets.

PALETTE = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, "#7A2FD0", "#5A2A00", INK, "#CFC76A")
"""Okabe and Ito's colours and four that are as far from them with any colour vision."""
MARKERS = ("circle", "triangle", "square", "diamond", "cross")
"""Shapes that tell classes of one colour apart; the classes go through the colours first."""
STYLES = len(PALETTE) * len(MARKERS)
UNKNOWN = "#C4C4C4"
WHOLE_NUMBERS = 20  # different whole numbers up to which a column holds classes
NO_LABEL = "no label"
EXACT = 2**53  # whole numbers up to which float64 has all
INTEGER = re.compile(r"[+-]?[0-9]{1,400}")  # more digits are no float64


@dataclass(frozen=True, slots=True)
class Coloring:
    """One property of the samples, as classes or as numbers."""

    title: str
    names: tuple[str, ...]
    """Of the classes, in the order of the legend; empty for numbers."""
    codes: np.ndarray
    """Class (N,) int64 of each sample, -1 where it is not known; all -1 for numbers."""
    values: np.ndarray | None
    """Number (N,) float64 of each sample, NaN where it is not known; None for classes."""
    texts: tuple[str, ...] | None = None
    """Numbers as a table has them; None where they are those of `values`."""
    base: int = 0
    """What `values` are counted from: the smallest of integers that float64 cannot hold."""

    def words(self) -> list[str]:
        """The property of each sample as text, numbers so that they read back equal; empty where it
        is not known."""
        if self.values is None:
            return [self.names[code] if code >= 0 else "" for code in self.codes]
        texts = self.texts or [repr(float(value)) for value in self.values]
        known = ~np.isnan(self.values)
        return [text if has else "" for text, has in zip(texts, known, strict=True)]


def style(place: int) -> tuple[str, str]:
    """Colour and marker of a class."""
    return PALETTE[place % len(PALETTE)], MARKERS[place // len(PALETTE) % len(MARKERS)]


# ---------------------------------------------------------------------- what is known of samples


def classes(title: str, codes: np.ndarray, names: Sequence[str]) -> Coloring:
    """One class a sample, out of a list of names; classes without samples are left out."""
    used = np.unique(codes[codes >= 0])
    place = np.full(len(names) + 1, -1)  # the last one is found by -1
    place[used] = np.arange(len(used))
    return Coloring(title, tuple(names[code] for code in used), place[codes], None)


def color_numbers(
    title: str, values: np.ndarray, texts: Sequence[str] | None = None, base: int = 0
) -> Coloring:
    """One number a sample; `texts` and `base` as in Coloring."""
    values = np.asarray(values, np.float64)
    unknown = np.full(len(values), -1)
    return Coloring(title, (), unknown, values, None if texts is None else tuple(texts), base)


def words(title: str, texts: Sequence[str]) -> Coloring:
    """One word a sample, the most frequent first; an empty one is not known."""
    found, codes, counts = np.unique(
        np.array(texts, dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    order = order[found[order] != ""]
    place = np.full(len(found), -1)
    place[order] = np.arange(len(order))
    return Coloring(title, tuple(found[order].tolist()), place[codes], None)


def of_targets(
    title: str, targets: np.ndarray, subtask: str, names: Sequence[str]
) -> list[Coloring]:
    """Truth of the samples: their class, their set of labels, or each target of a regression.

    Args:
        targets: (N,) class indices, or (N, K) labels or values.
        names: K names.
    """
    if subtask == "multiclass":
        return [classes(title, targets, names)]
    if subtask == "multilabel":  # samples with the same set of labels have the same colour
        rows = [np.flatnonzero(row).tolist() for row in targets > 0.5]
        return [words(title, [" + ".join(names[k] for k in row) or NO_LABEL for row in rows])]
    several = targets.shape[1] > 1
    return [
        color_numbers(f"{title} {name}" if several else title, column)
        for name, column in zip(names, targets.T, strict=True)
    ]


def of_scores(title: str, scores: Scores, subtask: str, names: Sequence[str]) -> list[Coloring]:
    """What a model predicts from its scores (N, K): as of_targets."""
    return of_targets(title, scores.predicted(subtask), subtask, names)


def of_mistakes(truth: Coloring, prediction: Coloring) -> Coloring:
    """Right or wrong; of numbers the absolute error."""
    if truth.values is not None:
        return color_numbers("absolute error", np.abs(truth.values - prediction.values))
    pairs = zip(truth.words(), prediction.words(), strict=True)
    wrong = np.array([first != second for first, second in pairs], np.int64)
    return classes("mistakes", wrong, ("right", "wrong"))


# ---------------------------------------------------------------------- tables


def of_column(path: Path, column: str, ids: Sequence[Sequence[str]]) -> Coloring:
    """A column of a CSV file with the column id.

    Numbers are a continuous scale, but at most 20 different whole numbers, and words, are classes.

    Args:
        ids: for each sample the ids that it may have in the file, the first one that is there
            counts.

    Raises:
        UserError: no such file or column, an id twice, or a file that has none of the samples.
    """
    rows = read_csv(path, ("id", column))
    table = {key_of(row["id"]): row[column] for row in rows}
    if len(table) < len(rows):
        raise UserError(f"{path}: some ids occur twice; give each sample one row")
    known = [[table[name] for name in map(key_of, names) if name in table] for names in ids]
    texts = [cells[0] if cells else "" for cells in known]
    if not any(known) and len(ids):
        raise UserError(
            f"{path} has none of the samples: its ids are like {next(iter(table), 'none')!r}, those"
            f" of the samples like {ids[0][0]!r}; write the latter into the column id"
        )
    values = as_numbers(texts)
    if values is None:
        return words(column, texts)
    integers = as_integers(texts, values)
    if integers is None:
        return color_numbers(column, values, texts)
    found = sorted({integer for integer in integers if integer is not None})
    if len(found) <= WHOLE_NUMBERS:
        place = {integer: code for code, integer in enumerate(found)}
        codes = [-1 if integer is None else place[integer] for integer in integers]
        return Coloring(column, tuple(map(str, found)), np.array(codes, np.int64), None)
    is_long = max(-found[0], found[-1]) > EXACT and found[-1] - found[0] < 1e300
    base = found[0] if is_long else 0
    counted = [np.nan if integer is None else float(integer - base) for integer in integers]
    return color_numbers(column, np.array(counted), texts, base)


def as_integers(texts: Sequence[str], values: np.ndarray) -> list[int | None] | None:
    """Cells as whole numbers with all their digits, None where not known; None for all where one is
    a fraction, or has an exponent that float64 has no digits for.

    Args:
        values: the cells as float64 (N,), NaN where not known.
    """
    known = values[~np.isnan(values)]
    if not (known == np.round(known)).all():
        return None
    integers: list[int | None] = []
    for text, value in zip(texts, values, strict=True):
        if np.isnan(value):
            integers.append(None)
        elif INTEGER.fullmatch(text):
            integers.append(int(text))
        elif abs(value) <= EXACT:
            integers.append(int(value))
        else:
            return None
    return integers


def as_numbers(texts: Sequence[str]) -> np.ndarray | None:
    """Cells as finite numbers, NaN where empty or not finite; None where one is a word."""
    without = ("", "nan", "inf", "-inf")
    if not all(NUMBER.fullmatch(text) or text.lower() in without for text in texts):
        return None
    values = np.array([float(text or "nan") for text in texts], np.float64)
    return np.where(np.isfinite(values), values, np.nan)


# ------------------------------------------------------------------------------- the picture
#
# Colours, shapes and names of classes, or a scale of numbers.
#
# N samples.

SIDE = 6.2  # inches of the square of points
LEGEND = 36  # classes with a colour of their own; the others are grey
NAMED = 24  # classes up to which names stand among the points too
ROWS = 24  # of the legend, before it gets a second column
DENSE = 800  # samples of a class among which the densest place is looked for
MARKS = {"circle": "o", "triangle": "^", "square": "s", "diamond": "D", "cross": "X"}


@dataclass(frozen=True, slots=True)
class Text:
    """Words of a picture."""

    title: str
    subtitle: str
    axes: tuple[str, str]
    """Names of the axes; empty where they mean nothing, then they have no numbers either."""


def draw_points(
    points: np.ndarray,
    coloring: Coloring,
    text: Text,
    *,
    png: Path,
    svg: Path,
    dpi: int,
    point_size: float | None,
) -> None:
    """The points (N, 2) as PNG and SVG, with a legend or a colour bar beside them.

    Of more than LEGEND classes the most frequent ones have colours.

    Args:
        point_size: diameter, 1/72 inch; None follows from N.
    """
    import matplotlib

    size = diameter(len(points)) if point_size is None else point_size
    order = np.random.default_rng(0).permutation(len(points))  # no class lies on top of the others
    with drawing(png, SIDE, SIDE) as figure:
        matplotlib.rcParams.update({"savefig.dpi": dpi, "svg.hashsalt": "glovita"})
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))  # words and legend lie around it and widen the paper
        if coloring.values is not None:
            draw_numbers(figure, axes, points, coloring, coloring.values, order, size)
        else:
            draw_class_points(figure, axes, points, coloring, order, size)
        frame(figure, axes, points, text)
        save_figure(figure, svg, "svg", {"Date": None, "Creator": None})


def diameter(count: int) -> float:
    """Of a point, 1/72 inch: less for more of them."""
    return float(np.interp(np.log10(max(count, 1)), [1.5, 2.5, 3.3, 4, 5], [7, 5.5, 3.8, 2.6, 1.2]))


def frame(figure: Any, axes: Any, points: np.ndarray, text: Text) -> None:
    """Equal scales in a square, heading, and axes as far as they mean something."""
    low, high = points.min(0), points.max(0)
    half = float((high - low).max()) / 2 * 1.1 or 1.0
    centre = (low + high) / 2
    axes.set(
        xlim=(centre[0] - half, centre[0] + half),
        ylim=(centre[1] - half, centre[1] + half),
        aspect="equal",
        xlabel=text.axes[0],
        ylabel=text.axes[1],
    )
    axes.spines[:].set(visible=True, color="#c8c8c8")
    if not any(text.axes):
        axes.set(xticks=[], yticks=[])
    above = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text.title, xytext=(0, 22), fontsize=11.5, fontweight="bold", **above)
    axes.annotate(text.subtitle, xytext=(0, 8), fontsize=7.8, color="#666666", **above)


# ---------------------------------------------------------------------- numbers


def draw_numbers(
    figure: Any,
    axes: Any,
    points: np.ndarray,
    coloring: Coloring,
    values: np.ndarray,
    order: np.ndarray,
    size: float,
) -> None:
    """Colours of a scale that every eye reads as rising, over the range of the values (N,); unknown
    numbers are grey, below."""
    known = ~np.isnan(values)
    scatter_shape(axes, points[~known], UNKNOWN, "o", size, zorder=1)
    order = order[known[order]]
    if not len(order):
        return
    ticks, texts = scale_ticks(values[known], coloring.base)
    drawn = axes.scatter(
        *points[order].T,
        c=parts_of(values[order], values[known]),
        cmap="viridis",
        vmin=0,
        vmax=1,
        s=size**2,
        linewidths=0,
        alpha=0.85,
        zorder=2,
    )
    bar = figure.colorbar(drawn, cax=figure.add_axes((1.025, 0.4, 0.024, 0.55)))
    bar.outline.set_visible(False)
    bar.set_ticks(parts_of(ticks, values[known]), labels=texts)
    bar.solids.set_alpha(1)
    bar.ax.tick_params(length=2)
    bar.ax.set_title(short(coloring.title, 24), fontsize=8.5, loc="left", pad=8)
    if not known.all():
        text = f"not known ({np.count_nonzero(~known):,})"
        bar.ax.text(0, -0.06, "\u25cf", transform=bar.ax.transAxes, color=UNKNOWN, va="top")
        bar.ax.text(1, -0.07, text, transform=bar.ax.transAxes, fontsize=8.5, va="top")


def parts_of(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Where values lie between the lowest and the highest known one, 0..1; .5 of equal ones."""
    low, high = float(known.min()), float(known.max())
    if low == high:
        return np.full(len(values), 0.5)
    if not np.isfinite(high - low):
        values, low, high = values / 4, low / 4, high / 4
    return (values - low) / (high - low)


def scale_ticks(known: np.ndarray, base: int) -> tuple[np.ndarray, list[str]]:
    """Round numbers within the range of the known ones, and their texts.

    Args:
        base: added to the numbers in the texts, which are whole then.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = float(known.min()), float(known.max())
    shrink = 1e20 if max(-low, high) > 1e290 else 1.0  # the locator needs room above
    with np.errstate(all="ignore"):
        locator = MaxNLocator(6, integer=bool(base))
        found = np.asarray(locator.tick_values(low / shrink, high / shrink)) * shrink
    ticks = np.unique(found[(found >= low) & (found <= high)])
    if len(ticks) < 2:
        ticks = np.unique([low, high])
    if base:
        return ticks, [str(base + int(tick)) for tick in ticks]
    digits = digits_apart(ticks)
    return ticks, [plain(float(f"{tick:.{digits}g}")) for tick in ticks]


def plain(value: float) -> str:
    """The shortest text of a number, without an exponent as long as its digits are few."""
    if value == 0 or 1e-4 <= abs(value) < 1e16:
        return np.format_float_positional(value, trim="-")
    return repr(value)


def digits_apart(values: np.ndarray, least: int = 1) -> int:
    """Significant digits, at least so many, with which different numbers are written differently,
    and none is moved by more than a thousandth of their range."""
    found = np.unique(values)
    if not len(found):
        return least
    half = found / 2  # their range can be too large for a number
    for digits in range(least, 17):
        rounded = np.array([float(f"{value:.{digits}g}") for value in found])
        moved = np.abs(rounded / 2 - half).max() <= (half[-1] - half[0]) / 1000
        if moved and len(np.unique(rounded)) == len(found):
            return digits
    return 17


# ---------------------------------------------------------------------- classes


def draw_class_points(
    figure: Any, axes: Any, points: np.ndarray, coloring: Coloring, order: np.ndarray, size: float
) -> None:
    """Each class with its colour and shape, its name in the legend and where it is densest."""
    counts = np.bincount(coloring.codes[coloring.codes >= 0], minlength=len(coloring.names))
    shown = np.arange(len(counts))
    if len(counts) > LEGEND:
        shown = np.sort(np.argsort(-counts, kind="stable")[:LEGEND])
    place = np.full(len(counts) + 1, -1)
    place[shown] = np.arange(len(shown))
    places = place[coloring.codes]  # (N,) place in the legend, -1 without
    scatter_shape(axes, points[places < 0], UNKNOWN, "o", size, zorder=1)
    colours = np.array([style(i)[0] for i in range(len(shown))] or [INK])
    shapes = np.array([MARKERS.index(style(i)[1]) for i in range(len(shown))] or [0])
    for shape, mark in enumerate(MARKERS):
        rows = order[(places[order] >= 0) & (shapes[places[order]] == shape)]
        scatter_shape(axes, points[rows], colours[places[rows]], MARKS[mark], size, zorder=2)
    if len(shown) == 1 and (places >= 0).all() and not coloring.title:
        return  # nothing is told apart
    key(axes, coloring, counts, shown, int((coloring.codes < 0).sum()))
    if 1 < len(shown) <= NAMED:
        name_places(figure, axes, points, coloring, shown)


def scatter_shape(
    axes: Any, points: np.ndarray, colours: Any, mark: str, size: float, *, zorder: int
) -> None:
    """Points of one shape."""
    scale = {"o": 1.0, "D": 0.9, "s": 0.95}.get(mark, 1.15)
    axes.scatter(
        *points.T,
        c=colours,
        marker=mark,
        s=(size * scale) ** 2,
        edgecolors="white",
        linewidths=0.07 * size,  # neighbours stay apart
        alpha=0.9,
        zorder=zorder,
    )


def key(axes: Any, coloring: Coloring, counts: np.ndarray, shown: np.ndarray, unknown: int) -> None:
    """Legend right of the points: names and numbers of samples."""
    from matplotlib.lines import Line2D

    entries = [
        (*style(i), f"{short(coloring.names[code], 28)} ({counts[code]:,})")
        for i, code in enumerate(shown)
    ]
    if len(shown) < len(counts):
        left = counts.sum() - counts[shown].sum()
        others = len(counts) - len(shown)
        entries.append((UNKNOWN, "circle", f"{others:,} other classes ({left:,})"))
    if unknown:
        entries.append((UNKNOWN, "circle", f"not known ({unknown:,})"))
    handles = [
        Line2D([], [], ls="", marker=MARKS[mark], color=colour, mec="none", ms=6, label=label)
        for colour, mark, label in entries
    ]
    legend = axes.legend(
        handles=handles,
        title=short(coloring.title, 28),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.005),
        borderaxespad=0,
        ncols=-(-len(handles) // ROWS),
        alignment="left",
        handletextpad=0.2,
        labelspacing=0.45,
        columnspacing=1.0,
    )
    legend.get_title().set(fontsize=9, fontweight="bold")


def name_places(
    figure: Any, axes: Any, points: np.ndarray, coloring: Coloring, shown: np.ndarray
) -> None:
    """Names above the densest part of their class; one that has no room is left out."""
    from matplotlib.patheffects import withStroke

    span = float((points.max(0) - points.min(0)).max()) or 1.0
    taken: list[tuple[float, float, float]] = []  # x, y, half width, in shares of the span
    counts = np.bincount(coloring.codes[coloring.codes >= 0], minlength=len(coloring.names))
    for i, code in sorted(enumerate(shown), key=lambda pair: -counts[pair[1]]):
        x, y = above(points[coloring.codes == code])
        name = short(coloring.names[code], 16)
        half = (0.012 * len(name) + 0.008) / 2
        if any(
            abs(x - a) / span < half + other and abs(y - b) / span < 0.028 for a, b, other in taken
        ):
            continue
        taken.append((x, y, half))
        axes.text(
            x,
            y + 0.008 * span,
            name,
            ha="center",
            va="bottom",
            fontsize=9,
            fontweight="bold",
            color=darker(style(i)[0]),
            zorder=4,
            path_effects=[withStroke(linewidth=3, foreground="white", alpha=0.9)],
        )


def above(points: np.ndarray) -> tuple[float, float]:
    """The place over the densest part of n points.

    That part surrounds the point whose (n/4)-th neighbour is the nearest, so it lies in the largest
    cluster and not in the tightest one.
    """
    some = points[:: max(1, len(points) // DENSE)]
    distances = np.linalg.norm(some[:, None] - some[None], axis=2)  # (n, n)
    reach = np.sort(distances, axis=1)[:, len(some) // 4]
    middle = int(reach.argmin())
    part = some[distances[middle] <= 2.5 * reach[middle]]
    return float(np.median(part[:, 0])), float(part[:, 1].max())


def darker(colour: str) -> str:
    """A colour that reads on white."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(colour)
    return to_hex((0.6 * red, 0.6 * green, 0.6 * blue))


# ---------------------------------------------------------------------------------- the page
#
# One HTML file that needs no network: zoom, search, classes, thumbnails.
#
# N samples.

PAGE = Path(__file__).with_name("projection_page.html")  # style and program, without the data
SHEET = 2048  # pixels of the longest side of a sheet of thumbnails; every browser decodes it
QUALITY = 80  # of JPEG
SCALE = 64  # colours of a scale of numbers


def write_page(
    path: Path,
    points: np.ndarray,
    *,
    ids: Sequence[str],
    colorings: Sequence[Coloring],
    text: Text,
    images: Images | None,
    thumbnail: int,
) -> None:
    """The points (N, 2) as a page with everything inside.

    Args:
        path: of the HTML file.
        ids: N ids.
        colorings: all that can be chosen; the first one is shown.
        images: image (C, H, W) of a sample, uint8 or uint16.
        thumbnail: longer side of a thumbnail, pixels; 0 makes none.
    """
    content: dict[str, Any] = {
        "title": text.title,
        "axes": list(text.axes),
        "x": exact(points[:, 0]),
        "y": exact(points[:, 1]),
        "ids": list(ids),
        "colorings": [coloring_data(coloring) for coloring in colorings],
        "styles": [style(i) for i in range(STYLES)],
        "markers": list(MARKERS),
        "unknown": UNKNOWN,
        "scale": scale(),
        "thumbnails": None,
    }
    if images is not None and thumbnail and len(ids):
        content["thumbnails"] = thumbnails(images, len(ids), thumbnail)
    parts = {
        "title": escape(text.title),
        "subtitle": escape(text.subtitle),
        "data": as_script(content),
    }
    write_text(path, re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], PAGE.read_text("utf-8")))


def as_script(content: Any) -> str:
    """JSON that no text in it can break out of a script element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def exact(values: np.ndarray) -> list[float | None]:
    """Numbers that read back equal, in the precision they have; None where they are not known."""
    if values.dtype == np.float64:
        return [None if math.isnan(value) else value for value in values.tolist()]
    return [None if np.isnan(value) else float(str(value)) for value in values]


def coloring_data(coloring: Coloring) -> dict[str, Any]:
    """A property of the samples as the page reads it.

    Numbers read back equal. The page writes them with as many digits as tell them apart, or, where
    the numbers of JavaScript lack digits, as the table has them.
    """
    values = coloring.values
    numbers: dict[str, Any]
    if values is None:
        numbers = {"values": None, "texts": None, "digits": None}
    else:
        known = values[~np.isnan(values)]
        is_long = coloring.base or np.abs(known).max(initial=0) > EXACT
        texts = coloring.words() if is_long else None
        numbers = {"values": exact(values), "texts": texts, "digits": digits_apart(known, 5)}
    codes = coloring.codes.tolist() if values is None else None
    return {"title": coloring.title, "names": list(coloring.names), "codes": codes, **numbers}


def scale() -> list[str]:
    """Colours of rising numbers, those of the picture."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 1, SCALE))]


# ---------------------------------------------------------------------- thumbnails


def thumbnails(image: Images, count: int, side: int) -> dict[str, Any]:
    """Images (C, H, W), side by side on as few sheets as a browser decodes safely.

    Images that are already small are kept exactly (PNG), others are shrunk (JPEG).
    """
    from PIL import Image

    with ThreadPoolExecutor(cores()) as pool:  # decoding and shrinking need no interpreter
        small = list(pool.map(lambda i: shrunk(image(i), side), range(count)))
    cell = max(max(picture.size) for picture, _ in small)
    columns = max(1, min(SHEET // cell, math.ceil(math.sqrt(count))))
    a_sheet = columns * (SHEET // cell)
    exact = all(whole for _, whole in small)
    sheets = []
    for first in range(0, count, a_sheet):
        part = small[first : first + a_sheet]
        sheet = Image.new("RGB", (columns * cell, -(-len(part) // columns) * cell), "white")
        for i, (picture, _) in enumerate(part):
            left = (i % columns) * cell + (cell - picture.width) // 2
            sheet.paste(picture, (left, (i // columns) * cell + (cell - picture.height) // 2))
        sheets.append(encoded(sheet, exact=exact))
    return {"sheets": sheets, "cell": cell, "columns": columns, "perSheet": a_sheet}


def shrunk(image: np.ndarray, side: int) -> tuple[Any, bool]:
    """An image as it is displayed, whole, at most `side` pixels high and wide; whether it already
    was."""
    from PIL import Image

    low, high = window(image, 8 if image.dtype == np.uint8 else 16)
    picture = Image.fromarray(displayed(image, low, high))
    if max(picture.size) <= side:
        return picture, True
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return picture, False


def encoded(sheet: Any, *, exact: bool) -> str:
    """A sheet as a data URL; grey ones without colours."""
    if exact and all(band.tobytes() == sheet.getchannel(0).tobytes() for band in sheet.split()):
        sheet = sheet.convert("L")
    content = io.BytesIO()
    if exact:
        sheet.save(content, "PNG", optimize=True)
    else:
        sheet.save(content, "JPEG", quality=QUALITY)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
