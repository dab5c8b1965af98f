"""Points of a plane as a picture: colours, shapes and names of classes, or a scale of numbers.

N samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.coloring import MARKERS, UNKNOWN, Coloring, style
from glovita_lib.figures import INK, drawing, short
from glovita_lib.files import atomic_path

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
            draw_numbers(figure, axes, points, coloring, order, size)
        else:
            draw_classes(figure, axes, points, coloring, order, size)
        frame(figure, axes, points, text)
        with atomic_path(svg) as temporary:
            figure.savefig(
                temporary,
                format="svg",
                metadata={"Date": None, "Creator": None},
                bbox_inches="tight",
                pad_inches=0.12,
            )


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
    figure: Any, axes: Any, points: np.ndarray, coloring: Coloring, order: np.ndarray, size: float
) -> None:
    """Colours of a scale that every eye reads as rising; unknown numbers are grey, below."""
    known = ~np.isnan(coloring.values)
    scatter(axes, points[~known], UNKNOWN, "o", size, zorder=1)
    order = order[known[order]]
    if not len(order):
        return
    drawn = axes.scatter(
        *points[order].T,
        c=coloring.values[order],
        cmap="viridis",
        s=size**2,
        linewidths=0,
        alpha=0.85,
        zorder=2,
    )
    bar = figure.colorbar(drawn, cax=figure.add_axes((1.025, 0.4, 0.024, 0.55)))
    bar.outline.set_visible(False)
    bar.solids.set_alpha(1)
    bar.ax.tick_params(length=2)
    bar.ax.set_title(short(coloring.title, 24), fontsize=8.5, loc="left", pad=8)
    if not known.all():
        text = f"not known ({np.count_nonzero(~known):,})"
        bar.ax.text(0, -0.06, "\u25cf", transform=bar.ax.transAxes, color=UNKNOWN, va="top")
        bar.ax.text(1, -0.07, text, transform=bar.ax.transAxes, fontsize=8.5, va="top")


# ---------------------------------------------------------------------- classes


def draw_classes(
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
    scatter(axes, points[places < 0], UNKNOWN, "o", size, zorder=1)
    colours = np.array([style(i)[0] for i in range(len(shown))] or [INK])
    shapes = np.array([MARKERS.index(style(i)[1]) for i in range(len(shown))] or [0])
    for shape, mark in enumerate(MARKERS):
        rows = order[(places[order] >= 0) & (shapes[places[order]] == shape)]
        scatter(axes, points[rows], colours[places[rows]], MARKS[mark], size, zorder=2)
    if len(shown) == 1 and (places >= 0).all() and not coloring.title:
        return  # nothing is told apart
    key(axes, coloring, counts, shown, int((coloring.codes < 0).sum()))
    if 1 < len(shown) <= NAMED:
        name_places(figure, axes, points, coloring, shown)


def scatter(axes: Any, points: np.ndarray, colours: Any, mark: str, size: float, **more) -> None:
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
        **more,
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

    return to_hex([0.6 * part for part in to_rgb(colour)])
