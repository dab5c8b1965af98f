"""Task probe: neighbours and linear models on features, random kernels on time series."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from glovita_lib import dist, files, plots, results
from glovita_lib.data import Data, Source, Standardizer, column_means, outputs_line
from glovita_lib.datasets import build_data
from glovita_lib.errors import UserError, listed, refuse
from glovita_lib.loggers import Share, better, decimal, say, say_notes, two_columns, write_notes
from glovita_lib.metric_names import logged_names, lower_is_better, uses_order, usual_metrics
from glovita_lib.metrics import compute, metrics_report, undefined, undefined_line
from glovita_lib.metrics_classification import Scores
from glovita_lib.neighbors import nearest
from glovita_lib.prediction_files import all_scores, write_prediction_files
from glovita_lib.probe_models import fit_linear, knn_scores, resident
from glovita_lib.read_features import BagSource, VectorSource, feature_scale
from glovita_lib.resolved import data_taken
from glovita_lib.rundir import RunDir, opened, runtime_info
from glovita_lib.spec import Loaded
from glovita_lib.spec_data import features_of
from glovita_lib.spec_root import Root, head_is_named
from glovita_lib.spec_train import Probe

# N samples, D width, K classes or targets.

READ_BYTES = 2**26  # of the file, that are read at a time


@dataclass(frozen=True)
class ProbeSplit:
    """A split in memory."""

    features: Tensor  # (N, D) in the file's float type; float64 means of bags; float32 standardised
    targets: np.ndarray  # (N,) or (N, K)
    ids: list[str]
    series: list[np.ndarray] = field(default_factory=list)
    """Time series (C, T), whose features kernels give."""


@dataclass(frozen=True)
class FittedProbe:
    """A probe as it was chosen, with its scores of the held-out splits."""

    chosen: dict[str, Any]
    candidates: list[dict[str, Any]]  # what it was chosen from, with metrics of val
    scores: dict[str, Scores]  # split -> (N, K)


def run(loaded: Loaded[Root], *, dry_run: bool) -> None:
    """Fit the probes of a spec and write what they predict; a dry run only reads the data.

    Raises:
        UserError: torchrun has started several processes, all but one of which would wait.
    """
    with dist.session() as ranks:
        if ranks.world > 1:
            raise UserError("a probe runs in one process: start it without torchrun")
        if not dry_run:
            probe(loaded, ranks)
            return
        data, samples = read(loaded)
        assert isinstance(loaded.root.task, Probe)  # whose learnt_by names this module
        say_noted(loaded.root.task, data, samples, None)
        shapes = {n: f"({len(p.ids)}, {p.features.shape[1] or 'T'})" for n, p in samples.items()}
        sizes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        say(f"dry run passed: {data.subtask} of {data.outputs}, {sizes}; nothing was written")


def probe(loaded: Loaded[Root], ranks: dist.Ranks) -> None:
    """All probes of a spec; what an earlier start left unfinished is done again."""
    root, task = loaded.root, loaded.root.task
    assert isinstance(task, Probe)  # whose learnt_by names this module
    with opened(loaded, ranks) as (run, decision):
        if decision != "finished":
            data, samples = read(loaded)
            introduce(run, task, data)
            say_noted(task, data, samples, run.notes)
            run.clean(ranks, decision)
            run.write_spec(loaded)
            write_notes(run.notes, data.report)
            files.write_json(run.resolved_config, values_taken(root, task, data, samples, ranks))
            run.note_start(runtime_info(ranks, seed=root.seed))
            content = fit_methods(task, data, samples, run, ranks, seed=root.seed)
            files.write_json(run.path / "metrics_probe.json", content)
            run.mark_finished()
    show_results(run, decision)


def values_taken(
    root: Root, task: Probe, data: Data, samples: dict[str, ProbeSplit], ranks: dist.Ranks
) -> dict[str, Any]:
    """What a probe takes where its spec leaves it open, as builtin types; what it is set to in the
    end is chosen on val, see metrics_probe.json."""
    train = samples["train"]
    methods = {
        "methods": list(task.methods),
        "k": neighbours_of(task, len(train.ids)) if task.asks_neighbours else None,
        "l2": sorted(task.l2, reverse=True) if task.asks_linear_model else None,
        "alphas": list(task.alphas) if task.asks_kernels else None,
    }
    return {
        "dataset": data.name,
        "subtask": data.subtask,
        "class_names": list(data.class_names),
        "ordered": data.has_order,
        "samples": {name: len(split) for name, split in data.splits.items()},
        "inputs": msgspec.to_builtins(data.samples),
        "metrics": list(task.metrics or usual_metrics(data.subtask)),
        "number_names": data.number_names,
        "taken": {
            "device": str(computing(ranks)),
            "ranks": ranks.world,
            "data": data_taken(root.data, data),
            "task": methods,
            "add_log": root.add_log,
        },
    }


def neighbours_of(task: Probe, count: int) -> list[int]:
    """Numbers of neighbours to choose from among so many train samples."""
    return sorted({min(k, count) for k in task.k})


def computing(ranks: dist.Ranks) -> torch.device:
    """The device that probes compute on: mps has no float64."""
    return torch.device("cpu") if ranks.device.type == "mps" else ranks.device


def introduce(run: RunDir, task: Probe, data: Data) -> None:
    """Print data, classes and directory of the run."""
    ordered = uses_order(task.metrics or usual_metrics(data.subtask))
    line = outputs_line(data.subtask, data.class_names, ordered=ordered)
    say(two_columns([("data", f"{data.name}: {data.sizes_text}"), line, ("run", str(run.path))]))


def say_noted(task: Probe, data: Data, samples: dict[str, ProbeSplit], whole: Path | None) -> None:
    """What was noted about the data; which metrics the targets of val, if any, cannot define.

    Args:
        whole: see `say_notes`.
    """
    say_notes(data.report, whole)
    if "val" not in samples:
        return
    names, targets = task.metrics or usual_metrics(data.subtask), samples["val"].targets
    lost = undefined(names, subtask=data.subtask, targets=targets, class_names=data.class_names)
    notes = [undefined_line(lost)] if lost else []
    if logged_names(names[:1], data.class_names)[0] in lost and not task.asks_kernels:
        by = f"task.metrics chooses by {names[0]}, which is among them"
        notes.append(f"{by}: nothing can be chosen, the smallest k and the largest l2 are taken")
    say_notes(notes)


def fit_methods(
    task: Probe,
    data: Data,
    samples: dict[str, ProbeSplit],
    run: RunDir,
    ranks: dist.Ranks,
    *,
    seed: int,
) -> dict[str, Any]:
    """What metrics_probe.json says of each method, whose predictions and plots are written."""
    device = computing(ranks)
    # once for both methods and all splits
    train = samples["train"]
    samples["train"] = replace(train, features=resident(train.features, device))
    names = task.metrics or usual_metrics(data.subtask)
    content: dict[str, Any] = {}
    for method in task.methods:
        choice = Choice(names, data, train.targets, samples.get("val", train).targets)
        if task.asks_kernels:  # without val
            fitted = fit_kernels(task, method, samples, choice, seed=seed, device=device)
        else:
            fitted = (fit_knn if method == "knn" else fit_models)(task, samples, device, choice)
        content[method] = write_probe(run, method, task, data, samples, fitted, seed)
    return content


def read(loaded: Loaded[Root]) -> tuple[Data, dict[str, ProbeSplit]]:
    """The splits in memory, bags averaged.

    Raises:
        UserError: samples are no features, there is no val split to choose on, or a metric is not
            defined for the targets.
    """
    predicts = loaded.root.model.head.only_predicts(named=head_is_named(loaded))
    data = build_data(loaded.root.data, seed=loaded.root.seed, predicts=predicts)
    task, kind = loaded.root.task, data.samples.spec_kind
    problems = [*task.target_problems(data.subtask), *task.sample_problems(kind)]
    if not problems and not data.has_order:
        problems += task.order_problems(listed(data.class_names))
    refuse("task", problems)
    if kind == "series":
        return data, series_samples(data)
    if kind != "features":
        raise UserError(
            f'task.objective = "probe" judges features and series, but data set {data.name} has'
            f' {data.samples.kind}: write them with mode = "extract" and set data.dataset ='
            ' "precomputed_features"'
        )
    if not len(data.splits.get("val") or ()):
        raise UserError(
            'task.objective = "probe" chooses k and l2 on val, but there is no val split: give'
            " data.val_features_file"
        )
    scale = None
    if features_of(loaded.root.data).standardize:
        source = data.splits["train"].source
        assert isinstance(source, VectorSource | BagSource)  # those of precomputed features
        scale = feature_scale(source)
    samples = {}
    for name, split in data.splits.items():
        assert split.targets is not None  # build_data refuses to train without labels
        samples[name] = ProbeSplit(
            gather_features(split.source, len(split), scale), split.targets, split.ids
        )
    return data, samples


def series_samples(data: Data) -> dict[str, ProbeSplit]:
    """The splits of time series in memory.

    Raises:
        UserError: there is nothing to predict.
    """
    from glovita_lib.data_series import series_of  # probes of features do without it

    if data.splits.keys() <= {"train"}:
        raise UserError(
            'task.objective = "probe": there is no val or test to predict; name data.test_file, or'
            " draw a val with data.val_fraction"
        )
    samples = {}
    for name, split in data.splits.items():
        assert split.targets is not None  # build_data refuses to train without labels
        own = series_of(data, name)
        samples[name] = ProbeSplit(torch.empty(0, 0), split.targets, split.ids, own)
    return samples


def gather_features(source: Source, count: int, scale: Standardizer | None) -> Tensor:
    """Features (N, D) of the N = count samples of a source, of bags their float64 means,
    standardised to float32 by `scale`. Without it float64 stays: float32 would round what a probe
    has yet to standardise, or what tells neighbours apart."""
    size = max(1, READ_BYTES // source.vectors.row_bytes) if isinstance(source, VectorSource) else 1
    features = np.empty((0, 0), np.float32)
    for start in range(0, count, size):
        part = source.fetch(np.arange(start, min(start + size, count)))
        block = column_means(part[0])[None] if isinstance(part, list) else part
        if scale is not None:
            block = scale(torch.from_numpy(block)).numpy()
        if not len(features):
            features = np.empty((count, block.shape[1]), block.dtype)
        features[start : start + size] = block
    return torch.from_numpy(features)


# ---------------------------------------------------------------------- fitting


ScoresOf = Callable[[np.ndarray, str], Scores]


@dataclass
class Choice:
    """Candidates of a method, the best of them on val by the first metric."""

    names: tuple[str, ...]
    data: Data
    train_targets: np.ndarray
    targets: np.ndarray  # of val
    candidates: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def scale(self) -> Standardizer | None:
        """What the targets of a regression are standardised by, so that no digit is lost in the
        float32 of scores; ridge regression and neighbours give the same predictions."""
        is_regression = self.data.subtask == "regression"
        return Standardizer.of_array(self.train_targets) if is_regression else None

    @property
    def learnt(self) -> Tensor:
        """The train targets as a probe learns them."""
        scale, targets = self.scale, self.train_targets
        return torch.from_numpy(targets if scale is None else scale.standardized(targets))

    def scores_of(self, outputs: Tensor, made_of: ScoresOf = Scores.of_logits) -> Scores:
        """Those of logits (N, K), or of outputs of a regression."""
        values = outputs.cpu().numpy()
        values = values if self.scale is None else self.scale.restored(values)
        return made_of(values, self.data.subtask)

    @property
    def decisive(self) -> str:
        """The metric that chooses, as logged."""
        return logged_names(self.names[:1], self.data.class_names)[0]

    @property
    def best(self) -> int:
        """Number of the first of the best candidates; the first one where none has a metric."""
        best, chosen = None, 0
        for number, candidate in enumerate(self.candidates):
            value = candidate["val"][self.decisive]
            if better(value, best, self.decisive):
                best, chosen = value, number
        return chosen

    def add(self, setting: dict[str, Any], scores: Scores) -> bool:
        """Note a candidate with its scores (N, K) of val; whether it is the best so far."""
        metrics = compute(
            self.names,
            subtask=self.data.subtask,
            targets=self.targets,
            scores=scores,
            class_names=self.data.class_names,
        )
        self.candidates.append({**setting, "val": metrics})
        return self.best == len(self.candidates) - 1

    def fitted(self, scores: dict[str, Scores]) -> FittedProbe:
        """The best candidate, with its scores of each split."""
        setting = dict(self.candidates[self.best])
        value = setting.pop("val")[self.decisive]
        extreme = "lowest" if lower_is_better(self.decisive) else "highest"
        # without a value nothing was chosen: the setting is the first one
        by = {"by": None} if math.isnan(value) else {"by": self.decisive, extreme: value}
        return FittedProbe({**setting, **by}, self.candidates, scores)


def held_out(samples: dict[str, ProbeSplit]) -> dict[str, ProbeSplit]:
    """The splits that are predicted."""
    return {name: part for name, part in samples.items() if name != "train"}


def fit_knn(
    task: Probe, samples: dict[str, ProbeSplit], device: torch.device, choice: Choice
) -> FittedProbe:
    """Votes of the neighbours, which are looked for once, for the largest k."""
    train = samples["train"]
    ks = neighbours_of(task, len(train.ids))  # no more than there are
    near = {}
    for name, part in held_out(samples).items():
        started = time.perf_counter()
        near[name] = nearest(
            part.features,
            train.features,
            ks[-1],
            task.distance,
            exclude_self=False,
            device=device,
        )
        seconds = time.perf_counter() - started
        say(f"knn: neighbours of {len(part.ids):,} {name} samples in {seconds:,.1f} s")
    targets = choice.learnt.to(near["val"][1].device)

    def scores(name: str, k: int) -> Scores:
        distances, indices = near[name]
        votes = knn_scores(
            distances[:, :k],
            indices[:, :k],
            targets,
            outputs=choice.data.outputs,
            temperature=task.temperature,
        )
        return choice.scores_of(votes, Scores.of_probabilities)

    for k in ks:
        choice.add({"k": k}, scores("val", k))
    return choice.fitted({name: scores(name, ks[choice.best]) for name in near})


def fit_models(
    task: Probe, samples: dict[str, ProbeSplit], device: torch.device, choice: Choice
) -> FittedProbe:
    """Linear models from the strongest L2 on."""
    subtask, train = choice.data.subtask, samples["train"]
    count = len(task.l2)
    started = time.perf_counter()
    for done, (strength, model) in enumerate(
        fit_linear(
            train.features,
            choice.learnt,
            outputs=choice.data.outputs,
            subtask=subtask,
            l2=sorted(task.l2, reverse=True),
            standardize=task.standardize,
            max_iterations=task.max_iterations,
            device=device,
        ),
        1,
    ):
        setting = {"l2": strength, "iterations": model.iterations, "converged": model.converged}
        if choice.add(setting, choice.scores_of(model.logits(samples["val"].features))):
            best = model
        seconds = time.perf_counter() - started
        started += seconds
        value = choice.candidates[-1]["val"][choice.decisive]
        shown = "undefined" if math.isnan(value) else decimal(value)
        say(
            f"linear: l2 {strength:g} ({done} of {count}): val {choice.decisive} {shown},"
            f" {model.iterations} iterations, {seconds:,.1f} s; about"
            f" {(count - done) * seconds:,.0f} s left"
        )
    parts = held_out(samples)
    return choice.fitted({n: choice.scores_of(best.logits(p.features)) for n, p in parts.items()})


def fit_kernels(
    task: Probe, method: str, samples: dict[str, ProbeSplit], choice: Choice, **how: Any
) -> FittedProbe:
    """A ridge on features of random kernels; `how` is the seed and the device."""
    from glovita_lib.series_kernels import judge  # probes of features do without it

    started = time.perf_counter()
    series, data = {name: part.series for name, part in samples.items()}, choice.data
    ridge, logits = judge(
        method, series, choice.learnt, data.subtask, task.alphas, outputs=data.outputs, **how
    )
    say(
        f"{method}: {len(ridge.weight):,} features of {sum(map(len, series.values())):,} series,"
        f" alpha {ridge.alpha:.3g}, in {time.perf_counter() - started:,.1f} s"
    )
    chosen = {"alpha": ridge.alpha, "by": "leave-one-out", "lowest": ridge.error}
    scores = {name: choice.scores_of(found) for name, found in logits.items()}
    return FittedProbe(chosen, ridge.candidates, scores)


# ---------------------------------------------------------------------- results


def write_probe(
    run: RunDir,
    method: str,
    task: Probe,
    data: Data,
    samples: dict[str, ProbeSplit],
    fitted: FittedProbe,
    seed: int,
) -> dict[str, Any]:
    """Predictions and plots of a probe; what metrics_probe.json says of it."""
    names = task.metrics or usual_metrics(data.subtask)
    content: dict[str, Any] = {"chosen": fitted.chosen, "candidates": fitted.candidates}
    for split, scores in fitted.scores.items():
        targets = samples[split].targets
        name = f"{method}_{split}"
        write_prediction_files(
            run.predictions_of(name),
            ids=samples[split].ids,
            targets=targets,
            scores=scores,
            subtask=data.subtask,
            class_names=data.class_names,
        )
        content[split] = metrics_report(
            names,
            subtask=data.subtask,
            targets=targets,
            scores=scores,
            class_names=data.class_names,
            bootstrap=task.bootstrap,
            seed=seed,
            tell=Share(f"intervals of {method} on {split}"),
        )
        if task.result_plot != "none":
            plots.plot_results(
                run.plots,
                name,
                subtask=data.subtask,
                targets=targets,
                scores=scores,
                class_names=data.class_names,
            )
    return content


def show_results(run: RunDir, decision: str) -> None:
    """What came out and where it is."""
    content = files.read_json(run.path / "metrics_probe.json")
    rows = []
    for method, found in content.items():
        chosen = found["chosen"]
        setting = ", ".join(f"{k} {v:.6g}" for k, v in chosen.items() if k in ("k", "l2", "alpha"))
        setting += ", not chosen: undefined on val" * (chosen["by"] is None)
        reports = {
            f"{method} ({setting}) {split}": {**found[split], "loss": None}
            for split in ("val", "test")
            if split in found
        }
        rows += results.summary_lines(reports)
    rows.append(("metrics", str(run.path / "metrics_probe.json")))
    table = run.path / "predictions_<method>_<split>.csv"
    rows.append(("predictions", str(table)))
    if any(run.path.glob(all_scores(table).name.replace("<method>_<split>", "*"))):
        rows.append(("scores", str(all_scores(table))))
    what = "was finished before; nothing to do" if decision == "finished" else "is finished"
    say(f"{run.path} {what}\n{two_columns(rows)}")
