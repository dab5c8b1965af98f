"""Training losses, one value per sample so that every mean is a mean over samples.

B batch, K classes or targets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.spec_train import LabelTask, Supervised

LEAST = 1e-12  # of 1 - p, whose power has no gradient at 0


class Criterion(nn.Module):
    """Loss of every sample of a batch.

    - multiclass: -sum_k w_k t_k (1 - p_k)^g log p_k, p = softmax(z), t one-hot or soft, smoothed to
      (1 - s) t + s / K
    - multilabel: mean_k w_k (-t_k (1 - p_k)^g log p_k - (1 - t_k) p_k^g log(1 - p_k)),
      p_k = sigmoid(z_k), t smoothed to (1 - s) t + s / 2
    - regression: mean_k of the squared, absolute or Huber (delta 1) error, in units of `target_std`

    With g = 0 these are the cross-entropies, else the focal losses (Lin et al., Focal Loss for
    Dense Object Detection, ICCV 2017).

    Class weights multiply; the mean over samples is not divided by their sum, so that accumulated
    batches and shards of different composition add up to the loss of one large batch. Balanced
    weights have mean 1 over the train split.
    """

    weights: Tensor | None  # (K,)

    def __init__(
        self,
        subtask: str,
        *,
        label_smoothing: float,
        focal_gamma: float,
        class_weights: Tensor | None,
        regression_loss: str | None,
    ) -> None:
        super().__init__()
        self.subtask = subtask
        self.smoothing, self.gamma = label_smoothing, focal_gamma
        self.regression_loss = regression_loss
        self.register_buffer("weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (B, K); targets (B,) int64, or (B, K) float (soft, multilabel, regression) -> (B,)
        float32."""
        logits = logits.float()
        if self.subtask == "regression":
            return self._regression(logits, targets.float())
        if self.subtask == "multilabel":
            targets = targets.float() * (1 - self.smoothing) + self.smoothing / 2
            loss = self._binary(logits, targets)  # (B, K)
            return (loss if self.weights is None else loss * self.weights).mean(1)
        return self._cross_entropy(logits, targets)

    def _regression(self, outputs: Tensor, targets: Tensor) -> Tensor:
        assert self.regression_loss is not None, "a task of classes has none"
        elementwise = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.smooth_l1_loss}
        loss = elementwise[self.regression_loss](outputs, targets, reduction="none")  # (B, K)
        return loss.mean(1)

    def _binary(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not self.gamma:
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        yes, no = (self._focal(F.logsigmoid(sign * logits)) for sign in (1, -1))
        return -(targets * yes + (1 - targets) * no)

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.dtype == torch.int64 and self.weights is None and not self.gamma:
            return F.cross_entropy(
                logits, targets, reduction="none", label_smoothing=self.smoothing
            )
        classes = logits.shape[1]
        if targets.dtype == torch.int64:
            targets = F.one_hot(targets, classes).float()
        targets = targets * (1 - self.smoothing) + self.smoothing / classes  # (B, K)
        if self.weights is not None:
            targets = targets * self.weights
        return -(targets * self._focal(F.log_softmax(logits, 1))).sum(1)

    def _focal(self, log_p: Tensor) -> Tensor:
        """(1 - p)^g log p."""
        if not self.gamma:
            return log_p
        return (-torch.expm1(log_p)).clamp(min=LEAST).pow(self.gamma) * log_p


def build_criterion(
    task: LabelTask, *, subtask: str, class_weights: tuple[float, ...] | None
) -> Criterion:
    """The training loss of a task; class_weights are the resolved numbers, one a class."""
    return Criterion(
        subtask,
        label_smoothing=task.label_smoothing,
        focal_gamma=task.focal_gamma,
        class_weights=None if class_weights is None else torch.tensor(class_weights),
        regression_loss=task.regression_loss if isinstance(task, Supervised) else None,
    )


def plain_criterion(task: LabelTask, *, subtask: str) -> Criterion:
    """The loss that evaluation reports: no class weights, no smoothing, no focus, so that runs
    compare."""
    return Criterion(
        subtask,
        label_smoothing=0.0,
        focal_gamma=0.0,
        class_weights=None,
        regression_loss=task.regression_loss if isinstance(task, Supervised) else None,
    )
