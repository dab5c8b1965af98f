"""The figures of a run's results, chosen by the kind of target."""

from pathlib import Path

import numpy as np

from glovita_lib.metrics import compute, confusion, usable
from glovita_lib.plot_confusion import confusion_matrix, label_outcomes
from glovita_lib.plot_curves import learning_curves
from glovita_lib.plot_regression import regression_scatter
from glovita_lib.plot_scores import calibration, roc_pr_curves

__all__ = ["learning_curves", "plot_results"]

LARGEST_MATRIX = 1000  # classes; a larger confusion matrix has less than a pixel a cell


def plot_results(
    folder: Path,
    name: str,
    *,
    subtask: str,
    targets: np.ndarray,
    scores: np.ndarray,
    class_names: tuple[str, ...],
) -> list[Path]:
    """Figures of a labelled split; none if it is empty or holds scores that are not finite.

    Writes confusion_<name>.png, roc_pr_<name>.png and calibration_<name>.png, or
    regression_<name>.png.

    Args:
        folder: where the files go.
        name: of the split.
        subtask: multiclass, multilabel or regression.
        targets: (N,) class indices; (N, K) 0 or 1; (N, K) values.
        scores: (N, K) probabilities; regression: outputs in target units.
        class_names: K names.
    """
    if not usable(scores):
        return []
    if subtask == "regression":
        path = folder / f"regression_{name}.png"
        regression_scatter(targets, scores, class_names, path)
        return [path]
    paths = [folder / f"{kind}_{name}.png" for kind in ("confusion", "roc_pr", "calibration")]
    data = {"targets": targets, "scores": scores, "class_names": class_names}
    quality = compute(("ece", "brier"), subtask=subtask, **data)
    quality = {"ece": quality["ECE"], "brier": quality["Brier"]}
    if subtask == "multiclass":
        predicted, classes = scores.argmax(1), len(class_names)
        positives = targets[:, None] == np.arange(classes)  # (N, K)
        if classes <= LARGEST_MATRIX:
            confusion_matrix(confusion(targets, predicted, classes), class_names, paths[0])
        else:
            del paths[0]
        probability, outcome = scores.max(1), predicted == targets
        what = ("probability of the predicted class", "share that is right")
    else:
        positives = targets > 0.5
        label_outcomes(positives, scores >= 0.5, class_names, paths[0])
        probability, outcome = scores.ravel(), positives.ravel()
        what = ("probability of a label, all labels pooled", "share that is set")
    roc_pr_curves(positives, scores, class_names, paths[-2])
    calibration(probability.astype(np.float64), outcome, paths[-1], what=what, **quality)
    return paths
