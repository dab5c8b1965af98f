"""Style and drawing of figures, and sheets of images."""

import logging
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from glovita_lib.errors import listed
from glovita_lib.files import atomic_path
from glovita_lib.metrics_classification import Scores

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
    "font.family": "DejaVu Sans",  # which comes with matplotlib; `choose_fonts` adds others
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

    The same content gives the same bytes where the same fonts are installed; the user's
    matplotlibrc has no say. What no font can draw is said once. A block that raises leaves the file
    as it was.

    Args:
        path: of the PNG.
        width: inches.
        height: inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings(), quiet_fonts():
        for message in (NO_GLYPH, NO_SCRIPT):  # said by `save_figure` in words of the figure
            warnings.filterwarnings("ignore", message=message)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        metadata = {"Software": None}  # else the version of matplotlib
        save_figure(figure, path, "png", metadata)


def save_figure(figure: Any, path: Path | str, kind: str, metadata: dict[str, Any]) -> None:
    """Write a figure in the fonts that its texts need, and say once which cannot be drawn."""
    choose_fonts(figure)
    with atomic_path(path) as temporary, warnings.catch_warnings(record=True) as caught:
        for message in (NO_GLYPH, NO_SCRIPT):
            warnings.filterwarnings("always", message=message)
        figure.savefig(
            temporary, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.12
        )
    missing = set()
    for warning in caught:
        if glyph := re.match(NO_GLYPH, str(warning.message)):
            missing.add(chr(int(glyph[1])))
        elif not re.match(NO_SCRIPT, str(warning.message)):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if new := missing - UNDRAWN:
        UNDRAWN.update(new)
        say_undrawn(figure, new)


# ---------------------------------------------------------------------- fonts

NO_GLYPH = r"Glyph (\d+) .*missing from"
NO_SCRIPT = r"Matplotlib currently does not support .* natively"
UNDRAWN: set[str] = set()
"""Characters that this process has said it cannot draw."""
FAMILIES = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK KR", "Noto Sans SC",
    "Noto Sans JP", "Source Han Sans SC", "Source Han Sans", "PingFang SC", "Hiragino Sans GB",
    "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Meiryo", "Apple SD Gothic Neo",
    "Malgun Gothic", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "SimHei",
    "Noto Emoji", "Segoe UI Emoji", "Symbola", "Segoe UI Symbol", "Apple Symbols",
    "Arial Unicode MS",
)  # fmt: skip
"""Preferred of the installed families, before all others in the order of their names."""
NO_FONTS = re.compile(r"last ?resort|adobe blank|tofu", re.IGNORECASE)
"""Families that have a box for every character."""


@contextmanager
def quiet_fonts() -> Iterator[None]:
    """Without the lines that matplotlib logs where a family lacks a weight."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def choose_fonts(figure: Any) -> None:
    """Give all texts of a figure the installed families that its characters need beside the usual
    one; matplotlib takes each character from the first that has it."""
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    for axes in figure.findobj(Axes):
        axes.get_xticklabels(), axes.get_yticklabels()  # which are written when they are asked for
    texts = figure.findobj(Text)
    characters = {character for text in texts for character in text.get_text()}
    rare = frozenset(c for c in characters if ord(c) > 0x7E and not c.isspace())
    if not rare:
        return
    families = [str(STYLE["font.family"]), *families_for(rare)]
    matplotlib.rcParams["font.family"] = families  # of ticks that are made later
    for text in texts:
        text.set_fontfamily(families)


@cache
def families_for(characters: frozenset[str]) -> tuple[str, ...]:
    """Installed families that draw what the usual one lacks, each as far as those before it do
    not."""
    from matplotlib.font_manager import findfont

    left = characters - drawn_by(findfont(str(STYLE["font.family"])), characters)
    chosen = []
    for family, path in installed_fonts() if left else ():
        if found := drawn_by(path, left):
            chosen.append(family)
            left -= found
        if not left:
            break
    return tuple(chosen)


@cache
def installed_fonts() -> list[tuple[str, str]]:
    """Families and a regular font file of each, the preferred ones first.

    matplotlib keeps a list of fonts from its first start; those installed since are added.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in sorted(set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}):
        try:
            fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError, NotImplementedError):
            continue  # damaged, or of bitmaps
    fonts: dict[str, tuple[bool, int, str]] = {}
    for entry in fontManager.ttflist:
        if NO_FONTS.search(entry.name) or not Path(entry.fname).exists():
            continue
        weight = entry.weight if isinstance(entry.weight, int) else 400
        candidate = (entry.style != "normal", abs(weight - 400), entry.fname)
        fonts[entry.name] = min(fonts.get(entry.name, candidate), candidate)
    last = len(FAMILIES)
    rank = {family: place for place, family in enumerate(FAMILIES)}
    order = sorted(fonts, key=lambda family: (rank.get(family, last), family))
    return [(family, fonts[family][2]) for family in order]


def drawn_by(path: str, characters: frozenset[str]) -> set[str]:
    """Those of the characters that a font has a shape for; fonts of coloured pictures have none."""
    from matplotlib.font_manager import get_font

    drawn = set()
    try:
        font = get_font(path)
        known = font.get_charmap()
        for character in characters:
            if ord(character) in known:
                font.load_char(ord(character))
                if len(font.get_path()[0]) or unicodedata.category(character) in ("Cf", "Mn"):
                    drawn.add(character)
    except (OSError, RuntimeError, ValueError):
        return set()  # damaged
    return drawn


def say_undrawn(figure: Any, characters: set[str]) -> None:
    """The line that names texts whose characters no installed font has."""
    from matplotlib.text import Text

    texts = dict.fromkeys(" ".join(text.get_text().split()) for text in figure.findobj(Text))
    names = [short(text, 40) for text in texts if characters & set(text)]
    print(
        f"note: figures show empty boxes in {listed(names, most=3)}: no installed font has"
        f" {listed(sorted(characters), most=10)}; install one, e.g. Noto Sans CJK for Chinese,"
        " Japanese and Korean, Noto Emoji or Symbola for emoji",
        file=sys.stderr,
        flush=True,
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
    scores: Scores,
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
    scores: Scores,
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


SHOWN_FRAMES = 4  # of a clip, two above two


def some_frames(frames: np.ndarray) -> np.ndarray:
    """A few of the frames (T, ...) of a clip, from its first to its last."""
    count = min(SHOWN_FRAMES, len(frames))
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def frames_as_one(frames: np.ndarray, white: float | np.ndarray) -> np.ndarray:
    """Up to four frames (n, C, H, W) in reading order as one picture (C, H', W'), a line of white
    (a number, or one for each channel) between them."""
    count, channels, height, width = frames.shape
    gap = max(1, width // 32)
    columns, rows = min(count, 2), -(-count // 2)
    sides = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    whole = np.empty((channels, *sides), frames.dtype)
    whole[:] = np.broadcast_to(white, channels)[:, None, None]
    for number, frame in enumerate(frames):
        top, left = (height + gap) * (number // 2), (width + gap) * (number % 2)
        whole[:, top : top + height, left : left + width] = frame
    return whole


# ---------------------------------------------------------------------- words


def caption_lines(
    targets: np.ndarray,
    scores: Scores,
    subtask: str,
    class_names: tuple[str, ...],
    room: int,
) -> list[list[Line]]:
    """Two lines a sample: the truth and what the model says."""
    rows = list(zip(targets, scores.predicted(subtask), scores.values, strict=True))
    if subtask == "multiclass":
        return [class_lines(int(true), said, p, class_names, room) for true, said, p in rows]
    if subtask == "multilabel":
        return [label_lines(true > 0.5, said, p, class_names, room) for true, said, p in rows]
    spread = targets.std(0) if len(targets) else np.ones(len(class_names))
    spread = np.where(spread > 0, spread, 1.0)
    return [value_lines(true, output, spread, class_names, room) for true, output, _ in rows]


def class_lines(
    target: int, predicted: int, scores: np.ndarray, names: tuple[str, ...], room: int
) -> list[Line]:
    """Probability of the true and of the predicted class."""
    sign, colour = ("✓", BLUE) if predicted == target else ("✗", ORANGE)
    return [
        Line(f"true {short(names[target], room - 12)} · {scores[target]:.0%}", INK),
        Line(f"{sign} {short(names[predicted], room - 9)} · {scores[predicted]:.0%}", colour),
    ]


def label_lines(
    truth: np.ndarray, said: np.ndarray, scores: np.ndarray, names: tuple[str, ...], room: int
) -> list[Line]:
    """Labels that were missed and false ones, the surest mistake first."""
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
