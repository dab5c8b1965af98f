"""Plots of results: learning curves, confusion, regression, ROC, PR and calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.figures import (
    AMBER,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    WIDTH,
    drawing,
    grid,
    nothing_to_show,
    number,
    short,
    unique_short,
)
from glovita_lib.metric_names import METRICS, lower_is_better, metric_name, split_name, title_of
from glovita_lib.metrics import Regression, compute, confusion
from glovita_lib.metrics_classification import (
    BINS,
    Scores,
    Thresholds,
    all_finite,
    auroc_and_ap,
    bin_of,
)

# --------------------------------------------------------------------------- learning curves

Record = dict[str, Any]
FINE = 60  # epochs up to which the curve within the epochs is drawn


def learning_curves(records: Sequence[Record], path: Path) -> None:
    """Loss, each metric and the learning rate over the epochs.

    A dot marks the best value of a val curve, a vertical line the epoch of the best checkpoint.

    Args:
        records: of metrics.jsonl; those of event "epoch" count, the last one of each epoch, and
            those of event "step" for the loss within the first epochs.
        path: of the PNG.
    """
    epochs = {r["epoch"]: r for r in records if r.get("event") == "epoch"}
    history = [epochs[epoch] for epoch in sorted(epochs)]
    panels = panel_names(history)
    best = history[-1].get("best_epoch") if history else None
    columns = 2 if len(panels) in (1, 3) else 3
    rows = -(-(len(panels) + 1) // columns)
    with drawing(path, WIDTH, (2.35 if columns == 3 else 2.6) * rows) as figure:
        places = grid(figure, len(panels) + 1, columns)
        for axes, name in zip(places, panels, strict=False):
            if name == "loss":
                draw_fine_loss(axes, records, history)
            draw_panel(axes, history, name)
        draw_lr(places[-1], history)
        for axes in places:
            finish_axes(axes, len(history), best)
        if best is not None:
            note = f"dotted line: epoch {best + 1}, the best checkpoint"
            figure.text(0.99, -0.005, note, ha="right", va="top", fontsize=7.5, color=GREY)


def panel_names(history: list[Record]) -> list[str]:
    """Loss first, then metrics in the order logged; the classes of a metric share its panel."""
    names = ["loss"]
    for record in history:
        for key in record:
            split, name = split_name(key)[0], metric_name(key)
            if split in ("train", "val") and name not in names:
                names.append(name)
    return names


def history_series(history: list[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, counted from 1, and values where there is one."""
    rows = [r for r in history if finite(r.get(key))]
    return np.array([r["epoch"] + 1.0 for r in rows]), np.array([r[key] for r in rows], float)


def finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and bool(np.isfinite(value))


def draw_panel(axes: Any, history: list[Record], name: str) -> None:
    """Train and val curve of one metric; of all classes where it is per class."""
    axes.set_title(title_of(name))
    if name in METRICS and METRICS[name].per_class:
        draw_class_curves(axes, history, name)
        return
    drawn = False
    for split, colour, dash in (("train", GREY, (0, (4, 1.5))), ("val", BLUE, "-")):
        x, y = history_series(history, f"{split}_{name}")
        if not len(x):
            continue
        drawn = True
        axes.plot(x, y, color=colour, ls=dash, label=split, marker="o" if len(x) == 1 else None)
        if split == "val":
            at = int(np.argmin(y) if lower_is_better(name) else np.argmax(y))
            label = f"best {number(y[at])}"
            axes.plot(x[at], y[at], "o", color=ORANGE, ms=5, zorder=5, clip_on=False, label=label)
    if drawn:
        axes.legend(loc="best", handlelength=1.6, borderaxespad=0.3, labelspacing=0.25)
    else:
        nothing_to_show(axes, "no values")


def draw_class_curves(axes: Any, history: list[Record], name: str) -> None:
    """Val curve of each class, thin, and their median."""
    keys = dict.fromkeys(k for r in history for k in r if k.startswith(f"val_{name}_"))
    table = np.array([[r[k] if finite(r.get(k)) else np.nan for k in keys] for r in history])
    x = np.array([r["epoch"] + 1 for r in history], float)
    known = ~np.isnan(table).all(1) if table.size else np.zeros(len(x), bool)
    if not known.any():
        nothing_to_show(axes, "no values")
        return
    fade = float(np.clip(6 / len(keys), 0.08, 0.7))
    axes.plot(x, table, color=BLUE, lw=0.8, alpha=fade)
    axes.plot(x[known], np.nanmedian(table[known], 1), color=INK, label="median")
    axes.plot([], [], color=BLUE, lw=0.8, label=f"{len(keys)} classes")
    axes.legend(loc="best", handlelength=1.6, borderaxespad=0.3)


def draw_fine_loss(axes: Any, records: Sequence[Record], history: list[Record]) -> None:
    """Train loss between two log lines, pale; the records hold the mean since the epoch began."""
    if not history or len(history) > FINE:
        return
    per_epoch = history[-1]["step"] / (history[-1]["epoch"] + 1)
    x, y, before = [], [], (None, 0.0, 0.0)  # epoch, steps of it, sum over them
    for record in sorted(
        (r for r in records if r.get("event") == "step" and finite(r.get("train_loss"))),
        key=lambda r: r["step"],
    ):
        steps = record["step"] - record["epoch"] * per_epoch
        total = record["train_loss"] * steps
        past_steps, past_sum = before[1:] if before[0] == record["epoch"] else (0.0, 0.0)
        if steps > past_steps:
            x.append(record["step"] / per_epoch)
            y.append((total - past_sum) / (steps - past_steps))
        before = (record["epoch"], steps, total)
    if len(x) > 2:
        axes.plot(x, y, color=GREY, lw=0.7, alpha=0.55)


def draw_lr(axes: Any, history: list[Record]) -> None:
    """Learning rate at the end of each epoch."""
    x, y = history_series(history, "lr")
    axes.set_title("learning rate")
    if not len(x):
        nothing_to_show(axes, "no values")
        return
    axes.plot(x, y, color=GREEN, marker="o" if len(x) == 1 else None)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def finish_axes(axes: Any, epochs: int, best: int | None) -> None:
    """Whole epochs at the x axis, and the epoch of the best checkpoint."""
    from matplotlib.ticker import MaxNLocator

    if best is not None:
        axes.axvline(best + 1, color=ORANGE, lw=0.8, ls=(0, (2, 2)), zorder=1)
    if axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlim(min(0, epochs - 1) if epochs > 1 else 0, epochs + (1 if epochs == 1 else 0.2))
    axes.set_xlabel("epoch")


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
        predicted, classes = scores.ranked.argmax(1), len(class_names)
        positives = targets[:, None] == np.arange(classes)  # (N, K)
        if classes <= LARGEST_MATRIX:
            confusion_matrix(confusion(targets, predicted, classes), class_names, paths[0])
        else:
            del paths[0]
        probability, outcome = scores.values.max(1), predicted == targets
        what = ("probability of the predicted class", "share that is right")
    else:
        positives = targets > 0.5
        label_outcomes(positives, scores.values >= 0.5, class_names, paths[0])
        probability, outcome = scores.values.ravel(), positives.ravel()
        what = ("probability of a label, all labels pooled", "share that is set")
    roc_pr_curves(positives, scores.ranked, class_names, paths[-2])
    calibration(probability.astype(np.float64), outcome, paths[-1], what=what, **quality)
    return paths
