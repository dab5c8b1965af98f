"""Metrics of videos with a class a frame: of frames, and of the segments that they make.

A segment is a longest run of frames of one class. Frames are measured over all videos together. The
segmental metrics are those of the action-segmentation literature (Lea et al., Temporal
Convolutional Networks for Action Segmentation and Detection, CVPR 2017) as the evaluation code of
MS-TCN counts them (Farha and Gall, CVPR 2019): the edit score is the mean over the videos, F1@k is
counted over the segments of all videos. All are shares, 0 to 1, where papers give percent.

- Unlabelled frames are left out before anything is measured, so segments are those of the sequence
  of labelled frames. A video without labelled frames counts for nothing.
- Segments of background classes count neither in the truth nor in the prediction; frames of them
  do. The code of MS-TCN takes the class "background" for one; here none is unless it is named.
- A segment ends behind its last frame. The published code ends the last one of a video a frame too
  early, which changes an IoU by at most a frame.

V videos, n frames of a video, K classes, P and Y segments of a prediction and of a truth, R sets of
weights of videos: a resample draws whole videos, as the frames of one are not independent.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from glovita_lib.errors import composed
from glovita_lib.metrics_classification import (
    Array,
    ClassCounts,
    Resampled,
    Scores,
    formula,
    ratio,
)
from glovita_lib.spec_samples import UNLABELLED

OVERLAPS = (0.10, 0.25, 0.50)
"""Least intersection over union of a segment that counts as found."""
IOUS_AT_ONCE = 1_000_000  # bounds the memory of pairs of segments


def segments_of(classes: Array, background: Sequence[int]) -> tuple[Array, Array]:
    """Class (P,) and first and past-the-end frame (P, 2) of the segments of a sequence (n,)."""
    edges = np.flatnonzero(classes[1:] != classes[:-1]) + 1
    starts = np.concatenate([np.zeros(min(len(classes), 1), np.int64), edges])
    ends = np.concatenate([starts[1:], np.full(len(starts[:1]), len(classes))])
    names = classes[starts]
    keep = ~np.isin(names, background)
    return names[keep], np.stack([starts, ends], 1)[keep]


def edit_score(predicted: Array, actual: Array) -> float:
    """1 - d / max(P, Y) with d the Levenshtein distance of the classes of two lists of segments,
    whatever their lengths in time; 1 where both have none."""
    longest = max(len(predicted), len(actual))
    return 1 - levenshtein(predicted, actual) / longest if longest else 1.0


def levenshtein(one: Array, other: Array) -> int:
    """Fewest insertions, deletions and exchanges that turn one sequence into another.

    A row of the table at a time: what an insertion costs is a running minimum along the row.
    """
    short, long = sorted((one, other), key=len)
    places = np.arange(len(long) + 1)
    row = places
    for index, name in enumerate(short):
        kept = np.minimum(row[1:] + 1, row[:-1] + (long != name))
        row = np.minimum.accumulate(np.concatenate([[index + 1], kept]) - places) + places
    return int(row[-1])


def found_segments(
    predicted: tuple[Array, Array], actual: tuple[Array, Array], overlaps: Sequence[float]
) -> Array:
    """How many true segments are found at each overlap.

    A predicted segment points to the true one of its class with the largest IoU, the first of equal
    ones. It finds it where that IoU reaches the overlap; of several predictions that point to one
    only the first counts, the others are false.
    """
    (names, spans), (true_names, true_spans) = predicted, actual
    if not len(names) or not len(true_names):
        return np.zeros(len(overlaps), np.int64)
    best, nearest = [], []
    for rows in np.array_split(
        np.arange(len(names)), len(names) * len(true_names) // IOUS_AT_ONCE + 1
    ):
        starts, ends = (spans[rows, end, None] for end in (0, 1))  # (p, 1)
        shared = np.minimum(ends, true_spans[:, 1]) - np.maximum(starts, true_spans[:, 0])
        whole = np.maximum(ends, true_spans[:, 1]) - np.minimum(starts, true_spans[:, 0])
        same = names[rows, None] == true_names
        iou = np.where(same, np.maximum(shared, 0) / whole, 0.0)  # (p, Y)
        nearest.append(iou.argmax(1))
        best.append(iou.max(1))
    ious, places = np.concatenate(best), np.concatenate(nearest)
    return np.array([len(np.unique(places[ious >= overlap])) for overlap in overlaps])


class Videos:
    """Videos with a class of each frame and scores for it; what no weight changes is kept."""

    subtask = "framewise"

    def __init__(
        self,
        targets: Sequence[Array],
        scores: Sequence[Scores],
        class_names: tuple[str, ...],
        background: Sequence[str] = (),
    ) -> None:
        """
        Args:
            targets: V arrays (n,) of class indices, `UNLABELLED` where a frame has none.
            scores: V of (n, K).
            background: names of the classes whose segments do not count.
        """
        pairs = zip(targets, scores, strict=True)
        known = [(truth, score, np.flatnonzero(truth != UNLABELLED)) for truth, score in pairs]
        self.targets = [truth[kept] for truth, _, kept in known]
        scored = [score.of(kept) for _, score, kept in known]
        self.predictions = [score.predicted("multiclass") for score in scored]
        self.is_finite = bool(known) and all(np.isfinite(s.values).all() for s in scored)
        self.class_names = class_names
        left_out = set(map(composed, background))
        self.background = [k for k, name in enumerate(class_names) if composed(name) in left_out]

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def pairs(self) -> tuple[Array, Array]:
        """True and predicted class of all labelled frames, both (N,)."""
        return np.concatenate(self.targets), np.concatenate(self.predictions)

    @cached_property
    def frames(self) -> Array:
        """Labelled frames of each video (V,)."""
        return np.array([len(truth) for truth in self.targets], np.int64)

    @cached_property
    def per_video(self) -> tuple[Array, Array, Array]:
        """Hits, predictions and labels of each class (V, K)."""
        classes, rows = len(self.class_names), []
        for truth, guess in zip(self.targets, self.predictions, strict=True):
            parts = (truth[truth == guess], guess, truth)
            rows.append([np.bincount(part, minlength=classes) for part in parts])
        table = np.array(rows, np.float64).reshape(-1, 3, classes)
        return table[:, 0], table[:, 1], table[:, 2]

    def counts(self, weights: Array) -> ClassCounts:
        """Of all classes over the frames of videos under weights (V, R)."""
        tp, predicted, actual = (each.T @ weights for each in self.per_video)
        return ClassCounts(tp, predicted, actual, self.frames @ weights)

    @cached_property
    def segments(self) -> list[tuple[tuple[Array, Array], tuple[Array, Array]]]:
        """Segments of the prediction and of the truth of each video."""
        pairs = zip(self.predictions, self.targets, strict=True)
        return [
            (segments_of(guess, self.background), segments_of(truth, self.background))
            for guess, truth in pairs
        ]

    @cached_property
    def edits(self) -> Array:
        """Edit score of each video (V,), NaN where no frame is labelled."""
        scores = [edit_score(guess[0], truth[0]) for guess, truth in self.segments]
        return np.where(self.frames > 0, np.array(scores, np.float64), np.nan)

    @cached_property
    def segment_counts(self) -> tuple[Array, Array]:
        """Segments that are found at each of `OVERLAPS` (V, 3), and P + Y (V,)."""
        found = [found_segments(guess, truth, OVERLAPS) for guess, truth in self.segments]
        total = [len(guess[0]) + len(truth[0]) for guess, truth in self.segments]
        table = np.array(found, np.float64).reshape(-1, len(OVERLAPS))
        return table, np.array(total, np.float64)

    def segment_f1(self, overlap: float, weights: Array) -> Array:
        """2 found / (P + Y) over the segments of all videos, (R,)."""
        found, total = self.segment_counts
        return ratio(2 * found[:, OVERLAPS.index(overlap)] @ weights, total @ weights)


@formula("edit", "framewise")
def edit(drawn: Resampled[Videos]) -> Array:
    """Mean over the videos of their edit scores."""
    scores = drawn.samples.edits
    known = np.isfinite(scores)
    return ratio(np.where(known, scores, 0.0) @ drawn.weights, known @ drawn.weights)


@formula("f1_at_10", "framewise")
def f1_at_10(drawn: Resampled[Videos]) -> Array:
    """F1 of segments that overlap by an IoU of 0.10."""
    return drawn.samples.segment_f1(0.10, drawn.weights)


@formula("f1_at_25", "framewise")
def f1_at_25(drawn: Resampled[Videos]) -> Array:
    """F1 of segments that overlap by an IoU of 0.25."""
    return drawn.samples.segment_f1(0.25, drawn.weights)


@formula("f1_at_50", "framewise")
def f1_at_50(drawn: Resampled[Videos]) -> Array:
    """F1 of segments that overlap by an IoU of 0.50."""
    return drawn.samples.segment_f1(0.50, drawn.weights)
