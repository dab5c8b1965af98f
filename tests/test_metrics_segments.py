"""Segmental metrics against the published definitions, written out frame by frame here."""

import json
import math
import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from glovita_lib.metric_names import metrics_of
from glovita_lib.metrics import report_of, values_of
from glovita_lib.metrics_classification import Scores
from glovita_lib.metrics_segments import Videos
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_train import Framewise

CLASSES = ("rest", "pour", "stir", "serve")
NAMES = metrics_of("framewise")
BACKGROUNDS = [(), ("rest",), ("rest", "stir")]


# ------------------------------------------------------------------------------ the reference
#
# As the papers define them, one frame, one pair of segments and one recursion at a time: nothing
# of it is shared with the product.


def runs(classes: list[int], background: set[int]) -> list[tuple[int, frozenset[int]]]:
    """Class and set of frames of every segment."""
    found: list[tuple[int, set[int]]] = []
    for frame, name in enumerate(classes):
        if not found or found[-1][0] != name:
            found.append((name, set()))
        found[-1][1].add(frame)
    return [(name, frozenset(frames)) for name, frames in found if name not in background]


def distance(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Levenshtein distance by its recursive definition."""

    @cache
    def between(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            between(i - 1, j) + 1,
            between(i, j - 1) + 1,
            between(i - 1, j - 1) + (one[i - 1] != other[j - 1]),
        )

    return between(len(one), len(other))


def hits(guess: list, truth: list, overlap: float) -> tuple[int, int, int]:
    """True and false positives and missed segments of a video."""
    free, tp = set(range(len(truth))), 0
    for name, frames in guess:
        ious = [len(frames & own) / len(frames | own) * (name == true) for true, own in truth]
        best = max(range(len(ious)), key=ious.__getitem__, default=None)
        if best is not None and ious[best] >= overlap and best in free:
            free.remove(best)
            tp += 1
    return tp, len(guess) - tp, len(free)


def expected(targets: list, guesses: list, background: tuple[str, ...]) -> dict[str, float]:
    """Edit score as a mean over videos, F1 counted over all of them."""
    left_out = {CLASSES.index(name) for name in background}
    edits, sums = [], {10: [0, 0, 0], 25: [0, 0, 0], 50: [0, 0, 0]}
    for truth, guess in zip(targets, guesses, strict=True):
        kept = [(t, g) for t, g in zip(truth, guess, strict=True) if t != UNLABELLED]
        if not kept:
            continue
        own, predicted = (runs(list(part), left_out) for part in zip(*kept, strict=True))
        names = [tuple(name for name, _ in part) for part in (predicted, own)]
        longest = max(map(len, names))
        edits.append(1 - distance(*names) / longest if longest else 1.0)
        for k, total in sums.items():
            for place, count in enumerate(hits(predicted, own, k / 100)):
                total[place] += count
    found = {"edit": sum(edits) / len(edits) if edits else math.nan}
    for k, (tp, fp, fn) in sums.items():
        segments = 2 * tp + fp + fn
        found[f"f1_at_{k}"] = 2 * tp / segments if segments else math.nan
    return found


def of_frames(targets: list, guesses: list) -> dict[str, float]:
    """scikit-learn's metrics of the labelled frames of all videos."""
    truth, guess = (np.concatenate(part) for part in (targets, guesses))
    truth, guess = truth[truth != UNLABELLED], guess[truth != UNLABELLED]
    macro = {"average": "macro", "zero_division": 0}
    found = {
        "acc": sk.accuracy_score(truth, guess),
        "f1": sk.f1_score(truth, guess, **macro),
        "precision": sk.precision_score(truth, guess, **macro),
        "recall": sk.recall_score(truth, guess, **macro),
    }
    per_class = sk.f1_score(truth, guess, labels=range(4), average=None, zero_division=np.nan)
    return found | {f"f1_per_class_{n}": v for n, v in zip(CLASSES, per_class, strict=True)}


# ------------------------------------------------------------------------------------ videos


def scores_of(guess: np.ndarray) -> Scores:
    """Scores whose largest one is of the guessed class."""
    return Scores(np.eye(len(CLASSES), dtype=np.float32)[guess] + 0.1)


def measured(targets: list, guesses: list, background: tuple[str, ...] = ()) -> dict[str, float]:
    arrays = [np.array(truth, np.int64) for truth in targets]
    scores = [scores_of(np.array(guess, np.int64)) for guess in guesses]
    return values_of(NAMES, Videos(arrays, scores, CLASSES, background))


def drawn(seed: int) -> Iterator[tuple[list, list]]:
    """Videos with segments of random lengths; predictions that are late, flicker or miss some."""
    rng = np.random.default_rng(seed)
    targets, guesses = [], []
    for _ in range(int(rng.integers(1, 6))):
        lengths = rng.integers(1, 12, rng.integers(1, 9))
        truth = np.repeat(rng.integers(0, 4, len(lengths)), lengths)
        guess = np.roll(truth, int(rng.integers(-2, 3)))
        wrong = rng.random(len(guess)) < rng.choice([0.0, 0.1, 0.5])
        guess = np.where(wrong, rng.integers(0, 4, len(guess)), guess)
        truth = np.where(rng.random(len(truth)) < rng.choice([0.0, 0.2]), UNLABELLED, truth)
        targets.append(truth.tolist())
        guesses.append(guess.tolist())
    yield targets, guesses


def test_background_in_either_unicode_form() -> None:
    nfc, nfd = (unicodedata.normalize(form, "Rühr") for form in ("NFC", "NFD"))
    truth, scores = [np.array([0, 1, 1])], [Scores(np.eye(2)[[0, 1, 1]])]
    found = [Videos(truth, scores, (nfd, "x"), (name,)).background for name in (nfc, nfd, "x", "y")]
    assert found == [[0], [0], [1], []]
    task = Framewise(background=(nfc, "y"))
    assert [why for _, why in task.class_name_problems((nfd, "x"))] == [
        f'"y" is no class: there are {nfd}, x'
    ]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_segments_are_measured_as_the_papers_say(background: tuple[str, ...]) -> None:
    for seed in range(60):
        for targets, guesses in drawn(seed):
            found = measured(targets, guesses, background)
            for name, value in expected(targets, guesses, background).items():
                assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True), (seed, name)


def test_frames_are_measured_as_scikit_learn_does() -> None:
    for seed in range(20):
        for targets, guesses in drawn(seed):
            if not np.any(np.concatenate(targets) != UNLABELLED):
                continue
            found = measured(targets, guesses)
            for name, value in of_frames(targets, guesses).items():
                assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True), (seed, name)


FRAMES = st.lists(
    st.lists(st.tuples(st.sampled_from([UNLABELLED, 0, 1, 2, 3]), st.integers(0, 3)), max_size=14),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(FRAMES, st.sampled_from(BACKGROUNDS))
def test_any_videos_are_measured(videos: list, background: tuple[str, ...]) -> None:
    """Empty videos, single frames, no label at all: as defined, between 0 and 1, or undefined."""
    targets = [[truth for truth, _ in video] for video in videos]
    guesses = [[guess for _, guess in video] for video in videos]
    found = measured(targets, guesses, background)
    for name, value in expected(targets, guesses, background).items():
        assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True)
    counted = [found[f"f1_at_{k}"] for k in (10, 25, 50)]
    shares = [value for name, value in found.items() if name not in ("mcc", "kappa")]
    assert all(math.isnan(value) or 0 <= value <= 1 for value in shares)
    assert all(math.isnan(v) for v in counted) or counted == sorted(counted, reverse=True)
    labelled = any(truth != UNLABELLED for video in targets for truth in video)
    assert labelled != math.isnan(found["acc"])


# ------------------------------------------------------------------------------------- cases


def test_a_right_prediction_is_one_and_flicker_costs_segments_not_frames() -> None:
    truth = [0] * 20 + [1] * 20 + [2] * 20
    right = measured([truth], [truth])
    assert {right[name] for name in ("acc", "edit", "f1_at_10", "f1_at_50")} == {1.0}
    guess = truth.copy()
    guess[5::10] = [3] * 6  # six single frames: 15 segments instead of 3
    found = measured([truth], [guess])
    assert found["acc"] == pytest.approx(54 / 60)
    assert found["edit"] == pytest.approx(1 - 12 / 15)
    assert found["f1_at_10"] == pytest.approx(2 * 3 / (15 + 3))


def test_the_edit_score_is_a_mean_over_videos_and_f1_a_count_over_all() -> None:
    long, short = [0, 1, 2, 3] * 3, [0] * 4
    found = measured([long, short], [long, [1] * 4])
    assert found["edit"] == pytest.approx((1 + 0) / 2)
    assert found["f1_at_50"] == pytest.approx(2 * 12 / (13 + 13))


def test_background_counts_as_frames_and_not_as_segments() -> None:
    truth, guess = [0] * 6 + [1] * 6, [0, 2, 0, 0, 0, 0] + [1] * 6
    whole, without = measured([truth], [guess]), measured([truth], [guess], ("rest",))
    assert whole["acc"] == without["acc"] == pytest.approx(11 / 12)
    assert whole["edit"] == pytest.approx(1 - 2 / 4) and without["edit"] == pytest.approx(1 / 2)
    nothing = measured([[0] * 5], [[0] * 5], ("rest",))
    assert nothing["edit"] == 1.0 and math.isnan(nothing["f1_at_10"])
    assert measured([[0] * 5], [[0, 0, 2, 0, 0]], ("rest",))["edit"] == 0.0


def test_labels_every_few_frames_make_the_segments_of_the_labelled_frames() -> None:
    truth = [0] * 10 + [1] * 10
    sparse = [name if frame % 5 == 0 else UNLABELLED for frame, name in enumerate(truth)]
    guess = [0] * 10 + [1] * 9 + [3]
    assert measured([sparse], [guess])["edit"] == 1.0


def test_scores_that_are_not_finite_measure_nothing() -> None:
    scores = np.full((4, 4), np.nan)
    samples = Videos([np.array([0, 1, 1, UNLABELLED])], [Scores(scores)], CLASSES)
    assert all(math.isnan(value) for value in values_of(NAMES, samples).values())
    scores[:3] = 0.25  # an unlabelled frame says nothing
    assert (
        values_of(("acc",), Videos(samples.targets, [Scores(scores[:3])], CLASSES))["acc"] == 1 / 3
    )


def test_the_report_draws_whole_videos() -> None:
    """Of twenty videos one half is right: a resample has some of them, never a part of one."""
    targets = 10 * [np.zeros(50, np.int64), np.ones(50, np.int64)]
    scores = 20 * [scores_of(np.zeros(50, np.int64))]
    samples = Videos(targets, scores, CLASSES)
    report = report_of(("acc", "edit", "f1_at_50"), samples, bootstrap=400, seed=1)
    assert report["n"] == 20 and report["metrics"] == {"acc": 0.5, "edit": 0.5, "f1_at_50": 0.5}
    stream = np.random.default_rng(1)
    right = [(stream.integers(0, 20, 20) % 2 == 0).mean() for _ in range(400)]
    assert report["ci95"]["acc"] == pytest.approx(np.percentile(right, [2.5, 97.5]))
    assert report["per_class"]["rest"] == {
        "n": 500, "predicted": 1000, "precision": 0.5, "recall": 1.0, "f1": 2 / 3,
    }  # fmt: skip
    assert report["confusion"][1] == [500, 0, 0, 0]
    alone = report_of(("acc",), Videos(targets[:1], scores[:1], CLASSES), bootstrap=9, seed=1)
    assert alone["ci95"]["acc"] == [None, None]  # one video says nothing about the spread
    assert json.loads(json.dumps(report)) == report


def test_classes_of_few_videos_have_no_interval() -> None:
    """A mean over classes goes by the videos with the class, however many frames they have."""
    rng = np.random.default_rng(0)
    targets = [rng.integers(0, 2, 300) for _ in range(24)]
    for truth in targets[:4]:
        truth[:100] = 2
    scores = [scores_of(np.where(rng.random(300) < 0.7, t, (t + 1) % 3)) for t in targets]
    names = ("acc", "f1", "recall", "mcc", "edit")
    report = report_of(names, Videos(targets, scores, CLASSES), bootstrap=50, seed=0)
    assert set(report["no_ci95"]) == {"f1", "recall"}
    assert f'"{CLASSES[2]}" has 4 of the 5 videos' in report["no_ci95"]["f1"]
    enough = [np.where(np.arange(300) < 100, 2, t) for t in targets]
    report = report_of(names, Videos(enough, scores, CLASSES), bootstrap=50, seed=0)
    assert report["no_ci95"] == {} and None not in report["ci95"]["f1"]


def test_thousands_of_segments_take_no_time_and_no_memory() -> None:
    """A flickering prediction of a long video: the table of pairs is never whole."""
    rng = np.random.default_rng(0)
    truth, guess = np.repeat(rng.integers(0, 4, 300), 60), rng.integers(0, 4, 18000)
    found = measured([truth], [guess])
    assert 0 < found["edit"] < 0.05 and found["f1_at_50"] < 0.05
