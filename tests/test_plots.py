"""Figures: written for ordinary and extreme input without a warning, the same bytes each time, and
the numbers behind them."""

import math
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from glovita_lib import plots
from glovita_lib.figures import (
    INK,
    augmented_sheet,
    caption_lines,
    displayed,
    drawing,
    frames_as_one,
    number,
    short,
    some_frames,
    unique_short,
    window,
    worst_sheet,
)
from glovita_lib.metrics_classification import Scores
from glovita_lib.plots import (
    GRID,
    confusion_matrix,
    count_texts,
    curves_of,
    plot_results,
    wilson,
)


def assert_drawn(path: Path) -> np.ndarray:
    """The pixels of a figure, which must hold more than paper."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    colours = np.unique(pixels @ np.array([1, 256, 65536]))
    assert min(pixels.shape[:2]) > 100 and len(colours) > 10
    return pixels


@pytest.fixture(scope="module")
def digits():
    """Real predictions: a linear model on a third of the digits."""
    data = load_digits()
    model = LogisticRegression(max_iter=300).fit(data.data[:600] / 16, data.target[:600])
    return data.target[600:], model.predict_proba(data.data[600:] / 16).astype(np.float32)


def results(folder: Path, name: str, subtask: str, targets, scores, classes=None) -> list[Path]:
    classes = classes or tuple(f"class {k}" for k in range(scores.shape[1]))
    return plot_results(
        folder, name, subtask=subtask, targets=targets, scores=Scores(scores), class_names=classes
    )


def test_figures_of_digits_are_the_same_each_time(tmp_path: Path, digits) -> None:
    before = dict(matplotlib.rcParams)
    paths = results(tmp_path / "a", "val", "multiclass", *digits)
    assert [p.name for p in paths] == [
        "confusion_val.png",
        "roc_pr_val.png",
        "calibration_val.png",
    ]
    again = results(tmp_path / "b", "val", "multiclass", *digits)
    for first, second in zip(paths, again, strict=True):
        assert_drawn(first)
        assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in paths)
    assert dict(matplotlib.rcParams) == before


def test_confusion_colours_and_rows(tmp_path: Path) -> None:
    """Right is blue, wrong orange, a class without samples grey."""
    targets, predicted = np.array([0] * 10 + [1] * 10), np.array([0] * 10 + [0] * 10)
    paths = results(tmp_path, "val", "multiclass", targets, np.eye(3)[predicted])
    pixels = assert_drawn(paths[0]).reshape(-1, 3).astype(int)
    blue, orange = (8, 48, 107), (127, 39, 4)  # full shades
    for colour in (blue, orange, (240, 240, 240)):
        assert (np.abs(pixels - colour).max(1) <= 1).sum() > 1000, colour


def contrast(first, second) -> float:
    """Of two sRGB colours, as WCAG 2.1 defines it."""

    def luminance(colour) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("classes", "largest", "name"),
    [
        (40, 3000, "c"),
        (40, 10**9, "a long class name"),
        pytest.param(25, 20_000, "c", marks=pytest.mark.slow),
        (12, 99_999, "a long one"),
    ]
    + [(9, 9999, "c"), (8, 10**8, "a long class name"), (2, 10**12, "c"), (1, 10**15, "c")],
)
def test_counts_stay_in_their_cells_and_stand_out(
    tmp_path: Path, monkeypatch, classes: int, largest: int, name: str
) -> None:
    """As drawn: every text within its cell, in the better readable of two colours."""
    figures, original = [], plots.drawing

    @contextmanager
    def kept(*arguments):
        with original(*arguments) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(plots, "drawing", kept)
    counts = np.random.default_rng(classes).integers(0, largest, (classes, classes))
    counts[np.arange(classes), np.arange(classes)] *= 20  # dark beside pale
    confusion_matrix(counts, tuple(f"{name} {k}" for k in range(classes)), tmp_path / "c.png")
    axes = figures[0].axes[0]
    colours, written = axes.images[0].get_array(), {}
    for text in axes.texts:
        column, row = map(int, text.get_position())
        box = text.get_window_extent()
        (left, top), (right, bottom) = axes.transData.transform([
            (column - 0.5, row - 0.5), (column + 0.5, row + 0.5)
        ])  # fmt: skip
        assert left < box.x0 and box.x1 < right and bottom < box.y0 and box.y1 < top, text
        cell = colours[row, column]
        ink = contrast(to_rgb(text.get_color()), cell)
        assert ink >= max(contrast(to_rgb(other), cell) for other in ("white", INK)) - 1e-9
        written[row, column] = text.get_text().split("\n")[0]
    if largest < 10**9 or classes < 40:  # else those of three digits and M have no room
        assert written.keys() == set(zip(*np.nonzero(counts), strict=True))
    for place, text in written.items():
        assert text in count_texts(int(counts[place]))
    if largest == 9999:  # five characters in a ninth of the width
        assert all(text == f"{counts[place]:,}" for place, text in written.items())


@pytest.mark.parametrize("count", [1, 999, 1000, 1604, 9_950, 99_999, 999_950, 10**6, 10**16])
def test_shorter_counts_are_the_count_rounded(count: int) -> None:
    texts = count_texts(count)
    assert texts[0] == f"{count:,}" and len(texts) == len(set(texts))
    for text in texts:
        factor = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1], 1)
        value = float(text.replace(",", "").rstrip("kMGT")) * factor
        digits = sum(map(str.isdigit, text))
        assert abs(value - count) <= 0.5 * 10 ** (len(str(count)) - min(digits, len(str(count))))


@pytest.mark.parametrize("classes", [1, 2, 9, pytest.param(41, marks=pytest.mark.slow), 101])
def test_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, 150)
    scores = rng.dirichlet(np.ones(classes), 150).astype(np.float32)
    names = tuple(f"$class_{k}$ of a very long name 犬 {k}" for k in range(classes))
    for path in results(tmp_path, "val", "multiclass", targets, scores, names):
        assert_drawn(path)


@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
def test_one_sample_none_and_not_finite(tmp_path: Path, subtask: str) -> None:
    targets = np.array([1]) if subtask == "multiclass" else np.array([[0.0, 1, 1]], np.float32)
    scores = np.array([[0.2, 0.5, 0.3]], np.float32)
    paths = results(tmp_path, "one", subtask, targets, scores)
    assert len(paths) == (1 if subtask == "regression" else 3)
    for path in paths:
        assert_drawn(path)
    assert results(tmp_path, "none", subtask, targets[:0], scores[:0]) == []
    assert results(tmp_path, "bad", subtask, targets, scores * np.float32(math.nan)) == []


def test_multilabel_with_many_and_empty_labels(tmp_path: Path, digits) -> None:
    targets, scores = digits
    onehot = np.eye(60, dtype=np.float32)[targets]  # 50 labels that never occur
    wide = np.concatenate([scores, np.full((len(scores), 50), 0.1, np.float32)], 1)
    for path in results(tmp_path, "test", "multilabel", onehot, wide):
        assert_drawn(path)


@pytest.mark.parametrize(("n", "outputs"), [(50, 1), (4000, 2), (30, 14)])
def test_regression(tmp_path: Path, n: int, outputs: int) -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(5, 2, (n, outputs)).astype(np.float32)
    targets[:, -1] = 7.0 if outputs == 14 else targets[:, -1]  # one that does not vary
    found = results(tmp_path, "val", "regression", targets, targets * np.float32(0.9))
    assert [path.name for path in found] == ["regression_val.png"]
    assert_drawn(found[0])


def test_curves_against_sklearn(digits) -> None:
    targets, scores = digits
    scores = np.round(scores, 2)  # ties
    for k in range(10):
        curves = curves_of("x", targets == k, scores[:, k])
        assert curves.auroc == pytest.approx(sk.roc_auc_score(targets == k, scores[:, k]))
        assert curves.ap == pytest.approx(sk.average_precision_score(targets == k, scores[:, k]))
        fpr, tpr, _ = sk.roc_curve(targets == k, scores[:, k], drop_intermediate=False)
        assert np.allclose(curves.roc, np.interp(GRID, fpr, tpr))
        precision, recall, _ = sk.precision_recall_curve(targets == k, scores[:, k])
        for at in (20, 200, 399):
            reached = np.flatnonzero(recall >= GRID[at] - 1e-12)[-1]  # sklearn's recall falls
            assert curves.pr[at] == pytest.approx(precision[reached])


def test_wilson_equals_the_quadratic() -> None:
    """Its ends are where |share - p| = z sqrt(p (1 - p) / n)."""
    low, high = wilson(np.array([0.0, 3, 10]), np.array([10.0, 10, 10]))
    for share, ends in zip((0, 0.3, 1), zip(low, high, strict=True), strict=True):
        for p in ends:
            assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 10, abs=1e-12)


def test_a_figure_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), drawing(path, 2, 2):
        raise ZeroDivisionError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_names_and_numbers() -> None:
    assert short("a_rather_long_class_name", 13) == "a_rath…s_name"
    assert len(short("x" * 99, 10)) == 10 and short("a\nb", 9) == "a b"
    assert unique_short(["one long name a", "one long name b", "c"], 5)[2] == "c"
    assert len(set(unique_short([f"aaaa{k}aaaa" for k in range(20)], 5))) == 20
    assert [number(v) for v in (None, math.nan, 0, 0.12345, 1e-7, 123456.0)] == [
        "–",
        "–",
        "0.000",
        "0.123",
        "1e-07",
        "1.235e+05",
    ]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_augmented_sheet(tmp_path: Path, channels: int, dtype: type) -> None:
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    images = [rng.integers(0, top, (channels, 9 + i, 12)).astype(dtype) for i in range(3)]
    mean, std = [0.5] * channels, [0.25] * channels
    augmented = (torch.rand(2, 3, channels, 8, 8) - 0.5) / 0.25
    path = tmp_path / "augmented.png"
    augmented_sheet(images, augmented, mean=mean, std=std, path=path, captions=["a", "b" * 90, "c"])
    assert_drawn(path)


@pytest.mark.parametrize(
    ("count", "sides"), [(1, (4, 6)), (2, (4, 13)), (3, (9, 13)), (9, (9, 13))]
)
def test_frames_of_a_clip_as_one_picture(count: int, sides: tuple[int, int]) -> None:
    """From the first to the last in reading order, white between and where one is missing."""
    clip = np.arange(count)[:, None, None, None] * np.ones((count, 3, 4, 6))
    frames = some_frames(clip)
    whole = frames_as_one(frames, np.array([-1.0, -2.0, -3.0]))
    assert whole.shape == (3, *sides)
    assert whole[0, 0, 0] == 0 and (whole[:, -1, -1 if count != 3 else 0] == count - 1).all()
    if count > 2:
        assert whole[:, 4, 6].tolist() == [-1, -2, -3]
        assert (whole[2, -1, -1] == -3) == (count == 3)


def test_augmented_sheet_shows_the_pixels_back(tmp_path: Path) -> None:
    """The identity as augmentation shows the same image twice; colours survive mean and std."""
    image = np.zeros((3, 8, 8), np.uint8)
    image[0], image[1] = 200, 100
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    shown = (torch.tensor(image) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    path = tmp_path / "same.png"
    augmented_sheet([image], shown[None, None], mean=mean, std=std, path=path, captions=["x"])
    pixels = assert_drawn(path).astype(int)
    columns = np.flatnonzero((np.abs(pixels - (200, 100, 0)).max(2) <= 1).any(0))
    assert len(columns) > 300 and (np.diff(columns) > 5).sum() == 1  # two patches with a gap


def test_no_augmented_versions_and_no_samples(tmp_path: Path) -> None:
    image = np.full((1, 8, 8), 255, np.uint8)
    resolved = {"mean": (0.5,), "std": (0.5,)}
    path = tmp_path / "none.png"
    augmented_sheet([image], torch.empty(0, 1, 1, 8, 8), path=path, captions=["x"], **resolved)
    augmented_sheet([], torch.empty(3, 0, 1, 8, 8), path=path, captions=[], **resolved)
    assert path.stat().st_size > 0


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("subtask", ["multiclass", "multilabel", "regression"])
def test_worst_sheet(tmp_path: Path, subtask: str, count: int) -> None:
    data = load_digits()
    images = list((data.images[:count] * 15).astype(np.uint8)[:, None])
    targets = data.target[:count]
    if subtask != "multiclass":
        targets = np.eye(10, dtype=np.float32)[targets]
    worst_sheet(
        images,
        ids=[f"folder/{i}.png" for i in range(count)],
        targets=targets,
        scores=Scores(np.full((count, 10), 0.1, np.float32)),
        losses=np.full(count, 2.3, np.float32),
        subtask=subtask,
        class_names=tuple(map(str, range(10))),
        bit_depth=8,
        path=tmp_path / "worst.png",
    )
    assert (tmp_path / "worst.png").stat().st_size > 1000


def words(targets, scores, subtask: str, names=("cat", "dog", "owl")) -> list[str]:
    (lines,) = caption_lines(np.array([targets]), Scores(np.array([scores])), subtask, names, 40)
    return [line.text for line in lines]


def test_captions() -> None:
    assert words(0, [0.2, 0.7, 0.1], "multiclass") == ["true cat · 20%", "✗ dog · 70%"]
    assert words(1, [0.2, 0.7, 0.1], "multiclass") == ["true dog · 70%", "✓ dog · 70%"]
    said = [0.1, 0.9, 0.2]
    assert words([1.0, 0, 1], said, "multilabel") == ["✗ missed cat, owl", "✗ false dog"]
    assert words([0.0, 1, 0], said, "multilabel") == ["✓ all labels", ""]
    assert words([1.0, 2, 3], [1.5, 2, 9], "regression") == ["true owl 3", "predicted 9"]


def test_sixteen_bits_are_stretched_and_channels_left_out() -> None:
    image = np.linspace(1000, 3000, 64).reshape(1, 8, 8).astype(np.uint16)
    shown = displayed(image, *window(image, 16))
    assert shown.shape == (8, 8, 3) and shown.min() == 0 and shown.max() == 255
    flat = np.full((1, 4, 4), 500, np.uint16)
    assert displayed(flat, *window(flat, 16)).dtype == np.uint8
    rgba = np.stack([np.full((2, 2), v, np.uint8) for v in (10, 20, 30, 255)])
    assert displayed(rgba, *window(rgba, 8))[0, 0].tolist() == [10, 20, 30]
