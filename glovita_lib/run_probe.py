"""Task probe: k nearest neighbours and linear models on precomputed features.

N samples, D width, K classes or targets.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glovita_lib import checkpoint, dist, files, plots, prediction_csv
from glovita_lib.datasets import Data, Split, build_data
from glovita_lib.facts import check_metrics
from glovita_lib.feature_sources import BagSource, VectorSource, feature_moments
from glovita_lib.metric_names import DEFAULT_METRICS, logged_names, lower_is_better
from glovita_lib.metrics import compute, report
from glovita_lib.neighbors import nearest
from glovita_lib.probe import Linear, fit_linear, knn_scores, resident
from glovita_lib.progress import better, say, table
from glovita_lib.results import summary_lines
from glovita_lib.rundir import RunDir, decide, locate, remove, runtime_info
from glovita_lib.spec import Loaded, UserError, dump
from glovita_lib.spec_features import PrecomputedData
from glovita_lib.spec_train import Probe

READ_BYTES = 2**26  # of the file, that are read at a time


@dataclass(frozen=True)
class Samples:
    """A split in memory."""

    features: Tensor  # (N, D) in the file's float type; float32 where bags or standardised
    targets: np.ndarray  # (N,) or (N, K)
    ids: list[str]


@dataclass(frozen=True)
class Fitted:
    """A probe as it was chosen, with its scores of the held-out splits."""

    chosen: dict[str, Any]
    candidates: list[dict[str, Any]]  # what it was chosen from, with metrics of val
    scores: dict[str, np.ndarray]  # split -> (N, K)


def run(loaded: Loaded, *, dry_run: bool) -> None:
    """Fit the probes of a spec and write what they predict; a dry run only reads the data.

    Raises:
        UserError: torchrun has started several processes, all but one of which would wait.
    """
    with dist.session() as ranks:
        if ranks.world > 1:
            raise UserError("a probe runs in one process: start it without torchrun")
        if dry_run:
            rehearse(loaded)
        else:
            probe(loaded, ranks)


def rehearse(loaded: Loaded) -> None:
    """Read the data and say what is there."""
    data, samples = read(loaded)
    sizes = ", ".join(f"{name} {tuple(part.features.shape)}" for name, part in samples.items())
    say(f"dry run passed: {data.subtask} of {data.outputs}, {sizes}; nothing was written")


def probe(loaded: Loaded, ranks: dist.Ranks) -> None:
    """All probes of a spec, from wherever an earlier start of the run was stopped."""
    root = loaded.root
    run, decision = decide(locate(loaded), loaded)
    if decision != "finished":
        data, samples = read(loaded)
        with run.opened(ranks, overwrite=decision == "overwrite"):
            files.write_text(run.spec, dump(root))
            files.write_json(run.config, loaded.plain)
            run.note_start(runtime_info(ranks, seed=root.seed))
            device = with_float64(ranks.device)
            state = State.read(run.last, samples, device)
            # once for both methods and all splits
            samples["train"] = moved(samples["train"], device)
            for method in root.task.methods:
                if method not in state.finished:
                    fitted = fit(method, root.task, data, samples, device, state)
                    state.finish(method, write(run, method, root, data, samples, fitted))
            content = {method: state.finished[method] for method in root.task.methods}
            files.write_json(run.path / "metrics_probe.json", content)
            run.mark_finished()
            if run.checkpoints.exists():
                remove(run.checkpoints)
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
    spec = loaded.root.data
    scaled = isinstance(spec, PrecomputedData) and spec.standardize
    scale = feature_moments(source) if scaled else None
    samples = {
        name: Samples(gather(split, scale), split.targets, split.ids)
        for name, split in data.splits.items()
        if len(split)
    }
    return data, samples


def gather(split: Split, scale: tuple[np.ndarray, np.ndarray] | None) -> Tensor:
    """Features (N, D) of a split, of bags their means, minus mean over deviation of `scale`."""
    source, bags = split.source, isinstance(split.source, BagSource)
    width = source.reader.width if bags else source.uniform[0]
    kind = np.float32 if bags or scale is not None else source.vectors.dtype
    features = np.empty((len(split), width), kind)
    size = 1 if bags else max(1, READ_BYTES // source.vectors.row_bytes)
    for start in range(0, len(split), size):
        fetched = source.fetch(np.arange(start, min(start + size, len(split))))
        block = fetched[0].mean(0, dtype=np.float64)[None] if bags else fetched
        if scale is not None:
            block = (block - scale[0]) / scale[1]
        features[start : start + size] = block
    return torch.from_numpy(features)


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU in the place of mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def moved(samples: Samples, device: torch.device) -> Samples:
    """Samples with their features on the device, where they fit."""
    return replace(samples, features=resident(samples.features, device))


# ---------------------------------------------------------------------- where a run stands


@dataclass
class State:
    """What a run that was stopped goes on from: finished methods, and of the linear models those
    that are fitted, of which the best one and the last one, where the next one starts, are kept."""

    path: Path
    shapes: dict[str, list[int]]  # split -> N, D
    finished: dict[str, Any] = field(default_factory=dict)  # method -> part of metrics_probe.json
    candidates: list[dict[str, Any]] = field(default_factory=list)
    best: Linear | None = None
    last: Linear | None = None

    @classmethod
    def read(cls, path: Path, samples: dict[str, Samples], device: torch.device) -> "State":
        """The state of a run, or that of one that begins.

        Raises:
            UserError: the run was started with other features.
        """
        shapes = {name: list(part.features.shape) for name, part in samples.items()}
        if not path.is_file():
            return cls(path, shapes)
        kept = checkpoint.load(path, device)
        if kept["shapes"] != shapes:
            raise UserError(
                f"{path} is of features of other sizes: the files have changed since the run was"
                ' started; set training.on_existing = "overwrite" to start over'
            )
        models = {name: kept[name] and Linear(**kept[name]) for name in ("best", "last")}
        return cls(path, shapes, kept["finished"], kept["candidates"], **models)

    def save(self) -> None:
        """Write it, whole or not at all."""
        models = {
            name: None if model is None else asdict(model)
            for name, model in (("best", self.best), ("last", self.last))
        }
        done = {"finished": self.finished, "candidates": self.candidates}
        checkpoint.save(self.path, {"shapes": self.shapes, **done, **models})

    def finish(self, method: str, content: dict[str, Any]) -> None:
        """Note the results of a method; its models are no longer needed."""
        self.finished[method] = files.plain(content)
        self.candidates, self.best, self.last = [], None, None
        self.save()


# ---------------------------------------------------------------------- fitting


@dataclass
class Choice:
    """Candidates of a method, the best of them on val by the first metric."""

    names: tuple[str, ...]
    data: Data
    targets: np.ndarray  # of val
    candidates: list[dict[str, Any]]

    @property
    def decisive(self) -> str:
        """The metric that chooses, as logged."""
        return logged_names(self.names[:1], self.data.class_names)[0]

    @property
    def best(self) -> int | None:
        """Number of the first of the best candidates; the first one where none has a metric."""
        best, chosen = None, 0
        for number, candidate in enumerate(self.candidates):
            value = candidate["val"][self.decisive]
            if better(value, best, self.decisive):
                best, chosen = value, number
        return chosen if self.candidates else None

    def add(self, setting: dict[str, Any], scores: Tensor) -> bool:
        """Note a candidate with its scores (N, K) of val; whether it is the best so far."""
        metrics = compute(
            self.names,
            subtask=self.data.subtask,
            targets=self.targets,
            scores=scores.cpu().numpy(),
            class_names=self.data.class_names,
        )
        self.candidates.append({**setting, "val": metrics})
        return self.best == len(self.candidates) - 1

    def fitted(self, scores: dict[str, Tensor]) -> Fitted:
        """The best candidate, with its scores of each split."""
        setting = dict(self.candidates[self.best])
        value = setting.pop("val")[self.decisive]
        extreme = "lowest" if lower_is_better(self.decisive) else "highest"
        chosen = {**setting, "by": self.decisive, extreme: value}
        arrays = {name: found.cpu().numpy() for name, found in scores.items()}
        return Fitted(chosen, self.candidates, arrays)


def fit(
    method: str,
    task: Probe,
    data: Data,
    samples: dict[str, Samples],
    device: torch.device,
    state: State,
) -> Fitted:
    """Every candidate of a method, and the best of them on val by the first metric."""
    names = task.metrics or DEFAULT_METRICS[data.subtask]
    choice = Choice(names, data, samples["val"].targets, state.candidates)
    if method == "knn":
        return fit_knn(task, samples, device, choice)
    return fit_models(task, samples, device, choice, state)


def held_out(samples: dict[str, Samples]) -> dict[str, Samples]:
    """The splits that are predicted."""
    return {name: part for name, part in samples.items() if name != "train"}


def fit_knn(
    task: Probe, samples: dict[str, Samples], device: torch.device, choice: Choice
) -> Fitted:
    """Votes of the neighbours, which are looked for once, for the largest k."""
    train = samples["train"]
    ks = sorted({min(k, len(train.ids)) for k in task.k})  # no more neighbours than there are
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
    targets = torch.from_numpy(train.targets).to(near["val"][1].device)

    def scores(name: str, k: int) -> Tensor:
        distances, indices = near[name]
        return knn_scores(
            distances[:, :k],
            indices[:, :k],
            targets,
            outputs=choice.data.outputs,
            temperature=task.temperature,
        )

    for k in ks:
        choice.add({"k": k}, scores("val", k))
    return choice.fitted({name: scores(name, ks[choice.best]) for name in near})


def fit_models(
    task: Probe, samples: dict[str, Samples], device: torch.device, choice: Choice, state: State
) -> Fitted:
    """Linear models from the strongest L2 on, without those that the run has fitted before."""
    subtask, train = choice.data.subtask, samples["train"]
    done, count = len(choice.candidates), len(task.l2)
    started = time.perf_counter()
    for strength, model in fit_linear(
        train.features,
        torch.from_numpy(train.targets),
        outputs=choice.data.outputs,
        subtask=subtask,
        l2=sorted(task.l2, reverse=True)[done:],
        standardize=task.standardize,
        max_iterations=task.max_iterations,
        device=device,
        start=None if state.last is None else state.last.solution,
    ):
        setting = {"l2": strength, "iterations": model.iterations, "converged": model.converged}
        if choice.add(setting, model.scores(samples["val"].features, subtask)):
            state.best = model
        state.last = model
        state.save()
        done, seconds = done + 1, time.perf_counter() - started
        started += seconds
        value = choice.candidates[-1]["val"][choice.decisive]
        say(
            f"linear: l2 {strength:g} ({done} of {count}): val {choice.decisive} {value:.4f},"
            f" {model.iterations} iterations, {seconds:,.1f} s; about"
            f" {(count - done) * seconds:,.0f} s left"
        )
    parts = held_out(samples)
    return choice.fitted({n: state.best.scores(p.features, subtask) for n, p in parts.items()})


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
