"""Which classes are taken for which: the confusion matrix, and hits and misses of each label.

K classes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.figures import (
    AMBER,
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    WIDTH,
    drawing,
    short,
    unique_short,
)

NAMED = 100  # classes with their names at the axes
COUNTED = 40  # classes with counts in the cells
SHARES = 8  # classes with the share of the true class in the cells
LISTED = 12  # most frequent confusions beside a matrix without counts
LABELS = 50  # labels of a multilabel figure: the worst ones


def confusion_matrix(counts: np.ndarray, class_names: tuple[str, ...], path: Path) -> None:
    """Rows true, columns predicted classes; colour is the share of the true class, text the count.

    Blue is right, orange wrong; shades of wrong are stretched, so that rare confusions show. More
    than 40 classes go without counts but with a list of the most frequent confusions.

    Args:
        counts: (K, K) samples.
        class_names: K names.
        path: of the PNG.
    """
    classes = len(counts)
    side = min(max(1.5 + 0.5 * classes, 3.2), 5.4 if classes <= 12 else 7.5)
    listed = classes > COUNTED
    names = unique_short(class_names, 18 if classes <= 30 else 14)
    with drawing(path, side + 1.3, side + 0.9 + (1.1 if listed else 0)) as figure:
        if listed:
            axes, below = figure.subplots(2, 1, height_ratios=[side, 1.0])
            list_confusions(below, counts, class_names)
        else:
            axes = figure.add_subplot()
        draw_matrix(axes, counts)
        name_axes(axes, names, counts.sum(1))
        if classes <= COUNTED:
            write_counts(axes, counts)
        if classes > SHARES:
            colour_bars(figure, axes)
        right = np.trace(counts) / max(counts.sum(), 1)
        axes.set_title(f"Confusion matrix · {counts.sum():,} samples, {right:.1%} right")


def colour_maps() -> tuple[Any, Any, Any, Any]:
    """Colour map and scale of right and of wrong predictions."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm

    right = LinearSegmentedColormap.from_list("right", ["#ffffff", "#9ecae1", BLUE, "#08306b"])
    wrong = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#fdd0a2", ORANGE, "#7f2704"])
    return right, Normalize(0, 1), wrong, PowerNorm(0.5, 0, 1)


def draw_matrix(axes: Any, counts: np.ndarray) -> None:
    """The cells; rows of classes without samples are grey."""
    from matplotlib.colors import to_rgba

    right, right_scale, wrong, wrong_scale = colour_maps()
    totals = counts.sum(1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    image = wrong(wrong_scale(share))  # (K, K, 4)
    diagonal = np.arange(len(counts))
    image[diagonal, diagonal] = right(right_scale(np.diag(share)))
    image[totals[:, 0] == 0] = to_rgba("#f0f0f0")
    axes.imshow(image, interpolation="nearest", aspect="equal")
    axes.grid(False)
    if len(counts) <= NAMED:
        edges = np.arange(1, len(counts)) - 0.5
        axes.vlines(edges, -0.5, len(counts) - 0.5, color="#e4e4e4", lw=0.4)
        axes.hlines(edges, -0.5, len(counts) - 0.5, color="#e4e4e4", lw=0.4)
    axes.spines[["top", "right"]].set_visible(True)


def name_axes(axes: Any, names: list[str], totals: np.ndarray) -> None:
    """Class names at both axes, at the rows with their number of samples."""
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class · samples" if len(names) <= COUNTED else "true class")
    if len(names) > NAMED:
        return
    size = 8.5 if len(names) <= 15 else 7 if len(names) <= 30 else 6 if len(names) <= 50 else 4.6
    places = range(len(names))
    rows = [
        f"{name} · {total:,}" if len(names) <= COUNTED else name
        for name, total in zip(names, totals, strict=True)
    ]
    flat = len(names) <= 12 and max(map(len, names)) <= 40 // len(names)
    axes.set_xticks(places, names, rotation=0 if flat else 90, fontsize=size)
    axes.set_yticks(places, rows, fontsize=size)
    axes.tick_params(length=0, pad=3)


def write_counts(axes: Any, counts: np.ndarray) -> None:
    """Counts in the cells, with the share of the true class where there is room; zeros stay
    empty."""
    classes = len(counts)
    totals = np.maximum(counts.sum(1), 1)
    size = 9 if classes <= SHARES else 7.5 if classes <= 12 else 6 if classes <= 25 else 4.5
    for row, column in zip(*np.nonzero(counts), strict=True):
        count = int(counts[row, column])
        share = count / totals[row]
        text = f"{count:,}" if count < 10_000 or classes <= SHARES else f"{count / 1000:.0f}k"
        if classes <= SHARES:
            text += f"\n{share:.1%}"
        dark = share > (0.55 if row == column else 0.35)
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=size,
            linespacing=1.25,
            color="white" if dark else INK,
        )


def colour_bars(figure: Any, axes: Any) -> None:
    """What the shades of right and wrong mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import PercentFormatter

    right, right_scale, wrong, wrong_scale = colour_maps()
    for colours, scale, label in ((wrong, wrong_scale, "wrong"), (right, right_scale, "right")):
        bar = figure.colorbar(
            ScalarMappable(scale, colours), ax=axes, shrink=0.55, aspect=28, pad=0.035
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=7)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.ax.set_title(label, fontsize=7.5, fontweight="normal", loc="center", pad=5)
        bar.ax.grid(False)
        if label == "wrong":
            bar.set_ticks([0, 0.05, 0.2, 0.5, 1])


def list_confusions(axes: Any, counts: np.ndarray, class_names: tuple[str, ...]) -> None:
    """The most frequent confusions in three columns of text."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    totals = np.maximum(counts.sum(1), 1)
    axes.axis("off")
    axes.set_title("Most frequent confusions (true → predicted)", fontsize=8.5)
    rows = LISTED // 3
    for place, flat in enumerate(order):
        row, column = divmod(int(flat), len(counts))
        if not wrong[row, column]:
            break
        names = f"{short(class_names[row], 14)} → {short(class_names[column], 14)}"
        share = counts[row, column] / totals[row]
        x, y = (place // rows) / 3, 1 - (place % rows + 0.5) / rows
        text = f"{names}  {counts[row, column]:,} ({share:.0%})"
        axes.text(x, y, text, transform=axes.transAxes, fontsize=6.8, va="center")


def label_outcomes(
    truth: np.ndarray, predicted: np.ndarray, class_names: tuple[str, ...], path: Path
) -> None:
    """Bars per label of a multilabel task: found, missed, false alarms; the worst F1 on top.

    Args:
        truth: (N, K) bool.
        predicted: (N, K) bool.
        class_names: K names.
        path: of the PNG.
    """
    tp = (truth & predicted).sum(0)
    fn, fp = truth.sum(0) - tp, predicted.sum(0) - tp
    f1 = 2 * tp / np.maximum(2 * tp + fn + fp, 1)
    order = np.argsort(f1, kind="stable")[:LABELS]
    names = unique_short([class_names[k] for k in order], 24)
    places = np.arange(len(order))
    with drawing(path, WIDTH, 1.7 + 0.24 * len(order)) as figure:
        axes = figure.add_subplot()
        axes.barh(places, tp[order], 0.68, color=BLUE, label="found (true positives)")
        left = tp[order]
        axes.barh(places, fn[order], 0.68, left=left, color=PALE, label="missed (false negatives)")
        axes.barh(places, -fp[order], 0.68, color=AMBER, label="false alarms (false positives)")
        axes.axvline(0, color=INK, lw=0.8)
        values = [
            f"{name}   F1 {value:.2f}" if truth[:, k].any() or predicted[:, k].any() else name
            for name, value, k in zip(names, f1[order], order, strict=True)
        ]
        axes.set_yticks(places, values)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
        axes.set_xlabel("samples")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, labelcolor=INK)
        shown = f"the {LABELS} of {len(tp)} with the lowest F1" if len(tp) > LABELS else "by F1"
        axes.set_title(f"Labels, {shown} · {len(truth):,} samples", pad=24)
        axes.spines["left"].set_color(GREY)
