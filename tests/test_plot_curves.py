"""Learning curves: every shape of records, undefined values, large ranges."""

import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glovita_lib import plot_curves
from glovita_lib.plot_curves import history_series, learning_curves, panel_names


def record(epoch: int, **values: float | None) -> dict:
    base = {"event": "epoch", "epoch": epoch, "step": 10 * (epoch + 1), "lr": 0.1, "best_epoch": 0}
    base["samples"] = 8 * base["step"]
    return base | {"train_loss": 1 / (epoch + 1)} | values


def test_learning_curves(tmp_path: Path) -> None:
    records = []
    for epoch in range(4):
        for step in (5, 10):
            loss = 2 / (10 * epoch + step)
            at = {"epoch": epoch, "step": 10 * epoch + step, "samples": 80 * epoch + 8 * step}
            records.append({"event": "step", **at, "train_loss": loss})
        values = {"val_loss": 0.5, "val_acc": 0.1 * epoch, "val_auroc": None}
        records.append(record(epoch, **values, val_f1_per_class_cat=0.3, val_f1_per_class_dog=None))
    learning_curves(records, tmp_path / "full.png")
    assert drawn(tmp_path / "full.png")
    history = [r for r in records if r["event"] == "epoch"]
    assert panel_names(history) == ["loss", "acc", "auroc", "f1_per_class"]
    x, y = history_series(history, "val_acc")
    assert x.tolist() == [1, 2, 3, 4] and y.tolist() == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(0)],
        [record(0, val_loss=math.nan, val_f1=None)],
        [record(0, val_f1_per_class_a=None), record(1, val_f1_per_class_a=None)],
        [record(e) | {"best_epoch": None, "lr": 0.0} for e in range(3)],
    ],
)
def test_learning_curves_of_little(tmp_path: Path, records: list[dict]) -> None:
    learning_curves(records, tmp_path / "curves.png")
    assert drawn(tmp_path / "curves.png")


def drawn(path: Path) -> bool:
    """Whether a figure holds more than paper."""
    with Image.open(path) as image:
        return min(image.size) > 100 and len(image.convert("RGB").getcolors(10**6) or []) > 10


@pytest.fixture
def panels(tmp_path: Path, monkeypatch):
    """Axes by title of the learning curves of records."""
    original = plot_curves.drawing

    def draw(records: list[dict]) -> dict:
        figures = []

        @contextmanager
        def kept(*arguments):
            with original(*arguments) as figure:
                figures.append(figure)
                yield figure

        monkeypatch.setattr(plot_curves, "drawing", kept)
        learning_curves(records, tmp_path / "curves.png")
        assert drawn(tmp_path / "curves.png")
        return {axes.get_title(loc="left"): axes for axes in figures[0].axes}

    return draw


def line_of(axes, label: str):
    return next(line for line in axes.lines if line.get_label() == label)


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([1e6, 0.5, 0.4, 0.3], "log"),
        ([1e-9, 1e-5], "log"),
        ([999.0, 1.0], "linear"),
        ([1e6, 0.0, 900.0, 0.0], "symlog"),
        ([1e6, 0.0, 1e6, 0.0], "linear"),
        ([0.0, 0.0], "linear"),
        ([1e6, None, 0.5], "log"),
        ([1e140, 1e-140], "log"),
        ([None, None], "linear"),
    ],
)
def test_a_wide_range_of_positive_values_is_logarithmic(panels, losses, scale) -> None:
    records = [record(e, val_loss=loss, train_loss=loss) for e, loss in enumerate(losses)]
    axes = panels(records)["loss"]
    assert axes.get_yscale() == scale
    if scale == "log":
        low, high = axes.get_ylim()
        known = [loss for loss in losses if loss is not None]
        assert low <= min(known) and high >= max(known)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert all(float(label) > 0 for label in labels)  # numbers, no formula
        places = [math.log10(value) for value in known]
        span = math.log10(high) - math.log10(low)
        assert (max(places) - min(places)) / span > 0.6  # the curve is not flat


@pytest.mark.parametrize(
    "losses",
    [
        [1e6, 3.0, 2.0, 1.0, 0.0],
        [0.0, 1e6, 3.0, 1.0],
        [1e6, 3.0, 0.5, -0.1],
        [1e6, 3.0, 1.0, -2e3],
        [2.0, 1e-3, 1e-9, 0.0, 0.0, 0.0],
        [1e140, 1.0, 1e-140, 0.0],
        [1.0, 1e-20, 1.4e-45, 0.0],
    ],
)
def test_values_of_zero_and_below_leave_a_wide_range_to_be_seen(panels, losses) -> None:
    """A separated split has a cross-entropy of exactly 0 in float32."""
    axes = panels([record(e, val_loss=loss, train_loss=loss) for e, loss in enumerate(losses)])
    axes = axes["loss"]
    assert axes.get_yscale() == "symlog"
    low, high = axes.get_ylim()
    assert low <= min(losses) and high >= max(losses)
    points = axes.transData.transform([(1, value) for value in sorted(set(losses))])
    places = axes.transAxes.inverted().transform(points)[:, 1]
    assert 0 < places[0] < 0.15 and 0.85 < places[-1] < 1
    assert np.diff(places).min() > 0.01
    axes.figure.canvas.draw()
    labels = [label for label in axes.get_yticklabels() if label.get_text()]
    assert {"0"} < {label.get_text() for label in labels}
    ends = sorted((box.y0, box.y1) for box in (label.get_window_extent() for label in labels))
    overlap = [one[1] - other[0] for one, other in zip(ends, ends[1:], strict=False)]
    assert max(overlap) < 0.3 * (ends[0][1] - ends[0][0])  # boxes have room for letters that hang


def large_first(losses: list[float], last: float) -> list[dict]:
    """Records of three epochs, and of two steps in each: a large loss first, `last` in the end."""
    steps = [1e6, 4.9e5, 0.4, 0.3, 1e-7, last]
    records = [
        {"event": "step", "epoch": n // 2, "step": 5 * n + 5, "samples": 40 * n + 40}
        | {"train_loss": loss}
        for n, loss in enumerate(steps)
    ]
    return records + [record(epoch, train_loss=loss) for epoch, loss in enumerate(losses)]


def test_a_loss_of_zero_stays_seen_where_rounding_errors_are_within_epochs(panels) -> None:
    axes = panels(large_first([4.9e5, 0.3, 0.0], last=0.0))["loss"]
    assert axes.get_yscale() == "symlog" and -0.3 < axes.get_ylim()[0] < 0


def test_scores_and_the_learning_rate_stay_linear(panels) -> None:
    values = [{"val_acc": 0.0002, "val_mae": 1e5}, {"val_acc": 0.9, "val_mae": 1.0}]
    records = [record(e, **v) | {"lr": 10.0 ** (-4 * e)} for e, v in enumerate(values)]
    axes = panels(records)
    scales = {title: axes[title].get_yscale() for title in ("accuracy", "MAE", "learning rate")}
    assert scales == {"accuracy": "linear", "MAE": "log", "learning rate": "linear"}


def test_a_large_loss_within_the_first_epoch(panels) -> None:
    """Differences of means carry rounding errors of the largest: negative ones leave the axis."""
    axes = panels(large_first([0.5, 0.3, 0.2], last=0.2))["loss"]
    assert axes.get_yscale() == "log" and 0.01 < axes.get_ylim()[0] < 0.2


@pytest.mark.parametrize("undefined", [None, math.nan, math.inf])
def test_undefined_epochs_interrupt_the_line(panels, undefined) -> None:
    values = [0.9, undefined, 0.8, undefined, 0.7, 0.6]
    records = [record(epoch, val_auroc=value) for epoch, value in enumerate(values)]
    line = line_of(panels(records)["AUROC"], "val")
    assert line.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isnan(line.get_ydata()).tolist() == [False, True, False, True, False, False]
    assert line.get_marker() == "o" and line.get_markevery() == [0, 2]  # lone ones are seen


def test_epochs_without_evaluation_do_not_interrupt(panels) -> None:
    records = [record(e, **({"val_auroc": 0.1 * e} if e % 2 else {})) for e in range(6)]
    line = line_of(panels(records)["AUROC"], "val")
    assert line.get_xdata().tolist() == [2, 4, 6] and not np.isnan(line.get_ydata()).any()


def test_undefined_classes_interrupt_their_line_and_the_median(panels) -> None:
    values = [(0.1, 0.3), (None, 0.4), (None, None), (0.2, None)]
    records = [
        record(e, val_f1_per_class_a=first, val_f1_per_class_b=second)
        for e, (first, second) in enumerate(values)
    ]
    axes = panels(records)["F1 per class"]
    median = line_of(axes, "median").get_ydata()
    np.testing.assert_allclose(median, [0.2, 0.4, np.nan, 0.2])
    first, second = (line.get_ydata() for line in axes.lines[:2])
    np.testing.assert_allclose(first, [0.1, np.nan, np.nan, 0.2])
    np.testing.assert_allclose(second, [0.3, 0.4, np.nan, np.nan])


def test_undefined_losses_interrupt_the_line_within_epochs(panels) -> None:
    losses = [1.0, 0.9, None, 0.7, 0.6, 0.5]
    records = [
        {"event": "step", "epoch": i // 2, "samples": 40 * (i + 1), "train_loss": loss}
        for i, loss in enumerate(losses)
    ]
    axes = panels(records + [record(epoch) for epoch in range(3)])["loss"]
    fine = next(line for line in axes.lines if line.get_gid() == plot_curves.FINE_ID)
    assert np.isnan(fine.get_ydata()).tolist() == [False, False, True, True, False, False]


def test_the_loss_within_epochs_is_that_of_the_batches_also_where_steps_are_skipped(panels) -> None:
    """Mixed precision leaves out updates, of which the samples count but not the steps."""
    losses, records, step = np.exp(-np.arange(20) / 4), [], 0
    for epoch in range(2):
        for batch in range(10):
            seen = 10 * epoch + batch + 1
            step += not (epoch == 0 and batch < 5)
            at = {"epoch": epoch, "step": step, "samples": 8 * seen}
            mean = losses[10 * epoch : seen].mean()
            records.append({"event": "step", **at, "train_loss": mean})
        records.append(record(epoch, train_loss=mean) | {"step": step, "samples": 8 * seen})
    axes = panels(records)["loss"]
    line = next(line for line in axes.lines if line.get_gid() == plot_curves.FINE_ID)
    np.testing.assert_allclose(line.get_ydata(), losses, rtol=1e-9)
    np.testing.assert_allclose(line.get_xdata(), (1 + np.arange(20)) / 10)


def test_a_score_far_below_its_usual_values_leaves_the_others_to_be_seen(panels) -> None:
    records = [record(e, val_r2=value) for e, value in enumerate([-1e6, -3.0, 0.5, 0.9])]
    axes = panels(records)["R²"]
    assert axes.get_yscale() == "symlog"
    places = axes.transAxes.inverted().transform(
        axes.transData.transform([(0, v) for v in (-1e6, -3, 0.5, 0.9)])
    )[:, 1]
    assert places[0] < 0.1 and np.diff(places).min() > 0.02 and places[-1] <= 1
    assert (
        panels([record(e, val_r2=v) for e, v in enumerate([-50.0, 0.5])])["R²"].get_yscale()
        == "linear"
    )
