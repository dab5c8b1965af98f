"""What a run leaves behind about a split: predictions with ids, metrics, plots."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from glovita_lib import files, plots, prediction_csv, sheets
from glovita_lib.datasets import Split
from glovita_lib.evaluation import Predictions
from glovita_lib.experiment import Experiment
from glovita_lib.facts import Facts
from glovita_lib.loaders import fit_all, to_tensor
from glovita_lib.metrics import compute, report

WORST = 24  # samples on the sheet of the worst predictions
SHEET_ROWS, SHEET_COLUMNS = 6, 7  # samples and their augmented versions


def measure(predictions: Predictions, facts: Facts) -> dict[str, float]:
    """Metrics of the facts, by logged name."""
    return compute(
        facts.metrics,
        subtask=facts.subtask,
        targets=predictions.targets,
        scores=predictions.scores,
        class_names=facts.class_names,
    )


def write_predictions(path: Path, predictions: Predictions, facts: Facts) -> None:
    """The predictions of a split as CSV: id, label, prediction, p_<class> ..."""
    prediction_csv.write_predictions(
        path,
        ids=predictions.ids,
        targets=predictions.targets,
        scores=predictions.scores,
        subtask=facts.subtask,
        class_names=facts.class_names,
    )


def write_results(
    folder: Path,
    name: str,
    predictions: Predictions,
    experiment: Experiment,
    *,
    split: Split,
    plot: bool,
) -> dict[str, Any]:
    """Predictions, metrics with confidence intervals and, if asked, plots of a labelled split.

    Returns what metrics_<name>.json holds.
    """
    facts, task = experiment.facts, experiment.root.task
    write_predictions(folder / f"predictions_{name}.csv", predictions, facts)
    content = report(
        facts.metrics,
        subtask=facts.subtask,
        targets=predictions.targets,
        scores=predictions.scores,
        class_names=facts.class_names,
        bootstrap=task.bootstrap,
        seed=experiment.root.seed,
    )
    content = {"split": name, "loss": predictions.loss, **content}
    files.write_json(folder / f"metrics_{name}.json", content)
    if plot:
        plots.plot_results(
            folder / "plots",
            name,
            subtask=facts.subtask,
            targets=predictions.targets,
            scores=predictions.scores,
            class_names=facts.class_names,
        )
        if facts.kind == "images":
            plot_worst(folder / "plots" / f"worst_{name}.png", predictions, split, facts)
    return content


def plot_worst(path: Path, predictions: Predictions, split: Split, facts: Facts) -> None:
    """A sheet of the samples with the largest losses, worst first."""
    worst = np.argsort(-predictions.losses, kind="stable")[:WORST]
    images = list(split.source.fetch(predictions.rows[worst]))
    sheets.worst_sheet(
        images,
        ids=[predictions.ids[row] for row in worst],
        targets=predictions.targets[worst],
        scores=predictions.scores[worst],
        losses=predictions.losses[worst],
        subtask=facts.subtask,
        class_names=facts.class_names,
        bit_depth=facts.bit_depth,
        path=path,
    )


def plot_augmented(path: Path, experiment: Experiment, split: Split, rows: np.ndarray) -> None:
    """A sheet of some training samples beside what the train policy makes of them."""
    facts = experiment.facts
    if facts.augmentation is None:
        return
    augment = experiment.objective.train_inputs
    rows = rows[:SHEET_ROWS]
    originals = split.source.fetch(rows)
    columns = []
    for seed in range(SHEET_COLUMNS):
        if isinstance(originals, np.ndarray):
            inputs, fitted = to_tensor(originals), False
        else:
            inputs, fitted = fit_all(originals, augment.fit, seed), True
        columns.append(augment(inputs, fitted, seed))  # (R, C, S, S)
    sheets.augmented_sheet(
        list(originals),
        torch.stack(columns),
        mean=facts.augmentation.mean,
        std=facts.augmentation.std,
        path=path,
        captions=[split.ids[row] for row in rows],
    )


def summary_lines(reports: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """One row per split: metrics with their confidence intervals."""
    rows = []
    for split, content in reports.items():
        parts = [f"loss {content['loss']:.4f}"] if content["loss"] is not None else []
        for metric, value in content["metrics"].items():
            interval = content["ci95"].get(metric)
            shown = "undefined" if value is None else f"{value:.4f}"
            if interval is not None and None not in interval:
                shown += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
            parts.append(f"{metric} {shown}")
        rows.append((split, "  ".join(parts)))
    return rows
