"""Objectives: the loss of a batch, and the predictions of a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glovita_lib.augment import Augmenter, mixup_cutmix
from glovita_lib.bags import Bags
from glovita_lib.dist import Ranks, autocast, gather_rows, hash_seed
from glovita_lib.loader import Batch, Loader
from glovita_lib.losses import build_criterion, plain_criterion
from glovita_lib.resolved import Resolved
from glovita_lib.spec_train import Supervised

# -------------------------------------------------------------------------------- objectives
#
# Objectives: what a batch has to say to the loop.
#
# An objective gives `loss(model, batch, ...)` for a training batch and `predict(model, batch)` for
# an evaluation batch; the trainer knows nothing else about the task. B batch, K classes or targets.


@dataclass(frozen=True, slots=True)
class BatchRng:
    """Where a training batch stands; all random streams follow from it."""

    seed: int
    epoch: int
    batch: int
    rank: int

    def stream(self, which: int) -> int:
        """Seed of one of the random streams of this batch."""
        return hash_seed(self.seed, self.epoch, self.batch, self.rank, which)


AUGMENT, MIX = 1, 2  # numbers of the random streams


class FeatureInputs:
    """Precomputed features as a head takes them, standardised where the spec asks for it."""

    fit = None

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.mean = None if mean is None else torch.tensor(mean)  # (D,)
        self.std = None if std is None else torch.tensor(std)

    def __call__(self, inputs: Tensor | Bags, fitted: bool, seed: int) -> Tensor | Bags:
        """Vectors (B, D) in float32; bags as they are, their heads convert piece by piece."""
        if isinstance(inputs, Bags):
            if self.mean is None:
                return inputs
            return Bags(self.standardized(inputs.features), inputs.lengths)
        return inputs.float() if self.mean is None else self.standardized(inputs)

    def standardized(self, features: Tensor) -> Tensor:
        """Features (N, D) of mean 0 and deviation 1 over the train split, float32."""
        self.mean, self.std = self.mean.to(features.device), self.std.to(features.device)
        return (features.float() - self.mean) / self.std


def build_inputs(resolved: Resolved, *, train: bool) -> Augmenter | FeatureInputs:
    """What makes the encoder's input of a batch, on the training device."""
    if resolved.augmentation is None:
        return FeatureInputs(resolved.feature_mean, resolved.feature_std)
    return Augmenter(resolved.augmentation, train=train, bit_depth=resolved.bit_depth)


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head gives, see `heads`; most give logits alone."""

    logits: Tensor  # (B, K)
    fitted: list[tuple[float, Tensor]]  # weight of the loss of logits (B, K)
    aux: dict[str, Tensor]  # losses () to add

    @classmethod
    def of(cls, output: Tensor | dict[str, Any]) -> "HeadOutput":
        """In one form."""
        output = {"logits": output, "aux": {}} if isinstance(output, Tensor) else output
        logits = output["logits"]
        return cls(logits, output.get("fitted", [(1.0, logits)]), output["aux"])


class SupervisedObjective:
    """Predict labels from samples, with augmentation, mixup and cutmix on the training device."""

    def __init__(self, task: Supervised, resolved: Resolved, device: torch.device) -> None:
        self.task = task
        self.subtask = resolved.subtask
        self.outputs = len(resolved.class_names)
        self.train_inputs = build_inputs(resolved, train=True)
        self.eval_inputs = build_inputs(resolved, train=False)
        self.criterion = build_criterion(
            task, subtask=resolved.subtask, class_weights=resolved.class_weights
        ).to(device)
        self.plain = plain_criterion(task, subtask=resolved.subtask).to(device)
        self.mixes = task.mixup or task.cutmix
        self.shift = torch.tensor(resolved.target_mean, device=device)  # (K,), 0 unless regression
        self.scale = torch.tensor(resolved.target_std, device=device)  # (K,), 1 unless regression

    def loss(
        self, model: nn.Module, batch: Batch, clock: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean training loss of a batch () and the means to log beside it."""
        inputs = self.train_inputs(batch.inputs, batch.fitted, clock.stream(AUGMENT))
        targets = self.standardized(batch.targets)
        if self.mixes:
            inputs, targets = mixup_cutmix(
                inputs,
                targets,
                outputs=self.outputs,
                mixup=self.task.mixup,
                mixup_alpha=self.task.mixup_alpha,
                cutmix=self.task.cutmix,
                cutmix_alpha=self.task.cutmix_alpha,
                seed=clock.stream(MIX),
            )
        answer = HeadOutput.of(model(inputs, targets))
        logs = {name: value.detach() for name, value in answer.aux.items()}
        if self.subtask == "multiclass" and not self.mixes:
            logs["acc"] = (answer.logits.detach().argmax(1) == targets).float().mean()
        losses = [weight * self.criterion(y, targets).mean() for weight, y in answer.fitted]
        return sum([*losses, *answer.aux.values()]), logs

    def standardized(self, targets: Tensor) -> Tensor:
        """Regression targets in units of the train split's standard deviation; labels unchanged."""
        return (targets - self.shift) / self.scale if self.subtask == "regression" else targets

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Row, scores (B, K: probabilities, or regression outputs in target units) and loss (B,) of
        each sample."""
        inputs = self.eval_inputs(batch.inputs, batch.fitted, 0)
        logits = HeadOutput.of(model(inputs)).logits.float()  # (B, K)
        rows = {"rows": batch.rows, "scores": self.scores(logits)}
        if batch.targets is not None:
            rows["loss"] = self.plain(logits, self.standardized(batch.targets))
        return rows

    def nothing(self, device: torch.device, *, labelled: bool) -> dict[str, Tensor]:
        """What `predict` gives for no sample, for a rank without rows."""
        rows = {
            "rows": torch.empty(0, dtype=torch.int64, device=device),
            "scores": torch.empty(0, self.outputs, device=device),
        }
        return rows | ({"loss": torch.empty(0, device=device)} if labelled else {})

    def scores(self, logits: Tensor) -> Tensor:
        """Logits -> softmax or sigmoid probabilities, or outputs in target units, (B, K)."""
        if self.subtask == "multiclass":
            return logits.softmax(1)
        return (
            logits.sigmoid() if self.subtask == "multilabel" else logits * self.scale + self.shift
        )

    def losses_of(self, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Loss (N,) of given scores (N, K), for scores that no single model gave."""
        device = self.shift.device
        score = torch.from_numpy(scores).to(device)
        if self.subtask == "multiclass":
            logits = score.clamp_min(1e-12).log()  # softmax of it is the score again
        else:
            logits = (score - self.shift) / self.scale
            logits = score.logit(1e-7) if self.subtask == "multilabel" else logits
        wanted = self.standardized(torch.from_numpy(targets).to(device))
        return self.plain(logits, wanted).cpu().numpy()


Objective = SupervisedObjective


@singledispatch
def build_objective(task: Any, resolved: Resolved, device: torch.device) -> Objective:
    """The objective of a task Struct."""
    raise TypeError(f"no objective for {type(task).__name__}")


@build_objective.register
def _(task: Supervised, resolved: Resolved, device: torch.device) -> Objective:
    return SupervisedObjective(task, resolved, device)


# -------------------------------------------------------------------------------- evaluation
#
# Exact evaluation: every sample of a split once, on any number of ranks, metrics on the whole.
#
# N samples, K classes or targets.


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model says about the samples of a split, in the split's order."""

    ids: list[str]
    scores: np.ndarray  # (N, K) float32: probabilities, or outputs in target units
    targets: np.ndarray | None  # (N,) int64, or (N, K) float32; None: unlabelled
    losses: np.ndarray | None  # (N,) float32
    rows: np.ndarray  # (N,) rows of the split

    @property
    def loss(self) -> float:
        """Mean over samples, in float64."""
        return float(self.losses.astype(np.float64).mean()) if len(self.losses) else float("nan")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    *,
    ranks: Ranks,
    precision: str,
    max_batches: int | None = None,
) -> Predictions | None:
    """Predictions of a split, gathered by row, without duplicates; None on all ranks but the first.

    The device is waited for once, at the end.
    """
    model.eval()
    parts: list[dict[str, torch.Tensor]] = []
    for batch in islice(loader.epoch(0), max_batches):
        with autocast(precision, ranks.device):
            parts.append(objective.predict(model, batch.to(ranks.device)))
    if not parts:  # a rank may have no rows
        parts = [objective.nothing(ranks.device, labelled=loader.split.targets is not None)]
    merged = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
    gathered = gather_rows(ranks, merged)
    return None if gathered is None else collect(gathered, loader)


def collect(gathered: dict[str, torch.Tensor], loader: Loader) -> Predictions:
    """Sort gathered rows into the split's order and drop what came twice."""
    split = loader.split
    rows, first = np.unique(gathered["rows"].numpy(), return_index=True)
    losses = gathered.get("loss")
    return Predictions(
        ids=[split.ids[row] for row in rows],
        scores=gathered["scores"].numpy()[first],
        targets=None if split.targets is None else split.targets[rows],
        losses=None if losses is None else losses.numpy()[first],
        rows=rows,
    )
