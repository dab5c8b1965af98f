"""Predicted against true values of a regression. N samples, K targets."""

from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.figures import BLUE, INK, WIDTH, drawing, grid, number, short
from glovita_lib.regression import Regression

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
    samples, ones = Regression(targets, outputs), np.ones((len(targets), 1))
    values = {name: samples.each(name, ones)[:, 0] for name in ("R2", "MAE", "Pearson")}
    shown = np.argsort(np.nan_to_num(values["R2"], nan=np.inf), kind="stable")[:PANELS]
    if len(names) <= PANELS:
        shown = np.arange(len(names))
    columns = min(3, len(shown))
    size = (4.6, 4.4) if columns == 1 else (WIDTH, WIDTH / columns * 1.12 * -(-len(shown) // 3))
    with drawing(path, *size) as figure:
        for axes, k in zip(grid(figure, len(shown), 3), shown, strict=True):
            scatter(figure, axes, samples.targets[:, k], samples.scores[:, k])
            axes.set_title(short(names[k], 72 // columns))
            lines = (
                f"R²  {number(values['R2'][k])}",
                f"MAE  {number(values['MAE'][k])}",
                f"r  {number(values['Pearson'][k])}",
            )
            label(axes, "\n".join(lines))
        if len(names) > PANELS:
            text = f"The {PANELS} of {len(names)} targets with the lowest R²"
            figure.suptitle(text, x=0.01, ha="left")


def scatter(figure: Any, axes: Any, true: np.ndarray, predicted: np.ndarray) -> None:
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
