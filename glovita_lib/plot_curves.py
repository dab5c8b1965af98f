"""Learning curves: loss, metrics and learning rate over the epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    WIDTH,
    drawing,
    grid,
    nothing_to_show,
    number,
)
from glovita_lib.metric_names import METRICS, lower_is_better, metric_name, split_name, title_of

Record = dict[str, Any]
WIDE = 1000  # range of positive values above which an axis is logarithmic
TICKED = 1e150  # values up to which matplotlib finds ticks of such an axis
FINE = 60  # epochs up to which the curve within the epochs is drawn
FINE_ID = "within epochs"


def learning_curves(records: Sequence[Record], path: Path) -> None:
    """Loss, each metric and the learning rate over the epochs.

    A dot marks the best value of a val curve, a vertical line the epoch of the best checkpoint. A
    curve is interrupted where its value is undefined. The axis of a loss or an error whose positive
    values span more than a factor of 1,000 is logarithmic, and linear below the lowest of them
    where others are 0 or negative; that of a score is logarithmic below -1 where it falls under
    -1,000 (R2).

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
            choose_scale(axes, lower_is_better(name))
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
    """Epochs, counted from 1, in which a value was measured, and the values; NaN where one is
    undefined."""
    rows = [r for r in history if key in r]
    return np.array([r["epoch"] + 1.0 for r in rows]), values_of(rows, key)


def values_of(records: Sequence[Record], key: str) -> np.ndarray:
    """The value of each record, NaN where it is absent or cannot be drawn."""
    found = [record.get(key) for record in records]
    return np.array([value if finite(value) else np.nan for value in found], float)


def finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and bool(np.isfinite(value))


def draw_line(axes: Any, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """A line that NaN interrupts; values without a neighbour are dots."""
    (line,) = axes.plot(x, y, **style)
    known = np.concatenate([[False], ~np.isnan(y), [False]])
    lone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
    if len(lone):
        line.set(marker="o", markersize=3.5, markevery=lone.tolist())


def choose_scale(axes: Any, is_error: bool) -> None:
    """A logarithmic axis where it takes one to see all values; of scores, which read best on a
    linear one up to 1, below -1 alone.

    The epochs decide; differences of means, within the epochs, have rounding errors and may be
    negative. Of those the axis shows no less than a tenth of the lowest epoch.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    values = {True: np.empty(0), False: np.empty(0)}
    for line in axes.lines:
        y = np.asarray(line.get_ydata(), float)
        is_fine = line.get_gid() == FINE_ID
        values[is_fine] = np.append(values[is_fine], y[np.isfinite(y)])
    epochs, fine = values[False], values[True]
    if not is_error and epochs.min(initial=0) < -WIDE:
        axes.set_ylim(max(epochs.min() * 1.6, -TICKED), max(epochs.max(), 0) + 0.2)
        axes.set_yscale("symlog", linthresh=1, linscale=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        return
    positive = epochs[epochs > 0]
    if not is_error or not len(positive):
        return
    low, high = positive.min(), max(positive.max(), fine.max(initial=0))
    if high / WIDE <= low:
        return
    top = float(np.clip(high * 1.6, 1 / TICKED, TICKED))
    if epochs.min() > 0:
        bottom = min(low, max(fine.min(initial=low), low / 10))
        axes.set_ylim(max(bottom / 1.6, 1 / TICKED), top)
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        scale_with_zero(axes, max(low, 1 / TICKED), top, float(epochs.min()))
    axes.yaxis.set_minor_formatter(NullFormatter())


def scale_with_zero(axes: Any, low: float, top: float, least: float) -> None:
    """An axis that is logarithmic from the lowest positive value on and linear below it, in a tenth
    of its height, so that values of exactly 0 and negative ones are seen where they are.

    Args:
        low: the lowest positive value.
        top: where the axis ends.
        least: the lowest value, 0 or negative.
    """
    axes.set_ylim(max(least * 1.6, -TICKED) if least < 0 else -low / 3, top)
    axes.set_yscale("symlog", linthresh=low, linscale=max(0.5, np.log10(top / low) / 10))
    axes.yaxis.get_major_locator().set_params(numticks=7)
    axes.yaxis.set_major_formatter(lambda value, _: "" if 0 < abs(value) < low else f"{value:g}")


def draw_panel(axes: Any, history: list[Record], name: str) -> None:
    """Train and val curve of one metric; of all classes where it is per class."""
    axes.set_title(title_of(name))
    if name in METRICS and METRICS[name].per_class:
        draw_class_curves(axes, history, name)
        return
    drawn = False
    for split, colour, dash in (("train", GREY, (0, (4, 1.5))), ("val", BLUE, "-")):
        x, y = history_series(history, f"{split}_{name}")
        if np.isnan(y).all():
            continue
        drawn = True
        draw_line(axes, x, y, color=colour, ls=dash, label=split)
        if split == "val":
            at = int(np.nanargmin(y) if lower_is_better(name) else np.nanargmax(y))
            label = f"best {number(y[at])}"
            axes.plot(x[at], y[at], "o", color=ORANGE, ms=5, zorder=5, clip_on=False, label=label)
    if drawn:
        axes.legend(loc="best", handlelength=1.6, borderaxespad=0.3, labelspacing=0.25)
    else:
        nothing_to_show(axes, "no values")


def draw_class_curves(axes: Any, history: list[Record], name: str) -> None:
    """Val curve of each class, thin, and their median."""
    keys = dict.fromkeys(k for r in history for k in r if k.startswith(f"val_{name}_"))
    rows = [r for r in history if keys.keys() & r]
    table = np.stack([values_of(rows, key) for key in keys], 1) if keys else np.empty((0, 0))
    x = np.array([r["epoch"] + 1 for r in rows], float)
    known = ~np.isnan(table).all(1)
    if not known.any():
        nothing_to_show(axes, "no values")
        return
    fade = float(np.clip(6 / len(keys), 0.08, 0.7))
    for column in table.T:
        draw_line(axes, x, column, color=BLUE, lw=0.8, alpha=fade)
    median = np.full(len(x), np.nan)
    median[known] = np.nanmedian(table[known], 1)
    draw_line(axes, x, median, color=INK, label="median")
    axes.plot([], [], color=BLUE, lw=0.8, label=f"{len(keys)} classes")
    axes.legend(loc="best", handlelength=1.6, borderaxespad=0.3)


def draw_fine_loss(axes: Any, records: Sequence[Record], history: list[Record]) -> None:
    """Train loss between two log lines, pale; the records hold the mean since the epoch began.

    Means that are not finite interrupt the line, and leave the rest of their epoch unknown.
    """
    if not history or len(history) > FINE:
        return
    ends = {record["epoch"]: record["samples"] for record in history}
    per_epoch = history[-1]["samples"] / (history[-1]["epoch"] + 1)
    x, y, before = [], [], (None, 0.0, 0.0)  # epoch, samples of it, sum over them
    for record in sorted(
        (r for r in records if r.get("event") == "step" and "train_loss" in r),
        key=lambda r: r["samples"],
    ):
        epoch, mean = record["epoch"], record["train_loss"]
        start = ends.get(epoch - 1, epoch * per_epoch)
        count = record["samples"] - start  # steps that make no update have samples too
        total = mean * count if finite(mean) else np.nan
        past_count, past_sum = before[1:] if before[0] == epoch else (0.0, 0.0)
        if count > past_count:
            x.append(epoch + count / (ends.get(epoch, start + per_epoch) - start))
            y.append((total - past_sum) / (count - past_count))
        before = (epoch, count, total)
    if np.count_nonzero(~np.isnan(y)) > 2:
        draw_line(axes, np.array(x), np.array(y), color=GREY, lw=0.7, alpha=0.55, gid=FINE_ID)


def draw_lr(axes: Any, history: list[Record]) -> None:
    """Learning rate at the end of each epoch."""
    x, y = history_series(history, "lr")
    axes.set_title("learning rate")
    if np.isnan(y).all():
        nothing_to_show(axes, "no values")
        return
    draw_line(axes, x, y, color=GREEN)
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
