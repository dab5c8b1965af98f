"""A class of each frame of videos: loss, evaluation over whole videos, files and figures of it.

A sample is a clip; evaluation sees clips that cover every frame of every video (data.VideoFrames).
A run on whole samples does not load this module.

B clips, T frames of a clip, K classes, V videos, n frames of a video, M frames of all videos.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glovita_lib.data import Split, VideoFrames
from glovita_lib.dist import Ranks
from glovita_lib.errors import UserError
from glovita_lib.experiment import Experiment
from glovita_lib.figures import PALE, WIDTH, drawing, short
from glovita_lib.files import write_json
from glovita_lib.loader import Batch, Loader
from glovita_lib.loggers import Share
from glovita_lib.metrics import report_of
from glovita_lib.metrics_classification import Scores
from glovita_lib.metrics_segments import Videos
from glovita_lib.model import logits_of
from glovita_lib.objectives import (
    AUGMENT,
    BatchRng,
    HeadOutput,
    LabelledPredictions,
    LabelObjective,
    Objective,
    Predictions,
    build_objective,
    gather_split,
)
from glovita_lib.plot_projection import PALETTE
from glovita_lib.plots import LARGEST_MATRIX, confusion_matrix
from glovita_lib.prediction_files import (
    Table,
    beside,
    class_columns,
    is_told,
    is_wide,
    kept_scores,
    read_columns,
    read_texts,
    scores_in,
    wide_columns,
    write_table,
    write_texts,
)
from glovita_lib.resolved import Resolved
from glovita_lib.results import (
    pooled_metrics,
    read_table,
    table_of,
    write_predictions,
    write_results,
)
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_train import Framewise

# --------------------------------------------------------------------------------- predictions


@dataclass(frozen=True, slots=True)
class FrameTable:
    """Which frames of which videos the rows of predictions are, video after video."""

    starts: np.ndarray  # (V + 1,) first row of each video, and M
    numbers: np.ndarray  # (M,) of a frame in its video
    times: np.ndarray  # (M,) seconds from the start of its video

    def by_video(self, values: np.ndarray) -> list[np.ndarray]:
        """V arrays of values (M, ...)."""
        return parts_of(values, self.starts)


def parts_of(values: np.ndarray, starts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Values (M, ...) in parts that begin at starts (V + 1,), of which the last is M."""
    return [values[start:end] for start, end in pairwise(starts)]


def scores_of_parts(scores: Scores, starts: Sequence[int] | np.ndarray) -> list[Scores]:
    """As `parts_of`."""
    return [scores.of(np.arange(start, end)) for start, end in pairwise(starts)]


@dataclass(frozen=True, slots=True)
class FramePredictions(Predictions):
    """What a model predicts for the frames of V videos: ids are those of the videos, rows their
    numbers among all, scores (M, K) those of their frames."""

    frames: FrameTable


@dataclass(frozen=True, slots=True)
class LabelledFrames(LabelledPredictions):
    """Predictions for the frames of videos with labels: targets (M,) are UNLABELLED and losses NaN
    where a frame has none."""

    frames: FrameTable

    @property
    def loss(self) -> float:
        """Mean over the labelled frames, in float64; NaN without any."""
        losses = self.losses[~np.isnan(self.losses)].astype(np.float64)
        return float(losses.mean()) if len(losses) else float("nan")


def frame_means(
    frames: VideoFrames, rows: np.ndarray, logits: Tensor
) -> tuple[np.ndarray, FrameTable, Tensor]:
    """Logits of frames from those of clips: the mean where several clips hold a frame, in float64.

    Frames that no clip of the split holds, as clips of a lower rate leave them out, have those of
    the frame before them that one holds. Frames of clips that are not there, as in an evaluation of
    some batches, are left out.

    Args:
        frames: of the split.
        rows: (N,) clips of the split.
        logits: (N, T, K) of them.

    Returns:
        Numbers of the videos (V,), their frames, and logits (M, K) in float32.
    """
    part = frames.select(rows)
    videos = np.unique(part.video_of)
    lengths = np.array([len(frames.times[video]) for video in videos], np.int64)
    starts = np.concatenate([[0], lengths.cumsum()])
    real = part.numbers >= 0  # (N, T)
    places = starts[np.searchsorted(videos, part.video_of)][:, None] + part.numbers
    index = torch.from_numpy(places[real])
    total = int(starts[-1])
    sums = torch.zeros(total, logits.shape[-1], dtype=torch.float64)
    sums.index_add_(0, index, logits[torch.from_numpy(real)].double())
    counts = torch.bincount(index, minlength=total)
    held = torch.from_numpy(starts[:-1].repeat(lengths) + held_frames(frames, videos))
    sums, counts = sums[held], counts[held]
    seen = counts > 0
    means = (sums[seen] / counts[seen, None]).float()
    kept = seen.numpy()
    numbers = np.concatenate([np.arange(length) for length in lengths] or [np.zeros(0, np.int64)])
    times = np.concatenate([frames.times[video] for video in videos] or [np.zeros(0)])
    ends = np.concatenate([[0], kept.cumsum()])[starts]
    return videos, FrameTable(ends, numbers[kept], times[kept]), means


def held_frames(frames: VideoFrames, videos: np.ndarray) -> np.ndarray:
    """Of each frame of some videos (V,), one video after the other, the number (M,) of the last
    frame up to it that a clip of the split holds."""
    order = np.argsort(frames.video_of, kind="stable")
    edges = np.searchsorted(frames.video_of[order], [videos, videos + 1])
    found = [np.zeros(0, np.int64)]
    for video, first, last in zip(videos.tolist(), *edges.tolist(), strict=True):
        shown = np.unique(frames.numbers[order[first:last]])
        shown = shown[shown >= 0]
        every = np.arange(len(frames.times[video]))
        found.append(shown[np.maximum(np.searchsorted(shown, every, side="right") - 1, 0)])
    return np.concatenate(found)


# ----------------------------------------------------------------------------------- objective


class FramewiseObjective(LabelObjective):
    """Predict a class of each frame of videos."""

    def __init__(self, task: Framewise, resolved: Resolved, device: torch.device) -> None:
        super().__init__(task, resolved, device)
        self.background = task.background

    def loss(
        self, model: nn.Module, batch: Batch, rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean () over the clips of the mean over their labelled frames; a clip without any has
        loss 0. Logged: the head's auxiliary losses and the share of labelled frames that are right,
        averaged likewise."""
        inputs = self.train_inputs(batch.inputs, batch.fitted, rng.stream(AUGMENT))
        assert batch.targets is not None  # build_data refuses to train without labels
        targets = batch.targets  # (B, T)
        output = HeadOutput.of(model(inputs))
        self.check_shape(output.logits, targets.shape[1])
        logs = {name: value.detach() for name, value in output.aux.items()}
        right = output.logits.detach().argmax(-1) == targets
        logs["acc"] = over_labelled(right.float(), targets).mean()
        losses = [
            weight * over_labelled(self.frame_losses(logits, targets), targets).mean()
            for weight, logits in output.fitted
        ]
        losses += output.aux.values()
        return sum(losses[1:], losses[0]), logs

    def scores_of(self, logits: Tensor) -> Scores:
        """Scores of clips (N, K) of logits (N, T, K): the mean over their frames."""
        frames = logits.cpu().numpy().swapaxes(0, 1)
        return Scores.mean([Scores.of_logits(each, "multiclass") for each in frames])

    def frame_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Training loss (B, T) of logits (B, T, K), anything where a frame has no label."""
        flat = self.criterion(logits.flatten(0, 1), targets.clamp(min=0).flatten())
        return flat.view_as(targets)

    def check_shape(self, logits: Tensor, frames: int) -> None:
        """There are logits of each frame.

        Raises:
            UserError: a head of the user's own gives others.
        """
        wanted = (len(logits), frames, len(self.resolved.class_names))
        if logits.shape != wanted:
            raise UserError(
                f"model.head gives logits {tuple(logits.shape)} for {wanted[0]} clips of {frames}"
                f" frames and {wanted[2]} classes: it must give {wanted}"
            )

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Row (B,) and logits (B, T, K) of each clip."""
        inputs = self.eval_inputs(batch.inputs, batch.fitted, 0)
        return {"rows": batch.rows, "logits": logits_of(model, inputs).float()}

    def evaluate(
        self,
        model: nn.Module,
        loader: Loader,
        *,
        ranks: Ranks,
        precision: str,
        max_batches: int | None = None,
    ) -> FramePredictions | LabelledFrames | None:
        """Scores and losses of the frames of a split, see `Objective.evaluate`."""
        gathered = gather_split(
            model, self.predict, loader, ranks=ranks, precision=precision, max_batches=max_batches
        )
        if gathered is None:
            return None
        frames = loader.split.frames
        assert frames is not None, "see resolved.check_task"
        logits = gathered["logits"]
        self.check_shape(logits, frames.numbers.shape[1])
        videos, table, means = frame_means(frames, gathered["rows"].numpy(), logits)
        scores = Scores.of_logits(means.numpy(), "multiclass")
        ids = [frames.ids[video] for video in videos]
        if frames.labels is None:
            return FramePredictions(ids, scores, videos, table)
        own = zip(videos, table.by_video(table.numbers), strict=True)
        labels = [frames.labels[video][numbers] for video, numbers in own]
        targets = np.concatenate(labels or [np.zeros(0, np.int64)])
        return LabelledFrames(ids, scores, videos, targets, self.losses_of(scores, targets), table)

    def losses_of(self, scores: Scores, targets: np.ndarray) -> np.ndarray:
        """Loss (M,) of scores (M, K) as evaluation reports it, NaN where a frame has no label."""
        losses = super().losses_of(scores, np.maximum(targets, 0))
        return np.where(targets == UNLABELLED, np.nan, losses)

    def measured(self, predictions: LabelledFrames) -> Videos:
        """Labelled predictions as the metrics take them."""
        starts = predictions.frames.starts
        targets = parts_of(predictions.targets, starts)
        scores = scores_of_parts(predictions.scores, starts)
        return Videos(targets, scores, self.resolved.class_names, self.background)


def over_labelled(values: Tensor, targets: Tensor) -> Tensor:
    """Mean (B,) of values (B, T) over the labelled frames of a clip, 0 without any."""
    labelled = targets != UNLABELLED
    return values.where(labelled, 0).sum(1) / labelled.sum(1).clamp(min=1)


@build_objective.register
def _(task: Framewise, resolved: Resolved, device: torch.device) -> Objective:
    return FramewiseObjective(task, resolved, device)


# --------------------------------------------------------------------------------------- files
#
# A CSV file with a row a frame, and an HDF5 file with arrays of each video.


@write_predictions.register
def _(predictions: FramePredictions, path: Path, resolved: Resolved) -> None:
    write_frames(path, predictions, None, resolved.class_names)


@write_predictions.register
def _(predictions: LabelledFrames, path: Path, resolved: Resolved) -> None:
    write_frames(path, predictions, predictions.targets, resolved.class_names)


def write_frames(
    path: Path,
    predictions: FramePredictions | LabelledFrames,
    targets: np.ndarray | None,
    class_names: Sequence[str],
) -> None:
    """Predictions of frames as CSV: video, frame, time in seconds, label (empty where there is
    none; no column of unlabelled videos), prediction, p_<class> ..., of more than 100 classes its
    probability and the best five; and beside it as HDF5, see `fill_frames`. Numbers read back
    equal.

    Raises:
        UserError: disk full, read-only ...
    """
    table, scores = predictions.frames, predictions.scores
    names = np.array([*class_names, ""], object)  # -1 is ""
    columns: dict[str, Any] = {
        "video": np.repeat(np.array(predictions.ids, object), np.diff(table.starts)).tolist(),
        "frame": table.numbers.tolist(),
        "time": table.times.tolist(),
    }
    if targets is not None:
        columns["label"] = names[np.where(targets == UNLABELLED, -1, targets)].tolist()
    if is_wide("framewise", class_names):
        columns |= wide_columns(None, scores, "multiclass", class_names)
    else:
        columns["prediction"] = names[scores.predicted("multiclass")].tolist()
        columns |= class_columns(scores, "multiclass", class_names)
    write_table(path, columns, partial(fill_frames, predictions, targets, class_names))


def fill_frames(
    predictions: FramePredictions | LabelledFrames,
    targets: np.ndarray | None,
    class_names: Sequence[str],
    file: Any,
) -> None:
    """Predictions of frames in an HDF5 file, in the layout of bags: `class_names` (K,), `ids` (V,)
    and `bag_ptr` (V + 1,); the frames of video i are the rows bag_ptr[i] to bag_ptr[i + 1] of
    `frames` (M,), `times` (M,), `probabilities` (M, K), `log_odds` (M, K) where those do not say
    what ranks and is predicted, `predictions` (M,) and `labels` (M,), indices of classes, -100
    where a frame has none."""
    table, scores = predictions.frames, predictions.scores
    write_texts(file, "class_names", class_names)
    write_texts(file, "ids", predictions.ids)
    file["bag_ptr"] = table.starts
    file["frames"] = table.numbers
    file["times"] = table.times
    file["probabilities"] = scores.values
    if not is_told(scores, "multiclass"):
        file["log_odds"] = scores.ranked
    file["predictions"] = scores.predicted("multiclass")
    if targets is not None:
        file["labels"] = targets


def read_frames(path: Path, class_names: Sequence[str]) -> Table:
    """What `write_frames` wrote.

    Raises:
        UserError: missing, damaged, of other classes, or files of two writings.
    """
    if is_wide("framewise", class_names):
        return read_frame_arrays(path, class_names)
    columns = read_columns(path)
    if "video" not in columns:
        raise UserError(f"{path} is of other classes: it has no column video")
    found = scores_in(columns, path, "multiclass", class_names)
    classes = {name: index for index, name in enumerate(class_names)} | {"": UNLABELLED}
    videos = columns["video"]
    try:
        targets = None
        if "label" in columns:
            targets = np.array([classes[name] for name in columns["label"]], np.int64)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is of other classes: {error}") from None
    first = [i for i, name in enumerate(videos) if not i or name != videos[i - 1]]
    starts = np.array([*first, len(videos)])
    return Table([videos[i] for i in first], targets, found, starts)


def read_frame_arrays(path: Path, class_names: Sequence[str]) -> Table:
    """What the HDF5 file beside a table of frames holds, see `read_frames`."""
    with beside(path) as file:
        if read_texts(file, "class_names") != list(class_names):
            raise UserError(f"{file.filename} is of other classes")
        ids, starts = read_texts(file, "ids"), file["bag_ptr"][:]
        values = file["probabilities"][:]
        odds = [file["log_odds"][:]] if "log_odds" in file else []
        targets = file["labels"][:] if "labels" in file else None
    scores = Scores(values, *odds) if odds else Scores.of_probabilities(values, "multiclass")
    return Table(ids, targets, scores, starts)


@table_of.register
def _(predictions: LabelledFrames, resolved: Resolved) -> Table:
    scores = kept_scores(predictions.scores, "multiclass")
    return Table(predictions.ids, predictions.targets, scores, predictions.frames.starts)


@read_table.register
def _(objective: FramewiseObjective, path: Path) -> Table:
    return read_frames(path, objective.resolved.class_names)


@pooled_metrics.register
def _(objective: FramewiseObjective, tables: list[Table]) -> dict[str, float]:
    targets, scores = [], []
    for table in tables:
        assert table.targets is not None and table.starts is not None, "labelled frames were read"
        targets += parts_of(table.targets, table.starts)
        scores += scores_of_parts(table.scores, table.starts)
    names = objective.resolved.class_names
    return objective.values(Videos(targets, scores, names, objective.background))


# ------------------------------------------------------------------------------------- results

MOST_RIBBONS = 20  # videos of the figure
MISSING = "#ffffff"


@write_results.register
def _(
    predictions: LabelledFrames,
    folder: Path,
    name: str,
    experiment: Experiment,
    *,
    split: Split,
    plot: bool,
) -> dict[str, Any]:
    objective = experiment.objective
    assert isinstance(objective, FramewiseObjective), "no other gives such predictions"
    resolved, root = experiment.resolved, experiment.root
    write_predictions(predictions, folder / f"predictions_{name}.csv", resolved)
    samples = objective.measured(predictions)
    report = report_of(
        resolved.metrics,
        samples,
        bootstrap=root.task.bootstrap,
        seed=root.seed,
        tell=Share(f"intervals of {name}"),
    )
    frames = {"frames": len(predictions.targets), "labelled_frames": int(samples.frames.sum())}
    content = {"split": name, "loss": predictions.loss, **frames, **report}
    write_json(folder / f"metrics_{name}.json", content)
    if plot:
        segment_ribbons(predictions, resolved.class_names, folder / "plots" / f"ribbons_{name}.png")
        counts = report["confusion"]
        if counts is not None and len(counts) <= LARGEST_MATRIX:
            path = folder / "plots" / f"confusion_{name}.png"
            confusion_matrix(np.array(counts), resolved.class_names, path)
    return content


def segment_ribbons(predictions: LabelledFrames, class_names: tuple[str, ...], path: Path) -> None:
    """Segment ribbons: of each video a bar of the labels above one of the predictions, over time,
    the video with the most wrong frames first. Of many videos those at even distances between the
    worst and the best."""
    table = predictions.frames
    parts = list(
        zip(
            predictions.ids,
            table.by_video(predictions.targets),
            table.by_video(predictions.scores.predicted("multiclass")),
            table.by_video(table.times),
            strict=True,
        )
    )
    right = [agreement(truth, guess) for _, truth, guess, _ in parts]
    order = sorted(range(len(parts)), key=lambda video: (right[video], video))
    if len(order) > MOST_RIBBONS:
        places = np.linspace(0, len(order) - 1, MOST_RIBBONS).round().astype(int)
        order = [order[place] for place in places]
    with drawing(path, WIDTH, 0.9 + 0.62 * len(order) + 0.16 * len(class_names) / 3) as figure:
        panels = figure.subplots(max(len(order), 1), 1, squeeze=False)[:, 0]
        for axes, video in zip(panels, order, strict=False):
            name, truth, guess, times = parts[video]
            draw_ribbon(axes, truth, guess, times, len(class_names))
            shown = "no labels" if np.isnan(right[video]) else f"{right[video]:.1%} right"
            axes.set_title(f"{short(name, 60)} · {shown}", fontsize=7.5, fontweight="normal")
        panels[-1].set_xlabel("time, seconds")
        figure.legend(
            handles=[patch(colour, short(text, 28)) for text, colour in legend(class_names)],
            loc="outside lower center",
            ncols=4,
        )


def agreement(truth: np.ndarray, guess: np.ndarray) -> float:
    """Share of the labelled frames that are right; NaN, which sorts nowhere, without any."""
    labelled = truth != UNLABELLED
    return float((truth == guess)[labelled].mean()) if labelled.any() else float("nan")


def draw_ribbon(
    axes: Any, truth: np.ndarray, guess: np.ndarray, times: np.ndarray, classes: int
) -> None:
    """Two bars of a video."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([MISSING, *(class_colour(k) for k in range(classes))])
    step = (times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0
    bars = np.stack([np.where(truth == UNLABELLED, -1, truth), guess]) + 1  # (2, n)
    axes.imshow(
        bars,
        cmap=colours,
        vmin=0,
        vmax=classes,
        aspect="auto",
        interpolation="nearest",
        extent=(times[0], times[-1] + step, 2, 0),
    )
    axes.set_yticks([0.5, 1.5], ["label", "prediction"], fontsize=7)
    axes.axhline(1, color="white", lw=1.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False)


def class_colour(number: int) -> Any:
    """A colour of each class: those of maps first, then lighter ones of the same."""
    from matplotlib.colors import to_rgb

    shade = number // len(PALETTE)
    rgb = np.array(to_rgb(PALETTE[number % len(PALETTE)]))
    return tuple(1 - (1 - rgb) * 0.6**shade)


def legend(class_names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and colours."""
    for number, name in enumerate(class_names):
        yield name, class_colour(number)


def patch(colour: Any, text: str) -> Any:
    """An entry of a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor=PALE, label=text)
