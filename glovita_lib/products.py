"""Changes that are products of small matrices: Hadamard (LoHa) and Kronecker (LoKr).

A convolution's weight is read as the matrix (out, in * kernel).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.adapter import Adapter, attach_all
from glovita_lib.spec_lora import Loha, Lokr
from glovita_lib.structure import trunk
from glovita_lib.targets import Target, by_pattern, resolve


class Product(Adapter):
    """W + s M with a matrix M made of small ones."""

    scale: float
    rank_dropout: float

    def product(self) -> Tensor:
        """M (out, in * kernel)."""
        raise NotImplementedError

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s M; in training some rows of M are dropped, the others grow so that the mean
        stays."""
        change = self.product() * self.scale
        if self.training and self.rank_dropout > 0:
            change = change * F.dropout(change.new_ones(len(change), 1), self.rank_dropout)
        return weight + change.view(weight.shape)


class LohaAdapter(Product):
    """(B1 A1) * (B2 A2), elementwise; starts at A2 = 0."""

    def __init__(self, spec: Loha, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, width = weight.flatten(1).shape
        self.scale, self.rank_dropout = spec.alpha / rank, spec.rank_dropout
        self.B1, self.B2 = (nn.Parameter(torch.empty(out, rank)) for _ in range(2))
        self.A1, self.A2 = (nn.Parameter(torch.zeros(rank, width)) for _ in range(2))
        for started in (self.B1, self.A1, self.B2):
            nn.init.kaiming_uniform_(started, a=math.sqrt(5))

    def product(self) -> Tensor:
        """(B1 A1) * (B2 A2)."""
        return (self.B1 @ self.A1) * (self.B2 @ self.A2)


class LokrAdapter(Product):
    """kron(W1, W2) with W2 = B A where that is smaller; starts at W1 = 0."""

    def __init__(self, spec: Lokr, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inside = weight.shape[:2]
        kernel = weight[0, 0].numel()
        self.scale, self.rank_dropout = spec.alpha / rank, spec.rank_dropout
        (rows1, rows2), (columns1, columns2) = (
            factor_pair(size, spec.decompose_factor) for size in (out, inside)
        )
        self.W1 = nn.Parameter(torch.zeros(rows1, columns1))
        self.full = rank >= max(rows2, columns2) / 2
        if self.full:
            self.W2 = nn.Parameter(torch.empty(rows2, columns2 * kernel))
            nn.init.kaiming_uniform_(self.W2, a=math.sqrt(5))
            return
        self.B = nn.Parameter(torch.empty(rows2, rank))
        self.A = nn.Parameter(torch.empty(rank, columns2 * kernel))
        for started in (self.B, self.A):
            nn.init.kaiming_uniform_(started, a=math.sqrt(5))

    def product(self) -> Tensor:
        """kron(W1, W2): the kernel is the fastest index of both, so one product serves all."""
        return torch.kron(self.W1, self.W2 if self.full else self.B @ self.A)


def factor_pair(size: int, largest: int) -> tuple[int, int]:
    """Two factors of a size, the first at most the second and at most `largest` (-1: no limit)."""
    bound = math.isqrt(size) if largest < 1 else min(largest, math.isqrt(size))
    first = max(f for f in range(1, bound + 1) if size % f == 0)
    return first, size // first


def apply_product(spec: Loha | Lokr, model: nn.Module) -> None:
    """Freeze the encoder and put an adapter on every target."""
    root = trunk(model)
    targets = resolve(root, spec.targets, allowed=("linear", "conv"))
    ranks = by_pattern(spec.rank_pattern, targets, spec.rank)
    kind = LohaAdapter if isinstance(spec, Loha) else LokrAdapter

    def make(target: Target, weight: Tensor) -> Adapter:
        return kind(spec, weight, ranks[target.name])

    attach_all(root, targets, make, "none")
