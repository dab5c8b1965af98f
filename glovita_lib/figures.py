"""One look for all figures: paper, type, colours; drawn without pyplot and written whole.

Colours are those of Okabe and Ito, told apart with any colour vision; no meaning rests on colour
alone.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glovita_lib.files import atomic_path

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, INK, GREY, PALE = "#E69F00", "#56B4E9", "#222222", "#8a8a8a", "#d9d9d9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, INK, GREY)
WIDTH = 7.5  # inches: A4 less its margins
HEIGHT = 10.5  # inches

STYLE: dict[str, Any] = {
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
    """A matplotlib Figure in the house style, saved at `path` as PNG after the block.

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
