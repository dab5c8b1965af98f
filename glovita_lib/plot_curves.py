"""Learning curves from the records of a run."""

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
from glovita_lib.metric_names import lower_is_better, split_of

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
            finish(axes, len(history), best)
        if best is not None:
            note = f"dotted line: epoch {best + 1}, the best checkpoint"
            figure.text(0.99, -0.005, note, ha="right", va="top", fontsize=7.5, color=GREY)


def panel_names(history: list[Record]) -> list[str]:
    """Loss first, then metrics in the order logged; all F1_<class> share the panel F1_*."""
    names = ["loss"]
    for record in history:
        for key in record:
            split, name = split_of(key)
            name = "F1_*" if name.startswith("F1_") else name
            if split in ("train", "val") and name not in names:
                names.append(name)
    return names


def series(history: list[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, counted from 1, and values where there is one."""
    pairs = [(r["epoch"] + 1, r[key]) for r in history if finite(r.get(key))]
    return tuple(np.array(column, float) for column in zip(*pairs, strict=True)) or (
        np.empty(0),
        np.empty(0),
    )


def finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and bool(np.isfinite(value))


def draw_panel(axes: Any, history: list[Record], name: str) -> None:
    """Train and val curve of one metric; of all classes for F1_*."""
    axes.set_title("F1 per class" if name == "F1_*" else name.replace("_", " "))
    if name == "F1_*":
        draw_classes(axes, history)
        return
    drawn = False
    for split, colour, dash in (("train", GREY, (0, (4, 1.5))), ("val", BLUE, "-")):
        x, y = series(history, f"{split}_{name}")
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


def draw_classes(axes: Any, history: list[Record]) -> None:
    """Val F1 of each class, thin, and their median."""
    keys = dict.fromkeys(k for r in history for k in r if k.startswith("val_F1_"))
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
    x, y = series(history, "lr")
    axes.set_title("learning rate")
    if not len(x):
        nothing_to_show(axes, "no values")
        return
    axes.plot(x, y, color=GREEN, marker="o" if len(x) == 1 else None)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def finish(axes: Any, epochs: int, best: int | None) -> None:
    """Whole epochs at the x axis, and the epoch of the best checkpoint."""
    from matplotlib.ticker import MaxNLocator

    if best is not None:
        axes.axvline(best + 1, color=ORANGE, lw=0.8, ls=(0, (2, 2)), zorder=1)
    if axes.lines:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlim(min(0, epochs - 1) if epochs > 1 else 0, epochs + (1 if epochs == 1 else 0.2))
    axes.set_xlabel("epoch")
