"""Losses against float64 formulas."""

import numpy as np
import pytest
import torch

from glovita_lib.losses import build_criterion, plain_criterion
from glovita_lib.spec_train import Supervised

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-4.0, 3.0, 9.0]])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy(smoothing: float, weights: tuple | None, soft: bool) -> None:
    hard = np.array([0, 2, 2])
    targets = np.array([[0.7, 0.3, 0], [0, 0, 1], [0.2, 0.3, 0.5]]) if soft else np.eye(3)[hard]
    expected = targets * (1 - smoothing) + smoothing / 3
    expected = -(expected * np.array(weights or (1, 1, 1)) * log_softmax(LOGITS.double().numpy()))
    task = Supervised(label_smoothing=smoothing)
    criterion = build_criterion(task, subtask="multiclass", class_weights=weights)
    given = torch.tensor(targets, dtype=torch.float32) if soft else torch.tensor(hard)
    np.testing.assert_allclose(criterion(LOGITS, given), expected.sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 3.0)])
def test_multilabel(smoothing: float, weights: tuple | None) -> None:
    targets = np.array([[1, 0, 1], [0, 0, 0], [0.4, 1, 0.6]])
    smooth = targets * (1 - smoothing) + smoothing / 2
    p = 1 / (1 + np.exp(-LOGITS.double().numpy()))
    expected = -(smooth * np.log(p) + (1 - smooth) * np.log(1 - p)) * np.array(weights or (1, 1, 1))
    task = Supervised(label_smoothing=smoothing)
    criterion = build_criterion(task, subtask="multilabel", class_weights=weights)
    given = torch.tensor(targets, dtype=torch.float32)
    np.testing.assert_allclose(criterion(LOGITS, given), expected.mean(1), rtol=1e-4)


def test_regression_losses() -> None:
    targets = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    error = (LOGITS - targets).double().numpy()
    expected = {
        "mse": error**2,
        "mae": abs(error),
        "huber": np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5),
    }
    for name, values in expected.items():
        criterion = plain_criterion(Supervised(regression_loss=name), subtask="regression")
        np.testing.assert_allclose(criterion(LOGITS, targets), values.mean(1), rtol=1e-6)


def test_plain_criterion_has_no_smoothing() -> None:
    plain = plain_criterion(Supervised(label_smoothing=0.3), subtask="multiclass")
    expected = torch.nn.functional.cross_entropy(LOGITS, torch.tensor([0, 1, 2]), reduction="none")
    torch.testing.assert_close(plain(LOGITS, torch.tensor([0, 1, 2])), expected)


def test_weighted_loss_adds_up_over_batches() -> None:
    criterion = build_criterion(Supervised(), subtask="multiclass", class_weights=(1.0, 2.0, 4.0))
    targets = torch.tensor([0, 1, 2])
    whole = criterion(LOGITS, targets).mean()
    parts = criterion(LOGITS[:1], targets[:1]).sum() + criterion(LOGITS[1:], targets[1:]).sum()
    torch.testing.assert_close(whole, parts / 3)
