"""Probes of frozen features: k nearest neighbours and linear models with an L2 sweep.

N samples, D width, K classes or targets, B samples of a block.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.neighbors import Metric, nearest

BLOCK = 16384  # samples whose logits exist at a time


def one_hot(targets: Tensor, outputs: int, subtask: str) -> Tensor:
    """Targets as rows of numbers, (N, K) float32."""
    return F.one_hot(targets, outputs).float() if subtask == "multiclass" else targets.float()


def knn_scores(
    queries: Tensor,
    features: Tensor,
    targets: Tensor,
    *,
    ks: Iterable[int],
    metric: Metric,
    temperature: float,
) -> dict[int, Tensor]:
    """Scores (N, K) of every query for each k: mean of the neighbours' target rows (M, K), weighted
    by exp(-distance / temperature), for cosine the weights of DINO (arXiv 2104.14294), up to a
    factor.

    The neighbours of the largest k are looked for once.
    """
    ks = tuple(ks)
    distances, indices = nearest(queries, features, max(ks), metric, exclude_self=False)
    # relative to the nearest one, which cancels in the mean and keeps exp from vanishing
    weights = torch.exp((distances[:, :1] - distances) / temperature)  # (N, k)
    scores = {}
    for k in ks:
        weight, index = weights[:, :k], indices[:, :k]
        total = torch.zeros(len(queries), targets.shape[1], device=queries.device)
        for j in range(index.shape[1]):  # no (N, k, K) at a time
            total += weight[:, j, None] * targets[index[:, j]]
        scores[k] = total / weight.sum(1, keepdim=True)
    return scores


@dataclass(frozen=True, slots=True)
class Linear:
    """A fitted linear model on standardised features."""

    weight: Tensor  # (D, K)
    bias: Tensor  # (K,)
    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K)."""
        blocks = [
            torch.addmm(self.bias, standardized(block, self), self.weight)
            for block in features.split(BLOCK)
        ]
        return torch.cat(blocks) if blocks else features.new_empty(0, len(self.bias)).float()

    def scores(self, features: Tensor, subtask: str) -> Tensor:
        """Probabilities, or regression outputs, (N, K)."""
        logits = self.logits(features)
        if subtask == "multiclass":
            return logits.softmax(1)
        return logits.sigmoid() if subtask == "multilabel" else logits


def standardized(block: Tensor, model: Linear) -> Tensor:
    """Features minus mean over std, float32."""
    return (block.float() - model.mean) / model.std


def moments(features: Tensor, *, standardize: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) over the samples; 0 and 1 unless `standardize`."""
    width = features.shape[1]
    if not standardize:
        return torch.zeros(width), torch.ones(width)
    total, square = torch.zeros(width).double(), torch.zeros(width).double()
    for block in features.split(BLOCK):
        total += block.double().sum(0)
    mean = total / len(features)
    for block in features.split(BLOCK):
        square += (block.double() - mean).square().sum(0)
    std = (square / len(features)).sqrt()
    std = torch.where(std > 1e-12, std, 1.0)  # a constant feature says nothing and stays 0
    return mean.float(), std.float()


def fit_linear(
    features: Tensor,
    targets: Tensor,
    *,
    subtask: str,
    l2: Iterable[float],
    standardize: bool,
    max_iterations: int,
) -> Iterator[tuple[float, Linear]]:
    """A linear model for each strength of L2, from the strongest, each started from the last.

    Minimises mean_n loss(W x_n + b, t_n) + l2 / 2 |W|^2, the bias free: multinomial cross-entropy,
    binary cross-entropies summed over the labels, or half the squared error summed over targets
    (solved in closed form). scikit-learn's C is 1 / (l2 N).

    Args:
        features: (N, D) of any float type; read in blocks.
        targets: (N, K) rows as of `one_hot`.
    """
    mean, std = moments(features, standardize=standardize)
    width, outputs = features.shape[1], targets.shape[1]
    start = np.zeros((width + 1, outputs))
    for strength in sorted(l2, reverse=True):
        if subtask == "regression":
            solution, iterations, converged = ridge(features, targets, mean, std, strength), 1, True
        else:
            problem = Problem(features, targets, mean, std, subtask, strength)
            solution, iterations, converged = minimize(problem, start, max_iterations)
        start = solution
        weight = torch.tensor(solution[:-1], dtype=torch.float32)
        bias = torch.tensor(solution[-1], dtype=torch.float32)
        yield strength, Linear(weight, bias, mean, std, iterations, converged)


@dataclass(frozen=True, slots=True)
class Problem:
    """The function to minimise, over blocks of samples."""

    features: Tensor  # (N, D)
    targets: Tensor  # (N, K)
    mean: Tensor
    std: Tensor
    subtask: str
    l2: float

    def value_and_gradient(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Objective and its gradient at weights and bias ((D + 1) K,), float64."""
        solution = torch.from_numpy(flat.reshape(-1, self.targets.shape[1]))  # (D + 1, K)
        weight, bias = solution[:-1], solution[-1]
        loss, gradient = 0.0, torch.zeros_like(solution)
        for x, t in blocks(self.features, self.targets, self.mean, self.std):
            logits = torch.addmm(bias, x, weight)  # (B, K)
            if self.subtask == "multiclass":
                log_p = logits.log_softmax(1)
                loss -= float((t * log_p).sum())
                residual = log_p.exp_() - t
            else:
                total = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
                loss += float(total.sum())
                residual = logits.sigmoid() - t
            gradient[:-1] += x.T @ residual
            gradient[-1] += residual.sum(0)
        count = len(self.features)
        gradient /= count
        gradient[:-1] += self.l2 * solution[:-1]
        penalty = self.l2 / 2 * float(solution[:-1].square().sum())
        return loss / count + penalty, gradient.numpy().ravel()


def blocks(
    features: Tensor, targets: Tensor, mean: Tensor, std: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Standardised features (B, D) and targets (B, K), block after block, float64: in float32 the
    line search of L-BFGS ends in rounding errors long before the minimum."""
    for x, t in zip(features.split(BLOCK), targets.split(BLOCK), strict=True):
        yield (x.double() - mean) / std, t.double()


def minimize(
    problem: Problem, start: np.ndarray, max_iterations: int
) -> tuple[np.ndarray, int, bool]:
    """L-BFGS from `start`: weights and bias (D + 1, K), iterations, whether it converged."""
    from scipy.optimize import minimize as lbfgs

    result = lbfgs(
        problem.value_and_gradient,
        start.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "ftol": 1e-10, "gtol": 1e-6},
    )
    return result.x.reshape(start.shape), int(result.nit), bool(result.success)


def ridge(features: Tensor, targets: Tensor, mean: Tensor, std: Tensor, l2: float) -> np.ndarray:
    """Weights and bias (D + 1, K) of ridge regression, by the normal equations in float64."""
    width, outputs = features.shape[1], targets.shape[1]
    gram, moment = np.zeros((width, width)), np.zeros((width, outputs))
    total, target_total = np.zeros(width), np.zeros(outputs)
    for x, t in blocks(features, targets, mean, std):
        x, t = x.numpy(), t.numpy()
        gram += x.T @ x
        moment += x.T @ t
        total += x.sum(0)
        target_total += t.sum(0)
    count = len(features)
    center, level = total / count, target_total / count
    gram = gram / count - np.outer(center, center) + l2 * np.eye(width)
    moment = moment / count - np.outer(center, level)
    weight = np.linalg.lstsq(gram, moment, rcond=None)[0]  # singular where l2 is tiny
    return np.vstack([weight, level - center @ weight])
