"""Probes of frozen features: k nearest neighbours and linear models with an L2 sweep.

Features and targets are read in blocks, which are moved to the device that computes.

N samples, D width, K classes or targets, M train samples, B samples of a block.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16384  # samples whose logits exist at a time, at most
ON_CPU, ON_GPU = 2**19, 2**24  # features, or logits, of a block: 4 MiB in a cache, or busy cores
KEPT = 2**26  # features that stay as they are computed with: 512 MiB in float64
SHARE = 0.5  # of the free memory of a device that features may take


def block_size(width: int, outputs: int, device: torch.device) -> int:
    """Samples of a block of so many features and logits."""
    numbers = ON_CPU if device.type == "cpu" else ON_GPU
    return max(1, min(BLOCK, numbers // max(width, outputs, 1)))


def resident(features: Tensor, device: torch.device) -> Tensor:
    """Features on the device where they fit, else where they are, to be moved block by block."""
    if device.type == "cuda" and features.nbytes > SHARE * torch.cuda.mem_get_info(device)[0]:
        return features
    return features.to(device)


# ---------------------------------------------------------------------- neighbours


def knn_scores(
    distances: Tensor, indices: Tensor, targets: Tensor, *, outputs: int, temperature: float
) -> Tensor:
    """Scores (N, K) float32: mean of the neighbours' targets, weighted by
    exp(-distance / temperature), for cosine the weights of DINO (arXiv 2104.14294), up to a factor.

    Args:
        distances: (N, k) to the neighbours, the nearest first.
        indices: (N, k) of the neighbours among the train samples.
        targets: (M,) class indices, of which the mean is that of one-hot rows, or (M, K) values.
    """
    scores = torch.empty(len(distances), outputs, device=distances.device)
    size = block_size(1, outputs, distances.device)
    for start in range(0, len(distances), size):
        part = slice(start, start + size)
        # relative to the nearest one, which cancels in the mean and keeps exp from vanishing
        weights = torch.exp((distances[part, :1] - distances[part]) / temperature)  # (B, k)
        weights /= weights.sum(1, keepdim=True)
        total = weights.new_zeros(len(weights), outputs)
        if targets.ndim == 1:
            total.scatter_add_(1, targets[indices[part]], weights)
        else:
            for weight, index in zip(weights.T, indices[part].T, strict=True):  # no (B, k, K)
                total += weight[:, None] * targets[index]
        scores[part] = total
    return scores


# ---------------------------------------------------------------------- linear models


@dataclass(frozen=True, slots=True)
class Linear:
    """A fitted linear model on standardised features."""

    solution: Tensor  # (D + 1, K) float64, the weights and below them the bias
    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K) float32, on the device of the model."""
        weight, bias = self.solution[:-1].float(), self.solution[-1].float()
        logits = torch.empty(len(features), len(bias), device=bias.device)
        size = block_size(*weight.shape, bias.device)
        for start in range(0, len(features), size):
            block = features[start : start + size].to(bias.device).float()
            block = (block - self.mean) / self.std
            torch.addmm(bias, block, weight, out=logits[start : start + size])
        return logits

    def scores(self, features: Tensor, subtask: str) -> Tensor:
        """Probabilities, or regression outputs, (N, K)."""
        logits = self.logits(features)
        if subtask == "multiclass":
            return logits.softmax(1)
        return logits.sigmoid_() if subtask == "multilabel" else logits


@dataclass(frozen=True)
class Train:
    """The samples that linear models are fitted to."""

    features: Tensor  # (N, D) of any float type, anywhere
    targets: Tensor  # (N,) class indices; (N, K) 0 or 1; (N, K) values
    outputs: int
    subtask: str
    mean: Tensor  # (D,) on the device that computes
    std: Tensor

    def blocks(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Standardised features (B, D) and targets (B,) or (B, K), block after block, float64: in
        float32 the line search of L-BFGS ends in rounding errors long before the minimum."""
        return self.converted() if self.features.numel() > KEPT else self.kept

    @cached_property
    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """The blocks of few samples, which take longer to convert than to compute with."""
        return list(self.converted())

    def converted(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The blocks, made one by one."""
        device = self.mean.device
        size = block_size(self.features.shape[1], self.outputs, device)
        for x, t in zip(self.features.split(size), self.targets.split(size), strict=True):
            x, t = x.to(device).double() - self.mean, t.to(device)
            yield x.div_(self.std), t.double() if t.ndim == 2 else t


def moments(features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) over the samples, float32; of a constant feature 1."""
    blocks = features.split(block_size(features.shape[1], 1, device))
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
    square = total.clone()
    for block in blocks:
        total += block.to(device).double().sum(0)
    mean = total / len(features)
    for block in blocks:
        square += (block.to(device).double() - mean).square().sum(0)
    std = (square / len(features)).sqrt()
    std = torch.where(std > 1e-12, std, 1.0)  # a constant feature says nothing and stays 0
    return mean.float(), std.float()


def fit_linear(
    features: Tensor,
    targets: Tensor,
    *,
    outputs: int,
    subtask: str,
    l2: Iterable[float],
    standardize: bool,
    max_iterations: int,
    device: torch.device,
    start: Tensor | None,
) -> Iterator[tuple[float, Linear]]:
    """A linear model for each strength of L2, in the order given, each started from the last.

    Minimises mean_n loss(W x_n + b, t_n) + l2 / 2 |W|^2, the bias free: multinomial cross-entropy,
    binary cross-entropies summed over the labels, or half the squared error summed over targets
    (solved in closed form). scikit-learn's C is 1 / (l2 N).

    Args:
        features: (N, D) of any float type; read in blocks, wherever they are.
        targets: (N,) class indices; (N, K) 0 or 1; (N, K) values.
        outputs: K.
        standardize: whether the features are brought to mean 0 and deviation 1.
        device: what computes, in float64.
        start: (D + 1, K) to start the first one from, the solution of a stronger penalty; None: 0.
    """
    width = features.shape[1]
    mean, std = torch.zeros(width, device=device), torch.ones(width, device=device)
    if standardize:
        mean, std = moments(features, device)
    train = Train(features, targets, outputs, subtask, mean, std)
    if subtask == "regression":
        sums = normal_equations(train)
        for strength in l2:
            yield strength, Linear(ridge(*sums, strength), mean, std, 1, True)
        return
    solution = torch.zeros(width + 1, outputs, dtype=torch.float64)
    solution = (solution if start is None else start).to(device)
    for strength in l2:
        solution, iterations, converged = minimize(train, strength, solution, max_iterations)
        yield strength, Linear(solution, mean, std, iterations, converged)


def value_and_gradient(train: Train, l2: float, solution: Tensor) -> tuple[float, Tensor]:
    """Objective and its gradient (D + 1, K) at weights and bias (D + 1, K), float64."""
    weight, bias = solution[:-1], solution[-1]
    loss, gradient = solution.new_zeros(()), torch.zeros_like(solution)
    for x, t in train.blocks():
        logits = torch.addmm(bias, x, weight)  # (B, K)
        if train.subtask == "multiclass":
            log_p = logits.log_softmax(1)
            loss -= log_p.gather(1, t[:, None]).sum()
            residual = log_p.exp_().scatter_add_(1, t[:, None], x.new_full((len(t), 1), -1.0))
        else:
            loss += F.binary_cross_entropy_with_logits(logits, t, reduction="sum")
            residual = logits.sigmoid_() - t
        gradient[:-1].addmm_(x.T, residual)
        gradient[-1] += residual.sum(0)
    count = len(train.features)
    gradient /= count
    gradient[:-1] += l2 * weight
    return float(loss / count + l2 / 2 * weight.square().sum()), gradient


def minimize(
    train: Train, l2: float, start: Tensor, max_iterations: int
) -> tuple[Tensor, int, bool]:
    """L-BFGS from `start`: weights and bias (D + 1, K), iterations, whether it converged."""
    from scipy.optimize import minimize as lbfgs

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        solution = torch.from_numpy(flat).view(start.shape).to(start.device)
        value, gradient = value_and_gradient(train, l2, solution)
        return value, gradient.cpu().numpy().ravel()

    result = lbfgs(
        objective,
        start.cpu().numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "ftol": 1e-10, "gtol": 1e-6},
    )
    solution = torch.tensor(result.x, device=start.device).view(start.shape)
    return solution, int(result.nit), bool(result.success)


def normal_equations(train: Train) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariance (D, D) of the features and (D, K) of features and targets, means (D,) and (K,)."""
    width, device = train.features.shape[1], train.mean.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    gram, moment = zeros(width, width), zeros(width, train.outputs)
    center, level = zeros(width), zeros(train.outputs)
    for x, t in train.blocks():
        gram.addmm_(x.T, x)
        moment.addmm_(x.T, t)
        center += x.sum(0)
        level += t.sum(0)
    count = len(train.features)
    center, level = center / count, level / count
    return (
        gram / count - center.outer(center),
        moment / count - center.outer(level),
        center,
        level,
    )


def ridge(gram: Tensor, moment: Tensor, center: Tensor, level: Tensor, l2: float) -> Tensor:
    """Weights and bias (D + 1, K) of ridge regression from its normal equations, float64."""
    matrix = gram.cpu().numpy() + l2 * np.eye(len(gram))
    # least squares, as the matrix is singular where l2 is tiny
    weight = np.linalg.lstsq(matrix, moment.cpu().numpy(), rcond=None)[0]
    weight = torch.from_numpy(weight).to(gram.device)
    return torch.cat([weight, (level - center @ weight)[None]])
