"""Plots of results: confusion, regression, ROC, PR and calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.figures import (
    AMBER,
    BLUE,
    COLOURS,
    GREY,
    INK,
    ORANGE,
    PALE,
    WIDTH,
    choose_fonts,
    drawing,
    grid,
    nothing_to_show,
    number,
    short,
    unique_short,
)
from glovita_lib.metrics import Regression, compute, confusion
from glovita_lib.metrics_classification import (
    BINS,
    Scores,
    Thresholds,
    all_finite,
    auroc_and_ap,
    bin_of,
)

# -------------------------------------------------------------------------------- regression
#
# Predicted against true values of a regression. N samples, K targets.

PANELS = 12  # targets shown
DOTS = 3000  # samples up to which each is a dot


def regression_scatter(
    targets: np.ndarray, outputs: np.ndarray, names: tuple[str, ...], path: Path
) -> None:
    """One panel a target with the line of perfect predictions and R2, MAE and Pearson's r.

    More than 3,000 samples are counted in hexagons. Of more than 12 targets the 12 with the lowest
    R2 are shown.

    Args:
        targets: (N, K).
        outputs: (N, K).
        names: K names.
        path: of the PNG.
    """
    samples, ones = Regression(targets, Scores(outputs), names), np.ones((len(targets), 1))
    values = {name: samples.each(name, ones)[:, 0] for name in ("r2", "mae", "pearson")}
    shown = np.argsort(np.nan_to_num(values["r2"], nan=np.inf), kind="stable")[:PANELS]
    if len(names) <= PANELS:
        shown = np.arange(len(names))
    columns = min(3, len(shown))
    size = (4.6, 4.4) if columns == 1 else (WIDTH, WIDTH / columns * 1.12 * -(-len(shown) // 3))
    with drawing(path, *size) as figure:
        for axes, k in zip(grid(figure, len(shown), 3), shown, strict=True):
            scatter_target(figure, axes, samples.targets[:, k], samples.scores[:, k])
            axes.set_title(short(names[k], 72 // columns))
            lines = (
                f"R²  {number(values['r2'][k])}",
                f"MAE  {number(values['mae'][k])}",
                f"r  {number(values['pearson'][k])}",
            )
            label(axes, "\n".join(lines))
        if len(names) > PANELS:
            text = f"The {PANELS} of {len(names)} targets with the lowest R²"
            figure.suptitle(text, x=0.01, ha="left")


def scatter_target(figure: Any, axes: Any, true: np.ndarray, predicted: np.ndarray) -> None:
    """One target; both axes have one range."""
    both = np.concatenate([true, predicted])
    low, high = both.min(), both.max()
    margin = 0.05 * (high - low) or max(abs(low), 1.0) * 0.1
    low, high = low - margin, high + margin
    if len(true) > DOTS:
        from matplotlib.colors import LinearSegmentedColormap

        shades = LinearSegmentedColormap.from_list("count", ["#d4e6f4", BLUE, "#04203c"])
        extent = (low, high, low, high)
        hexagons = axes.hexbin(
            true, predicted, gridsize=45, bins="log", cmap=shades, mincnt=1, lw=0.1, extent=extent
        )
        small = axes.inset_axes([0.6, 0.12, 0.34, 0.03])  # a corner that good predictions avoid
        bar = figure.colorbar(hexagons, cax=small, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.ax.set_title("samples", fontsize=7, fontweight="normal", pad=3)
        bar.ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        bar.ax.tick_params(length=0, labelsize=6.5, which="both", pad=2)
        bar.ax.minorticks_off()
    else:
        size, alpha = np.interp(np.log10(len(true)), [1.5, 3.5], [26, 7]), 0.45
        axes.scatter(true, predicted, s=size, color=BLUE, alpha=alpha, linewidths=0)
    axes.plot([low, high], [low, high], color=INK, lw=0.9, ls=(0, (4, 2)))
    axes.set(xlabel="true", ylabel="predicted", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.locator_params(nbins=5)


def label(axes: Any, text: str) -> None:
    """Numbers in the upper left corner, where good predictions leave room."""
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "boxstyle": "round,pad=0.3"}
    axes.text(
        0.035,
        0.965,
        text,
        transform=axes.transAxes,
        va="top",
        fontsize=8,
        linespacing=1.4,
        bbox=box,
    )


# --------------------------------------------------------------------------------- confusion
#
# The confusion matrix, and for several labels the hits and misses of each.
#
# K classes.

NAMED = 100  # classes with their names at the axes
COUNTED = 40  # classes with counts in the cells
SHARES = 8  # classes with the share of the true class in the cells
LISTED = 12  # most frequent confusions beside a matrix without counts
SPACING = 1.25  # between the lines of a cell
THOUSANDS = "kMGT"
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
        colours = draw_matrix(axes, counts)
        name_axes(axes, names, counts.sum(1))
        if classes > SHARES:
            colour_bars(figure, axes)
        right = np.trace(counts) / max(counts.sum(), 1)
        axes.set_title(f"Confusion matrix · {counts.sum():,} samples, {right:.1%} right")
        if classes <= COUNTED:  # last: they are measured against the final layout
            write_counts(figure, axes, counts, colours)


def colour_maps() -> tuple[Any, Any, Any, Any]:
    """Colour map and scale of right and of wrong predictions."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm

    right = LinearSegmentedColormap.from_list("right", ["#ffffff", "#9ecae1", BLUE, "#08306b"])
    wrong = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#fdd0a2", ORANGE, "#7f2704"])
    return right, Normalize(0, 1), wrong, PowerNorm(0.5, 0, 1)


def draw_matrix(axes: Any, counts: np.ndarray) -> np.ndarray:
    """The cells, and their colours (K, K, 4); rows of classes without samples are grey."""
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
    return image


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


def write_counts(figure: Any, axes: Any, counts: np.ndarray, colours: np.ndarray) -> None:
    """Counts in the cells, with the share of the true class where there is room; zeros stay
    empty. A text that is wider or higher than its cell is shortened, or left out.

    The layout of the figure is final afterwards.

    Args:
        counts: (K, K) samples.
        colours: (K, K, 4) of the cells, RGBA.
    """
    classes = len(counts)
    totals = np.maximum(counts.sum(1), 1)
    size = 9 if classes <= SHARES else 7.5 if classes <= 12 else 6 if classes <= 25 else 4.5
    room = cell_room(figure, axes)
    inks = np.where(is_dark(colours), "white", INK)
    for row, column in zip(*np.nonzero(counts), strict=True):
        texts = count_texts(int(counts[row, column]))
        if classes <= SHARES:
            share = f"{counts[row, column] / totals[row]:.1%}"
            texts = [*(f"{text}\n{share}" for text in texts), *texts]
        text = first_that_fits(figure, texts, size, room)
        if text:
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=size,
                linespacing=SPACING,
                color=inks[row, column],
            )


def count_texts(count: int) -> list[str]:
    """A count as text, shorter and shorter: whole, then rounded to three digits and fewer of its
    thousands, millions ...

    >>> count_texts(1604), count_texts(12_345), count_texts(96)
    (['1,604', '1604', '1.6k', '2k'], ['12,345', '12345', '12.3k', '12k'], ['96'])
    """
    rounded: list[str] = []
    for digits in (3, 2, 1):
        value = float(f"{count:.{digits}g}")
        power = min(int(np.log10(max(value, 1)) + 1e-9) // 3, len(THOUSANDS))
        if power:
            text = f"{value / 1000**power:.4g}{THOUSANDS[power - 1]}"
            rounded += [text] if not rounded or len(text) < len(rounded[-1]) else []
    return list(dict.fromkeys([f"{count:,}", f"{count}", *rounded]))


def cell_room(figure: Any, axes: Any) -> tuple[float, float]:
    """Width and height of a cell of the matrix in pixels, after the layout, which it freezes."""
    choose_fonts(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    (left, top), (right, bottom) = axes.transData.transform([(0, 0), (1, 1)])
    return float(abs(right - left)), float(abs(bottom - top))


def first_that_fits(
    figure: Any, texts: Sequence[str], size: float, room: tuple[float, float]
) -> str:
    """The first text whose ink, as the renderer measures it, keeps a margin within width and height
    in pixels; "" where none does."""
    from matplotlib.font_manager import FontProperties

    font, renderer = FontProperties(size=size), figure.canvas.get_renderer()
    margin = 0.25 * size * figure.dpi / 72  # between the texts of neighbours, pixels
    for text in texts:
        lines = text.split("\n")
        sizes = [renderer.get_text_width_height_descent(line, font, False) for line in lines]
        width = max(width for width, _, _ in sizes)
        height = sizes[0][1] * (1 + SPACING * 1.2 * (len(lines) - 1))
        if width + margin <= room[0] and height <= room[1]:
            return text
    return ""


def is_dark(colours: np.ndarray) -> np.ndarray:
    """Whether white has more contrast than the usual ink on colours (..., 4) RGBA.

    Contrast is (L1 + .05) / (L2 + .05) of relative luminances (WCAG 2.1).
    """
    from matplotlib.colors import to_rgb

    ink = luminance(np.array(to_rgb(INK)))
    return 1.05 / (luminance(colours) + 0.05) > (luminance(colours) + 0.05) / (ink + 0.05)


def luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance (WCAG 2.1) of sRGB colours (..., 3 or more) in 0..1."""
    rgb = colours[..., :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


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


# ------------------------------------------------------------------------------------ scores
#
# ROC and precision-recall curves, calibration.
#
# N samples, K classes or labels.

COLOURED = 7  # classes with a colour and a line in the legend
GRID = np.linspace(0, 1, 401)  # of false positive rate or recall


@dataclass(frozen=True, slots=True)
class Curves:
    """ROC and precision-recall curve of one class against the rest, on GRID."""

    name: str
    roc: np.ndarray  # true positive rate at each false positive rate
    pr: np.ndarray  # precision at each recall
    auroc: float
    ap: float
    share: float  # of the samples that are positive


def curves_of(name: str, positive: np.ndarray, scores: np.ndarray) -> Curves:
    """Of membership (N,) and scores (N,); both kinds of samples are there.

    Equal scores make one step. Precision is that of the first threshold that reaches a recall, as
    average precision sums it.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(scores) - 1)
    found = np.cumsum(positive[order])[ends]
    alarms = ends + 1 - found
    recall, fpr = found / found[-1], alarms / alarms[-1]
    at = np.minimum(np.searchsorted(recall, np.maximum(GRID - 1e-12, 1e-12)), len(recall) - 1)
    precision = (found / (ends + 1))[at]
    roc = np.interp(GRID, np.append(0, fpr), np.append(0, recall))
    thresholds = Thresholds.of(scores, positive)
    auroc, ap = auroc_and_ap(thresholds, np.ones((len(scores), 1)))
    return Curves(name, roc, precision, auroc.item(), ap.item(), float(positive.mean()))


def roc_pr_curves(
    positives: np.ndarray, scores: np.ndarray, class_names: tuple[str, ...], path: Path
) -> None:
    """Both curves of every class, with the mean over classes in black.

    With more than seven classes all are grey but the five with the smallest area.

    Args:
        positives: (N, K) bool.
        scores: (N, K).
        class_names: K names.
        path: of the PNG.
    """
    curves = [
        curves_of(name, positives[:, k], scores[:, k])
        for k, name in enumerate(class_names)
        if 0 < positives[:, k].sum() < len(positives)
    ]
    with drawing(path, WIDTH + 0.6, 5.1) as figure:
        left, right = figure.subplots(1, 2)
        left.set_title("ROC, one against the rest")
        right.set_title("Precision–recall, one against the rest")
        if not curves:
            reason = "not defined: no class has both\nsamples and other samples"
            nothing_to_show(left, reason)
            nothing_to_show(right, reason)
            return
        left.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls=(0, (2, 3)))
        right.axhline(np.mean([c.share for c in curves]), color=GREY, lw=0.9, ls=(0, (2, 3)))
        corner = np.append(0.0, GRID)  # a ROC curve starts at (0, 0)
        rocs = [(c.name, np.append(0.0, c.roc), c.auroc) for c in curves]
        draw_family(left, corner, rocs, "AUROC")
        draw_family(right, GRID, [(c.name, c.pr, c.ap) for c in curves], "AP")
        left.set(xlabel="false positive rate", ylabel="true positive rate")
        right.set(xlabel="recall", ylabel="precision")


def draw_family(
    axes: Any, x: np.ndarray, lines: list[tuple[str, np.ndarray, float]], area: str
) -> None:
    """Curves of (name, values at x, area), their mean, and a legend below."""
    from matplotlib.collections import LineCollection

    worst = sorted(range(len(lines)), key=lambda i: lines[i][2])
    coloured = range(len(lines)) if len(lines) <= COLOURED else worst[: COLOURED - 2]
    rest = [np.stack([x, lines[i][1]], 1) for i in worst if i not in coloured]
    if rest:
        fade = float(np.clip(8 / len(rest), 0.06, 0.5))
        label = f"{len(rest)} other classes"
        axes.add_collection(LineCollection(rest, colors=GREY, lw=0.7, alpha=fade, label=label))
    for place, i in enumerate(coloured):
        name, values, value = lines[i]
        style = ("-", (0, (5, 1.6)))[place // 4]
        label = f"{short(name, 22)}  {number(value)}"
        axes.plot(x, values, color=COLOURS[place], ls=style, lw=1.4, label=label)
    if len(lines) > 1:
        mean, value = np.mean([v for _, v, _ in lines], 0), float(np.mean([a for *_, a in lines]))
        axes.plot(x, mean, color=INK, lw=2.4, label=f"mean of classes  {number(value)}")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
    title = area if len(lines) <= COLOURED else f"{area}, lowest classes"
    legend = axes.legend(
        title=title,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.16),
        ncols=2 if len(lines) > 3 else 1,
        alignment="left",
        handlelength=1.8,
        columnspacing=1.2,
    )
    legend.get_title().set_fontsize(8)
    for line in legend.get_lines():
        line.set_alpha(1)


def calibration(
    probability: np.ndarray,
    outcome: np.ndarray,
    path: Path,
    *,
    what: tuple[str, str],
    ece: float,
    brier: float,
) -> None:
    """Reliability diagram over 15 bins with 95 % Wilson intervals, above how the scores spread.

    Args:
        probability: (M,) predicted.
        outcome: (M,) bool, whether it came true.
        path: of the PNG.
        what: names of the two axes, e.g. confidence and accuracy.
        ece: expected calibration error, in the legend.
        brier: Brier score, in the legend.
    """
    bins = bin_of(probability)
    n = np.bincount(bins, minlength=BINS)
    used = n > 0
    hits = np.bincount(bins, outcome, minlength=BINS)[used]
    mean = np.bincount(bins, probability, minlength=BINS)[used] / n[used]
    rate = hits / n[used]
    sizes = 14 + 40 * np.sqrt(n[used] / n.max())
    with drawing(path, 4.7, 6.0) as figure:
        above, below = figure.subplots(2, 1, height_ratios=[4, 1.1], sharex=True)
        above.plot([0, 1], [0, 1], color=GREY, lw=0.9, ls=(0, (2, 3)))
        above.vlines(mean, mean, rate, color=ORANGE, lw=3.5, alpha=0.35, label="gap")
        low, high = wilson(hits, n[used])
        above.vlines(mean, low, high, color=BLUE, lw=1, label="95 % interval")
        above.scatter(
            mean, rate, sizes, color=BLUE, zorder=3, label="bin, larger with more samples"
        )
        above.set(ylabel=what[1], xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        above.set_title(f"Calibration · ECE {number(ece)} · Brier {number(brier)}", pad=24)
        above.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.995),
            ncols=3,
            columnspacing=1.1,
            handlelength=1.2,
            handletextpad=0.5,
        )
        below.bar((np.arange(BINS) + 0.5) / BINS, n / max(int(n.sum()), 1), 0.92 / BINS, color=BLUE)
        below.set(xlabel=what[0], ylabel="share")
        below.grid(axis="x", visible=False)
        below.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def wilson(hits: np.ndarray, n: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share (Wilson, 1927): good for few samples and shares near 0 and 1."""
    centre = (hits + z**2 / 2) / (n + z**2)
    half = z * np.sqrt(hits * (n - hits) / n + z**2 / 4) / (n + z**2)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


# ---------------------------------------------------------------------------- all of a split
#
# Which plots a split gets follows from the kind of target.

LARGEST_MATRIX = 1000  # classes; a larger confusion matrix has less than a pixel a cell


def plot_results(
    folder: Path,
    name: str,
    *,
    subtask: str,
    targets: np.ndarray,
    scores: Scores,
    class_names: tuple[str, ...],
) -> list[Path]:
    """Figures of a labelled split; none if it is empty or holds scores that are not finite.

    Writes confusion_<name>.png, roc_pr_<name>.png and calibration_<name>.png, or
    regression_<name>.png.

    Args:
        folder: where the files go.
        name: of the split.
        subtask: multiclass, multilabel or regression.
        targets: (N,) class indices; (N, K) 0 or 1; (N, K) values.
        scores: (N, K).
        class_names: K names.
    """
    if not all_finite(scores.values):
        return []
    if subtask == "regression":
        path = folder / f"regression_{name}.png"
        regression_scatter(targets, scores.values, class_names, path)
        return [path]
    paths = [folder / f"{kind}_{name}.png" for kind in ("confusion", "roc_pr", "calibration")]
    quality = compute(
        ("ece", "brier"), subtask=subtask, targets=targets, scores=scores, class_names=class_names
    )
    if subtask == "multiclass":
        predicted, classes = scores.predicted(subtask), len(class_names)
        positives = targets[:, None] == np.arange(classes)  # (N, K)
        if classes <= LARGEST_MATRIX:
            confusion_matrix(confusion(targets, predicted, classes), class_names, paths[0])
        else:
            del paths[0]
        probability = scores.values[np.arange(len(predicted)), predicted]
        outcome = predicted == targets
        what = ("probability of the predicted class", "share that is right")
    else:
        positives = targets > 0.5
        label_outcomes(positives, scores.predicted(subtask), class_names, paths[0])
        probability, outcome = scores.values.ravel(), positives.ravel()
        what = ("probability of a label, all labels pooled", "share that is set")
    roc_pr_curves(positives, scores.ranked, class_names, paths[-2])
    calibration(probability.astype(np.float64), outcome, paths[-1], what=what, **quality)
    return paths
