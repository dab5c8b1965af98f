"""Task probe: k nearest neighbours and linear models on precomputed features.

N samples, D width, K classes or targets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glovita_lib import dist, files, plots, prediction_csv
from glovita_lib.datasets import Data, Split, build_data
from glovita_lib.facts import check_metrics
from glovita_lib.feature_sources import BagSource, VectorSource
from glovita_lib.metric_names import DEFAULT_METRICS, logged_names, lower_is_better
from glovita_lib.metrics import compute, report
from glovita_lib.probe import fit_linear, knn_scores, one_hot
from glovita_lib.progress import better, say, table
from glovita_lib.results import summary_lines
from glovita_lib.rundir import RunDir, decide, locate, runtime_info
from glovita_lib.spec import Loaded, UserError, dump
from glovita_lib.spec_train import Probe

BLOCK = 65536  # samples that are read from the file at a time


@dataclass(frozen=True)
class Samples:
    """A split in memory."""

    features: Tensor  # (N, D) in the file's float type
    targets: np.ndarray  # (N,) or (N, K)
    ids: list[str]


@dataclass(frozen=True)
class Fitted:
    """A probe as it was chosen, with its scores of the held-out splits."""

    chosen: dict[str, Any]
    candidates: list[dict[str, Any]]  # what it was chosen from, with metrics of val
    scores: dict[str, np.ndarray]  # split -> (N, K)


def run(loaded: Loaded, *, dry_run: bool) -> None:
    """Fit the probes of a spec and write what they predict; a dry run only reads the data."""
    with dist.session() as ranks:
        if ranks.is_main:  # one process; the others have nothing to do
            if dry_run:
                rehearse(loaded)
            else:
                probe(loaded, ranks)
        dist.barrier(ranks)


def rehearse(loaded: Loaded) -> None:
    """Read the data and say what is there."""
    data, samples = read(loaded)
    sizes = ", ".join(f"{name} {tuple(part.features.shape)}" for name, part in samples.items())
    say(f"dry run passed: {data.subtask} of {data.outputs}, {sizes}; nothing was written")


def probe(loaded: Loaded, ranks: dist.Ranks) -> None:
    """All probes of a spec."""
    root = loaded.root
    run, decision = decide(locate(loaded), loaded)
    if decision != "finished":
        data, samples = read(loaded)
        with run.opened(ranks, overwrite=True):
            files.write_text(run.spec, dump(root))
            files.write_json(run.config, loaded.plain)
            run.note_start(runtime_info(ranks, seed=root.seed))
            content = {}
            for method in root.task.methods:
                fitted = fit(method, root.task, data, samples, ranks.device)
                content[method] = write(run, method, root, data, samples, fitted)
            files.write_json(run.path / "metrics_probe.json", content)
            run.mark_finished()
    show(run, decision)


def read(loaded: Loaded) -> tuple[Data, dict[str, Samples]]:
    """The splits in memory, bags averaged.

    Raises:
        UserError: samples are no features, there is no val split to choose on, or a metric is not
            defined for the targets.
    """
    data = build_data(loaded.root.data, seed=loaded.root.seed)
    check_metrics(loaded.root.task.metrics, data.subtask)
    source = data.splits["train"].source
    if not isinstance(source, VectorSource | BagSource):
        raise UserError(
            f'task.objective = "probe" judges features, but data set {data.name} has images: write'
            ' them with mode = "extract" and set data.dataset = "precomputed_features"'
        )
    if not len(data.splits.get("val") or ()):
        raise UserError(
            'task.objective = "probe" chooses k and l2 on val, but there is no val split: give'
            " data.val_features_file"
        )
    samples = {
        name: Samples(gather(split), split.targets, split.ids)
        for name, split in data.splits.items()
        if len(split)
    }
    return data, samples


def gather(split: Split) -> Tensor:
    """Features (N, D) of a split; of bags their means."""
    source, parts = split.source, []
    for start in range(0, len(split), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(split)))
        fetched = source.fetch(rows)
        if isinstance(source, BagSource):
            fetched = np.stack([bag.mean(0, dtype=np.float32) for bag in fetched])
        parts.append(torch.from_numpy(fetched))
    return torch.cat(parts)


# ---------------------------------------------------------------------- fitting


def fit(
    method: str, task: Probe, data: Data, samples: dict[str, Samples], device: torch.device
) -> Fitted:
    """Every candidate of a method, and the best of them on val by the first metric."""
    names = task.metrics or DEFAULT_METRICS[data.subtask]
    decisive = logged_names(names[:1], data.class_names)[0]
    kind = {"subtask": data.subtask, "class_names": data.class_names}
    candidates, best = [], None
    for setting, scores in candidates_of(method, task, data, samples, device):
        metrics = compute(names, targets=samples["val"].targets, scores=scores["val"], **kind)
        candidates.append({**setting, "val": metrics})
        if best is None or better(metrics[decisive], best[0], decisive):
            best = (metrics[decisive], setting, scores)
    chosen = {
        **best[1],
        "by": decisive,
        "lowest" if lower_is_better(decisive) else "highest": best[0],
    }
    return Fitted(chosen, candidates, best[2])


def candidates_of(
    method: str, task: Probe, data: Data, samples: dict[str, Samples], device: torch.device
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Settings of a method with the scores (N, K) they give for val and test."""
    train = samples["train"]
    targets = one_hot(torch.from_numpy(train.targets), data.outputs, data.subtask)
    held_out = {name: part for name, part in samples.items() if name != "train"}
    if method == "knn":
        ks = sorted({min(k, len(train.ids)) for k in task.k})  # no more neighbours than there are
        scores = {
            name: knn_scores(
                part.features.to(device),
                train.features.to(device),
                targets.to(device),
                ks=tuple(ks),
                metric=task.distance,
                temperature=task.temperature,
            )
            for name, part in held_out.items()
        }
        for k in ks:
            yield {"k": k}, {name: found[k].cpu().numpy() for name, found in scores.items()}
        return
    for strength, model in fit_linear(
        train.features,
        targets,
        subtask=data.subtask,
        l2=task.l2,
        standardize=task.standardize,
        max_iterations=task.max_iterations,
    ):
        setting = {"l2": strength, "iterations": model.iterations, "converged": model.converged}
        yield (
            setting,
            {n: model.scores(p.features, data.subtask).numpy() for n, p in held_out.items()},
        )


# ---------------------------------------------------------------------- results


def write(
    run: RunDir, method: str, root: Any, data: Data, samples: dict[str, Samples], fitted: Fitted
) -> dict[str, Any]:
    """Predictions and plots of a probe; what metrics_probe.json says of it."""
    task = root.task
    names = task.metrics or DEFAULT_METRICS[data.subtask]
    kind = {"subtask": data.subtask, "class_names": data.class_names}
    content: dict[str, Any] = {"chosen": fitted.chosen, "candidates": fitted.candidates}
    for split, scores in fitted.scores.items():
        targets = samples[split].targets
        name = f"{method}_{split}"
        prediction_csv.write_predictions(
            run.predictions_of(name), ids=samples[split].ids, targets=targets, scores=scores, **kind
        )
        content[split] = report(
            names, targets=targets, scores=scores, bootstrap=task.bootstrap, seed=root.seed, **kind
        )
        if task.result_plot != "none":
            plots.plot_results(run.plots, name, targets=targets, scores=scores, **kind)
    return content


def show(run: RunDir, decision: str) -> None:
    """What came out and where it is."""
    content = files.read_json(run.path / "metrics_probe.json")
    rows = []
    for method, found in content.items():
        setting = ", ".join(f"{k} {v}" for k, v in found["chosen"].items() if k in ("k", "l2"))
        reports = {
            f"{method} ({setting}) {split}": {**found[split], "loss": None}
            for split in ("val", "test")
            if split in found
        }
        rows += summary_lines(reports)
    rows.append(("metrics", str(run.path / "metrics_probe.json")))
    rows.append(("predictions", str(run.path / "predictions_<method>_<split>.csv")))
    what = "was finished before; nothing to do" if decision == "finished" else "is finished"
    say(f"{run.path} {what}\n{table(rows)}")
