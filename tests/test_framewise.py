"""A class a frame: the loss and its mask, evaluation over whole videos, files, figures."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from glovita_lib import dist, framewise, objectives
from glovita_lib.data import VideoFrames
from glovita_lib.errors import UserError
from glovita_lib.framewise import (
    FramePredictions,
    FramewiseObjective,
    LabelledFrames,
    frame_means,
    read_frames,
    segment_ribbons,
)
from glovita_lib.loader import Batch
from glovita_lib.metrics_classification import Scores
from glovita_lib.objectives import BatchRng
from glovita_lib.prediction_files import MOST_COLUMNS
from glovita_lib.results import pooled_metrics, read_table, table_of, write_predictions
from glovita_lib.run_infer import mean_of
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_train import Framewise

NAMES = ("cut", "sew", "wash, dry")
CPU = torch.device("cpu")
RANKS = dist.Ranks(0, 1, 0, CPU)

# Two videos of 7 and 2 frames in clips of 3; frame 4 of the first is in two of them.
FRAMES = VideoFrames(
    ids=["or1/a.mp4", "b"],
    video_of=np.array([0, 0, 0, 1]),
    numbers=np.array([[0, 1, 2], [3, 4, 5], [4, 5, 6], [0, 1, -1]]),
    times=[np.arange(7) / 25, np.arange(2) / 30],
    labels=[np.array([0, 0, UNLABELLED, 1, 1, 2, 2]), np.array([2, UNLABELLED])],
)


@pytest.fixture
def build(monkeypatch):
    """An objective for inputs that are the model's already."""
    monkeypatch.setattr(objectives, "build_inputs", lambda inputs, train: lambda x, fitted, seed: x)

    def made(weights: tuple | None = None, **fields) -> FramewiseObjective:
        resolved = SimpleNamespace(
            subtask="framewise",
            class_names=NAMES,
            metrics=("acc", "edit", "f1_at_50"),
            class_weights=weights,
            inputs=None,
        )
        return FramewiseObjective(Framewise(**fields), resolved, CPU)

    return made


class Given(nn.Module):
    """Inputs are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Clips:
    """A loader of clips whose inputs are logits, in batches of given rows."""

    def __init__(self, logits: torch.Tensor, batches: list, frames: VideoFrames) -> None:
        self.logits, self.batches = logits, batches
        self.split = SimpleNamespace(frames=frames)

    def epoch(self, epoch):
        for rows in self.batches:
            yield Batch(self.logits[rows], None, torch.tensor(rows), False)


# ---------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.2}, {"focal_gamma": 2.0}])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 3.0)])
def test_the_loss_is_a_mean_over_labelled_frames_then_over_clips(build, fields, weights) -> None:
    targets = torch.tensor([[0, 2, -100, 1], [-100] * 4, [1, -100, -100, -100]])
    logits = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = Batch(logits, targets, torch.arange(3), False)
    loss, logs = build(weights, **fields).loss(Given(), batch, BatchRng(0, 0, 0))
    expected = []
    for clip, labels in zip(logits.detach().double().numpy(), targets.numpy(), strict=True):
        own = []
        for z, label in zip(clip, labels, strict=True):
            if label == UNLABELLED:
                continue
            p = np.exp(z) / np.exp(z).sum()
            t = np.eye(3)[label] * (1 - fields.get("label_smoothing", 0))
            t += fields.get("label_smoothing", 0) / 3
            own.append(
                -(
                    t
                    * np.array(weights or (1, 1, 1))
                    * (1 - p) ** fields.get("focal_gamma", 0)
                    * np.log(p)
                ).sum()
            )
        expected.append(np.mean(own) if own else 0.0)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    loss.backward()
    assert (logits.grad.abs().sum(2) > 0).tolist() == (targets >= 0).tolist()
    right = (logits.argmax(2) == targets).double()
    assert logs["acc"].item() == pytest.approx((right[0].sum() / 3 + right[2].sum()).item() / 3)


def test_parts_of_a_batch_add_up_to_the_whole(build) -> None:
    """As shards of ranks and accumulated batches do, whatever of them is labelled."""
    none = UNLABELLED
    targets = torch.tensor([[0, 0, none], [1, 1, 2], [1, 2, 2], [2, none, none]])
    logits = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))

    def loss(rows: list) -> float:
        batch = Batch(logits[rows], targets[rows], torch.tensor(rows), False)
        return build().loss(Given(), batch, BatchRng(0, 0, 0))[0].item()

    assert loss([0, 1, 2, 3]) == pytest.approx((loss([0]) + 3 * loss([1, 2, 3])) / 4, rel=1e-6)


def test_a_nan_of_an_unlabelled_frame_reaches_nothing(build) -> None:
    logits = torch.zeros(1, 3, 3)
    logits[0, 2] = torch.nan
    batch = Batch(logits, torch.tensor([[0, 1, UNLABELLED]]), torch.tensor([0]), False)
    loss, _ = build().loss(Given(), batch, BatchRng(0, 0, 0))
    assert loss.item() == pytest.approx(np.log(3))


def test_a_head_that_gives_one_score_a_clip_is_told_what_it_must_give(build) -> None:
    batch = Batch(torch.zeros(2, 3), torch.zeros(2, 5, dtype=torch.long), torch.arange(2), False)
    with pytest.raises(UserError, match=r"it must give \(2, 5, 3\)"):
        build().loss(Given(), batch, BatchRng(0, 0, 0))


# ---------------------------------------------------------------------------- whole videos


def test_frames_that_clips_of_a_lower_rate_leave_out_have_those_before_them():
    """Every third frame is shown: 0, 3, 6 of the first video, and 0 of the second; a part of the
    split, where frames 3 to 5 are not evaluated, leaves them out."""
    numbers = np.array([[0, 6], [3, -1], [0, -1]])
    frames = replace(FRAMES, video_of=np.array([0, 0, 1]), numbers=numbers)
    logits = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    videos, table, means = frame_means(frames, np.arange(3), logits)
    assert table.numbers.tolist() == [*range(7), 0, 1]
    shown = [(0, 0), (0, 0), (0, 0), (1, 0), (1, 0), (1, 0), (0, 1), (2, 0), (2, 0)]
    assert torch.equal(means, torch.stack([logits[place] for place in shown]))
    videos, table, means = frame_means(frames, np.array([0]), logits[[0]])
    assert table.numbers.tolist() == [0, 1, 2, 6] and videos.tolist() == [0]


def test_logits_of_a_frame_are_the_mean_over_its_clips() -> None:
    logits = torch.arange(36, dtype=torch.float32).reshape(4, 3, 3)
    videos, table, means = frame_means(FRAMES, np.arange(4), logits)
    assert videos.tolist() == [0, 1] and table.starts.tolist() == [0, 7, 9]
    assert table.numbers.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert table.times[:2].tolist() == [0, 1 / 25] and table.times[8] == 1 / 30
    torch.testing.assert_close(means[4], (logits[1, 1] + logits[2, 0]) / 2)
    assert torch.equal(means[6], logits[2, 2]) and torch.equal(means[7:], logits[3, :2])
    videos, table, means = frame_means(FRAMES, np.array([2]), logits[[2]])  # a part of a split
    assert table.numbers.tolist() == [4, 5, 6] and torch.equal(means, logits[2])


def test_every_frame_is_evaluated_once_however_clips_are_batched(build) -> None:
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 3, 3, generator=draw)
    objective, found = build(), []
    for batches in ([[0, 1, 2, 3]], [[3], [1, 0], [2, 0]]):  # a row may come twice, as from ranks
        loader = Clips(logits, batches, FRAMES)
        found.append(objective.evaluate(Given(), loader, ranks=RANKS, precision="no"))
    one, two = found
    assert isinstance(one, LabelledFrames) and one.ids == ["or1/a.mp4", "b"]
    assert np.array_equal(one.scores.ranked, two.scores.ranked)
    assert one.targets.tolist() == [0, 0, UNLABELLED, 1, 1, 2, 2, 2, UNLABELLED]
    mean = frame_means(FRAMES, np.arange(4), logits)[2]
    wanted = F.cross_entropy(mean.double(), torch.from_numpy(one.targets))
    assert one.loss == pytest.approx(wanted.item(), rel=1e-6)
    assert np.isnan(one.losses).tolist() == (one.targets == UNLABELLED).tolist()
    record = objective.record(one)
    labelled = one.targets != UNLABELLED
    right = (one.scores.values.argmax(1) == one.targets)[labelled]
    assert record["acc"] == pytest.approx(right.mean()) and list(record) == [
        "loss", "acc", "edit", "f1_at_50",
    ]  # fmt: skip
    few = objective.evaluate(
        Given(), Clips(logits, [[0], [1, 2, 3]], FRAMES), ranks=RANKS, precision="no", max_batches=1
    )
    assert few.ids == ["or1/a.mp4"] and len(few.scores.values) == 3


def test_videos_without_labels_are_predicted(build) -> None:
    frames = replace(FRAMES, labels=None)
    loader = Clips(torch.zeros(4, 3, 3), [[0, 1, 2, 3]], frames)
    found = build().evaluate(Given(), loader, ranks=RANKS, precision="no")
    assert type(found) is FramePredictions and found.scores.values.shape == (9, 3)


def test_an_ensemble_is_the_mean_of_probabilities(build) -> None:
    draw, objective = torch.Generator().manual_seed(3), build()
    members = [
        objective.evaluate(
            Given(),
            Clips(torch.randn(4, 3, 3, generator=draw), [[0, 1, 2, 3]], FRAMES),
            ranks=RANKS,
            precision="no",
        )
        for _ in range(2)
    ]
    found = mean_of(members, SimpleNamespace(predictor=objective))
    both = (members[0].scores.values + members[1].scores.values) / 2
    np.testing.assert_allclose(found.scores.values, both, rtol=1e-12)
    labelled = found.targets != UNLABELLED
    own = found.scores.values[labelled, found.targets[labelled]]
    assert found.loss == pytest.approx(-np.log(own).mean(), rel=1e-5)
    assert found.frames.starts.tolist() == [0, 7, 9]


# ------------------------------------------------------------------------------------- files


@pytest.fixture
def predictions(build):
    logits = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(4))
    loader = Clips(logits, [[0, 1, 2, 3]], FRAMES)
    return build().evaluate(Given(), loader, ranks=RANKS, precision="no")


def test_files_hold_a_row_a_frame_and_arrays_a_video(predictions, build, tmp_path) -> None:
    path, resolved = tmp_path / "predictions_test.csv", SimpleNamespace(class_names=NAMES)
    write_predictions(predictions, path, resolved)
    lines = path.read_text().splitlines()
    assert lines[0] == 'video,frame,time,label,prediction,p_cut,p_sew,"p_wash, dry"'
    assert len(lines) == 10 and lines[3].startswith("or1/a.mp4,2,0.08,,")
    table = read_frames(path, NAMES)
    assert table.ids == ["or1/a.mp4", "b"]
    assert np.array_equal(table.targets, predictions.targets)
    assert np.array_equal(table.scores.values, predictions.scores.values)
    assert np.array_equal(table.starts, predictions.frames.starts)
    with h5py.File(tmp_path / "predictions_test.h5") as file:
        assert file["class_names"].asstr()[:].tolist() == list(NAMES)
        ids = [name.decode() for name in file["ids"]]
        assert ids == ["or1/a.mp4", "b"] and file["bag_ptr"][:].tolist() == [0, 7, 9]
        assert file["labels"][:].tolist() == np.concatenate(FRAMES.labels).tolist()
        assert np.array_equal(file["probabilities"], predictions.scores.values)
        assert np.array_equal(file["predictions"], predictions.scores.values.argmax(1))
        assert file["times"][7:].tolist() == [0, 1 / 30]
    objective = build()
    pooled = pooled_metrics(objective, [read_table(objective, path)] * 2)
    assert pooled == pytest.approx(
        {k: v for k, v in objective.record(predictions).items() if k != "loss"}
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_frames_of_many_classes(predictions, tmp_path, labelled) -> None:
    names = tuple(f"step {k}, ü" for k in range(MOST_COLUMNS + 1))
    rng = np.random.default_rng(0)
    rows, logits = len(predictions.targets), rng.normal(size=(9, len(names))).astype(np.float32)
    assert rows == 9
    scores = Scores.of_logits(logits * 300, "multiclass")
    given = replace(predictions, scores=scores)
    if not labelled:
        given = FramePredictions(given.ids, scores, given.rows, given.frames)
    path, resolved = tmp_path / "predictions_test.csv", SimpleNamespace(class_names=names)
    write_predictions(given, path, resolved)
    header = path.read_text().splitlines()[0].split(",")
    known = ["label"] if labelled else []
    assert header[: 5 + labelled] == ["video", "frame", "time", *known, "prediction", "probability"]
    assert header[-2:] == ["top5", "p_top5"]
    table = read_frames(path, names)
    assert table.ids == given.ids and np.array_equal(table.starts, given.frames.starts)
    assert np.array_equal(table.scores.values, scores.values)
    if not labelled:
        assert table.targets is None
        return
    assert np.array_equal(table.targets, given.targets)
    held = table_of(given, resolved)
    assert held.ids == table.ids and np.array_equal(held.scores.values, table.scores.values)
    path.write_text(path.read_text().replace("step 1", "step 2"))
    with pytest.raises(UserError, match="is not the table that"):
        read_frames(path, names)


ODD = ["a", "a/labels", "a/b/../c", "..", ".", "/", "", "x" * 300, 'ü, ≈ "q"\n;', "a/ids", " a "]


@pytest.mark.parametrize("many", [False, True])
def test_any_id_reads_back(predictions, tmp_path, many) -> None:
    """Two videos of which one is called as an array of the other, or as no file can be."""
    names = tuple(f"c{k}" for k in range(MOST_COLUMNS + 1)) if many else NAMES
    logits = np.random.default_rng(0).normal(size=(9, len(names))).astype(np.float32)
    scores, path = Scores.of_logits(logits, "multiclass"), tmp_path / "predictions_test.csv"
    targets = np.arange(9) % 3
    for pair in [(a, b) for a in ODD for b in ODD if a != b]:
        given = replace(predictions, ids=list(pair), scores=scores, targets=targets)
        write_predictions(given, path, SimpleNamespace(class_names=names))
        table = read_frames(path, names)
        assert table.ids == list(pair) and table.starts.tolist() == [0, 7, 9]
        assert table.targets.tolist() == targets.tolist()
        with h5py.File(path.with_suffix(".h5")) as file:
            assert file["ids"].asstr()[:].tolist() == list(pair)


@pytest.mark.parametrize("many", [False, True])
def test_frames_of_an_ensemble_that_disagrees_are_those_of_larger_log_odds(
    predictions, tmp_path, build, many
) -> None:
    """Two sure members: each gives one half to all digits, and the surer one is right."""
    names = tuple(f"c{k}" for k in range(MOST_COLUMNS + 1)) if many else NAMES
    logits = np.full((2, 9, len(names)), -200.0, np.float32)
    logits[0, :, 0], logits[1, :, 2] = 40.0, 60.0  # of others 0, in the first member
    logits[0, :, 1], logits[1, :, 1] = 0.0, 0.0
    scores = Scores.mean([Scores.of_logits(each, "multiclass") for each in logits])
    assert (scores.values.argmax(1) == 0).all()
    given = replace(predictions, scores=scores, targets=np.full(9, 2))
    path, resolved = tmp_path / "predictions_test.csv", SimpleNamespace(class_names=names)
    write_predictions(given, path, resolved)
    with open(path, newline="", encoding="utf-8") as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == [names[2]] * 9
    with h5py.File(path.with_suffix(".h5")) as file:
        assert (file["predictions"][:] == 2).all() and (file["log_odds"][:].argmax(1) == 2).all()
    for table in (read_frames(path, names), table_of(given, resolved)):
        assert (table.scores.predicted("multiclass") == 2).all()
        assert np.array_equal(table.scores.ranked, scores.ranked)
    if not many:
        objective = build()
        assert objective.values(objective.measured(given))["acc"] == 1.0
        assert pooled_metrics(objective, [read_table(objective, path)])["acc"] == 1.0


def test_files_of_unlabelled_videos_and_of_other_classes(predictions, tmp_path) -> None:
    bare = FramePredictions(
        predictions.ids, predictions.scores, predictions.rows, predictions.frames
    )
    path = tmp_path / "predictions_new.csv"
    write_predictions(bare, path, SimpleNamespace(class_names=NAMES))
    assert "label" not in path.read_text().splitlines()[0]
    assert read_frames(path, NAMES).targets is None
    with h5py.File(path.with_suffix(".h5")) as file:
        assert "labels" not in file
    with pytest.raises(UserError, match="other classes: it has no column p_dry"):
        read_frames(path, ("cut", "dry"))
    empty = tmp_path / "empty.csv"
    empty.write_text("video,p_cut\n")
    assert read_frames(empty, ("cut",)).ids == []


# ------------------------------------------------------------------------------------ figures


def test_ribbons_show_labels_above_predictions(predictions, tmp_path) -> None:
    from PIL import Image

    path = tmp_path / "ribbons.png"
    segment_ribbons(predictions, NAMES, path)
    pixels = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    for number in range(len(NAMES)):  # every class is there: in a bar, and in the legend
        colour = np.round(np.array(framewise.class_colour(number)) * 255)
        assert (np.abs(pixels - colour).max(1) <= 2).sum() > 100


def test_ribbons_of_many_videos_one_frame_and_no_label(tmp_path) -> None:
    count = 30
    frames = framewise.FrameTable(np.arange(count + 1), np.zeros(count, int), np.zeros(count))
    targets = np.where(np.arange(count) % 3 == 0, UNLABELLED, 0)
    scores = Scores.of_logits(np.eye(3)[np.arange(count) % 3], "multiclass")
    ids, losses = [f"v{i}" for i in range(count)], np.zeros(count)
    many = LabelledFrames(ids, scores, np.arange(count), targets, losses, frames)
    segment_ribbons(many, NAMES, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 10_000
