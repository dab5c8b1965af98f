"""Results of runs: predictions, metrics and plots of a split, summaries of folds, comparisons."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from glovita_lib import figures, figures_volumes, files, plots
from glovita_lib.augment import Augmenter
from glovita_lib.data import Split
from glovita_lib.errors import UserError, listed
from glovita_lib.experiment import Experiment
from glovita_lib.files import TEMPORARY, Lock, read_json, read_jsonl, write_json
from glovita_lib.loader import fit_all, to_tensor
from glovita_lib.loggers import SHOWN_CLASSES, Share, by_family, decimal, spread_of
from glovita_lib.metric_names import lower_is_better
from glovita_lib.metrics import metrics_report, samples_of
from glovita_lib.metrics_classification import Scores
from glovita_lib.objectives import (
    LabelledPredictions,
    LabelObjective,
    Predictions,
    as_loaded,
    build_inputs,
)
from glovita_lib.prediction_files import Table, as_read, read_predictions, write_prediction_files
from glovita_lib.resolved import ClipInputs, ImageInputs, Inputs, Resolved, VolumeInputs
from glovita_lib.rundir import RunDir, locate
from glovita_lib.spec import Loaded, changed_keys
from glovita_lib.spec_root import Root

# ------------------------------------------------------------------------ results of a split
#
# Predictions with ids, metrics, plots.

WORST = 24  # samples on the sheet of the worst predictions
SHEET_ROWS, SHEET_COLUMNS = 6, 7  # samples and their augmented versions
WORST_VOLUMES, VOLUME_ROWS, VOLUME_COLUMNS = 12, 3, 6  # three slices each


@singledispatch
def write_predictions(predictions: Predictions, path: Path, resolved: Resolved) -> None:
    """The predictions of a split as CSV and, of many classes, HDF5."""
    write_prediction_files(
        path,
        ids=predictions.ids,
        targets=predictions.targets if isinstance(predictions, LabelledPredictions) else None,
        scores=predictions.scores,
        subtask=resolved.subtask,
        class_names=resolved.class_names,
    )


@singledispatch
def table_of(predictions: Predictions, resolved: Resolved) -> Table:
    """Predictions as they are read from the files that hold them."""
    targets = predictions.targets if isinstance(predictions, LabelledPredictions) else None
    return as_read(predictions.ids, targets, predictions.scores, resolved.subtask)


@singledispatch
def write_results(
    predictions: LabelledPredictions,
    folder: Path,
    name: str,
    experiment: Experiment,
    *,
    split: Split,
    plot: bool,
) -> dict[str, Any]:
    """Predictions, metrics with confidence intervals and, if asked, plots of a labelled split.

    Returns what metrics_<name>.json holds.
    """
    resolved, task = experiment.resolved, experiment.root.task
    write_predictions(predictions, folder / f"predictions_{name}.csv", resolved)
    content = metrics_report(
        resolved.metrics,
        subtask=resolved.subtask,
        targets=predictions.targets,
        scores=predictions.scores,
        class_names=resolved.class_names,
        bootstrap=task.bootstrap,
        seed=experiment.root.seed,
        tell=Share(f"intervals of {name}"),
    )
    content = {"split": name, "loss": predictions.loss, **content}
    files.write_json(folder / f"metrics_{name}.json", content)
    if plot:
        plots.plot_results(
            folder / "plots",
            name,
            subtask=resolved.subtask,
            targets=predictions.targets,
            scores=predictions.scores,
            class_names=resolved.class_names,
        )
        path = folder / "plots" / f"worst_{name}.png"
        plot_worst(resolved.inputs, path, predictions, split, resolved)
    return content


PLOTS = ("confusion", "roc_pr", "calibration", "regression", "worst", "ribbons")


def clear_results(folder: Path, name: str) -> None:
    """Remove metrics and plots of earlier predictions of the same name, which new ones, perhaps
    without labels or plots, would stand beside.

    Raises:
        UserError: something cannot be removed.
    """
    plots = (folder / "plots" / f"{kind}_{name}.png" for kind in PLOTS)
    for path in (folder / f"metrics_{name}.json", *plots):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise files.write_error(path, error) from None


@singledispatch
def plot_worst(
    inputs: Inputs, path: Path, predictions: LabelledPredictions, split: Split, resolved: Resolved
) -> None:
    """A sheet of the samples with the largest losses, worst first; none of what has no picture."""


@plot_worst.register
def _(
    inputs: ImageInputs,
    path: Path,
    predictions: LabelledPredictions,
    split: Split,
    resolved: Resolved,
) -> None:
    worst = np.argsort(-predictions.losses, kind="stable")[:WORST]
    images = list(split.source.fetch(predictions.rows[worst]))
    figures.worst_sheet(
        images,
        ids=[predictions.ids[row] for row in worst],
        targets=predictions.targets[worst],
        scores=predictions.scores.of(worst),
        losses=predictions.losses[worst],
        subtask=resolved.subtask,
        class_names=resolved.class_names,
        bit_depth=inputs.bit_depth,
        path=path,
    )


@plot_worst.register
def _(
    inputs: VolumeInputs,
    path: Path,
    predictions: LabelledPredictions,
    split: Split,
    resolved: Resolved,
) -> None:
    worst = np.argsort(-predictions.losses, kind="stable")[:WORST_VOLUMES]
    figures_volumes.worst_volumes(
        middles(inputs, split, predictions.rows[worst]),
        ids=[predictions.ids[row] for row in worst],
        targets=predictions.targets[worst],
        scores=predictions.scores.of(worst),
        losses=predictions.losses[worst],
        subtask=resolved.subtask,
        class_names=resolved.class_names,
        path=path,
    )


@plot_worst.register
def _(
    inputs: ClipInputs,
    path: Path,
    predictions: LabelledPredictions,
    split: Split,
    resolved: Resolved,
) -> None:
    worst = np.argsort(-predictions.losses, kind="stable")[:WORST]
    figures.worst_sheet(
        stored_frames(inputs, as_loaded(inputs, split, train=False), predictions.rows[worst]),
        ids=[predictions.ids[row] for row in worst],
        targets=predictions.targets[worst],
        scores=predictions.scores.of(worst),
        losses=predictions.losses[worst],
        subtask=resolved.subtask,
        class_names=resolved.class_names,
        bit_depth=8,
        path=path,
    )


def stored_frames(inputs: ClipInputs, split: Split, rows: np.ndarray) -> list[np.ndarray]:
    """Some frames of videos as they are decoded, each video as one picture (C, H, W): of the clips
    that evaluation takes."""
    from glovita_lib.loader_video import clip_frames  # of videos alone

    assert split.source.windows is not None, "see objectives.as_loaded"
    found, of = [], inputs.sampling
    for view in split.source.windows(rows):
        count = view.shape[1]
        numbers = clip_frames(of, count, view.clock, None, of.clips).flatten()
        shown = figures.some_frames(np.minimum(numbers, count - 1))
        frames = [view.read(np.array([number]))[0].transpose(2, 0, 1) for number in shown]
        found.append(figures.frames_as_one(np.stack(frames), 255))
    return found


def middles(inputs: VolumeInputs, split: Split, rows: np.ndarray) -> list[figures_volumes.Middle]:
    """The middle slices of prepared volumes of a split."""
    if split.source.windows is None:
        affine = np.diag([*inputs.augmentation.spacing, 1.0])
        return [
            figures_volumes.middle_planes(volume, affine) for volume in split.source.fetch(rows)
        ]
    found = split.source.windows(rows)
    return [figures_volumes.middle_planes(volume, volume.affine) for volume in found]


@singledispatch
def plot_augmented(inputs: Inputs, path: Path, split: Split, rows: np.ndarray) -> None:
    """A sheet of some training samples beside what the train policy makes of them; none of what
    has no picture."""


@plot_augmented.register
def _(inputs: ImageInputs, path: Path, split: Split, rows: np.ndarray) -> None:
    augment = Augmenter(inputs.augmentation, train=True, bit_depth=inputs.bit_depth)
    rows = rows[:SHEET_ROWS]
    originals = split.source.fetch(rows)
    columns = []
    for seed in range(SHEET_COLUMNS):
        if isinstance(originals, np.ndarray):
            images, fitted = to_tensor(originals), False
        else:
            images, fitted = fit_all(originals, augment.fit, seed), True
        columns.append(augment(images, fitted, seed))  # (R, C, S, S)
    figures.augmented_sheet(
        list(originals),
        torch.stack(columns),
        mean=inputs.augmentation.mean,
        std=inputs.augmentation.std,
        path=path,
        captions=[split.ids[row] for row in rows],
    )


@plot_augmented.register
def _(inputs: VolumeInputs, path: Path, split: Split, rows: np.ndarray) -> None:
    augment = build_inputs(inputs, train=True)
    assert augment.fit is not None, "volumes are cut where they are read"
    rows = rows[:VOLUME_ROWS]
    read = split.source.windows or split.source.fetch
    samples, versions = list(read(rows)), []
    spaced = np.diag([*inputs.augmentation.spacing, 1.0])
    affines = [getattr(sample, "affine", spaced) for sample in samples]
    for seed in range(VOLUME_COLUMNS):
        batch = augment(fit_all(samples, augment.fit, seed), True, seed)  # (B, C, x, y, z)
        parts = zip(batch, affines, strict=True)
        versions.append([figures_volumes.middle_planes(x.numpy(), affine) for x, affine in parts])
    figures_volumes.augmented_volumes(
        middles(inputs, split, rows),
        list(zip(*versions, strict=True)),
        path=path,
        captions=[split.ids[row] for row in rows],
    )


@plot_augmented.register
def _(inputs: ClipInputs, path: Path, split: Split, rows: np.ndarray) -> None:
    augment = build_inputs(inputs, train=True)
    split = as_loaded(inputs, split, train=True)  # several clips of a video follow one another
    rows = np.array(list({split.ids[row]: row for row in rows.tolist()}.values())[:SHEET_ROWS])
    assert augment.fit is not None and split.source.windows is not None, "clips are drawn of videos"
    of = inputs.augmentation
    white = (1 - np.array(of.mean)) / np.array(of.std)  # (C,)
    columns = []
    for seed in range(SHEET_COLUMNS):
        clips = augment(fit_all(split.source.windows(rows), augment.fit, seed), True, seed)
        each = [figures.some_frames(clip.numpy().swapaxes(0, 1)) for clip in clips]  # (n, C, S, S)
        columns.append([figures.frames_as_one(frames, white) for frames in each])
    figures.augmented_sheet(
        stored_frames(inputs, split, rows),
        torch.from_numpy(np.array(columns, np.float32)),
        mean=of.mean,
        std=of.std,
        path=path,
        captions=[split.ids[row] for row in rows],
    )


def summary_lines(reports: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """One row per split: metrics with their confidence intervals."""
    rows = []
    for split, content in reports.items():
        parts = [f"loss {decimal(content['loss'])}"] if content["loss"] is not None else []
        for family, values in by_family(content["metrics"]).items():
            if len(values) > SHOWN_CLASSES:
                parts.append(f"{family} {spread_of(values.values())}")
                continue
            for metric, value in values.items():
                parts.append(f"{metric} {with_interval(value, content['ci95'].get(metric))}")
        rows.append((split, "  ".join(parts)))
        rows += [("", line) for line in interval_lines(content["no_ci95"], content["metrics"])]
    return rows


def interval_lines(lacks: dict[str, str], metrics: Iterable[str]) -> list[str]:
    """Which metrics have no interval: one line for each reason, and one for all classes of a metric
    whose reasons name the class.

    Args:
        lacks: metric -> the reason.
        metrics: names of all metrics.
    """
    families, reasons, lines = by_family(dict.fromkeys(metrics)), dict[str, list[str]](), []
    for family, own in by_family(lacks).items():
        first = next(iter(own.values()))
        if len(set(own.values())) == 1:
            reasons.setdefault(first, []).extend(own)
            continue
        names = listed((name.removeprefix(f"{family}_") for name in own), 6)
        count = f"{len(own):,} of {len(families[family]):,} classes ({names})"
        others = f"and {len(own) - 1:,} more have too few"
        lines.append(f"no interval of {family} of {count}: {first}, {others}")
    return [f"no interval of {listed(own, 6)}: {why}" for why, own in reasons.items()] + lines


def with_interval(value: float | None, interval: list[float | None] | None) -> str:
    """A metric and the ends of its interval, where they are defined."""
    if value is None:
        return "undefined"
    ends = [decimal(end) for end in interval or () if end is not None]
    return f"{decimal(value)} [{', '.join(ends)}]" if len(ends) == 2 else decimal(value)


# ------------------------------------------------------------------------------------- folds
#
# summary.json of a group directory: metrics over its folds, and of all held-out predictions
# together.
#
# N samples, K classes or targets.

SPLITS = ("val", "test")
Read = Callable[[Path], Table]
Measure = Callable[[list[Table]], dict[str, float]]  # all predictions as one set -> metrics


@singledispatch
def read_table(objective: LabelObjective, path: Path) -> Table:
    """The predictions that a run of an objective wrote."""
    resolved = objective.resolved
    return read_predictions(path, subtask=resolved.subtask, class_names=resolved.class_names)


@singledispatch
def pooled_metrics(objective: LabelObjective, tables: list[Table]) -> dict[str, float]:
    """Metrics of all labelled predictions of several tables, taken as one set."""
    resolved = objective.resolved
    samples = samples_of(resolved.subtask, *joined(tables), resolved.class_names)
    return objective.values(samples)


def joined(tables: list[Table]) -> tuple[np.ndarray, Scores]:
    """Targets and scores of the samples of several tables."""
    filled = [table for table in tables if table.ids]
    targets = np.concatenate([table.targets for table in filled])
    return targets, Scores.joined([table.scores for table in filled])


def write_summary(group: Path, *, config: dict, read: Read, measure: Measure) -> dict[str, Any]:
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
        read: the predictions of a file.
        measure: metrics of the predictions of folds.

    Raises:
        UserError: disk full, read-only ...
    """
    with Lock(group / ".summary.lock"):  # folds may end at the same time
        for path in group.glob(f"{TEMPORARY}*"):  # what a kill left; nobody else writes here
            path.unlink()
        folds, left_out = members(group, config)
        result: dict[str, Any] = {
            split: summarize(folds, split, read, measure, left_out) for split in SPLITS
        }
        result = {split: content for split, content in result.items() if content}
        result["left_out"] = left_out
        write_json(group / "summary.json", result)
    return result


def members(group: Path, config: dict) -> tuple[list[RunDir], dict[str, str]]:
    """Folds of the same spec in their order, and why others are left out."""
    folds, left_out = [], {}
    paths = [path for path in group.iterdir() if RunDir(path).config.is_file()]
    for run in sorted(map(RunDir, paths), key=lambda run: in_order(run.path.name)):
        try:
            theirs = read_json(run.config)
            if (
                not run.path.name.isdecimal()
                and theirs.get("data", {}).get("fold") != run.path.name
            ):
                continue  # a copy
            changes = changed_keys(config, theirs)
        except UserError as error:
            changes = [str(error)]
        if changes:
            left_out[run.path.name] = "another spec: " + "; ".join(changes)
        else:
            folds.append(run)
    return folds, left_out


def in_order(fold: str) -> tuple[int, str]:
    """What folds are sorted by: numbers, then names."""
    return (int(fold), "") if fold.isdecimal() else (sys.maxsize, fold)


def summarize(
    folds: list[RunDir],
    split: str,
    read: Read,
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
            table = read(run.predictions_of(split))
            report = read_json(run.metrics_of(split), "metrics")
        except UserError as error:
            left_out[run.path.name] = str(error)
            continue
        tables.append(table)
        reports[run.path.name] = {"loss": report.get("loss"), **report["metrics"]}
    if not reports:
        return None
    return {"folds": list(reports), "metrics": fold_spread(reports), **pool(tables, measure)}


def fold_spread(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
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
    return {
        "pooled": measure(tables),
        "samples": len(ids),
        "repeated_ids": int((counts > 1).sum()),
    }


# -------------------------------------------------------------------------------- comparison
#
# Finished runs side by side: metrics, trained parameters, speed.

NOTE = (
    "ms/step: one optimizer step, median over the epochs, evaluation left out. MiB: peak memory, on"
    " a GPU of its tensors, on a CPU of the process with its libraries."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One run in the table."""

    name: str
    metric: str  # split and name, "test acc"
    value: float | None  # None: undefined on these samples
    interval: tuple[float, float] | None
    samples: int  # that were judged
    trainable: int  # parameters
    share: float  # of all parameters
    step_ms: float
    memory_mb: float | None  # None: the system did not say
    best_epoch: int | None
    device: str

    def cells(self) -> dict[str, str]:
        """Texts of the columns."""
        low_high = "" if self.interval is None else " to ".join(map(decimal, self.interval))
        return {
            "spec": self.name,
            self.metric: "undefined" if self.value is None else decimal(self.value),
            "95 % interval": low_high,
            "trainable": f"{self.trainable:,}",
            "share": f"{self.share:.2%}",
            "ms/step": f"{self.step_ms:.1f}",
            "MiB": "" if self.memory_mb is None else f"{self.memory_mb:,.0f}",
            "best epoch": "" if self.best_epoch is None else str(self.best_epoch + 1),
            "device": self.device,
        }


def compare_runs(specs: list[Loaded[Root]]) -> str:
    """A table of the runs of several specs as Markdown, best first; below it what its columns mean.

    Raises:
        UserError: one line for each run that is not there, not finished or of another spec; runs
            that report different metrics.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    for loaded, name in zip(specs, names(specs), strict=True):
        run = locate(loaded)
        if problem := unfit(loaded, run):
            problems.append(f"{loaded.path}: {problem}")
        else:
            entries.append(entry_of(name, run))
    if problems:
        raise UserError("\n".join(problems))
    metrics = sorted({entry.metric for entry in entries})
    if len(metrics) > 1:
        raise UserError(
            f"the runs report different metrics first: {', '.join(metrics)}; compare those with the"
            " same task.metrics and splits"
        )
    sign = 1 if lower_is_better(metrics[0].partition(" ")[2]) else -1
    entries.sort(key=lambda e: (e.value is None, sign * (e.value or 0.0), e.trainable))
    rows = [entry.cells() for entry in entries]
    devices = sorted({entry.device for entry in entries})
    if len(devices) == 1:
        rows = [{k: v for k, v in row.items() if k != "device"} for row in rows]
    return "\n".join([markdown_table(rows), "", *comparison_notes(entries, devices)])


def names(specs: list[Loaded[Root]]) -> list[str]:
    """What the runs are called: file names, or whole paths where those are the same."""
    stems = [Path(loaded.path).stem for loaded in specs]
    many = Counter(stems)
    return [s if many[s] == 1 else o.path for s, o in zip(stems, specs, strict=True)]


def unfit(loaded: Loaded[Root], run: RunDir) -> str | None:
    """Why a run cannot be in the table; None if it can."""
    if not run.is_finished:
        state = "is not finished" if run.last.is_file() else "does not exist"
        return f"its run {run.path} {state}; train it first"
    if changes := changed_keys(read_json(run.config), loaded.plain):
        return (
            f"{run.path} was trained with another spec: {listed(changes, 8, '; ')}; undo the"
            " changes or train it again"
        )
    if not run.metrics.is_file():
        return "objective probe has no steps and no trained parameters to compare; leave it out"
    if judged_split(run) is None:
        return "its data have neither a test nor a val split; leave it out"
    return None


def judged_split(run: RunDir) -> str | None:
    """The split whose result counts: test, else val."""
    return next((name for name in ("test", "val") if run.metrics_of(name).is_file()), None)


def entry_of(name: str, run: RunDir) -> Entry:
    """What a run directory says."""
    split = judged_split(run)
    assert split is not None  # else the run is unfit
    report = read_json(run.metrics_of(split), "metrics", "ci95", "n")
    metric, value = next(iter(report["metrics"].items()))
    interval = report["ci95"].get(metric)
    everything = read_json(run.resolved_config, "parameters")["parameters"]["all"]
    epochs = [record for record in read_jsonl(run.metrics) if record["event"] == "epoch"]
    config = read_json(run.config, "dataloading", "training")
    info = read_json(run.runtime_info, "world_size", "threads", "device")
    batch = config["dataloading"]["batch_size"] * info["world_size"]
    batch *= config["training"]["gradient_accumulation_steps"]
    threads = f" with {info['threads']} thread{'s'[: info['threads'] != 1]}"
    return Entry(
        name=name,
        metric=f"{split} {metric}",
        value=value,
        interval=None if interval is None or None in interval else tuple(interval),
        samples=report["n"],
        trainable=everything["trainable"],
        share=everything["share"],
        step_ms=1000 * batch / median(record["samples_per_s"] for record in epochs),
        memory_mb=max(filter(None, (record["memory_mb"] for record in epochs)), default=None),
        best_epoch=epochs[-1]["best_epoch"],
        device=info["device"] + (threads if info["device"] == "cpu" else ""),
    )


def comparison_notes(entries: list[Entry], devices: list[str]) -> list[str]:
    """What to know about the numbers."""
    lines = [NOTE if len(devices) > 1 else f"{NOTE} Device: {devices[0]}."]
    counts = sorted({entry.samples for entry in entries})
    if len(counts) > 1:
        lines.append(f"The runs were judged on different samples: {', '.join(map(str, counts))}.")
    return lines


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows as an aligned Markdown table; numbers to the right."""
    texts = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for cells in [texts[0], rules, *texts[1:]]:
        sides = zip(cells, widths, strict=True)
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(sides)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)
