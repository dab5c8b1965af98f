"""How good the scores are beyond the decision: ROC and precision-recall curves, calibration.

N samples, K classes or labels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.classification import BINS, bin_of
from glovita_lib.figures import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    ORANGE,
    WIDTH,
    drawing,
    nothing_to_show,
    number,
    short,
)
from glovita_lib.weighted import Ladder, auroc_and_ap

SHOWN = 7  # classes with a colour and a line in the legend
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
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = np.cumsum(positive[order])[ends]
    alarms = ends + 1 - found
    recall, fpr = found / found[-1], alarms / alarms[-1]
    at = np.minimum(np.searchsorted(recall, np.maximum(GRID - 1e-12, 1e-12)), len(recall) - 1)
    precision = (found / (ends + 1))[at]
    roc = np.interp(GRID, np.append(0, fpr), np.append(0, recall))
    ladder = Ladder.of(scores, positive)
    auroc, ap = auroc_and_ap(ladder, np.ones((len(scores), 1)))
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
    coloured = range(len(lines)) if len(lines) <= SHOWN else worst[: SHOWN - 2]
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
        mean, value = np.mean([v for _, v, _ in lines], 0), np.mean([a for _, _, a in lines])
        axes.plot(x, mean, color=INK, lw=2.4, label=f"mean of classes  {number(value)}")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
    title = area if len(lines) <= SHOWN else f"{area}, lowest classes"
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
        below.bar((np.arange(BINS) + 0.5) / BINS, n / max(n.sum(), 1), 0.92 / BINS, color=BLUE)
        below.set(xlabel=what[0], ylabel="share")
        below.grid(axis="x", visible=False)
        below.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def wilson(hits: np.ndarray, n: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share (Wilson, 1927): good for few samples and shares near 0 and 1."""
    centre = (hits + z**2 / 2) / (n + z**2)
    half = z * np.sqrt(hits * (n - hits) / n + z**2 / 4) / (n + z**2)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
