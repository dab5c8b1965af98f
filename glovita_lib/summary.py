"""summary.json of a group directory: metrics over its folds, and of all held-out predictions
together.

N samples, K classes or targets.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glovita_lib.files import TEMPORARY, read_json, write_json
from glovita_lib.lock import Lock
from glovita_lib.prediction_csv import Table, read_predictions
from glovita_lib.rundir import RunDir
from glovita_lib.spec import UserError, changed_keys

SPLITS = ("val", "test")

Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]  # targets, scores -> metrics


def write_summary(
    group: Path, *, config: dict, subtask: str, class_names: Sequence[str], measure: Measure
) -> dict[str, Any]:
    """Write and return what summary.json says of the folds that are evaluated so far.

    Per split: `folds`; per metric `mean`, `sd` (over folds, n - 1 in the denominator; null for one
    fold), `n` and the `values` by fold, where an undefined value is null and left out of the mean;
    `pooled`, the metrics of all folds' predictions taken as one set; `samples` in it;
    `repeated_ids`, how many samples several folds predicted (each prediction counts: a test split
    that is the same in all folds is no out-of-fold prediction). `left_out` names folds that do
    not belong, with the reason.

    Args:
        group: folder of the folds.
        config: plain spec of the run that has just ended; folds of another spec are left out.
        subtask: multiclass, multilabel or regression.
        class_names: K names.
        measure: metrics of targets and scores.

    Raises:
        UserError: disk full, read-only ...
    """
    with Lock(group / ".summary.lock"):  # folds may end at the same time
        for path in group.glob(f"{TEMPORARY}*"):  # what a kill left; nobody else writes here
            path.unlink()
        folds, left_out = members(group, config)
        result: dict[str, Any] = {
            split: summarize(folds, split, subtask, class_names, measure, left_out)
            for split in SPLITS
        }
        result = {split: content for split, content in result.items() if content}
        result["left_out"] = left_out
        write_json(group / "summary.json", result)
    return result


def members(group: Path, config: dict) -> tuple[list[RunDir], dict[str, str]]:
    """Folds of the same spec in their order, and why others are left out."""
    folds, left_out = [], {}
    paths = [path for path in group.iterdir() if path.name.isdecimal()]
    for run in sorted(map(RunDir, paths), key=lambda run: int(run.path.name)):
        if not run.config.is_file():
            continue
        try:
            changes = changed_keys(config, read_json(run.config))
        except UserError as error:
            changes = [str(error)]
        if changes:
            left_out[run.path.name] = "another spec: " + "; ".join(changes)
        else:
            folds.append(run)
    return folds, left_out


def summarize(
    folds: list[RunDir],
    split: str,
    subtask: str,
    class_names: Sequence[str],
    measure: Measure,
    left_out: dict[str, str],
) -> dict[str, Any] | None:
    """One split over the folds that have it; None where none has."""
    reports: dict[str, dict[str, Any]] = {}
    tables: list[Table] = []
    for run in folds:
        if not run.metrics_of(split).is_file():
            continue
        try:
            table = read_predictions(
                run.predictions_of(split), subtask=subtask, class_names=class_names
            )
            report = read_json(run.metrics_of(split))
        except UserError as error:
            left_out[run.path.name] = str(error)
            continue
        tables.append(table)
        reports[run.path.name] = {"loss": report.get("loss"), **report["metrics"]}
    if not reports:
        return None
    return {"folds": list(reports), "metrics": spread(reports), **pool(tables, measure)}


def spread(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of each metric over the folds."""
    result = {}
    for name in dict.fromkeys(name for report in reports.values() for name in report):
        values = {fold: report.get(name) for fold, report in reports.items()}
        known = np.array([v for v in values.values() if v is not None and math.isfinite(v)])
        result[name] = {
            "mean": known.mean() if len(known) else None,
            "sd": known.std(ddof=1) if len(known) > 1 else None,
            "n": len(known),
            "values": values,
        }
    return result


def pool(tables: list[Table], measure: Measure) -> dict[str, Any]:
    """Metrics of all folds' predictions as one set."""
    tables = [table for table in tables if table.targets is not None]
    ids = [sample for table in tables for sample in table.ids]
    if not ids:
        return {"pooled": None, "samples": 0, "repeated_ids": 0}
    counts = np.unique(np.array(ids, dtype=object).astype(str), return_counts=True)[1]
    targets = np.concatenate([table.targets for table in tables if len(table.ids)])
    scores = np.concatenate([table.scores for table in tables if len(table.ids)])
    return {
        "pooled": measure(targets, scores),
        "samples": len(ids),
        "repeated_ids": int((counts > 1).sum()),
    }
