"""Objectives: loss and evaluation of a task.

B batch, N samples of a split, D width of a feature, K classes or targets.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from glovita_lib.augment import Augmenter, mixed_series, mixup_cutmix, mixup_draws
from glovita_lib.data import Data, Split, Standardizer, subset
from glovita_lib.dist import Ranks, autocast, gather_rows, hash_seed
from glovita_lib.errors import UserError
from glovita_lib.loader import Batch, Loader, Resizing
from glovita_lib.losses import build_criterion, plain_criterion
from glovita_lib.metrics import Samples, samples_of, values_of
from glovita_lib.metrics_classification import Scores
from glovita_lib.model import logits_of
from glovita_lib.resolved import ImageInputs, Inputs, Resolved, SeriesInputs
from glovita_lib.spec import ByStruct, Spec
from glovita_lib.spec_samples import UNLABELLED
from glovita_lib.spec_train import LabelTask, Supervised

# -------------------------------------------------------------------------------- objectives


@dataclass(frozen=True, slots=True)
class BatchRng:
    """Random streams of a training batch: functions of its place in the run alone, the same on any
    number of ranks."""

    seed: int
    epoch: int
    place: int  # of its first sample in the order of the epoch

    def stream(self, which: int) -> int:
        """Seed of one of the random streams of this batch."""
        return hash_seed(self.seed, self.epoch, self.place, which)


class Objective(ABC):
    """Loss and evaluation of one task; the trainer knows nothing else about the task.

    Subclasses set `train_inputs` and `eval_inputs`, which make the encoder's input of a batch on
    the device; their attribute `fit` crops and resizes single images in the loaders.
    """

    train_inputs: "Preparation"
    eval_inputs: "Preparation"
    target_scale: Standardizer | None = None
    """What the loaders standardise targets by."""

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss () of a training batch, and further means () to log, by name."""

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        loader: Loader,
        *,
        ranks: Ranks,
        precision: str,
        max_batches: int | None = None,
    ) -> Any:
        """Predictions of a split on the first rank, None on the others; all ranks call it.

        What predictions are is up to the objective: class probabilities, embeddings, losses.

        Args:
            precision: autocast type: no, bf16 or fp16.
            max_batches: batches of this rank to evaluate; None: all.
        """

    @abstractmethod
    def record(self, predictions: Any) -> dict[str, float]:
        """Loss and metrics of what `evaluate` returned, by logged name without its split."""


@torch.no_grad()
def gather_split(
    model: nn.Module,
    outputs: Callable[[nn.Module, Batch], dict[str, Tensor]],
    loader: Loader,
    *,
    ranks: Ranks,
    precision: str,
    max_batches: int | None = None,
) -> dict[str, Tensor] | None:
    """Outputs of a model for the samples of a split, each sample once, in the split's order: CPU
    tensors (N, ...) by name; None on all ranks but the first.

    The device is waited for once, at the end.

    Args:
        outputs: model and batch -> tensors (B, ...) by name, "rows" (B,) of the split among them.
        max_batches: batches of this rank; None: all.
    """
    model.eval()
    parts: list[dict[str, Tensor]] = []
    for batch in islice(loader.epoch(0), max_batches):
        with autocast(precision, ranks.device):
            parts.append(outputs(model, batch.to(ranks.device)))
    names = parts[0] if parts else ()  # a rank may have no samples
    merged = {name: torch.cat([part[name] for part in parts]).cpu() for name in names}
    gathered = gather_rows(ranks, merged)
    if gathered is None:
        return None
    _, first = np.unique(gathered["rows"].numpy(), return_index=True)  # sorted, without doubles
    return {name: values[torch.from_numpy(first)] for name, values in gathered.items()}


# -------------------------------------------------------------------------- the encoder's input


class Preparation(Protocol):
    """Makes the encoder's input of a batch, on the training device."""

    @property
    def fit(self) -> Resizing | None:
        """Crops and resizes samples of differing sizes where they are decoded."""

    def __call__(self, inputs: Any, fitted: bool, seed: int, /) -> Any:
        """Inputs of a batch as the loader gives them -> what the encoder takes.

        Args:
            fitted: whether `fit` has been applied.
            seed: of what is drawn.
        """


@ByStruct
def build_inputs(inputs: Inputs, *, train: bool) -> Preparation:
    """What makes the encoder's input of a batch, on the training device.

    Args:
        train: whether under the train policy, where there is one.
    """
    raise TypeError(f"no inputs for {type(inputs).__name__}")


@ByStruct
def as_loaded(
    inputs: Inputs, split: Split, *, train: bool, once: bool = False, frames: bool = False
) -> Split:
    """The samples that a loader reads for those of a split, such as several clips of a video; most
    are what they are.

    Args:
        train: whether for training, else as evaluation sees them.
        once: whether training takes one of each.
        frames: whether clips of videos show all their frames, as they do where these have labels.
    """
    return split


@ByStruct
def frames_shown(inputs: Inputs, split: Split) -> dict[str, np.ndarray]:
    """Which frames of its video evaluation sees of each sample, by name: `frames` (N, T) int64,
    their numbers, and `times` (N, T), seconds; empty where samples are no videos, or several clips
    each."""
    return {}


def clips_as_samples(inputs: Inputs, data: Data) -> Data:
    """A data set of videos with labels of frames as one of their clips, for modes that read an
    encoder out: each has the class of most of its frames and its video as its group; those without
    a label are left out. Others as they are."""
    if data.subtask != "framewise":
        return data
    splits, lost = {}, 0
    for name, videos in data.splits.items():
        split = as_loaded(inputs, videos, train=False)
        frames = split.frames
        assert frames is not None, "see resolved.check_task"
        ids = [
            f"{video}:{first}" for video, first in zip(split.ids, frames.numbers[:, 0], strict=True)
        ]
        targets = frames.majority()
        clips = with_fields(split, ids=ids, groups=split.ids, targets=targets, frames=None)
        splits[name] = subset(clips, np.flatnonzero(targets != UNLABELLED))
        lost += int((targets == UNLABELLED).sum())
    report = [f"{lost} clips without a labelled frame are left out"] if lost else []
    return with_fields(data, splits=splits, subtask="multiclass", report=[*data.report, *report])


def frames_as_samples(inputs: Inputs, data: Data) -> Data:
    """A data set of videos as one of clips that show every frame once, with or without labels.

    Raises:
        UserError: samples are no videos, or a source of the user's own whose frames cannot be
            asked for.
    """
    splits = {}
    for name, videos in data.splits.items():
        split = as_loaded(inputs, videos, train=False, frames=True)
        if split.frames is None:
            raise UserError(
                'extract.output = "frames" reads frames of videos, and the samples are'
                f" {inputs.kind}"
            )
        firsts = split.frames.numbers[:, 0].tolist()
        ids = [f"{video}:{first}" for video, first in zip(split.ids, firsts, strict=True)]
        splits[name] = with_fields(split, ids=ids)
    subtask = "multiclass" if data.subtask == "framewise" else data.subtask
    return with_fields(data, splits=splits, subtask=subtask)


@build_inputs.register
def _(inputs: ImageInputs, *, train: bool) -> Augmenter:
    return Augmenter(inputs.augmentation, train=train, bit_depth=inputs.bit_depth)


# ---------------------------------------------------------------------- supervised learning

AUGMENT, MIX = 1, 2  # numbers of the random streams


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts for the samples of a split, in the split's order."""

    ids: list[str]
    scores: Scores  # (N, K)
    rows: np.ndarray  # (N,) rows of the split


@dataclass(frozen=True, slots=True)
class LabelledPredictions(Predictions):
    """Predictions for samples whose labels are known."""

    targets: np.ndarray  # (N,) int64, or (N, K)
    losses: np.ndarray  # (N,) float32

    @property
    def loss(self) -> float:
        """Mean over the samples, in float64."""
        return float(self.losses.astype(np.float64).mean())


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head gives, see `heads`; most give logits alone."""

    logits: Tensor  # (B, K)
    fitted: list[tuple[float, Tensor]]  # weight of the loss of logits (B, K)
    aux: dict[str, Tensor]  # losses () to add

    @classmethod
    def of(cls, output: Tensor | dict[str, Any]) -> "HeadOutput":
        """The output of a head, a tensor of logits or a dict, in one form."""
        output = {"logits": output, "aux": {}} if isinstance(output, Tensor) else output
        logits = output["logits"]
        return cls(logits, output.get("fitted", [(1.0, logits)]), output["aux"])


class LabelObjective(Objective):
    """What objectives share whose model gives scores of classes or numbers."""

    def __init__(self, task: LabelTask, resolved: Resolved, device: torch.device) -> None:
        self.resolved, self.device = resolved, device
        self.subtask = resolved.subtask
        self.train_inputs = build_inputs(resolved.inputs, train=True)
        self.eval_inputs = build_inputs(resolved.inputs, train=False)
        kind = "multiclass" if resolved.subtask == "framewise" else resolved.subtask
        self.criterion = build_criterion(
            task, subtask=kind, class_weights=resolved.class_weights
        ).to(device)
        self.plain = plain_criterion(task, subtask=kind).to(device)

    @abstractmethod
    def measured(self, predictions: Any) -> Samples:
        """Labelled predictions as the metrics take them."""

    def record(self, predictions: "LabelledPredictions") -> dict[str, float]:
        """Mean loss and the metrics."""
        return {"loss": predictions.loss, **self.values(self.measured(predictions))}

    def values(self, samples: Samples) -> dict[str, float]:
        """The metrics of samples."""
        return values_of(self.resolved.metrics, samples)

    def in_units(self, scores: Tensor) -> np.ndarray:
        """Scores (N, K) as they are shown: outputs of a regression in target units, float64, which
        not every device calculates with."""
        values = scores.cpu().numpy()
        return values if self.target_scale is None else self.target_scale.restored(values)

    def scores_of(self, logits: Tensor) -> Scores:
        """Scores (N, K) of logits (N, K), or of outputs of a regression."""
        return Scores.of_logits(self.in_units(logits), self.subtask)

    def losses_of(self, scores: Scores, targets: np.ndarray) -> np.ndarray:
        """Loss (N,) of given scores (N, K), for scores that no single model gave."""
        if self.target_scale is not None:
            pair = map(self.target_scale.standardized, (scores.values, targets))
            output, wanted = (torch.from_numpy(part).to(self.device) for part in pair)
            return self.plain(output, wanted).cpu().numpy()
        odds = scores.ranked
        if self.subtask == "multilabel":
            return np.logaddexp(0.0, np.where(targets > 0.5, -odds, odds)).mean(1)
        # -log p = log(1 + exp(-log-odds))
        return np.logaddexp(0.0, -odds[np.arange(len(odds)), targets])


class SupervisedObjective(LabelObjective):
    """Predict labels from samples, with augmentation, mixup and cutmix on the training device."""

    def __init__(self, task: Supervised, resolved: Resolved, device: torch.device) -> None:
        super().__init__(task, resolved, device)
        self.task = task
        self.outputs = len(resolved.class_names)
        self.mixes = task.mixup or task.cutmix
        if resolved.subtask == "regression":
            mean, std = np.array(resolved.target_mean), np.array(resolved.target_std)
            self.target_scale = Standardizer(mean, std)

    def loss(
        self, model: nn.Module, batch: Batch, rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () over the head's outputs plus its auxiliary losses, which are logged; of unmixed
        classes the accuracy too."""
        inputs = self.train_inputs(batch.inputs, batch.fitted, rng.stream(AUGMENT))
        assert batch.targets is not None  # build_data refuses to train without labels
        targets = batch.targets
        if self.mixes and not isinstance(inputs, Tensor):
            output, targets = self.mixed_bags(model, inputs, targets, rng.stream(MIX))
        else:
            if self.mixes and self.counts_time_points(inputs):
                partner, kept, targets = mixup_draws(
                    targets,
                    outputs=self.outputs,
                    alpha=self.task.mixup_alpha,
                    seed=rng.stream(MIX),
                )
                inputs = mixed_series(inputs, partner, kept)
            elif self.mixes:
                inputs, targets = mixup_cutmix(
                    inputs,
                    targets,
                    outputs=self.outputs,
                    mixup=self.task.mixup,
                    mixup_alpha=self.task.mixup_alpha,
                    cutmix=self.task.cutmix,
                    cutmix_alpha=self.task.cutmix_alpha,
                    seed=rng.stream(MIX),
                )
            output = HeadOutput.of(model(inputs, targets))
        logs = {name: value.detach() for name, value in output.aux.items()}
        if self.subtask == "multiclass" and not self.mixes:
            logs["acc"] = (output.logits.detach().argmax(1) == targets).float().mean()
        losses = [weight * self.criterion(y, targets).mean() for weight, y in output.fitted]
        losses += output.aux.values()
        return sum(losses[1:], losses[0]), logs

    def counts_time_points(self, inputs: Tensor) -> bool:
        """Whether these are series with a last row that says which time points count."""
        kind = self.resolved.inputs
        return isinstance(kind, SeriesInputs) and inputs.shape[1] > kind.channels

    def mixed_bags(
        self, model: nn.Module, bags: Any, targets: Tensor, seed: int
    ) -> tuple[HeadOutput, Tensor]:
        """What the head gives where the vectors of bags are mixed before its last layer, and the
        targets (B, K) mixed likewise; auxiliary losses are those of the bags as they are.

        Raises:
            UserError: a head of the user's that does not name that layer.
        """
        whole: nn.Module = getattr(model, "module", model)
        head = whole.get_submodule("head")
        layer = getattr(head, "mixed_before", None)
        if layer is None:
            raise UserError(
                "task.mixup: this head does not say by an attribute mixed_before which layer of its"
                " takes a vector a bag: add it, or drop mixup"
            )
        partner, kept, soft = mixup_draws(
            targets, outputs=self.outputs, alpha=self.task.mixup_alpha, seed=seed
        )

        def mix(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            pooled, *rest = inputs
            share = kept.to(pooled.dtype).view(-1, *(1,) * (pooled.ndim - 1))
            return (torch.lerp(pooled[partner], pooled, share), *rest)

        hook = head.get_submodule(layer).register_forward_pre_hook(mix)
        try:
            return HeadOutput.of(model(bags, targets)), soft
        finally:
            hook.remove()

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Row, logits (B, K) and loss (B,) of each sample."""
        inputs = self.eval_inputs(batch.inputs, batch.fitted, 0)
        logits = logits_of(model, inputs).float()  # (B, K)
        rows = {"rows": batch.rows, "logits": logits}
        if batch.targets is not None:
            rows["loss"] = self.plain(logits, batch.targets)
        return rows

    def evaluate(
        self,
        model: nn.Module,
        loader: Loader,
        *,
        ranks: Ranks,
        precision: str,
        max_batches: int | None = None,
    ) -> Predictions | None:
        """Scores and losses of a split, see `Objective.evaluate`."""
        gathered = gather_split(
            model, self.predict, loader, ranks=ranks, precision=precision, max_batches=max_batches
        )
        if gathered is None:
            return None
        split, rows = loader.split, gathered["rows"].numpy()
        ids = [split.ids[row] for row in rows]
        scores = self.scores_of(gathered["logits"])
        if split.targets is None:
            return Predictions(ids, scores, rows)
        losses = gathered["loss"].numpy()
        return LabelledPredictions(ids, scores, rows, split.targets[rows], losses)

    def measured(self, predictions: LabelledPredictions) -> Samples:
        """Labelled predictions as the metrics take them."""
        names, scores = self.resolved.class_names, predictions.scores
        return samples_of(self.subtask, predictions.targets, scores, names)


@ByStruct
def build_objective(task: Spec, resolved: Resolved, device: torch.device) -> Objective:
    """The objective of a task Struct."""
    raise TypeError(f"no objective for {type(task).__name__}")


@build_objective.register
def _(task: Supervised, resolved: Resolved, device: torch.device) -> Objective:
    return SupervisedObjective(task, resolved, device)
