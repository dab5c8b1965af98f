"""Models of probes on features that no gradient step changes: votes of neighbours, linear models.

Features and targets are read in blocks, which are moved to the device that computes.

N samples, D width, K classes or targets, M train samples, B samples of a block.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.data import Standardizer

BLOCK = 16384  # samples whose logits exist at a time, at most
ON_CPU, ON_GPU = 2**18, 2**24  # features, or logits, of a block: 2 MiB in a cache, or busy cores
KEPT = 2**26  # features that stay as they are computed with: 512 MiB in float64
SHARE = 0.5  # of the free memory of a device that features may take
FEATURES_AT_ONCE = 1024  # of a ridge that are float64 at a time
TOLERANCE = 1e-6  # largest entry of the gradient at a minimum, in units of that at weights of 0


def probe_block_size(width: int, outputs: int, device: torch.device) -> int:
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
    size = probe_block_size(1, outputs, distances.device)
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
    """A fitted linear model on standardised or centred features."""

    weight: Tensor  # (K, D) float32
    bias: Tensor  # (K,)
    scale: Standardizer
    iterations: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K) float32, on the device of the model."""
        device = self.bias.device
        logits = torch.empty(len(features), len(self.bias), device=device)
        size = probe_block_size(self.weight.shape[1], len(self.weight), device)
        for start in range(0, len(features), size):
            block = self.scale(features[start : start + size].to(device))
            torch.addmm(self.bias, block, self.weight.T, out=logits[start : start + size])
        return logits


@dataclass(frozen=True)
class Train:
    """The samples that linear models are fitted to."""

    features: Tensor  # (N, D) of any float type, anywhere
    targets: Tensor  # (N,) class indices; (N, K) 0 or 1; (N, K) values
    outputs: int
    subtask: str
    scale: Standardizer
    device: torch.device  # that computes

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
        device = self.device
        size = probe_block_size(self.features.shape[1], self.outputs, device)
        for x, t in zip(self.features.split(size), self.targets.split(size), strict=True):
            x, t = self.scale(x.to(device)), t.to(device)
            yield x.double(), t.double() if t.ndim == 2 else t


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
) -> Iterator[tuple[float, Linear]]:
    """A linear model for each strength of L2, in the order given, each started from the last.

    Minimises mean_n loss(W x_n + b, t_n) + l2 / 2 |W|^2, the bias free: multinomial cross-entropy,
    binary cross-entropies summed over the labels, or half the squared error summed over targets
    (solved in closed form). scikit-learn's C is 1 / (l2 N).

    Args:
        features: (N, D) of any float type; read in blocks, wherever they are.
        targets: (N,) class indices; (N, K) 0 or 1; (N, K) values.
        outputs: K.
        l2: strengths; from strong to weak each start is near its minimum.
        standardize: whether the features are brought to mean 0 and deviation 1, or to mean 0
            alone: the bias is free, so this moves no minimum, but rounding then loses no digits.
        device: what computes, in float64.
    """
    width = features.shape[1]
    blocks = features.split(probe_block_size(width, 1, device))
    scale = Standardizer.of(lambda: (block.to(device) for block in blocks))
    if not standardize:
        scale = replace(scale, std=np.ones(width))
    train = Train(features, targets, outputs, subtask, scale, device)
    if subtask == "regression":
        sums = normal_equations(train)
        for strength in l2:
            weight, bias = ridge(*sums, strength)
            yield strength, Linear(weight.T.float(), bias.float(), scale, 1, True)
        return
    solution = torch.zeros(outputs, width + 1, dtype=torch.float64, device=device)
    largest = value_and_gradient(train, 0.0, solution)[1].abs().max()
    tolerance = TOLERANCE * float(largest)
    for strength in l2:
        solution, steps, done = minimize(train, strength, solution, tolerance, max_iterations)
        weight, bias = solution[:, :-1].float(), solution[:, -1].float()
        yield strength, Linear(weight, bias, scale, steps, done)


def value_and_gradient(train: Train, l2: float, solution: Tensor) -> tuple[float, Tensor]:
    """Objective and its gradient (K, D + 1) at weights and, in the last column, bias (K, D + 1),
    float64."""
    weight, bias = solution[:, :-1], solution[:, -1:]
    loss, gradient = solution.new_zeros(()), torch.zeros_like(solution)
    for x, t in train.blocks():
        # samples in columns: both products take half as long, and exp works on whole rows
        logits = torch.addmm(bias, weight, x.T)  # (K, B)
        if train.subtask == "multiclass":
            log_p, own = logits.log_softmax(0), t[None]
            loss -= log_p.gather(0, own).sum()
            residual = log_p.exp_().scatter_add_(0, own, x.new_full((1, len(t)), -1.0))
        else:
            loss += F.binary_cross_entropy_with_logits(logits, t.T, reduction="sum")
            residual = logits.sigmoid_() - t.T
        gradient[:, :-1].addmm_(residual, x)
        gradient[:, -1] += residual.sum(1)
    count = len(train.features)
    gradient /= count
    gradient[:, :-1] += l2 * weight
    return float(loss / count + l2 / 2 * weight.square().sum()), gradient


def minimize(
    train: Train, l2: float, start: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int, bool]:
    """L-BFGS from `start` to a gradient without an entry above `tolerance`: weights and bias
    (K, D + 1), iterations, whether it converged."""
    from scipy.optimize import minimize as lbfgs

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        solution = torch.from_numpy(flat).view_as(start).to(start.device)
        value, gradient = value_and_gradient(train, l2, solution)
        return value, gradient.cpu().numpy().ravel()

    result = lbfgs(
        objective,
        start.cpu().numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxls": 50, "ftol": 1e-14, "gtol": tolerance},
    )
    solution = torch.from_numpy(result.x).view_as(start).to(start.device)
    return solution, int(result.nit), bool(result.success)


def normal_equations(train: Train) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariance (D, D) of the features and (D, K) of features and targets, means (D,) and (K,)."""
    width, device = train.features.shape[1], train.device

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


def ridge(
    gram: Tensor, moment: Tensor, center: Tensor, level: Tensor, l2: float
) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and bias (K,) of ridge regression from its normal equations, float64."""
    matrix = gram.cpu().numpy() + l2 * np.eye(len(gram))
    # least squares, as the matrix is singular where l2 is tiny
    weight = np.linalg.lstsq(matrix, moment.cpu().numpy(), rcond=None)[0]
    weight = torch.from_numpy(weight).to(gram.device)
    return weight, level - center @ weight


# ---------------------------------------------------------------------------------------- ridge


@dataclass(frozen=True, slots=True)
class Ridge:
    """outputs = W x + b, fitted to targets by |W x + b - t|^2 summed over samples + alpha |W|^2,
    the bias free, with the strength that has the smallest squared error of leave-one-out."""

    weight: Tensor  # (D, K) float64
    bias: Tensor  # (K,)
    alpha: float
    candidates: list[dict[str, float]]
    """Strengths with the mean squared error of leave-one-out."""
    error: float
    """The smallest one."""

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """[(N, D_i), ...] beside each other -> (N, K) float64."""
        found = self.bias.repeat(len(features[0]), 1)
        start = 0
        for part in few(features):
            found += part.T @ self.weight[start : start + len(part)]
            start += len(part)
        return found


def few(features: Sequence[Tensor]) -> Iterator[Tensor]:
    """Features [(N, D_i), ...] as (d, N) float64 after others, so few that they stay in the
    cache."""
    for part in features:
        for rows in part.T.split(FEATURES_AT_ONCE):
            yield rows.double()


def gram(x: Tensor) -> Tensor:
    """x^T x; NumPy computes half of it where that is enough."""
    if x.device.type != "cpu":
        return x.T @ x
    values = x.contiguous().numpy()
    return torch.from_numpy(values.T @ values)


def fit_ridge(features: Sequence[Tensor], targets: Tensor, alphas: Sequence[float]) -> Ridge:
    """A ridge with the best of some strengths, as scikit-learn's RidgeCV and RidgeClassifierCV
    choose it: e_i = (y - H y)_i / (1 - H_ii) with the hat matrix H, the first of equal ones.

    Args:
        features: [(N, D_i), ...] beside each other, of any float type.
        targets: (N, K); classes are -1 and 1.
    """
    y = targets.double().to(features[0].device)
    level = y.mean(0)
    y = y - level
    count, width = len(y), sum(part.shape[1] for part in features)
    center = torch.cat([part.mean(1) for part in few(features)])  # (D,)
    wide = count <= width
    if wide:
        product = sum(gram(part - part.mean(1, keepdim=True)) for part in few(features))
    else:
        x = torch.cat(list(few(features))).T - center  # (N, D)
        product = gram(x)
    values, basis = torch.linalg.eigh(product)
    values = values.clamp(min=0)
    # directions of the samples: eigenvectors of x x^T, without those that x does not reach
    limit = values.max() * max(count, width) * torch.finfo(torch.float64).eps
    values, basis = values[values > limit], basis[:, values > limit]
    left = basis if wide else x @ basis / values.sqrt()  # (N, R), orthonormal
    inside = left.T @ y  # (R, K)
    errors = []
    for alpha in alphas:
        share = values / (values + alpha)
        left_out = 1 - 1 / count - left.square() @ share  # 1 - H_ii
        residual = y - left @ (share[:, None] * inside)
        tiny = torch.finfo(torch.float64).eps
        errors.append(float((residual / left_out.clamp(min=tiny)[:, None]).square().mean()))
    best = int(np.argmin(errors))
    alpha = alphas[best]
    scaled = inside / (values + alpha)[:, None]
    # W = x^T (x x^T + alpha)^-1 y, or (x^T x + alpha)^-1 x^T y
    if wide:
        dual = basis @ scaled  # (N, K), its columns sum to 0: means of x count for nothing
        weight = torch.cat([part @ dual for part in few(features)])
    else:
        weight = basis @ (values.sqrt()[:, None] * scaled)
    tried = zip(alphas, errors, strict=True)
    candidates = [{"alpha": one, "squared_error": error} for one, error in tried]
    return Ridge(weight, level - center @ weight, alpha, candidates, errors[best])
